"""Handle broken images: count them, report each once, and skip or replace them."""

import logging
import signal
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from typing import Any, Callable, Collection, Iterable, Iterator, List, Optional, Set, Tuple

import torch
from torch.utils.data import Dataset

from ..errors import UserError, one_line
from .image import read_image
from .subset import num_images

__all__ = [
    'CheckedImages',
    'CheckedLoader',
    'BrokenSampleTracker',
    'SubstituteBroken',
    'DropBroken',
    'checked_images',
    'image_name',
]

_logger = logging.getLogger(__name__)


class BrokenSampleTracker:
    """Base class of data sets that record broken images.

    Attributes:
        limit: Number of broken images that are accepted.
        named: Broken images that have been reported.
        found: All known broken images, of this process and those passed to `merge`; provided by subclasses.
    """

    limit: int
    named: Set[Any]

    @property
    def found(self) -> Collection[Any]:
        """Broken images by number or name."""
        raise NotImplementedError

    def merge(self, others: Iterable[Any]) -> None:
        """Include broken images that other processes have `found`.

        Args:
            others: Values of `found`, one per process.
        """
        raise NotImplementedError

    def describe(self, broken: Any) -> str:
        """Return the name of a broken image and the reason why it cannot be read."""
        raise NotImplementedError

    def _describe_total(self) -> str:
        """Return which images are meant, after the number of broken ones."""
        raise NotImplementedError

    def check(self) -> None:
        """Log the broken images that have been found since the last check.

        Raises:
            UserError: More images are broken than `limit` allows.
        """
        found = self.found
        new = [broken for broken in found if broken not in self.named]
        self.named.update(new)
        if new and len(found) > self.limit:
            allowed = f', more than --max-bad-samples {self.limit} allows' if self.limit else ''
            raise UserError(
                f'{len(found)} {self._describe_total()} cannot be read{allowed}, among them {self.describe(new[0])}. '
                f'Fix or remove them, or continue without them with --max-bad-samples N.'
            )
        for broken in new:
            _logger.warning(f'Left out, because it cannot be read: {self.describe(broken)}')


class CheckedImages(BrokenSampleTracker, Dataset[Any]):
    """Images of a timm reader, with None instead of an image that cannot be read.

    timm's ``ImageDataset`` instead takes the next image and logs a warning every time, without counting broken images.

    Args:
        reader: timm reader of files, which returns (file, class index).
        mode: PIL mode of the images.
        limit: Number of broken images that are accepted; default 0.
    """

    def __init__(self, reader: Any, mode: str, limit: int = 0):
        self.reader = reader
        self.mode = mode
        self.limit = limit
        self.transform: Optional[Callable[..., Any]] = None
        # shared with the worker processes of the loader
        self.broken = torch.zeros(len(reader), dtype=torch.bool).share_memory_()
        self.named: Set[int] = set()

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Any]]:
        try:
            image, target = self._read(index)
        except Exception:  # damaged files raise errors of any type
            self.broken[index] = True
            return None
        return self.transform(image) if self.transform else image, target

    def _read(self, index: int) -> Tuple[Any, Any]:
        file, target = self.reader[index]
        with closing(file):
            return read_image(file, self.mode), -1 if target is None else target

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def found(self) -> List[int]:
        """Indices of all known broken images."""
        # of a copy, because other processes may write while nonzero counts and collects
        found: List[int] = self.broken.clone().nonzero().flatten().tolist()
        return found

    def merge(self, others: Iterable[List[int]]) -> None:
        """Include broken images that other processes have `found`; see `BrokenSampleTracker.merge`."""
        for found in others:
            self.broken[found] = True

    def name(self, index: int) -> str:
        """Return the file of an image, or its number if the reader does not know the file."""
        try:
            return self.reader.filename(index, absolute=True) or f'number {index}'
        except Exception:  # the name itself may be unreadable
            return f'number {index}'

    def describe(self, index: int) -> str:
        """Describe a broken image; see `BrokenSampleTracker.describe`."""
        name = self.name(index)
        try:
            self._read(index)
        except Exception as e:
            return f'{name} ({one_line(e, 120)})'
        return f'{name}, which can be read now'

    def _describe_total(self) -> str:
        return f'of {len(self)} images'


