"""Thresholds from stored validation logits."""

import math
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .evaluate import CachedLogits, Costs, ExitLogits, PolicyResult, as_logits, is_number
from .policy import ExitPolicy
from .search import Goal, best_thresholds

__all__ = ['THRESHOLD_METHODS', 'CurvePoint', 'budgeted_curve', 'calibrate', 'thresholds_for_exit_rates']

THRESHOLD_METHODS = ('optimal', 'exit_rates', 'paper')

# MSDNet's sweep: exit rates in proportion to p, p^2, ..., p^K
SWEEP = tuple(i / 20 for i in range(1, 40))


class CurvePoint(NamedTuple):
    """One budget: the policy fitted to the validation set, and how it does there and on the test set."""

    policy: ExitPolicy
    val: PolicyResult
    test: PolicyResult


@torch.no_grad()
def thresholds_for_exit_rates(logits: ExitLogits, rates: Sequence[float], **kwargs: Any) -> ExitPolicy:
    """The policy under which given shares of the samples leave at each exit (MSDNet's rule).

    The threshold of exit k is the score of the floor(N * rates[k])-th surest of the samples that are still there;
    where that number is 0 or more than are left, the exit stays off.

    Args:
        logits: Of K exits on N validation samples, [K, N, C].
        rates: K shares that sum to 1.
        **kwargs: More for `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``, ``exit_names``.

    Raises:
        ValueError: The rates are not K shares that sum to 1.
    """
    logits = as_logits(logits)
    rates = rates.tolist() if isinstance(rates, torch.Tensor) else list(rates)
    if len(rates) != len(logits) or not all(is_number(r) and 0 <= r <= 1 for r in rates) or abs(sum(rates) - 1) > 1e-6:
        raise ValueError(f'rates={rates} must be {len(logits)} shares, one per exit, that sum to 1.')
    all_on = ExitPolicy([0.0] * (len(logits) - 1), **kwargs)
    samples = CachedLogits(logits, torch.zeros(logits.shape[1], dtype=torch.long))
    return all_on.with_thresholds(_for_exit_rates(samples, all_on, rates))


def _for_exit_rates(
    samples: CachedLogits, all_on: ExitPolicy, rates: Sequence[float], lowest_right: bool = False
) -> List[float]:
    """Thresholds for exit rates; with `lowest_right` each is the lowest score among those that leave and are right."""
    num_samples = len(samples.targets)
    counts = [math.floor(num_samples * rate + 1e-9) for rate in rates]  # 0.29 * 100 is 28.999999999999996
    left = torch.ones_like(samples.targets, dtype=torch.bool)
    thresholds = [0.0 if count else math.inf for count in counts[:-1]]
    for k, count in enumerate(counts[:-1]):
        if count > left.sum():
            thresholds[k] = math.inf
        if thresholds[k] == math.inf:
            continue
        scores, predictions = samples.answers(all_on.with_thresholds(thresholds))  # exits that are off have no part
        threshold = scores[k][left].topk(count).values[-1].item()
        if lowest_right:
            right = scores[k][left & (predictions[k] == samples.targets) & (scores[k] >= threshold)]
            threshold = right.min().item() if len(right) else math.inf
        thresholds[k] = threshold
        left &= scores[k] < threshold
    return thresholds


def _sweep(samples: CachedLogits, all_on: ExitPolicy, lowest_right: bool = False) -> Iterator[List[float]]:
    """Thresholds for MSDNet's 39 geometric distributions of the samples over the exits."""
    for p in SWEEP:
        rates = [p**k for k in range(1, all_on.num_exits + 1)]
        yield _for_exit_rates(samples, all_on, [rate / sum(rates) for rate in rates], lowest_right)


