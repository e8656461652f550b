"""Data sets, which timm reads, from their configuration."""

import logging
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from PIL import ImageMode
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import ImageFolder

from .._timm import names_of_reader
from ..data import (
    IMAGE_MODES,
    SPLIT_FOLDERS,
    CheckedImages,
    CheckedStream,
    ClassNames,
    ConvertedImages,
    DigitsDataset,
    TransformSubset,
    class_label,
    exclude_hidden_folders,
    explain_unsortable_names,
    hold_out,
    image_endings,
    list_classes,
    names_by_index,
    num_images,
    probe_keys,
    read_image,
    same_names,
    sample_keys,
)
from ..errors import UserError, as_user_error, first_few
from .data_config import DataConfig, TrainDataConfig
from .sources import SOURCES, STREAMS, check_source, read_class_map

__all__ = [
    'check_classes',
    'class_names',
    'load_dataset',
    'num_images',
    'same_split',
    'train_and_val_datasets',
]

_logger = logging.getLogger(__name__)


def load_dataset(
    config: DataConfig,
    split: str,
    is_training: bool = False,
    num_samples: Optional[int] = None,
    needs_folder: bool = False,
    seed: int = 42,
) -> Dataset[Any]:
    """Load one split of a data set.

    Args:
        config: The data.
        split: Name of the split.
        is_training: Whether streamed data is shuffled.
        num_samples: Number of samples in a training stream of unknown length.
        needs_folder: Whether a folder without splits is an error, instead of being the split itself.
        seed: Seed of the order in which streamed data is shuffled.

    Raises:
        UserError: It cannot be read.
    """
    image_mode = _image_mode(config)
    if config.dataset == 'digits':
        read_class_map(config, SOURCES['torch'])
        with as_user_error('--dataset digits'):
            return DigitsDataset(split, image_mode=image_mode)
    prefix = check_source(config, split, needs_folder)
    source = SOURCES[prefix]
    class_map = read_class_map(config, source)
    if prefix == 'hfids' and not is_training:
        num_samples = 1  # timm insists, and uses it for training only
    length_unknown = source.is_stream and is_training and not num_samples
    hint = ' (--train-num-samples N tells how long it is)' if length_unknown else ''
    hint = f' with the classes of --class-map {config.class_map}' if config.class_map else hint
    what = f'split {split!r} of --dataset {config.dataset!r} at {config.data_dir!r} cannot be read{hint}'
    keys: Dict[str, Any] = dict(input_key=config.input_key, target_key=config.target_key) if source.has_keys else {}
    with as_user_error(what), image_endings(), explain_unsortable_names():
        dataset = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=is_training,
            class_map=class_map or {},
            download=config.dataset_download,
            batch_size=config.batch_size,
            num_samples=num_samples,
            repeats=getattr(config, 'epoch_repeats', 0) if is_training else 0,
            seed=seed,
            input_img_mode=image_mode,
            trust_remote_code=config.dataset_trust_remote_code,
            **keys,
        )
    if source.check is not None:
        with as_user_error(what):
            source.check(getattr(dataset, 'reader', None), config, split, class_map)
    return _with_checked_images(dataset, prefix, config, image_mode, is_training)


def _image_mode(config: DataConfig) -> str:
    """The Pillow mode that images are read in."""
    image_mode = config.input_img_mode or ('L' if config.in_chans == 1 else 'RGB')
    if image_mode not in IMAGE_MODES:
        raise UserError(
            f'--input-img-mode {image_mode} is no mode of Pillow with 8 bits per channel: expected one of '
            f'{", ".join(IMAGE_MODES)}.'
        )
    channels = len(ImageMode.getmode(image_mode).bands)
    if config.in_chans and channels != config.in_chans:
        raise UserError(
            f'--in-chans {config.in_chans}: images are read as {image_mode}, with {channels} channels; name another '
            f'--input-img-mode: L has 1, RGB 3, RGBA and CMYK 4.'
        )
    return image_mode


def _with_checked_images(
    dataset: Dataset[Any], prefix: str, config: DataConfig, image_mode: str, is_training: bool
) -> Dataset[Any]:
    """The data set with our reading of images, which counts and names the ones that are broken."""
    if isinstance(dataset, ImageDataset):
        if hasattr(dataset.reader, 'cache_tarfiles'):
            # the loader's processes would share an open tar file, and move each other's position in it
            dataset.reader.cache_tarfiles = False
        return CheckedImages(dataset.reader, image_mode, config.max_bad_samples)
    if isinstance(dataset, IterableImageDataset):
        if not is_training:
            # timm would divide it among processes, and repeat or lose images
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        return CheckedStream(dataset.reader, prefix, image_mode, config.max_bad_samples)
    if config.max_bad_samples:
        raise UserError(
            f'--max-bad-samples {config.max_bad_samples}: --dataset {config.dataset!r} is read by torchvision, which '
            f'stops at an image that cannot be read.'
        )
    if isinstance(dataset, ImageFolder):
        exclude_hidden_folders(dataset)
        dataset.loader = partial(read_image, mode=image_mode)  # torchvision's own clips 16 bits
    # timm leaves torchvision's images as they are
    return ConvertedImages(dataset, image_mode) if prefix == 'torch' else dataset


