"""Checkpoints that survive a crash: written to a temporary file, flushed to disk, then renamed."""

import contextlib
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator, List, Union

import torch

from ..errors import UserError, one_line
from ..files import atomic_write
from ..network import BEST, LAST, load_checkpoint

__all__ = ['CheckpointSaver', 'load_newest']

_logger = logging.getLogger(__name__)

PREVIOUS = 'previous.pth.tar'
_NUMBERED = re.compile(r'checkpoint-\d+\.pth\.tar')
_LEFT_OVER = re.compile(r'\.(last|previous|model_best|checkpoint-\d+)\.pth\.tar\.tmp')


class CheckpointSaver:
    """Keeps the last checkpoint, the best one and the newest few of a run.

    Whenever the process dies, each name points to a complete file or does not exist.

    Args:
        folder: Where the checkpoints go.
        keep: How many numbered checkpoints stay.
        best_metric: Best metric so far, when a run is resumed.
    """

    def __init__(self, folder: Union[str, Path], keep: int = 10, best_metric: float = float('-inf')):
        self.folder = Path(folder)
        self.keep = max(keep, 1)
        self.best_metric = best_metric
        self._wrote_last = False
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                path.unlink()

    def save(self, state: Dict[str, Any], epoch: int, metric: float) -> bool:
        """Save the state of a finished epoch.

        Args:
            state: Tensors and plain Python values, so that it loads with ``weights_only=True``.
            epoch: The finished epoch.
            metric: Higher is better; the first of equals stays the best.

        Returns:
            Whether it is the best so far.
        """
        path = self.folder / f'checkpoint-{epoch}.pth.tar'
        is_best = metric > self.best_metric
        with _as_disk_error(path):
            with atomic_write(path) as temporary:
                _dump(state, temporary)
            if is_best:
                self.best_metric = metric
                self._also_as(path, BEST)
            self._also_as(path, LAST)
            self._wrote_last = True
            _sync_folder(self.folder)
            for old in [*self._numbered()[: -self.keep], self.folder / PREVIOUS]:
                old.unlink(missing_ok=True)
        return is_best

    def save_last(self, state: Dict[str, Any]) -> None:
        """Save the state of an unfinished epoch as the last checkpoint; the previous one is kept as a substitute."""
        path, previous = self.folder / LAST, self.folder / PREVIOUS
        with _as_disk_error(path):
            with atomic_write(path) as temporary:
                _dump(state, temporary)
                # a file of another process may be damaged, and the substitute what this run was resumed from
                if path.exists() and (self._wrote_last or not previous.exists()):
                    self._also_as(path, PREVIOUS)
            self._wrote_last = True
            _sync_folder(self.folder)

    def _also_as(self, path: Path, name: str) -> None:
        with atomic_write(self.folder / name) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                with open(path, 'rb') as source, open(temporary, 'wb') as target:
                    shutil.copyfileobj(source, target)
                    target.flush()
                    os.fsync(target.fileno())

    def _numbered(self) -> List[Path]:
        """Numbered checkpoints, the oldest file first."""
        found = [p for p in self.folder.iterdir() if _NUMBERED.fullmatch(p.name)]
        return sorted(found, key=lambda p: p.stat().st_mtime_ns)


def load_newest(source: Union[str, Path]) -> Dict[str, Any]:
    """Load the last checkpoint of a run or, if it is damaged, the newest intact one, with a warning.

    Args:
        source: Folder of a run or its last checkpoint; or another checkpoint, which has no substitute.

    Raises:
        UserError: There is none.
    """
    source = Path(source)
    if not source.is_dir() and source.name != LAST:
        return load_checkpoint(source)
    folder = source if source.is_dir() else source.parent
    try:
        return load_checkpoint(folder / LAST)
    except UserError as e:
        error = e
    others = [p for p in folder.glob('*.pth.tar') if _NUMBERED.fullmatch(p.name) or p.name in (BEST, PREVIOUS)]
    for path in sorted(others, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        with contextlib.suppress(UserError):
            state = load_checkpoint(path)
            _logger.warning(f'{error} Going on from {path} instead, the newest that can be read.')
            return state
    raise error


def _dump(state: Dict[str, Any], path: Path) -> None:
    with open(path, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def _as_disk_error(path: Path) -> Iterator[None]:
    """Turn the errors of a full or missing disk into a `UserError`; earlier files are kept."""
    try:
        yield
    except (OSError, RuntimeError) as e:  # PyTorch makes a RuntimeError of a full disk
        if isinstance(e.__context__, KeyboardInterrupt):  # and one of Ctrl-C
            raise e.__context__ from None
        raise UserError(
            f'the checkpoint {str(path)!r} cannot be written: {one_line(e)}. Earlier ones are kept; make room and go '
            f'on with --resume {path.parent}'
        ) from e


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable."""
    if os.name == 'posix':
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
