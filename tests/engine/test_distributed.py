"""train.py under torchrun: two processes on this machine, on the CPU."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import in_two_processes
from scripts import ROOT, assert_same, run, weights

from timm_mlcsd import MLCSDLoss, create_multi_exit
from timm_mlcsd.cli import train
from timm_mlcsd.distributed import DistributedContext
from timm_mlcsd.engine import signals, trainer
from timm_mlcsd.network import load_checkpoint
from timm_mlcsd.task import MLCSDTask

CONVNEXT = (
    '--model mlcsd_convnext_atto --model-kwargs dims=(8,8,16,16) depths=(1,1,2,1) --exits 4 --img-size 32 --crop-pct 1 '
    '--epochs 2 --workers 0 --lr 0.02 --warmup-epochs 0 --alpha 1 --beta 1 --distill one-for-all --smoothing 0 '
    '--no-aug --device cpu --val-fraction 0.25'
).split()

# torch 2.6 has no FSDP on the CPU
CPU_FSDP = hasattr(torch.cpu.Stream, 'record_event')


def torchrun(*flags, launcher=('--standalone', '--nproc-per-node', 2), script=ROOT / 'train.py'):
    """A job of train.py, started."""
    command = [sys.executable, '-m', 'torch.distributed.run', *launcher, script, *flags]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [str(c) for c in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def done(job):
    """What it printed, once it has ended well."""
    output = job.communicate(timeout=240)[0]
    assert job.returncode == 0, output
    return output


def curve(run_folder):
    with open(run_folder / 'summary.csv') as f:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(f)]


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one_with_the_same_global_batch(folder, tmp_path):
    flags = [folder, *CONVNEXT, '--sched', 'none', '--clip-grad', 1, '--output', tmp_path]
    jobs = [
        torchrun(*flags, '--batch-size', 12, '--experiment', 'one', launcher=('--standalone', '--nproc-per-node', 1)),
        # 3 images at a time, added up over two steps without synchronisation
        torchrun(*flags, '--batch-size', 3, '--grad-accum-steps', 2, '--experiment', 'two'),
    ]
    sharded = ['--batch-size', 6, '--fsdp', '--log-tensorboard']
    if CPU_FSDP:
        jobs.append(torchrun(*flags, *sharded, '--experiment', 'sharded', '--epochs', 1))
    output = [done(job) for job in jobs]
    if CPU_FSDP:
        done(torchrun(*flags, *sharded, '--resume', tmp_path / 'sharded'))
    for name in ('two', 'sharded') if CPU_FSDP else ('two',):
        one, other = curve(tmp_path / 'one'), curve(tmp_path / name)
        assert len(one) == len(other) == 2
        for a, b in zip(one, other):
            # sums in another order: float32 rounding, grown over 6 updates
            assert a == pytest.approx(b, rel=1e-4)
        a, b = (weights(tmp_path / run) for run in ('one', name))
        assert set(a) == set(b)
        for key, t in a.items():
            torch.testing.assert_close(t, b[key], rtol=1e-3, atol=1e-5)
    # only the first process speaks
    assert output[1].count('epoch 0:') == 1 and output[1].count('Best validation') == 1


def test_a_killed_worker_brings_the_job_back_where_it_was(folder, small_flags, tmp_path):
    flags = [folder, *small_flags, '--output', tmp_path, '--batch-size', 8, '--epochs', 16, '--model-ema']
    flags += ['--checkpoint-every-steps', 2, '--checkpoint-hist', 50, '--drop', 0.2]
    # two machines, as far as torchrun can tell
    node = ['--nnodes', 2, '--nproc-per-node', 1, '--rdzv-backend', 'c10d', '--rdzv-id', 'test']
    node += ['--rdzv-endpoint', f'127.0.0.1:{free_port()}']
    for job in [torchrun(*flags, '--experiment', 'whole', launcher=node) for _ in range(2)]:
        done(job)
    job = torchrun(
        *flags, '--experiment', 'killed', launcher=['--standalone', '--nproc-per-node', 2, '--max-restarts', 2]
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / 'killed' / 'checkpoint-3.pth.tar').exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    os.kill(_worker(job.pid), signal.SIGKILL)
    assert 'Resuming' in done(job)
    assert [row['epoch'] for row in curve(tmp_path / 'killed')] == list(range(16))
    assert_same(weights(tmp_path / 'whole'), weights(tmp_path / 'killed'))


def test_sigterm_stops_all_processes_where_they_can_go_on(folder, small_flags, tmp_path):
    flags = [folder, *small_flags, '--output', tmp_path, '--epochs', 8, '--drop', 0.2, '--workers', 1]
    job = torchrun(*flags, '--experiment', 'cut')
    deadline = time.monotonic() + 120
    while not (tmp_path / 'cut' / 'checkpoint-1.pth.tar').exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)  # torchrun passes it on to the workers and to their loaders
    output = job.communicate(timeout=120)[0]
    assert 'Stopped by SIGTERM; saved' in output and 'RuntimeError' not in output
    assert load_checkpoint(tmp_path / 'cut')['epoch'] < 7
    jobs = [torchrun(*flags, '--experiment', 'whole'), torchrun(*flags, '--resume', tmp_path / 'cut')]
    for job in jobs:
        done(job)
    assert_same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))


def _shut_down_at_once(rank, size, store):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=size)
    sys.setswitchinterval(100)  # seconds for which a thread of gloo waits for Python's lock
    context = DistributedContext(rank, size)
    for _ in range(3):
        context.any_rank(False)
    context.shutdown()
    os._exit(0)


def test_a_job_ends_while_gloo_still_frees_tensors(tmp_path):
    """PyTorch 2.6 waited forever in about half of the processes."""
    spawn = torch.multiprocessing.get_context('spawn')
    ranks = [spawn.Process(target=_shut_down_at_once, args=(rank, 3, tmp_path / 'store')) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0, 0, 0]


class _Wish:
    """A process's `SigtermHandler`, which comes before the batch of a number."""

    def __init__(self, when):
        self.when = when
        self.asked = -1

    @property
    def stop_requested(self):
        self.asked += 1
        return self.asked >= self.when


