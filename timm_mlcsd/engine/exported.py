"""Exported stages beside the network that they were made of, on the same images."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Tuple, Union

import torch

from ..adaptive import AdaptiveModel, ExitPolicy, ExportedModel, Prediction
from ..adaptive.exported import read_manifest
from ..cost import exit_costs
from ..errors import UserError, as_user_error, install_hint
from ..models import weights_digest
from ..report import format_table
from .evaluator import NO_IMAGES, Evaluator

__all__ = ['ExportComparison', 'ExportedStages', 'compare_exported', 'load_exported']

# preprocessing that must be the same, so that both get the same images
_PREPROCESSING = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


@dataclass
class ExportComparison:
    """Exported stages and the network under the exported policy; pairs are of the two in this order.

    Attributes:
        num_images: Number of images.
        top1: Accuracies in percent.
        macs: Mean multiply-adds per image.
        images_per_second: Throughput.
        other_labels: Number of images with different labels.
        other_exits: Number of images with different exits.
        largest_difference: Largest absolute difference of logits, over the images with the same exit.
    """

    num_images: int = 0
    top1: Tuple[float, float] = (0.0, 0.0)
    macs: Tuple[float, float] = (0.0, 0.0)
    images_per_second: Tuple[float, float] = (0.0, 0.0)
    other_labels: int = 0
    other_exits: int = 0
    largest_difference: float = 0.0

    def describe(self) -> str:
        """The comparison as a table, and a line on the differences."""
        rows = [
            ('Top-1 %', *self.top1),
            ('MMACs', *(macs / 1e6 for macs in self.macs)),
            ('Images/s', *self.images_per_second),
        ]
        return (
            f'{format_table(("", "Exported", "Checkpoint"), rows)}\n'
            f'(of {self.num_images} images, {self.other_labels} have another label and {self.other_exits} another '
            f'exit; logits differ by at most {self.largest_difference:.2g})'
        )


class ExportedStages(NamedTuple):
    """Exported stages and the network, both under the policy of the export.

    Attributes:
        run: Function from images to answers of the exported stages.
        network: The network.
    """

    run: Callable[[torch.Tensor], Prediction]
    network: AdaptiveModel


def load_exported(folder: Union[str, Path], evaluator: Evaluator, trusted: bool = False) -> ExportedStages:
    """Load exported stages to compare with a network.

    Args:
        folder: Folder that `export_stages` wrote, for ONNX Runtime or PyTorch. Code in the folder is not run.
        evaluator: Evaluator of the network.
        trusted: Whether the author of the folder is trusted, which PyTorch's exported programs need.

    Returns:
        The stages, beside the network.

    Raises:
        UserError: The folder holds no stages of this network, or cannot be used.
    """
    with as_user_error(f'--exported {str(folder)!r} cannot be used'):
        manifest = read_manifest(folder)
        _check_same_network(manifest, evaluator)
        run, policy = _load(folder, manifest, evaluator, trusted)
        network = AdaptiveModel(
            evaluator.model, policy, exit_costs(evaluator.model, evaluator.data_config['input_size'])
        )
        return ExportedStages(run, network)


def compare_exported(stages: ExportedStages, evaluator: Evaluator, loader: Iterable[Any]) -> ExportComparison:
    """Run exported stages and the network on the same batches, in turn.

    Args:
        stages: The stages, beside the network.
        evaluator: Evaluator of the network.
        loader: Batches of (images, class indices).

    Returns:
        Accuracies, costs and differences.

    Raises:
        UserError: There are no images.
    """
    found, seconds, right, macs = ExportComparison(), [0.0, 0.0], [0, 0], [0.0, 0.0]
    runs: List[Callable[[torch.Tensor], Prediction]] = [stages.run, stages.network.predict]
    for images, target in loader:
        images = evaluator.prepared(images)
        answers = []
        for k, predict in enumerate(runs):
            if not found.num_images:
                predict(images)  # setting up isn't timed
            start = time.perf_counter()
            prediction = Prediction(*(value.cpu() for value in predict(images)))
            seconds[k] += time.perf_counter() - start
            right[k] += int((prediction.logits.argmax(-1) == target.cpu()).sum())
            macs[k] += float(prediction.cost.sum())
            answers.append(prediction)
        a, b = answers
        same = a.exit_index == b.exit_index
        found.num_images += len(target)
        found.other_exits += int((~same).sum())
        found.other_labels += int((a.logits.argmax(-1) != b.logits.argmax(-1)).sum())
        if same.any():
            difference = (a.logits[same].float() - b.logits[same].float()).abs().max().item()
            found.largest_difference = max(found.largest_difference, difference)
    count = found.num_images
    if not count:
        raise UserError(NO_IMAGES)
    found.top1 = 100 * right[0] / count, 100 * right[1] / count
    found.macs = macs[0] / count, macs[1] / count
    found.images_per_second = count / seconds[0], count / seconds[1]
    return found


def _check_same_network(manifest: Dict[str, Any], evaluator: Evaluator) -> None:
    """Raise a ValueError if stages were exported from another network, or read images in another way."""
    ours, theirs = evaluator.data_config, manifest['data_config']
    for key in _PREPROCESSING:
        a, b = (tuple(v) if isinstance(v, (list, tuple)) else v for v in (ours.get(key), theirs.get(key)))
        if a != b:
            raise ValueError(f'its {key} is {b}, here {key} is {a}; evaluate with the same, or export again.')
    # folders of earlier versions have no digest
    if manifest.get('weights_digest') not in (None, weights_digest(evaluator.model)):
        raise ValueError('it was exported from other weights; name that checkpoint, or export this one.')


def _load(
    folder: Union[str, Path], manifest: Dict[str, Any], evaluator: Evaluator, trusted: bool
) -> Tuple[Callable[[torch.Tensor], Prediction], ExitPolicy]:
    """Function that runs the exported stages on a batch, and their policy."""
    policy = ExitPolicy.from_dict(manifest['policy']).without_digest()
    if manifest['kind'] == 'torch':
        exported = ExportedModel(folder, evaluator.device, trusted=trusted)
        return AdaptiveModel(exported, policy).predict, policy
    try:
        from ..adaptive.export.onnx_runner import AdaptiveModel as OnnxModel
    except ImportError:
        raise UserError(f'--exported {str(folder)!r} needs onnxruntime; {install_hint("onnx")}.') from None
    # the package's own runner, never the file of this name in the folder
    session = OnnxModel(folder)

    def predict(images: torch.Tensor) -> Prediction:
        return Prediction(*map(torch.from_numpy, session.predict(images.cpu().contiguous().numpy())))

    return predict, policy
