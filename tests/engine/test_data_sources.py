"""The data that train.py and validate.py read, and which part of it for what."""

import shutil
import tarfile

import pytest
import timm
import torch
from PIL import Image, ImageOps
from scripts import ROOT, run

from timm_mlcsd.cli import train, validate
from timm_mlcsd.engine.datasets import class_names, load_dataset
from timm_mlcsd.network import load_checkpoint


def test_the_test_split_is_never_read(small, folder, tmp_path):
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


def _classes(root, split, folder, names=('red', 'green', 'blue')):
    (root / split).mkdir(parents=True)
    for name in names:
        (root / split / name).symlink_to(folder / ('train' if split.lower().startswith('train') else 'test') / name)


def test_splits_are_never_mixed(small, folder, tmp_path, capsys):
    """timm takes the innermost folder for the class, whatever lies above it."""
    for split in ('Train', 'Val2017', 'Test'):
        _classes(tmp_path / 'Cap', split, folder)
    with tarfile.open(tmp_path / 'all.tar', 'w', dereference=True) as tar:
        tar.add(folder, 'colours')
    for name in ('red', 'green', 'blue'):
        for split in ('train', 'test'):
            (tmp_path / 'classes' / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'classes' / name / split).symlink_to(folder / split / name)
    for data, places in (
        (tmp_path / 'Cap', 'Test, Train, Val2017'),
        (tmp_path / 'all.tar', 'test, train'),
        (tmp_path / 'classes', 'test, train'),
    ):
        assert run(train.main, [data, *small[1:]]) == 2
        assert f'has images in {places}, which would be mixed' in capsys.readouterr().err


@pytest.mark.parametrize('outer', [('2019', '2020'), ('train_station', 'testers'), ('device1', 'device2')])
def test_folders_that_are_no_splits_are_one_set(small, folder, tmp_path, outer):
    (tmp_path / 'data').mkdir()
    for name, split in zip(outer, ('train', 'test')):
        (tmp_path / 'data' / name).symlink_to(folder / split)
    flags = train.read_config([str(tmp_path / 'data'), *map(str, small[1:])]).data
    data = load_dataset(flags, 'train')
    assert len(data) == 60 and class_names(data) == ['blue', 'green', 'red']


def test_a_class_map_that_leaves_classes_out_says_so(small, tmp_path, caplog, capsys):
    (tmp_path / 'two.txt').write_text('red\ngreen\n')
    assert run(train.main, [*small, '--class-map', tmp_path / 'two.txt', '--epochs', 1]) == 0
    assert 'two.txt leaves out 1 classes: blue' in caplog.text
    (tmp_path / 'none.txt').write_text('cat\ndog\n')
    assert run(train.main, [*small, '--class-map', tmp_path / 'none.txt', '--experiment', 'none']) == 2
    assert 'with the classes of --class-map' in capsys.readouterr().err


def test_another_folder_is_no_split_of_the_one_trained_on(small, folder, tmp_path, capsys):
    assert run(train.main, [folder / 'train', *small[1:], '--epochs', 1]) == 0
    assert run(validate.main, [folder / 'test', '--checkpoint', tmp_path / 'run', '--workers', 0]) == 0
    assert '12 images' in capsys.readouterr().out


def test_a_run_goes_on_with_its_classes_only(small, folder, tmp_path, capsys, caplog):
    assert run(train.main, [*small, '--epochs', 1]) == 0
    for name in ('red', 'green', 'blue'):
        shutil.copytree(folder / 'train' / name, tmp_path / 'others' / 'train' / f'light{name}')
    for file in (tmp_path / 'others').rglob('*.png'):  # a copy of the images is refused: they may have been trained on
        with Image.open(file) as image:
            ImageOps.flip(image).save(file)
    assert run(train.main, [tmp_path / 'others', *small[1:], '--resume', tmp_path / 'run']) == 2
    assert 'trained on the classes blue, green, red, not lightblue, lightgreen, lightred' in capsys.readouterr().err
    others = [tmp_path / 'others', *small[1:], '--experiment', 'others', '--resume', tmp_path / 'run']
    assert run(train.main, [*others, '--no-resume-opt']) == 0
    shutil.copytree(folder, tmp_path / 'same')
    assert run(train.main, [tmp_path / 'same', *small[1:], '--resume', tmp_path / 'run']) == 0
    assert f'The run was trained on {folder}, and goes on with {tmp_path / "same"}' in caplog.text


