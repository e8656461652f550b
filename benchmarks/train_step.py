#!/usr/bin/env python3
"""Compare a training step of a multi-exit network with a step of its plain backbone.

A step is forward, loss, backward and optimizer update on a fixed batch on the device; the variants are timed
alternately. Prints the ratio of the times and of the multiply-adds, the shares of backbone, heads and loss in the
multi-exit step, and the ratio of peak memory. Forward and backward of the loss are also timed alone, on the outputs of
one step.

    python benchmarks/train_step.py --model resnet18 --small-input --input-size 3 32 32 --batch-size 64
    python benchmarks/train_step.py --model resnet50 --input-size 3 224 224 --batch-size 8
    python benchmarks/train_step.py --small-input --exits 4 --compile
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Callable, Dict, Sequence, Tuple

import timm
import torch
import torch.nn.functional as F

from timm_mlcsd import MLCSDLoss, create_multi_exit
from timm_mlcsd.cli.arguments import positive_int
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.models import DEFAULT_EXIT_HEAD, EXIT_HEADS, MultiExitBackbone
from timm_mlcsd.report import format_table


def make_model(args: argparse.Namespace, exits: int) -> MultiExitBackbone:
    """Create a network with a number of exits, in training mode."""
    torch.manual_seed(0)
    kwargs = dict(exits=exits, exit_head=args.exit_head, small_input=args.small_input)
    return create_multi_exit(args.model, num_classes=args.num_classes, **kwargs).train()


def make_steps(args: argparse.Namespace) -> Tuple[Dict[str, Callable[[], None]], float]:
    """Create the steps to time, by name, and compute the ratio of multiply-adds (multi-exit / plain)."""
    device = torch.device(args.device)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(args.batch_size, *args.input_size, device=device).contiguous(memory_format=layout)
    target = torch.randint(args.num_classes, (args.batch_size,), device=device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if args.amp else contextlib.nullcontext()

    def stepper(parameters, loss_of):
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

        def step():
            with autocast():
                loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    plain, multi = (make_model(args, exits).to(device, memory_format=layout) for exits in (1, args.exits))
    criterion = MLCSDLoss(multi.num_exits, multi.exit_feature_dim).to(device)
    outputs = []
    compiled = torch.compile if args.compile else lambda function: function
    run_plain, run_multi, run_backbone, run_loss = (compiled(m) for m in (plain, multi, multi.backbone, criterion))

    def heads_off():
        return F.cross_entropy(run_backbone(images).float(), target)

    def loss_off():
        return sum(z.float().mean() for z in run_multi(images).logits)

    def whole():
        return run_loss(run_multi(images), target)

    def loss_alone():
        with autocast():
            if not outputs:  # created at first use, so that it does not count in the peak memory of other steps
                outputs.extend([t.detach().requires_grad_() for t in kind] for kind in multi(images))
            run_loss(outputs, target).backward()

    def loss_in_loops():
        with autocast():
            exit_by_exit(criterion, outputs, target).backward()

    steps = {
        'plain': stepper(plain.parameters(), lambda: F.cross_entropy(run_plain(images).logits[-1].float(), target)),
        'multi-exit': stepper([*multi.parameters(), *criterion.parameters()], whole),
        'multi-exit, loss off': stepper(multi.parameters(), loss_off),
        'multi-exit, heads off': stepper(multi.backbone.parameters(), heads_off),
        'loss alone': loss_alone,
        'loss alone, exit by exit': loss_in_loops,
    }
    size = tuple(args.input_size)
    return steps, exit_costs(multi, size)[-1].macs / exit_costs(plain, size)[-1].macs


def exit_by_exit(criterion: MLCSDLoss, outputs: Sequence[Sequence[torch.Tensor]], target: torch.Tensor) -> torch.Tensor:
    """Compute the loss exit by exit, as its equations are written.

    Args:
        criterion: Loss with default settings.
        outputs: Logits, [B, C] per exit, and features, [B, D, H, W] per exit.
        target: Labels, [B].

    Returns:
        The loss, a scalar.
    """
    logits, features = ([t.float() for t in kind] for kind in outputs)
    weights, temperature, loss = criterion.mixing_weights((logits, features), target), criterion.temperature, 0.0
    for i in range(len(logits)):
        teacher = sum(weights[:, i, k, None] * z.detach() for k, z in enumerate(logits))
        feature = sum(weights[:, i, k, None, None, None].detach() * f.detach() for k, f in enumerate(features))
        student = F.log_softmax(logits[i] / temperature, dim=-1)
        target_log_probs = F.log_softmax(teacher.detach() / temperature, dim=-1)
        kd = temperature**2 * F.kl_div(student, target_log_probs, log_target=True, reduction='batchmean')
        loss = loss + F.cross_entropy(logits[i], target) + F.cross_entropy(teacher, target)
        loss = loss + criterion.alpha * kd + criterion.beta * F.mse_loss(features[i], feature)
    return loss


def peak_memory(args: argparse.Namespace, name: str) -> int:
    """Bytes that three steps add to the peak memory of this process, or the peak memory on the GPU."""
    steps, _ = make_steps(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(3):
        steps[name]()
    if args.device == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def peak_memory_in_process(args: argparse.Namespace, name: str) -> int:
    """Run `peak_memory` in a new process."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context('spawn')) as pool:
        return pool.submit(peak_memory, args, name).result()


