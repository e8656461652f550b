"""Image files of data sets, compared by their contents."""

import functools
import hashlib
import os
import stat
import tarfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from ..data import ConvertedImages, TransformSubset

__all__ = ['ImageFile', 'ImageFiles', 'files_among', 'files_of', 'share_among']

# images that are looked for among others, so that few of those have the same size and must be read
_SAMPLE = 64


class ImageFile(NamedTuple):
    """An image file, or a member of a tar file: its size in bytes, and a function that reads it."""

    size: int
    read: Callable[[], bytes]

    def content(self) -> Optional[bytes]:
        """Digest of the file; None if it cannot be read."""
        try:
            return hashlib.sha256(self.read()).digest()
        except (OSError, tarfile.TarError):
            return None


ImageFiles = Dict[str, ImageFile]


def files_of(dataset: Any, indices: Optional[Iterable[int]] = None) -> ImageFiles:
    """Find the files of a data set.

    Args:
        dataset: Data set of `load_dataset`.
        indices: Indices of images; default None for all.

    Returns:
        Files by their paths, in real folders; none for data sets without files.
    """
    if isinstance(dataset, TransformSubset):
        return files_of(dataset.dataset, dataset.indices)
    if isinstance(dataset, ConvertedImages):
        return files_of(dataset.dataset, indices)
    # timm's folders and tar files have a reader, torchvision's folders the list of their files
    reader: Any = getattr(dataset, 'reader', dataset)
    if not hasattr(reader, 'samples'):
        return {}
    chosen = range(len(reader.samples)) if indices is None else indices
    if not hasattr(reader, 'class_name_to_idx'):
        is_timm = hasattr(reader, 'filename')
        paths = [reader.filename(i, absolute=True) if is_timm else reader.samples[i][0] for i in chosen]
        return dict(_regular_files(paths))
    members = [(i, *reader.samples[i]) for i in chosen]
    return {
        f'{os.path.realpath(reader.root)}/{parent or ""}/{child.name if child else ""}/{info.path}': ImageFile(
            info.size, partial(_read_member, reader, i)
        )
        for i, info, parent, child in members
    }


def _regular_files(paths: Iterable[str]) -> Iterator[Tuple[str, ImageFile]]:
    real = functools.cache(os.path.realpath)  # of folders; a linked file is recognised by its content
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            continue  # counted as broken later
        if stat.S_ISREG(status.st_mode):
            folder, name = os.path.split(path)
            yield os.path.join(real(folder), name), ImageFile(status.st_size, Path(path).read_bytes)


def _read_member(reader: Any, index: int) -> bytes:
    content: bytes = reader[index][0].read()
    return content


def files_among(files: ImageFiles, others: ImageFiles) -> List[str]:
    """Names of those files that are among the others, themselves or as copies."""
    sizes = {file.size for file in files.values()}
    contents = {file.content() for file in others.values() if file.size in sizes}  # the other sizes need no reading
    contents.discard(None)
    return [name for name, file in files.items() if name in others or (contents and file.content() in contents)]


def share_among(files: ImageFiles, others: ImageFiles) -> float:
    """Share of a sample of at most 64 files that are among the others, from 0 to 1."""
    if not files or not others:
        return 0.0
    names = [*files][:: -(-len(files) // _SAMPLE)]
    return len(files_among({name: files[name] for name in names}, others)) / len(names)
