"""Atomic writes: a file is complete or not there."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Sequence

__all__ = ['atomic_write', 'atomic_write_all']


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically.

    Args:
        path: Path of the file.

    Yields:
        Temporary path to write to; on success it replaces `path` in one step, otherwise it is removed.
    """
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write_all(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Replace several files of a folder, all or none.

    The first name is removed first and written last. If the process is killed in between, this file is missing, so
    that the folder never looks complete with a mixture of old and new files.

    Args:
        folder: Folder of the files; created if it does not exist.
        names: Names of the files to replace; a file that is not written is removed from the folder.

    Yields:
        Temporary folder to write to; on success its files replace those in `folder`. It is removed afterwards.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.saving-', dir=folder, ignore_cleanup_errors=True) as temporary:
            new, old = Path(temporary) / 'new', Path(temporary) / 'old'
            new.mkdir()
            old.mkdir()
            yield new
            for name in names:
                if (new / name).exists():
                    _flush(new / name)
            placed = []
            try:
                for name in names:
                    if (folder / name).exists():
                        os.replace(folder / name, old / name)
                for name in reversed(names):
                    if (new / name).exists():
                        os.replace(new / name, folder / name)
                        placed.append(name)
            except BaseException:
                _restore(folder, old, placed)
                raise
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _restore(folder: Path, old: Path, placed: Sequence[str]) -> None:
    """Remove the new files in `placed` and move the old files back to `folder`."""
    try:
        for name in placed:
            (folder / name).unlink()
        for path in sorted(old.iterdir()):
            os.replace(path, folder / path.name)
    except OSError as e:
        kept = tempfile.mkdtemp(prefix='saved-before-', dir=folder)
        for path in old.iterdir():
            shutil.move(path, kept)
        raise OSError(f'{e}; the previous files are in {kept}') from e


def _flush(path: Path) -> None:
    """Wait until a file is written to the disk."""
    with open(path, 'rb+') as f:
        os.fsync(f.fileno())
