"""Search for the thresholds that get the most out of a budget.

With all thresholds but one fixed, accuracy and cost are step functions of that one, known exactly at all samples from
one sort and two cumulative sums. The search climbs from threshold to threshold on accuracy - price * cost, for the
prices that a bisection asks for, then spends what is left of the budget by moves that stay within it.
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
    """The most accurate policy within `budget`, or else the cheapest that is right on at least `floor` percent."""

    def __init__(self, budget: Optional[float] = None, floor: Optional[float] = None):
        # sums in another order: a few roundings
        self.budget = None if budget is None else budget * (1 + 1e-9)
        self.floor = None if floor is None else floor - 1e-9

    def is_met(self, accuracy: Any, cost: Any) -> Any:
        """Of one pair of numbers, or of tensors of them."""
        return cost <= self.budget if self.floor is None else accuracy >= self.floor

    def key(self, accuracy: Any, cost: Any) -> Tuple[Any, Any]:
        """Higher is better, among those that meet it."""
        return (accuracy, -cost) if self.floor is None else (-cost, accuracy)

    def best(self, accuracies: torch.Tensor, costs: torch.Tensor) -> int:
        """Which of many has the highest key among those that meet it."""
        lead, tie = self.key(accuracies, costs)
        lead = lead.masked_fill(~self.is_met(accuracies, costs), -math.inf)
        return tie.masked_fill(lead < lead.max(), -math.inf).argmax().item()


def best_thresholds(samples: CachedLogits, costs: Costs, goal: Goal, start: ExitPolicy) -> ExitPolicy:
    """Improve a policy that meets a goal; exits that don't pay for their heads are turned off.

    Args:
        samples: The validation set.
        costs: K cumulative costs, or `ExitCost`.
        goal: What is wanted.
        start: A policy that meets it.

    Returns:
        A policy at least as good as `start`.
    """
    best = start, samples.evaluate(start, costs)
    on = [True] * start.num_exits
    while True:
        found = _search(samples, costs, goal, start, on)
        better = found is not None and goal.key(*found[1][:2]) > goal.key(*best[1][:2])
        if better:
            best = found
        elif not all(on):
            return best[0]
        # what answers nobody only costs; of the others the one that answers fewest is the first to go
        shares = best[1].exit_fractions[:-1]
        still_on = [k for k in range(len(shares)) if best[0].is_on(k)]
        if not still_on:
            return best[0]
        idle = [k for k in still_on if shares[k] == 0] or [min(still_on, key=lambda k: shares[k])]
        on = [best[0].is_on(k) and k not in idle for k in range(start.num_exits)]


def _search(
    samples: CachedLogits, costs: Costs, goal: Goal, like: ExitPolicy, on: List[bool]
) -> Optional[Tuple[ExitPolicy, PolicyResult]]:
    """The best policy found with these exits on; None where none meets the goal."""

    def policy(thresholds: List[float]) -> ExitPolicy:
        rest = iter(thresholds)
        return like.with_thresholds([next(rest) if is_on else math.inf for is_on in on[:-1]])

    exits = [k for k, is_on in enumerate(on) if is_on]
    all_on = policy([0.0] * (len(exits) - 1))
    scores, predictions = samples.answers(all_on)
    ascent = _CoordinateAscent(
        scores[exits], predictions[exits] == samples.targets, cumulative_costs(costs, all_on)[exits]
    )
    low, high = ascent.price * 1e-6, ascent.price
    thresholds, met = [math.inf] * (len(exits) - 1), []
    for _ in range(BISECTIONS):
        price = math.sqrt(low * high)
        thresholds = ascent.ascend(thresholds, price)
        result = ascent.result(thresholds)
        fits = goal.is_met(*result)
        if fits:
            met.append((goal.key(*result), thresholds))
        # a higher price saves more: less than is needed, or more
        low, high = (low, price) if fits == (goal.floor is None) else (price, high)
    if not met:
        return None
    thresholds = ascent.use_slack(max(met)[1], goal)
    # nobody leaves there, but it stays on until the outer search turns it off
    found = policy([t if t < math.inf else scores[k].max().item() + 1 for k, t in zip(exits, thresholds)])
    result = samples.evaluate(found, costs)
    return (found, result) if goal.is_met(result.accuracy, result.cost) else None


class _CoordinateAscent:
    """Coordinate ascent over the thresholds of m exits on N samples.

    Args:
        scores: [m, N].
        correct: Whether the exits are right, [m, N].
        costs: Cumulative, [m].
    """

    def __init__(self, scores: torch.Tensor, correct: torch.Tensor, costs: torch.Tensor):
        self.scores = scores
        self.correct = correct.double()
        self.costs = costs.to(scores.device)
        self.sorted, self.order = scores.sort(dim=1, descending=True)
        # a threshold lets all samples of one score leave
        self.is_cut = torch.ones_like(self.sorted, dtype=torch.bool)
        self.is_cut[:, :-1] = self.sorted[:, :-1] > self.sorted[:, 1:]
        steps = costs.diff()
        # so dear that no sample is worth the next exit
        self.price = 2 / steps[steps > 0].min().item() if (steps > 0).any() else 1.0

    def result(self, thresholds: List[float]) -> Tuple[float, float]:
        """Accuracy in percent, mean cost."""
        correct, cost = self._from(0, thresholds)
        return 100 * correct.mean().item(), cost.mean().item()

    def _from(self, k: int, thresholds: List[float]) -> Tuple[torch.Tensor, torch.Tensor]:
        """Whether each sample that goes to exit k is answered rightly in the end, and its cost."""
        correct, cost = self.correct[-1], self.costs[-1].expand_as(self.correct[-1])
        for j in range(len(thresholds) - 1, k - 1, -1):
            leaves = self.scores[j] >= thresholds[j]
            correct = torch.where(leaves, self.correct[j], correct)
            cost = torch.where(leaves, self.costs[j], cost)
        return correct, cost

    def _steps(self, k: int, thresholds: List[float]) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each threshold that exit k could have, `inf` first: it, and the sums that it adds to right answers and
        costs."""
        here = torch.ones_like(self.scores[k], dtype=torch.bool)
        for j in range(k):
            here &= self.scores[j] < thresholds[j]
        correct, cost = self._from(k + 1, thresholds)
        gains = torch.stack([(self.correct[k] - correct) * here, (self.costs[k] - cost) * here])
        sums = gains[:, self.order[k]].cumsum(1)[:, self.is_cut[k]]
        sums = torch.cat([sums.new_zeros(2, 1), sums], dim=1)
        values = self.sorted[k][self.is_cut[k]].double()
        return torch.cat([values.new_full((1,), math.inf), values]), sums[0], sums[1]

    def ascend(self, thresholds: List[float], price: float) -> List[float]:
        """Climb to where no single threshold can be moved to a higher accuracy - price * cost."""
        thresholds = list(thresholds)
        for _ in range(SWEEPS):
            before = list(thresholds)
            for k in range(len(thresholds) - 1, -1, -1):
                values, correct, cost = self._steps(k, thresholds)
                thresholds[k] = values[(correct - price * cost).argmax()].item()
            if thresholds == before:
                break
        return thresholds

    def use_slack(self, thresholds: List[float], goal: Goal) -> List[float]:
        """Move single thresholds while that improves the goal and keeps it met."""
        thresholds, count = list(thresholds), self.scores.shape[1]
        for _ in range(SWEEPS):
            before = list(thresholds)
            for k in range(len(thresholds)):
                values, correct, cost = self._steps(k, thresholds)
                now = self.result([*thresholds[:k], math.inf, *thresholds[k + 1 :]])
                accuracies, costs = now[0] + 100 * correct / count, now[1] + cost / count
                thresholds[k] = values[goal.best(accuracies, costs)].item()
            if thresholds == before:
                break
        return thresholds
