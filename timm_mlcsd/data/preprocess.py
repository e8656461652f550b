"""From one image file to what a network takes, with the arithmetic of the loaders that evaluate."""

from typing import Any, Dict, Optional

import torch
from timm.data import create_transform

from .image import read_image

__all__ = ['IMAGE_MODE', 'Preprocessing', 'default_image_mode']

# beside timm's keys in a network's preprocessing, where images are not read as their channels suggest
IMAGE_MODE = 'input_img_mode'
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


def default_image_mode(channels: Optional[int]) -> str:
    """The mode in which images are read for a number of channels, 3 by default.

    Raises:
        ValueError: No mode has so many.
    """
    mode = _MODES.get(3 if channels is None else channels)
    if mode is None:
        raise ValueError(f'image files have 1 to 4 channels, not {channels}; images of that kind cannot be read')
    return mode


class Preprocessing:
    """Reads, resizes, crops and normalises an image as evaluation does, bit for bit on the CPU.

    Args:
        data_config: ``input_size`` (C, H, W), ``interpolation``, ``mean``, ``std``, ``crop_pct``, ``crop_mode``, and
            perhaps ``input_img_mode``.

    Raises:
        ValueError: Image files don't have so many channels.
    """

    def __init__(self, data_config: Dict[str, Any]):
        config = {key: value for key, value in data_config.items() if key != IMAGE_MODE}
        self.mode = data_config.get(IMAGE_MODE) or default_image_mode(config['input_size'][0])
        self.transform = create_transform(**config, is_training=False, use_prefetcher=True)
        # timm's loaders normalise pixels from 0 to 255
        self.mean, self.std = (
            torch.tensor([255 * value for value in config[key]])[:, None, None] for key in ('mean', 'std')
        )

    def __call__(self, file: Any) -> torch.Tensor:
        """The image in a file as a batch [1, C, H, W].

        Args:
            file: Path or binary file object.

        Raises:
            Exception: Pillow cannot read it, in as many ways as there are broken files.
        """
        pixels = torch.as_tensor(self.transform(read_image(file, self.mode)))
        return pixels.float().sub_(self.mean).div_(self.std)[None]
