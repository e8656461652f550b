"""A run's folder is that of one living run."""

import os
import signal
import subprocess
import sys
from datetime import datetime

import pytest
import torch
from processes import in_two_processes
from scripts import run

from timm_mlcsd.cli import train
from timm_mlcsd.distributed import DistributedContext
from timm_mlcsd.engine import resume
from timm_mlcsd.engine.claim import LOCK, new_folder

HOLD = """
import os, sys, time
from pathlib import Path
from timm_mlcsd.engine.claim import claimed

with claimed(Path(sys.argv[1])):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(60)
    print('holds', flush=True)
    time.sleep(60)
"""


def hold(folder, *more):
    """A process that has a folder."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, str(folder), *more], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == 'holds\n'
    return process


def end(process):
    """Ends it and what it has started, as a test does that must leave nothing."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_runs_of_the_same_second_have_their_own_folders(small, tmp_path, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls):
            return cls(2030, 1, 2, 3, 4, 5)

    monkeypatch.setattr(resume, 'datetime', Frozen)
    for _ in range(3):
        assert run(train.main, [*small[: small.index('--experiment')], '--epochs', 1]) == 0
    name = '20300102-030405-mlcsd_resnet18'
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, f'{name}-1', f'{name}-2']
    for folder in tmp_path.iterdir():
        # one epoch each, and no lock left
        assert len((folder / 'summary.csv').read_text().splitlines()) == 2 and not (folder / LOCK).exists()


def test_new_folders_are_made_exclusively(tmp_path):
    assert [new_folder(tmp_path / 'out', 'a').name for _ in range(3)] == ['a', 'a-1', 'a-2']


def test_a_folder_in_use_is_refused(small, tmp_path, capsys):
    assert run(train.main, [*small, '--epochs', 1]) == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / 'run').iterdir())
    process = hold(tmp_path / 'run')
    capsys.readouterr()
    try:
        for more in (
            [],
            ['--resume', 'auto'],
            ['--resume', tmp_path / 'run'],
            ['--resume', tmp_path / 'run/last.pth.tar'],
        ):
            flags = small if not more or more[1] == 'auto' else small[: small.index('--experiment')]
            assert run(train.main, [*flags, *more]) == 2
            error = capsys.readouterr().err.splitlines()
            assert len(error) == 1 and f'is in use by process {process.pid} on ' in error[0]
        # what only reads it may go on
        assert run(train.main, [*small[:-1], 'other', '--resume', tmp_path / 'run']) == 0
        assert run(train.main, [*small, '--resume', tmp_path / 'run', '--dry-run']) == 0
        after = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / 'run').iterdir() if p.name != LOCK)
        assert after == before
    finally:
        end(process)
    assert run(train.main, [*small, '--resume', 'auto']) == 0


def test_the_lock_of_a_killed_process_is_free_though_its_children_live(small, tmp_path):
    process = hold(tmp_path / 'run', 'with a child')
    try:
        process.kill()
        process.wait()
        assert (tmp_path / 'run' / LOCK).exists()
        assert run(train.main, [*small, '--epochs', 1]) == 0
    finally:
        end(process)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(small, tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text('of a run that crashed\n')
    (tmp_path / 'run' / 'summary.csv').write_text('epoch,train_loss\n0,9.9\n')
    assert run(train.main, [*small, '--epochs', 1]) == 0
    assert '9.9' not in (tmp_path / 'run' / 'summary.csv').read_text()


@pytest.mark.parametrize('name', [['--experiment', 'run'], []])
def test_a_mistake_leaves_no_folder(name, small, tmp_path):
    flags = [*small[: small.index('--experiment')], *name]
    assert run(train.main, [*flags, '--model', 'mlcsd_nonsense']) == 2
    assert run(train.main, [*flags, '--resume', '/nowhere']) == 2
    assert run(train.main, [*flags, '--dry-run']) == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'run').mkdir()
    assert run(train.main, [*flags, '--model', 'mlcsd_nonsense']) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / 'run']


def _folder_of(rank):
    """The folder that this process is told, as numbers."""
    config = resume.RunConfig(output=os.environ['OUTPUT'])
    with resume.run_folder(config, f'model{rank}', DistributedContext(rank, 2, rank)) as folder:
        return torch.tensor(list(str(folder).encode()))


def test_all_processes_of_a_job_have_the_first_ones_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('OUTPUT', str(tmp_path / 'out'))
    first, second = in_two_processes(_folder_of, tmp_path)
    assert torch.equal(first, second) and bytes(first.tolist()).endswith(b'-model0')
