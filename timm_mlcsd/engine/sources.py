"""The sources of data that timm reads, and the checks that each needs: timm reads wrong data without an error."""

import importlib.util
import os
from pathlib import Path
from typing import Any, Callable, Collection, Dict, NamedTuple, Optional

from .._timm import names_of_reader
from ..data import check_class_folders, check_folder_has_split, exclude_non_images, load_class_map
from ..errors import UserError, first_few, install_hint, printable
from .data_config import DataConfig

__all__ = ['SOURCES', 'STREAMS', 'Source', 'check_source', 'read_class_map']

_TRAIN_AND_TEST = ('cifar10', 'cifar100', 'mnist', 'kmnist', 'fashion_mnist')


class Source(NamedTuple):
    """One of the ways in which timm reads data.

    Attributes:
        check: Function that checks an opened reader, with the configuration, the split and the class map; None where
            the data set checks itself.
        package: Package that it needs, beside timm's own.
        extra: Extra that installs the package.
        is_stream: Whether its data set is iterable.
        has_keys: Whether samples have named fields (``--input-key``).
        has_class_names: Whether labels have names, so that a class map can give them indices.
    """

    check: Optional[Callable[[Any, DataConfig, str, Optional[Dict[Any, int]]], None]] = None
    package: Optional[str] = None
    extra: str = ''
    is_stream: bool = False
    has_keys: bool = True
    has_class_names: bool = True


def check_source(config: DataConfig, split: str, needs_folder: bool) -> str:
    """Refuse data that timm would not find, or would mistake for other data.

    Args:
        config: The data.
        split: Name of the split.
        needs_folder: Whether a folder without splits is an error.

    Returns:
        The key of `SOURCES`.

    Raises:
        UserError: The data is refused, or a package is missing.
    """
    if not config.dataset and not config.data_dir:
        raise UserError('no data: give a path (./train.py DIR), or --dataset digits, which needs none.')
    prefix, _, name = config.dataset.partition('/')
    if prefix.lower() not in SOURCES:  # timm would take it for a folder of images
        raise UserError(
            f'--dataset {config.dataset!r} is unknown: leave it out for a folder of images, or give digits or a name '
            f'that begins with {", ".join(p + "/" for p in SOURCES if p)}.'
        )
    prefix = prefix.lower()
    if prefix == 'torch':
        _check_torchvision_has_split(name, config.data_dir, split)
    path = config.data_dir if prefix in ('', 'torch') else name
    looks_local = path is not None and (path == config.data_dir or path.startswith(('/', './', '../')))
    if path and looks_local and not config.dataset_download and not Path(path).exists():
        raise UserError(f'no data at {path!r}: there is no such file or folder.')
    if config.data_dir is not None and (prefix == '' or name in ('folder', 'image_folder')):
        check_folder_has_split(config.data_dir, split, needs_folder)
    source = SOURCES[prefix]
    if source.package and importlib.util.find_spec(source.package) is None:
        raise UserError(f'--dataset {config.dataset} needs the package {source.package}; {install_hint(source.extra)}.')
    return prefix


def read_class_map(config: DataConfig, source: Source) -> Optional[Dict[Any, int]]:
    """The indices that ``--class-map`` gives to classes, None without that flag.

    Raises:
        UserError: The file is wrong, or the source has no names of classes.
    """
    if not config.class_map:
        return None
    if not source.has_class_names:
        raise UserError(
            f'--class-map {config.class_map!r}: expected a folder of images, hfds/, hfids/ or tfds/ data, got '
            f'--dataset {config.dataset!r}, whose labels are indices; leave the flag out.'
        )
    return load_class_map(config.class_map, config.data_dir)


def _check_folder(reader: Any, config: DataConfig, split: str, class_map: Optional[Dict[Any, int]]) -> None:
    exclude_non_images(reader, class_map is not None)
    check_class_folders(reader, config.class_map)