def read_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet18')
    parser.add_argument('--exits', type=positive_int, default=8)
    parser.add_argument('--exit-head', default=DEFAULT_EXIT_HEAD, choices=tuple(EXIT_HEADS))
    parser.add_argument('--small-input', action='store_true')
    parser.add_argument('--input-size', type=positive_int, nargs=3, default=[3, 32, 32])
    parser.add_argument('--num-classes', type=positive_int, default=100)
    parser.add_argument('--batch-size', type=positive_int, default=64)
    parser.add_argument('--repeats', type=positive_int, default=7)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='torch.compile networks and loss')
    parser.add_argument(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='use the channels-last memory format, which is faster for both networks',
    )
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print its tables."""
    args = read_args()
    # measured first: the peak memory of a child process starts at the size of its parent
    memory = {name: peak_memory_in_process(args, name) for name in ('plain', 'multi-exit')}
    steps, mac_ratio = make_steps(args)
    synchronize = torch.cuda.synchronize if args.device == 'cuda' else lambda: None
    times = {name: [] for name in steps}
    for repeat in range(args.repeats + 2):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(t) for name, t in times.items()}
    whole = median['multi-exit']
    ratios = [a / b for a, b in zip(times['multi-exit'], times['plain'])]

    where = f'{args.device}, {torch.get_num_threads()} threads' if args.device == 'cpu' else args.device
    print(
        f'{args.model}, {args.exits} exits, {args.exit_head}, batch {args.batch_size} of {args.input_size}, {where}, '
        f'{"bfloat16" if args.amp else "float32"}{", channels last" if args.channels_last else ""}'
        f'{", compiled" if args.compile else ""}, '
        f'torch {torch.__version__}, timm {timm.__version__}, median of {args.repeats}'
    )
    rows = [(name, 1000 * t, t / median['plain']) for name, t in median.items()]
    print(format_table(('step', 'ms', 'x plain'), rows))
    ratio = statistics.median(ratios)
    print(
        f'time ratio {ratio:.3f} (pairs {min(ratios):.3f} to {max(ratios):.3f}), MAC ratio {mac_ratio:.3f}, '
        f'time over MACs {ratio / mac_ratio:.3f}'
    )
    backbone, heads = median['multi-exit, heads off'], median['multi-exit, loss off'] - median['multi-exit, heads off']
    print(
        f'shares of the multi-exit step: backbone {backbone / whole:.0%}, heads {heads / whole:.0%}, '
        f'loss {(whole - backbone - heads) / whole:.0%} (timed alone: {median["loss alone"] / whole:.1%}, '
        f'exit by exit {median["loss alone, exit by exit"] / whole:.1%})'
    )
    print(
        f'peak memory of a step: plain {memory["plain"] / 2**20:.0f} MiB, multi-exit '
        f'{memory["multi-exit"] / 2**20:.0f} MiB, ratio {memory["multi-exit"] / memory["plain"]:.2f}'
    )


if __name__ == '__main__':
    main()
