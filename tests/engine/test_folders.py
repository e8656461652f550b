"""Folders of images with other formats, hidden files, and images outside of classes."""

import os
import pickle
import shutil
import tarfile

import pytest
import torch
from PIL import Image
from scripts import run
from timm.data.readers import reader_image_folder, reader_image_in_tar

from timm_mlcsd.cli import train, validate
from timm_mlcsd.data import Preprocessing, sample_keys
from timm_mlcsd.engine.data_config import TrainDataConfig
from timm_mlcsd.engine.datasets import class_names, load_dataset, train_and_val_datasets
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.network import load_checkpoint


@pytest.fixture
def mine(folder, tmp_path):
    """An own copy of the folder of colours."""
    return shutil.copytree(folder, tmp_path / 'mine')


def load(root, *more):
    return load_dataset(train.read_config([str(root), *map(str, more)]).data, 'train')


def save_as(path, ending, **options):
    Image.open(path).save(path.with_suffix(ending), **options)
    path.unlink()


def test_usual_formats_are_read_and_the_rest_is_counted(mine, caplog):
    paths = sorted((mine / 'train' / 'red').glob('*.png'))
    for path, ending in zip(paths, ('.webp', '.tif', '.TIFF', '.bmp', '.jpeg', '.gif', '.gif')):
        save_as(path, ending)
    (mine / 'train' / 'green' / 'notes.txt').write_text('blurred: 3')
    data = load(mine)
    assert len(data) == 46 and class_names(data) == ['blue', 'green', 'red']
    assert all(data[i] is not None for i in range(46))
    assert 'left out 2 .gif, 1 .txt; images are files that end in .png, .jpg' in caplog.text


def test_timm_keeps_its_own_endings(mine):
    from timm.data.readers.img_extensions import get_img_extensions

    load(mine)
    assert get_img_extensions() == ('.png', '.jpg', '.jpeg')


@pytest.mark.parametrize('what, message', [('.gif', '16 .gif'), (None, 'no file')])
def test_a_class_without_images_is_an_error(mine, small, capsys, what, message):
    for path in sorted((mine / 'train' / 'red').glob('*.png')):
        save_as(path, what) if what else path.unlink()
    assert run(train.main, [mine, *small[1:]]) == 2
    error = capsys.readouterr().err
    assert f'red\' contains {message}, and no image that can be read: the class would be lost' in error


@pytest.mark.parametrize('kind', ['folder', 'tar'])
def test_the_order_is_the_same_in_all_processes(mine, tmp_path, kind, monkeypatch):
    """timm's natural order leaves names that differ by case or leading zeros to the hash seed and the directory."""
    for old, new in (('red', 'Bee'), ('green', 'bee'), ('blue', '01')):
        (mine / 'train' / old).rename(mine / 'train' / new)
    shutil.copy(mine / 'train' / 'bee' / '1.png', mine / 'train' / 'bee' / '01.png')
    root = mine
    if kind == 'tar':
        root = tmp_path / 'mine.tar'
        with tarfile.open(root, 'w') as tar:
            tar.add(mine / 'train', '.')
    found = []
    for reverse in (False, True):
        # two orders of equal names, as two hash seeds and two disks make them
        def in_order(names, key, reverse=reverse):
            return sorted(sorted(names, key=str, reverse=reverse), key=key)

        for module in (reader_image_folder, reader_image_in_tar):
            monkeypatch.setattr(module, 'sorted', in_order, raising=False)
        data = load(root)
        files = [os.path.join(*data.reader.filename(i, absolute=True).split('/')[-2:]) for i in range(len(data))]
        found.append((class_names(data), files, [data[i][1] for i in range(len(data))]))
    assert found[0] == found[1]
    names, files, targets = found[0]
    assert names == ['01', 'Bee', 'bee'] and len(files) == 49
    assert all(names[target] == os.path.dirname(file) for file, target in zip(files, targets))


@pytest.mark.parametrize('ending', ['.xcf', '', '.pt'])
def test_files_of_unknown_endings_may_be_a_class(mine, small, capsys, ending):
    for path in sorted((mine / 'train' / 'red').glob('*.png')):
        path.rename(path.with_suffix(ending))
    assert run(train.main, [mine, *small[1:]]) == 2
    assert f'contains 16 {ending or "without an ending"}, and no image that can be read' in capsys.readouterr().err


