"""Checkpoints that survive a crash: written beside their place, flushed to disk, then renamed."""

import contextlib
import logging
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Union

import torch

from ..errors import UserError, shortened

__all__ = ['CheckpointSaver', 'load_checkpoint']

_logger = logging.getLogger(__name__)

LAST = 'last.pth.tar'
BEST = 'model_best.pth.tar'
_NUMBERED = re.compile(r'checkpoint-(\d+)\.pth\.tar')


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
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob('.*.tmp'):
            left_over.unlink()

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
        with _replacing(path) as temporary, open(temporary, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        is_best = metric > self.best_metric
        if is_best:
            self.best_metric = metric
            self._also_as(path, BEST)
        self._also_as(path, LAST)
        _sync_folder(self.folder)
        for old in self._numbered()[: -self.keep]:
            old.unlink()
        return is_best

    def _also_as(self, path: Path, name: str) -> None:
        with _replacing(self.folder / name) as temporary:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)

    def _numbered(self) -> List[Path]:
        """Numbered checkpoints, oldest epoch first."""
        found = {int(m[1]): p for p in self.folder.iterdir() if (m := _NUMBERED.fullmatch(p.name))}
        return [found[epoch] for epoch in sorted(found)]


@contextlib.contextmanager
def _replacing(path: Path):
    """Give a temporary name; when all went well, its file takes the place of `path` in one step."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable."""
    if os.name == 'posix':
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Load a checkpoint of ours on the CPU, without running any code that it might hold.

    Args:
        path: A file, or the folder of a run, which stands for its last checkpoint.

    Raises:
        UserError: There is no such file, or it is no checkpoint of a multi-exit network.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise UserError(f'no checkpoint at {str(path)!r}; give a .pth.tar file, or the folder of a run that saved one.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as e:
        raise UserError(f'{str(path)!r} cannot be read as a checkpoint: {shortened(e)}') from None
    missing = [key for key in ('arch', 'model_args', 'state_dict') if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f'{str(path)!r} is no checkpoint that train.py wrote: it has no {", ".join(missing)}.')
    return state
