"""Compare the scores and calibration methods of exit policies at a few budgets.

    python examples/compare_policies.py

Every policy is fitted to the validation images at a mean budget of multiply-adds. The test images are read once.
"""

import argparse
import math
from pathlib import Path

from timm_mlcsd.adaptive import SCORES, THRESHOLD_METHODS, ExitPolicy, calibrate, evaluate_policy, fit_temperatures
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine import Evaluator, TrainConfig, load_dataset, train
from timm_mlcsd.network import load_network
from timm_mlcsd.report import format_table


def main() -> None:
    """Train the network and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('output/examples/policies'), help='folder for the run')
    parser.add_argument('--epochs', type=int, default=5, help='number of epochs')
    args = parser.parse_args()

    # the names are those of train.py's flags; conv1x1 is the cheapest kind of exit
    settings = dict(dataset='digits', val_split='validation', img_size=16, crop_pct=1.0, batch_size=32, workers=0)
    settings.update(model='mlcsd_resnet18', model_kwargs=dict(channels=[8, 16, 32, 64]), small_input=True)
    settings.update(exits=4, exit_head='conv1x1', alpha=1.0, beta=1.0, smoothing=0.0, no_aug=True)
    settings.update(opt='adamw', lr=5e-3, weight_decay=0.05, epochs=args.epochs, warmup_epochs=0, sched_on_updates=True)
    settings.update(seed=0, output=str(args.output), checkpoint_hist=1)
    config = TrainConfig.from_dict(settings)
    network = load_network(train(config))

    evaluator = Evaluator(network.model, network.data_config, config.data)
    val = evaluator.logits(load_dataset(config.data, 'validation'))
    test = evaluator.logits(load_dataset(config.data, 'test'))
    costs = exit_costs(network.model, network.data_config['input_size'])
    temperatures = fit_temperatures(*val)  # one per exit; confidence, entropy and margin depend on them

    # without a policy, all images stop at one exit, and the heads before it do not run
    print('all images at one exit')
    rows, num_exits = [], network.model.num_exits
    for k, name in enumerate(network.model.exit_names):
        thresholds = [0.0 if j == k else math.inf for j in range(num_exits - 1)]
        results = [evaluate_policy(*data, costs, ExitPolicy(thresholds)) for data in (val, test)]
        rows.append((name, *(result.accuracy for result in results), results[0].cost / 1e6))
    print(format_table(['Exit', 'Validation %', 'Test %', 'MMACs'], rows))

    for share in (0.1, 0.2, 0.4):
        budget = costs[0].macs + share * (costs[-1].macs - costs[0].macs)  # between the first exit and the last
        rows = []
        for score in SCORES:
            for method in THRESHOLD_METHODS:
                policy = calibrate(*val, costs, budget=budget, method=method, score=score, temperatures=temperatures)
                results = [evaluate_policy(*data, costs, policy) for data in (val, test)]
                rows.append((score, method, *(r.accuracy for r in results), *(r.cost / 1e6 for r in results)))
        # the test images have no part in this choice
        best = max(rows, key=lambda row: (row[2], -row[4]))
        print(f'\nbudget {budget / 1e6:.2f} MMACs')
        print(format_table(['Score', 'Method', 'Validation %', 'Test %', 'Validation MMACs', 'Test MMACs'], rows))
        print(f'best on the validation images: {best[0]}, {best[1]}; test {best[3]:.2f}% at {best[5]:.2f} MMACs')


if __name__ == '__main__':
    main()
