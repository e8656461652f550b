"""Preprocess one image file for a network, with the same arithmetic as the evaluation loaders."""

from typing import Any, Dict, Optional

import torch
from timm.data import create_transform

from .image import read_image

__all__ = ['IMAGE_MODE', 'Preprocessing', 'default_image_mode']

# key in addition to timm's in the preprocessing of a network, if the mode is not the default for its channels
IMAGE_MODE = 'input_img_mode'
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


def default_image_mode(channels: Optional[int]) -> str:
    """Return the PIL mode of images with a number of channels.

    Args:
        channels: Number of channels, 1 to 4; None for 3.

    Raises:
        ValueError: No mode has this number of channels.
    """
    mode = _MODES.get(3 if channels is None else channels)
    if mode is None:
        raise ValueError(f'images with {channels} channels cannot be read from files: expected 1 to 4 channels')
    return mode


class Preprocessing:
    """Read, resize, crop and normalise an image as evaluation does, with bit for bit the same result on the CPU.

    Args:
        data_config: Preprocessing of the network: ``input_size`` (C, H, W), ``interpolation``, ``mean``, ``std``,
            ``crop_pct``, ``crop_mode``, and optionally ``input_img_mode``.

    Raises:
        ValueError: No image mode has C channels.
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
        """Preprocess the image in a file.

        Args:
            file: Path or binary file object.

        Returns:
            Batch of one image, float32 [1, C, H, W].

        Raises:
            Exception: The file cannot be decoded; Pillow raises errors of any type for broken files.
        """
        pixels = torch.as_tensor(self.transform(read_image(file, self.mode)))
        return pixels.float().sub_(self.mean).div_(self.std)[None]
