"""Data sets, which timm reads, from their configuration."""

import importlib.util
import logging
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from PIL import ImageMode
from timm.data import ImageDataset, create_dataset
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
    check_class_folders,
    check_folder_has_split,
    class_label,
    hold_out,
    image_endings,
    leave_hidden_folders_out,
    leave_out_what_is_no_data,
    load_class_map,
    names_by_index,
    probe_keys,
    read_image,
    same_names,
    sample_keys,
)
from ..errors import UserError, as_user_error, install_hint, printable

__all__ = [
    'DataConfig',
    'TrainDataConfig',
    'check_classes',
    'class_names',
    'load_dataset',
    'same_split',
    'train_and_val_datasets',
]

_logger = logging.getLogger(__name__)

_PREFIXES = ('', 'hfds', 'hfids', 'tfds', 'torch', 'wds')
_STREAMS = ('hfids', 'tfds', 'wds')
_TRAIN_AND_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')


@dataclass
class DataConfig:
    """Data sets, how their images are read and prepared, and how they are batched.

    Fields are the flags of the same names; `timm_mlcsd.cli` documents them.

    Attributes:
        data_dir: Folder with the data.
        dataset: Type of the data, in timm's form; empty for folders of images.
        dataset_download: Whether data may be downloaded.
        dataset_trust_remote_code: Whether a data set of the Hub may run its code.
        class_map: File that maps class names to indices.
        input_img_mode: Pillow mode of the images, None for RGB or L.
        input_key: Column with the images.
        target_key: Column with the labels.
        img_size: Height and width in pixels, None for the model's.
        in_chans: Number of image channels.
        input_size: Channels, height and width.
        crop_pct: Share of the image in the evaluation crop.
        mean: Channel means.
        std: Channel standard deviations.
        interpolation: How images are resized, empty for the model's way.
        batch_size: Images per batch and process.
        workers: Loader processes.
        max_bad_samples: Number of unreadable images that are left out before it is an error.
        pin_mem: Whether batches lie in pinned memory, None for: with a GPU.
    """

    data_dir: Optional[str] = None
    dataset: str = ''
    dataset_download: bool = False
    dataset_trust_remote_code: bool = False
    class_map: str = ''
    input_img_mode: Optional[str] = None
    input_key: Optional[str] = None
    target_key: Optional[str] = None
    img_size: Optional[int] = None
    in_chans: Optional[int] = None
    input_size: Optional[List[int]] = None
    crop_pct: Optional[float] = None
    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    interpolation: str = ''
    batch_size: int = 128
    workers: int = field(default_factory=lambda: min(4, os.cpu_count() or 1))
    max_bad_samples: int = 0
    pin_mem: Optional[bool] = None

    def __post_init__(self):
        if self.input_size and self.in_chans is None:
            self.in_chans = self.input_size[0]


@dataclass
class TrainDataConfig(DataConfig):
    """`DataConfig` with what only a training needs.

    Attributes:
        train_split: Split to train on.
        cache_dataset: ``device`` keeps small images decoded on the training device.
        train_num_samples: Length of a stream that does not tell it.
        epoch_repeats: Passes per epoch over a stream.
        val_split: Split that chooses the best epoch, None to hold images out of the train split.
        val_fraction: Share of the train split that is held out.
        val_seed: Seed of that choice.
        validation_batch_size: Images per batch of the evaluation, None for `batch_size`.
    """

    train_split: str = 'train'
    cache_dataset: str = ''
    train_num_samples: Optional[int] = None
    epoch_repeats: float = 0.0
    val_split: Optional[str] = None
    val_fraction: float = 0.1
    val_seed: int = 0
    validation_batch_size: Optional[int] = None


