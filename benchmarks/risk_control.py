#!/usr/bin/env python3
"""Risk control on fresh samples: how often a certified limit is exceeded, and what the certificate costs.

Draws calibration sets, calibrates a policy to each, and measures its true risk and cost on a large set. The logits are
simulated (8 exits, 10 classes, difficulty that varies between samples, noise that is independent between the exits or
correlated), or taken from a file of real logits, of which each draw calibrates on a part and measures on the rest.

    python benchmarks/risk_control.py --draws 500
    python benchmarks/risk_control.py --draws 500 --logits logits.pt --images 1000
"""

import argparse
import math
import statistics
from typing import Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from timm_mlcsd.adaptive import RISKS, ExitPolicy, calibrate
from timm_mlcsd.adaptive.evaluate import CachedLogits
from timm_mlcsd.adaptive.methods import last_exit_alone, policy_path
from timm_mlcsd.adaptive.samples import FitSamples
from timm_mlcsd.cli.arguments import positive_int, seed
from timm_mlcsd.report import format_table

NUM_EXITS, NUM_CLASSES = 8, 10
NUM_TRUE = 50_000
# the oracle is about the same for every draw
ORACLE_DRAWS = 10
# in points, per risk: something that 240 images can certify
LIMITS = {'drop': 3.0, 'selective': 5.0, 'disagreement': 3.0}
Data = Tuple[torch.Tensor, torch.Tensor]


class Draw(NamedTuple):
    """A policy on the large set.

    Attributes:
        risk: True risk in points.
        cost: Mean cost, as a share of the last exit's.
        oracle: Lowest cost of a policy of exit rates whose true risk is within the limit; NaN if it was not computed.
        certified: Whether a policy was certified.
    """

    risk: float
    cost: float
    oracle: float
    certified: bool


