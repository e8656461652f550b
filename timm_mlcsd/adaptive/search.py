"""Search for the thresholds with the highest accuracy within a budget, or the lowest cost for an accuracy.

With all thresholds but one fixed, accuracy and cost are step functions of that threshold; one sort and two cumulative
sums give their exact values at all samples. The search runs coordinate ascent on accuracy - price * cost, bisects the
price until the goal is just met, and then uses the remaining slack by moves that keep the goal met.
"""

import math
from typing import Any, List, Optional, Tuple

import torch

from .evaluate import CachedLogits, Costs, PolicyResult, cumulative_costs
from .policy import ExitPolicy

__all__ = ['Goal', 'best_thresholds']

BISECTIONS = 16
SWEEPS = 10


class Goal:
    """Goal of the search: the highest accuracy within a budget, or the lowest cost with a minimum accuracy.

    Args:
        budget: Largest mean cost; None where `min_accuracy` is given.
        min_accuracy: Lowest accuracy, in percent; None where `budget` is given.
    """

    def __init__(self, budget: Optional[float] = None, min_accuracy: Optional[float] = None):
        # tolerance for sums in another order
        self.budget = None if budget is None else budget * (1 + 1e-9)
        self.min_accuracy = None if min_accuracy is None else min_accuracy - 1e-9

    def is_met(self, accuracy: Any, cost: Any) -> Any:
        """Whether accuracy in percent and mean cost meet the goal; numbers, or tensors for an elementwise result."""
        return cost <= self.budget if self.min_accuracy is None else accuracy >= self.min_accuracy

    def key(self, accuracy: Any, cost: Any) -> Tuple[Any, Any]:
        """Sort key of a result that meets the goal; higher is better."""
        return (accuracy, -cost) if self.min_accuracy is None else (-cost, accuracy)

    def best(self, accuracies: torch.Tensor, costs: torch.Tensor) -> int:
        """Index of the highest key among the results that meet the goal."""
        lead, tie = self.key(accuracies, costs)
        lead = lead.masked_fill(~self.is_met(accuracies, costs), -math.inf)
        return int(tie.masked_fill(lead < lead.max(), -math.inf).argmax().item())


def best_thresholds(samples: CachedLogits, costs: Costs, goal: Goal, start: ExitPolicy) -> ExitPolicy:
    """Improve a policy that meets a goal, and turn off exits that are not worth the cost of their heads.

    Args:
        samples: Cached logits and labels of the validation set.
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        goal: Goal of the search.
        start: Policy that meets the goal.

    Returns:
        A policy that meets the goal and is at least as good as `start`.
    """
    best = start, samples.evaluate(start, costs)
    on = [True] * start.num_exits
    while True:
        found = _search(samples, costs, goal, start, on)
        if found is not None and goal.key(*found[1][:2]) > goal.key(*best[1][:2]):
            best = found
        elif not all(on):
            return best[0]
        # turn off exits that answer no sample; without any, the exit that answers the fewest
        shares = best[1].exit_fractions[:-1]
        still_on = [k for k in range(len(shares)) if best[0].is_on(k)]
        if not still_on:
            return best[0]
        removed = [k for k in still_on if shares[k] == 0] or [min(still_on, key=lambda k: shares[k])]
        on = [best[0].is_on(k) and k not in removed for k in range(start.num_exits)]


def _search(
    samples: CachedLogits, costs: Costs, goal: Goal, template: ExitPolicy, on: List[bool]
) -> Optional[Tuple[ExitPolicy, PolicyResult]]:
    """Search for the best policy with the exits in `on`; None if no policy meets the goal."""

    def policy(thresholds: List[float]) -> ExitPolicy:
        values = iter(thresholds)
        return template.with_thresholds([next(values) if is_on else math.inf for is_on in on[:-1]])

    exits = [k for k, is_on in enumerate(on) if is_on]
    all_on = policy([0.0] * (len(exits) - 1))
    scores, predictions = samples.answers(all_on)
    ascent = _CoordinateAscent(
        scores[exits], predictions[exits] == samples.targets, cumulative_costs(costs, all_on)[exits]
    )
    low, high = ascent.max_price * 1e-6, ascent.max_price
    thresholds, feasible = [math.inf] * (len(exits) - 1), []
    for _ in range(BISECTIONS):
        price = math.sqrt(low * high)
        thresholds = ascent.ascend(thresholds, price)
        accuracy, cost = ascent.result(thresholds)
        is_met = goal.is_met(accuracy, cost)
        if is_met:
            feasible.append((goal.key(accuracy, cost), thresholds))
        # a higher price gives a lower cost and a lower accuracy
        low, high = (low, price) if is_met == (goal.min_accuracy is None) else (price, high)
    if not feasible:
        return None
    thresholds = ascent.use_slack(max(feasible)[1], goal)
    # a threshold that no sample reaches: the exit stays on until best_thresholds turns it off
    found = policy([t if t < math.inf else scores[k].max().item() + 1 for k, t in zip(exits, thresholds)])
    result = samples.evaluate(found, costs)
    return (found, result) if goal.is_met(result.accuracy, result.cost) else None


