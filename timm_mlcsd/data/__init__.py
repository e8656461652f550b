"""What timm's data package lacks."""

from .digits import DigitsDataset
from .pad_crop import PadCrop
from .subset import ConvertedImages, IndexedTargets, TransformSubset, hold_out

__all__ = ['ConvertedImages', 'DigitsDataset', 'IndexedTargets', 'PadCrop', 'TransformSubset', 'hold_out']