def test_a_folder_of_texts_is_no_class(mine, caplog):
    (mine / 'train' / 'notes').mkdir()
    (mine / 'train' / 'notes' / 'who.txt').write_text('me')
    assert class_names(load(mine)) == ['blue', 'green', 'red']
    assert 'left out 1 .txt' in caplog.text


def test_images_outside_of_classes_are_an_error(mine, small, capsys):
    flat = mine / 'flat'
    shutil.copytree(mine / 'train' / 'red', flat)
    assert run(train.main, [flat, *small[1:]]) == 2
    assert f'images lie in {flat} itself (0.png first); put them into one folder per class' in capsys.readouterr().err
    with tarfile.open(mine / 'flat.tar', 'w') as tar:
        tar.add(flat, '.')
    assert run(train.main, [mine / 'flat.tar', *small[1:]]) == 2
    assert 'itself' in capsys.readouterr().err
    shutil.copy(flat / '0.png', mine / 'train' / 'cover.png')
    assert run(train.main, [mine, *small[1:]]) == 2
    assert f'1 images lie in {mine / "train"} itself' in capsys.readouterr().err


def test_a_class_called_like_a_split(mine, small, capsys):
    (mine / 'test').rename(mine / 'bus')
    shutil.move(mine / 'train', mine / 'old')
    shutil.move(mine / 'old' / 'red', mine / 'train')
    assert run(train.main, [mine, *small[1:]]) == 2
    assert 'If it is a class, rename it: folders of this name are treated as a split' in capsys.readouterr().err


def test_one_class_is_an_error_unless_more_are_to_come(mine, small, capsys):
    for name in ('green', 'blue'):
        shutil.rmtree(mine / 'train' / name)
    assert run(train.main, [mine, *small[1:]]) == 2
    assert "the data has one class, 'red', so every answer would be right" in capsys.readouterr().err
    assert run(train.main, [mine, *small[1:], '--num-classes', 2, '--epochs', 1]) == 0


def test_hidden_files_are_left_out(mine, tmp_path, caplog):
    for path in sorted((mine / 'train').rglob('*.png')):
        path.with_name(f'._{path.name}').write_bytes(b'\0\5\x16\7')
    twins = mine / 'train' / '__MACOSX' / 'amber'
    twins.mkdir(parents=True)
    (twins / '._0.png').write_bytes(b'\0\5\x16\7')
    (mine / 'train' / 'red' / '.ipynb_checkpoints').mkdir()
    shutil.copy(mine / 'train' / 'red' / '0.png', mine / 'train' / 'red' / '.ipynb_checkpoints' / '0-checkpoint.png')
    with tarfile.open(tmp_path / 'mine.tar', 'w') as tar:
        tar.add(mine / 'train', '.')
    for root in (mine, tmp_path / 'mine.tar'):
        caplog.clear()
        data = load(root)
        assert len(data) == 48 and class_names(data) == ['blue', 'green', 'red']
        assert [data[i][1] for i in (0, 16, 32)] == [0, 1, 2]
        assert 'left out 50 hidden (._*, .*, __MACOSX)' in caplog.text


def test_links_in_a_tar_file_are_refused(mine, small, tmp_path, capsys):
    """timm reads regular members only, and tar stores every further name of a file as a link."""
    (mine / 'train' / 'wasp').mkdir()
    for i in range(4):
        os.link(mine / 'train' / 'red' / f'{i}.png', mine / 'train' / 'wasp' / f'{i}.png')
    os.symlink('wasp', mine / 'train' / 'yellow')
    os.symlink('notes', mine / 'train' / 'README.txt')
    os.symlink(mine / 'test' / 'red', mine / 'train' / 'outside')
    for name, links in (('hard', 4), ('soft', 6)):
        with tarfile.open(tmp_path / f'{name}.tar', 'w') as tar:
            for path in sorted((mine / 'train').iterdir()):
                if name == 'soft' or not path.is_symlink():
                    tar.add(path, path.name)
        assert run(train.main, [tmp_path / f'{name}.tar', *small[1:]]) == 2
        error = capsys.readouterr().err
        assert f"{name}.tar' has {links} images or folders as links" in error
        assert 'tar --dereference --hard-dereference' in error


