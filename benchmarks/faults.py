#!/usr/bin/env python3
"""Fault injection: test that training resumes after kills, damaged checkpoints and full disks with equal results.

Trains a tiny network on generated images in new processes, injects a fault, resumes the run, and compares the final
weights bit for bit with those of an undisturbed run.

    python benchmarks/faults.py --runs 20
    python benchmarks/faults.py --runs 20 --faults sigkill sigterm
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, List, Optional

import numpy as np
import torch
from PIL import Image

from timm_mlcsd.cli.arguments import positive_int, seed
from timm_mlcsd.network import load_checkpoint
from timm_mlcsd.report import format_table

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'
FLAGS = (
    '--model mlcsd_resnet18 --model-kwargs channels=(8,8,8,8) --exits 4 --small-input --img-size 16 --crop-pct 1 '
    '--epochs 12 --batch-size 8 --workers 0 --lr 0.02 --warmup-epochs 0 --alpha 1 --beta 1 --train-crop-mode pad4 '
    '--color-jitter 0 --device cpu --drop 0.2 --model-ema --checkpoint-every-steps 1 --checkpoint-hist 3'
).split()


def make_images(root: Path) -> None:
    """Write 48 noisy images of three colours, one class each, below a folder."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(('red', 'green', 'blue')):
        (root / 'train' / name).mkdir(parents=True)
        for i in range(16):
            pixels = rng.integers(0, 120, (16, 16, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / 'train' / name / f'{i}.png')


class Runs:
    """Runs of train.py in one folder.

    Args:
        root: Folder of images and runs.
        rng: Random generator for times and kinds of faults.
    """

    def __init__(self, root: Path, rng: random.Random):
        self.root = root
        self.rng = rng
        make_images(root / 'images')

    def start(self, name: str, *more: str, launcher: Optional[List[str]] = None, **kwargs) -> subprocess.Popen:
        """Start a run.

        Args:
            name: Name of the run.
            *more: Further flags of train.py.
            launcher: Arguments of Python before train.py; default: none.
            **kwargs: Arguments of ``subprocess.Popen``.

        Returns:
            The process.
        """
        command = [sys.executable, *(launcher or []), str(TRAIN), str(self.root / 'images'), *FLAGS]
        command += ['--output', str(self.root), '--experiment', name, *more]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs
        )

    def finish(self, process: subprocess.Popen) -> str:
        """Wait for a run and return its stderr.

        Args:
            process: Process of the run.

        Raises:
            RuntimeError: The exit code is not 0.
        """
        stderr = process.communicate(timeout=300)[1]
        if process.returncode:
            raise RuntimeError(f'exit code {process.returncode}: {stderr[-500:]}')
        return stderr

    def resume(self, name: str) -> str:
        """Resume a run, wait for its end and return its stderr."""
        return self.finish(self.start(name, '--resume', 'auto'))

    def wait_for_a_step(self, name: str, process: subprocess.Popen) -> None:
        """Wait for the first checkpoint of a run, and up to two seconds more."""
        while not (self.root / name / 'last.pth.tar').exists():
            if process.poll() is not None:
                raise RuntimeError(f'ended before its first checkpoint: {process.stderr.read()[-500:]}')
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0.0, 2.0))

    def weights(self, name: str) -> dict:
        """Tensors of a run's last checkpoint: weights, averaged weights and the state of the loss."""
        checkpoint = load_checkpoint(self.root / name)
        states = (checkpoint['state_dict'], checkpoint['state_dict_ema'], checkpoint['task_state']['criterion'])
        return {f'{i}.{key}': t for i, state in enumerate(states) for key, t in state.items()}


def sigkill(runs: Runs, name: str) -> str:
    """SIGKILL at a random moment, then --resume."""
    process = runs.start(name)
    runs.wait_for_a_step(name, process)
    process.kill()
    process.communicate()
    runs.resume(name)
    return 'killed' if process.returncode == -signal.SIGKILL else 'already finished'


