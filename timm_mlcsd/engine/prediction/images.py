"""The images to label: files, folders and patterns of files, or a data set as in training."""

import fnmatch
import glob
import logging
import os
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Callable, Collection, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from torch.utils.data import Dataset, IterableDataset

from ...data import (
    IMAGE_ENDINGS,
    IMAGE_MODE,
    CheckedImages,
    CheckedStream,
    default_image_mode,
    is_hidden,
    natural_order,
    num_images,
)
from ...errors import UserError, as_user_error, printable
from ..data_config import DataConfig
from ..datasets import load_dataset

__all__ = ['Images', 'NumberedImages', 'NumberedStream', 'find_images', 'load_images']

_logger = logging.getLogger('predict')

# every image that can be read is labelled before the others are an error
NO_LIMIT = 2**31


class Images(NamedTuple):
    """Images to label.

    Attributes:
        dataset: Data set of (image, target), with None for an image that cannot be read; or a stream without those.
        names: Name per image, [N], a path or else the number of the image in the data set; None for a stream, whose
            images are named by their numbers.
    """

    dataset: Dataset[Any]
    names: Optional[List[str]]


class _Files:
    """A reader, in timm's sense, of files without classes."""

    def __init__(self, paths: Sequence[str]):
        self.samples = paths

    def __getitem__(self, index: int) -> Tuple[BinaryIO, None]:
        return open(self.samples[index], 'rb'), None

    def __len__(self) -> int:
        return len(self.samples)

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.samples[index]


class NumberedImages(Dataset[Any]):
    """Some images of a data set, each with its number in the data set as target.

    Args:
        dataset: Data set of (image, target) without a transform, with None for an image that cannot be read.
        numbers: Numbers of the images.
    """

    def __init__(self, dataset: Dataset[Any], numbers: Sequence[int]):
        self.dataset = dataset
        self.numbers = numbers
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Optional[Tuple[Any, int]]:
        sample = self.dataset[self.numbers[index]]
        if sample is None:
            return None
        return self.transform(sample[0]) if self.transform else sample[0], self.numbers[index]

    def __len__(self) -> int:
        return len(self.numbers)


class NumberedStream(IterableDataset[Any]):
    """Some images of a stream, each with its number in the stream as target.

    The numbers are those of a single process that reads the stream, so a loader must not have more than one.

    Args:
        dataset: Stream of (image, target) without a transform.
        done: Numbers of images to leave out.
        rank: Rank of this process: of `size` processes, each has the images whose number leaves its rank as remainder.
        size: Number of processes.
    """

    def __init__(self, dataset: IterableDataset[Any], done: Collection[int] = (), rank: int = 0, size: int = 1):
        self.dataset = dataset
        self.done = done
        self.rank = rank
        self.size = size
        self.transform: Optional[Callable[..., Any]] = None

    def __iter__(self) -> Iterator[Tuple[Any, int]]:
        for number, (image, _) in zip(count(), self.dataset):
            if number % self.size == self.rank and number not in self.done:
                yield self.transform(image) if self.transform else image, number


def find_images(inputs: Sequence[str]) -> List[str]:
    """Find the image files that inputs stand for.

    Args:
        inputs: Files, folders, which are searched at all depths, and patterns with ``*``, ``**``, ``?`` or ``[]``.

    Returns:
        Paths, [N], each once; those of a folder or a pattern in natural order. A file that is named itself is in the
        list whether it exists or not.

    Raises:
        UserError: A folder or a pattern has no image.
    """
    found: Dict[Tuple[str, str], str] = {}
    real = lru_cache(maxsize=None)(os.path.realpath)  # many files share a folder
    for text in inputs:
        if os.path.isdir(text):
            paths = _images_below(text)
        elif glob.has_magic(text) and not os.path.lexists(text):
            paths = _images_of_pattern(text)
        else:
            paths = [text]
        for path in paths:
            folder, name = os.path.split(path)
            # without links in the folder, because lnk/../x.png is not ./x.png; a link to a file is a name of its own
            found.setdefault((real(folder), name), path)
    return list(found.values())