def _stop_together(rank):
    """How many batches this process has had when the second is asked to end, and when none is."""
    counts = []
    for when in (2, 99):
        world, had = DistributedContext(rank, 2, rank), []
        try:
            # the second has a batch less
            had.extend(signals.iterate_in_lockstep(_Wish(when if rank else 99), iter(range(5 - rank)), world))
        except signals.StopRequested:
            counts.append(-1)
        else:
            counts.append(len(had))
        dist.barrier()
    return torch.tensor(counts)


def test_processes_that_evaluate_stop_together(tmp_path):
    assert [counts.tolist() for counts in in_two_processes(_stop_together, tmp_path)] == [[-1, 5], [-1, 4]]


CUT = """
import os, signal
from timm_mlcsd.cli import train
from timm_mlcsd.engine import finite

see = finite.NonFiniteMonitor.update


def cut(self, batch, loss):
    if str(batch) == os.environ.get('CUT'):
        os.kill(os.getpid(), signal.SIGTERM)
    see(self, batch, loss)


finite.NonFiniteMonitor.update = cut
train.main()
"""


@pytest.mark.parametrize(
    'more, batch',
    [([], 1), pytest.param(['--fsdp'], 0, marks=pytest.mark.skipif(not CPU_FSDP, reason='no FSDP on the CPU'))],
)
def test_running_statistics_of_each_process_come_back(folder, small_flags, tmp_path, monkeypatch, more, batch):
    """Without that they would all go on with those of the first, and --dist-bn would find another mean."""
    script = tmp_path / 'cut.py'
    script.write_text(CUT)
    flags = [folder, *small_flags, '--output', tmp_path, '--epochs', 1, '--batch-size', 10, *more]
    jobs = [torchrun(*flags, '--experiment', 'whole')]
    monkeypatch.setenv('CUT', str(batch))
    jobs.append(torchrun(*flags, '--experiment', 'cut', script=script))
    monkeypatch.delenv('CUT')
    done(jobs[0])
    output = done(jobs[1])
    assert 'Stopped by SIGTERM; saved' in output
    assert load_checkpoint(tmp_path / 'cut')['progress'][1]['step'] == batch + 1
    done(torchrun(*flags, '--resume', tmp_path / 'cut'))
    assert_same(weights(tmp_path / 'whole'), weights(tmp_path / 'cut'))


