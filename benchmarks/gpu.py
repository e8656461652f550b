#!/usr/bin/env python3
"""Measure training and early-exit inference on a GPU, part by part.

Every part runs in a process of its own under a time limit and adds its result to a JSON file; parts that the file has
are not repeated, so a stopped run continues. Prints the tables for benchmarks/README.md.

    python benchmarks/gpu.py --out gpu.json [--data FOLDER_WITH_CIFAR100_PARQUET]
    python benchmarks/gpu.py --out gpu.json --parts steps:resnet18:eager profile

Training steps: the plain backbone and the multi-exit network in turn, medians of rounds of several steps, with
bfloat16, channels last and a fused optimizer; the ratio of the times is compared with that of the multiply-adds. Images
per second of `train.py`: its last epoch's, from the log.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_mlcsd
from timm_mlcsd import MLCSDLoss, MLCSDTask, create_multi_exit
from timm_mlcsd.cli.arguments import positive_float, positive_int
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine import TrainConfig
from timm_mlcsd.engine.graphs import capture_step
from timm_mlcsd.report import format_table

HERE = Path(__file__).resolve().parent
# input size, number of classes, further arguments, batch sizes
NETWORKS: Dict[str, Tuple[int, int, Dict[str, Any], List[int]]] = {
    'resnet18': (32, 100, dict(exits=8, exit_head='slic', small_input=True), [64, 128, 256, 1024]),
    'resnet50': (224, 1000, dict(exits=4), [64, 128]),
    'vit_small_patch16_224': (224, 1000, dict(exits=4), [64, 128]),
}
MODES: Dict[str, Any] = {'eager': None, 'graphs': None, 'compiled': 'default', 'reduce-overhead': 'reduce-overhead'}
# compilation takes a minute per network, mode and batch size
COMPILED_BATCHES = [128]


class Plain(nn.Module):
    """Plain backbone with its loss."""

    def __init__(self, model: nn.Module, autocast: Callable[[], Any]):
        super().__init__()
        self.model = model
        self.autocast = autocast

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the backbone's logits."""
        with self.autocast():
            return F.cross_entropy(self.model(images).float(), target)


