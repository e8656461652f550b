"""Corrupted images: the 15 corruptions of Hendrycks and Dietterich (ICLR 2019), by the package imagecorruptions."""

import contextlib
import importlib.util
import zlib
from typing import Any, Callable, Iterator, Optional, Tuple

import numpy as np
from torch.utils.data import Dataset

from ..errors import UserError, install_hint
from .subset import num_images

__all__ = ['CORRUPTIONS', 'CorruptedImages', 'check_corruptions']

CORRUPTIONS = (
    'gaussian_noise',
    'shot_noise',
    'impulse_noise',
    'defocus_blur',
    'glass_blur',
    'motion_blur',
    'zoom_blur',
    'snow',
    'frost',
    'fog',
    'brightness',
    'contrast',
    'elastic_transform',
    'pixelate',
    'jpeg_compression',
)
# smaller images are refused by the package
MIN_SIZE = 32


def check_corruptions(input_size: Tuple[int, int, int]) -> None:
    """Check that images of a size can be corrupted here.

    Args:
        input_size: Size of the images, (C, H, W).

    Raises:
        UserError: The package is not installed, or the images are too small or not in colour.
    """
    if importlib.util.find_spec('imagecorruptions') is None:
        raise UserError(f'--corruptions needs imagecorruptions; {install_hint("corruptions")}.')
    channels, height, width = input_size
    if channels != 3 or min(height, width) < MIN_SIZE:
        raise UserError(
            f'--corruptions: expected colour images of at least {MIN_SIZE}x{MIN_SIZE}, got {channels} channels of '
            f'{height}x{width}.'
        )


class CorruptedImages(Dataset[Any]):
    """Images of a data set, corrupted after the transform: as the network sees them, before they are normalised.

    The random numbers of an image depend on its index, the corruption and the severity only, except for
    ``impulse_noise`` and ``glass_blur``, whose generators the package does not let callers seed.

    Args:
        dataset: Data set of (image, target) without a transform, with None for a broken image.
        corruption: One of `CORRUPTIONS`.
        severity: Severity, 1 to 5.
    """

    def __init__(self, dataset: Dataset[Any], corruption: str, severity: int):
        self.dataset = dataset
        self.corruption = corruption
        self.severity = severity
        # timm's evaluation transform, which returns uint8 pixels [C, H, W]; set by the loader
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Any]]:
        sample = self.dataset[index]
        if sample is None:
            return None
        image, target = sample
        assert self.transform is not None  # the loader sets it
        pixels = np.asarray(self.transform(image)).transpose(1, 2, 0)
        from imagecorruptions import corrupt  # imports OpenCV and numba

        with _seeded([zlib.crc32(self.corruption.encode()), self.severity, index]):
            corrupted = corrupt(np.ascontiguousarray(pixels), severity=self.severity, corruption_name=self.corruption)
        # a copy, because some corruptions return read-only memory of Pillow
        return np.array(corrupted.transpose(2, 0, 1), order='C'), target

    def __len__(self) -> int:
        return num_images(self.dataset)


@contextlib.contextmanager
def _seeded(seed: Any) -> Iterator[None]:
    """Seed NumPy's generator, and restore its state afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
