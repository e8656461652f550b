"""The one way in which an image becomes pixels: training, evaluation, prediction and exported runners read alike."""

from typing import Any

import numpy as np
from PIL import Image, ImageOps

__all__ = ['IMAGE_MODES', 'MAX_ASPECT_RATIO', 'convert_image', 'read_image']

# modes of Pillow with 8 bits per channel that other modes can be converted to
IMAGE_MODES = ('L', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV')
# a longer image would be resized to gigabytes before it is cropped
MAX_ASPECT_RATIO = 256


def read_image(file: Any, mode: str = 'RGB') -> Image.Image:
    """Decode an image file, the first frame where it has several.

    Args:
        file: Path or binary file object.
        mode: One of `IMAGE_MODES`.

    Raises:
        ValueError: Its pixels have no known range, or it is too long for its width.
        OSError: It cannot be decoded; other errors of Pillow's decoders are possible.
    """
    with Image.open(file) as image:
        return convert_image(image, mode)


def convert_image(image: Image.Image, mode: str = 'RGB') -> Image.Image:
    """Turn an image upright as its EXIF orientation says, scale 16 bits to 8, and convert it.

    timm's own loaders ignore the orientation and clip 16 bits at 255.

    Args:
        image: As Pillow opened it.
        mode: One of `IMAGE_MODES`.

    Raises:
        ValueError: Its pixels have no known range, or it is too long for its width.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f'its size is {width}x{height}; expected sides that differ by a factor of at most {MAX_ASPECT_RATIO}; '
            f'crop or split it'
        )
    # releases of Pillow before 11 open a 16-bit PNG as 32-bit integers
    is_16_bit = image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG')
    if image.mode in ('I', 'F') and not is_16_bit:
        kind = 'integers' if image.mode == 'I' else 'floating point numbers'
        raise ValueError(f'its pixels are 32-bit {kind}, whose range is unknown; save it with 8 or 16 bits per channel')
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        pixels = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((pixels + 128) // 257).astype(np.uint8))
    return image.convert(mode)
