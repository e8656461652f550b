#!/usr/bin/env python3
"""Compare one process of train.py with several processes of the same global batch size, one thread each.

Prints images per second, measured alternately, and loss and accuracy of every epoch. Other flags are passed to
train.py; ``--batch-size`` is the global batch size.

    python benchmarks/processes.py --repeats 3 --config configs/quickstart.yaml --epochs 6 --workers 0
"""

import argparse
import csv
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Tuple

from timm_mlcsd.cli.arguments import positive_int
from timm_mlcsd.report import format_table

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'


def train(processes: int, batch_size: int, flags: List[str]) -> Tuple[float, List[Dict[str, float]]]:
    """Train once.

    Args:
        processes: Number of processes.
        batch_size: Global batch size.
        flags: Flags of train.py.

    Returns:
        Images per second, the median of the epochs after the first, and the rows of summary.csv.
    """
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(processes)]
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, *launcher, str(TRAIN), *flags, '--batch-size', str(batch_size // processes)]
        command += ['--output', output, '--experiment', 'run']
        environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
        job = subprocess.run(command, env=environment, capture_output=True, text=True)
        if job.returncode:
            sys.exit(job.stderr[-2000:])
        speeds = [float(speed) for speed in re.findall(r'epoch \d+: .*; (\d+) images/s', job.stdout + job.stderr)]
        with open(Path(output) / 'run' / 'summary.csv') as f:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(f)]
    return statistics.median(speeds[1:] or speeds), rows


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--processes', type=positive_int, default=2)
    parser.add_argument('--batch-size', type=positive_int, default=32)
    parser.add_argument('--repeats', type=positive_int, default=3)
    args, flags = parser.parse_known_args()
    pairs = [[train(n, args.batch_size, flags) for n in (1, args.processes)] for _ in range(args.repeats)]
    one, several = ([pair[i] for pair in pairs] for i in range(2))
    speeds = [statistics.median(speed for speed, _ in runs) for runs in (one, several)]
    print(f'1 process {speeds[0]:.0f} images/s, {args.processes} processes {speeds[1]:.0f}, medians of {args.repeats}')
    print(f'ratio of the medians {speeds[1] / speeds[0]:.2f}')
    table = [
        (int(a['epoch']), a['train_loss'], b['train_loss'], a['eval_mean_top1'], b['eval_mean_top1'])
        for a, b in zip(one[0][1], several[0][1])
    ]
    print(format_table(('epoch', 'loss, 1', f'loss, {args.processes}', 'mean top-1, 1', f'{args.processes}'), table))
    difference = max(abs(a - b) / a for _, a, b, _, _ in table)
    print(f'losses differ by at most {100 * difference:.1f}%')


if __name__ == '__main__':
    main()
