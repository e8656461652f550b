"""validate.py --calibration-images: a policy that is certified on images without labels."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from scripts import run

from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.cli import train, validate


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    """A flat folder of 120 images of the three colours, one of which is broken, and a file that is no image."""
    root = tmp_path_factory.mktemp('scans')
    random = np.random.default_rng(1)
    for i in range(120):
        pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[..., i % 3] += 120
        Image.fromarray(pixels).save(root / f'{i}.png')
    (root / 'broken.png').write_bytes(b'no image')
    (root / 'notes.txt').write_text('not an image')
    return root


@pytest.fixture
def flags(trained, folder, tmp_path):
    path = tmp_path / 'run'
    shutil.copytree(trained, path)
    shared = ['--split', 'test', '--device', 'cpu', '-j', 0, '-b', 16, '--max-bad-samples', 1]
    goal = ['--adaptive', '--max-drop', 10, '--risk', 'disagreement']
    return [folder, '--checkpoint', path, *shared, *goal]


def test_certified_without_labels(flags, scans, tmp_path, capsys):
    more = ['--save-policy', '--results-file', tmp_path / 'a.json']
    assert run(validate.main, [*flags, '--calibration-images', scans, *more]) == 0
    out = capsys.readouterr().out
    assert 'agreement with the last exit' in out and 'certified: disagreement on new images of at most 10 points' in out
    policy = ExitPolicy.load(tmp_path / 'run' / 'exit_policy.json')
    assert (policy.calibration_images, policy.calibration_data) == (120, str(scans))
    assert policy.certificate['risk'] == 'disagreement' and policy.certificate['images'] == 96
    assert json.loads((tmp_path / 'a.json').read_text())['adaptive']['fitted_to'].startswith('fitted to 120 images')
    # the numbers of the images, which stand in for labels, have no influence
    assert run(validate.main, [*flags, '--calibration-images', *sorted(scans.glob('*.png'))[::-1], *more]) == 0
    again = ExitPolicy.load(tmp_path / 'run' / 'exit_policy.json')
    assert again.calibration_images == 120 and again.calibration_data.endswith('and 120 more')


def test_mistakes(flags, scans, folder, tmp_path, capsys):
    images = ['--calibration-images', scans]
    other_risk = [*flags[:-2], *images]
    cases = [
        (other_risk, 'expected --max-drop P --risk disagreement'),
        ([*flags, *images, '--report', tmp_path / 'a.html'], 'expected no --report, which needs labels'),
        ([*flags, *images, '--calibration-split', 'train'], 'expected no --calibration-split'),
        ([*flags, *images, '--aggregate', 'fitted'], 'another --aggregate than fitted'),
        ([*flags, *images, '--max-bad-samples', 0], 'broken.png'),
        ([*flags, '--calibration-images', tmp_path / 'none'], 'there is no such file or folder'),
        (
            [*flags, '--calibration-images', folder / 'test' / 'red'],
            'the images of test that the policy is reported on',
        ),
        ([*flags, '--calibration-images', folder / 'train'], 'was trained on'),
        ([*flags, '--calibration-images', scans / '1.png'], '1 image'),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert run(validate.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error


@pytest.mark.parametrize('kind', ['torchvision', 'tar'])
def test_images_of_other_sources(kind, folder, small_flags, tmp_path, capsys):
    """torchvision's folders and tar files have files too."""
    where = ['--output', tmp_path, '--experiment', 'run', '--epochs', 1, '--val-fraction', 0.3]
    if kind == 'torchvision':
        train_data, test_data = ([folder / split, '--dataset', 'torch/image_folder'] for split in ('train', 'test'))
    else:
        for split in ('train', 'test'):
            with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
                tar.add(folder / split, '.')
        train_data, test_data = [tmp_path / 'train.tar'], [tmp_path / 'test.tar']
    assert run(train.main, [*train_data, *small_flags, *where]) == 0
    other = tmp_path / 'others'
    other.mkdir()
    for i, path in enumerate(sorted((folder / 'test' / 'red').glob('*.png'))):
        Image.open(path).rotate(90).save(other / f'{i}.png')
    flags = [*test_data, '--checkpoint', tmp_path / 'run', '--split', 'test', '--device', 'cpu', '-j', 0]
    flags += ['--adaptive', '--max-drop', 90, '--risk', 'disagreement', '--confidence', 'none', '--calibration-images']
    for images, message in (
        (folder / 'train', 'was trained on'),
        (folder / 'test', 'is one of the images of test that the policy is reported on'),
        (other, None),
    ):
        capsys.readouterr()
        assert run(validate.main, [*flags, images]) == (2 if message else 0)
        if message:
            error = capsys.readouterr().err
            assert message in error and error.count('\n') == 1, error


def test_training_images_of_another_folder_and_copies(flags, folder, tmp_path, capsys):
    other = tmp_path / 'other'
    shutil.copytree(folder / 'test', other / 'test')
    copies = tmp_path / 'copies'
    copies.mkdir()
    for i, file in enumerate(sorted((folder / 'test' / 'red').glob('*.png'))):
        shutil.copy(file, copies / f'{i}.png')
    cases = [
        (['--data-dir', other], folder / 'train', 'was trained on'),
        ([], copies, 'is one of the images of test that the policy is reported on'),
    ]
    for more, images, message in cases:
        argv = [*(flags[1:] if more else flags), *more, '--calibration-images', images]
        assert run(validate.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error
