"""Decode image files in the same way for training, evaluation, prediction and exported networks."""

import io
import tarfile
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps

from .. import file_checks

__all__ = ['IMAGE_MODES', 'MAX_ASPECT_RATIO', 'convert_image', 'read_image']

# Pillow modes with 8 bits per channel that other modes can be converted to
IMAGE_MODES = tuple(file_checks.IMAGE_MODES)
# tags of TIFF files
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
# a more elongated image would need gigabytes when it is resized before the crop
MAX_ASPECT_RATIO = 256


def read_image(file: Any, mode: str = 'RGB') -> Image.Image:
    """Decode an image file, or the first frame of an animation.

    Args:
        file: Path or binary file object.
        mode: Mode of the result, one of `IMAGE_MODES`; default ``RGB``.

    Returns:
        Upright image in `mode`.

    Raises:
        ValueError: The range of the pixel values is unknown, or the aspect ratio exceeds `MAX_ASPECT_RATIO`.
        OSError: The file cannot be decoded; Pillow's decoders may raise other errors too.
    """
    if isinstance(file, tarfile.ExFileObject):
        file = io.BytesIO(file.read())  # Pillow asks for the descriptor of a compressed TIFF file
    with Image.open(file) as image:
        return convert_image(image, mode)


def convert_image(image: Image.Image, mode: str = 'RGB') -> Image.Image:
    """Apply the EXIF orientation of an image, scale 16 bits per channel to 8, and convert it to a mode.

    timm's loaders ignore the orientation and clip 16-bit values at 255.

    Args:
        image: Image as opened by Pillow.
        mode: Mode of the result, one of `IMAGE_MODES`; default ``RGB``.

    Returns:
        Upright image in `mode`.

    Raises:
        ValueError: The range of the pixel values is unknown, or the aspect ratio exceeds `MAX_ASPECT_RATIO`.
    """
    width, height = image.size
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f'its size is {width}x{height}; expected sides that differ by a factor of at most {MAX_ASPECT_RATIO}; '
            f'crop or split it'
        )
    # Pillow before release 11 opens a 16-bit PNG as 32-bit integers
    is_16_bit = image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG')
    if image.mode in ('I', 'F') and not is_16_bit:
        kind = 'integers' if image.mode == 'I' else 'floating point numbers'
        raise ValueError(f'its pixels are 32-bit {kind}, whose range is unknown; save it with 8 or 16 bits per channel')
    # a TIFF file of fewer bits, 12 say, has them in 16, and Pillow inverts 8 bits with 0 for white only
    tags = getattr(image, 'tag_v2', {})
    white, inverted = 2 ** min(tags.get(_BITS_PER_SAMPLE, (16,))[0], 16) - 1, tags.get(_PHOTOMETRIC) == 0
    if isinstance(image, ImageFile.ImageFile) and image.filename:
        # Pillow 13 maps a TIFF file that it opened by name into memory with the sides of the upright image
        name, image.filename = image.filename, ''
        image.load()
        image.filename = name
    image = ImageOps.exif_transpose(image)
    if is_16_bit:
        image = _eight_bits(image, white, inverted)
    return image.convert(mode)


def _eight_bits(image: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Scale grey values from 0 to `white` to values from 0 to 255; `inverted` if 0 is white in the file."""
    pixels = np.minimum(np.asarray(image).astype(np.uint32), white)
    pixels = white - pixels if inverted else pixels
    return Image.fromarray(((pixels * 255 + white // 2) // white).astype(np.uint8))
