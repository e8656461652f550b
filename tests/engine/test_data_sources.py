"""The data that train.py and validate.py read, and which part of it for what."""

import tarfile

import pytest
import timm
import torch
from scripts import ROOT, run

from timm_mlcsd.engine import train, validate
from timm_mlcsd.network import load_checkpoint


def test_the_test_split_is_never_read(small, folder, tmp_path):
    import shutil

    shutil.copytree(folder / 'train', tmp_path / 'data' / 'train')
    for name in ('red', 'green', 'blue'):
        broken = tmp_path / 'data' / 'test' / name / 'x.png'
        broken.parent.mkdir(parents=True)
        broken.write_text('not an image')
    assert run(train.main, [tmp_path / 'data', *small[1:], '--epochs', 1]) == 0
    assert len(load_checkpoint(tmp_path / 'run')['val_indices']) == 5


def test_a_folder_without_splits_is_no_validation_data(small, folder, tmp_path, capsys):
    classes = folder / 'train'
    assert run(train.main, [classes, *small[1:], '--epochs', 1]) == 0
    checkpoint = ['--checkpoint', tmp_path / 'run', '--workers', 0]
    assert run(validate.main, [*checkpoint, '--held-out']) == 0
    for main, argv in (
        (validate.main, checkpoint),
        (train.main, [classes, *small[1:], '--experiment', 'b', '--val-split', 'validation']),
    ):
        assert run(main, argv) == 2
        assert 'is not divided into splits' in capsys.readouterr().err


def test_validation_classes_must_be_those_of_training(small, folder, tmp_path, capsys):
    for split, names in dict(train=('red', 'green', 'blue'), val=('red', 'green')).items():
        for name in names:
            (tmp_path / 'data' / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'data' / split / name).symlink_to(folder / 'train' / name)
    assert run(train.main, [tmp_path / 'data', *small[1:], '--val-split', 'val']) == 2
    assert "the classes of split 'val'" in capsys.readouterr().err


def test_torchvision_images_get_the_mode_that_the_model_wants(small, folder, tmp_path):
    data = ['--dataset', 'torch/image_folder', '--val-split', 'test', '--in-chans', 1]
    assert run(train.main, [*small, *data, '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['blue', 'green', 'red']


def test_greyscale_images(small, tmp_path):
    assert run(train.main, [*small, '--epochs', 1, '--input-size', 1, 16, 16]) == 0
    checkpoint = load_checkpoint(tmp_path / 'run')
    assert checkpoint['model_args']['in_chans'] == 1 and checkpoint['data_config']['input_size'] == (1, 16, 16)
    argv = ['--checkpoint', tmp_path / 'run', '--split', 'test', '--workers', 0]
    assert run(validate.main, argv) == 0
    assert run(validate.main, [*argv, '--in-chans', 3]) == 2


def test_fine_tuning_what_a_folder_holds(small, folder, tmp_path):
    from timm.models import save_for_hf

    model_args = dict(exits=3, exit_head='conv1x1', small_input=True, channels=(8, 8, 8, 8))
    model = timm.create_model('mlcsd_resnet18', num_classes=9, **model_args)
    save_for_hf(model, tmp_path / 'hub', model_args=model_args, safe_serialization=True)
    flags = '--pretrained --img-size 16 --epochs 1 --batch-size 8 --workers 0 --lr 0 --warmup-epochs 0'.split()
    where = ['--output', tmp_path, '--experiment', 'tuned']
    argv = [folder, '--model', f'local-dir:{tmp_path / "hub"}', *flags, *where]
    assert run(train.main, argv) == 0
    checkpoint = load_checkpoint(tmp_path / 'tuned')
    assert checkpoint['arch'] == 'mlcsd_resnet18' and checkpoint['model_args']['exits'] == 3
    name = 'heads.0.reduce.1.weight'
    assert torch.equal(checkpoint['state_dict'][name], model.state_dict()[name])
    assert run(validate.main, ['--checkpoint', tmp_path / 'tuned', '--split', 'test', '--workers', 0]) == 0


def test_digits_from_the_quickstart_config(tmp_path):
    pytest.importorskip('sklearn')
    argv = ['--config', ROOT / 'configs' / 'quickstart.yaml', '--epochs', 1, '--output', tmp_path, '--workers', 0]
    assert run(train.main, argv) == 0
    assert run(validate.main, ['--checkpoint', tmp_path / 'quickstart', '--split', 'test', '--workers', 0]) == 0


def test_images_in_a_tar_file(small, folder, tmp_path):
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        for path in sorted((folder / 'train').rglob('*.png')):
            tar.add(path, path.relative_to(folder / 'train'))
    assert run(train.main, [tmp_path / 'train.tar', *small[1:]]) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['blue', 'green', 'red']