def simulated(num_samples: int, correlation: float, seed: int) -> Data:
    """Logits [K, N, C] and labels of exits whose noise is correlated."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(NUM_CLASSES, (num_samples,), generator=generator)
    shared = torch.randn(num_samples, NUM_CLASSES, generator=generator)
    logits = torch.randn(NUM_EXITS, num_samples, NUM_CLASSES, generator=generator)
    logits = math.sqrt(1 - correlation) * logits + math.sqrt(correlation) * shared
    ease = 0.8 * torch.randn(num_samples, generator=generator)
    for k in range(NUM_EXITS):
        logits[k, torch.arange(num_samples), targets] += 1.2 + 0.35 * k + ease
    return 1.5 * logits, targets


def draws(args: argparse.Namespace, num_images: int, correlation: float) -> Iterator[Tuple[Data, Data]]:
    """Pairs of calibration data and data for the true risk."""
    if args.logits is None:
        truth = simulated(NUM_TRUE, correlation, args.seed + 10**6)
        for draw in range(args.draws):
            yield simulated(num_images, correlation, args.seed + draw), truth
        return
    stored = torch.load(args.logits, weights_only=True)
    logits, targets = stored['logits'].float(), stored['targets']
    for draw in range(args.draws):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(args.seed + draw))
        ours, rest = order[:num_images], order[num_images:]
        yield (logits[:, ours], targets[ours]), (logits[:, rest], targets[rest])


def true_risk(truth: FitSamples, policy: ExitPolicy, risk: str) -> float:
    """Risk on the large set, in points."""
    exits, correct = truth.leave(policy)
    _, whole = truth.leave(last_exit_alone(policy))
    if risk == 'drop':
        return 100 * float(whole.mean() - correct.mean())
    if risk == 'disagreement':  # there, the last exit's answers are the labels
        return 100 * float(1 - correct.mean())
    early = exits < policy.num_exits - 1
    return 100 * float((~correct[early]).mean()) if early.any() else 0.0


def measure(
    data: Data,
    truth: FitSamples,
    risk: str,
    limit: float,
    confidence: Optional[float],
    method: str,
    with_oracle: bool,
) -> Draw:
    """Calibrate a policy and measure it."""
    num_exits = len(data[0])
    costs = np.arange(1.0, num_exits + 1)
    template = last_exit_alone(ExitPolicy((0.0,) * (num_exits - 1)))
    try:
        policy = calibrate(*data, costs.tolist(), max_drop=limit, confidence=confidence, risk=risk, method=method)
        certified = True
    except ValueError:
        policy, certified = template, False
    oracle = math.nan
    if with_oracle:
        path = policy_path(FitSamples(CachedLogits(*data)), costs.tolist(), template, 'exit_rates')
        allowed = [p for p in path if true_risk(truth, p, risk) <= limit]
        oracle = min(truth.evaluate(p, costs.tolist()).cost for p in allowed)
    cost = truth.evaluate(policy, costs.tolist()).cost
    return Draw(true_risk(truth, policy, risk), cost / costs[-1], oracle / costs[-1], certified)


def row(name: str, found: List[Draw], limit: float) -> Tuple:
    """Row of the table."""
    exceeded = sum(d.risk > limit + 1e-9 for d in found) / len(found)
    error = math.sqrt(0.05 * 0.95 / len(found))
    return (
        name,
        100 * exceeded,
        100 * (0.05 + 2 * error),
        statistics.mean(d.risk for d in found),
        100 * statistics.mean(1 - d.cost for d in found),
        100 * statistics.mean(1 - d.oracle for d in found if not math.isnan(d.oracle)),
        100 * sum(d.certified for d in found) / len(found),
    )


def main() -> None:
    """Print one table per risk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--draws', type=positive_int, default=500, help='calibration sets per row')
    parser.add_argument('--images', type=positive_int, nargs='+', default=[240, 1000, 5000], help='images per set')
    parser.add_argument('--risks', nargs='+', choices=RISKS, default=RISKS)
    parser.add_argument('--confidence', type=float, default=0.95)
    parser.add_argument('--methods', nargs='+', default=['auto'], help='methods of calibrate')
    parser.add_argument('--without', action='store_true', help='also calibrate to the drop without a certificate')
    parser.add_argument('--limit', type=float, help='largest risk in points (default: one for each risk)')
    parser.add_argument('--logits', metavar='FILE', help='file of torch.save with logits [K, N, C] and targets [N]')
    parser.add_argument('--seed', type=seed, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    headers = ('Set', 'Exceeded %', 'Allowed %', 'True risk', 'Cost saved %', 'Oracle saves %', 'Certified %')
    for risk in args.risks:
        limit, rows = args.limit or LIMITS[risk], []
        for correlation in (0.0, 0.95) if args.logits is None else (0.0,):
            for num_images in args.images:
                kinds = [(method, args.confidence) for method in args.methods]
                kinds += [('optimal', None)] * (args.without and risk == 'drop')
                found: List[List[Draw]] = [[] for _ in kinds]
                truth: Optional[FitSamples] = None
                for data, rest in draws(args, num_images, correlation):
                    if truth is None or args.logits is not None:
                        labels = rest[0][-1].argmax(-1) if risk == 'disagreement' else rest[1]
                        truth = FitSamples(CachedLogits(rest[0], labels))
                    for results, (method, confidence) in zip(found, kinds):
                        results.append(
                            measure(data, truth, risk, limit, confidence, method, len(results) < ORACLE_DRAWS)
                        )
                for results, (method, confidence) in zip(found, kinds):
                    kind = method if confidence else f'{method}, not certified'
                    name = f'{num_images} images, correlation {correlation}' if args.logits is None else f'{num_images}'
                    rows.append(row(f'{name}, {kind}', results, limit))
                    print('.', end='', flush=True)
        print(f'\n{risk}, limit {limit:g} points, confidence {args.confidence:g}, {args.draws} draws')
        print(format_table(headers, rows))


if __name__ == '__main__':
    main()
