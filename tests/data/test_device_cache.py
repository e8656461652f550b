"""Images kept on the device: what comes out of the standard pipeline, for less work."""

import contextlib
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform

from timm_mlcsd.data import CachedLoader, PadCrop, cache_images, device_cache

SIZE, CHANS = 6, 3
ONE, ZERO = torch.ones(CHANS), torch.zeros(CHANS)


def images(count=10, height=SIZE, width=SIZE):
    return torch.randint(1, 256, (count, height, width, CHANS), dtype=torch.uint8)


@pytest.mark.parametrize('channels_last', [False, True])
def test_evaluation_gives_every_image_once_in_order(channels_last):
    data, targets = images(10), torch.arange(10)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    loader = CachedLoader(data, targets, 4, mean, std, channels_last=channels_last)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    got = torch.cat([x for x, _ in batches])
    expected = (data.permute(0, 3, 1, 2) / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    torch.testing.assert_close(got, expected)
    assert torch.equal(torch.cat([y for _, y in batches]), targets)
    order = torch.channels_last if channels_last else torch.contiguous_format
    assert all(x.is_contiguous(memory_format=order) for x, _ in batches)


def test_training_shuffles_and_drops_the_short_batch():
    loader = CachedLoader(images(10), torch.arange(10), 4, ZERO, ONE, training=True)
    first, second = (torch.cat([y for _, y in loader]).tolist() for _ in range(2))
    assert len(loader) == 2 and len(set(first)) == len(set(second)) == 8 and first != second


def test_same_seed_same_batches():
    loader = CachedLoader(images(8), torch.arange(8), 4, ZERO, ONE, True, 2, 0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(list(loader))
    assert all(torch.equal(a, b) for one, other in zip(*runs) for a, b in zip(one, other))


def test_draws_of_the_network_do_not_change_the_batches():
    loader = CachedLoader(images(8), torch.arange(8), 2, ZERO, ONE, True, 2, 0.5)
    runs = []
    for draws in (0, 5):
        torch.manual_seed(3)
        runs.append([(x, y, torch.rand(draws)) for x, y in loader])
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y, _), (x2, y2, _) in zip(*runs))


@pytest.mark.parametrize('padding, hflip', [(0, 0.0), (2, 0.5)])
def test_training_batches_in_half_precision_are_the_rounded_ones(padding, hflip):
    data, mean, std = images(8), torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    batches = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(3)
        batches += CachedLoader(data, torch.arange(8), 8, mean, std, True, padding, hflip, dtype=dtype)
    (x, y), (half, same_y) = batches
    assert half.dtype == torch.bfloat16 and torch.equal(half, x.bfloat16()) and torch.equal(y, same_y)
    if not padding:
        expected = (data[y].permute(0, 3, 1, 2) / 255 - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
        torch.testing.assert_close(x, expected)


def test_batches_are_computed_one_ahead_on_a_stream_of_their_own(monkeypatch):
    """The order of the calls on a GPU, without one."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f'{self.name} waits for {other.name}')

    user = Stream('user')
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Stream('own'))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: user)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, 'record_stream', lambda t, stream: calls.append(f'record {t.item()}'))

    def batches():
        for i in range(2):
            calls.append(f'compute {i}')
            yield torch.tensor(i), torch.tensor(i)

    for x, _ in device_cache._one_ahead(batches(), torch.device('cpu')):
        calls.append(f'use {x.item()}')
    first = ['own waits for user', 'compute 0', 'user waits for own', 'record 0', 'record 0', 'compute 1', 'use 0']
    assert calls == [*first, 'user waits for own', 'record 1', 'record 1', 'use 1']


def test_mixing_keeps_float32():
    mixup = Mixup(mixup_alpha=0.5, num_classes=8)
    ((batch, _),) = CachedLoader(images(8), torch.arange(8), 8, ZERO, ONE, True, mixup=mixup, dtype=torch.bfloat16)
    assert batch.dtype == torch.float32


@pytest.mark.parametrize('hflip, vflip', [(0.5, 0.0), (0.25, 0.1), (0.0, 0.0)])
def test_same_distribution_as_the_standard_pipeline(hflip, vflip):
    # every outcome is one of 9 offsets and 4 pairs of flips; count them all, in both pipelines
    height, width, draws = 3, 4, 9000
    pixels = np.arange(1, height * width * 3 + 1, dtype=np.uint8).reshape(height, width, 3)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    expected = {}
    for top, left, v, h in itertools.product(range(3), range(3), range(2), range(2)):
        crop = padded[top : top + height, left : left + width][:: 1 - 2 * v, :: 1 - 2 * h]
        expected[crop.tobytes()] = (vflip if v else 1 - vflip) * (hflip if h else 1 - hflip) / 9

    data = torch.from_numpy(pixels)[None].expand(draws, -1, -1, -1)
    ((batch, _),) = CachedLoader(data, torch.zeros(draws), draws, ZERO, ONE, True, 1, hflip, vflip)
    ours = (255 * batch).round().to(torch.uint8)
    transform = create_transform(
        (3, height, width), True, color_jitter=0, hflip=hflip, vflip=vflip, use_prefetcher=True
    )
    transform.transforms[0] = PadCrop((height, width), padding=1)
    theirs = torch.stack([transform(Image.fromarray(pixels)) for _ in range(draws)])
    for crops in (ours, theirs):
        counts = Counter(crop.permute(1, 2, 0).numpy().tobytes() for crop in crops)
        assert set(counts) <= set(expected)
        for outcome, share in expected.items():
            # 5 standard errors: chance alone fails once in 2 million
            assert abs(counts[outcome] / draws - share) <= 5 * (share * (1 - share) / draws) ** 0.5


def test_crops_do_not_mix_images():
    # images of one colour each: whatever the crop, a pixel is its image's colour or black
    colours = torch.arange(1, 101, dtype=torch.uint8)
    data = colours[:, None, None, None].expand(-1, SIZE, SIZE, CHANS)
    loader = CachedLoader(data, torch.arange(100), 100, ZERO, ONE, True, 4, 0.5, 0.5)
    ((batch, targets),) = loader
    values = (255 * batch).round().long()
    assert ((values == targets[:, None, None, None] + 1) | (values == 0)).all()
    assert (values.flatten(1).amax(1) == targets + 1).all() and (values == 0).any()


class Data(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_caching_takes_pil_images_tensors_and_grey_ones():
    pixels = images(3).numpy()
    device = torch.device('cpu')
    data, targets = cache_images(Data([(Image.fromarray(p), i) for i, p in enumerate(pixels)]), device)
    assert np.array_equal(data.numpy(), pixels) and targets.tolist() == [0, 1, 2]
    tensors = [(torch.from_numpy(p).permute(2, 0, 1), torch.tensor([i, 7])) for i, p in enumerate(pixels)]
    data, targets = cache_images(Data(tensors), device)
    assert np.array_equal(data.numpy(), pixels) and targets.tolist() == [[0, 7], [1, 7], [2, 7]]
    data, _ = cache_images(Data([(Image.fromarray(pixels[0, ..., 0]), 0)]), device)
    assert data.shape == (1, SIZE, SIZE, 1)