def make_step(network: str, kind: str, mode: str, batch: int, device: str) -> Callable[[], None]:
    """Create a training step of the plain backbone (kind ``plain``) or the multi-exit network (``multi``)."""
    size, classes, kwargs, _ = NETWORKS[network]
    torch.manual_seed(0)
    model = create_multi_exit(network, num_classes=classes, **kwargs).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch, device=device) % classes
    cached = mode != 'graphs'

    def autocast() -> Any:
        return torch.autocast(device, torch.bfloat16, cache_enabled=cached)

    run: Any
    if kind == 'plain':
        module = run = Plain(model.backbone, autocast).to(device).train()
        if mode == 'graphs':
            run = torch.cuda.make_graphed_callables(module, (images, target))
        elif MODES[mode]:
            run = torch.compile(module, mode=MODES[mode])
    else:
        module = task = MLCSDTask(model, MLCSDLoss(model.num_exits, model.exit_feature_dim), verbose=False).train()
        config = TrainConfig.from_dict(dict(batch_size=batch, amp=True, amp_dtype='bfloat16', channels_last=True))
        if mode == 'graphs':
            capture_step(task, SimpleNamespace(loader=None), config, dict(input_size=(3, size, size)), classes)
        elif MODES[mode]:
            task.compile(mode=MODES[mode])

        def run(images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            with autocast():
                return task(images, target)['loss']

    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, fused=True)

    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        loss = run(images, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def steps(network: str, mode: str, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Time the steps of a network in a mode at its batch sizes."""
    size, classes, kwargs, batches = NETWORKS[network]
    batches = args.batches or (COMPILED_BATCHES if MODES[mode] else batches)
    macs = {}
    for exits in (1, kwargs['exits']):
        model = create_multi_exit(network, num_classes=classes, **{**kwargs, 'exits': exits})
        macs[exits] = exit_costs(model, (3, size, size))[-1].macs
    rows = []
    for batch in batches:
        run = {kind: make_step(network, kind, mode, batch, args.device) for kind in ('plain', 'multi')}
        times: Dict[str, List[float]] = {kind: [] for kind in run}
        for round_ in range(args.rounds + 1):
            for kind, step in run.items():
                seconds = clocked(step, args.steps, args.device)
                if round_:
                    times[kind].append(seconds)
        ratio = statistics.median(m / p for m, p in zip(times['multi'], times['plain']))
        plain, multi = (statistics.median(times[kind]) for kind in ('plain', 'multi'))
        rows.append(
            dict(
                batch=batch,
                plain_ms=1000 * plain,
                multi_ms=1000 * multi,
                images_per_second=batch / multi,
                time_ratio=ratio,
                mac_ratio=macs[kwargs['exits']] / macs[1],
            )
        )
        print(rows[-1], flush=True)
    return rows


def clocked(step: Callable[[], None], count: int, device: str) -> float:
    """Seconds per step."""
    synchronize = torch.cuda.synchronize if device == 'cuda' else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - start) / count


def memory(kind: str, mode: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Memory that PyTorch has reserved after five steps of ResNet18; a process of its own has nothing else."""
    step = make_step('resnet18', kind, mode, (args.batches or [128])[0], args.device)
    clocked(step, 5, args.device)
    return dict(reserved_mib=torch.cuda.max_memory_reserved() / 2**20)


def profile(args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Kernels of one eager multi-exit step by kind: number and milliseconds on the device."""
    batch = (args.batches or [128])[0]
    step = make_step('resnet18', 'multi', 'eager', batch, args.device)
    clocked(step, 5, args.device)
    on_gpu = args.device == 'cuda'
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        clocked(step, 1, args.device)
    kinds: Dict[str, List[float]] = {}
    for event in profiler.key_averages():
        name = event.key.lower()
        words = ('pool', 'norm', 'conv', 'gemm', 'softmax', 'reduce', 'multi_tensor', 'copy', 'elementwise', 'cat')
        kind = next((word for word in words if word in name), 'other')
        total = kinds.setdefault(kind, [0, 0.0])
        total[0] += event.count
        total[1] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000
    rows = [dict(kind=kind, kernels=count, ms=ms) for kind, (count, ms) in kinds.items()]
    return sorted(rows, key=lambda row: -row['ms'])


def training(mode: str, args: argparse.Namespace) -> Dict[str, Any]:
    """Images per second of train.py on cached CIFAR-100, in its last of three epochs."""
    flags = ['--cuda-graphs'] if mode == 'graphs' else []
    with tempfile.TemporaryDirectory() as folder:
        recipe = '--exit-head slic --cache-dataset device --amp --amp-dtype bfloat16 --channels-last --batch-size 128'
        schedule = '--epochs 3 --warmup-epochs 1 --decay-milestones 2'
        root = HERE.parent
        command = [sys.executable, str(root / 'train.py'), '--config', str(root / 'configs' / 'cifar100.yaml')]
        command += ['--dataset', f'hfds/{args.data}', '--data-dir', folder, '--device', args.device]
        command += [*recipe.split(), *schedule.split(), '--output', folder, '--experiment', 'run', *flags]
        found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(_reason(found.stderr))
    speeds = re.findall(r'([\d,]+) images/s', found.stdout + found.stderr)
    return dict(images_per_second=float(speeds[-1].replace(',', '')))


def adaptive(mode: str, args: argparse.Namespace) -> Dict[str, str]:
    """The table of benchmarks/adaptive.py."""
    flags = ['--cuda-graphs'] if mode == 'graphs' else []
    command = [sys.executable, str(HERE / 'adaptive.py'), '--device', args.device, '--amp', '--channels-last']
    found = subprocess.run([*command, *flags, '--repeats', '3'], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(_reason(found.stderr))
    return dict(table=found.stdout)


def _limited(command: List[str], seconds: float) -> Optional[str]:
    """Run a command and what it starts for so many seconds at most; the error, if there is one."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f'took more than {seconds:g} s'
    return _reason(stderr) if process.returncode else None


def _reason(stderr: str) -> str:
    """The error in what a script wrote, or its last line."""
    lines = stderr.strip().splitlines() or ['no message']
    return next((line for line in reversed(lines) if re.search(r'(error|exception): ', line, re.I)), lines[-1])


def part_names(args: argparse.Namespace) -> List[str]:
    """Parts in the order of their worth, in case time runs out."""
    names = [f'steps:{network}:{mode}' for mode in ('eager', 'graphs') for network in NETWORKS]
    if args.data:
        names += ['training:eager', 'training:graphs']
    names += ['adaptive:eager', 'adaptive:graphs', 'profile']
    names += ['memory:plain:eager', 'memory:multi:eager', 'memory:multi:graphs']
    return [*names, 'steps:resnet18:compiled', 'steps:resnet18:reduce-overhead']


def run_part(name: str, args: argparse.Namespace) -> Any:
    """Run a part in this process and return its result."""
    kind, *rest = name.split(':')
    return dict(steps=steps, training=training, memory=memory, adaptive=adaptive, profile=profile)[kind](*rest, args)


def tables(results: Dict[str, Any]) -> str:
    """Tables of the results, in Markdown."""
    rows = [
        (*name.split(':')[1:], *row.values())
        for name, part in results.items()
        if name.startswith('steps:') and isinstance(part, list)
        for row in part
    ]
    columns = ('network', 'mode', 'batch', 'plain, ms', 'multi-exit, ms', 'images/s', 'time ratio', 'MAC ratio')
    texts = [format_table(columns, rows)] if rows else []
    for name, part in results.items():
        if name.startswith('steps:') and isinstance(part, list):
            continue
        is_rows = isinstance(part, list) and part
        text = format_table(tuple(part[0]), [tuple(row.values()) for row in part]) if is_rows else part
        texts.append(f'{name}\n{text["table"] if isinstance(text, dict) and "table" in text else text}')
    return '\n\n'.join(texts)


def main() -> None:
    """Run the missing parts and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('gpu.json'), help='file of the results')
    parser.add_argument(
        '--data', metavar='DIR', help='folder of CIFAR-100 in Parquet; without it train.py is not timed'
    )
    parser.add_argument('--parts', nargs='+', metavar='PART', help='parts to run (default: all)')
    parser.add_argument('--limit', type=positive_float, default=120, metavar='S', help='time limit of a part')
    parser.add_argument('--batches', type=positive_int, nargs='+', help='batch sizes (default: those of each network)')
    parser.add_argument('--rounds', type=positive_int, default=5)
    parser.add_argument('--steps', type=positive_int, default=20, help='steps per round')
    parser.add_argument('--device', default='cuda', help='cpu rehearses what needs no graphs')
    parser.add_argument('--one', metavar='PART', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(run_part(args.one, args)))
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    name = torch.cuda.get_device_name() if args.device == 'cuda' else args.device
    versions = dict(torch=torch.__version__, timm=timm.__version__, timm_mlcsd=timm_mlcsd.__version__)
    results['machine'] = dict(device=name, date=time.strftime('%Y-%m-%d'), **versions)
    for part in args.parts or part_names(args):
        if part in results and 'error' not in results[part]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'part.json'
            own = [*sys.argv[1:], '--one', part, '--out', str(path)]
            error = _limited([sys.executable, __file__, *own], args.limit)
            results[part] = json.loads(path.read_text()) if error is None else dict(error=error)
        args.out.write_text(json.dumps(results, indent=1))
        print(f'{part}: {results[part] if error else "done"}', flush=True)
    print(json.dumps(results['machine']))
    print(tables({name: part for name, part in results.items() if name != 'machine'}))


if __name__ == '__main__':
    main()
