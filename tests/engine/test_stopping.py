"""Stopped inside an epoch: what goes on from there ends as if nothing had happened."""

import csv
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from scripts import ROOT, assert_same, run, weights

from timm_mlcsd.cli import train
from timm_mlcsd.engine import checkpoint, epoch, rng, signals, trainer
from timm_mlcsd.network import load_checkpoint

# dropout, so that the generators matter to the network too
FLAGS = ['--drop', '0.3', '--model-ema', '--sched', 'cosine', '--sched-on-updates']


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C works in the processes that a test starts, also where the tests are a background job that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def summary(folder):
    return [{k: v for k, v in row.items()} for row in csv.DictReader((folder / 'summary.csv').open())]


@pytest.mark.parametrize(
    'more', ['', '--workers 1', '--cache-dataset device', '--grad-accum-steps 2', '--mixup 0.5 --reprob 0.5']
)
def test_every_checkpoint_on_the_way_leads_to_the_same_end(more, small, tmp_path, monkeypatch):
    flags = [*small, *FLAGS, *more.split(), '--checkpoint-every-steps', '2']
    copies, save_last = itertools.count(), checkpoint.CheckpointSaver.save_last

    def keep_copy(self, state):
        save_last(self, state)
        cut = tmp_path / f'cut{next(copies)}'
        shutil.copytree(self.folder, cut)

    monkeypatch.setattr(checkpoint.CheckpointSaver, 'save_last', keep_copy)
    assert run(train.main, [*flags, '--experiment', 'whole']) == 0
    monkeypatch.setattr(checkpoint.CheckpointSaver, 'save_last', save_last)
    cuts = sorted(tmp_path.glob('cut*'))
    # 5 batches of 8 in an epoch (43 images): 5 or 3 updates, 2 epochs
    assert len(cuts) == (2 if 'accum' in more else 4)
    for cut in (cuts[0], cuts[-1]):
        assert 'progress' in load_checkpoint(cut)
        assert run(train.main, [*flags, '--experiment', cut.name, '--resume', cut]) == 0
        assert_same(weights(tmp_path / 'whole'), weights(cut))
        assert summary(cut) == summary(tmp_path / 'whole')
        last = load_checkpoint(cut)
        assert 'progress' not in last and last['best_metric'] == load_checkpoint(tmp_path / 'whole')['best_metric']


@pytest.mark.parametrize(
    'more, per_batch',
    [
        ('', True),
        ('--workers 1', False),
        ('--cache-dataset device', False),
        ('--workers 1 --reprob 0.5', True),
        ('--cache-dataset device --mixup 0.5', True),
    ],
)
def test_generator_states_are_copied_per_batch_only_where_batches_draw_from_them(more, per_batch, small, monkeypatch):
    copies, inner = [], rng.rng_state
    monkeypatch.setattr(rng, 'rng_state', lambda: copies.append(0) or inner())
    assert run(train.main, [*small, '--epochs', '1', *more.split()]) == 0
    # 5 batches and the end of the epoch, two copies each; else one batch
    assert len(copies) == (13 if per_batch else 3)


@pytest.mark.parametrize('when', ['training', 'evaluation'])
def test_sigterm_saves_and_leaves(when, small, tmp_path, monkeypatch):
    flags = [*small, *FLAGS]
    assert run(train.main, [*flags, '--experiment', 'whole']) == 0
    seen = itertools.count()
    owner, name = (epoch.EpochLoop, 'run') if when == 'training' else (trainer, 'iterate_in_lockstep')
    inner = getattr(owner, name)

    def terminated(*args, **kwargs):
        handler = next(a for a in (*args, *kwargs.values()) if isinstance(a, signals.SigtermHandler))
        if next(seen) == 1:  # in the second epoch
            handler.stop_requested = True
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, terminated)
    assert run(train.main, [*flags, '--experiment', 'cut']) == 0
    monkeypatch.setattr(owner, name, inner)
    stopped = load_checkpoint(tmp_path / 'cut')
    assert stopped['epoch'] == 0 and stopped['progress'][0]['step'] == (1 if when == 'training' else 5)
    assert run(train.main, [*flags, '--experiment', 'cut', '--resume', tmp_path / 'cut']) == 0
    assert_same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def ended(process):
    """What a process has said on stderr; it is killed, with its group, where it does not end."""
    try:
        return process.communicate(timeout=60)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('number, name', [(signal.SIGTERM, 'SIGTERM'), (signal.SIGINT, 'SIGINT (Ctrl-C)')])
def test_a_signal_from_outside(number, name, workers, small, tmp_path):
    command = [sys.executable, str(ROOT / 'train.py'), *map(str, small), '--epochs', '1000', '--workers', str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / 'run' / 'last.pth.tar', process)
    # to the loader's processes too, as torchrun, most schedulers and terminals do
    os.killpg(process.pid, number)
    error = ended(process)
    assert process.returncode == 0
    assert f'Stopped by {name}; saved, go on with --resume {tmp_path / "run"}' in error
    assert ('press it again to stop at once' in error) == (number == signal.SIGINT)
    assert 'Traceback' not in error and load_checkpoint(tmp_path / 'run')['epoch'] >= 0


