"""Losses that are no numbers any more: found without waiting for the device at every step, told with their images."""

from typing import Callable, Iterable, List, Optional

import torch

from ..errors import UserError
from .world import ALONE, World

__all__ = ['NotFinite', 'Watch']


class NotFinite(UserError):
    """Loss or weights are no numbers any more.

    Args:
        what: Which of them, and what it is.
        epoch: The epoch.
        batch: Number of the batch.
        images: The batch's images, if known.
        more: What else there is to say of it.
    """

    def __init__(self, what: str, epoch: int, batch: int, images: Iterable[str] = (), more: str = ''):
        self.images = list(images)
        super().__init__(f'{what} at epoch {epoch}, batch {batch}{_shown(self.images)}{more}')


class Watch:
    """Remembers, on the device, the first batch of an epoch whose loss is not finite.

    Args:
        device: Of the loss.
        world: The processes that train.
        names: The images of the batch of a number.
    """

    def __init__(self, device: torch.device, world: World = ALONE, names: Optional[Callable[[int], List[str]]] = None):
        self.world = world
        self.names = names or (lambda i: [])
        self.batch = torch.tensor(-1, device=device)
        self.loss = torch.zeros((), device=device)

    def see(self, batch: int, loss: torch.Tensor) -> None:
        """Look at the loss of a batch; nobody waits."""
        is_first = (self.batch < 0) & ~loss.isfinite()
        self.batch = torch.where(is_first, batch, self.batch)
        self.loss = torch.where(is_first, loss.float(), self.loss)

    def found(self, epoch: int, more: str = '') -> Optional[NotFinite]:
        """The first such batch in any process, and forgets it; all processes call it."""
        batch = int(self.batch)
        if not self.world.any(batch >= 0):
            return None
        # each process has other images in the batch of a number
        all_found = self.world.gather((batch, self.loss.item(), self.names(batch) if batch >= 0 else []))
        self.batch = torch.full_like(self.batch, -1)
        batch, loss, images = min((f for f in all_found if f[0] >= 0), key=lambda f: f[0])
        return NotFinite(f'the loss is {loss}', epoch, batch, images, more)

    def check(self, epoch: int, batch: int, weights: Iterable[torch.Tensor] = ()) -> None:
        """Look at all that was seen, and at weights that are to be saved; all processes call it.

        Raises:
            NotFinite: In all of them.
        """
        bad = self.found(epoch)
        # sharded ones are looked at where they lie
        own = (w.to_local() if hasattr(w, 'to_local') else w for w in weights)
        if bad is None and self.world.any(not all(bool(w.isfinite().all()) for w in own)):
            bad = NotFinite('the weights are not finite', epoch, batch)
        if bad is not None:
            raise bad


def _shown(images: List[str]) -> str:
    if not images:
        return ''
    few = ', '.join(images[:3])
    return f' ({few}{f" and {len(images) - 3} more images" if len(images) > 3 else ""})'
