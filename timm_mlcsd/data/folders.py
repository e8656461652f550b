"""Check folders and tar files of images: exclude files that are not images, and find the splits."""

import contextlib
import logging
import os
import re
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple, Union

import numpy as np
from PIL import Image

from .._timm import get_img_extensions, set_img_extensions
from ..errors import UserError, first_few, printable
from .class_names import check_look_alikes

__all__ = [
    'IMAGE_ENDINGS',
    'SPLIT_FOLDERS',
    'check_class_folders',
    'check_folder_has_split',
    'exclude_hidden_folders',
    'exclude_non_images',
    'explain_unsortable_names',
    'has_split_folders',
    'image_endings',
    'is_hidden',
    'natural_order',
]

_logger = logging.getLogger(__name__)

# names of split folders that timm treats as equal
SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'), ('test',))
_KNOWN_SPLITS = {name for names in SPLIT_FOLDERS for name in names}
IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.tif', '.tiff')
# other image formats, which Pillow does not read without a further package
_OTHER_IMAGE_ENDINGS = {'.heic', '.heif', '.jxl', '.svg', '.raw', '.dng', '.cr2', '.cr3', '.nef', '.arw', '.npy'}
# files of a folder beside the classes that is not a class
_TEXT_ENDINGS = {'.txt', '.md', '.rst', '.html', '.xml', '.json', '.yaml', '.yml', '.csv', '.tsv', '.log', '.py', '.sh'}
# files and folders that file managers and archivers create
_SYSTEM_NAMES = {'__macosx', '@eadir', 'thumbs.db', 'desktop.ini', '$recycle.bin', 'system volume information'}


@contextlib.contextmanager
def image_endings() -> Iterator[None]:
    """Let timm readers that are created in this context read all `IMAGE_ENDINGS`; timm reads PNG and JPEG only."""
    before = get_img_extensions()
    set_img_extensions(IMAGE_ENDINGS)
    try:
        yield
    finally:
        set_img_extensions(before)


@contextlib.contextmanager
def explain_unsortable_names() -> Iterator[None]:
    """Say what to do about names that timm's natural order cannot sort: with digits such as ² and ①."""
    try:
        yield
    except ValueError as e:
        digit = str(e).rpartition(': ')[2].strip("'")
        if not digit.isdigit() or digit.isdecimal():
            raise  # another error than that of timm's key, which takes each isdigit() for an integer
        raise UserError(
            f'the name of a file or folder contains {digit!r}, a digit that timm cannot sort by; rename it.'
        ) from e


