"""Check labels in the worker processes of the loader, where the check does not delay the GPU."""

from typing import Any, Callable, Iterable, Sequence

import numpy as np
import torch
from timm.data import FastCollateMixup

__all__ = ['CheckedCollate', 'CheckedMixup', 'check_labels']


def check_labels(labels: Iterable[Any], num_classes: int) -> None:
    """Refuse labels that are not class indices.

    Args:
        labels: Labels as numbers or tensors; the first element of a tensor is the label.
        num_classes: Number of classes C.

    Raises:
        ValueError: A label is text, not a whole number, or not from 0 to C - 1.
    """
    for label in labels:
        if isinstance(label, str):
            raise ValueError(f'the label {label!r} is text: name a --target-key whose column holds numbers or classes')
        if isinstance(label, torch.Tensor):
            label = label.flatten()[0].item()
        if not isinstance(label, (int, np.integer)):
            raise ValueError(f'the label {label!r} is not a whole number: expected the index of one class')
        if not 0 <= label < num_classes:
            raise ValueError(
                f'a label is {label}: expected 0 to {num_classes - 1} for {num_classes} classes; --num-classes is too '
                f'small, the labels begin with 1, or the images have no labels'
            )


class CheckedCollate:
    """Collate function that checks the labels first.

    Args:
        collate: Collate function for the samples.
        num_classes: Number of classes C.
    """

    def __init__(self, collate: Callable[..., Any], num_classes: int):
        self.collate = collate
        self.num_classes = num_classes

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Check the labels, then collate the samples."""
        check_labels((sample[1] for sample in samples), self.num_classes)
        return self.collate(samples)


class CheckedMixup(FastCollateMixup):
    """timm's collate function with mixup that checks the labels first, as mixing would hide a wrong label."""

    def __call__(self, batch: Sequence[Any], _: Any = None) -> Any:
        """Check the labels, then collate and mix the batch."""
        check_labels((sample[1] for sample in batch), self.num_classes)
        return super().__call__(batch)