def _worker(agent):
    """The process that a torchrun has started, on Linux."""
    for entry in Path('/proc').iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / 'stat').read_text().rpartition(')')[2].split()[1])
            except OSError:
                continue
            if parent == agent and b'train.py' in (entry / 'cmdline').read_bytes():
                return int(entry.name)
    raise AssertionError('the agent has no worker')


def test_a_job_that_may_restart_needs_a_name(small, capsys, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_MAX_RESTARTS', '3')
    assert run(train.main, small[: small.index('--experiment')]) == 2
    assert '--experiment NAME' in capsys.readouterr().err


def test_resume_auto(small, tmp_path, capsys):
    assert run(train.main, [*small, '--resume', 'auto', '--epochs', 1]) == 0
    assert run(train.main, [*small, '--resume', 'auto', '--epochs', 2]) == 0
    assert [row['epoch'] for row in curve(tmp_path / 'run')] == [0, 1]
    assert run(train.main, [*small[: small.index('--experiment')], '--resume', 'auto']) == 2
    assert '--experiment NAME' in capsys.readouterr().err


def _remember(rank):
    """Train two steps with the loss that has a memory bank; its buffers afterwards and before."""
    torch.manual_seed(0)
    model = create_multi_exit('resnet18', exits=3, num_classes=5, small_input=True, channels=(8, 8, 8, 8))
    criterion = MLCSDLoss(3, model.exit_feature_dim, num_samples=40, method='crd')
    task = MLCSDTask(model, criterion, verbose=False)
    fresh = {name: t.clone() for name, t in criterion.named_buffers()}
    task.prepare_distributed()
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        indices = torch.arange(4) + 8 * step + 4 * rank
        task.train()(torch.randn(4, 3, 16, 16), indices % 5, indices)['loss'].backward()
    buffers = dict(criterion.named_buffers())
    return {name: (buffers[name], fresh[name]) for name in criterion.bank_buffer_names()}


def test_what_one_process_saw_all_remember(tmp_path):
    first, second = in_two_processes(_remember, tmp_path)
    assert len(first) == 3
    for name, (bank, _) in first.items():
        assert torch.equal(bank, second[name][0]), name
    bank, fresh = first['method.memory']
    changed = (bank != fresh).movedim(1, 0).flatten(1).any(dim=1)
    assert changed.tolist() == [True] * 16 + [False] * 24


@pytest.mark.parametrize('others', [[], ['--model-ema'], ['--heads-only'], ['--clip-mode', 'agc', '--clip-grad', 1]])
def test_fsdp_says_what_it_does_not_do(small, capsys, monkeypatch, others):
    monkeypatch.setattr(train, 'init_distributed', lambda device_type: DistributedContext(size=1 + bool(others)))
    monkeypatch.setattr(DistributedContext, 'all_gather', lambda self, value: [value] * self.size)
    monkeypatch.setattr(trainer, 'check_heads_only', lambda *args: None)
    assert run(train.main, [*small, '--fsdp', *others]) == 2
    assert (others[0] if others else 'torchrun') in capsys.readouterr().err


def test_fsdp_needs_a_torch_that_has_it_on_the_cpu(small, capsys, monkeypatch):
    monkeypatch.setattr(train, 'init_distributed', lambda device_type: DistributedContext(size=2))
    monkeypatch.setattr(DistributedContext, 'all_gather', lambda self, value: [value] * self.size)
    monkeypatch.delattr(torch.cpu.Stream, 'record_event', raising=False)
    assert run(train.main, [*small, '--fsdp']) == 2
    error = capsys.readouterr().err
    assert f'--fsdp --device cpu: torch {torch.__version__}' in error and error.count('\n') == 1


def test_processes_that_would_begin_at_different_epochs_stop(small, tmp_path, capsys, monkeypatch):
    """As where machines don't share the folder of the run."""
    assert run(train.main, [*small, '--epochs', 1]) == 0

    class Elsewhere(DistributedContext):
        def all_gather(self, value):
            return [value, (0, 0)]

    monkeypatch.setattr(train, 'init_distributed', lambda device_type: Elsewhere())
    assert run(train.main, [*small, '--resume', tmp_path / 'run']) == 2
    assert 'different places (epoch 0 batch 0, epoch 1 batch 0)' in capsys.readouterr().err
