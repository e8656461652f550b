"""Errors of the Hugging Face Hub as messages of one line."""

import contextlib
from typing import Iterator, Optional

from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import UserError, one_line

__all__ = ['explain_hub_errors', 'failure_reason', 'has_no_connection', 'is_missing_file']

_STATUS = {
    401: 'the Hub does not accept the token; log in again with: hf auth login',
    403: 'access is forbidden; the token needs permission for this repository, and to write where you push',
    404: 'the Hub has no such repository or file; check the name',
    409: 'it conflicts with the current content; try again, or use another name',
    413: 'the files are too large',
    429: 'too many requests; wait some minutes and try again',
}


@contextlib.contextmanager
def explain_hub_errors(what: str) -> Iterator[None]:
    """Convert any exception of a call to the Hub in the block to a `UserError` that says why it failed.

    Args:
        what: Start of the message, which names the failed action.

    Raises:
        UserError: The block raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f'{what}: {failure_reason(e)}.') from e


def failure_reason(error: BaseException) -> str:
    """Reason why a call to the Hub failed, with advice if there is any."""
    for e in _chain(error):
        if isinstance(e, OfflineModeIsEnabled):
            return 'HF_HUB_OFFLINE is set and the file is not in the local cache; unset it, or load once while online'
        if isinstance(e, GatedRepoError):
            return f'{_status(e)}, the repository is gated; ask for access on its page and log in with: hf auth login'
        if isinstance(e, RepositoryNotFoundError):
            return (
                f'{_status(e)}, there is no such repository, or it is private and you have no access; check the name, '
                f'and log in with: hf auth login'
            )
        if isinstance(e, RevisionNotFoundError):
            return f'{_status(e)}, the repository has no such branch, tag or commit'
        if is_missing_file(e):
            return f'{_status(e) or 404}, the repository has no such file'
        if isinstance(e, LocalTokenNotFoundError):
            return 'there is no token; log in with: hf auth login'
        if isinstance(e, HFValidationError):
            return f'expected the name of a repository, OWNER/NAME ({one_line(e, 150)})'
        status = _status(e)
        if status is not None:
            known = 'the Hub has an internal error; try again later' if status >= 500 else one_line(e, 150)
            return f'{status}, {_STATUS.get(status, known)}'
        if _is_named(e, 'Timeout'):
            return 'the Hub did not answer in time; try again later'
        if _is_named(e, 'Connect', 'NetworkError', 'ProtocolError'):
            return 'there is no connection to the Hub; check the network'
    return one_line(error)


def has_no_connection(error: BaseException) -> bool:
    """Whether the Hub was not reached at all, because of offline mode or the network."""
    chain = list(_chain(error))
    answered = any(_status(e) is not None or _is_named(e, 'Timeout') for e in chain)
    return not answered and any(_is_named(e, 'Offline', 'Connect', 'NetworkError') for e in chain)


def is_missing_file(error: BaseException) -> bool:
    """Whether the Hub answered that the repository has no such file."""
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> Optional[int]:
    return getattr(getattr(error, 'response', None), 'status_code', None)


def _is_named(error: BaseException, *parts: str) -> bool:
    """Whether a class name of the error contains one of `parts`; the HTTP library differs between releases."""
    return any(part in kind.__name__ for kind in type(error).__mro__ for part in parts)
