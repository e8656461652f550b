"""A request to stop, by SIGTERM or Ctrl-C, that the training loop acts on between two updates."""

import os
import signal
import threading
from typing import Any, Dict, Iterator, Optional, Protocol

from ..distributed import DistributedContext

__all__ = ['SigtermHandler', 'StopRequested', 'StopSource', 'iterate_in_lockstep']

_CTRL_C = 'SIGINT (Ctrl-C)'


class StopRequested(Exception):
    """The process was asked to end; its state is saved."""


class StopSource(Protocol):
    """Source of stop requests, which the training loop asks between two updates."""

    @property
    def stop_requested(self) -> bool:
        """Whether the training shall stop."""


class SigtermHandler:
    """Turns SIGTERM and SIGINT into a flag that the training loop checks.

    Schedulers send SIGTERM before they take a machine away, torchrun sends it twice; SIGINT is Ctrl-C. A second Ctrl-C
    ends the process at once.

    Attributes:
        stop_requested: Whether a signal has come.
        by: Name of the signal, None before one has come.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self.by: Optional[str] = None
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> 'SigtermHandler':
        # only the main thread may set handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # a shell lets its background jobs ignore Ctrl-C
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._request_stop)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _request_stop(self, number: int, *_: Any) -> None:
        is_interrupt = number == signal.SIGINT
        # torchrun forwards Ctrl-C, and kills its processes itself when they take too long
        alone = 'TORCHELASTIC_RUN_ID' not in os.environ
        if is_interrupt and self.by == _CTRL_C and alone:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.by = self.by or (_CTRL_C if is_interrupt else 'SIGTERM')
        if is_interrupt and int(os.environ.get('RANK', 0)) == 0:
            # print and logging are not safe in a signal handler
            again = '; press it again to stop at once, without' if alone else ''
            os.write(2, f'\nCtrl-C: saving after this update{again}\n'.encode())


def iterate_in_lockstep(
    handler: SigtermHandler, batches: Iterator[Any], dist_context: DistributedContext
) -> Iterator[Any]:
    """Iterate over the batches of this process at the pace of all processes, until one is asked to stop.

    Raises:
        StopRequested: One process was asked to stop; raised in all processes at the same batch.
    """
    while True:
        batch = next(batches, None)
        if dist_context.any_rank(handler.stop_requested):
            raise StopRequested
        # one process may have a batch more than another
        if not dist_context.any_rank(batch is not None):
            return
        if batch is not None:
            yield batch
