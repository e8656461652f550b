"""Files that are whole or not there."""

import contextlib
import os
from pathlib import Path
from typing import Iterator

__all__ = ['replacing']


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name; when all went well, its file takes the place of `path` in one step."""
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