def test_links_that_lose_no_image(mine, tmp_path):
    """An alias of a class that is in the tar file, and a text: as before, they are no data."""
    (mine / 'train' / 'docs').mkdir()
    (mine / 'train' / 'docs' / 'notes.md').write_text('blurred: 3')
    os.symlink('docs/notes.md', mine / 'train' / 'README')
    os.symlink('red', mine / 'train' / 'latest')
    with tarfile.open(tmp_path / 'mine.tar', 'w') as tar:
        tar.add(mine / 'train', '.')
    assert class_names(load(tmp_path / 'mine.tar')) == ['blue', 'green', 'red']


def test_a_tar_file_that_was_appended_to(mine, small, tmp_path, capsys):
    with tarfile.open(tmp_path / 'mine.tar', 'w') as tar:
        tar.add(mine / 'train', '.')
        for _ in range(2):  # a hidden file is no image
            tar.add(mine / 'test' / 'red' / '0.png', 'red/._0.png')
    assert len(load(tmp_path / 'mine.tar')) == 48
    with tarfile.open(tmp_path / 'mine.tar', 'a') as tar:
        tar.add(mine / 'test' / 'red' / '0.png', 'red/0.png')
    assert run(train.main, [tmp_path / 'mine.tar', *small[1:]]) == 2
    assert 'mine.tar\' has images twice (1, red/0.png first), as after tar --append' in capsys.readouterr().err


def test_folders_of_one_name_are_one_class(mine, caplog):
    for i, place in enumerate(('cars', 'dogs')):
        for name in ('small', 'big'):
            (mine / 'train' / place / name).mkdir(parents=True)
            shutil.copy(mine / 'train' / 'red' / f'{i}.png', mine / 'train' / place / name / f'{i}.png')
    assert class_names(load(mine)) == ['big', 'blue', 'green', 'red', 'small']
    assert 'folders of one name are one class, wherever they lie: big, small' in caplog.text


def test_a_class_map_with_a_class_too_many(mine, tmp_path, caplog):
    (tmp_path / 'map.txt').write_text('# classes\nred\ngreen\nblue\n')
    load(mine, '--class-map', tmp_path / 'map.txt')
    assert 'map.txt has 1 classes without images: # classes' in caplog.text


def test_classes_that_look_alike_are_refused(mine, small, capsys):
    (mine / 'train' / 'green').rename(mine / 'train' / '\ufeffred')
    assert run(train.main, [mine, *small[1:]]) == 2
    assert 'look the same and would be two classes' in capsys.readouterr().err


# one reading of odd files


