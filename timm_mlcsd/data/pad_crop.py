"""Standard augmentation for CIFAR, which timm does not provide: pad every side, then crop at random."""

from typing import Sequence

from PIL import Image
from torchvision import transforms

__all__ = ['PadCrop']


class PadCrop:
    """Resize if needed, pad with black and crop at random to the input size (paper, section "Datasets").

    Args:
        size: (H, W) of the crop in pixels.
        padding: Pixels added at every side; default 4.
    """

    def __init__(self, size: Sequence[int], padding: int = 4):
        height, width = size
        self.size = (height, width)
        self.padding = padding
        self.crop = transforms.RandomCrop(self.size, padding=padding)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return an augmented copy of the image, in the size of the crop."""
        cropped: Image.Image = self.crop(self.resize(image))
        return cropped

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize an image to the size of the crop, without padding or cropping."""
        if image.size == self.size[::-1]:
            return image
        return image.resize(self.size[::-1], Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f'PadCrop({self.crop})'
