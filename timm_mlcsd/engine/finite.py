"""Detection of losses and weights that are not finite, without a synchronisation per batch."""

from typing import Callable, Iterable, List, Optional

import torch

from ..distributed import SINGLE_PROCESS, DistributedContext
from ..errors import UserError

__all__ = ['NonFiniteError', 'NonFiniteMonitor']


class NonFiniteError(UserError):
    """Loss or weights are not finite.

    Args:
        what: What is not finite, and its value.
        epoch: Number of the epoch.
        batch: Number of the batch.
        images: Names of the images in the batch, if known.
        more: Text that follows in the message.
    """

    def __init__(self, what: str, epoch: int, batch: int, images: Iterable[str] = (), more: str = ''):
        self.images = list(images)
        super().__init__(f'{what} at epoch {epoch}, batch {batch}{_shown(self.images)}{more}')


class NonFiniteMonitor:
    """Keeps, on the device, the first batch of an epoch whose loss is not finite.

    Args:
        device: Device of the loss.
        dist_context: Processes that train together.
        names: Function from the number of a batch to the names of its images.
    """

    def __init__(
        self,
        device: torch.device,
        dist_context: DistributedContext = SINGLE_PROCESS,
        names: Optional[Callable[[int], List[str]]] = None,
    ):
        self.dist_context = dist_context
        self.names = names or (lambda i: [])
        self.batch = torch.tensor(-1, device=device)
        self.loss = torch.zeros((), device=device)

    def update(self, batch: int, loss: torch.Tensor) -> None:
        """Note the loss of a batch, without a synchronisation."""
        is_first = (self.batch < 0) & ~loss.isfinite()
        self.batch = torch.where(is_first, batch, self.batch)
        self.loss = torch.where(is_first, loss.float(), self.loss)

    def pop(self, epoch: int, more: str = '') -> Optional[NonFiniteError]:
        """Return the first such batch of any process as an error, and reset; all processes call it."""
        batch = int(self.batch)
        if not self.dist_context.any_rank(batch >= 0):
            return None
        # each process has other images in the batch of the same number
        found = self.dist_context.all_gather((batch, self.loss.item(), self.names(batch) if batch >= 0 else []))
        self.batch = torch.full_like(self.batch, -1)
        batch, loss, images = min((f for f in found if f[0] >= 0), key=lambda f: f[0])
        return NonFiniteError(f'the loss is {loss}', epoch, batch, images, more)

    def raise_if_any(self, epoch: int, batch: int, weights: Iterable[torch.Tensor] = ()) -> None:
        """Check the noted losses, and weights that are about to be saved; all processes call it.

        Raises:
            NonFiniteError: One of them is not finite; raised in all processes.
        """
        error = self.pop(epoch)
        # sharded weights are checked where they lie
        own = (w.to_local() if hasattr(w, 'to_local') else w for w in weights)
        if error is None and self.dist_context.any_rank(not all(bool(w.isfinite().all()) for w in own)):
            error = NonFiniteError('the weights are not finite', epoch, batch)
        if error is not None:
            raise error


def _shown(images: List[str]) -> str:
    if not images:
        return ''
    few = ', '.join(images[:3])
    return f' ({few}{f" and {len(images) - 3} more images" if len(images) > 3 else ""})'