@pytest.mark.parametrize(
    'label, more',
    [(3, []), (-1, []), (3, ['--cache-dataset', 'device']), (-1, ['--mixup', 1]), (3, ['--workers', 1])],
)
def test_labels_that_no_class_has(small, folder, tmp_path, capsys, label, more):
    _parquet(tmp_path / 'data', folder, [0, label, 2] * 16)
    flags = ['--dataset', f'hfds/{tmp_path / "data"}', '--num-classes', 3, *small[1:], *more]
    assert run(train.main, flags) == 2
    error = capsys.readouterr().err
    assert f'a label is {label}: expected 0 to 2 for 3 classes' in error and 'Traceback' not in error


def test_labels_that_are_text_or_wrong_for_a_trained_network(small, folder, trained, tmp_path, capsys):
    _parquet(tmp_path / 'text', folder, ['red', 'green', 'blue'] * 16)
    assert run(train.main, ['--dataset', f'hfds/{tmp_path / "text"}', '--num-classes', 3, *small[1:]]) == 2
    assert 'is text' in capsys.readouterr().err
    _parquet(tmp_path / 'several', folder, [[0], [1, 2], []] * 16)
    assert run(train.main, ['--dataset', f'hfds/{tmp_path / "several"}', '--num-classes', 3, *small[1:]]) == 2
    assert 'is not a whole number' in capsys.readouterr().err
    _parquet(tmp_path / 'more', folder, [0, 1, 7] * 16)
    argv = ['--dataset', f'hfds/{tmp_path / "more"}', '--checkpoint', trained, '--split', 'train', '--workers', 0]
    assert run(validate.main, argv) == 2
    assert 'a label is 7' in capsys.readouterr().err


def test_a_first_image_that_is_missing_is_one_that_is_broken(small, folder, tmp_path, capsys, caplog):
    _parquet(tmp_path / 'data', folder, [0, 1, 2] * 16, missing={0, 9})
    flags = ['--dataset', f'hfds/{tmp_path / "data"}', '--num-classes', 3, *small[1:], '--epochs', 1]
    assert run(train.main, [*flags, '--max-bad-samples', 1]) == 2
    assert 'cannot be read, more than --max-bad-samples 1 allows' in capsys.readouterr().err
    assert run(train.main, [*flags, '--max-bad-samples', 2]) == 0
    assert caplog.text.count('Left out') == 2


def _parquet(where, folder, labels, missing=()):
    datasets = pytest.importorskip('datasets')
    files = sorted((folder / 'train').rglob('*.png'))
    images = [None if i in missing else dict(bytes=file.read_bytes(), path=None) for i, file in enumerate(files)]
    rows = datasets.Dataset.from_dict(dict(image=images, label=labels)).cast_column('image', datasets.Image())
    where.mkdir()
    rows.to_parquet(where / 'train-00000-of-00001.parquet')


def test_parquet_files_that_order_the_classes_differently(small, folder, tmp_path, capsys):
    datasets = pytest.importorskip('datasets')
    card = '---\nconfigs:\n- config_name: default\n  data_files:\n'
    card += '  - {split: train, path: data/train-*}\n  - {split: test, path: data/test-*}\n'
    card += '- config_name: other\n  data_files: other/*\n---\n'
    for split, names in (('train', ['red', 'green', 'blue']), ('test', ['blue', 'red', 'green'])):
        files = sorted((folder / split).rglob('*.png'))
        images = [dict(bytes=file.read_bytes(), path=None) for file in files]
        columns = dict(image=images, label=[names.index(file.parent.name) for file in files])
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        (tmp_path / 'data').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / 'data' / f'{split}-00000-of-00001.parquet')
    for source in ('hfds', 'hfids'):
        argv = ['--dataset', f'{source}/{tmp_path / "data"}', '--val-split', 'test', *small[1:]]
        assert run(train.main, argv) == 2
        error = capsys.readouterr().err
        assert 'have other class names or another order of them (blue, red, green and red, green, blue)' in error
    # files of another configuration are not read
    (tmp_path / 'card' / 'other').mkdir(parents=True)
    shutil.move(tmp_path / 'data', tmp_path / 'card' / 'data')
    (tmp_path / 'card' / 'README.md').write_text(card)
    test = next((tmp_path / 'card' / 'data').glob('test-*'))
    shutil.copy(test, tmp_path / 'card' / 'other')
    shutil.copy(next((tmp_path / 'card' / 'data').glob('train-*')), test)
    # a cache of its own: datasets knows a folder with a card by its name and card alone
    cache = ['--data-dir', tmp_path / 'cache']
    assert run(train.main, ['--dataset', f'hfds/{tmp_path / "card"}', *cache, *small[1:]]) == 0
