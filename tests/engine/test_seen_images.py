"""Images that were trained on do not become held-out ones, whatever the names of their files and splits."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import run

from timm_mlcsd.cli import train, validate
from timm_mlcsd.engine.datasets import load_dataset


@pytest.fixture
def data(folder, tmp_path):
    """Train (48 images), and a validation split of as many others as in test."""
    root = shutil.copytree(folder, tmp_path / 'data')
    for path in sorted((root / 'test').glob('*/*.png')):
        other = root / 'val' / path.parent.name / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(90).save(other)
    return root


def train_on(place, name, small_flags, tmp_path, *more):
    flags = [place, *small_flags, '--output', tmp_path, '--experiment', name, '--epochs', 1, *more]
    assert run(train.main, flags) == 0
    return tmp_path / name


def test_a_start_from_weights_that_saw_the_held_out_images(data, small_flags, tmp_path, capsys, caplog):
    whole = train_on(data, 'whole', small_flags, tmp_path, '--val-split', 'val')
    start = ['--initial-checkpoint', whole / 'model_best.pth.tar']
    train_on(data, 'part', small_flags, tmp_path, '--val-fraction', 0.25, *start)
    assert 'was trained on 12 of the 12 images that are held out now' in caplog.text
    # nor do they certify a policy, of a run that was resumed either
    adaptive = [data, '-j', 0, '-b', 12, '--device', 'cpu', '--split', 'test', '--adaptive', '--budget', '100%']
    other = ['--initial-checkpoint', whole / 'last.pth.tar']
    train_on(data, 'part', small_flags, tmp_path, '--val-fraction', 0.25, '--epochs', 2, '--resume', 'auto', *other)
    assert 'Without effect: --initial-checkpoint' in caplog.text
    assert run(validate.main, [*adaptive, '--checkpoint', tmp_path / 'part']) == 2
    assert 'of the images of the held-out part of train were trained on' in capsys.readouterr().err
    caplog.clear()
    train_on(data, 'same', small_flags, tmp_path, '--val-split', 'val', *start)
    assert 'that are held out now' not in caplog.text
    # a start from a start
    caplog.clear()
    start = ['--initial-checkpoint', tmp_path / 'same' / 'model_best.pth.tar']
    train_on(data, 'child', small_flags, tmp_path, '--val-fraction', 0.25, *start)
    assert 'was trained on 12 of the 12 images that are held out now' in caplog.text
    # copies of training images under other names in another data set
    shutil.copytree(data / 'test', tmp_path / 'other' / 'train')
    shutil.copytree(data / 'train', tmp_path / 'other' / 'val')
    train_on(tmp_path / 'other', 'copies', small_flags, tmp_path, '--val-split', 'val', *start)
    assert 'was trained on about 100% of the images that are held out now' in caplog.text


def test_copies_among_the_training_images(data, small_flags, tmp_path, capsys, caplog):
    whole = train_on(data, 'whole', small_flags, tmp_path, '--val-split', 'val')
    assert 'copies' not in caplog.text
    for path in sorted((data / 'train').glob('*/*.png')):
        shutil.copy(path, path.with_name(f'{path.stem} (1).png'))
    train_on(data, 'part', small_flags, tmp_path, '--val-fraction', 0.25)
    assert 'of the images that choose the best epoch are among the training images' in caplog.text
    flags = [data, '-j', 0, '-b', 12, '--device', 'cpu', '--split', 'test', '--adaptive', '--budget', '100%']
    assert run(validate.main, [*flags, '--checkpoint', whole]) == 0
    assert run(validate.main, [*flags, '--checkpoint', tmp_path / 'part']) == 2
    assert 'of the images of the held-out part of train were trained on' in capsys.readouterr().err
    caplog.clear()
    shutil.copytree(data / 'train', data / 'val', dirs_exist_ok=True)
    train_on(data, 'split', small_flags, tmp_path, '--val-split', 'val')
    assert 'of the images that choose the best epoch are among the training images' in caplog.text


@pytest.mark.parametrize('count, share', [(8, '67%'), (1, '20%')])
def test_training_images_that_moved_to_the_validation_split(data, small_flags, tmp_path, capsys, caplog, count, share):
    folder = train_on(data, 'run', small_flags, tmp_path, '--val-split', 'val')
    for path in sorted((data / 'train').glob('*/*.png')):
        if int(path.stem) < count:
            path.rename(data / 'val' / path.parent.name / f't{path.name}')
    resumed = [data, *small_flags, '--val-split', 'val', '--resume', folder, '--epochs', 2]
    assert run(train.main, resumed) == 2
    assert f'about {share} of the images that would choose the best epoch were trained on' in capsys.readouterr().err
    flags = [data, '--checkpoint', folder, '--split', 'test', '--adaptive', '--budget', '100%', '-j', 0]
    assert run(validate.main, flags) == (2 if count == 8 else 0)  # from a tenth on a warning, from half an error
    assert f'about {share} of the images of val were trained on' in capsys.readouterr().err + caplog.text


def test_a_training_split_that_grows(data, small_flags, tmp_path):
    folder = train_on(data, 'run', small_flags, tmp_path, '--val-split', 'val')
    Image.new('RGB', (16, 16), 'red').save(data / 'train' / 'red' / 'more.png')
    # one placeholder in both
    shutil.copy(data / 'train' / 'red' / '0.png', data / 'val' / 'red' / '0.png')
    resumed = [data, *small_flags, '--val-split', 'val', '--resume', folder, '--epochs', 2]
    assert run(train.main, resumed) == 0


def test_a_report_on_the_images_that_the_policy_was_fitted_to(data, small_flags, tmp_path, capsys):
    folder = train_on(data, 'run', small_flags, tmp_path, '--val-split', 'val')
    flags = ['--checkpoint', folder, '-j', 0, '-b', 12, '--device', 'cpu', '--adaptive']
    assert run(validate.main, [data, *flags, '--split', 'test', '--budget', '100%', '--save-policy']) == 0
    shutil.copytree(data / 'val', tmp_path / 'copy' / 'test')
    for place in (data / 'val', tmp_path / 'copy'):
        capsys.readouterr()
        assert run(validate.main, [place, *flags, '--split', 'test']) == 2
        assert 'was fitted to val, so a report on these images would promise too much' in capsys.readouterr().err
    # a folder of test images has no split val, and is no split val
    for place in (data, data / 'test'):
        assert run(validate.main, [place, *flags, '--split', 'test']) == 0


def test_a_report_on_held_out_images_in_another_place(data, small_flags, tmp_path, capsys):
    folder = train_on(data, 'run', small_flags, tmp_path, '--val-fraction', 0.5)
    flags = ['--checkpoint', folder, '-j', 0, '-b', 8, '--device', 'cpu', '--adaptive', '--split', 'test']
    assert run(validate.main, [data, *flags, '--budget', '100%', '--save-policy']) == 0
    images = load_dataset(train.read_config([str(data)]).data, 'train')
    for index in torch.load(folder / 'last.pth.tar', weights_only=True)['val_indices'].tolist():
        path = Path(images.reader.filename(index, absolute=True))
        (tmp_path / 'held' / 'test' / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / 'held' / 'test' / path.parent.name)
    capsys.readouterr()
    assert run(validate.main, [tmp_path / 'held', *flags]) == 2
    assert 'was fitted to the held-out part of train, so a report on these' in capsys.readouterr().err
