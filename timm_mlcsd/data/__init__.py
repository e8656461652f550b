"""What timm's data package lacks."""

from .checked import CheckedImages, CheckedLoader, NextIfBroken, WithoutBroken, checked_images
from .device_cache import CachedLoader, cache_images
from .digits import DigitsDataset
from .drawn import RememberingSampler
from .labels import CheckedCollate, CheckedMixup, check_labels
from .pad_crop import PadCrop
from .stream import CheckedStream
from .subset import ConvertedImages, IndexedTargets, TransformSubset, hold_out

__all__ = [
    'CachedLoader',
    'CheckedCollate',
    'CheckedImages',
    'CheckedLoader',
    'CheckedMixup',
    'CheckedStream',
    'ConvertedImages',
    'DigitsDataset',
    'IndexedTargets',
    'NextIfBroken',
    'PadCrop',
    'RememberingSampler',
    'TransformSubset',
    'WithoutBroken',
    'cache_images',
    'check_labels',
    'checked_images',
    'hold_out',
]
