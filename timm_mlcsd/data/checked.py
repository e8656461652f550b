"""Images that may be broken: counted, named once, left out."""

import logging
import signal
from contextlib import closing, contextmanager, nullcontext
from itertools import islice
from typing import Any, Callable, Collection, Iterable, Iterator, List, Optional, Set, Tuple

import torch
from torch.utils.data import Dataset

from ..errors import UserError, one_line
from .image import read_image

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
    """What looks for broken images, and says which there are.

    Attributes:
        limit: How many images may be broken.
        named: Those that have been named.
        found: All that are known, in this process and what it was told of; has to be provided, as has `merge`.
    """

    limit: int
    named: Set[Any]
    found: Collection[Any]

    def merge(self, others: Iterable[Collection[Any]]) -> None:
        """Count what other processes have `found` as well."""
        raise NotImplementedError

    def _complaint(self, broken: Any) -> str:
        """What a broken image is called, and why it is one."""
        raise NotImplementedError

    def _of(self) -> str:
        return f'of {len(self)} images'

    def check(self) -> None:
        """Name the images that have turned out broken since last asked.

        Raises:
            UserError: They have become more than may be.
        """
        found = self.found
        new = [broken for broken in found if broken not in self.named]
        self.named.update(new)
        if new and len(found) > self.limit:
            allowed = f', more than --max-bad-samples {self.limit} allows' if self.limit else ''
            raise UserError(
                f'{len(found)} {self._of()} cannot be read{allowed}, among them {self._complaint(new[0])}. '
                f'Mend or remove them, or go on without with --max-bad-samples N.'
            )
        for broken in new:
            _logger.warning(f'Left out, because it cannot be read: {self._complaint(broken)}')


class CheckedImages(BrokenSampleTracker, Dataset):
    """A timm reader's images; None in the place of one that cannot be read.

    timm's own data set takes the next image instead, says so every time, and counts nothing.

    Args:
        reader: Gives (file, class index), and its names.
        mode: PIL mode.
        limit: How many images may be broken.
    """

    def __init__(self, reader: Any, mode: str, limit: int = 0):
        self.reader = reader
        self.mode = mode
        self.limit = limit
        self.transform: Optional[Callable] = None
        # in memory that the loader's processes share
        self.broken = torch.zeros(len(reader), dtype=torch.bool).share_memory_()
        self.named: Set[int] = set()

    def __getitem__(self, index: int) -> Optional[Tuple[Any, Any]]:
        try:
            image, target = self._read(index)
        except Exception:  # decoders fail in as many ways as there are files
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
        # of a copy: nonzero counts first, and other processes write meanwhile
        return self.broken.clone().nonzero().flatten().tolist()

    def merge(self, others: Iterable[List[int]]) -> None:
        for found in others:
            self.broken[found] = True

    def name(self, index: int) -> str:
        """The file of an image, or its number where the reader doesn't tell."""
        try:
            return self.reader.filename(index, absolute=True) or f'number {index}'
        except Exception:  # where even that is unreadable
            return f'number {index}'

    def _complaint(self, index: int) -> str:
        name = self.name(index)
        try:
            self._read(index)
        except Exception as e:
            return f'{name} ({one_line(e, 120)})'
        return f'{name}, which now can be read'


class SubstituteBroken(Dataset):
    """To train on: the image behind a broken one in its place, so that batches stay full.

    Args:
        dataset: Gives (image, target), or None.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.transform: Optional[Callable] = None

    def __getitem__(self, index: int) -> Tuple[Any, Any]:
        for i in range(len(self)):
            sample = self.dataset[(index + i) % len(self)]
            images = checked_images(self.dataset)
            if sample is not None:
                return self.transform(sample[0]) if self.transform else sample[0], sample[1]
            if images is not None and int(images.broken.sum()) > images.limit:
                break
        raise ValueError('too many images are broken')

    def __len__(self) -> int:
        return len(self.dataset)


class DropBroken:
    """To evaluate on: makes batches of what can be read alone; they may be empty.

    Args:
        collate: Makes a batch.
        channels: Of an image.
    """

    def __init__(self, collate: Callable, channels: int):
        self.collate = collate
        self.channels = channels

    def __call__(self, samples: Any) -> Any:
        whole = [sample for sample in samples if sample is not None]
        if not whole:
            return torch.zeros(0, self.channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
        return self.collate(whole)


def image_name(dataset: Any, index: int) -> str:
    """The file that an image comes from, or its number where nothing tells more.

    Args:
        dataset: A data set, perhaps around others.
        index: The image's in this one.
    """
    while hasattr(dataset, 'dataset'):
        index = dataset.indices[index] if hasattr(dataset, 'indices') else index
        dataset = dataset.dataset
    return dataset.name(index) if isinstance(dataset, CheckedImages) else f'number {index}'


def checked_images(dataset: Any) -> Optional[BrokenSampleTracker]:
    """What a data set's images come from, if that looks for broken ones."""
    while dataset is not None and not isinstance(dataset, BrokenSampleTracker):
        dataset = getattr(dataset, 'dataset', None)
    return dataset


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """SIGTERM and Ctrl-C wait, and never end processes that are started meanwhile: where they go to all of a job, the
    loader's must live until the one that trains has saved."""
    if not hasattr(signal, 'pthread_sigmask'):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class CheckedLoader:
    """A loader that looks for broken images behind every batch, and says in one line why there is none.

    Args:
        loader: timm's.
        dataset: What it loads.
        drawn: The indices in its batch of a number, where somebody remembers them.
        shard: The first of its batches to give, and the distance to the next.
    """

    def __init__(
        self,
        loader: Any,
        dataset: Any,
        drawn: Optional[Callable[[int], List[int]]] = None,
        shard: Tuple[int, int] = (0, 1),
    ):
        self.loader = loader
        self.shard = shard
        self.dataset = dataset
        self.drawn = drawn
        self.images = checked_images(dataset)

    def names(self, batch: int) -> List[str]:
        """What the images of the batch of that number are called in this epoch, as far as that is known."""
        return [image_name(self.dataset, index) for index in self.drawn(batch)] if self.drawn else []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        first, step = self.shard
        with closing(iter(self.loader)) as batches:
            yield from self._looked_at(islice(batches, first, None, step))

    def _looked_at(self, batches: Iterator[Any]) -> Iterator[Any]:
        is_primary = True
        while True:
            try:
                with _signals_blocked() if is_primary else nullcontext():
                    batch = next(batches)
                is_primary = False
            except StopIteration:
                self._check()
                return
            except Exception as e:  # of a transform, a decoder, a process that died
                # it holds itself, and so the loader with its processes
                e.__traceback__ = None
                self._check()
                # a loader's process reports its whole traceback
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
        return self.loader.sampler

    @property
    def mixup_enabled(self) -> bool:
        return self.loader.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.loader.mixup_enabled = enabled