def class_names(dataset: Dataset[Any]) -> Optional[ClassNames]:
    """The names of the classes by index, None for an index without a name; None if the data set has no names."""
    while isinstance(dataset, (TransformSubset, ConvertedImages)):
        dataset = dataset.dataset
    reader = getattr(dataset, 'reader', dataset)
    # timm's reader of tar files has another name for it
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)
    if mapping and all(isinstance(name, int) for name in mapping):  # a class map from indices to indices
        source = names_of_reader(reader)
        mapping = {source[old]: new for old, new in mapping.items() if old in source}
    if mapping:
        return names_by_index(mapping)
    names = getattr(reader, 'classes', None)
    return [str(name) for name in names] if names is not None else None


def check_classes(names: Optional[ClassNames], expected: Optional[ClassNames], what: str) -> None:
    """Refuse data whose class names, and so indices, differ from those of training."""
    if names and expected and not same_names(names, expected):
        raise UserError(
            f'the classes of {what} ({list_classes(names)}) are not those that are trained on '
            f'({list_classes(expected)}); --class-map FILE gives classes their indices.'
        )


def _warn_of_classes_held_out(dataset: Dataset[Any], kept: Sequence[int], fraction: float) -> None:
    """Warn of classes all of whose images are held out."""
    reader: Any = getattr(dataset, 'reader', None)
    if not hasattr(reader, 'samples'):
        return
    # the targets of tar files are a list of their own
    targets = reader.targets if hasattr(reader, 'targets') else [sample[1] for sample in reader.samples]
    missing = sorted(set(map(int, targets)) - {int(targets[i]) for i in kept})
    if missing:
        names = class_names(dataset)
        _logger.warning(
            f'--val-fraction {fraction}: no image is left to train on for {len(missing)} classes '
            f'({first_few([class_label(names, index) for index in missing])}), because all of theirs are held out; '
            f'give more images, or name a --val-split.'
        )


def same_split(split: str, other: str) -> bool:
    """Whether two names of splits share images: timm's synonyms, or slices of one split."""

    def whole(split: str) -> str:
        name = split.partition('[')[0].lower()
        return next((names[0] for names in SPLIT_FOLDERS if name in names), name)

    return whole(split) == whole(other)


def train_and_val_datasets(
    config: TrainDataConfig, seed: int = 42
) -> Tuple[Dataset[Any], Dataset[Any], Dict[str, Any]]:
    """Load the training images and the images that choose the best epoch.

    Without ``--val-split`` the latter are held out of the train split, chosen by `val_seed`. The record then has their
    indices and keys, so that images that were trained on are never evaluated as held out.

    Args:
        config: The data.
        seed: Seed of the order in which streamed data is shuffled.

    Returns:
        Training data, validation data, and the record for checkpoints.

    Raises:
        UserError: The data cannot be read, or nothing can be held out.
    """
    train = load_dataset(config, config.train_split, is_training=True, num_samples=config.train_num_samples, seed=seed)
    for flag, given in (('--train-num-samples', config.train_num_samples), ('--epoch-repeats', config.epoch_repeats)):
        if given and not isinstance(train, IterableDataset):
            raise UserError(f'{flag} {given} is for streams alone ({", ".join(f"{p}/" for p in STREAMS)}).')
    record: Dict[str, Any] = dict(train_split=config.train_split, val_split=config.val_split)
    if not isinstance(train, IterableDataset):
        record.update(train_size=num_images(train), train_probe=probe_keys(train))
    if config.val_split:
        if same_split(config.val_split, config.train_split) and '[' not in config.val_split:
            _logger.warning(
                f'--val-split {config.val_split}: the images that are trained on will choose the best epoch.'
            )
        # without a folder for it, timm would take the training images once more
        val = load_dataset(config, config.val_split, needs_folder=True)
        check_classes(class_names(val), class_names(train), f'split {config.val_split!r}')
        return train, val, record
    if isinstance(train, IterableDataset):
        raise UserError(f'--dataset {config.dataset!r} is a stream, nothing can be held out of it: name a --val-split.')
    if not 0.0 < config.val_fraction < 1.0:
        raise UserError(
            f'--val-fraction {config.val_fraction} must lie between 0 and 1: the held-out part chooses the best epoch. '
            f'To train on the whole split, name a --val-split.'
        )
    kept, held = hold_out(num_images(train), config.val_fraction, config.val_seed)
    record.update(
        val_fraction=config.val_fraction,
        val_seed=config.val_seed,
        val_indices=torch.tensor(held),
        val_keys=sample_keys(train, held),
        val_probe=probe_keys(train, held),
    )
    _warn_of_classes_held_out(train, kept, config.val_fraction)
    return TransformSubset(train, kept), TransformSubset(train, held), record
