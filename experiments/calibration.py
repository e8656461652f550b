#!/usr/bin/env python3
"""What calibration makes of a trained network: ways to find thresholds, scores, and answers, budget by budget.

    python experiments/calibration.py --checkpoint RUN/model_best.pth.tar --split test

takes validate.py's flags for checkpoint, data and device. Policies are fitted to the images that training held out; the
split is read once and chooses nothing. Budgets are shares of the plain backbone's multiply-adds.
"""

import time

import torch

from timm_mlcsd.adaptive import (
    AGGREGATES,
    METHODS,
    SCORES,
    budgeted_curve,
    calibrate,
    evaluate_policy,
    fit_temperatures,
    fit_weights,
)
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine.build import autocast_of, data_config_of, resolve_device
from timm_mlcsd.engine.calibration import Logits, backbone_macs, load_calibration
from timm_mlcsd.engine.config import parse_args
from timm_mlcsd.engine.evaluate import exit_logits
from timm_mlcsd.engine.flags import validate_parser
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.validate import data_flags_from, load_model, load_split
from timm_mlcsd.errors import run_script
from timm_mlcsd.report import format_table

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    args = parse_args(validate_parser())
    device = resolve_device(args)
    network = load_model(args)
    data_flags_from(args, network.checkpoint)
    config = data_config_of(args, network.model, network.checkpoint.get('data_config'))
    model = network.model.to(device)

    def read(dataset) -> Logits:
        loader = eval_loader(args, dataset, config, device)
        return Logits.of(exit_logits(model, loader, device, autocast_of(args, device)))

    val_set, val_name = load_calibration(args, network.checkpoint)
    test_set, test_name = load_split(args, network.checkpoint)
    val, test = read(val_set), read(test_set)
    costs = exit_costs(model, config['input_size'])
    plain = backbone_macs(costs)
    temperatures = fit_temperatures(*val)
    weights = fit_weights(*val, temperatures)
    print(
        f'{args.checkpoint}: fitted to {len(val.targets)} images of {val_name}, '
        f'tried on {len(test.targets)} of {test_name}'
    )
    last = [100 * (part.logits[-1].argmax(-1) == part.targets).double().mean().item() for part in (val, test)]
    print(f'last exit: {last[0]:.2f} fitted, {last[1]:.2f} test, at {1.0:.2f} with all other exits off')

    def table(title, choices, **common):
        rows = []
        for share in SHARES:
            row, pairs = [share], []
            for choice in choices:
                how = {**common, **choice}
                if how.get('aggregate') == 'fitted':
                    how['weights'] = weights
                policy = calibrate(*val, costs, budget=share * plain, temperatures=temperatures, **how)
                pairs.append([evaluate_policy(*part, costs, policy) for part in (val, test)])
            row += [fitted.accuracy for fitted, _ in pairs] + [tried.accuracy for _, tried in pairs]
            rows.append((*row, max(tried.cost for _, tried in pairs) / plain))
        names = ['/'.join(choice.values()) for choice in choices]
        heads = ('Budget', *(f'{n}, fitted' for n in names), *(f'{n}, test' for n in names), 'Most spent, test')
        print(f'\n{title}\n{format_table(heads, rows)}')

    table('Ways to find thresholds (confidence, last)', [dict(method=method) for method in METHODS])
    table('Scores (optimal, last)', [dict(score=score) for score in SCORES])
    table('Answers (optimal, confidence)', [dict(aggregate=aggregate) for aggregate in AGGREGATES])

    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        curve = budgeted_curve(val, test, costs)
        seconds.append(time.perf_counter() - start)
    shape = 'x'.join(map(str, test.logits.shape))
    print(f'\nMSDNet\'s sweep, {len(curve)} points, test logits {shape}: {sorted(seconds)[2]:.2f} s (median of 5)')
    made = torch.randn(8, 20_000, 100)
    labels = torch.randint(100, (20_000,))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        budgeted_curve((made[:, :10_000], labels[:10_000]), (made[:, 10_000:], labels[10_000:]), range(1, 9))
        seconds.append(time.perf_counter() - start)
    print(f'the same on made-up logits, 10,000 + 10,000 samples, 8 exits, 100 classes: {sorted(seconds)[2]:.2f} s')


if __name__ == '__main__':
    run_script('calibration.py', main)
