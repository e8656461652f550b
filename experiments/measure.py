"""Measure a finished run: ``python -m experiments.measure RUN OUT.json``, which reads the test split once."""

import argparse
import json
import math
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
from timm_mlcsd.losses import CWEM, TEACHERS, TeacherMixer

from .candidates import register

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

    def mixing_weights(self, split: str) -> Optional[torch.Tensor]:
        """Compute the mixing weights of the CWEM on the images of a split, [N, K, K]; None if the run has no CWEM."""
        state = self.checkpoint.get('task_state', {}).get('criterion', {})
        distill = self.checkpoint['args']['distill']
        if not issubclass(TEACHERS.get(distill, TeacherMixer), CWEM) or not state:
            return None
        criterion = MLCSDLoss(self.model.num_exits, self.model.exit_feature_dim, distill=distill)
        # the state of a distillation method does not affect the weights
        criterion.load_state_dict({name: t for name, t in state.items() if name in criterion.state_dict()})
        loader = self._evaluator.loader(self.dataset(split))
        return torch.cat(list(self._evaluator.mixing_weights(criterion.to(self._evaluator.device), loader)))


def weight_statistics(weights: torch.Tensor) -> Dict[str, float]:
    """Statistics of mixing weights: whether teachers differ between exits and images.

    Args:
        weights: Mixing weights, [N, K, K].

    Returns:
        ``rows``: mean distance (half the sum of absolute differences, 0 to 1) between the mean weights of two exits;
        ``rows_per_image``: the same between the weights of two exits on one image, averaged over the images;
        ``entropy``: mean entropy of an exit's weights divided by log K, 0 to 1; ``spread``: standard deviation of a
        weight over the images, averaged over the weights.
    """
    mean = weights.mean(dim=0)
    size = len(mean)
    first, second = torch.triu_indices(size, size, offset=1)
    per_image = (weights[:, first] - weights[:, second]).abs().sum(dim=-1) / 2
    entropy = torch.special.entr(weights).sum(dim=-1) / math.log(size)
    return dict(
        rows=float((mean[first] - mean[second]).abs().sum(dim=-1).mean() / 2),
        rows_per_image=float(per_image.mean()),
        entropy=float(entropy.mean()),
        spread=float(weights.std(dim=0).mean()),
    )


def measure(run: Path, device: Optional[str] = None, test_split: str = 'test') -> Dict[str, Any]:
    """Evaluate the best epoch of a run on the validation images and on the test split.

    Args:
        run: Folder of the run.
        device: Device, as for validate.py; default: its default.
        test_split: Split that takes the place of the test split.

    Returns:
        ``epoch``; ``validation`` and ``test``: accuracy per exit in percent; ``rescued``: percentage of images that
        are right at an exit and wrong at the last one (overthinking; paper, Table 1); ``macs``, ``params`` and
        ``depth`` per exit; ``curve``: 39 pairs of mean multiply-adds and test accuracy, with thresholds fitted to the
        validation images; ``weights``: mean mixing weights of the CWEM on the test split (Table 15), and
        ``weight_statistics``, if there is one.
    """
    evaluator = RunEvaluator(run, device)
    val, test = evaluator.logits('validation'), evaluator.logits(test_split)
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
    weights = evaluator.mixing_weights(test_split)
    if weights is not None:
        record.update(weights=weights.mean(dim=0).tolist(), weight_statistics=weight_statistics(weights))
    return record


def main() -> None:
    """Measure a run and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('run', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--device')
    parser.add_argument('--test-split', default='test', metavar='NAME')
    args = parser.parse_args()
    register()
    record = measure(args.run, args.device, args.test_split)
    with atomic_write(args.out) as temporary:
        temporary.write_text(json.dumps(record))


if __name__ == '__main__':
    run_script('experiments.measure', main)