def sigterm(runs: Runs, name: str) -> str:
    """SIGTERM at a random moment: the run saves and ends with code 0, then --resume."""
    process = runs.start(name)
    runs.wait_for_a_step(name, process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    stderr = runs.finish(process)
    took = time.monotonic() - sent
    if took > 30:
        raise RuntimeError(f'took {took:.0f} s to end')
    runs.resume(name)
    return 'stopped' if 'Stopped by SIGTERM' in stderr else 'already finished'


def worker(runs: Runs, name: str) -> str:
    """SIGKILL of one of two workers under torchrun, which restarts the job."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3']
    process = runs.start(name, launcher=launcher)
    runs.wait_for_a_step(name, process)
    found = subprocess.run(['pgrep', '-P', str(process.pid), '-f', TRAIN.name], capture_output=True, text=True)
    workers = [int(pid) for pid in found.stdout.split()]
    if workers:
        os.kill(runs.rng.choice(workers), signal.SIGKILL)
    stderr = runs.finish(process)
    return 'killed' if 'Resuming' in stderr else 'already finished'


def damaged(runs: Runs, name: str) -> str:
    """Newest checkpoint truncated, emptied, or with one bit flipped, after a SIGKILL; then --resume."""
    process = runs.start(name)
    while not (runs.root / name / 'checkpoint-1.pth.tar').exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    last = runs.root / name / 'last.pth.tar'
    data = bytearray(last.read_bytes())
    kind = runs.rng.choice(('truncated', 'bit flipped', 'emptied'))
    if kind == 'truncated':
        data = data[: runs.rng.randrange(1, len(data))]
    elif kind == 'bit flipped':
        # within the tensors or the pickle; bytes between the members of the archive are never read
        data[runs.rng.randrange(len(data) // 10, len(data) * 8 // 10)] ^= 1 << runs.rng.randrange(8)
    else:
        data = b''
    last.unlink()
    last.write_bytes(data)
    stderr = runs.resume(name)
    return kind if 'Going on from' in stderr else f'{kind}, not detected'


def disk_full(runs: Runs, name: str) -> str:
    """Full disk at the second start: one-line error, unchanged last checkpoint; then --resume."""
    process = runs.start(name)
    runs.wait_for_a_step(name, process)
    process.kill()
    process.communicate()
    last = runs.root / name / 'last.pth.tar'
    before = last.read_bytes()

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))

    full = runs.start(name, '--resume', 'auto', preexec_fn=limit)
    stderr = full.communicate(timeout=300)[1]
    if full.returncode == 0:
        return 'already finished'
    if full.returncode != 2 or 'cannot be written' not in stderr or 'Traceback' in stderr:
        raise RuntimeError(f'exit code {full.returncode}: {stderr[-500:]}')
    if last.read_bytes() != before:
        raise RuntimeError('the last checkpoint was changed')
    runs.resume(name)
    return 'refused'


FAULTS = {f.__name__: f for f in (sigkill, sigterm, worker, damaged, disk_full)}


def try_fault(fault: Callable[[Runs, str], str], runs: Runs, name: str, reference: dict) -> str:
    """Inject a fault and compare the final weights of the run.

    Args:
        fault: Function that runs a training with the fault and returns what happened.
        runs: Runs.
        name: Name of the run.
        reference: Tensors of the undisturbed run by name.

    Returns:
        Outcome in words.
    """
    try:
        outcome = fault(runs, name)
        final = runs.weights(name)
    except Exception as e:
        return f'FAILED ({e})'
    same = set(final) == set(reference) and all(torch.equal(t, reference[key]) for key, t in final.items())
    return f'{outcome}, {"same weights" if same else "OTHER WEIGHTS"}'


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=positive_int, default=20, help='runs per fault')
    parser.add_argument('--faults', nargs='+', choices=tuple(FAULTS), default=tuple(FAULTS))
    parser.add_argument('--seed', type=seed, default=0)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        runs = Runs(Path(root), random.Random(args.seed))
        runs.finish(runs.start('undisturbed'))
        two = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        if 'worker' in args.faults:
            runs.finish(runs.start('undisturbed_two', launcher=two))
        for name in args.faults:
            reference = runs.weights('undisturbed_two' if name == 'worker' else 'undisturbed')
            outcomes = [try_fault(FAULTS[name], runs, f'{name}{i}', reference) for i in range(args.runs)]
            for outcome in sorted(set(outcomes)):
                rows.append((name, outcome, outcomes.count(outcome)))
                print(f'{name}: {outcome}: {outcomes.count(outcome)}', flush=True)
    print(format_table(('fault', 'outcome', 'runs'), rows))


if __name__ == '__main__':
    main()
