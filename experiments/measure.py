"""What a finished run is worth: ``python -m experiments.measure RUN OUT.json``, which reads the test split once."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch.utils.data import Dataset

from timm_mlcsd import MLCSDLoss
from timm_mlcsd.adaptive import budgeted_curve
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.engine.data_config import DataConfig
from timm_mlcsd.engine.datasets import load_dataset
from timm_mlcsd.engine.device import DeviceConfig
from timm_mlcsd.engine.evaluator import Evaluator, LabelledLogits
from timm_mlcsd.engine.held_out import held_out
from timm_mlcsd.engine.validate_config import ValidateConfig
from timm_mlcsd.engine.validation import load_model, with_trained_data
from timm_mlcsd.errors import run_script
from timm_mlcsd.files import atomic_write

BATCH_SIZE = 250


class RunEvaluator:
    """Evaluates the best epoch of a run on the images of that run, in float32.

    Attributes:
        model: The network.
        checkpoint: The checkpoint that it comes from.
        input_size: (C, H, W) of the images.
    """

    def __init__(self, run: Path, device: Optional[str] = None):
        config = ValidateConfig(
            checkpoint=str(run / 'model_best.pth.tar'),
            data=DataConfig(batch_size=BATCH_SIZE, workers=0),
            device=DeviceConfig(device=device),
        )
        network = load_model(config)
        config, data_config = with_trained_data(config, network)
        self.model, self.checkpoint = network.model, network.checkpoint
        self.input_size = data_config['input_size']
        self._data = config.data
        self._evaluator = Evaluator(self.model, data_config, config.data, config.device)

    def dataset(self, split: str) -> Dataset:
        """The images of a split, or with ``validation`` those that chose the epoch."""
        if split != 'validation':
            return load_dataset(self._data, split)
        if 'val_indices' in self.checkpoint:
            return held_out(self._data, self.checkpoint)[0]
        return load_dataset(self._data, self.checkpoint['val_split'])

    def logits(self, split: str) -> LabelledLogits:
        """The logits of all exits on a split, with the targets."""
        return self._evaluator.logits(self.dataset(split))

    def mean_mixing_weights(self, split: str) -> Optional[torch.Tensor]:
        """The CWEM's mean weights on a split, [K, K]; None where there is no CWEM."""
        state = self.checkpoint.get('task_state', {}).get('criterion', {})
        if self.checkpoint['args']['distill'] != 'all-for-all' or not state:
            return None
        criterion = MLCSDLoss(self.model.num_exits, self.model.exit_feature_dim).to(self._evaluator.device)
        # the state of a distillation method does not affect the weights
        criterion.load_state_dict({name: t for name, t in state.items() if name in criterion.state_dict()})
        return self._evaluator.mean_mixing_weights(criterion, self._evaluator.loader(self.dataset(split)))


def measure(run: Path, device: Optional[str] = None) -> Dict[str, Any]:
    """Evaluate a run's best epoch on the images that chose it and on the test split.

    Returns:
        ``epoch``; ``validation`` and ``test``: accuracy per exit in %; ``rescued``: share right at an exit and wrong at
        the last (paper, Table 1); ``macs``, ``params``, ``depth`` per exit; ``curve``: 39 times (mean multiply-adds,
        test accuracy), thresholds fitted to the validation images; ``weights``: the CWEM's, averaged over the test
        split (Table 15), where there is one.
    """
    evaluator = RunEvaluator(run, device)
    val, test = evaluator.logits('validation'), evaluator.logits('test')
    results = [logits.evaluate() for logits in (val, test)]
    record: Dict[str, Any] = dict(
        epoch=evaluator.checkpoint['epoch'],
        validation=[e.top1 for e in results[0].exits],
        test=[e.top1 for e in results[1].exits],
        rescued=[e.rescued for e in results[1].exits],
    )
    costs = exit_costs(evaluator.model, evaluator.input_size)
    record.update({name: [getattr(c, name) for c in costs] for name in ('macs', 'params', 'depth')})
    if evaluator.model.num_exits > 1:
        record['curve'] = [(p.test.cost, p.test.accuracy) for p in budgeted_curve(val, test, costs)]
    weights = evaluator.mean_mixing_weights('test')
    return record if weights is None else dict(record, weights=weights.tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--device')
    args = parser.parse_args()
    record = measure(args.run, args.device)
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(record))


if __name__ == '__main__':
    run_script('experiments.measure', main)