@torch.no_grad()
def calibrate(
    logits: ExitLogits,
    targets: torch.Tensor,
    costs: Costs,
    *,
    budget: Optional[float] = None,
    max_drop: Optional[float] = None,
    method: str = 'optimal',
    **kwargs: Any,
) -> ExitPolicy:
    """Fit thresholds to validation logits.

    Args:
        logits: Of K exits on N validation samples, [K, N, C].
        targets: Labels [N].
        costs: K cumulative costs (MACs, measured milliseconds), or `ExitCost`.
        budget: Mean cost that a sample may have: the most accurate policy within it.
        max_drop: Points of accuracy below that of the last exit that may be lost: the cheapest policy that loses
            no more.
        method: ``optimal``: thresholds that maximise accuracy, searched for; ``exit_rates``: the best of MSDNet's
            sweep of geometric exit rates; ``paper``: in that sweep, each exit's threshold is the lowest score of the
            samples that leave there and are right (MLCSD, "Budgeted batch classification results").
        **kwargs: More for `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``, ``exit_names``.

    Raises:
        ValueError: Neither or both of `budget` and `max_drop`, or no policy meets it; the message has the range.

    Examples:
        ```python
        policy = calibrate(logits, targets, exit_costs(model, (3, 32, 32)), budget=0.3e9)
        ```
    """
    if (budget is None) == (max_drop is None):
        raise ValueError(f'budget={budget}, max_drop={max_drop}: give one of the two.')
    for name, value in (('budget', budget), ('max_drop', max_drop)):
        if value is not None and (not is_number(value) or math.isnan(value)):
            raise ValueError(f'{name}={value!r}: expected a number.')
    if method not in THRESHOLD_METHODS:
        raise ValueError(f'method={method!r} is unknown; choose one of {", ".join(THRESHOLD_METHODS)}.')
    samples = CachedLogits(logits, targets)
    num_exits = len(samples.logits)
    all_on = ExitPolicy([0.0] * (num_exits - 1), **kwargs)
    # everybody leaves at one exit, the others are off; the last first
    fixed = [[math.inf] * k + [0.0] + [math.inf] * (num_exits - 2 - k) for k in range(num_exits - 1)]
    tried = []
    for thresholds in ([math.inf] * (num_exits - 1), *fixed, *_sweep(samples, all_on, method == 'paper')):
        policy = all_on.with_thresholds(thresholds)
        tried.append((policy, samples.evaluate(policy, costs)))
    goal = Goal(budget=budget) if max_drop is None else Goal(floor=tried[0][1].accuracy - max_drop)
    met = [(policy, result) for policy, result in tried if goal.is_met(result.accuracy, result.cost)]
    if not met:
        raise ValueError(_out_of_reach([result for _, result in tried], budget, max_drop))
    policy = max(met, key=lambda pair: goal.key(pair[1].accuracy, pair[1].cost))[0]
    return best_thresholds(samples, costs, goal, policy) if method == 'optimal' else policy


def _out_of_reach(results: Sequence[PolicyResult], budget: Optional[float], max_drop: Optional[float]) -> str:
    if max_drop is None:
        low, high = min(r.cost for r in results), max(r.cost for r in results)
        return f'budget={budget:.6g} is out of reach: the mean cost can be {low:.6g} to {high:.6g}.'
    gain = max(r.accuracy for r in results) - results[0].accuracy
    return f'max_drop={max_drop} is out of reach: choose at least {-gain:.2f}, which is the best that was found.'


@torch.no_grad()
def budgeted_curve(
    val: Tuple[ExitLogits, torch.Tensor], test: Tuple[ExitLogits, torch.Tensor], costs: Costs, **kwargs: Any
) -> List[CurvePoint]:
    """Accuracy over mean cost in MSDNet's budgeted batch setting.

    For each of 39 geometric distributions of the samples over the exits, thresholds are fitted to the validation set
    and tried on the test set (Huang et al. 2018, section 5.2).

    Args:
        val: Logits [K, N, C] and labels [N].
        test: The same of the test set.
        costs: K cumulative costs, or `ExitCost`.
        **kwargs: More for `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``, ``exit_names``.

    Returns:
        One `CurvePoint` per distribution, the cheapest first.
    """
    val, test = CachedLogits(*val), CachedLogits(*test)
    all_on = ExitPolicy([0.0] * (len(val.logits) - 1), **kwargs)
    policies = [all_on.with_thresholds(thresholds) for thresholds in _sweep(val, all_on)]
    points = [CurvePoint(policy, val.evaluate(policy, costs), test.evaluate(policy, costs)) for policy in policies]
    return sorted(points, key=lambda point: point.test.cost)
