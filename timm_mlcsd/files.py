"""Files that are whole or not there."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Sequence

__all__ = ['atomic_write', 'atomic_write_all']


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary name; when all went well, its file takes the place of `path` in one step."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write_all(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a temporary folder; when all went well, its files take the places of those in `folder`, all or none.

    The first name leaves `folder` first and comes back last, so that a process that dies in between leaves a folder
    without it, never one with files of two kinds.

    Args:
        folder: Where the files go; made if it isn't there.
        names: All files that are replaced; one that was not written is not in `folder` afterwards.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
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
                _put_back(folder, old, placed)
                raise
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _put_back(folder: Path, old: Path, placed: Sequence[str]) -> None:
    """Make `folder` again what it was before its files went to `old` and the new ones were `placed`."""
    try:
        for name in placed:
            (folder / name).unlink()
        for path in sorted(old.iterdir()):
            os.replace(path, folder / path.name)
    except OSError as e:
        kept = tempfile.mkdtemp(prefix='saved-before-', dir=folder)
        for path in old.iterdir():
            shutil.move(path, kept)
        raise OSError(f'{e}; the files that were there before are in {kept}') from e


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, 'rb+') as f:
        os.fsync(f.fileno())
