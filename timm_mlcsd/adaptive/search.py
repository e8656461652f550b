"""Search for the thresholds with the highest accuracy within a budget, or the lowest cost for an accuracy.

With all thresholds but one fixed, accuracy and cost are step functions of that threshold; one histogram over the scores
gives their values at all of its steps. The search runs coordinate ascent on accuracy - price * cost, bisects the
price until the goal is just met, and then uses the remaining slack by moves that keep the goal met.
"""

import math
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np

from .evaluate import Costs, cumulative_costs
from .policy import ExitPolicy
from .samples import FitResult, FitSamples

__all__ = ['Goal', 'best_thresholds']

BISECTIONS = 16
SWEEPS = 10
# candidate thresholds per exit; with more samples than that, they are quantiles of the scores
MAX_CUTS = 2000


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
        """Whether accuracy in percent and mean cost meet the goal; numbers, or arrays for an elementwise result."""
        return cost <= self.budget if self.min_accuracy is None else accuracy >= self.min_accuracy

    def key(self, accuracy: Any, cost: Any) -> Tuple[Any, Any]:
        """Sort key of a result that meets the goal; higher is better."""
        return (accuracy, -cost) if self.min_accuracy is None else (-cost, accuracy)

    def best(self, accuracies: np.ndarray, costs: np.ndarray) -> int:
        """Index of the highest key among the results that meet the goal."""
        lead, tie = self.key(accuracies, costs)
        lead = np.where(self.is_met(accuracies, costs), lead, -math.inf)
        return int(np.where(lead < lead.max(), -math.inf, tie).argmax())


def best_thresholds(samples: FitSamples, costs: Costs, goal: Goal, start: ExitPolicy) -> ExitPolicy:
    """Improve a policy that meets a goal, and turn off exits that are not worth the cost of their heads.

    Args:
        samples: Validation samples.
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        goal: Goal of the search.
        start: Policy that meets the goal.

    Returns:
        A policy that meets the goal and is at least as good as `start`.
    """
    best = start, samples.evaluate(start, costs)
    on = [True] * start.num_exits
    while True:
        found = _Search(samples, costs, start, on).meet(goal)
        if found is not None and goal.key(*found[1][:2]) > goal.key(*best[1][:2]):
            best = found
        elif not all(on):
            return best[0]
        on = _without_rarest(best[0], best[1])
        if on == [best[0].is_on(k) for k in range(start.num_exits)]:
            return best[0]


def _without_rarest(policy: ExitPolicy, result: FitResult) -> List[bool]:
    """Which exits stay on without those that answer no sample; without any, without the one that answers the fewest."""
    shares = result.exit_fractions[:-1]
    on = [policy.is_on(k) for k in range(policy.num_exits)]
    still_on = [k for k in range(len(shares)) if on[k]]
    if not still_on:
        return on
    removed = [k for k in still_on if shares[k] == 0] or [min(still_on, key=lambda k: shares[k])]
    return [is_on and k not in removed for k, is_on in enumerate(on)]


class _Search:
    """Search among the policies with a given set of exits.

    Args:
        samples: Cached logits and labels.
        costs: Costs of the exits.
        template: Policy whose score, temperatures and averages all have.
        on: Whether each exit is on, [K].
    """

    def __init__(self, samples: FitSamples, costs: Costs, template: ExitPolicy, on: Sequence[bool]):
        self.samples = samples
        self.exit_costs = costs
        self.template = template
        self.on = on
        self.exits = [k for k, is_on in enumerate(on) if is_on]
        all_on = self._policy([0.0] * (len(self.exits) - 1))
        outcomes = samples.outcomes(all_on)
        total = cumulative_costs(costs, all_on).numpy()
        self.ascent = _CoordinateAscent(outcomes.scores[self.exits], outcomes.correct[self.exits], total[self.exits])

    def _policy(self, thresholds: Sequence[float]) -> ExitPolicy:
        values = iter(thresholds)
        return self.template.with_thresholds([next(values) if is_on else math.inf for is_on in self.on[:-1]])

    def _found(self, cuts: List[int]) -> Tuple[ExitPolicy, FitResult]:
        """Policy and result; an exit that no sample leaves at stays on, so that the answers of later exits do."""
        policy = self._policy(self.ascent.thresholds(cuts))
        return policy, self.samples.evaluate(policy, self.exit_costs)

    def meet(self, goal: Goal) -> Optional[Tuple[ExitPolicy, FitResult]]:
        """The best policy that meets a goal; None if none does."""
        ascent, cuts, feasible = self.ascent, self.ascent.all_off(), []
        low, high = ascent.max_price * 1e-6, ascent.max_price
        for _ in range(BISECTIONS):
            price = math.sqrt(low * high)
            cuts = ascent.ascend(cuts, price)
            accuracy, cost = ascent.result(cuts)
            is_met = goal.is_met(accuracy, cost)
            if is_met:
                feasible.append((goal.key(accuracy, cost), cuts))
            # a higher price gives a lower cost and a lower accuracy
            low, high = (low, price) if is_met == (goal.min_accuracy is None) else (price, high)
        # with a concave frontier the bisection is enough; elsewhere it jumps, and the template may be a better start
        starts = [max(feasible)[1]] if feasible else []
        given = ascent.cuts([t for t, is_on in zip(self.template.thresholds, self.on) if is_on])
        starts += [given] if goal.is_met(*ascent.result(given)) else []
        found = [self._found(ascent.use_slack(start, goal)) for start in starts]
        found = [pair for pair in found if goal.is_met(*pair[1][:2])]
        return max(found, key=lambda pair: goal.key(*pair[1][:2])) if found else None


