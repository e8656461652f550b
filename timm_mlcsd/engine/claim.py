"""Exclusive use of a run's folder: created exclusively, and locked until the process ends."""

import contextlib
import importlib.util
import os
import socket
from pathlib import Path
from typing import Iterator, Optional

from ..errors import UserError, as_user_error

__all__ = ['LOCK', 'claimed', 'locked', 'new_folder']

LOCK = '.lock'


def new_folder(parent: Path, name: str) -> Path:
    """Create a new folder with the given name, or with the first free suffix of -1, -2, ...

    Raises:
        UserError: It cannot be written.
    """
    with as_user_error(f'--output {str(parent)!r} cannot be written'):
        parent.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            folder = parent / (f'{name}-{number}' if number else name)
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder


@contextlib.contextmanager
def claimed(folder: Path, is_new: bool = False) -> Iterator[None]:
    """Lock a folder for this process; a missing folder is created, and a new one is removed again if it stays empty.

    The lock is one of the kernel, so that it ends with the process, however that ends; loader processes do not inherit
    it. Without such locks (Windows, some network file systems) the folder is not protected.

    Raises:
        UserError: Another process has locked it, or it cannot be written.
    """
    is_new = is_new or not folder.exists()
    with as_user_error(f'the folder {str(folder)!r} cannot be written'):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK, folder, '--experiment'):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails unless it is empty


@contextlib.contextmanager
def locked(path: Path, protected: Path, flag: str) -> Iterator[None]:
    """Hold a lock of the kernel; without such locks (Windows, some network file systems) nothing is locked.

    Args:
        path: Path of the lock file, which is removed at the end.
        protected: Path that the lock protects, for messages.
        flag: Flag that names `protected`, for messages.

    Raises:
        UserError: Another process holds the lock, or the lock file cannot be written.
    """
    with as_user_error(f'{str(protected)!r} cannot be written'):
        lock = _locked(path, protected, flag)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def _locked(path: Path, protected: Path, flag: str) -> Optional[int]:
    """The open, locked file; None if the system has no locks."""
    if importlib.util.find_spec('fcntl') is None:
        return None
    import fcntl

    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(file, 200).decode(errors='replace').strip()
            os.close(file)
            raise UserError(
                f'{str(protected)!r} is in use by {holder or "another process"}, which is still running: wait for it '
                f'or stop it, or name another {flag}.'
            ) from None
        except OSError:  # a file system without locks
            os.close(file)
            return None
        # the previous owner may have removed the file since
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.truncate(file, 0)
                os.write(file, f'process {os.getpid()} on {socket.gethostname()}\n'.encode())
                return file
        os.close(file)
