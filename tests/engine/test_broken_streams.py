"""Images of streams that cannot be read: counted, named once, left out, up to a limit."""

import io
import re
from collections import Counter

import pytest
from PIL import Image
from scripts import run
from stream_data import KEYS, noise, write_stream
from torch.utils.data import DataLoader

from timm_mlcsd.cli import train, validate
from timm_mlcsd.engine.datasets import load_dataset
from timm_mlcsd.errors import UserError
from timm_mlcsd.network import load_checkpoint

datasets = pytest.importorskip('datasets')


def jpeg(png, share):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).resize((64, 64)).save(buffer, 'JPEG')
    return buffer.getvalue()[: int(len(buffer.getvalue()) * share)]


DAMAGE = {
    (0, 2): lambda data: b'',
    (0, 12): lambda data: b'<html>404</html>' * 20,
    (1, 7): lambda data: bytes(16) + data[16:],
    (2, 0): lambda data: data[: len(data) // 3],
    (3, 4): lambda data: data[:41] + bytes([data[41] ^ 0xFF]) + data[42:],
    (3, 8): lambda data: jpeg(data, 1 / 3),
}


def damaged():
    """Six of 41 images to train on, each in its own way, and the last two of 13 to test."""
    splits = noise()
    for (shard, i), damage in DAMAGE.items():
        name, data, label = splits['train'][shard][i]
        splits['train'][shard][i] = (name, damage(data), label)
    splits['test'][-1][-2:] = [(name, data[:100], label) for name, data, label in splits['test'][-1][-2:]]
    return splits


@pytest.fixture(scope='module', params=['hfids', 'wds', 'tfds'])
def stream(request, tmp_path_factory):
    return write_stream(request.param, tmp_path_factory.mktemp(request.param), damaged())


def read(stream, split, limit, **kwargs):
    args = train.read_config([*map(str, stream), '--max-bad-samples', str(limit), '--batch-size', '8']).data
    return load_dataset(args, split, num_samples=args.train_num_samples, **kwargs)


@pytest.mark.parametrize('workers', [0, 2])
def test_they_are_left_out_up_to_a_limit(stream, small, tmp_path, capsys, caplog, workers):
    flags = [*stream, *small[1:], '--val-split', 'test', '--workers', workers]
    assert run(train.main, [*flags, '--max-bad-samples', 5, '--experiment', 'stopped']) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '6 images of the stream cannot be read, more than --max-bad-samples 5' in error
    caplog.clear()
    with caplog.at_level('WARNING'):
        assert run(train.main, [*flags, '--max-bad-samples', 6]) == 0
    named = Counter(re.findall(r'cannot be read: (.+) \(', caplog.text))
    # and the two of the test split
    assert len(named) == 8 and max(named.values()) == 1
    if 'tfds' not in str(stream):  # which gives its samples names of their own
        assert all(any(re.search(rf'\b{i}_{j}\b', name) for name in named) for i, j in DAMAGE)
    assert load_checkpoint(tmp_path / 'run')['epoch'] == 1
    results = tmp_path / 'results.json'
    argv = ['--checkpoint', tmp_path / 'run', '--split', 'test', '--results-file', results, '--workers', workers]
    assert run(validate.main, argv) == 2
    assert 'of the stream cannot be read' in capsys.readouterr().err
    assert run(validate.main, [*argv, '--max-bad-samples', 2]) == 0
    assert '"num_samples": 11' in results.read_text()


def test_others_take_their_place_in_training(stream):
    whole = read(stream, 'train', 6, is_training=True)
    images = [image for image, _ in whole]
    assert len(images) == len(whole) == 48  # six batches
    whole.check()
    assert len(whole.found) == 6


def test_what_is_read_is_what_was_written(stream):
    data = read(stream, 'test', 2)
    numbers = [(image.getpixel((0, 0))[0], target) for image, target in data]
    labels = [label for shard in damaged()['test'] for _, _, label in shard]
    assert sorted(numbers) == [(i, labels[i]) for i in range(11)]


def test_what_processes_find_is_counted_together(stream):
    first, second = (read(stream, 'test', limit) for limit in (2, 3))
    list(first), first.check()
    second.merge([first.found, {'another': 'broken too'}])
    second.check()
    second.merge([{'a third': 'broken as well'}])
    with pytest.raises(UserError, match=r'^4 images of the stream .* among them a third'):
        second.check()


@pytest.mark.parametrize('kind', ['hfids', 'wds', 'tfds'])
def test_a_stream_of_nothing_else_ends(kind, tmp_path):
    nothing = {
        split: [[(name, b'', label) for name, _, label in shard] for shard in shards]
        for split, shards in noise().items()
    }
    data = read(write_stream(kind, tmp_path, nothing), 'train', 100, is_training=True)
    with pytest.raises((ValueError, RuntimeError), match=r'no image|no samples'):
        if not list(data):
            raise ValueError('no image')
    data.check()
    # TFDS shuffles what it repeats: so many in a row are not quite all
    assert len(data.found) > (30 if kind == 'tfds' else 40)


@pytest.mark.parametrize('size, entries', [(300, 1), (700, 1), (2048, 2), (5000, 1)])
def test_a_shard_cut_short(size, entries, tmp_path):
    stream = write_stream('wds', tmp_path, noise())
    shard = tmp_path / 'shards' / 'tiny-test-0.tar'
    shard.write_bytes(shard.read_bytes()[:size])
    data = read(stream, 'test', 2)
    assert 6 <= len(list(data)) <= 9
    data.check()
    # the image that is cut from its label is one more
    assert len(data.found) == entries and f'the rest of {shard}' in data.found


@pytest.mark.filterwarnings('ignore:This DataLoader will create 4')
def test_a_process_that_can_read_nothing(tmp_path):
    stream = write_stream('wds', tmp_path, noise())
    shard = tmp_path / 'shards' / 'tiny-train-0.tar'
    shard.write_bytes(bytes(1000))
    data = read(stream, 'train', 5, is_training=True)
    loader = DataLoader(data, batch_size=8, num_workers=4, collate_fn=list)
    with pytest.raises(ValueError, match='use fewer --workers'):
        list(loader)


def test_a_wrong_target_key_is_no_broken_image(tmp_path):
    stream = write_stream('wds', tmp_path, noise())
    data = read([*stream, '--target-key', 'label'], 'test', 5)
    with pytest.raises(ValueError, match='label'):
        list(data)


def test_a_wrong_input_key_is_named(tmp_path):
    stream = write_stream('wds', tmp_path, noise())
    data = read([*stream, '--input-key', 'webp;bmp'], 'test', 5)
    with pytest.raises(ValueError, match='too many'):
        list(data)
    with pytest.raises(UserError, match=r'0_\d \(it has png, cls, but no --input-key webp;bmp\)'):
        data.check()


def test_images_that_look_alike_are_counted_each(tmp_path):
    parquet = tmp_path / 'test-00000-of-00001.parquet'
    good = noise()['test'][0][0][1]
    rows = [dict(img=image, fine_label=0) for image in (dict(bytes=b'', path=None), dict(bytes=good, path=None), None)]
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=['a', 'b', 'c']))
    datasets.Dataset.from_list([*rows, *rows], features=features).to_parquet(parquet)
    data = read([f'--dataset=hfids/{tmp_path}', *KEYS], 'test', 4)
    assert len(list(data)) == 2
    data.check()
    assert len(data.found) == 4