def natural_order(name: str) -> Tuple[List[Union[int, str]], str]:
    """Key of timm's natural order, in which names that timm takes for equal (a and A, 1 and 01) have an order too.

    timm leaves their order to the hash seed of the process, so that two processes may give a class two indices.

    Args:
        name: Name or path.
    """
    parts = re.split(r'(\d+)', name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def is_hidden(path: str) -> bool:
    """Whether a path below a data folder is hidden or a system file, such as ``._0.png`` of macOS."""
    parts = [part for part in path.replace('\\', '/').split('/') if part not in ('', '.', '..')]
    return any(part.startswith('.') or part.lower() in _SYSTEM_NAMES for part in parts)


def exclude_non_images(reader: Any, class_map: bool = False) -> None:
    """Remove hidden files from a reader, sort its classes and files, and log one warning about all files not read.

    Args:
        reader: timm reader of a folder or a tar file, created in the context of `image_endings`.
        class_map: Whether the class indices come from a class map and are kept; default False.

    Raises:
        UserError: Images are outside of class folders, a class folder has no readable image, the names of two
            classes look the same, or a tar file has images twice or as links.
    """
    paths = _image_paths(reader)
    keep = [not is_hidden(path) for path in paths]
    _check_twice([path for path, kept in zip(paths, keep) if kept], reader)
    _keep_samples(reader, keep, class_map)
    files = [path for path in _all_files(reader) if not is_hidden(path)]
    unread = [path for path in files if os.path.splitext(path)[1].lower() not in IMAGE_ENDINGS]
    _check_flat([path for path, kept in zip(paths, keep) if kept], reader)
    if not class_map:
        _check_empty_classes(reader, files, unread)
        check_look_alikes(_classes(reader), repr(printable(str(reader.root))))
    counts = Counter(os.path.splitext(path)[1].lower() or 'without an ending' for path in unread)
    left_out = [f'{count} {printable(ending)}' for ending, count in counts.most_common(8)]
    hidden = len(keep) - sum(keep)
    if hidden:
        left_out.append(f'{hidden} hidden (._*, .*, __MACOSX)')
    if left_out:
        _logger.warning(
            f'{printable(str(reader.root))}: left out {", ".join(left_out)}; images are files that end in '
            f'{", ".join(IMAGE_ENDINGS)}'
        )


def _classes(reader: Any) -> Dict[str, int]:
    # timm's tar reader uses another name for the attribute
    classes: Dict[str, int] = reader.class_to_idx if hasattr(reader, 'class_to_idx') else reader.class_name_to_idx
    return classes


def _image_paths(reader: Any) -> List[str]:
    """List the path of every sample below the root; a tar file inside the tar file counts as a folder."""
    if hasattr(reader, 'class_to_idx'):
        return [os.path.relpath(path, reader.root) for path, _ in reader.samples]
    inner = [child.name.removesuffix('.tar') if child is not None else '' for _, _, child in reader.samples]
    paths = [os.path.normpath(info.path).lstrip('/') for info, _, _ in reader.samples]
    return [os.path.join(folder, path) for folder, path in zip(inner, paths)]


def _keep_samples(reader: Any, keep: Sequence[bool], class_map: bool) -> None:
    """Remove samples from a reader, and classes without remaining samples, so that the indices have no gaps."""
    paths, order = _image_paths(reader), list(range(len(keep)))
    if len({_without_ties(path) for path in paths}) < len(paths):
        order.sort(key=lambda i: natural_order(paths[i]))
    in_order = class_map or list(_classes(reader)) == sorted(_classes(reader), key=natural_order)
    if all(keep) and in_order and order == list(range(len(keep))):
        return
    is_folder = hasattr(reader, 'class_to_idx')
    targets = [target for _, target in reader.samples] if is_folder else reader.targets.tolist()
    classes = _classes(reader)
    if not class_map:
        used = {target for target, kept in zip(targets, keep) if kept}
        names = sorted((name for name, index in classes.items() if index in used), key=natural_order)
        new_index = {classes[name]: index for index, name in enumerate(names)}
        classes = {name: index for index, name in enumerate(names)}
        targets = [new_index.get(target) for target in targets]
    kept = [i for i in order if keep[i]]
    if is_folder:
        reader.samples = [(reader.samples[i][0], targets[i]) for i in kept]
        reader.class_to_idx = classes
    else:
        reader.samples = reader.samples[kept]
        reader.targets = np.array([targets[i] for i in kept], dtype=np.int64)
        reader.class_name_to_idx = classes
        reader.class_idx_to_name = {index: name for name, index in classes.items()}
    if not len(reader.samples):
        raise UserError(
            f'{printable(str(reader.root))!r} contains hidden files only (._*, .*, __MACOSX), and no image.'
        )


def _without_ties(path: str) -> str:
    """The same text for paths that are equal in timm's natural order."""
    return re.sub(r'(?<!\d)0+(?=\d)', '', path.lower())


def _all_files(reader: Any) -> List[str]:
    """List all files of a reader's folder or tar file, and empty folders with a slash at the end."""
    if hasattr(reader, 'class_to_idx'):
        return _walk(str(reader.root))
    with tarfile.open(reader.root) as tar:
        members = [member for member in tar if not is_hidden(member.name)]
    found = [os.path.normpath(member.name).lstrip('/') for member in members if member.isfile()]
    _check_links([member for member in members if member.issym() or member.islnk()], found, reader)
    return [path for path in found if not path.endswith('.tar')]


def _check_links(links: Sequence[tarfile.TarInfo], files: Sequence[str], reader: Any) -> None:
    """Refuse links to images in a tar file, which timm skips, and links to folders outside of it."""
    present = {*files, *(str(folder) for file in files for folder in Path(file).parents)}
    missing = []
    for link in links:
        ending = os.path.splitext(link.name)[1].lower()
        target = os.path.normpath(os.path.join(os.path.dirname(link.name), link.linkname)).lstrip('/')
        if ending in IMAGE_ENDINGS or (link.issym() and ending not in _TEXT_ENDINGS and target not in present):
            missing.append(link.name)
    if missing:
        raise UserError(
            f'{printable(str(reader.root))!r} has {len(missing)} images or folders as links ({printable(missing[0])} '
            f'first), which would be missing; pack the files themselves (tar --dereference --hard-dereference).'
        )


def _check_twice(paths: Sequence[str], reader: Any) -> None:
    """Refuse a tar file with a path twice, as after ``tar --append``: both images would be read."""
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(
            f'{printable(str(reader.root))!r} has images twice ({len(twice)}, {printable(twice[0])} first), as '
            f'after tar --append; unpack it, which keeps the newer ones, and pack the folder again.'
        )


def _walk(root: str) -> List[str]:
    """List all files below a folder, and empty folders with a slash at the end.

    Args:
        root: Folder to search.

    Raises:
        UserError: A symbolic link leads to a folder that contains it, or to a file below `root`. Its images would be
            counted twice, possibly both for training and held out.
    """
    found: List[str] = []
    links: List[str] = []
    plain: Dict[str, str] = {}
    folders_seen: Dict[str, str] = {}
    for place, folders, files in os.walk(root, followlinks=True):
        below, real = os.path.normpath(os.path.relpath(place, root)), os.path.realpath(place)
        if os.path.islink(place) and f'{os.path.realpath(os.path.dirname(place))}/'.startswith(f'{real}/'):
            raise UserError(_duplicate_message(place, real))
        if real in folders_seen:
            _logger.warning(_duplicate_message(place, folders_seen[real]))
        folders_seen[real] = place
        for name in files:
            path = os.path.join(place, name)
            found.append(os.path.normpath(os.path.join(below, name)))
            if os.path.islink(path):
                links.append(path)
            else:
                plain[os.path.join(real, name)] = path
        found += [f'{below}/'] if not files and not folders and place != root else []
    for link in links:
        other = plain.setdefault(os.path.realpath(link), link)
        if other != link:
            raise UserError(_duplicate_message(link, other))
    return found


def _duplicate_message(link: str, other: str) -> str:
    return (
        f'{printable(link)!r} is {printable(other)!r} by a symbolic link: the same images would be there twice; remove '
        f'the link.'
    )


def exclude_hidden_folders(dataset: Any) -> None:
    """Remove hidden files and hidden class folders from torchvision's ``ImageFolder``."""
    root = dataset.root
    keep = [not is_hidden(os.path.relpath(path, root)) for path, _ in dataset.samples]
    names = [name for name in dataset.classes if not is_hidden(name)]
    new_index = {dataset.class_to_idx[name]: index for index, name in enumerate(names)}
    dataset.samples = [(path, new_index[t]) for (path, t), stays in zip(dataset.samples, keep) if stays]
    dataset.imgs, dataset.targets = dataset.samples, [target for _, target in dataset.samples]
    dataset.classes, dataset.class_to_idx = names, {name: index for index, name in enumerate(names)}
    if not all(keep):
        _logger.warning(f'{printable(str(root))}: left out {len(keep) - sum(keep)} hidden files (._*, .*, __MACOSX)')
    check_look_alikes(names, repr(printable(str(root))))


def _check_flat(paths: Sequence[str], reader: Any) -> None:
    """Refuse images outside of class folders, which would form a class without a name."""
    flat = [path for path in paths if not os.path.dirname(path)]
    if flat:
        root = printable(str(reader.root))
        count = f'{len(flat)} images lie' if len(flat) < len(paths) else 'images lie'
        is_split = _is_split(os.path.basename(os.path.normpath(str(reader.root))))
        hint = ' If it is a class, rename it: folders of this name are treated as a split.' if is_split else ''
        raise UserError(
            f'{count} in {root} itself ({printable(flat[0])} first); put them into one folder per class.{hint}'
        )


def _check_empty_classes(reader: Any, files: Sequence[str], unread: Sequence[str]) -> None:
    """Refuse class folders without a readable image: empty ones, and ones with files that may be images."""
    images = _image_endings_of_pillow()
    has_images = {os.path.dirname(path) for path in _image_paths(reader)}
    above = {os.path.dirname(folder) for folder in has_images}
    lost: Dict[str, Counter[str]] = defaultdict(Counter)
    for path in unread:
        folder, ending = os.path.dirname(path.rstrip('/')), os.path.splitext(path)[1].lower()
        if path.endswith('/'):
            if folder in above:
                lost[path.rstrip('/')]['no file'] += 1
        elif folder and folder not in has_images:
            may_be_images = ending not in _TEXT_ENDINGS if os.path.dirname(folder) in above else ending in images
            if may_be_images:
                lost[folder][ending or 'without an ending'] += 1
    for folder, endings in sorted(lost.items()):
        found = ', '.join(f'{count} {ending}' for ending, count in endings.items()) if 'no file' not in endings else ''
        name = printable(os.path.join(str(reader.root), folder))
        raise UserError(
            f'{name!r} contains {found or "no file"}, and no image that can be read: the class would be lost; '
            + (f'convert them to one of {", ".join(IMAGE_ENDINGS)}, or' if found else 'add images, or')
            + ' remove the folder.'
        )


def _image_endings_of_pillow() -> Set[str]:
    Image.init()
    return {ending for ending, format in Image.EXTENSION.items() if format in Image.OPEN} | _OTHER_IMAGE_ENDINGS


def has_split_folders(root: str) -> bool:
    """Whether a folder of images contains folders for splits, such as ``train`` or ``val``."""
    return bool(_folders_in(root) & _KNOWN_SPLITS)


def _folders_in(root: str) -> Set[str]:
    return {path.name for path in Path(root).iterdir() if path.is_dir()} if Path(root).is_dir() else set()


def check_folder_has_split(root: str, split: str, needs_folder: bool) -> None:
    """Check that a folder of images has a split, because timm would otherwise use the images of all splits.

    Args:
        root: Folder of images.
        split: Name of the split.
        needs_folder: Whether to refuse a folder without any splits too.

    Raises:
        UserError: The folder does not have the split.
    """
    folders = _folders_in(root)
    accepted = next((names for names in SPLIT_FOLDERS if split in names), (split,))
    if not folders.intersection(accepted) and (needs_folder or has_split_folders(root)):
        if has_split_folders(root):
            raise UserError(f'{root!r} has no split {split!r}; it has {", ".join(sorted(folders))}.')
        raise UserError(
            f'{root!r} is not divided into splits: split {split!r} would contain the training images. '
            f'Leave --val-split out to hold images out of it; validate.py --held-out evaluates those, with --adaptive '
            f'too.'
        )


def check_class_folders(reader: Any, class_map: str) -> None:
    """Refuse a reader that mixes the images of several splits, and log the classes that a class map leaves out.

    timm names a class by its innermost folder only, so it mixes splits in a tar file or in folders of unusual names.

    Args:
        reader: timm reader of a folder or a tar file.
        class_map: Path of ``--class-map``; empty without one.

    Raises:
        UserError: Images of several splits are mixed.
    """
    folders = _class_folders(reader)
    above = os.path.commonpath(folders) if len(folders) > 1 else ''
    places: Dict[str, Set[str]] = defaultdict(set)
    for folder in folders:
        *outer, name = os.path.relpath(folder, above or None).split(os.sep)
        places[name].add(outer[0] if outer else '')
    groups = [sorted(filter(_is_split, tops)) for tops in places.values()]
    mixed = next((splits for splits in (*groups, sorted(filter(_is_split, places))) if len(splits) > 1), None)
    if mixed:
        advice = (
            'use one of them as DIR, or rename them to train, val and test, with one folder per class in each'
            if os.path.isdir(reader.root)
            else 'unpack it, or make one tar file per split'
        )
        raise UserError(f'{reader.root!r} has images in {", ".join(mixed)}, which would be mixed; {advice}.')
    merged = sorted(name for name, count in Counter(map(os.path.basename, folders)).items() if count > 1)
    if merged:
        _logger.warning(
            f'{printable(str(reader.root))}: folders of one name are one class, wherever they lie: {first_few(merged)}'
        )
    if class_map and os.path.isdir(reader.root) and hasattr(reader, 'class_to_idx'):
        found = _folders_with_images(reader.root)
        left_out = sorted(found - reader.class_to_idx.keys())
        unused = sorted(map(str, reader.class_to_idx.keys() - found))
        if left_out:
            check_look_alikes([*left_out, *map(str, reader.class_to_idx)], f'--class-map {class_map!r} and the folders')
            _logger.warning(f'--class-map {class_map} leaves out {len(left_out)} classes: {first_few(left_out)}')
        if unused:
            _logger.warning(f'--class-map {class_map} has {len(unused)} classes without images: {first_few(unused)}')


def _class_folders(reader: Any) -> Set[str]:
    """Collect the folders of the images as paths from the root; empty for a folder of tar files, one per class."""
    if getattr(reader, 'root_is_tar', False):
        return {os.path.dirname(os.path.normpath(info.path)).lstrip('/') for info, _, _ in reader.samples}
    if not hasattr(reader, 'class_to_idx'):
        return set()
    return {os.path.relpath(folder, reader.root) for folder in {os.path.dirname(path) for path, _ in reader.samples}}


def _is_split(folder: str) -> bool:
    return bool(
        re.fullmatch(r'(train|training|val|valid|validation|test|testing|eval|evaluation|dev)\W?\d*', folder, re.I)
    )


def _folders_with_images(root: str) -> Set[str]:
    """Collect the names of the folders that contain images, at any depth."""
    return {
        os.path.basename(place)
        for place, _, files in os.walk(root, followlinks=True)
        if place != root
        and not is_hidden(os.path.relpath(place, root))
        and any(os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not is_hidden(name) for name in files)
    }
