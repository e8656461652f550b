#!/usr/bin/env python3
"""Kills, damages and fills: does a run always come back, and as if nothing had happened?

Trains a tiny network on generated images in processes of its own, does something to it, lets it go on, and compares
the final weights bit by bit with those of a run that was left alone.

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
    """48 noisy images of three colours."""
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
        root: The folder.
        rng: When and what.
    """

    def __init__(self, root: Path, rng: random.Random):
        self.root = root
        self.rng = rng
        make_images(root / 'images')

    def start(self, name: str, *more: str, launcher: Optional[List[str]] = None, **kwargs) -> subprocess.Popen:
        command = [sys.executable, *(launcher or []), str(TRAIN), str(self.root / 'images'), *FLAGS]
        command += ['--output', str(self.root), '--experiment', name, *more]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs
        )

    def finish(self, process: subprocess.Popen) -> str:
        """What it complained of; an error unless it ends well."""
        complaint = process.communicate(timeout=300)[1]
        if process.returncode:
            raise RuntimeError(f'exit code {process.returncode}: {complaint[-500:]}')
        return complaint

    def resume(self, name: str) -> str:
        return self.finish(self.start(name, '--resume', 'auto'))

    def wait_for_a_step(self, name: str, process: subprocess.Popen) -> None:
        """Until a moment in the middle of the training."""
        while not (self.root / name / 'last.pth.tar').exists():
            if process.poll() is not None:
                raise RuntimeError(f'ended before its first checkpoint: {process.stderr.read()[-500:]}')
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0.0, 2.0))

    def weights(self, name: str) -> dict:
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
    return 'killed' if process.returncode == -signal.SIGKILL else 'had ended'


def sigterm(runs: Runs, name: str) -> str:
    """SIGTERM at a random moment: saves and leaves with code 0, then --resume."""
    process = runs.start(name)
    runs.wait_for_a_step(name, process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    complaint = runs.finish(process)
    took = time.monotonic() - sent
    if took > 30:
        raise RuntimeError(f'took {took:.0f} s to leave')
    runs.resume(name)
    return 'stopped' if 'Stopped by SIGTERM' in complaint else 'had ended'


def worker(runs: Runs, name: str) -> str:
    """SIGKILL of one of two workers under torchrun, which brings the job back."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3']
    process = runs.start(name, launcher=launcher)
    runs.wait_for_a_step(name, process)
    found = subprocess.run(['pgrep', '-P', str(process.pid), '-f', TRAIN.name], capture_output=True, text=True)
    workers = [int(pid) for pid in found.stdout.split()]
    if workers:
        os.kill(runs.rng.choice(workers), signal.SIGKILL)
    complaint = runs.finish(process)
    return 'killed' if 'Resuming' in complaint else 'had ended'


def damaged(runs: Runs, name: str) -> str:
    """The newest checkpoint truncated, a bit of it flipped, or emptied, after a SIGKILL; then --resume."""
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
        # anywhere in the tensors or the pickle; between the members of the archive nothing is read
        data[runs.rng.randrange(len(data) // 10, len(data) * 8 // 10)] ^= 1 << runs.rng.randrange(8)
    else:
        data = b''
    last.unlink()
    last.write_bytes(data)
    complaint = runs.resume(name)
    return kind if 'Going on from' in complaint else f'{kind}, unnoticed'


def disk_full(runs: Runs, name: str) -> str:
    """A disk that is full at the second start: one clear line, the last checkpoint as it was, then --resume."""
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
    complaint = full.communicate(timeout=300)[1]
    if full.returncode == 0:
        return 'had ended'
    if full.returncode != 2 or 'cannot be written' not in complaint or 'Traceback' in complaint:
        raise RuntimeError(f'exit code {full.returncode}: {complaint[-500:]}')
    if last.read_bytes() != before:
        raise RuntimeError('the last checkpoint has changed')
    runs.resume(name)
    return 'refused'


FAULTS = {f.__name__: f for f in (sigkill, sigterm, worker, damaged, disk_full)}


def try_fault(fault: Callable[[Runs, str], str], runs: Runs, name: str, reference: dict) -> str:
    """What became of a run."""
    try:
        happened = fault(runs, name)
        end = runs.weights(name)
    except Exception as e:
        return f'LOST ({e})'
    same = set(end) == set(reference) and all(torch.equal(t, reference[key]) for key, t in end.items())
    return f'{happened}, {"same weights" if same else "OTHER WEIGHTS"}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', type=positive_int, default=20, help='of each fault')
    parser.add_argument('--faults', nargs='+', choices=tuple(FAULTS), default=tuple(FAULTS))
    parser.add_argument('--seed', type=seed, default=0)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as root:
        runs = Runs(Path(root), random.Random(args.seed))
        runs.finish(runs.start('alone'))
        two = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        if 'worker' in args.faults:
            runs.finish(runs.start('together', launcher=two))
        for name in args.faults:
            reference = runs.weights('together' if name == 'worker' else 'alone')
            outcomes = [try_fault(FAULTS[name], runs, f'{name}{i}', reference) for i in range(args.runs)]
            for outcome in sorted(set(outcomes)):
                rows.append((name, outcome, outcomes.count(outcome)))
                print(f'{name}: {outcome}: {outcomes.count(outcome)}', flush=True)
    print(format_table(('fault', 'outcome', 'runs'), rows))


if __name__ == '__main__':
    main()
