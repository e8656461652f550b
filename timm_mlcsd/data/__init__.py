"""What timm's data package lacks."""

from .device_cache import CachedLoader, cache_images
from .digits import DigitsDataset
from .pad_crop import PadCrop
from .subset import ConvertedImages, IndexedTargets, TransformSubset, hold_out

__all__ = [
    'CachedLoader',
    'ConvertedImages',
    'DigitsDataset',
    'IndexedTargets',
    'PadCrop',
    'TransformSubset',
    'cache_images',
    'hold_out',
]
