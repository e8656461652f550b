"""Dynamic rebatching: samples of several batches that remain after an exit run through the next stage together."""

from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from .active import ActiveBatch, Answers, CostTable, Prediction, check_images
from .policy import ExitPolicy

__all__ = ['Stream']

# images that wait per image of a full stage, by default
WAITING = 4
# images whose answers are held per image that may wait: one rare late image must not delay all later ones for ever
HELD = 16


class Stream:
    """Batches of images on their way through the stages of a network, as in DREX (arXiv:2512.15705).

    In front of every stage, images wait until there are enough of them for a full batch.

    Args:
        run_exit: Function per stage from the state before it to the state after it, and logits or None, [K].
        policy: Exit policy.
        costs: Cumulative cost of answering at each exit.
        check_mode: Function that raises an error if the network is in training mode.
        batch_size: Number of waiting images with which a stage runs; default: the size of the first batch.
        max_waiting: Number of images that may wait in front of all stages together; default: 4 x `batch_size`.

    Raises:
        ValueError: `batch_size` is not a positive integer, or `max_waiting` is not an integer of at least 0.
    """

    def __init__(
        self,
        run_exit: Sequence[Callable[[Any], Tuple[Any, Optional[torch.Tensor]]]],
        policy: ExitPolicy,
        costs: CostTable,
        check_mode: Callable[[], None],
        batch_size: Optional[int] = None,
        max_waiting: Optional[int] = None,
    ):
        for name, value, low in (('batch_size', batch_size, 1), ('max_waiting', max_waiting, 0)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise ValueError(f'{name}={value!r}: expected a number of images, an integer of at least {low}.')
        self.run_exit = run_exit
        self.policy = policy
        self.costs = costs
        self.check_mode = check_mode
        self.batch_size = batch_size
        self.max_waiting = max_waiting
        self.waiting: List[List[ActiveBatch]] = [[] for _ in run_exit]
        # number of images in `waiting`
        self.counts = [0] * len(run_exit)
        # size and answers of the batches that are not answered in full, by their number in the stream
        self.open: Dict[int, Tuple[int, Answers]] = {}
        self.num_batches = 0
        self._kind: Optional[Tuple[Any, ...]] = None

    def predictions(self, batches: Iterable[torch.Tensor]) -> Iterator[Prediction]:
        """Yield the answers for each batch, in the order of the batches."""
        # without a context manager around `yield` or the caller's iterable, both keep their own gradient mode
        for images in batches:
            yield from self.add(images)
        yield from self.finish()

    @torch.no_grad()
    def add(self, images: torch.Tensor) -> List[Prediction]:
        """Take in a batch and run the stages that are due.

        Args:
            images: Images, [B, C, H, W], B at least 1.

        Returns:
            Answers that are complete and whose predecessors are.
        """
        self.check_mode()
        check_images(images)
        if self.batch_size is None:
            self.batch_size = len(images)
        if self.max_waiting is None:
            self.max_waiting = WAITING * self.batch_size
        kind = _kind_of(images)
        if kind != self._kind:
            # other images cannot be concatenated, and stages of an exported graph know only their latest image size
            self._run_all()
            self._kind = kind
        self.open[self.num_batches] = len(images), Answers()
        self._wait(0, ActiveBatch.of(images, self.num_batches))
        self.num_batches += 1
        while (k := self._next_stage()) is not None:
            self._run_stage(k)
        found = self._pop_complete()
        if sum(size for size, _ in self.open.values()) > HELD * self.max_waiting:
            self._run_all()
            found += self._pop_complete()
        return found

    @torch.no_grad()
    def finish(self) -> List[Prediction]:
        """Run the stages until no image waits, and return the remaining answers."""
        if self.open:
            self.check_mode()
        self._run_all()
        return self._pop_complete()

    def _wait(self, k: int, batch: ActiveBatch) -> None:
        """Put images in front of stage k."""
        self.counts[k] += len(batch)
        assert self.batch_size is not None  # set with the first batch
        if self.counts[k] < self.batch_size:
            # the caller may overwrite its images meanwhile, and a view would keep the rows of those that left
            batch = batch.copy()
        self.waiting[k].append(batch)

    def _next_stage(self) -> Optional[int]:
        """Index of the stage to run now; None if all images can wait."""
        assert self.batch_size is not None and self.max_waiting is not None  # set with the first batch
        for k, count in enumerate(self.counts):
            if count >= self.batch_size:
                return k  # no deeper one is full: a full stage runs at once, and fills none but its successor
        if sum(self.counts) > self.max_waiting:
            # the fullest loses least by running now; of several, the deepest is nearest to its answers
            return max(range(len(self.counts)), key=lambda k: (self.counts[k], k))
        return None

    def _run_stage(self, k: int) -> None:
        """Run all images that wait in front of stage k through it."""
        batch = ActiveBatch.merge(self.waiting[k])
        self.waiting[k], self.counts[k] = [], 0
        while not batch.run(k, self.run_exit[k], self.policy):
            k += 1  # no sample leaves at an exit that is off, so waiting there would gain nothing
        for number, left in batch.leave(self.policy).by_number():
            self.open[number][1].add(k, left)
        if len(batch):
            self._wait(k + 1, batch)

    def _run_all(self) -> None:
        """Run the stages until no image waits: from the first to the last, so that images still meet on their way."""
        if not any(self.counts):
            return
        assert self._kind is not None  # set with the first batch
        *_, device, is_enabled, dtype = self._kind
        # the context may have changed since the states were computed
        with torch.autocast(device.type, dtype, is_enabled):
            for k in range(len(self.counts)):
                if self.counts[k]:
                    self._run_stage(k)

    def _pop_complete(self) -> List[Prediction]:
        """Remove the first batches as long as they are answered in full, and return their answers."""
        found = []
        while self.open:
            number, (size, answers) = next(iter(self.open.items()))
            if len(answers) < size:
                break
            found.append(answers.prediction(self.costs))
            del self.open[number]
        return found


def _kind_of(images: torch.Tensor) -> Tuple[Any, ...]:
    """What images must have in common to be concatenated, with the autocast under which they run."""
    device = images.device
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return images.shape[1:], images.dtype, device, *autocast
