"""Mistakes of a script's user: one line and exit code 2, no traceback."""

import logging
import sys
from typing import Callable

from timm.utils import setup_default_logging

__all__ = ['UserError', 'run_script', 'shortened']


class UserError(Exception):
    """What the user asked for cannot be done; the message says what was wrong and what would work."""


def shortened(error: Exception, length: int = 300) -> str:
    """The message of a long error as the start of one line."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f'{text[:length]} ...'


def run_script(prog: str, main: Callable[[], None]) -> None:
    """Run `main` with logging to the terminal; a `UserError` becomes one line on stderr and exit code 2."""
    if not logging.getLogger().handlers:
        setup_default_logging()
    try:
        main()
    except UserError as e:
        print(f'{prog}: error: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
