"""What timm would make of folders and tar files of images without a word: splits mixed, classes left out."""

import argparse
import logging
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Set

from timm.data.readers.img_extensions import get_img_extensions

from ..errors import UserError

__all__ = ['SPLIT_FOLDERS', 'check_class_folders', 'check_folder_has_split']

_logger = logging.getLogger(__name__)

# what timm takes for one another
SPLIT_FOLDERS = (('train', 'training'), ('val', 'valid', 'validation', 'eval', 'evaluation'), ('test',))


def check_folder_has_split(root: str, split: str, needs_folder: bool) -> None:
    """Refuse a split that a folder of splits doesn't have; timm would take all its images, whatever their split."""
    folders = {p.name for p in Path(root).iterdir() if p.is_dir()} if Path(root).is_dir() else set()
    accepted = next((names for names in SPLIT_FOLDERS if split in names), (split,))
    known = {name for names in SPLIT_FOLDERS for name in names}
    if not folders.intersection(accepted) and (needs_folder or folders & known):
        if folders & known:
            raise UserError(f'{root!r} has no split {split!r}; it has {", ".join(sorted(folders))}.')
        raise UserError(
            f'{root!r} is not divided into splits: as split {split!r} it would give the images that are trained on. '
            f'Leave --val-split out to hold images out of it; validate.py --held-out evaluates those.'
        )


def check_class_folders(reader: Any, args: argparse.Namespace) -> None:
    """Refuse splits that timm has mixed, because their folders have other names or lie in a tar file: it calls a class
    by its innermost folder alone. Say which classes a class map leaves out.

    Args:
        reader: timm's, of a folder or a tar file.
        args: The flags.

    Raises:
        UserError: Training and test images are mixed.
    """
    folders = _class_folders(reader)
    above = os.path.commonpath(folders) if len(folders) > 1 else ''
    places: Dict[str, Set[str]] = defaultdict(set)
    for folder in folders:
        *outer, name = os.path.relpath(folder, above or None).split(os.sep)
        places[name].add(outer[0] if outer else '')
    mixed = [sorted(filter(_is_split, tops)) for tops in places.values()]
    mixed = next((splits for splits in (*mixed, sorted(filter(_is_split, places))) if len(splits) > 1), None)
    if mixed:
        way_out = (
            'give one of them as DIR, or let it hold train, val and test with a folder per class in each'
            if os.path.isdir(reader.root)
            else 'unpack it, or make a tar file of each'
        )
        raise UserError(f'{reader.root!r} has images in {", ".join(mixed)}, which would be mixed: {way_out}.')
    if args.class_map and os.path.isdir(reader.root) and hasattr(reader, 'class_to_idx'):
        left_out = sorted(_folders_with_images(reader.root) - reader.class_to_idx.keys())
        if left_out:
            few = f'{", ".join(left_out[:5])}{", ..." if len(left_out) > 5 else ""}'
            _logger.warning(f'--class-map {args.class_map} leaves out {len(left_out)} classes: {few}')


def _class_folders(reader: Any) -> Set[str]:
    """Where images lie, as paths from the root; of tar files in a folder nothing: each is a class."""
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
    """Names of the folders that hold images, at any depth."""
    suffixes = set(get_img_extensions())
    return {
        os.path.basename(place)
        for place, _, files in os.walk(root, followlinks=True)
        if place != root and any(os.path.splitext(name)[1].lower() in suffixes for name in files)
    }
