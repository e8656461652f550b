"""Data set of the 1,797 handwritten digits included in scikit-learn, available without a download."""

from typing import Any, Callable, Optional, Tuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import install_hint

__all__ = ['DigitsDataset']

# fixed ranges of a fixed shuffle, so that the splits are the same everywhere
_SPLITS = {'train': (0, 1197), 'validation': (1197, 1437), 'test': (1437, 1797)}


class DigitsDataset(Dataset[Any]):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak, UCI, 1998) as 32x32 images.

    Args:
        split: ``train`` (1,197 images, default), ``validation`` (240) or ``test`` (360).
        transform: Transform of the PIL image; default None.
        image_mode: PIL mode, ``RGB`` (default) or ``L``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: The split is unknown.
    """

    def __init__(self, split: str = 'train', transform: Optional[Callable[..., Any]] = None, image_mode: str = 'RGB'):
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError(f'the digits data set is part of scikit-learn; {install_hint("digits")}.') from None
        if split not in _SPLITS:
            raise ValueError(f'digits has no split {split!r}; choose one of {", ".join(_SPLITS)}.')
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
        self.indices = order[slice(*_SPLITS[split])].tolist()
        self.images = (digits.images * (255 / 16)).round().astype('uint8')
        self.targets = digits.target
        self.classes = [str(name) for name in digits.target_names]
        self.transform = transform
        self.image_mode = image_mode

    def __getitem__(self, index: int) -> Tuple[object, int]:
        i = self.indices[index]
        image = Image.fromarray(self.images[i]).convert(self.image_mode).resize((32, 32), Image.Resampling.BICUBIC)
        return self.transform(image) if self.transform else image, int(self.targets[i])

    def __len__(self) -> int:
        return len(self.indices)
