"""Data of the Hub's packages and in shards: with a length or as a stream, in one process or in two."""

import io
import json
import shutil
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_two_processes
from scripts import assert_same, run, weights

from timm_mlcsd.engine import checkpoint, train, validate
from timm_mlcsd.engine.config import parse_args
from timm_mlcsd.engine.datasets import load_dataset
from timm_mlcsd.engine.flags import train_parser
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.world import World
from timm_mlcsd.network import load_checkpoint

datasets = pytest.importorskip('datasets')

SIZES = dict(train=(13, 8, 11, 9), test=(7, 3, 3))  # images in each shard
KEYS = ['--input-key', 'img', '--target-key', 'fine_label']


def samples(split):
    """Shard by shard, images whose top left pixel is their number, and labels."""
    random = np.random.default_rng(0)
    numbers = iter(range(sum(SIZES[split])))
    for size in SIZES[split]:
        pixels = random.integers(0, 255, (size, 16, 16, 3), dtype=np.uint8)
        pixels[:, 0, 0, 0] = [next(numbers) for _ in range(size)]
        yield [(Image.fromarray(p), i % 3) for i, p in enumerate(pixels)]


@pytest.fixture
def parquet(tmp_path):
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=['a', 'b', 'c']))
    for split in SIZES:
        for i, shard in enumerate(samples(split)):
            rows = [dict(img=image, fine_label=label) for image, label in shard]
            path = tmp_path / 'parquet' / f'{split}-{i:05d}-of-{len(SIZES[split]):05d}.parquet'
            datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return tmp_path / 'parquet'


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip('webdataset')
    (tmp_path / 'shards').mkdir()
    for split in SIZES:
        for i, shard in enumerate(samples(split)):
            with tarfile.open(tmp_path / 'shards' / f'tiny-{split}-{i}.tar', 'w') as tar:
                for j, (image, label) in enumerate(shard):
                    png = io.BytesIO()
                    image.save(png, 'PNG')
                    for name, data in ((f'{i}_{j}.png', png.getvalue()), (f'{i}_{j}.cls', str(label).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    splits = {
        split: dict(
            name=split,
            filenames=[f'tiny-{split}-{i}.tar' for i in range(len(sizes))],
            shard_lengths=list(sizes),
            num_samples=sum(sizes),
        )
        for split, sizes in SIZES.items()
    }
    (tmp_path / 'shards' / '_info.json').write_text(json.dumps(dict(splits=splits)))
    return tmp_path / 'shards'


@pytest.fixture(params=['hfids', 'wds'])
def stream(request):
    """Flags of a stream, but for the path of train.py."""
    if request.param == 'hfids':
        return [f'--dataset=hfids/{request.getfixturevalue("parquet")}', *KEYS, '--train-num-samples', 41]
    return [request.getfixturevalue('shards'), '--dataset', 'wds/', '--num-classes', 3]


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
    args = parse_args(train_parser(), [*map(str, flags), '--workers', '2', '--batch-size', '2'])
    config = dict(input_size=(3, 16, 16), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1, crop_mode='center')
    data = load_dataset(args, 'test')
    batches = eval_loader(args, data, dict(config, interpolation='nearest'), torch.device('cpu'), world=World(rank, 2))
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


def test_what_streams_cannot_do(stream, parquet, small, capsys):
    flags = [*stream, *small[1:], '--val-split', 'test']
    assert run(train.main, [*flags, '--max-bad-samples', 3]) == 2
    assert '--max-bad-samples' in capsys.readouterr().err
    assert run(train.main, flags[: flags.index('--val-split')]) == 2
    assert 'nothing can be held out' in capsys.readouterr().err
    if 'hfids' in str(stream[0]):
        assert run(train.main, [f for f in flags if f not in ('--train-num-samples', 41)]) == 2
        assert '--train-num-samples N' in capsys.readouterr().err
