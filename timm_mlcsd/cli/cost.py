"""``mlcsd-cost``: the cost of every exit with each kind of head, before a training.

``mlcsd-cost mlcsd_resnet50 --exits 4 --input-size 3 224 224`` compares all heads.
"""

import argparse
import statistics
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch

from ..cost import exit_costs, exit_times
from ..errors import UserError, run_script
from ..models import DEFAULT_EXIT_POOL, EXIT_HEADS, EXIT_POOLS, MultiExitBackbone, MultiExitModel, create_model
from ..report import format_table
from .arguments import KeyValues, ScriptParser, exits, image_side, integer, positive_int

__all__ = ['compare_heads', 'cost_parser', 'main']

# an exit that costs more than this share of the whole backbone saves little
TOO_DEAR = 0.5
PLAIN = 'plain backbone'


class _LastOnly(MultiExitModel):
    """A network with its last exit only: the plain backbone of a network with built-in exits."""

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


def _networks(args: argparse.Namespace) -> Tuple[MultiExitModel, Dict[str, MultiExitModel]]:
    """The network that the flags name, and those to compare, by the name of their heads: the plain one comes first."""
    model_args = dict(num_classes=args.num_classes, small_input=args.small_input)
    if args.input_size:
        model_args['in_chans'] = args.input_size[0]
    model_args.update(args.model_kwargs)
    with_exits = dict(model_args, exits=args.exits, exit_pool=args.exit_pool)
    model = create_model(args.model, **with_exits)
    if not isinstance(model, MultiExitBackbone):
        return model, {PLAIN: _LastOnly(model), 'its own': model}
    plain = create_model(args.model, exits=1, **model_args)
    return model, {
        PLAIN: plain,
        **{head: create_model(args.model, exit_head=head, **with_exits) for head in EXIT_HEADS},
    }


def compare_heads(args: argparse.Namespace) -> str:
    """Compare all exit heads on one untrained network.

    Args:
        args: Flags of `cost_parser`.

    Returns:
        The report.
    """
    model, models = _networks(args)
    heads = [name for name in models if name != PLAIN]
    input_size = tuple(args.input_size or model.probe_size)
    costs = {head: exit_costs(m, input_size) for head, m in models.items()}
    # alternately, so that drifts of the machine's speed affect all alike
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
    """The flags of mlcsd-cost."""
    parser = ScriptParser(prog='mlcsd-cost', description='What the exits of a network will cost, head by head')
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
    """Entry point of mlcsd-cost and of ``python -m timm_mlcsd.cost``."""

    def run() -> None:
        try:
            print(compare_heads(cost_parser().parse_args(argv)))
        except ValueError as e:
            raise UserError(str(e)) from None

    run_script('mlcsd-cost', run)


if __name__ == '__main__':
    main()