def load_dataset(
    config: DataConfig,
    split: str,
    is_training: bool = False,
    num_samples: Optional[int] = None,
    needs_folder: bool = False,
    seed: int = 42,
) -> Dataset:
    """Load one split of a data set.

    Args:
        config: What to load.
        split: Which.
        is_training: Whether streamed data is shuffled.
        num_samples: Length of a stream to train on, where it doesn't tell.
        needs_folder: Whether a folder without splits is an error, instead of being the split itself.
        seed: Seed of the order in which streamed data is shuffled.

    Raises:
        UserError: It cannot be read.
    """
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
    if config.dataset == 'digits':
        _class_map(config, 'torch')
        with as_user_error('--dataset digits'):
            return DigitsDataset(split, image_mode=image_mode)
    prefix = _check_source(config, split, needs_folder)
    if prefix == 'hfids' and not is_training:
        num_samples = 1  # timm insists, and uses it for training alone
    keys = dict(input_key=config.input_key, target_key=config.target_key) if prefix not in ('', 'torch') else {}
    class_map = _class_map(config, prefix)
    asks = prefix in _STREAMS and is_training and not num_samples
    hint = ' (--train-num-samples N tells how long it is)' if asks else ''
    hint = f' with the classes of --class-map {config.class_map}' if config.class_map else hint
    what = f'split {split!r} of --dataset {config.dataset!r} at {config.data_dir!r} cannot be read{hint}'
    with as_user_error(what), image_endings():
        dataset = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=is_training,
            class_map=class_map or '',
            download=config.dataset_download,
            batch_size=config.batch_size,
            num_samples=num_samples,
            repeats=getattr(config, 'epoch_repeats', 0) if is_training else 0,
            seed=seed,
            input_img_mode=image_mode,
            trust_remote_code=config.dataset_trust_remote_code,
            **keys,
        )
    if prefix == 'hfids':
        _learn_classes(dataset.reader, config)
    if prefix in ('hfds', 'hfids', 'tfds'):
        _check_columns(dataset.reader, config)
    if class_map is not None and prefix != '':
        _check_map_is_whole(class_map, names_of_reader(dataset.reader), config.class_map)
    if prefix == 'wds':
        _check_shards(dataset.reader, split)
    if prefix == '':
        with as_user_error(what):
            leave_out_what_is_no_data(dataset.reader, class_map is not None)
        check_class_folders(dataset.reader, config.class_map)
    if isinstance(dataset, ImageDataset):
        return CheckedImages(dataset.reader, image_mode, config.max_bad_samples)
    if prefix in _STREAMS:
        if not is_training:
            # timm would part it among processes, and repeat or lose images
            dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
        return CheckedStream(dataset.reader, prefix, image_mode, config.max_bad_samples)
    if config.max_bad_samples:
        raise UserError(
            f'--max-bad-samples {config.max_bad_samples}: --dataset {config.dataset!r} is read by torchvision, which '
            f'stops at an image that cannot be read.'
        )
    if isinstance(dataset, ImageFolder):
        leave_hidden_folders_out(dataset)
        dataset.loader = partial(read_image, mode=image_mode)  # torchvision's own clips 16 bits
    # timm leaves torchvision's images as they are
    return ConvertedImages(dataset, image_mode) if prefix == 'torch' else dataset


def _class_map(config: DataConfig, prefix: str) -> Optional[Dict[Any, int]]:
    """The indices that ``--class-map`` gives to classes, None without that flag."""
    if not config.class_map:
        return None
    if prefix in ('torch', 'wds'):
        raise UserError(
            f'--class-map {config.class_map!r}: expected a folder of images, hfds/, hfids/ or tfds/ data, got '
            f'--dataset {config.dataset!r}, whose labels are indices; leave the flag out.'
        )
    return load_class_map(config.class_map, config.data_dir)


def _check_map_is_whole(class_map: Dict[Any, int], names: Dict[int, str], flag: str) -> None:
    """Refuse a class map without a class of the data: each image of it would seem to be broken."""
    missing = [name for index, name in names.items() if name not in class_map and index not in class_map]
    if missing:
        raise UserError(
            f'--class-map {flag!r}: expected an index for every class of the data, got none for '
            f'{printable(", ".join(missing[:5]))}; add {"it" if len(missing) == 1 else "them"}.'
        )


def _check_source(config: DataConfig, split: str, needs_folder: bool) -> str:
    """Refuse data that timm would not find, or take for other data; returns which of timm's sources it is."""
    if not config.dataset and not config.data_dir:
        raise UserError('no data: give a path (./train.py DIR), or --dataset digits, which needs none.')
    prefix, _, name = config.dataset.partition('/')
    if prefix.lower() not in _PREFIXES:  # timm would take it for a folder of images
        raise UserError(
            f'--dataset {config.dataset!r} is unknown: leave it out for a folder of images, or give digits or a name '
            f'that begins with {", ".join(p + "/" for p in _PREFIXES if p)}.'
        )
    prefix = prefix.lower()
    if prefix == 'torch':
        _check_torchvision_has_split(name, config.data_dir, split)
    path = config.data_dir if prefix in ('', 'torch') else name
    looks_local = path == config.data_dir or path.startswith(('/', './', '../'))
    if path and looks_local and not config.dataset_download and not Path(path).exists():
        raise UserError(f'no data at {path!r}: there is no such file or folder.')
    if prefix == '' or name in ('folder', 'image_folder'):
        check_folder_has_split(config.data_dir, split, needs_folder)
    _check_package(config.dataset, prefix)
    return prefix


