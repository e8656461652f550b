"""Data sets that wrap other data sets."""

from typing import Any, Callable, Optional, Sequence, Sized, Tuple

import torch
from torch.utils.data import Dataset

from .image import convert_image

__all__ = ['ConvertedImages', 'IndexedTargets', 'TransformSubset', 'hold_out', 'num_images']


class TransformSubset(Dataset[Any]):
    """Samples at `indices` of a data set, with their own transform.

    Args:
        dataset: Data set of (image, target) without a transform, with None for a broken image.
        indices: Indices of the samples.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Any]]:
        sample = self.dataset[self.indices[index]]
        if sample is None:
            return None
        image, target = sample
        return self.transform(image) if self.transform else image, target

    def __len__(self) -> int:
        return len(self.indices)


class ConvertedImages(Dataset[Any]):
    """Images of a data set converted to one PIL mode, with their own transform.

    Args:
        dataset: Data set of (PIL image, target) without a transform.
        mode: PIL mode, one of `IMAGE_MODES`.
    """

    def __init__(self, dataset: Dataset[Any], mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        image, target = self.dataset[index]
        image = convert_image(image, self.mode)
        return self.transform(image) if self.transform else image, target

    def __len__(self) -> int:
        return num_images(self.dataset)


class IndexedTargets(Dataset[Any]):
    """Images of a data set with targets that contain the class and the index of the image, [2].

    Args:
        dataset: Data set of (image, class) without a transform, with None for a broken image.
    """

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, torch.Tensor]]:
        sample = self.dataset[index]
        if sample is None:
            return None
        image, target = sample
        return self.transform(image) if self.transform else image, torch.tensor([int(target), index])

    def __len__(self) -> int:
        return num_images(self.dataset)


def num_images(dataset: Dataset[Any]) -> int:
    """Return the number of images of a data set that states it."""
    assert isinstance(dataset, Sized)  # all but streams of unknown length
    return len(dataset)


def hold_out(num_samples: int, fraction: float, seed: int) -> Tuple[Sequence[int], Sequence[int]]:
    """Split the indices of samples at random.

    Args:
        num_samples: Number of samples.
        fraction: Share of the samples to hold out; at least one sample is held out and one remains.
        seed: Seed of the split, independent of the seed of the run.

    Returns:
        Indices that remain and indices that are held out, both sorted.
    """
    held = min(max(round(num_samples * fraction), 1), num_samples - 1)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values.tolist(), order[:held].sort().values.tolist()
