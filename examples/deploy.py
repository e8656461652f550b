"""Add exits to a network that already works, and export it to ONNX.

    python examples/deploy.py

A plain network is trained first. With heads_only its exits are trained and nothing else, so the last exit remains the
plain network. The policy, which decides at which exit an image stops, is fitted to the validation images. The exported
runner is compared with PyTorch on the test images.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from timm_mlcsd.adaptive import AdaptiveModel, calibrate
from timm_mlcsd.adaptive.export import export_stages
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine import Evaluator, TrainConfig, load_dataset, train
from timm_mlcsd.network import BEST, load_network
from timm_mlcsd.report import format_table


def main() -> None:
    """Train, calibrate, export and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('output/examples/deploy'), help='folder for all files')
    parser.add_argument('--epochs', type=int, default=5, help='number of epochs of each training')
    args = parser.parse_args()

    # the names are those of train.py's flags
    settings = dict(dataset='digits', val_split='validation', img_size=16, crop_pct=1.0, batch_size=32, workers=0)
    settings.update(model='mlcsd_resnet18', model_kwargs=dict(channels=[8, 16, 32, 64]), small_input=True)
    settings.update(opt='adamw', lr=5e-3, weight_decay=0.05, epochs=args.epochs, warmup_epochs=0, sched_on_updates=True)
    settings.update(smoothing=0.0, no_aug=True, seed=0, output=str(args.output / 'runs'), checkpoint_hist=1)
    plain_run = train(TrainConfig.from_dict(dict(settings, exits=1)))

    # the plain network, which is the last exit, teaches the others; conv1x1 is the cheapest kind of exit
    settings.update(exits=4, exit_head='conv1x1', distill='one-for-all', beta=0.0, heads_only=True)
    settings.update(initial_checkpoint=str(plain_run / BEST), lr=1e-2)
    config = TrainConfig.from_dict(settings)
    network = load_network(train(config))
    model, backbone = network.model, load_network(plain_run).model.backbone.state_dict()
    unchanged = all(torch.equal(tensor, backbone[name]) for name, tensor in model.backbone.state_dict().items())
    print(f'backbone unchanged: {"yes" if unchanged else "no"}')

    evaluator = Evaluator(model, network.data_config, config.data)
    val = evaluator.logits(load_dataset(config.data, 'validation'))
    costs = exit_costs(model, network.data_config['input_size'])
    # the cheapest policy that loses at most 5 points of accuracy on new images, with a confidence of 95%
    policy = calibrate(*val, costs, max_drop=5.0, temperatures='fit', exit_names=model.exit_names)
    policy = policy.for_weights(model, data='validation', images=len(val.targets))
    exported = args.output / 'exported'
    export_stages(model, policy, exported, data_config=network.data_config, class_names=network.class_names)

    # runner.py in that folder needs neither PyTorch nor timm; it prepares the images itself
    sys.path.insert(0, str(exported))
    from runner import AdaptiveModel as Runner

    test_images, runner = load_dataset(config.data, 'test'), Runner(exported)
    pictures, targets = zip(*test_images)
    onnx = runner.predict(np.concatenate([runner.prepare(picture) for picture in pictures]))
    adaptive, answers = AdaptiveModel(model, policy, costs), []
    for images, _ in evaluator.loader(test_images):
        answers.append((model(images), *adaptive.predict(images)))
    plain, logits, exit_index, macs = (torch.cat(parts).numpy(force=True) for parts in zip(*answers))

    plain_macs = np.array(sum(c.stage_macs for c in costs) + costs[-1].head_macs)
    rows = [('plain network', plain, plain_macs), ('PyTorch', logits, macs), ('runner.py', onnx.logits, onnx.cost)]
    rows = [(name, 100 * float((z.argmax(-1) == targets).mean()), float(cost.mean()) / 1e6) for name, z, cost in rows]
    print(format_table(['', 'Test top-1 %', 'Mean MMACs'], rows))
    print(f'images that stop at each exit: {np.bincount(exit_index, minlength=model.num_exits).tolist()}')
    same = (onnx.logits.argmax(-1) == logits.argmax(-1)) & (onnx.exit_index == exit_index)
    print(f'runner.py and PyTorch agree on class and exit of {same.sum()} of {len(same)} images')


if __name__ == '__main__':
    main()
