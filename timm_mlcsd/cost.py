"""What every exit costs: multiply-adds, parameters, depth and measured time, counted from the modules themselves.

``python -m timm_mlcsd.cost mlcsd_resnet50 --exits 4 --input-size 3 224 224`` compares all heads before anyone trains.

A multiply-add (MAC) is one multiplication with its addition in a convolution or matrix product; norms, activations
and pools are not counted, as is usual. Counting needs no weights: it runs on the meta device.
"""

import argparse
import contextlib
import statistics
import time
from typing import Any, Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from .arguments import KeyValues, ScriptParser, exits, image_side, integer, positive_int
from .errors import UserError, run_script
from .models import DEFAULT_EXIT_POOL, EXIT_HEADS, EXIT_POOLS, MultiExitBackbone, MultiExitModel, OnMeta, create_named
from .report import format_table

__all__ = ['ExitCost', 'ExitTime', 'cost_parser', 'exit_costs', 'exit_times', 'plan', 'stage_times']

# an exit that costs more than this share of the whole backbone saves little
TOO_DEAR = 0.5
PLAIN = 'plain backbone'

_WEIGHTED_LAYERS = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear}


class ExitCost(NamedTuple):
    """What it costs to answer at one exit, for a batch of one.

    Attributes:
        macs: Multiply-adds of all that has run: stages 0..k and the heads evaluated on the way.
        params: Parameters of the same.
        stage_macs: Multiply-adds of this stage alone.
        head_macs: Multiply-adds of this head alone; an exit that is off saves them.
        depth: Weighted layers (convolutions and linear layers) on the longest path from the image to these logits.
    """

    macs: int
    params: int
    stage_macs: int
    head_macs: int
    depth: int


class ExitTime(NamedTuple):
    """What one exit adds to the time of a batch, in milliseconds.

    Attributes:
        stage_ms: Its stage alone.
        head_ms: Its head alone; an exit that is off saves it.
    """

    stage_ms: float
    head_ms: float


class _PathMode(TorchDispatchMode):
    """Notes which tensors the operations read, and how many weighted layers each result has behind it."""

    def __init__(self):
        super().__init__()
        self.read = set()
        self.depths = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        self.read.update(id(t) for t in inputs)
        depth = max((self.depths.get(t, 0) for t in inputs), default=0)
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.depths[t] = depth + (func.overloadpacket in _WEIGHTED_LAYERS)
        return out


def _check_resumable(model: MultiExitModel) -> None:
    if not model.resumable:
        raise ValueError(
            f'{type(model).__name__} runs as a whole (resumable=False): its exits have no cost of their own.'
        )


@torch.inference_mode(False)  # in inference mode operations reach the counters undivided
def exit_costs(model: MultiExitModel, input_size: Sequence[int]) -> List[ExitCost]:
    """Count what each exit costs.

    Args:
        model: A resumable multi-exit network, on any device.
        input_size: (C, H, W) of one image.

    Returns:
        One `ExitCost` per exit, first exit first.

    Raises:
        ValueError: The images are too small for the network, or it is not resumable.
    """
    _check_resumable(model)
    if hasattr(model, 'prepare'):
        model.prepare(input_size)
    on_meta = OnMeta(model)
    params = {id(on_meta.tensors[name]): p.numel() for name, p in model.named_parameters()}
    path, counter = _PathMode(), FlopCounterMode(display=False)
    costs, total = [], 0
    state = torch.empty(1, *input_size, device='meta', dtype=next(model.parameters()).dtype)
    with counter, path:
        for k in range(model.num_exits):
            before = counter.get_total_flops() // 2
            state = on_meta('run_stage', k, state)
            between = counter.get_total_flops() // 2
            logits, _ = on_meta('run_head', k, state)
            stage_macs, head_macs = between - before, counter.get_total_flops() // 2 - between
            total += stage_macs + head_macs
            costs.append(
                ExitCost(
                    macs=total,
                    params=sum(n for i, n in params.items() if i in path.read),
                    stage_macs=stage_macs,
                    head_macs=head_macs,
                    depth=path.depths.get(logits, 0),
                )
            )
    return costs


