"""The augmentation of the CIFAR literature, which timm lacks: pad every side, then crop at random."""

from typing import Sequence

from PIL import Image
from torchvision import transforms

__all__ = ['PadCrop']


class PadCrop:
    """Resize where needed, pad with black, crop at random to the input size (paper, section "Datasets").

    Args:
        size: (H, W) of the crop.
        padding: Pixels added at every side.
    """

    def __init__(self, size: Sequence[int], padding: int = 4):
        self.size = tuple(size)
        self.padding = padding
        self.crop = transforms.RandomCrop(self.size, padding=padding)

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.crop(self.resize(image))

    def resize(self, image: Image.Image) -> Image.Image:
        """The image in the size of the crop."""
        if image.size == self.size[::-1]:
            return image
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f'PadCrop({self.crop})'