SLOW = """
import os, sys, time
from pathlib import Path
from timm_mlcsd.data.checked import CheckedImages
from timm_mlcsd.cli import train, validate
from timm_mlcsd.engine import finite

read, see = CheckedImages._read, finite.NonFiniteMonitor.update


def slowly_read(self, index):
    if os.environ['SLOW'] == 'read':
        Path(os.environ['STARTED']).touch()
        time.sleep(2)
    return read(self, index)


def slowly_see(self, batch, loss):
    if os.environ['SLOW'] == 'update' and Path(os.environ['LAST']).exists():
        Path(os.environ['STARTED']).touch()
        time.sleep(30)
    see(self, batch, loss)


CheckedImages._read, finite.NonFiniteMonitor.update = slowly_read, slowly_see
{'train': train.main, 'validate': validate.main}[sys.argv.pop(1)]()
"""


def start_slowly(what, slow, argv, tmp_path):
    """A script in a process group of its own, in the middle of its work."""
    (tmp_path / 'slow.py').write_text(SLOW)
    environment = dict(SLOW=slow, STARTED=str(tmp_path / 'started'), LAST=str(tmp_path / 'run' / 'last.pth.tar'))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / 'slow.py'), what, *map(str, argv)],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / 'started', process)
    time.sleep(0.3)
    return process


def test_a_second_ctrl_c_stops_at_once(small, tmp_path):
    process = start_slowly('train', 'update', [*small, '--workers', 1], tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    error = ended(process)
    # an update takes 30 seconds
    assert process.returncode == 130 and time.monotonic() - began < 20
    assert 'Traceback' not in error and 'Stopped by' not in error
    assert load_checkpoint(tmp_path / 'run')['epoch'] == 0
    assert not [p.name for p in (tmp_path / 'run').iterdir() if p.name[0] == '.']
    assert run(train.main, [*small, '--resume', tmp_path / 'run']) == 0


@pytest.mark.parametrize('what, workers', [('validate', 2), ('validate', 0), ('dry-run', 2)])
def test_ctrl_c_elsewhere_ends_without_a_traceback(what, workers, small, trained, tmp_path):
    if what == 'validate':
        argv = [small[0], '--checkpoint', trained, '--split', 'test']
    else:
        argv = [*small, '--dry-run']
    argv += ['--workers', workers, '--batch-size', 2]
    process = start_slowly('validate' if what == 'validate' else 'train', 'read', argv, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    error = ended(process)
    assert process.returncode == 130 and 'Traceback' not in error and 'KeyboardInterrupt' not in error


def test_ctrl_c_in_the_middle_of_a_save(tmp_path, monkeypatch):
    saver = checkpoint.CheckpointSaver(tmp_path)
    saver.save_last(dict(epoch=0, weights=torch.zeros(100_000)))
    before = (tmp_path / 'last.pth.tar').read_bytes()

    class Interrupted(io.FileIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 3:
                # which PyTorch makes a RuntimeError of
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr(checkpoint, 'open', Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        saver.save_last(dict(epoch=1, weights=torch.ones(100_000)))
    assert (tmp_path / 'last.pth.tar').read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ['last.pth.tar']


def test_a_background_job_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.SigtermHandler() as termination:
            os.kill(os.getpid(), signal.SIGINT)
            assert not termination.stop_requested
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.stop_requested and termination.by == 'SIGTERM'
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_unfinished_epoch_goes_on_with_the_same_batches_only(small, tmp_path, capsys, monkeypatch):
    flags = [*small, '--checkpoint-every-steps', '2', '--epochs', '1']
    monkeypatch.setattr(trainer, 'iterate_in_lockstep', _stop)
    assert run(train.main, flags) == 0
    capsys.readouterr()
    monkeypatch.undo()
    assert run(train.main, [*flags, '--resume', tmp_path / 'run', '--batch-size', 4]) == 2
    assert 'the run used --batch-size 8, not 4' in capsys.readouterr().err
    # with weights only it begins the epoch anew
    assert run(train.main, [*flags, '--resume', tmp_path / 'run', '--batch-size', 4, '--no-resume-opt']) == 0


def test_sigterm_while_a_resumed_epoch_is_passed_over(small, tmp_path, monkeypatch):
    asked = itertools.count()
    requested = property(lambda self: next(asked) >= 3, lambda self, value: None)
    monkeypatch.setattr(signals.SigtermHandler, 'stop_requested', requested, raising=False)
    assert run(train.main, small) == 0
    before = (tmp_path / 'run' / 'last.pth.tar').read_bytes()
    assert load_checkpoint(tmp_path / 'run')['progress'][0]['step'] == 4
    drawn, inner = [], epoch.isolated_rng
    monkeypatch.setattr(epoch, 'isolated_rng', lambda *args: (drawn.append(0) or batch for batch in inner(*args)))
    assert run(train.main, [*small, '--resume', tmp_path / 'run']) == 0
    assert len(drawn) == 1 and (tmp_path / 'run' / 'last.pth.tar').read_bytes() == before


def _stop(*_):
    raise signals.StopRequested


def test_rng_state_come_back():
    import random

    import numpy as np

    states = epoch.rng_state()

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    first = draw()
    # through a file, as a checkpoint does
    epoch.set_rng_state(states)
    assert draw() == first
