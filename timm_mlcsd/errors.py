"""Errors that the user can correct: reported as one line with exit code 2, without a traceback."""

import contextlib
import errno
import logging
import os
import sys
from typing import Callable, Iterator, Sequence

from timm.utils import setup_default_logging

__all__ = ['UserError', 'as_user_error', 'first_few', 'install_hint', 'printable', 'run_script', 'one_line']

# a write that fails names no file: the disk, the quota or the largest file is full, or the device fails
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class UserError(ValueError):
    """Error that the user can correct; the message says what was wrong and what to do."""


def one_line(error: BaseException, length: int = 300) -> str:
    """Format the message of an error as one line.

    Args:
        error: Exception of any kind.
        length: Largest number of characters.

    Returns:
        The message without line breaks and with control characters escaped, cut after `length` characters.
    """
    text = ' '.join(str(error).split())
    text = f'{type(error).__name__} {text}' if isinstance(error, KeyError) or not text else text
    return printable(text if len(text) <= length else f'{text[:length]} ...')


def printable(text: str) -> str:
    """Escape control characters, so that text from a file is safe to print to a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def first_few(names: Sequence[str]) -> str:
    """List the first five names for a message, with an ellipsis if there are more."""
    return printable(f'{", ".join(names[:5])}{", ..." if len(names) > 5 else ""}')


def install_hint(extra: str) -> str:
    """Instruction to install an extra of this package."""
    return f'install it from a checkout of timm_mlcsd: pip install ".[{extra}]"'


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Convert any exception in the block to a `UserError`.

    Args:
        what: Start of the message, which names the input that caused the error.

    Raises:
        UserError: The block raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'{what}: {one_line(e, 600)}') from e


class _EscapeFilter(logging.Filter):
    """Logging filter that escapes control characters, which names of files and classes can contain."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the message of a record and keep the record."""
        lines = record.getMessage().split('\n')
        record.msg, record.args = '\n'.join(printable(line.replace('\t', ' ')) for line in lines), ()
        return True


def _prepare_terminal() -> None:
    """Set up logging to the terminal, and escape characters that its encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
    if not logging.getLogger().handlers:
        setup_default_logging()
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _EscapeFilter) for known in handler.filters):
            handler.addFilter(_EscapeFilter())
    # the packages that huggingface_hub 1 and 2 send requests with log a line for each
    for package in ('httpx', 'httpx2'):
        logging.getLogger(package).setLevel(logging.WARNING)


def run_script(prog: str, main: Callable[[], object]) -> None:
    """Run a script with logging to the terminal.

    A `UserError`, and an `OSError` that names a file or says that there is no space, is printed to stderr as one line,
    with exit code 2. A reader that closes the pipe of the output ends the script with exit code 1.

    Args:
        prog: Name of the script in error messages.
        main: Function to run; its result is not used.
    """
    _prepare_terminal()
    try:
        _run(prog, main)
    except SystemExit:
        _run(prog, _flush_output)
        raise
    # Python flushes at its end too, but prints a traceback if that fails
    _run(prog, _flush_output)


def _run(prog: str, function: Callable[[], object]) -> None:
    """Run a function, and exit with a message if the user can correct its error."""
    try:
        function()
    except BrokenPipeError:  # the reader of the output has closed the pipe
        _drop_output()
        sys.exit(1)
    except (UserError, OSError) as e:
        if isinstance(e, OSError) and e.filename is None:
            if e.errno not in _WRITE_ERRORS:
                raise
            _drop_output()
        print(f'{prog}: error: {printable(_message(e))}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _flush_output() -> None:
    if sys.stdout is not None:  # it is None if the shell has closed it
        sys.stdout.flush()


def _drop_output() -> None:
    """Point stdout to nowhere if what it holds cannot be written, so that Python does not try again."""
    try:
        _flush_output()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is None:
        return f'the output cannot be written: {error.strerror}'
    if isinstance(error, OSError):
        name = repr(str(error.filename))
        return f'{name if len(name) <= 300 else name[:300] + " ..."}: {error.strerror}'
    return ' '.join(str(error).split())
