"""Data of the Hub's packages and in shards: with a length or as a stream, in one process or in two."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_two_processes
from scripts import assert_same, run, weights
from stream_data import KEYS, noise, write_parquet, write_stream

from timm_mlcsd.cli import train, validate
from timm_mlcsd.distributed import DistributedContext
from timm_mlcsd.engine import checkpoint
from timm_mlcsd.engine.data_config import DataConfig
from timm_mlcsd.engine.datasets import load_dataset
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.network import load_checkpoint

pytest.importorskip('datasets')


@pytest.fixture
def parquet(tmp_path):
    return write_parquet(tmp_path / 'parquet', noise())


@pytest.fixture(params=['hfids', 'wds', 'tfds'])
def stream(request, tmp_path):
    """Flags of a stream, but for the path of train.py."""
    return write_stream(request.param, tmp_path, noise())


def test_parquet_with_a_length(parquet, small, tmp_path):
    data = ['--dataset', f'hfds/{parquet}', '--data-dir', tmp_path / 'cache', *KEYS]
    assert run(train.main, [*small[1:], *data, '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['a', 'b', 'c']
    assert run(validate.main, ['--checkpoint', tmp_path / 'run', '--split', 'test', '--workers', 0]) == 0


def test_a_stream_stopped_inside_an_epoch_goes_on_alike(stream, small, tmp_path, monkeypatch):
    flags = [*stream, *small[1:], '--val-split', 'test', '--workers', 1, '--checkpoint-every-steps', 2]
    save_last = checkpoint.CheckpointSaver.save_last

    def keep_copy(self, state):
        save_last(self, state)
        shutil.copytree(self.folder, tmp_path / 'cut', dirs_exist_ok=True)

    monkeypatch.setattr(checkpoint.CheckpointSaver, 'save_last', keep_copy)
    assert run(train.main, flags) == 0
    monkeypatch.setattr(checkpoint.CheckpointSaver, 'save_last', save_last)
    assert load_checkpoint(tmp_path / 'cut')['epoch'] == 0  # the second of two was cut
    assert run(train.main, [*flags, '--experiment', 'cut', '--resume', tmp_path / 'cut']) == 0
    assert_same(weights(tmp_path / 'run'), weights(tmp_path / 'cut'))
    results = tmp_path / 'results.json'
    argv = ['--checkpoint', tmp_path / 'cut', '--split', 'test', '--workers', 2, '--results-file', results]
    assert run(validate.main, argv) == 0
    assert '"num_samples": 13' in results.read_text()
    assert load_checkpoint(tmp_path / 'run')['class_names'] == (None if 'wds/' in stream else ['a', 'b', 'c'])


def _evaluated(flags, rank):
    """The numbers of the images that a process evaluates."""
    data_flags = train.read_config([*map(str, flags), '--workers', '2', '--batch-size', '2']).data
    config = dict(input_size=(3, 16, 16), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1, crop_mode='center')
    data = load_dataset(data_flags, 'test')
    config['interpolation'] = 'nearest'
    batches = eval_loader(data_flags, data, config, torch.device('cpu'), dist_context=DistributedContext(rank, 2))
    return [round(255 * image[0, 0, 0].item()) for images, _ in batches for image in images]


def test_processes_share_a_stream_image_by_image(stream, tmp_path):
    first, second = in_two_processes(partial(_evaluated, stream), tmp_path)
    # three shards of 7, 3 and 3 images, two workers: timm would repeat or lose some
    assert sorted(first + second) == list(range(13)) and min(len(first), len(second)) > 4


@pytest.mark.parametrize('kind', ['hfds', 'hfids'])
@pytest.mark.parametrize('flag, given', [('--input-key', 'img'), ('--target-key', 'fine_label')])
def test_columns_that_are_not_there(parquet, small, tmp_path, capsys, kind, flag, given):
    data = [f'--dataset={kind}/{parquet}', '--data-dir', tmp_path / 'cache', '--train-num-samples', 41]
    other = dict([('--input-key', 'img'), ('--target-key', 'fine_label')])
    given = [part for name, key in other.items() if name != flag for part in (name, key)]
    assert run(train.main, [*small[1:], *data, *given, '--val-split', 'test']) == 2
    assert 'has no such column; it has img, fine_label' in capsys.readouterr().err


def test_a_stream_of_image_files_reads_them_as_folders_are_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # uncompressed files that Pillow 13 reads wrongly by name
    (tmp_path / 'data' / 'train' / 'ant').mkdir(parents=True)
    (tmp_path / 'data' / 'train' / 'bee').mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4), dtype=np.uint8)
    for name, image in zip(('ant', 'bee'), pixels):
        Image.fromarray(image).save(tmp_path / 'data' / 'train' / name / '0.tif', exif=exif)
    source = dict(dataset=f'hfids/{tmp_path / "data"}', data_dir=str(tmp_path / 'cache'))
    config = DataConfig(**source, input_key='image', target_key='label', input_img_mode='L', in_chans=1)
    found = {label: np.asarray(image) for image, label in load_dataset(config, 'train')}
    assert sorted(found) == [0, 1]
    for label, image in enumerate(pixels):
        assert np.array_equal(found[label], np.rot90(image, 3))


def test_what_streams_cannot_do(stream, parquet, small, capsys):
    flags = [*stream, *small[1:], '--val-split', 'test']
    assert run(train.main, flags[: flags.index('--val-split')]) == 2
    assert 'nothing can be held out' in capsys.readouterr().err
    if 'hfids' in str(stream[0]):
        assert run(train.main, [f for f in flags if f not in ('--train-num-samples', 41)]) == 2
        assert '--train-num-samples N' in capsys.readouterr().err


def test_shards_that_are_not_there(small, tmp_path, capsys):
    pytest.importorskip('webdataset')
    stream = write_stream('wds', tmp_path, noise())
    (tmp_path / 'shards' / 'tiny-test-1.tar').unlink()
    assert run(train.main, [*stream, *small[1:], '--val-split', 'test']) == 2
    assert "1 of 3 shards are not there" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_stream_says_how_many_images_chose_the_epoch(stream, small, tmp_path, caplog):
    caplog.set_level('INFO')
    assert run(train.main, [*stream, *small[1:], '--val-split', 'test', '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['measured_on'] == 'the 13 images that chose the epoch'
    assert 'a stream of them to choose the best epoch' in caplog.text
