#!/usr/bin/env python3
"""Measure by how much `AdaptiveModel.predict_anytime` exceeds random deadlines, against the time of a stage.

No exit is ever sure here, so only the deadline ends a call. The logits must be those of the deepest exit that ran.

    python benchmarks/deadlines.py --model mlcsd_resnet18 --small-input --input-size 3 32 32 --exits 8
    python benchmarks/deadlines.py --model mlcsd_resnet50 --input-size 3 224 224 --exits 8 --calls 1000
"""

import argparse
import random
import time

import timm
import torch

import timm_mlcsd  # noqa: F401
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy
from timm_mlcsd.cli.arguments import positive_int
from timm_mlcsd.cost import stage_times
from timm_mlcsd.report import format_table


def quantile(values, q):
    """Quantile q (0 to 1) of a list of numbers, without interpolation."""
    return sorted(values)[int(q * (len(values) - 1))]


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='mlcsd_resnet18')
    parser.add_argument('--exits', type=positive_int, default=8)
    parser.add_argument('--input-size', type=positive_int, nargs=3, default=(3, 32, 32))
    parser.add_argument('--small-input', action='store_true')
    parser.add_argument('--calls', type=positive_int, default=1000)
    parser.add_argument('--batch-size', type=positive_int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    model = timm.create_model(args.model, exits=args.exits, small_input=args.small_input).eval()
    images = torch.randn(args.batch_size, *args.input_size)
    adaptive = AdaptiveModel(model, ExitPolicy([2.0] * (model.num_exits - 1)), range(model.num_exits))
    exits = model.forward_exits(images).logits
    for _ in range(3):
        adaptive.predict_anytime(images, 60.0)
    times = stage_times(model, images, repeats=50)
    stages = [t.stage_ms + t.head_ms for t in times]
    late, deepest, wrong = [], [0] * model.num_exits, 0
    for _ in range(args.calls):
        deadline = random.uniform(stages[0], 1.1 * sum(stages)) / 1000
        start = time.perf_counter()
        logits, exit_index, _ = adaptive.predict_anytime(images, deadline)
        late.append(1000 * (time.perf_counter() - start - deadline))
        k = exit_index[0].item()
        deepest[k] += 1
        wrong += not torch.equal(logits, exits[k])
    rows = [(f'Ex{k + 1}', stage, count) for k, (stage, count) in enumerate(zip(stages, deepest))]
    print(f'{args.model}, batch of {args.batch_size}, {args.calls} calls, deadlines from the first exit to 1.1 of all')
    print(format_table(('Exit', 'Stage and head, ms', 'Answered'), rows))
    p50, p99, worst = (quantile(late, q) for q in (0.5, 0.99, 1.0))
    print(
        f'beyond the deadline: median {p50:.2f} ms, p99 {p99:.2f} ms, worst {worst:.2f} ms; p99 over the longest stage '
        f'{p99 / max(stages):.2f}, over the mean stage {p99 * len(stages) / sum(stages):.2f}; answers of another exit '
        f'than the deepest that ran: {wrong}'
    )


if __name__ == '__main__':
    main()