def _check_table(reader: Any, config: DataConfig, split: str, class_map: Optional[Dict[Any, int]]) -> None:
    """Refuse keys that no sample has, and a class map without a class: each sample of it would seem to be broken."""
    _check_names_of_files(reader, config)
    if hasattr(reader, 'dataset'):
        # timm has added an empty column of that name
        table = reader.dataset.data
        columns: Collection[str] = [name for name in table.column_names if table.column(name).null_count < len(table)]
    else:
        columns = reader.builder.info.features or ()
    for flag, keys in (('--input-key', config.input_key or 'image'), ('--target-key', config.target_key or 'label')):
        for key in keys.split(','):
            if columns and not {key.strip(), key.strip().partition('/')[0]}.intersection(columns):
                raise UserError(f'{flag} {keys!r}: {config.dataset!r} has no such column; it has {", ".join(columns)}.')
    if class_map is None:
        return
    names = names_of_reader(reader).items()
    missing = [name for index, name in names if name not in class_map and index not in class_map]
    if missing:
        raise UserError(
            f'--class-map {config.class_map!r}: expected an index for every class of the data, got none for '
            f'{first_few(missing)}; add {"it" if len(missing) == 1 else "them"}.'
        )


def _check_names_of_files(reader: Any, config: DataConfig) -> None:
    """Refuse a folder of Parquet files that order the class names differently: one order is used for all files."""
    prefix, _, place = config.dataset.partition('/')
    if prefix.lower() not in ('hfds', 'hfids') or not os.path.isdir(place):
        return
    import datasets
    from pyarrow import parquet

    builder = getattr(reader, 'builder', None) or datasets.load_dataset_builder(place)
    files = {path for paths in (builder.config.data_files or {}).values() for path in paths}
    key, first = config.target_key or 'label', None
    for path in sorted(path for path in files if path.endswith('.parquet') and os.path.isfile(path)):
        features = datasets.Features.from_arrow_schema(parquet.read_schema(path))
        names = getattr(features.get(key), 'names', None)
        first = first or (names and (path, names))
        if first and names and names != first[1]:
            raise UserError(
                f'{printable(first[0])!r} and {printable(path)!r} have other class names or another order of '
                f'them ({first_few(first[1])} and {first_few(names)}); write all files with the same classes.'
            )


def _check_hub_stream(reader: Any, config: DataConfig, split: str, class_map: Optional[Dict[Any, int]]) -> None:
    """Ask the first shard for columns and class names that a streamed data set does not state, and check them."""
    info = reader.builder.info
    if info.features is None:
        info.features = reader.builder.as_streaming_dataset(split=reader.split).features
    names = getattr((info.features or {}).get(config.target_key or 'label'), 'names', None)
    if names and not reader.class_to_idx:
        reader.class_to_idx = {name: i for i, name in enumerate(names)}
    _check_table(reader, config, split, class_map)


def _check_shards(reader: Any, config: DataConfig, split: str, class_map: Optional[Dict[Any, int]]) -> None:
    """Refuse a stream some of whose files are missing."""
    shards = [os.path.join(reader.root, name) for name in reader.split_info.filenames]
    missing = [path for path in shards if '://' not in path and 'pipe:' not in path and not os.path.exists(path)]
    if missing:
        raise UserError(f'split {split!r}: {len(missing)} of {len(shards)} shards are not there, {missing[0]!r} first.')


def _check_torchvision_has_split(name: str, root: Optional[str], split: str) -> None:
    """Refuse names that timm would take for the test images: with these data sets, any split that is not train."""
    if not root:
        raise UserError(f'--dataset torch/{name} needs a path: ./train.py DIR, or --data-dir DIR.')
    if name.rpartition('/')[2].lower() in _TRAIN_AND_TEST and split not in ('train', 'training', 'test'):
        raise UserError(
            f'torch/{name} has no split {split!r}, only train and test. Leave --val-split out to hold images out of '
            f'train; name test to evaluate.'
        )


# by the part of --dataset before the slash
SOURCES: Dict[str, Source] = {
    '': Source(_check_folder, has_keys=False),
    'hfds': Source(_check_table, 'datasets', 'hfds'),
    'hfids': Source(_check_hub_stream, 'datasets', 'hfds', is_stream=True),
    'tfds': Source(_check_table, 'tensorflow_datasets', 'tfds', is_stream=True),
    'torch': Source(has_keys=False, has_class_names=False),
    'wds': Source(_check_shards, 'webdataset', 'wds', is_stream=True, has_class_names=False),
}
STREAMS = tuple(name for name, source in SOURCES.items() if source.is_stream)