@torch.inference_mode()
def exit_times(
    model: MultiExitModel,
    input_size: Sequence[int],
    batch_size: int = 1,
    repeats: int = 10,
    device: Optional[torch.device] = None,
) -> List[float]:
    """Measure how long a batch takes until each exit has answered, all exits before it evaluated too.

    Args:
        model: A resumable multi-exit network; it is moved to `device` and put in evaluation mode.
        input_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        repeats: Timed runs, after one that doesn't count.
        device: Default: where the model is.

    Returns:
        Median milliseconds per exit, the network's computation alone in the clock.
    """
    _check_resumable(model)
    device = torch.device(device or next(model.parameters()).device)
    model.to(device).eval()
    images = torch.randn(batch_size, *input_size, device=device)
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    runs = []
    for _ in range(repeats + 1):
        synchronize()
        start, times = time.perf_counter(), []
        for _ in model.iter_exits(images):
            synchronize()
            times.append(1000 * (time.perf_counter() - start))
        runs.append(times)
    return [statistics.median(times) for times in zip(*runs[1:])]


@torch.inference_mode()
def stage_times(
    model: MultiExitModel, images: torch.Tensor, repeats: int = 10, autocast: Optional[ContextManager] = None
) -> List[ExitTime]:
    """Measure every stage and every head on its own.

    Args:
        model: A resumable multi-exit network; timed in evaluation mode, its own mode is restored.
        images: The batch to time, [B, C, H, W], on the model's device and in its memory layout.
        repeats: Timed runs, after one that doesn't count.
        autocast: Context of the forward passes.

    Returns:
        Medians, per exit.
    """
    _check_resumable(model)
    was_training = model.training
    model.eval()
    synchronize = torch.cuda.synchronize if images.device.type == 'cuda' else lambda: None
    runs = []
    for _ in range(repeats + 1):
        state, marks = images, []
        for k in range(model.num_exits):
            for run in (model.run_stage, model.run_head):
                synchronize()
                start = time.perf_counter()
                with autocast or contextlib.nullcontext():
                    result = run(k, state)
                synchronize()
                marks.append(1000 * (time.perf_counter() - start))
                state = result if run == model.run_stage else state
        runs.append(marks)
    model.train(was_training)
    medians = [statistics.median(marks) for marks in zip(*runs[1:])]
    return [ExitTime(*pair) for pair in zip(medians[::2], medians[1::2])]


class _LastOnly(MultiExitModel):
    """A network that answers at its last exit alone: what one designed with exits has for a plain backbone."""

    num_exits = 1

    def __init__(self, model: MultiExitModel):
        super().__init__()
        self.model = model

    def run_stage(self, k: int, state: Any) -> Any:
        for stage in range(self.model.num_exits):
            state = self.model.run_stage(stage, state)
        return state

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.model.run_head(self.model.num_exits - 1, state)


