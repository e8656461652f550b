"""Data loading that timm's data package does not provide: checks, class names, caching and augmentation."""

from .checked import CheckedImages, CheckedLoader, DropBroken, SubstituteBroken, checked_images, image_name
from .class_names import (
    ClassNames,
    check_look_alikes,
    class_label,
    list_classes,
    load_class_map,
    names_by_index,
    pad_names,
    same_names,
)
from .corruptions import CORRUPTIONS, CorruptedImages, check_corruptions
from .device_cache import CachedLoader, cache_images
from .digits import DigitsDataset
from .folders import (
    IMAGE_ENDINGS,
    SPLIT_FOLDERS,
    check_class_folders,
    check_folder_has_split,
    exclude_hidden_folders,
    exclude_non_images,
    explain_unsortable_names,
    has_split_folders,
    image_endings,
    is_hidden,
    natural_order,
)
from .image import IMAGE_MODES, convert_image, read_image
from .labels import CheckedCollate, CheckedMixup, check_labels
from .pad_crop import PadCrop
from .preprocess import IMAGE_MODE, Preprocessing, default_image_mode
from .recording_sampler import RecordingSampler
from .sample_keys import probe_keys, sample_keys
from .stream import CheckedStream
from .subset import ConvertedImages, IndexedTargets, TransformSubset, hold_out, num_images

__all__ = [
    'CORRUPTIONS',
    'IMAGE_ENDINGS',
    'IMAGE_MODE',
    'IMAGE_MODES',
    'SPLIT_FOLDERS',
    'CachedLoader',
    'CheckedCollate',
    'CheckedImages',
    'CheckedLoader',
    'CheckedMixup',
    'CheckedStream',
    'ClassNames',
    'ConvertedImages',
    'CorruptedImages',
    'DigitsDataset',
    'IndexedTargets',
    'SubstituteBroken',
    'PadCrop',
    'Preprocessing',
    'RecordingSampler',
    'TransformSubset',
    'DropBroken',
    'cache_images',
    'check_class_folders',
    'check_corruptions',
    'check_folder_has_split',
    'check_labels',
    'check_look_alikes',
    'checked_images',
    'class_label',
    'convert_image',
    'default_image_mode',
    'exclude_hidden_folders',
    'exclude_non_images',
    'explain_unsortable_names',
    'has_split_folders',
    'hold_out',
    'image_endings',
    'image_name',
    'is_hidden',
    'list_classes',
    'load_class_map',
    'names_by_index',
    'natural_order',
    'num_images',
    'pad_names',
    'probe_keys',
    'read_image',
    'same_names',
    'sample_keys',
]