def _has_image_ending(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_ENDINGS


def _images_of_pattern(pattern: str) -> List[str]:
    """Paths of the images of a pattern, with a warning that counts the hidden ones, as for a folder."""
    matches = sorted(glob.glob(pattern, recursive=True), key=natural_order)
    images = [path for path in matches if os.path.isfile(path) and _has_image_ending(path)]
    parts = Path(pattern).parts
    paths = [path for path in images if not is_hidden(path) or _is_asked_for(Path(path).parts, parts)]
    hidden = len(images) - len(paths)
    if not paths:
        hint = f'; {hidden} hidden left out' if hidden else ''
        hint += '; [[] stands for a bracket' if '[' in pattern else ''
        raise UserError(
            f'{pattern!r}: no file of this pattern is an image; images end in {", ".join(IMAGE_ENDINGS)}{hint}.'
        )
    _warn_of_others(pattern, Counter(hidden=hidden))
    return paths


def _is_asked_for(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a pattern matches a path, part by part, without a wildcard for a hidden folder or file."""
    if not pattern or not path:
        return not path and all(part == '**' for part in pattern)
    if pattern[0] == '**':
        return _is_asked_for(path, pattern[1:]) or (not is_hidden(path[0]) and _is_asked_for(path[1:], pattern))
    # a hidden part of the pattern was written by the user
    fits = fnmatch.fnmatch(path[0], pattern[0]) and (is_hidden(pattern[0]) or not is_hidden(path[0]))
    return fits and _is_asked_for(path[1:], pattern[1:])


def _images_below(folder: str) -> List[str]:
    """Paths of the images in a folder, with a warning that counts the files of other kinds."""
    paths: List[str] = []
    left_out: Counter[str] = Counter()
    seen: Set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        below = os.path.relpath(place, folder)
        if (real := os.path.realpath(place)) in seen:
            folders.clear()  # a link to a folder that has been searched
            continue
        seen.add(real)
        for name in files:
            if is_hidden(os.path.join(below, name)):
                left_out['hidden'] += 1
            elif os.path.exists(path := os.path.join(place, name)) and not os.path.isfile(path):
                left_out['pipes and the like'] += 1
            elif _has_image_ending(name):
                paths.append(os.path.join(place, name))
            else:
                left_out[os.path.splitext(name)[1].lower() or 'without an ending'] += 1
    if not paths:
        raise UserError(
            f'{folder!r}: the folder has no images; images are files that end in {", ".join(IMAGE_ENDINGS)}.'
        )
    _warn_of_others(folder, left_out)
    return sorted(paths, key=natural_order)


def _warn_of_others(text: str, left_out: Counter[str]) -> None:
    if left_out := +left_out:
        counts = ', '.join(f'{number} {printable(ending)}' for ending, number in left_out.most_common(8))
        _logger.warning(f'{printable(text)}: left out {counts}; images end in {", ".join(IMAGE_ENDINGS)}')


def _refuse(error: OSError) -> None:
    raise UserError(f'{str(error.filename)!r}: the folder cannot be read: {error.strerror}.')


def load_images(
    config: DataConfig, inputs: Sequence[str], split: str, data_config: Dict[str, Any], limit: int = NO_LIMIT
) -> Images:
    """Load the images to label.

    Args:
        config: Data set; not used if there are `inputs`.
        inputs: Files, folders and patterns, as for `find_images`.
        split: Split of the data set.
        data_config: Preprocessing of the network, which gives the mode of the images.
        limit: Number of images that may be unreadable; default: all.

    Returns:
        The images with their names.

    Raises:
        UserError: They cannot be read, or there are none.
    """
    with as_user_error('the network cannot label files'):
        mode = data_config.get(IMAGE_MODE) or default_image_mode(data_config['input_size'][0])
    if inputs:
        missing = next((text for text in inputs if not glob.has_magic(text) and not os.path.lexists(text)), None)
        if missing is not None:
            raise UserError(f'{missing!r}: there is no such file or folder.')
        paths = find_images(inputs)
        return Images(CheckedImages(_Files(paths), mode, limit), _printed(paths))
    # labels are not read, so the column of the images does for them
    prefix = config.dataset.partition('/')[0].lower()
    key = (config.input_key or 'image') if prefix in ('hfds', 'hfids') else None
    config = replace(
        config,
        # torchvision stops at an image that cannot be read
        max_bad_samples=0 if prefix == 'torch' and limit == NO_LIMIT else limit,
        input_img_mode=mode,
        in_chans=data_config['input_size'][0],
        target_key=config.target_key or key,
    )
    dataset = load_dataset(config, split)
    if isinstance(dataset, CheckedStream):
        dataset.needs_labels = False
    if isinstance(dataset, IterableDataset):
        return Images(dataset, None)
    size = num_images(dataset)
    if not size:
        raise UserError(f'split {split!r} of --dataset {config.dataset!r} has no images.')
    reader: Any = getattr(dataset, 'reader', None)
    if hasattr(reader, 'samples'):
        return Images(dataset, _printed([reader.filename(i, absolute=True) for i in range(size)]))
    return Images(dataset, [str(i) for i in range(size)])


def _printed(paths: Sequence[str]) -> List[str]:
    """Paths as text for a file, with bytes that are no text escaped."""
    names = [os.fsencode(path).decode('utf-8', 'backslashreplace') for path in paths]
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice:
        raise UserError(f'two images are both written as {twice!r}; rename one of them.')
    return names