class _CoordinateAscent:
    """Coordinate ascent over the thresholds of m exits on N samples.

    A threshold is a cut: the index of one of the exit's candidate thresholds, which ascend. The index after the last
    one stands for a threshold that no sample reaches.

    Args:
        scores: Scores of the exits, [m, N].
        correct: Whether the exits classify the samples correctly, [m, N].
        costs: Cumulative cost of answering at each exit, [m].

    Attributes:
        max_price: Price at which no sample is worth the cost of the next exit.
    """

    def __init__(self, scores: np.ndarray, correct: np.ndarray, costs: np.ndarray):
        self.values = [_cut_values(s) for s in scores[:-1]]
        # a sample leaves where its level is at least the cut
        self.levels = [np.searchsorted(v, s, side='right') - 1 for v, s in zip(self.values, scores)]
        self.correct = correct.astype(np.float64)
        self.costs = costs
        steps = np.diff(costs)
        self.max_price = 2 / steps[steps > 0].min() if (steps > 0).any() else 1.0

    def all_off(self) -> List[int]:
        """Cuts that no sample reaches."""
        return [len(v) for v in self.values]

    def thresholds(self, cuts: Sequence[int]) -> List[float]:
        """Thresholds of cuts, [m-1]."""
        return [float(v[c]) if c < len(v) else float(v[-1]) + 1 for v, c in zip(self.values, cuts)]

    def cuts(self, thresholds: Sequence[float]) -> List[int]:
        """Cuts of thresholds, [m-1]: each the lowest one that is not below its threshold."""
        return [int(np.searchsorted(v, t)) for v, t in zip(self.values, thresholds)]

    def result(self, cuts: Sequence[int]) -> Tuple[float, float]:
        """Accuracy in percent and mean cost under cuts, [m-1]."""
        correct, cost = self._outcomes(0, cuts)
        return 100 * float(correct.mean()), float(cost.mean())

    def _outcomes(self, first: int, cuts: Sequence[int]) -> Tuple[np.ndarray, np.ndarray]:
        """Correctness [N] and cost [N] of each sample, given that it reaches exit `first`."""
        correct, cost = self.correct[-1], np.full(self.correct.shape[1], self.costs[-1])
        for k in reversed(range(first, len(cuts))):
            leaves = self.levels[k] >= cuts[k]
            correct, cost = np.where(leaves, self.correct[k], correct), np.where(leaves, self.costs[k], cost)
        return correct, cost

    def ascend(self, cuts: Sequence[int], price: float) -> List[int]:
        """Move single cuts until none of them can increase accuracy - price * cost, for at most SWEEPS sweeps."""
        cuts = list(cuts)
        value = self.correct - price * self.costs[:, None]
        for _ in range(SWEEPS):
            before = list(cuts)
            reached = self._reached(cuts)
            later = value[-1]
            for k in reversed(range(len(cuts))):
                # the last maximum: of equal ones, the highest threshold
                gains = self._gains(k, reached[k], value[k] - later)
                cuts[k] = len(gains) - 1 - int(gains[::-1].argmax())
                later = np.where(self.levels[k] >= cuts[k], value[k], later)
            if cuts == before:
                break
        return cuts

    def use_slack(self, cuts: Sequence[int], goal: Goal) -> List[int]:
        """Move single cuts while this improves the result and the goal stays met, for at most SWEEPS sweeps."""
        cuts, count = list(cuts), self.correct.shape[1]
        for _ in range(SWEEPS):
            before = list(cuts)
            for k in range(len(cuts)):
                reached = self._reached(cuts)[k]
                correct, cost = self._outcomes(k + 1, cuts)
                base = self.result([*cuts[:k], len(self.values[k]), *cuts[k + 1 :]])
                accuracies = base[0] + 100 / count * self._gains(k, reached, self.correct[k] - correct)
                costs = base[1] + self._gains(k, reached, self.costs[k] - cost) / count
                last = len(accuracies) - 1
                cuts[k] = last - goal.best(accuracies[::-1], costs[::-1])
            if cuts == before:
                break
        return cuts

    def _reached(self, cuts: Sequence[int]) -> List[np.ndarray]:
        """Whether each sample reaches each exit but the last, [m-1] arrays [N]."""
        reached = [np.ones(self.correct.shape[1], dtype=bool)]
        for k in range(len(cuts) - 1):
            reached.append(reached[-1] & (self.levels[k] < cuts[k]))
        return reached

    def _gains(self, k: int, reached: np.ndarray, gain: np.ndarray) -> np.ndarray:
        """Sum of the gains of the samples that leave at exit k, for every cut; 0 for the one that no sample reaches."""
        size = len(self.values[k]) + 1
        by_level = np.bincount(self.levels[k][reached], weights=gain[reached], minlength=size)
        return by_level[::-1].cumsum()[::-1]


def _cut_values(scores: np.ndarray) -> np.ndarray:
    """Candidate thresholds, ascending: all scores, or at most MAX_CUTS quantiles of them, the lowest included."""
    values = np.unique(scores)  # a threshold cannot separate samples of equal score
    if len(values) > MAX_CUTS:
        ordered = np.sort(scores)
        values = np.unique(ordered[np.linspace(0, len(ordered) - 1, MAX_CUTS).astype(int)])
    return values.astype(np.float64)
