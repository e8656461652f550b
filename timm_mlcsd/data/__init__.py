"""What timm's data package lacks."""

from .digits import DigitsDataset
from .pad_crop import PadCrop
from .subset import ConvertedImages, TransformSubset, hold_out

__all__ = ['ConvertedImages', 'DigitsDataset', 'PadCrop', 'TransformSubset', 'hold_out']
