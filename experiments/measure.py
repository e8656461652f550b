"""What a finished run is worth: ``python -m experiments.measure RUN OUT.json``, which reads the test split once."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch

from timm_mlcsd.adaptive import budgeted_curve
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine.build import autocast_of, data_config_of, resolve_device
from timm_mlcsd.engine.calibration import Logits
from timm_mlcsd.engine.datasets import held_out, load_dataset
from timm_mlcsd.engine.evaluate import evaluate, exit_logits
from timm_mlcsd.engine.flags import validate_parser
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.validate import data_flags_from
from timm_mlcsd.errors import run_script
from timm_mlcsd.files import replacing
from timm_mlcsd.network import load_network

from .mixing_weights import mixing_weights

BATCH_SIZE = 250


@torch.no_grad()
def measure(run: Path, device: Optional[str] = None) -> Dict[str, Any]:
    """Evaluate a run's best epoch on the images that chose it and on the test split, in float32.

    Returns:
        ``epoch``; ``validation`` and ``test``: accuracy per exit in %; ``rescued``: share right at an exit and wrong at
        the last (paper, Table 1); ``macs``, ``params``, ``depth`` per exit; ``curve``: 39 times (mean multiply-adds,
        test accuracy), thresholds fitted to the validation images; ``weights``: the CWEM's, averaged over the test
        split (Table 15), where there is one.
    """
    args = validate_parser().parse_args(['--checkpoint', str(run / 'model_best.pth.tar'), '--workers', '0'])
    args.data_dir, args.batch_size = None, BATCH_SIZE
    args.device = device
    device = resolve_device(args)
    network = load_network(args.checkpoint)
    model, checkpoint = network.model.to(device), network.checkpoint
    data_flags_from(args, checkpoint)
    args.in_chans = args.in_chans or model.in_chans
    data_config = data_config_of(args, model, checkpoint['data_config'])

    def logits_of(dataset: Any) -> Tuple[Logits, Any]:
        loader = eval_loader(args, dataset, data_config, device)
        return Logits.of(exit_logits(model, loader, device, autocast_of(args, device))), loader

    chosen_by = (
        held_out(args, checkpoint)[0] if 'val_indices' in checkpoint else load_dataset(args, checkpoint['val_split'])
    )
    val, _ = logits_of(chosen_by)
    test, loader = logits_of(load_dataset(args, 'test'))
    results = [evaluate(zip(z.logits.split(1024, dim=1), z.targets.split(1024))) for z in (val, test)]
    record: Dict[str, Any] = dict(
        epoch=checkpoint['epoch'],
        validation=[e.top1 for e in results[0].exits],
        test=[e.top1 for e in results[1].exits],
        rescued=[e.rescued for e in results[1].exits],
    )
    costs = exit_costs(model, data_config['input_size'])
    record.update({name: [getattr(c, name) for c in costs] for name in ('macs', 'params', 'depth')})
    if model.num_exits > 1:
        record['curve'] = [(p.test.cost, p.test.accuracy) for p in budgeted_curve(val, test, costs)]
    weights = mixing_weights(model, checkpoint, loader)
    return record if weights is None else dict(record, weights=weights.mean(dim=0).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--device')
    args = parser.parse_args()
    record = measure(args.run, args.device)
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps(record))


if __name__ == '__main__':
    run_script('experiments.measure', main)
