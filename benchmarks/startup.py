#!/usr/bin/env python3
"""Compare the import time with timm's, and the construction time of networks with that of their plain backbones.

Imports are timed in new processes, constructions alternately in this one; medians and their ratios are printed.

    python benchmarks/startup.py
"""

import argparse
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Callable, List

import timm
import torch

import timm_mlcsd
from timm_mlcsd.cli.arguments import positive_int
from timm_mlcsd.report import format_table

MODELS = ['resnet18', 'resnet50', 'mobilenetv2_100', 'vit_small_patch16_224']


def import_seconds(code: str) -> float:
    """Seconds that a new process needs for `code` without its first line, which runs before the measurement."""
    first, _, rest = code.partition('\n')
    script = f'import time\n{first}\nstart = time.perf_counter()\n{rest}\nprint(time.perf_counter() - start)'
    return float(subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout)


def seconds(make: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    make()
    return time.perf_counter() - start


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=positive_int, default=5)
    parser.add_argument('--models', nargs='*', default=MODELS)
    args = parser.parse_args()
    print(f'torch {torch.__version__}, timm {timm.__version__}, median of {args.repeats}')

    pairs = [
        (import_seconds('import torch\nimport timm'), import_seconds('import timm\nimport timm_mlcsd'))
        for _ in range(args.repeats)
    ]
    plain, ours = (statistics.median(times) for times in zip(*pairs))
    print(f'import timm (after torch) {plain:.2f} s; timm_mlcsd after it {ours:.3f} s, ratio {ours / plain:.3f}')

    rows: List[tuple] = []
    for name in args.models:
        times = [
            (seconds(partial(timm.create_model, name)), seconds(partial(timm_mlcsd.create_multi_exit, name)))
            for _ in range(args.repeats)
        ]
        plain, ours = (statistics.median(t) for t in zip(*times))
        ratio = statistics.median(b / a for a, b in times)
        rows.append((name, f'{1000 * plain:.0f}', f'{1000 * ours:.0f}', f'{ratio:.2f}'))
    print(format_table(('model', 'plain ms', 'with exits ms', 'ratio'), rows))


if __name__ == '__main__':
    main()
