"""A policy is not reported on the images that it was fitted to, nor fitted to those of training."""

import os
import pickle
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from scripts import run

from timm_mlcsd.cli import push, train, validate
from timm_mlcsd.engine.calibration_data import check_calibration_split
from timm_mlcsd.engine.datasets import load_dataset, train_and_val_datasets
from timm_mlcsd.errors import UserError


@pytest.fixture
def data(folder, tmp_path):
    """The folder of colours with splits that hold its images under other names, and one of other images."""
    root = shutil.copytree(folder, tmp_path / 'data')
    shutil.copytree(root / 'test', root / 'copies')
    os.symlink('test', root / 'link')
    shutil.copytree(root / 'train', root / 'nearly')
    (root / 'nearly' / 'red' / '3.png').unlink()
    for path in sorted((root / 'test').glob('*/*.png')):
        other = root / 'others' / path.parent.name / path.name
        other.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).rotate(90).save(other)
    return root


@pytest.fixture
def flags(trained, data, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    return [data, '--checkpoint', path, '--device', 'cpu', '-j', 0, '-b', 16, '--adaptive', '--split', 'test']


@pytest.mark.parametrize(
    'split, message',
    [
        ('copies', 'about 100% of the images of copies are images of test, which the policy is reported on'),
        ('link', 'about 100% of the images of link are images of test'),
        ('nearly', 'of the images of nearly were trained on'),
        ('others', None),
    ],
)
def test_the_same_images_in_another_split(flags, split, message, capsys):
    argv = [*flags, '--calibration-split', split, '--budget', '100%']
    assert run(validate.main, argv) == (2 if message else 0)
    error = capsys.readouterr().err
    assert message is None or (message in error and error.count('\n') == 1)


def test_a_policy_that_was_fitted_without_labels(flags, data, monkeypatch, tmp_path, capsys, caplog):
    goal = ['--max-drop', 90, '--risk', 'disagreement', '--confidence', 'none', '--save-policy']
    monkeypatch.chdir(data)  # a folder without a separator in its name
    assert run(validate.main, [*flags, *goal, '--calibration-images', 'others']) == 0
    assert run(validate.main, flags) == 0 and 'promises too much' not in caplog.text
    assert run(validate.main, [*flags[:-1], 'others']) == 2
    assert 'was fitted to ./others, so a report on these images would promise too much' in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run(validate.main, [*flags[:-1], 'others']) == 0
    assert 'fitted to 12 images of ./others; whether they are reported on cannot be checked' in caplog.text
    # of several places the first is known
    caplog.clear()
    places = ['--calibration-images', data / 'others' / 'red', data / 'others' / 'blue']
    assert run(validate.main, [*flags, *goal, *places]) == 0
    assert run(validate.main, flags) == 0
    assert 'others/red and 1 more; whether they are reported on cannot be checked' in caplog.text


def test_a_folder_that_has_no_record_of_its_training(flags, data, tmp_path, capsys, caplog):
    goal = ['--budget', '100%', '--calibration-split', 'others']
    assert run(validate.main, [*flags, *goal, '--save-policy']) == 0
    assert run(push.main, [flags[2], tmp_path / 'shared']) == 0
    shared = [data, '--model', f'local-dir:{tmp_path / "shared"}', *flags[3:]]
    assert run(validate.main, shared) == 0 and 'cannot be checked' not in caplog.text
    assert run(validate.main, [*shared[:-1], 'others']) == 0
    assert 'was fitted to 12 images of others; whether they are reported on cannot be checked' in caplog.text
    assert run(validate.main, [*shared, '--calibration-split', 'train', '--budget', '100%']) == 0
    assert 'the weights have no record of what they were trained on' in caplog.text


def test_a_validation_split_that_copies_training_images(flags, capsys):
    path = flags[2] / 'model_best.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint['val_indices'], checkpoint['val_keys']
    torch.save({**checkpoint, 'val_split': 'nearly'}, path)
    assert run(validate.main, [*flags, '--budget', '100%']) == 2  # the split that chose the best epoch
    assert 'of the images of nearly were trained on' in capsys.readouterr().err


def test_a_link_to_nothing_is_a_broken_image(flags, data, caplog):
    os.symlink('nothing.png', data / 'test' / 'red' / '9.png')
    argv = [*flags, '--calibration-split', 'others', '--budget', '100%', '--max-bad-samples', 1]
    assert run(validate.main, argv) == 0
    assert sum('test/red/9.png' in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize('nested', [False, True])
def test_no_tar_file_is_left_open(data, tmp_path, nested):
    """The processes of a loader would share the position in it, and read each other's bytes."""
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for name in ('red', 'green', 'blue'):
            path = data / 'train' / name
            if nested:
                path = tmp_path / f'{name}.tar'
                with tarfile.open(path, 'w') as inner:
                    inner.add(data / 'train' / name, name)
            tar.add(path, path.name)
    config = train.read_config([str(tmp_path / 'train.tar')]).data
    images, _, record = train_and_val_datasets(config)
    reader = images.dataset.reader
    with pytest.raises(UserError, match='about 100% of the images of train are images of copies'):
        check_calibration_split(images, 'train', config, {}, load_dataset(config, 'train'), 'copies')
    assert len(record['train_probe']) == len(reader) and images[0][0].size == (16, 16)
    states = [reader.tar_state, *reader.tar_state.children.values()]
    assert len(states) == (4 if nested else 1) and all(state.tf is None for state in states)
    assert len(pickle.loads(pickle.dumps(reader))) == len(reader)