def plan(args: argparse.Namespace) -> str:
    """Compare all exit heads on one network before anyone trains it; returns the report."""
    model_args = dict(num_classes=args.num_classes, small_input=args.small_input)
    if args.input_size:
        model_args['in_chans'] = args.input_size[0]
    model_args.update(args.model_kwargs)
    model = create_named(args.model, exits=args.exits, exit_pool=args.exit_pool, **model_args)
    if isinstance(model, MultiExitBackbone):
        models = {PLAIN: create_named(args.model, exits=1, **model_args)}
        for head in EXIT_HEADS:
            models[head] = create_named(
                args.model, exits=args.exits, exit_head=head, exit_pool=args.exit_pool, **model_args
            )
    else:
        models = {PLAIN: _LastOnly(model), 'its own': model}
    heads = [name for name in models if name != PLAIN]
    input_size = tuple(args.input_size or model.probe_size)
    costs = {head: exit_costs(m, input_size) for head, m in models.items()}
    # in turn, so that a machine whose speed drifts is fair to all
    rounds = [
        {head: exit_times(m, input_size, args.batch_size, repeats=1) for head, m in models.items()}
        for _ in range(args.repeats)
    ]
    times = {head: [statistics.median(t) for t in zip(*(r[head] for r in rounds))] for head in models}
    base, base_time = costs[PLAIN][0], times[PLAIN][0]

    def table(title: str, cell: Callable[[str, int], str]) -> str:
        rows = [(f'Ex{k + 1}', name, *(cell(head, k) for head in heads)) for k, name in enumerate(model.exit_names)]
        return f'{title}\n{format_table(("Exit", "Tap", *heads), rows)}\n'

    size = 'x'.join(str(n) for n in input_size)
    what = PLAIN if isinstance(model, MultiExitBackbone) else 'last exit alone'
    parts = [
        f'{args.model} at {size}: {what} {base.macs / 1e6:.1f} MMACs, {base.params / 1e6:.2f} M parameters, '
        f'depth {base.depth}, {base_time:.1f} ms\n',
        table(
            f'MMACs to answer (share of the {what})',
            lambda h, k: f'{costs[h][k].macs / 1e6:.1f} ({costs[h][k].macs / base.macs:.2f})',
        ),
        table('Parameters, M', lambda h, k: f'{costs[h][k].params / 1e6:.2f}'),
        table('Depth', lambda h, k: str(costs[h][k].depth)),
        table(
            f'ms to answer (share), batch of {args.batch_size}, CPU with {torch.get_num_threads()} threads, untrained, '
            f'median of {args.repeats}',
            lambda h, k: f'{times[h][k]:.1f} ({times[h][k] / base_time:.2f})',
        ),
    ]
    for head in heads:
        share, time_share = costs[head][0].macs / base.macs, times[head][0] / base_time
        if model.num_exits > 1 and max(share, time_share) > TOO_DEAR:
            parts.append(
                f'warning: {head}: the first exit costs {share:.0%} of the MACs, {time_share:.0%} of the time of the '
                f'{what}; leaving there saves little. Take a lighter head, or put the first exit earlier.'
            )
    return '\n'.join(parts).rstrip()


def cost_parser() -> ScriptParser:
    """The flags of ``python -m timm_mlcsd.cost``."""
    parser = ScriptParser(prog='timm_mlcsd.cost', description='What the exits of a network will cost, head by head')
    parser.add_argument('model', help='multi-exit model, such as mlcsd_resnet50')
    parser.add_argument(
        '--exits',
        type=exits,
        help='number of exits, or comma-separated modules to tap (default: 8, or as many as there are blocks)',
    )
    parser.add_argument(
        '--exit-pool', choices=EXIT_POOLS, help=f'global pool at the end of an exit head (default: {DEFAULT_EXIT_POOL})'
    )
    parser.add_argument(
        '--input-size',
        type=image_side,
        nargs=3,
        metavar='N',
        help="channels, height and width of an image (default: the model's)",
    )
    parser.add_argument(
        '--small-input', action='store_true', help='take the first two downsamplings out, for images of about 32x32'
    )
    parser.add_argument(
        '--num-classes', type=integer(1, 10_000_000), default=1000, metavar='N', help='number of classes'
    )
    parser.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=KeyValues,
        metavar='KEY=VALUE',
        help='further arguments of the model (default: none)',
    )
    parser.add_argument('-b', '--batch-size', type=positive_int, default=1, metavar='N', help='images per timed batch')
    parser.add_argument('--repeats', type=positive_int, default=10, metavar='N', help='number of timed runs')
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of ``python -m timm_mlcsd.cost``."""

    def run():
        try:
            print(plan(cost_parser().parse_args(argv)))
        except ValueError as e:
            raise UserError(str(e)) from None

    run_script('timm_mlcsd.cost', run)


if __name__ == '__main__':
    main()
