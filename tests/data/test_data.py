"""Data that timm lacks."""

import numpy as np
import pytest
from PIL import Image

from timm_mlcsd.data import DigitsDataset, PadCrop, TransformSubset, hold_out


def test_digits_splits_are_disjoint_and_complete():
    pytest.importorskip('sklearn')
    splits = [DigitsDataset(name) for name in ('train', 'validation', 'test')]
    assert [len(s) for s in splits] == [1197, 240, 360]
    assert sorted(i for s in splits for i in s.indices) == list(range(1797))
    for split in splits:
        assert {target for _, target in split} == set(range(10))


def test_digits_are_the_real_ones():
    datasets = pytest.importorskip('sklearn.datasets')
    digits = datasets.load_digits()
    split = DigitsDataset('test')
    image, target = split[3]
    i = split.indices[3]
    assert image.size == (32, 32) and image.mode == 'RGB' and target == digits.target[i]
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX).convert('L')) / 255 * 16
    assert np.corrcoef(small.ravel(), digits.images[i].ravel())[0, 1] > 0.95
    with pytest.raises(ValueError, match="no split 'val'; choose one of train, validation, test"):
        DigitsDataset('val')


def test_hold_out():
    kept, held = hold_out(1000, 0.1, seed=3)
    assert len(held) == 100 and sorted([*kept, *held]) == list(range(1000))
    assert hold_out(1000, 0.1, seed=3) == (kept, held)
    assert hold_out(1000, 0.1, seed=4)[1] != held
    assert [len(part) for part in hold_out(3, 0.001, seed=0)] == [2, 1]
    assert [len(part) for part in hold_out(3, 0.999, seed=0)] == [1, 2]


def test_subsets_have_transforms_of_their_own():
    data = [(i, i % 2) for i in range(10)]
    a, b = TransformSubset(data, [1, 3]), TransformSubset(data, [2])
    a.transform = lambda x: -x
    assert [a[0], a[1], b[0]] == [(-1, 1), (-3, 1), (2, 0)]
    assert (len(a), len(b)) == (2, 1)


def test_pad_crop_shifts_by_up_to_four_and_pads_with_black():
    pixels = np.arange(1, 101, dtype=np.uint8).reshape(10, 10)
    image = Image.fromarray(pixels)
    crop = PadCrop((10, 10))
    padded = np.pad(pixels, 4)
    offsets = set()
    for _ in range(800):
        out = np.asarray(crop(image))
        found = [
            (dy, dx) for dy in range(9) for dx in range(9) if np.array_equal(out, padded[dy : dy + 10, dx : dx + 10])
        ]
        assert len(found) == 1
        offsets.add(found[0])
    # 81 places, 800 draws: the chance to miss any given one is 5e-5
    assert len(offsets) > 75


def test_pad_crop_resizes_other_images():
    assert PadCrop((32, 24))(Image.new('RGB', (50, 40))).size == (24, 32)