def _check_package(dataset: str, prefix: str) -> None:
    package = dict(hfds='datasets', hfids='datasets', tfds='tensorflow_datasets', wds='webdataset').get(prefix)
    if package and importlib.util.find_spec(package) is None:
        extra = 'hfds' if package == 'datasets' else prefix
        raise UserError(f'--dataset {dataset} needs the package {package}; {install_hint(extra)}.')


def _learn_classes(reader: Any, config: DataConfig) -> None:
    """Ask the first shard for columns and class names that a streamed data set does not state."""
    info = reader.builder.info
    if info.features is None:
        info.features = reader.builder.as_streaming_dataset(split=reader.split).features
    names = getattr((info.features or {}).get(config.target_key or 'label'), 'names', None)
    if names and not reader.class_to_idx:
        reader.class_to_idx = {name: i for i, name in enumerate(names)}


def _check_columns(reader: Any, config: DataConfig) -> None:
    """Refuse keys that no sample has: each of them would seem to be broken."""
    if hasattr(reader, 'dataset'):
        # timm has added an empty column of that name
        table = reader.dataset.data
        columns = [name for name in table.column_names if table.column(name).null_count < len(table)]
    else:
        columns = reader.builder.info.features or ()
    for flag, keys in (('--input-key', config.input_key or 'image'), ('--target-key', config.target_key or 'label')):
        for key in keys.split(','):
            if columns and not {key.strip(), key.strip().partition('/')[0]}.intersection(columns):
                raise UserError(f'{flag} {keys!r}: {config.dataset!r} has no such column; it has {", ".join(columns)}.')


def _check_shards(reader: Any, split: str) -> None:
    """Refuse a stream whose files are not all there, before it is trained on."""
    shards = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    missing = [path for path in shards if '://' not in path and 'pipe:' not in path and not os.path.exists(path)]
    if missing:
        raise UserError(f'split {split!r}: {len(missing)} of {len(shards)} shards are not there, {missing[0]!r} first.')


def _check_torchvision_has_split(name: str, root: Optional[str], split: str) -> None:
    """Refuse what timm would take for the test images: with these data sets, any split that isn't train."""
    if not root:
        raise UserError(f'--dataset torch/{name} needs a path: ./train.py DIR, or --data-dir DIR.')
    if name.rpartition('/')[2].lower() in _TRAIN_AND_TEST and split not in ('train', 'training', 'test'):
        raise UserError(
            f'torch/{name} has no split {split!r}, only train and test. Leave --val-split out to hold images out of '
            f'train; name test to evaluate.'
        )


def class_names(dataset: Dataset) -> Optional[ClassNames]:
    """The names of the classes by index, None for an index without; None where the data set doesn't tell."""
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
    """Refuse data whose classes have other names, and so other indices, than those trained on."""
    if names and expected and not same_names(names, expected):
        ours, theirs = (', '.join(class_label(some, i) for i in range(min(len(some), 5))) for some in (names, expected))
        raise UserError(
            f'the classes of {what} ({printable(ours)}, ...) are not those that are trained on '
            f'({printable(theirs)}, ...); --class-map FILE gives classes their indices.'
        )


def same_split(split: str, other: str) -> bool:
    """Whether two names stand for the same images, or for some of the same: timm's synonyms, parts of one split."""

    def whole(split: str) -> str:
        name = split.partition('[')[0].lower()
        return next((names[0] for names in SPLIT_FOLDERS if name in names), name)

    return whole(split) == whole(other)


def train_and_val_datasets(config: TrainDataConfig, seed: int = 42) -> Tuple[Dataset, Dataset, Dict[str, Any]]:
    """The data to train on, the data that chooses the best epoch, and a record of which was which.

    Without ``--val-split`` the second is held out of the train split by a seed of its own; the record then holds the
    indices and a key of every image there, so that images that were trained on are never taken for held-out ones.
    """
    train = load_dataset(config, config.train_split, is_training=True, num_samples=config.train_num_samples, seed=seed)
    for flag, given in (('--train-num-samples', config.train_num_samples), ('--epoch-repeats', config.epoch_repeats)):
        if given and not isinstance(train, IterableDataset):
            raise UserError(f'{flag} {given} is for streams alone ({", ".join(f"{p}/" for p in _STREAMS)}).')
    record: Dict[str, Any] = dict(train_split=config.train_split, val_split=config.val_split)
    if not isinstance(train, IterableDataset):
        record.update(train_size=len(train), train_probe=probe_keys(train))
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
    kept, held = hold_out(len(train), config.val_fraction, config.val_seed)
    record.update(
        val_fraction=config.val_fraction,
        val_seed=config.val_seed,
        val_indices=torch.tensor(held),
        val_keys=sample_keys(train, held),
    )
    return TransformSubset(train, kept), TransformSubset(train, held), record
