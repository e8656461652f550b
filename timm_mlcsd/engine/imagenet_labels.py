"""Other labels for ImageNet's classes: the reassessed ones, and subsets of the classes."""

import json
from pathlib import Path
from typing import Any, Iterable, Iterator, List, Tuple, Union

import torch
from timm.data import RealLabelsImagenet
from torch.utils.data import Dataset

from ..data import CheckedImages
from ..errors import UserError, as_user_error
from .evaluator import Evaluation

__all__ = ['RealLabels', 'read_valid_labels']


class RealLabels:
    """Accuracy by the reassessed labels of ImageNet's validation images (Beyer et al., arXiv:2006.07159), as in timm.

    An answer is right if it is one of the labels of an image; images without a label do not count.

    Args:
        source: JSON file with a list of class indices per validation image, or True for the labels that timm contains.
        dataset: Folder of the validation images.
        num_exits: Number of exits K.
        num_classes: Number of classes C.

    Raises:
        UserError: The file cannot be read, or the images are others.
    """

    def __init__(self, source: Union[str, bool], dataset: Dataset[Any], num_exits: int, num_classes: int):
        reader: Any = dataset.reader if isinstance(dataset, CheckedImages) else None
        if not hasattr(reader, 'samples'):
            raise UserError('--real-labels: expected a folder of images, whose names identify them.')
        self.topk = min(5, num_classes)
        with as_user_error(f'--real-labels{"" if source is True else f" {source!r}"} cannot be used'):
            names = reader.filenames(basename=True)
            path = None if source is True else source
            try:
                self.exits = [RealLabelsImagenet(names, path, (1, self.topk)) for _ in range(num_exits)]
            except AssertionError:
                count = _length(path)
                raise ValueError(f'it has labels of {count} images, the split has {len(names)}') from None
            known = self.exits[0].real_labels
            unknown = next((name for name in names if name not in known), None)
            if unknown is not None:
                raise ValueError(f'expected files named as ILSVRC2012_val_00000001.JPEG, got {unknown}')

    def counted(
        self, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Pass batches of logits [K, B, C] and targets [B] on, and count the right answers."""
        for logits, targets in batches:
            for exit, answer in zip(self.exits, logits):
                exit.add_result(answer)
            yield logits, targets

    def replace(self, result: Evaluation) -> Evaluation:
        """The metrics with the accuracies by these labels.

        Raises:
            UserError: Images were left out, so that it is unknown which answer belongs to which image.
        """
        seen = self.exits[0].sample_idx
        if seen != len(self.exits[0].filenames):
            raise UserError(
                f'--real-labels: only {seen} of {len(self.exits[0].filenames)} images can be read; repair the others.'
            )
        return result._replace(
            exits=[
                metrics._replace(top1=exit.get_accuracy(1), top5=exit.get_accuracy(self.topk))
                for metrics, exit in zip(result.exits, self.exits)
            ]
        )


def _length(path: Any) -> int:
    return 50_000 if path is None else len(json.loads(Path(path).read_text(encoding='utf-8')))


def read_valid_labels(path: str, num_classes: int) -> List[int]:
    """Read the class indices that data has, as for ImageNet-A and ImageNet-R.

    Args:
        path: Text file with a class index per line, at most 10 MB.
        num_classes: Number of classes C of the network.

    Returns:
        Class indices in ascending order, [C'].

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    with as_user_error(f'--valid-labels {path!r} cannot be used'):
        with open(path, encoding='utf-8-sig') as f:
            lines = [line.strip() for line in f.read(10_000_000).splitlines() if line.strip()]
        wrong = next(
            (line for line in lines if not (line.isascii() and line.isdigit()) or int(line) >= num_classes), None
        )
        if wrong is not None:
            raise ValueError(f'expected a class index from 0 to {num_classes - 1} per line, got {wrong!r}')
        found = sorted(set(map(int, lines)))
        if len(found) < 2 or len(found) < len(lines):
            raise ValueError(f'expected at least two classes, each once; got {len(found)} in {len(lines)} lines')
        return found
