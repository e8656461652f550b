"""What a finished run is worth: ``python -m experiments.measure RUN OUT.json``, which reads the test split once."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional

import torch

from timm_mlcsd.adaptive import budgeted_curve
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine.build import autocast_of, data_config_of, resolve_device
from timm_mlcsd.engine.calibration import Logits
from timm_mlcsd.engine.datasets import load_dataset
from timm_mlcsd.engine.evaluate import evaluate, exit_logits
from timm_mlcsd.engine.flags import validate_parser
from timm_mlcsd.engine.held_out import held_out
from timm_mlcsd.engine.loaders import eval_loader
from timm_mlcsd.engine.validate import data_flags_from
from timm_mlcsd.errors import run_script
from timm_mlcsd.files import replacing
from timm_mlcsd.network import load_network

from .mixing_weights import mixing_weights

BATCH_SIZE = 250


class Reader:
    """A run's best epoch and the images it knows, in float32.

    Attributes:
        model: The network.
        checkpoint: What it comes from.
        input_size: Of its images, (C, H, W).
    """

    def __init__(self, run: Path, device: Optional[str] = None):
        self._args = validate_parser().parse_args(['--checkpoint', str(run / 'model_best.pth.tar'), '--workers', '0'])
        self._args.data_dir, self._args.batch_size = None, BATCH_SIZE
        self._args.device = device
        self._device = resolve_device(self._args)
        network = load_network(self._args.checkpoint)
        self.model, self.checkpoint = network.model.to(self._device), network.checkpoint
        data_flags_from(self._args, self.checkpoint)
        self._args.in_chans = self._args.in_chans or self.model.in_chans
        self._data_config = data_config_of(self._args, self.model, self.checkpoint['data_config'])
        self.input_size = self._data_config['input_size']

    def loader(self, split: str) -> Any:
        """The images of a split, or with ``validation`` those that chose the epoch."""
        args, checkpoint = self._args, self.checkpoint
        if split != 'validation':
            dataset = load_dataset(args, split)
        elif 'val_indices' in checkpoint:
            dataset = held_out(args, checkpoint)[0]
        else:
            dataset = load_dataset(args, checkpoint['val_split'])
        return eval_loader(args, dataset, self._data_config, self._device)

    @torch.no_grad()
    def logits(self, loader: Any) -> Logits:
        """What the exits answer, with the targets."""
        return Logits.of(exit_logits(self.model, loader, self._device, autocast_of(self._args, self._device)))


def measure(run: Path, device: Optional[str] = None) -> Dict[str, Any]:
    """Evaluate a run's best epoch on the images that chose it and on the test split.

    Returns:
        ``epoch``; ``validation`` and ``test``: accuracy per exit in %; ``rescued``: share right at an exit and wrong at
        the last (paper, Table 1); ``macs``, ``params``, ``depth`` per exit; ``curve``: 39 times (mean multiply-adds,
        test accuracy), thresholds fitted to the validation images; ``weights``: the CWEM's, averaged over the test
        split (Table 15), where there is one.
    """
    reader = Reader(run, device)
    loader = reader.loader('test')
    val, test = reader.logits(reader.loader('validation')), reader.logits(loader)
    results = [evaluate(zip(z.logits.split(1024, dim=1), z.targets.split(1024))) for z in (val, test)]
    record: Dict[str, Any] = dict(
        epoch=reader.checkpoint['epoch'],
        validation=[e.top1 for e in results[0].exits],
        test=[e.top1 for e in results[1].exits],
        rescued=[e.rescued for e in results[1].exits],
    )
    costs = exit_costs(reader.model, reader.input_size)
    record.update({name: [getattr(c, name) for c in costs] for name in ('macs', 'params', 'depth')})
    if reader.model.num_exits > 1:
        record['curve'] = [(p.test.cost, p.test.accuracy) for p in budgeted_curve(val, test, costs)]
    weights = mixing_weights(reader.model, reader.checkpoint, loader)
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