class SubstituteBroken(Dataset[Any]):
    """Data set for training that returns the next readable image instead of a broken one, so that batches stay full.

    Args:
        dataset: Data set of (image, target), with None for a broken image.
    """

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset
        self.transform: Optional[Callable[..., Any]] = None

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        for i in range(len(self)):
            sample = self.dataset[(index + i) % len(self)]
            images = checked_images(self.dataset)
            if sample is not None:
                return self.transform(sample[0]) if self.transform else sample[0], sample[1]
            if images is not None and len(images.found) > images.limit:
                break
        raise ValueError('too many images are broken')

    def __len__(self) -> int:
        return num_images(self.dataset)


class DropBroken:
    """Collate function for evaluation that leaves out broken images; a batch may be empty.

    Args:
        collate: Collate function for the remaining samples.
        channels: Number of channels of an image, for empty batches.
    """

    def __init__(self, collate: Callable[..., Any], channels: int):
        self.collate = collate
        self.channels = channels

    def __call__(self, samples: Any) -> Any:
        """Collate the samples that are not None."""
        readable = [sample for sample in samples if sample is not None]
        if not readable:
            return torch.zeros(0, self.channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
        return self.collate(readable)


def image_name(dataset: Any, index: int) -> str:
    """Return the file of an image, or its number if the file is unknown.

    Args:
        dataset: Data set, which may wrap others.
        index: Index of the image in `dataset`.
    """
    while hasattr(dataset, 'dataset'):
        index = dataset.indices[index] if hasattr(dataset, 'indices') else index
        dataset = dataset.dataset
    return dataset.name(index) if isinstance(dataset, CheckedImages) else f'number {index}'


def checked_images(dataset: Any) -> Optional[BrokenSampleTracker]:
    """Find the innermost data set that records broken images.

    Args:
        dataset: Data set, which may wrap others.

    Returns:
        Data set that records broken images; None if there is none.
    """
    while dataset is not None and not isinstance(dataset, BrokenSampleTracker):
        dataset = getattr(dataset, 'dataset', None)
    return dataset


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block SIGTERM and SIGINT in this process and in processes that it starts.

    A scheduler may signal all processes of a job; the workers of the loader must live until the trainer has saved.
    """
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class CheckedLoader:
    """Loader that reports broken images after every batch, and turns errors of the loader into one-line user errors.

    Args:
        loader: timm loader.
        dataset: Data set of the loader.
        drawn: Function from the number of a batch in the current epoch to the indices of its images; default None if
            they are not recorded.
        shard: First batch to return and step to the next, for several processes; default (0, 1) for all batches.
        draws_per_batch: Whether every batch draws from this process's default random generators, not only the start of
            an epoch; default True.
    """

    def __init__(
        self,
        loader: Any,
        dataset: Any,
        drawn: Optional[Callable[[int], List[int]]] = None,
        shard: Tuple[int, int] = (0, 1),
        draws_per_batch: bool = True,
    ):
        self.loader = loader
        self.draws_per_batch = draws_per_batch
        self.shard = shard
        self.dataset = dataset
        self.drawn = drawn
        self.images = checked_images(dataset)

    def names(self, batch: int) -> List[str]:
        """Return the names of the images in a batch.

        Args:
            batch: Number of the batch in the current epoch.

        Returns:
            Files or numbers of the images; empty if the indices are not recorded.
        """
        return [image_name(self.dataset, index) for index in self.drawn(batch)] if self.drawn else []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        first, step = self.shard
        with closing(iter(self.loader)) as batches:
            yield from self._checked_batches(islice(batches, first, None, step))

    def _checked_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches that are not empty, and check for broken images after each."""
        is_first = True
        while True:
            try:
                # worker processes may start with the first batch
                with _signals_blocked() if is_first else nullcontext():
                    batch = next(batches)
                is_first = False
            except StopIteration:
                self._check()
                return
            except Exception as e:  # from a transform, a decoder or a worker process that died
                # the traceback would keep the loader and its worker processes alive
                e.__traceback__ = None
                self._check()
                # a worker process reports its entire traceback
                reason = str(e).strip().rpartition('\n')[2] or type(e).__name__
                raise UserError(f'a batch of images cannot be made: {reason}') from e
            self._check()
            if len(batch[0]):
                yield batch

    def _check(self) -> None:
        if self.images is not None:
            self.images.check()

    @property
    def sampler(self) -> Any:
        """Sampler of the loader."""
        return self.loader.sampler

    @property
    def mixup_enabled(self) -> bool:
        """Whether the loader mixes batches; can be set."""
        enabled: bool = self.loader.mixup_enabled
        return enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.loader.mixup_enabled = enabled
