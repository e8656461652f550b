"""Samples that run through the stages together, and the answers of those that have left."""

from functools import partial
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .policy import ExitHistory, ExitPolicy

__all__ = ['ActiveBatch', 'Answers', 'Prediction', 'check_images']


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
        rows: Name of each sample, [N], such as its index in the caller's batch.
        state: State of the last stage that ran; the images [N, C, H, W] before stage 0.
        images: Images of the caller if the state may share memory with them, because those are never changed.
        history: History of the exits so far; None before the first.

    Attributes:
        rows: Name of each remaining sample, in the row order of the state.
        state: State of the last stage that ran, of the remaining samples.
        history: History of the exits so far, of the remaining samples.
        exit_index: Last exit that answered; None before the first.
        answer: Logits of this exit for the remaining samples, [len(rows), C].
        score: Score of this exit for the samples that it answered.
    """

    answer: torch.Tensor
    score: torch.Tensor

    def __init__(
        self,
        rows: List[Any],
        state: Any,
        images: Optional[torch.Tensor] = None,
        history: Optional[ExitHistory] = None,
    ):
        self.rows = rows
        self.state = state
        self.history = history
        self.exit_index: Optional[int] = None
        self._images = images

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

    def leave(self, policy: ExitPolicy) -> Tuple[List[Any], torch.Tensor]:
        """Remove the samples whose score reaches the threshold of the exit that answered last.

        Args:
            policy: Exit policy; at its last exit, all samples leave.

        Returns:
            Names of the samples that left, [N], and their logits, [N, C].
        """
        k = self.exit_index
        assert k is not None  # an exit has answered
        leaves = [True] if k == policy.num_exits - 1 else (self.score >= policy.thresholds[k]).tolist()
        if all(leaves):
            return self.leave_all()
        leaving = [i for i, is_leaving in enumerate(leaves) if is_leaving]
        if not leaving:
            return [], self.answer[:0]
        left = [self.rows[i] for i in leaving], self.answer[leaving]
        # the last remaining rows replace those that left
        count = len(leaves) - len(leaving)
        moves = list(zip((i for i in range(count, len(leaves)) if not leaves[i]), leaving))
        for source, gap in moves:
            self.rows[gap] = self.rows[source]
        del self.rows[count:]
        compact = partial(_compact, count=count, moves=moves, images=self._images)
        self.state, self.answer = _map_tensors(self.state, compact), compact(self.answer)
        self.history = ExitHistory(*_map_tensors(self.history, compact))
        return left

    def leave_all(self) -> Tuple[List[Any], torch.Tensor]:
        """Remove all samples; returns their names, [N], and their logits at the last exit that answered, [N, C]."""
        rows, self.rows = self.rows, []
        return rows, self.answer

    def copy(self) -> 'ActiveBatch':
        """Copy of the batch between two stages, which shares no memory and holds none for samples that have left."""
        history = self.history and ExitHistory(*_map_tensors(self.history, torch.clone))
        return ActiveBatch(self.rows, _map_tensors(self.state, torch.clone), None, history)

    @classmethod
    def merge(cls, batches: Sequence['ActiveBatch']) -> 'ActiveBatch':
        """Join batches that wait for the same stage, with images of the same size, dtype and device."""
        if len(batches) == 1:
            return batches[0]
        histories = [batch.history for batch in batches if batch.history is not None]
        return cls(
            [row for batch in batches for row in batch.rows],
            _concatenate([batch.state for batch in batches]),
            None,
            ExitHistory(*_concatenate(histories)) if histories else None,
        )


class Answers:
    """Answers for the samples of one batch, collected exit by exit."""

    def __init__(self) -> None:
        # index of each sample that has left in the batch, in the order of leaving
        self._rows: List[int] = []
        self._exits: List[int] = []
        self._logits: List[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, k: int, rows: List[int], logits: torch.Tensor) -> None:
        """Record that samples leave at exit k.

        Args:
            k: Index of the exit.
            rows: Index of each of them in the batch, [N]; may be empty.
            logits: Their logits, [N, C].
        """
        if rows:
            self._rows += rows
            self._exits += [k] * len(rows)
            self._logits.append(logits)

    def prediction(self, costs: Sequence[float]) -> Prediction:
        """Answers in the order of the batch; `costs` is the cumulative cost per exit, [K]."""
        device = self._logits[0].device
        order = sorted(range(len(self._rows)), key=self._rows.__getitem__)
        logits = self._logits[0] if len(self._logits) == 1 else torch.cat(self._logits)
        # samples of other batches may have left before all of these did at once, and changed the order
        if order != list(range(len(order))):
            logits = logits[order]
        exits = [self._exits[i] for i in order]
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        return Prediction(
            logits,
            torch.tensor(exits, device=device),
            torch.tensor([costs[k] for k in exits], dtype=dtype, device=device),
        )


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to all tensors in nested tuples; faster than PyTorch's pytree utilities."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    return tree if tree is None else tuple(_map_tensors(t, function) for t in tree)


def _concatenate(trees: Sequence[Any]) -> Any:
    """Concatenate nested tuples of the same structure, tensor by tensor, along the batch dimension."""
    if isinstance(trees[0], torch.Tensor):
        return torch.cat(list(trees))
    return None if trees[0] is None else tuple(_concatenate(parts) for parts in zip(*trees))


def _compact(
    t: torch.Tensor, count: int, moves: Sequence[Tuple[int, int]], images: Optional[torch.Tensor]
) -> torch.Tensor:
    """Apply `moves` (from, to) to the rows of a tensor and return its first `count` rows.

    On a CPU this works in place, which is faster than a copy of all rows; elsewhere it is one indexing kernel. The
    caller's images are never changed.
    """
    dense = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
    is_given = images is not None and t.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    if t.device.type == 'cpu' and dense and not is_given:
        for source, gap in moves:
            t[gap] = t[source]
        return t[:count]
    order = list(range(count))
    for source, gap in moves:
        order[gap] = source
    return t[order]
