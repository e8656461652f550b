"""What a policy does to a set of samples whose logits at all exits are known."""

import math
import numbers
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple, Union

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
Costs = Union[Sequence[float], Sequence[ExitCost], Sequence[ExitTime]]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PolicyResult(NamedTuple):
    """How a policy does.

    Attributes:
        accuracy: Top-1 in percent.
        cost: Mean cost of a sample, in the unit of the costs.
        exit_fractions: Share of the samples that leave at each exit, [K].
        exit_index: Where each sample leaves, [N].
        prediction: What it is taken for, [N].
    """

    accuracy: float
    cost: float
    exit_fractions: List[float]
    exit_index: torch.Tensor
    prediction: torch.Tensor


def as_logits(logits: ExitLogits) -> torch.Tensor:
    """Logits of K exits on N samples as one tensor [K, N, C], float32 at least.

    A class that cannot be may have -inf; the largest logit of every sample must be a finite number.

    Raises:
        ValueError: There are none, or they are not numbers.
    """
    if not isinstance(logits, torch.Tensor):
        try:
            logits = torch.stack([torch.as_tensor(z) for z in logits])
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f'logits: expected one tensor [samples, classes] per exit, all alike: {e}') from None
    if logits.is_complex() or logits.dtype == torch.bool:
        raise ValueError(f'logits have type {logits.dtype}; expected real numbers.')
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(
            f'logits have shape {tuple(logits.shape)}; expected [exits, samples, classes], none of them 0.'
        )
    check_finite(logits)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_finite(logits: torch.Tensor) -> None:
    """Raise a ValueError where the largest logit of a sample, in [K, N, C], is not a finite number.

    At run time such a sample doesn't leave (`ExitPolicy.answer`); what is fitted or counted would be wrong.
    """
    largest = logits.amax(-1)
    if not largest.isfinite().all():
        exit_, sample = (int(i) for i in (~largest.isfinite()).nonzero()[0])
        raise ValueError(
            f'logits are not finite, first at exit {exit_}, sample {sample}, where the largest is '
            f'{largest[exit_, sample].item()}; expected numbers, and -inf only for a class that cannot be.'
        )


def as_targets(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels [N] that fit logits [K, N, C].

    Raises:
        ValueError: Another number of them, or labels of other classes.
    """
    targets = torch.as_tensor(targets, device=logits.device)
    if targets.shape != logits.shape[1:2] or targets.dtype not in INTEGERS:
        raise ValueError(
            f'targets have shape {tuple(targets.shape)} and type {targets.dtype}; expected {logits.shape[1]} integers.'
        )
    if targets.min() < 0 or targets.max() >= logits.shape[2]:
        raise ValueError(f'targets are in {int(targets.min())}..{int(targets.max())} for {logits.shape[2]} classes.')
    return targets.long()


def cumulative_costs(costs: Costs, policy: ExitPolicy) -> torch.Tensor:
    """What it costs to leave at each exit under a policy, [K] in float64.

    Args:
        costs: K cumulative numbers, taken as they are; or `ExitCost` or `ExitTime`, of which exits that are off need
            no head.
        policy: The policy.

    Raises:
        ValueError: There are not K of them, or they are not finite numbers that don't decrease.
    """
    costs = costs.tolist() if isinstance(costs, torch.Tensor) else list(costs)
    if len(costs) != policy.num_exits:
        raise ValueError(f'{len(costs)} costs for {policy.num_exits} exits.')
    parts = None
    if all(isinstance(c, ExitCost) for c in costs):
        parts = [(c.stage_macs, c.head_macs) for c in costs]
    elif all(isinstance(c, ExitTime) for c in costs):
        parts = [tuple(c) for c in costs]
    flat = costs if parts is None else [number for part in parts for number in part]
    if not all(is_number(number) and 0 <= number < math.inf for number in flat):
        raise ValueError(f'costs={costs}: expected finite numbers of at least 0, or ExitCost, or ExitTime.')
    if parts is None:
        total = torch.tensor([float(c) for c in costs], dtype=torch.float64)
        if not (total.diff() >= 0).all():
            raise ValueError(f'costs={costs} must be cumulative: numbers that do not decrease.')
        return total
    own = [stage + (head if policy.is_on(k) else 0) for k, (stage, head) in enumerate(parts)]
    return torch.tensor(own, dtype=torch.float64).cumsum(0)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, and not a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class CachedLogits:
    """Samples whose logits at all exits are known; what a policy's exits say of them is computed once.

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].

    Raises:
        ValueError: Logits that are not finite, empty, or sizes that don't fit each other.
    """

    def __init__(self, logits: ExitLogits, targets: torch.Tensor):
        self.logits = as_logits(logits)
        self.targets = as_targets(targets, self.logits)
        self._known: Dict[Tuple, Tuple[torch.Tensor, torch.Tensor]] = {}

    def answers(self, policy: ExitPolicy) -> Tuple[torch.Tensor, torch.Tensor]:
        """Scores and predictions of all exits as if no sample left, [K, N] each; -inf where an exit is off."""
        policy.check(len(self.logits))
        alone = policy.aggregate == 'last' and policy.score != 'patience'  # what an exit says is its own affair
        on = [alone or policy.is_on(k) for k in range(policy.num_exits)]
        key = (policy.score, policy.aggregate, policy.temperatures, policy.weights, *on)
        if key not in self._known:
            self._known[key] = self._ask(policy, on)
        return self._known[key]

    def _ask(self, policy: ExitPolicy, on: Sequence[bool]) -> Tuple[torch.Tensor, torch.Tensor]:
        shape, device = self.logits.shape[:2], self.logits.device
        scores = torch.full(shape, -torch.inf, dtype=self.logits.dtype, device=device)
        predictions = torch.zeros(shape, dtype=torch.long, device=device)
        history = None
        for k in range(policy.num_exits):
            if on[k]:
                answer, scores[k], history = policy.step(k, self.logits[k], history)
                predictions[k] = answer.argmax(-1)
                if (scores[k] == -torch.inf).any():  # after temperatures and weights; at run time nobody would leave
                    check_finite(answer[None])
        return scores, predictions

    def evaluate(self, policy: ExitPolicy, costs: Costs) -> PolicyResult:
        """What `evaluate_policy` gives."""
        total = cumulative_costs(costs, policy)
        scores, predictions = self.answers(policy)
        leaves = torch.stack([score >= t for score, t in zip(scores, [*policy.thresholds, -torch.inf])])
        exit_index = leaves.int().argmax(0)  # the first; the last exit lets everybody leave
        prediction = predictions.gather(0, exit_index[None])[0]
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
    """Count what a policy gets right and what it spends.

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].
        costs: K cumulative costs, or `ExitCost`.
        policy: The policy.

    Raises:
        ValueError: Logits that are not finite, empty, or sizes that don't fit each other.

    Examples:
        ```python
        result = evaluate_policy(logits, targets, exit_costs(model, (3, 32, 32)), policy)
        print(result.accuracy, result.cost, result.exit_fractions)
        ```
    """
    return CachedLogits(logits, targets).evaluate(policy, costs)
