"""Mistakes of a script's user: one line and exit code 2, no traceback."""

import contextlib
import logging
import sys
from typing import Callable, Iterator

from timm.utils import setup_default_logging

__all__ = ['UserError', 'as_user_error', 'install_hint', 'printable', 'run_script', 'one_line']


class UserError(ValueError):
    """What the user asked for cannot be done; the message says what was wrong and what would work."""


def one_line(error: Exception, length: int = 300) -> str:
    """The message of an error as the start of one line."""
    text = ' '.join(str(error).split())
    text = f'{type(error).__name__} {text}' if isinstance(error, KeyError) or not text else text
    return text if len(text) <= length else f'{text[:length]} ...'


def printable(text: str) -> str:
    """Text from a file, with everything escaped that a terminal would obey instead of showing it."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def install_hint(extra: str) -> str:
    """How to install what an extra of this package needs."""
    return f'install it from a checkout of timm_mlcsd: pip install ".[{extra}]"'


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Make whatever goes wrong inside, where only the user's `what` can be at fault, a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'{what}: {one_line(e, 600)}') from e


class _Escape(logging.Filter):
    """Makes messages printable: names of files and classes in them come from other people's data."""

    def filter(self, record: logging.LogRecord) -> bool:
        lines = record.getMessage().split('\n')
        record.msg, record.args = '\n'.join(printable(line.replace('\t', ' ')) for line in lines), ()
        return True


def _prepare_terminal() -> None:
    """Log to the terminal, and show what it cannot show as escapes instead of failing there."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    if not logging.getLogger().handlers:
        setup_default_logging()
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _Escape) for known in handler.filters):
            handler.addFilter(_Escape())


def run_script(prog: str, main: Callable[[], None]) -> None:
    """Run `main` with logging to the terminal; a `UserError` becomes one line on stderr and exit code 2."""
    _prepare_terminal()
    try:
        main()
    except UserError as e:
        print(f'{prog}: error: {printable(" ".join(str(e).split()))}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
