"""Checkpoints that survive a crash: written beside their place, flushed to disk, then renamed."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Union

import torch

from ..files import replacing
from ..network import LAST

__all__ = ['CheckpointSaver']

BEST = 'model_best.pth.tar'
_NUMBERED = re.compile(r'checkpoint-\d+\.pth\.tar')
_LEFT_OVER = re.compile(r'\.(last|model_best|checkpoint-\d+)\.pth\.tar\.tmp')


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
        _write(state, path)
        is_best = metric > self.best_metric
        if is_best:
            self.best_metric = metric
            self._also_as(path, BEST)
        self._also_as(path, LAST)
        _sync_folder(self.folder)
        for old in self._numbered()[: -self.keep]:
            old.unlink()
        return is_best

    def save_last(self, state: Dict[str, Any]) -> None:
        """Save the state of an unfinished epoch, as the last checkpoint alone."""
        _write(state, self.folder / LAST)
        _sync_folder(self.folder)

    def _also_as(self, path: Path, name: str) -> None:
        with replacing(self.folder / name) as temporary:
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


def _write(state: Dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary, open(temporary, 'wb') as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves durable."""
    if os.name == 'posix':
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
