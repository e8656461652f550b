"""Evaluation of exit policies on samples whose logits at all exits are cached."""

import math
import numbers
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, TypeGuard, Union

import numpy as np
import torch

from ..cost import ExitCost, ExitTime
from .policy import ExitPolicy

__all__ = [
    'Costs',
    'ExitLogits',
    'PolicyResult',
    'CachedLogits',
    'as_logits',
    'as_targets',
    'cumulative_costs',
    'evaluate_policy',
]

ExitLogits = Union[torch.Tensor, Sequence[torch.Tensor]]
Costs = Union[torch.Tensor, Sequence[float], Sequence[ExitCost], Sequence[ExitTime]]
# number of samples whose answers are computed at once
CHUNK = 2**16
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PolicyResult(NamedTuple):
    """Result of a policy on a set of samples.

    Attributes:
        accuracy: Top-1 accuracy in percent.
        cost: Mean cost per sample, in the unit of the costs.
        exit_fractions: Share of the samples that leave at each exit, [K].
        exit_index: Exit at which each sample leaves, [N].
        prediction: Predicted class of each sample, [N].
    """

    accuracy: float
    cost: float
    exit_fractions: List[float]
    exit_index: torch.Tensor
    prediction: torch.Tensor


def as_logits(logits: ExitLogits) -> torch.Tensor:
    """Convert logits of K exits on N samples to one tensor, [K, N, C].

    Args:
        logits: One tensor [K, N, C], or K tensors [N, C]. Excluded classes may have -inf; the largest logit of every
            sample must be finite.

    Returns:
        The logits in float32, or in float64 if they were.

    Raises:
        ValueError: The logits are empty, not real numbers, of different shapes, or not finite.
    """
    if not isinstance(logits, torch.Tensor):
        try:
            logits = torch.stack([torch.as_tensor(z) for z in logits])
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(
                f'logits: expected one tensor [samples, classes] per exit, all of one shape: {e}'
            ) from None
    if logits.is_complex() or logits.dtype == torch.bool:
        raise ValueError(f'logits have type {logits.dtype}; expected real numbers.')
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(
            f'logits have shape {tuple(logits.shape)}; expected [exits, samples, classes], none of them 0.'
        )
    check_finite(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_finite(logits: torch.Tensor) -> None:
    """Check that the largest logit of every sample is finite.

    At run time a sample without finite logits does not leave (`ExitPolicy.step`); fits and results would be wrong.

    Args:
        logits: Logits of K exits on N samples, [K, N, C].

    Raises:
        ValueError: The largest logit of a sample is not a finite number.
    """
    largest = logits.amax(-1)
    if not largest.isfinite().all():
        exit_, sample = (int(i) for i in (~largest.isfinite()).nonzero()[0])
        raise ValueError(
            f'logits are not finite, first at exit {exit_}, sample {sample}, where the largest is '
            f'{largest[exit_, sample].item()}; expected finite numbers, and -inf only for excluded classes.'
        )


def as_targets(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Check labels against logits.

    Args:
        targets: Labels, [N].
        logits: Logits of K exits on N samples, [K, N, C].

    Returns:
        The labels in int64 on the device of the logits, [N].

    Raises:
        ValueError: The number of labels differs from N, or a label is not a class index below C.
    """
    targets = torch.as_tensor(targets, device=logits.device)
    if targets.shape != logits.shape[1:2] or targets.dtype not in INTEGERS:
        raise ValueError(
            f'targets have shape {tuple(targets.shape)} and type {targets.dtype}; expected {logits.shape[1]} integers.'
        )
    if targets.min() < 0 or targets.max() >= logits.shape[2]:
        raise ValueError(
            f'targets are in {int(targets.min())}..{int(targets.max())}; expected 0..{logits.shape[2] - 1} for '
            f'{logits.shape[2]} classes.'
        )
    return targets.long()


def cumulative_costs(costs: Costs, policy: ExitPolicy) -> torch.Tensor:
    """Compute the cumulative cost of answering at each exit under a policy.

    Args:
        costs: Cumulative costs, [K], used unchanged; or `ExitCost` or `ExitTime` per exit, in which case the heads of
            exits that are off are not counted.
        policy: Exit policy with K exits.

    Returns:
        Cumulative cost per exit in float64, [K], in the unit of `costs`.

    Raises:
        ValueError: The number of costs differs from K, or they are not finite, non-decreasing numbers of at least 0.
    """
    entries: Sequence[Union[float, ExitCost, ExitTime]] = (
        costs.tolist() if isinstance(costs, torch.Tensor) else list(costs)
    )
    if len(entries) != policy.num_exits:
        raise ValueError(f'costs: expected {policy.num_exits} entries, one per exit, got {len(entries)}.')
    macs: List[Tuple[float, float]] = [(c.stage_macs, c.head_macs) for c in entries if isinstance(c, ExitCost)]
    times: List[Tuple[float, float]] = [(c.stage_ms, c.head_ms) for c in entries if isinstance(c, ExitTime)]
    parts = next((pairs for pairs in (macs, times) if len(pairs) == len(entries)), None)
    values = entries if parts is None else [number for pair in parts for number in pair]
    valid = [value for value in values if is_number(value) and 0 <= value < math.inf]
    if len(valid) < len(values):
        raise ValueError(f'costs={entries}: expected finite numbers of at least 0, or ExitCost, or ExitTime.')
    if parts is None:
        total = torch.tensor([float(value) for value in valid], dtype=torch.float64)
        if not (total.diff() >= 0).all():
            raise ValueError(f'costs={entries}: expected cumulative costs, which do not decrease.')
        return total
    steps = [stage + (head if policy.is_on(k) else 0) for k, (stage, head) in enumerate(parts)]
    return torch.tensor(steps, dtype=torch.float64).cumsum(0)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class CachedLogits:
    """Samples with cached logits at all exits; scores and predictions of a policy are computed once and kept.

    Args:
        logits: Logits of K exits on N samples, [K, N, C].
        targets: Labels, [N].

    Raises:
        ValueError: Logits are empty or not finite, or logits and targets do not fit each other.
    """

    def __init__(self, logits: ExitLogits, targets: torch.Tensor):
        self.logits = as_logits(logits)
        self.targets = as_targets(targets, self.logits)
        self._cache: Dict[Tuple[Any, ...], Tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def key(policy: ExitPolicy) -> Tuple[Any, ...]:
        """Key of equal answers: what the policy computes, and which exits take part in it, [K] at the end."""
        # without averaging and patience, an exit's answer does not depend on the other exits
        independent = policy.aggregate == 'last' and policy.score != 'patience'
        on = [independent or policy.is_on(k) for k in range(policy.num_exits)]
        return (policy.score, policy.aggregate, policy.temperatures, policy.weights, *on)

    def scored(self, policy: ExitPolicy) -> Tuple[np.ndarray, np.ndarray]:
        """Scores and correctness of all exits if no sample leaves, [K, N] each, on the CPU."""
        scores, predictions = self.answers(policy)
        return scores.cpu().numpy(), (predictions == self.targets).cpu().numpy()

    def answers(self, policy: ExitPolicy) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scores and predictions of all exits if no sample leaves.

        Args:
            policy: Exit policy with K exits; its thresholds only matter for which exits are on.

        Returns:
            Scores, [K, N], and predicted classes, [K, N]. Exits that are off may have the score -inf.
        """
        policy.check(len(self.logits))
        key = self.key(policy)
        if key not in self._cache:
            self._cache[key] = self._compute_answers(policy, key[-policy.num_exits :])
        return self._cache[key]

    def _compute_answers(self, policy: ExitPolicy, on: Sequence[bool]) -> Tuple[torch.Tensor, torch.Tensor]:
        shape, device = self.logits.shape[:2], self.logits.device
        scores = torch.full(shape, -torch.inf, dtype=self.logits.dtype, device=device)
        predictions = torch.zeros(shape, dtype=torch.long, device=device)
        for start in range(0, shape[1], CHUNK):
            rows, history = slice(start, start + CHUNK), None
            for k in range(policy.num_exits):
                if on[k]:
                    answer, scores[k, rows], history = policy.step(k, self.logits[k, rows], history)
                    predictions[k, rows] = answer.argmax(-1)
                    # temperatures and weights can overflow finite logits
                    if (scores[k, rows] == -torch.inf).any():
                        check_finite(answer[None])
        return scores, predictions

    def evaluate(self, policy: ExitPolicy, costs: Costs) -> PolicyResult:
        """Evaluate a policy, as `evaluate_policy` does.

        Args:
            policy: Exit policy with K exits.
            costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.

        Returns:
            Accuracy, mean cost and exits of the samples.
        """
        total = cumulative_costs(costs, policy)
        scores, predictions = self.answers(policy)
        exit_index = torch.full_like(predictions[0], policy.num_exits - 1)
        prediction = predictions[-1]
        for k in reversed(range(policy.num_exits - 1)):
            leaves = scores[k] >= policy.thresholds[k]
            exit_index = torch.where(leaves, k, exit_index)
            prediction = torch.where(leaves, predictions[k], prediction)
        counts = exit_index.bincount(minlength=policy.num_exits).double().cpu()
        return PolicyResult(
            accuracy=100 * (prediction == self.targets).double().mean().item(),
            cost=(counts * total).sum().item() / len(self.targets),
            exit_fractions=(counts / len(self.targets)).tolist(),
            exit_index=exit_index,
            prediction=prediction,
        )


@torch.no_grad()
def evaluate_policy(logits: ExitLogits, targets: torch.Tensor, costs: Costs, policy: ExitPolicy) -> PolicyResult:
    """Compute accuracy and mean cost of a policy.

    Args:
        logits: Logits of K exits on N samples, [K, N, C].
        targets: Labels, [N].
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        policy: Exit policy with K exits.

    Returns:
        Accuracy, mean cost and exits of the samples.

    Raises:
        ValueError: Logits are empty or not finite, or the arguments do not fit each other.

    Examples:
        ```python
        result = evaluate_policy(logits, targets, exit_costs(model, (3, 32, 32)), policy)
        print(result.accuracy, result.cost, result.exit_fractions)
        ```
    """
    return CachedLogits(logits, targets).evaluate(policy, costs)
