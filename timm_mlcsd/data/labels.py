"""Labels that no class has: found in the loader's processes, where telling costs a GPU nothing."""

from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
from timm.data import FastCollateMixup

__all__ = ['CheckedCollate', 'CheckedMixup', 'check_labels']


def check_labels(labels: Iterable[Any], num_classes: int) -> None:
    """Refuse what is no index of a class.

    Args:
        labels: Numbers, tensors, or with an image's index behind it in a tensor.
        num_classes: How many classes there are.

    Raises:
        ValueError: A label is text, below 0 or too large.
    """
    for label in labels:
        if isinstance(label, str):
            raise ValueError(f'the label {label!r} is text: name a --target-key whose column holds numbers or classes')
        if isinstance(label, torch.Tensor):
            label = label.flatten()[0].item()
        if not isinstance(label, (int, np.integer)):
            raise ValueError(f'the label {label!r} is no whole number, the index of one class')
        if not 0 <= label < num_classes:
            raise ValueError(
                f'a label is {label}, and {num_classes} classes have 0 to {num_classes - 1}: --num-classes is too '
                f'small, the labels begin with 1, or the images have none'
            )


class CheckedCollate:
    """Makes a batch of samples whose labels are right.

    Args:
        collate: Makes it.
        num_classes: How many classes there are.
    """

    def __init__(self, collate: Callable, num_classes: int):
        self.collate = collate
        self.num_classes = num_classes

    def __call__(self, samples: Sequence[Any]) -> Any:
        check_labels((sample[1] for sample in samples), self.num_classes)
        return self.collate(samples)


class CheckedMixup(FastCollateMixup):
    """timm's mixing of a batch; a label that no class has would be the label of another."""

    def __call__(self, batch: Sequence[Any], _: Any = None) -> Any:
        check_labels((sample[1] for sample in batch), self.num_classes)
        return super().__call__(batch)
