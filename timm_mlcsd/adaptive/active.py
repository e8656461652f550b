"""Samples that run through the stages together, and the answers of those that have left."""

from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .policy import ExitHistory, ExitPolicy
from .trees import concatenate, map_tensors

__all__ = ['ActiveBatch', 'Answers', 'CostTable', 'Prediction', 'check_images']


class Prediction(NamedTuple):
    """Answers for a batch of B images, in the order of the batch.

    Attributes:
        logits: Logits, [B, C]; their softmax gives the class probabilities.
        exit_index: Index of the exit that answered each image, from 0, [B].
        cost: Cost of each image, in the unit of the costs, [B], float64 (float32 on MPS).
    """

    logits: torch.Tensor
    exit_index: torch.Tensor
    cost: torch.Tensor


def check_images(x: torch.Tensor) -> None:
    """Raise a ValueError for images that are not a floating point tensor [B, C, H, W] with B at least 1."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f'images are {kind}; expected a normalised floating point tensor [B, C, H, W].')
    if x.ndim != 4 or not len(x):
        raise ValueError(f'images have shape {tuple(x.shape)}; expected [B, C, H, W], B at least 1.')


class ActiveBatch:
    """Samples that run through the stages together until each of them leaves.

    Args:
        numbers: Number of the caller's batch that each sample belongs to, [N].
        rows: Row of each sample in that batch, [N], on the device of the images.
        state: State of the last stage that ran; the images [N, C, H, W] before stage 0.
        images: Images of the caller if the state may share memory with them, because those are never changed.
        history: History of the exits so far; None before the first.

    Attributes:
        numbers: Numbers of the remaining samples, in the row order of the state.
        rows: Rows of the remaining samples in their batches.
        state: State of the last stage that ran, of the remaining samples.
        history: History of the exits so far, of the remaining samples.
        exit_index: Last exit that answered; None before the first.
        answer: Logits of this exit for the remaining samples, [len(numbers), C].
        score: Score of this exit for the samples that it answered.
    """

    answer: torch.Tensor
    score: torch.Tensor

    def __init__(
        self,
        numbers: List[int],
        rows: torch.Tensor,
        state: Any,
        images: Optional[torch.Tensor] = None,
        history: Optional[ExitHistory] = None,
    ):
        self.numbers = numbers
        self.rows = rows
        self.state = state
        self.history = history
        self.exit_index: Optional[int] = None
        self._images = images

    @classmethod
    def of(cls, images: torch.Tensor, number: int = 0) -> 'ActiveBatch':
        """Start with all images [N, C, H, W] of a caller's batch, which has a number."""
        return cls([number] * len(images), torch.arange(len(images), device=images.device), images, images)

    def __len__(self) -> int:
        return len(self.numbers)

    def run(self, k: int, run_exit: Callable[[Any], Tuple[Any, Optional[torch.Tensor]]], policy: ExitPolicy) -> bool:
        """Run stage k and, if it is on, exit k.

        Args:
            k: Index of the stage.
            run_exit: Function from the state before stage k to the state after it, and logits or None.
            policy: Exit policy.

        Returns:
            Whether the exit answered.
        """
        self.state, logits = run_exit(self.state)
        if logits is None:
            return False
        self.answer, self.score, self.history = policy.step(k, logits, self.history)
        self.exit_index = k
        return True

    def leave(self, policy: ExitPolicy) -> 'Leaving':
        """Remove the samples whose score reaches the threshold of the exit that answered last.

        On a GPU the host waits for the device once, to learn which samples leave; nothing waits at the last exit.

        Args:
            policy: Exit policy; at its last exit, all samples leave.

        Returns:
            The samples that left.
        """
        k = self.exit_index
        assert k is not None  # an exit has answered
        if k == policy.num_exits - 1:
            return self.leave_all()
        is_sure = self.score >= policy.thresholds[k]
        leaves = is_sure.tolist()
        if all(leaves):
            return self.leave_all()
        leaving = [i for i, is_leaving in enumerate(leaves) if is_leaving]
        if not leaving:
            return Leaving([], self.rows[:0], self.answer[:0])
        count = len(leaves) - len(leaving)
        numbers = [self.numbers[i] for i in leaving]
        if _is_on_host(self.answer):
            left = Leaving(numbers, self.rows[leaving], self.answer[leaving])
            # the last remaining rows replace those that left
            moves = list(zip((i for i in range(count, len(leaves)) if not leaves[i]), leaving))
            for source, gap in moves:
                self.numbers[gap] = self.numbers[source]
            del self.numbers[count:]
            self._keep(partial(_compact, count=count, moves=moves, images=self._images))
        else:
            # the device finds the rows itself: indices from the host would have to be copied there
            order = is_sure.byte().argsort(stable=True)
            left = Leaving(numbers, self.rows[order[count:]], self.answer[order[count:]])
            self.numbers = [number for number, is_leaving in zip(self.numbers, leaves) if not is_leaving]
            self._keep(lambda t: t[order[:count]])
        return left

    def _keep(self, remaining_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reduce all tensors to the remaining rows."""
        self.state, self.answer, self.rows = map_tensors((self.state, self.answer, self.rows), remaining_of)
        self.history = ExitHistory(*map_tensors(self.history, remaining_of))

    def leave_all(self) -> 'Leaving':
        """Remove all samples; their answers are those of the last exit that answered."""
        numbers, self.numbers = self.numbers, []
        return Leaving(numbers, self.rows, self.answer)

    def copy(self) -> 'ActiveBatch':
        """Copy of the batch between two stages, which shares no memory and holds none for samples that have left."""
        history = self.history and ExitHistory(*map_tensors(self.history, torch.clone))
        return ActiveBatch(self.numbers, self.rows.clone(), map_tensors(self.state, torch.clone), None, history)

    @classmethod
    def merge(cls, batches: Sequence['ActiveBatch']) -> 'ActiveBatch':
        """Join batches that wait for the same stage, with images of the same size, dtype and device."""
        if len(batches) == 1:
            return batches[0]
        histories = [batch.history for batch in batches if batch.history is not None]
        return cls(
            [number for batch in batches for number in batch.numbers],
            torch.cat([batch.rows for batch in batches]),
            concatenate([batch.state for batch in batches]),
            None,
            ExitHistory(*concatenate(histories)) if histories else None,
        )


class Leaving(NamedTuple):
    """Samples that leave at an exit.

    Attributes:
        numbers: Number of the caller's batch that each belongs to, [N].
        rows: Row of each in that batch, [N].
        logits: Their logits, [N, C].
    """

    numbers: List[int]
    rows: torch.Tensor
    logits: torch.Tensor

    def by_number(self) -> Iterator[Tuple[int, 'Leaving']]:
        """Iterate over the samples of each caller's batch; their tensors are no views of larger ones."""
        places: Dict[int, List[int]] = {}
        for place, number in enumerate(self.numbers):
            places.setdefault(number, []).append(place)
        for number, own in places.items():
            # on a GPU samples keep their order, and those of a batch are neighbours
            is_slice = own[-1] - own[0] + 1 == len(own)
            rows, logits = (t[own[0] : own[-1] + 1].clone() if is_slice else t[own] for t in (self.rows, self.logits))
            yield number, Leaving([number] * len(own), rows, logits)


class Answers:
    """Answers for the samples of one batch, collected exit by exit on the device of the images."""

    def __init__(self) -> None:
        self._exits: List[int] = []
        self._left: List[Leaving] = []

    def __len__(self) -> int:
        return sum(len(left.numbers) for left in self._left)

    def add(self, k: int, left: Leaving) -> None:
        """Record that samples leave at exit k; there may be none."""
        if left.numbers:
            self._exits.append(k)
            self._left.append(left)

    def prediction(self, costs: 'CostTable') -> Prediction:
        """Answers in the order of the batch."""
        logits = torch.cat([left.logits for left in self._left])
        rows = torch.cat([left.rows for left in self._left])
        exits = torch.cat([torch.full_like(left.rows, k) for k, left in zip(self._exits, self._left)])
        logits, exits = (torch.empty_like(t).index_copy_(0, rows, t) for t in (logits, exits))
        return Prediction(logits, exits, costs.on(exits.device)[exits])


class CostTable:
    """Cumulative costs of the exits, copied to a device once.

    Args:
        costs: Cumulative cost per exit, [K].
    """

    def __init__(self, costs: Sequence[float]):
        self.costs = list(costs)
        self._copies: Dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        """The costs on a device, [K], float64 (float32 on MPS)."""
        if device not in self._copies:
            dtype = torch.float32 if device.type == 'mps' else torch.float64
            self._copies[device] = torch.tensor(self.costs, dtype=dtype, device=device)
        return self._copies[device]


def _is_on_host(t: torch.Tensor) -> bool:
    return t.device.type == 'cpu'


def _compact(
    t: torch.Tensor, count: int, moves: Sequence[Tuple[int, int]], images: Optional[torch.Tensor]
) -> torch.Tensor:
    """Apply `moves` (from, to) to the rows of a tensor in main memory and return its first `count` rows.

    This works in place, which is faster than a copy of all rows; the caller's images are never changed.
    """
    dense = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
    is_given = images is not None and t.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    if dense and not is_given:
        for source, gap in moves:
            t[gap] = t[source]
        return t[:count]
    order = list(range(count))
    for source, gap in moves:
        order[gap] = source
    return t[order]
