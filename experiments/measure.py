"""Measure a finished run: ``python -m experiments.measure RUN OUT.json``, which reads the test split once."""

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
    """Evaluates the best epoch of a run on the data of that run, in float32.

    Args:
        run: Folder of the run.
        device: Device, as for validate.py; default: its default.

    Attributes:
        model: Network of the best epoch.
        checkpoint: Content of its checkpoint.
        input_size: Size of the images, (C, H, W).
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
        """Load a split.

        Args:
            split: Name of the split; ``validation`` for the images on which the best epoch was chosen.
        """
        if split != 'validation':
            return load_dataset(self._data, split)
        if 'val_indices' in self.checkpoint:
            return held_out(self._data, self.checkpoint)[0]
        return load_dataset(self._data, self.checkpoint['val_split'])

    def logits(self, split: str) -> LabelledLogits:
        """Compute the logits of all exits on a split; see `dataset` for `split`."""
        return self._evaluator.logits(self.dataset(split))

    def mean_mixing_weights(self, split: str) -> Optional[torch.Tensor]:
        """Compute the mean mixing weights of the CWEM on a split, [K, K]; None if the run has no CWEM."""
        state = self.checkpoint.get('task_state', {}).get('criterion', {})
        if self.checkpoint['args']['distill'] != 'all-for-all' or not state:
            return None
        criterion = MLCSDLoss(self.model.num_exits, self.model.exit_feature_dim).to(self._evaluator.device)
        # the state of a distillation method does not affect the weights
        criterion.load_state_dict({name: t for name, t in state.items() if name in criterion.state_dict()})
        return self._evaluator.mean_mixing_weights(criterion, self._evaluator.loader(self.dataset(split)))


def measure(run: Path, device: Optional[str] = None) -> Dict[str, Any]:
    """Evaluate the best epoch of a run on the validation images and on the test split.

    Args:
        run: Folder of the run.
        device: Device, as for validate.py; default: its default.

    Returns:
        ``epoch``; ``validation`` and ``test``: accuracy per exit in percent; ``rescued``: percentage of images that
        are right at an exit and wrong at the last one (overthinking; paper, Table 1); ``macs``, ``params`` and
        ``depth`` per exit; ``curve``: 39 pairs of mean multiply-adds and test accuracy, with thresholds fitted to the
        validation images; ``weights``: mean mixing weights of the CWEM on the test split (Table 15), if there is one.
    """
    evaluator = RunEvaluator(run, device)
    val, test = evaluator.logits('validation'), evaluator.logits('test')
    results = [logits.evaluate() for logits in (val, test)]
    record: Dict[str, Any] = dict(
        epoch=evaluator.checkpoint['epoch'],
        validation=[e.top1 for e in results[0].exits],
        test=[e.top1 for e in results[1].exits],
        rescued=[e.overthinking for e in results[1].exits],
    )
    costs = exit_costs(evaluator.model, evaluator.input_size)
    record.update({name: [getattr(c, name) for c in costs] for name in ('macs', 'params', 'depth')})
    if evaluator.model.num_exits > 1:
        record['curve'] = [(p.test.cost, p.test.accuracy) for p in budgeted_curve(val, test, costs)]
    weights = evaluator.mean_mixing_weights('test')
    return record if weights is None else dict(record, weights=weights.tolist())


def main() -> None:
    """Measure a run and write the result as JSON."""
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
