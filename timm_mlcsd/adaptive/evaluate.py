"""What a policy does to a set of samples whose logits at all exits are known."""

from typing import Dict, List, NamedTuple, Sequence, Tuple, Union

import torch

from ..cost import ExitCost, ExitTime
from .policy import ExitPolicy

__all__ = ['Costs', 'Logits', 'PolicyResult', 'Samples', 'as_logits', 'as_targets', 'costs_of', 'evaluate_policy']

Logits = Union[torch.Tensor, Sequence[torch.Tensor]]
Costs = Union[Sequence[float], Sequence[ExitCost], Sequence[ExitTime]]


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


def as_logits(logits: Logits) -> torch.Tensor:
    """Logits of K exits on N samples as one tensor [K, N, C], float32 at least.

    Raises:
        ValueError: There are none, or they are not numbers.
    """
    logits = logits if isinstance(logits, torch.Tensor) else torch.stack(tuple(logits))
    if logits.ndim != 3 or 0 in logits.shape:
        raise ValueError(
            f'logits have shape {tuple(logits.shape)}; expected [exits, samples, classes], none of them 0.'
        )
    if logits.isnan().any():
        exit_, sample = (int(i) for i in logits.isnan().any(-1).nonzero()[0])
        raise ValueError(f'logits are NaN, first at exit {exit_}, sample {sample}.')
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def as_targets(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels [N] that fit logits [K, N, C].

    Raises:
        ValueError: Another number of them, or labels of other classes.
    """
    targets = torch.as_tensor(targets, device=logits.device)
    if targets.shape != logits.shape[1:2] or targets.is_floating_point():
        raise ValueError(
            f'targets have shape {tuple(targets.shape)} and type {targets.dtype}; expected {logits.shape[1]} integers.'
        )
    if targets.min() < 0 or targets.max() >= logits.shape[2]:
        raise ValueError(f'targets are in {int(targets.min())}..{int(targets.max())} for {logits.shape[2]} classes.')
    return targets


def costs_of(costs: Costs, policy: ExitPolicy) -> torch.Tensor:
    """What it costs to leave at each exit under a policy, [K] in float64.

    Args:
        costs: K cumulative numbers, taken as they are; or `ExitCost` or `ExitTime`, of which exits that are off need
            no head.
        policy: The policy.

    Raises:
        ValueError: There are not K of them, or they don't increase.
    """
    costs = list(costs)
    if len(costs) != policy.num_exits:
        raise ValueError(f'{len(costs)} costs for {policy.num_exits} exits.')
    if isinstance(costs[0], ExitCost):
        parts = [(c.stage_macs, c.head_macs) for c in costs]
    elif isinstance(costs[0], ExitTime):
        parts = costs
    else:
        total = torch.as_tensor(costs, dtype=torch.float64)
        if not (total.isfinite().all() and (total.diff() >= 0).all() and total[0] >= 0):
            raise ValueError(f'costs={costs} must be cumulative: numbers that do not decrease.')
        return total
    own = [stage + (head if policy.is_on(k) else 0) for k, (stage, head) in enumerate(parts)]
    return torch.tensor(own, dtype=torch.float64).cumsum(0)


class Samples:
    """Samples whose logits at all exits are known; what a policy's exits say of them is computed once.

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].

    Raises:
        ValueError: NaN, empty, or sizes that don't fit each other.
    """

    def __init__(self, logits: Logits, targets: torch.Tensor):
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
        memory = None
        for k in range(policy.num_exits):
            if on[k]:
                answer, scores[k], memory = policy.answer(k, self.logits[k], memory)
                predictions[k] = answer.argmax(-1)
        return scores, predictions

    def evaluate(self, policy: ExitPolicy, costs: Costs) -> PolicyResult:
        """What `evaluate_policy` gives."""
        total = costs_of(costs, policy)
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
def evaluate_policy(logits: Logits, targets: torch.Tensor, costs: Costs, policy: ExitPolicy) -> PolicyResult:
    """Count what a policy gets right and what it spends.

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].
        costs: K cumulative costs, or `ExitCost`.
        policy: The policy.

    Raises:
        ValueError: NaN, empty, or sizes that don't fit each other.

    Examples:
        ```python
        result = evaluate_policy(logits, targets, exit_costs(model, (3, 32, 32)), policy)
        print(result.accuracy, result.cost, result.exit_fractions)
        ```
    """
    return Samples(logits, targets).evaluate(policy, costs)