def odd_files(folder):
    """A file of every kind, all in one class folder."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    rgb = Image.fromarray(torch.randint(256, (40, 56, 3), dtype=torch.uint8).numpy())
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for ending in ('.jpg', '.png', '.webp'):
            rgb.save(folder / f'exif{orientation}{ending}', exif=exif)
    for mode in ('L', 'LA', 'RGBA', '1', 'P'):
        rgb.convert(mode).save(folder / f'{mode}.png')
    palette = rgb.convert('P')
    palette.save(folder / 'transparent.png', transparency=7)
    rgb.convert('CMYK').save(folder / 'cmyk.jpg')
    ramp = (torch.arange(40 * 56) * 29).to(torch.uint16).view(40, 56).numpy()
    for ending in ('.png', '.tif'):
        Image.fromarray(ramp).save(folder / f'16bit{ending}')
    for size in ((300, 3), (3, 300), (1, 1), (9, 16)):
        rgb.resize(size).save(folder / f'{size[0]}x{size[1]}.bmp')


@pytest.mark.parametrize('more', [[], ['--cache-dataset', 'device', '--crop-pct', 1]])
@pytest.mark.parametrize('size', [(3, 24, 24), (1, 20, 28), (4, 24, 24)])
def test_loaders_and_prediction_make_the_same_tensor(tmp_path, size, more):
    odd_files(tmp_path / 'data' / 'a')
    odd_files(tmp_path / 'data' / 'b')
    args = train.read_config([str(tmp_path / 'data'), '-j', '0', '-b', '7', *map(str, more)]).data
    args.in_chans, args.input_img_mode = size[0], {1: 'L', 3: 'RGB', 4: 'RGBA'}[size[0]]
    mean, std = [0.485, 0.456, 0.406, 0.5][: size[0]], [0.229, 0.224, 0.225, 0.25][: size[0]]
    config = dict(input_size=size, interpolation='bicubic', mean=mean, std=std, crop_pct=0.9, crop_mode='center')
    data = load_dataset(args, 'train')
    files = [path for path, _ in data.reader.samples]
    batches = torch.cat([images for images, _ in eval_loader(args, data, config, torch.device('cpu'))])
    preprocessing = Preprocessing(config)
    alone = torch.cat([preprocessing(path) for path in files])
    assert len(batches) == len(files) == 2 * 37
    assert torch.equal(batches, alone)


def test_another_mode_is_part_of_the_preprocessing(small, tmp_path, capsys):
    assert run(train.main, [*small, '--input-img-mode', 'YCbCr', '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['data_config']['input_img_mode'] == 'YCbCr'
    for mode in ('I;16', 'F', 'P', '1', 'nonsense'):
        assert run(train.main, [*small, '--input-img-mode', mode, '--experiment', 'other']) == 2
        assert f'--input-img-mode {mode} is no mode of Pillow with 8 bits per channel' in capsys.readouterr().err


def test_images_of_no_known_range_and_extreme_sizes_are_named(mine, small, caplog, capsys):
    Image.new('F', (16, 16)).save(mine / 'train' / 'red' / '0.tif')
    Image.new('RGB', (65000, 1)).save(mine / 'train' / 'red' / 'long.png')
    argv = [mine, *small[1:], '--epochs', 1]
    assert run(train.main, argv) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'of 50 images cannot be read' in error
    assert run(train.main, [*argv, '--max-bad-samples', 2]) == 0
    assert '0.tif (its pixels are 32-bit floating point numbers' in caplog.text
    assert 'long.png (its size is 65000x1; expected sides that differ by a factor of at most 256' in caplog.text


# held out stays held out


def moved(root):
    """Move one image to another class, which changes what lies at the places of the others."""
    shutil.move(root / 'train' / 'blue' / '0.png', root / 'train' / 'red' / 'from_blue.png')


@pytest.fixture
def held_out_run(mine, small, tmp_path):
    assert run(train.main, [mine, *small[1:], '--val-fraction', 0.3, '--epochs', 1]) == 0
    return tmp_path / 'run'


def test_a_run_does_not_go_on_with_other_held_out_images(held_out_run, mine, small, capsys):
    argv = [mine, *small[1:], '--val-fraction', 0.3, '--epochs', 2, '--resume', held_out_run]
    assert run(train.main, argv) == 0
    moved(mine)
    assert run(train.main, [*argv, '--epochs', 3]) == 2
    error = capsys.readouterr().err
    assert 'images that would be held out now are not those that the run held out' in error and '.png for one' in error


def test_nothing_trained_on_is_taken_for_held_out(held_out_run, mine, tmp_path, capsys):
    argv = ['--checkpoint', held_out_run / 'last.pth.tar', '--workers', 0, '--device', 'cpu']
    assert run(validate.main, [*argv, '--held-out']) == 0
    copy = shutil.copytree(mine, tmp_path / 'copy')
    assert run(validate.main, [copy, *argv, '--held-out']) == 0  # the same files in another place
    moved(mine)
    capsys.readouterr()
    for more in (['--held-out'], ['--split', 'test', '--adaptive', '--max-drop', 5]):
        assert run(validate.main, [*argv, *more]) == 2
        assert 'are not those that training held out' in capsys.readouterr().err
    (mine / 'train' / 'red' / 'from_blue.png').unlink()
    assert run(validate.main, [*argv, '--held-out']) == 2
    assert 'has 47 images, not the 48 of training' in capsys.readouterr().err


def test_held_out_files_that_exchange_their_contents(held_out_run, mine, small, capsys):
    for folder in sorted((mine / 'train').iterdir()):
        paths = sorted(folder.iterdir())
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents[1:] + contents[:1]):
            path.write_bytes(content)
    argv = ['--checkpoint', held_out_run / 'last.pth.tar', '--workers', 0, '--device', 'cpu', '--held-out']
    assert run(validate.main, argv) == 2
    again = [mine, *small[1:], '--val-fraction', 0.3, '--epochs', 2, '--resume', held_out_run]
    assert run(train.main, again) == 2
    assert capsys.readouterr().err.count('and other contents') == 2


@pytest.mark.parametrize('is_tar', [False, True])
def test_a_class_without_training_images_is_told(mine, tmp_path, caplog, is_tar):
    for path in sorted((mine / 'train' / 'red').iterdir())[1:]:
        path.unlink()
    if is_tar:
        with tarfile.open(tmp_path / 'data.tar', 'w') as archive:
            archive.add(mine / 'train', '.')
    config = TrainDataConfig(data_dir=str(tmp_path / 'data.tar' if is_tar else mine), val_fraction=0.5)
    messages = []
    for config.val_seed in range(8):
        caplog.clear()
        train_data, _, _ = train_and_val_datasets(config)
        has_red = any('red' in train_data.dataset.reader.filename(i, absolute=True) for i in train_data.indices)
        assert has_red == ('is left to train on for 1 classes (red)' not in caplog.text)
        messages.append(caplog.text)
    assert '' in messages and len(set(messages)) > 1


def test_digits_that_timm_cannot_sort_are_named(mine, small, capsys):
    path = mine / 'train' / 'red' / '0.png'
    path.rename(path.with_name('1\u00b23.png'))
    assert run(train.main, [mine, *small[1:]]) == 2
    assert 'a digit that timm cannot sort by; rename it' in capsys.readouterr().err


def test_a_copy_of_the_training_images_calibrates_nothing(held_out_run, mine, tmp_path, capsys):
    copy = shutil.copytree(mine, tmp_path / 'copy')
    shutil.copytree(copy / 'train', copy / 'val')
    argv = [copy, '--checkpoint', held_out_run / 'last.pth.tar', '--workers', 0, '--split', 'test', '--adaptive']
    assert run(validate.main, [*argv, '--max-drop', 5, '--calibration-split', 'val']) == 2
    assert 'these are the images that the checkpoint was trained on' in capsys.readouterr().err


def test_starting_from_weights_that_saw_the_held_out_images(held_out_run, mine, small, caplog):
    argv = [mine, *small[1:], '--val-fraction', 0.3, '--epochs', 1, '--experiment', 'next']
    argv += ['--initial-checkpoint', held_out_run / 'last.pth.tar']
    assert run(train.main, argv) == 0 and 'held out now' not in caplog.text
    assert run(train.main, [*argv[:-4], '--experiment', 'other', *argv[-2:], '--val-seed', 1]) == 0
    assert 'images that are held out now, so accuracy on them promises too much' in caplog.text


def test_keys_without_files_are_of_the_content(mine):
    args = train.read_config([str(mine / 'train'), '--dataset', 'torch/image_folder', '-j', '0']).data
    data = load_dataset(args, 'train')
    keys = sample_keys(data, range(48))
    assert len(set(keys.tolist())) == 48
    Image.new('RGB', (16, 16)).save(mine / 'train' / 'blue' / '0.png')
    assert (sample_keys(load_dataset(args, 'train'), range(48)) != keys).sum() == 1


# what a tester found


def test_links_that_double_images_are_refused(mine, small, capsys):
    loop = mine / 'train' / 'red' / 'loop'
    loop.symlink_to(mine / 'train')
    assert run(train.main, [mine, *small[1:]]) == 2
    assert 'by a symbolic link: the same images would be there twice' in capsys.readouterr().err
    loop.unlink()
    twin = mine / 'train' / 'red' / 'twin.png'
    twin.symlink_to(mine / 'train' / 'red' / '0.png')
    assert run(train.main, [mine, *small[1:]]) == 2
    assert 'twin.png' in capsys.readouterr().err
    twin.unlink()
    (mine / 'elsewhere.png').write_bytes((mine / 'train' / 'red' / '0.png').read_bytes())
    twin.symlink_to(mine / 'elsewhere.png')
    assert len(load(mine)) == 49


def test_hidden_folders_are_no_classes_for_torchvision_either(mine, caplog):
    hidden = mine / 'train' / '.ipynb_checkpoints'
    shutil.copytree(mine / 'train' / 'red', hidden)
    data = load(mine, '--dataset', 'torch/image_folder')
    assert class_names(data) == ['blue', 'green', 'red'] and len(data) == 48
    assert [data[i][1] for i in (0, 16, 32)] == [0, 1, 2] and 'left out 16 hidden' in caplog.text


def test_training_images_in_another_place_are_known(held_out_run, mine, small, tmp_path, capsys):
    argv = ['--checkpoint', held_out_run / 'last.pth.tar', '--workers', 0, '--split', 'test']
    assert run(validate.main, [mine / 'train', *argv]) == 2
    assert 'these are the images that the checkpoint was trained on' in capsys.readouterr().err
    # also where nothing was held out of them
    shutil.copytree(mine / 'test', mine / 'val')
    flags = [mine, *small[1:], '--val-split', 'val', '--epochs', 1, '--experiment', 'val']
    assert run(train.main, flags) == 0
    copy = shutil.copytree(mine, tmp_path / 'copy')
    argv = [copy, '--checkpoint', tmp_path / 'val', '--workers', 0, '--split', 'test', '--adaptive', '--max-drop', 50]
    assert run(validate.main, [*argv, '--calibration-split', 'train']) == 2
    assert "the checkpoint was trained on split 'train'" in capsys.readouterr().err
    (copy / 'train').rename(copy / 'extra')
    assert run(validate.main, [*argv, '--calibration-split', 'extra']) == 2
    assert 'these are the images that the checkpoint was trained on' in capsys.readouterr().err


def test_a_copy_of_the_data_is_the_same_data(held_out_run, mine, small, tmp_path, capsys, caplog):
    copy = shutil.copytree(mine, tmp_path / 'copy')
    argv = [copy, '--checkpoint', held_out_run, '--workers', 0, '--adaptive', '--max-drop', 50, '--confidence', 'none']
    assert run(validate.main, [*argv, '--split', 'train']) == 2
    assert 'the policy is fitted to these images' in capsys.readouterr().err
    saved = ['--save-policy', tmp_path / 'policy.json']
    assert run(validate.main, [*argv, '--split', 'test', *saved]) == 0
    argv = [copy, '--checkpoint', held_out_run, '--workers', 0, '--adaptive', '--policy', tmp_path / 'policy.json']
    assert run(validate.main, [*argv, '--held-out']) == 2
    assert 'was fitted to the held-out part of train' in capsys.readouterr().err
    # other images held out than those of the first training
    argv = [copy, *small[1:], '--val-fraction', 0.3, '--val-seed', 7, '--epochs', 1]
    best = held_out_run / 'model_best.pth.tar'
    assert run(train.main, [*argv, '--initial-checkpoint', best, '--experiment', 'a']) == 0
    assert 'images that are held out now' in caplog.text
    assert run(train.main, [*argv, '--resume', held_out_run, '--no-resume-opt', '--experiment', 'b']) == 2
    assert 'val_seed' in capsys.readouterr().err


def test_a_policy_is_bound_to_the_preprocessing(held_out_run, mine, tmp_path, capsys):
    argv = [mine, '--checkpoint', held_out_run, '--workers', 0, '--split', 'test', '--adaptive']
    goal = ['--max-drop', 50, '--confidence', 'none', '--save-policy']
    for more, name in ((['--img-size', 48], 'input_size'), (['--mean', 0.2, 0.2, 0.2], 'mean')):
        assert run(validate.main, [*argv, *more, *goal]) == 2
        assert f'got another {name}' in capsys.readouterr().err
    assert not (held_out_run / 'exit_policy.json').exists()
    assert run(validate.main, [*argv, *goal]) == 0
    for more, name in ((['--crop-pct', 0.5], 'crop_pct'), (['--input-img-mode', 'YCbCr'], 'input_img_mode')):
        assert run(validate.main, [*argv, *more]) == 2
        assert f'got another {name}' in capsys.readouterr().err
    assert run(validate.main, argv) == 0


@pytest.mark.parametrize(
    'name, value',
    [
        ('val_indices', [1, 2, 3]),
        ('val_indices', torch.tensor([100, 2, 3])),
        ('val_indices', torch.tensor([1.0, 2.0])),
        ('val_keys', torch.tensor([1])),
        ('val_keys', [1]),
        ('train_size', None),
    ],
)
def test_a_record_that_was_tampered_with(held_out_run, capsys, name, value):
    path = held_out_run / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, name: value}, path)
    assert run(validate.main, ['--checkpoint', path, '--held-out', '--workers', 0]) == 2
    assert 'has no record of held-out images that can be used' in capsys.readouterr().err


@pytest.mark.parametrize(
    'change, message',
    [
        (5, 'no valid list of the trainings'),
        ([dict(train_split='train')], 'no valid list of the trainings'),
        (dict(train_split=3), 'no valid list of the trainings'),
        (dict(args=dict(data_dir=[1])), 'no valid list of the trainings'),
        (dict(val_indices=[1]), 'no valid list of the trainings'),
        (dict(val_indices=torch.tensor([100])), 'no record of held-out images'),
    ],
)
def test_earlier_trainings_that_were_tampered_with(held_out_run, mine, capsys, change, message):
    path = held_out_run / 'last.pth.tar'
    checkpoint = torch.load(path, weights_only=True)
    names = ('train_split', 'val_split', 'train_size', 'train_probe', 'val_indices', 'val_keys')
    record = {name: checkpoint[name] for name in names}
    record['args'] = dict(dataset='', data_dir=str(mine), class_map='')
    started_from = [{**record, **change}] if isinstance(change, dict) else change
    torch.save({**checkpoint, 'started_from': started_from}, path)
    argv = [mine, '--checkpoint', path, '--split', 'test', '--adaptive', '--budget', '100%', '--workers', 0]
    assert run(validate.main, argv) == 2
    assert message in capsys.readouterr().err


def test_a_policy_never_replaces_anything_else(held_out_run, capsys):
    argv = ['--checkpoint', held_out_run, '--workers', 0, '--split', 'test', '--adaptive', '--max-drop', 50]
    before = (held_out_run / 'model_best.pth.tar').read_bytes()
    assert run(validate.main, [*argv, '--save-policy', held_out_run / 'model_best.pth.tar']) == 2
    assert 'must end in .json' in capsys.readouterr().err
    (held_out_run / 'notes.json').write_text('{}')
    assert run(validate.main, [*argv, '--save-policy', held_out_run / 'notes.json']) == 2
    assert 'would replace a file that is not a policy' in capsys.readouterr().err
    assert (held_out_run / 'model_best.pth.tar').read_bytes() == before


def test_a_run_goes_on_with_its_reading_and_its_best(held_out_run, mine, small, tmp_path, capsys):
    argv = [mine, *small[1:], '--val-fraction', 0.3, '--epochs', 2, '--resume', held_out_run, '--experiment', 'next']
    for more in (['--input-img-mode', 'YCbCr'], ['--mean', 0, 0, 0], ['--crop-pct', 0.5]):
        assert run(train.main, [*argv, *more]) == 2
        assert 'data_config' in capsys.readouterr().err
    assert run(train.main, argv) == 0
    assert (tmp_path / 'next' / 'model_best.pth.tar').exists()


def test_class_maps_of_data_sets_with_names_of_their_own(folder, small, tmp_path, capsys):
    datasets = pytest.importorskip('datasets')
    files = sorted((folder / 'train').rglob('*.png'))
    names = datasets.ClassLabel(names=['blue', 'green', 'red'])
    features = datasets.Features(dict(image=datasets.Image(), label=names))
    images = [dict(bytes=file.read_bytes(), path=None) for file in files]
    rows = datasets.Dataset.from_dict(dict(image=images, label=[file.parent.name for file in files]), features=features)
    (tmp_path / 'data').mkdir()
    rows.to_parquet(tmp_path / 'data' / 'train-00000-of-00001.parquet')
    flags = ['--dataset', f'hfds/{tmp_path / "data"}', *small[1:], '--epochs', 1]
    (tmp_path / 'two.txt').write_text('blue\ngreen\n')
    assert run(train.main, [*flags, '--class-map', tmp_path / 'two.txt', '--max-bad-samples', 20]) == 2
    assert 'got none for red; add it' in capsys.readouterr().err
    (tmp_path / 'reversed.pkl').write_bytes(pickle.dumps({0: 2, 1: 1, 2: 0}))
    assert run(train.main, [*flags, '--class-map', tmp_path / 'reversed.pkl']) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['red', 'green', 'blue']