class _CoordinateAscent:
    """Coordinate ascent over the thresholds of m exits on N samples.

    Args:
        scores: Scores of the exits, [m, N].
        correct: Whether the exits classify the samples correctly, [m, N].
        costs: Cumulative cost of answering at each exit, [m].

    Attributes:
        max_price: Price at which no sample is worth the cost of the next exit.
    """

    def __init__(self, scores: torch.Tensor, correct: torch.Tensor, costs: torch.Tensor):
        self.scores = scores
        self.correct = correct.double()
        self.costs = costs.to(scores.device)
        self.sorted, self.order = scores.sort(dim=1, descending=True)
        # a threshold cannot separate samples of equal score
        self.is_cut = torch.ones_like(self.sorted, dtype=torch.bool)
        self.is_cut[:, :-1] = self.sorted[:, :-1] > self.sorted[:, 1:]
        steps = costs.diff()
        self.max_price = 2 / steps[steps > 0].min().item() if (steps > 0).any() else 1.0

    def result(self, thresholds: List[float]) -> Tuple[float, float]:
        """Accuracy in percent and mean cost under thresholds, [m-1]."""
        correct, cost = self._outcomes(0, thresholds)
        return 100 * correct.mean().item(), cost.mean().item()

    def _outcomes(self, k: int, thresholds: List[float]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Correctness [N] and cost [N] of each sample, given that it reaches exit k."""
        correct, cost = self.correct[-1], self.costs[-1].expand_as(self.correct[-1])
        for j in range(len(thresholds) - 1, k - 1, -1):
            leaves = self.scores[j] >= thresholds[j]
            correct = torch.where(leaves, self.correct[j], correct)
            cost = torch.where(leaves, self.costs[j], cost)
        return correct, cost

    def _candidates(self, k: int, thresholds: List[float]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All candidate thresholds of exit k, `inf` first, and their effect against an exit k that is off.

        Returns:
            Thresholds, change of the number of correct samples, and change of the total cost, one entry per candidate.
        """
        reached = torch.ones_like(self.scores[k], dtype=torch.bool)
        for j in range(k):
            reached &= self.scores[j] < thresholds[j]
        correct, cost = self._outcomes(k + 1, thresholds)
        gains = torch.stack([(self.correct[k] - correct) * reached, (self.costs[k] - cost) * reached])
        sums = gains[:, self.order[k]].cumsum(1)[:, self.is_cut[k]]
        sums = torch.cat([sums.new_zeros(2, 1), sums], dim=1)
        values = self.sorted[k][self.is_cut[k]].double()
        return torch.cat([values.new_full((1,), math.inf), values]), sums[0], sums[1]

    def ascend(self, thresholds: List[float], price: float) -> List[float]:
        """Move single thresholds until none of them can increase accuracy - price * cost, for at most SWEEPS sweeps."""
        thresholds = list(thresholds)
        for _ in range(SWEEPS):
            before = list(thresholds)
            for k in range(len(thresholds) - 1, -1, -1):
                values, correct, cost = self._candidates(k, thresholds)
                thresholds[k] = values[(correct - price * cost).argmax()].item()
            if thresholds == before:
                break
        return thresholds

    def use_slack(self, thresholds: List[float], goal: Goal) -> List[float]:
        """Move single thresholds while this improves the result and the goal stays met, for at most SWEEPS sweeps."""
        thresholds, count = list(thresholds), self.scores.shape[1]
        for _ in range(SWEEPS):
            before = list(thresholds)
            for k in range(len(thresholds)):
                values, correct, cost = self._candidates(k, thresholds)
                base = self.result([*thresholds[:k], math.inf, *thresholds[k + 1 :]])
                accuracies, costs = base[0] + 100 * correct / count, base[1] + cost / count
                thresholds[k] = values[goal.best(accuracies, costs)].item()
            if thresholds == before:
                break
        return thresholds
