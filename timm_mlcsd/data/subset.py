"""Data sets made from other data sets."""

from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch.utils.data import Dataset

from .image import convert_image

__all__ = ['ConvertedImages', 'IndexedTargets', 'TransformSubset', 'hold_out']


class TransformSubset(Dataset):
    """The samples at `indices`, with a transform that leaves the full data set's alone.

    Args:
        dataset: Gives (image, target) without a transform of its own, or None for what cannot be read.
        indices: Which samples.
    """

    def __init__(self, dataset: Dataset, indices: Sequence[int]):
        self.dataset = dataset
        self.indices = indices
        self.transform: Optional[Callable] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Any]]:
        sample = self.dataset[self.indices[index]]
        if sample is None:
            return None
        image, target = sample
        return self.transform(image) if self.transform else image, target

    def __len__(self) -> int:
        return len(self.indices)


class ConvertedImages(Dataset):
    """The same images in one PIL mode, with a transform of their own.

    Args:
        dataset: Gives (PIL image, target) without a transform of its own.
        mode: PIL mode, such as ``RGB`` or ``L``.
    """

    def __init__(self, dataset: Dataset, mode: str):
        self.dataset = dataset
        self.mode = mode
        self.transform: Optional[Callable] = None

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        image, target = self.dataset[index]
        image = convert_image(image, self.mode)
        return self.transform(image) if self.transform else image, target

    def __len__(self) -> int:
        return len(self.dataset)


class IndexedTargets(Dataset):
    """The same images, each target a tensor [2]: the class and the image's index.

    Args:
        dataset: Gives (image, class) without a transform of its own, or None for what cannot be read.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.transform: Optional[Callable] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, torch.Tensor]]:
        sample = self.dataset[index]
        if sample is None:
            return None
        image, target = sample
        return self.transform(image) if self.transform else image, torch.tensor([int(target), index])

    def __len__(self) -> int:
        return len(self.dataset)


def hold_out(num_samples: int, fraction: float, seed: int) -> Tuple[Sequence[int], Sequence[int]]:
    """Split range(num_samples) at random.

    Args:
        num_samples: How many there are.
        fraction: Share that is held out, at least one sample and never all.
        seed: Of this split alone, so that runs with other seeds share it.

    Returns:
        Indices that stay and indices that are held out, both sorted.
    """
    held = min(max(round(num_samples * fraction), 1), num_samples - 1)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values.tolist(), order[:held].sort().values.tolist()
