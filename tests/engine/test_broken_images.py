"""Images that cannot be read: counted, named once, left out, up to a limit."""

import io
import random
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from PIL import Image
from scripts import ROOT, run

from timm_mlcsd.cli import train, validate
from timm_mlcsd.data import CheckedImages
from timm_mlcsd.network import load_checkpoint

KINDS = ('empty', 'text', 'no header', 'cut short', 'bits flipped', 'another format cut short')


def damage(path, kind, rng):
    """Make a PNG file unreadable."""
    data = bytearray(path.read_bytes())
    if kind == 'empty':
        data = b''
    elif kind == 'text':
        data = b'<html>404</html>' * 20
    elif kind == 'no header':
        data[:16] = bytes(16)
    elif kind == 'cut short':
        data = data[: rng.randrange(40, len(data) // 2)]
    elif kind == 'bits flipped':
        # in the header of the compressed pixels
        data[41] ^= 0xFF
    else:
        buffer = io.BytesIO()
        Image.open(path).convert('RGB').resize((64, 64)).save(buffer, 'JPEG')
        data = buffer.getvalue()[: len(buffer.getvalue()) // 3]
    path.write_bytes(bytes(data))


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder of colours, six of its 48 images to train on broken, each in its own way, and one to test."""
    root = tmp_path / 'colours'
    shutil.copytree(folder, root)
    rng = random.Random(0)
    for kind, path in zip(KINDS, rng.sample(sorted((root / 'train').rglob('*.png')), 6)):
        damage(path, kind, rng)
    damage(sorted((root / 'test').rglob('*.png'))[0], 'cut short', rng)
    return root


@pytest.mark.parametrize(
    'more',
    [
        [],
        ['--workers', 2],
        ['--cache-dataset', 'device'],
        ['--cache-dataset', 'device', '--workers', 2],
        ['--distill-method', 'crd'],
    ],
)
def test_they_are_left_out_up_to_a_limit(damaged, small, tmp_path, capsys, caplog, more):
    flags = [damaged, *small[1:], *more]
    assert run(train.main, [*flags, '--max-bad-samples', 5]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '6 of 48 images cannot be read' in error and '.png (' in error
    caplog.clear()
    with caplog.at_level('WARNING'):
        assert run(train.main, [*flags, '--max-bad-samples', 6]) == 0
    named = Counter(re.findall(r'cannot be read: (\S+\.png) \(', caplog.text))
    assert len(named) == 6 and max(named.values()) == 1
    assert load_checkpoint(tmp_path / 'run')['epoch'] == 1


def test_the_first_stops_a_run_that_allows_none(damaged, small, tmp_path, capsys):
    assert run(train.main, [damaged, *small[1:]]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and '--max-bad-samples N' in error and re.search(r'/train/\w+/\d+\.png \(', error)


def test_a_script_ends_where_a_process_of_its_loader_fails(damaged, small):
    command = [sys.executable, ROOT / 'train.py', damaged, *small[1:], '--workers', 2]
    # it waited for ever for that process, after its error message
    script = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100)
    assert script.returncode == 2 and 'cannot be read' in script.stderr and 'Traceback' not in script.stderr


def test_evaluation_counts_what_can_be_read(damaged, trained, tmp_path, capsys):
    flags = [damaged, '--checkpoint', trained, '--split', 'test', '--workers', 0, '--device', 'cpu', '-b', 4]
    assert run(validate.main, flags) == 2
    capsys.readouterr()
    # one image to a batch: one batch is empty
    for more in ([], ['-b', 1]):
        assert run(validate.main, [*flags, '--max-bad-samples', 1, *more]) == 0
        assert '11 images' in capsys.readouterr().out


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_is_noticed(kind, folder, tmp_path):
    path = tmp_path / 'image.png'
    shutil.copy(next((folder / 'train').rglob('*.png')), path)

    class Reader:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return open(path, 'rb'), 0

        def filename(self, index, basename=False, absolute=False):
            return str(path)

    images = CheckedImages(Reader(), 'RGB', limit=1)
    assert images[0] is not None and not images.broken.any()
    images.check()
    damage(path, kind, random.Random(0))
    assert images[0] is None and torch.equal(images.broken, torch.tensor([True]))
    images.check()
    images.limit, images.named = 0, set()
    with pytest.raises(ValueError, match='cannot be read'):
        images.check()
