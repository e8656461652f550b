"""Calibration of exit thresholds on cached validation logits."""

import math
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from .evaluate import CachedLogits, Costs, ExitLogits, PolicyResult, as_logits, is_number
from .policy import ExitPolicy
from .search import Goal, best_thresholds

__all__ = ['THRESHOLD_METHODS', 'CurvePoint', 'budgeted_curve', 'calibrate', 'thresholds_for_exit_rates']

THRESHOLD_METHODS = ('optimal', 'exit_rates', 'paper')

# MSDNet's sweep: one set of exit rates per p, in proportion to p, p^2, ..., p^K
EXIT_RATE_BASES = tuple(i / 20 for i in range(1, 40))


class CurvePoint(NamedTuple):
    """One point of a budgeted curve.

    Attributes:
        policy: Policy fitted to the validation set.
        val: Result of the policy on the validation set.
        test: Result of the policy on the test set.
    """

    policy: ExitPolicy
    val: PolicyResult
    test: PolicyResult


@torch.no_grad()
def thresholds_for_exit_rates(logits: ExitLogits, rates: Sequence[float], **kwargs: Any) -> ExitPolicy:
    """Fit a policy under which given shares of the samples leave at each exit (MSDNet's rule).

    The threshold of exit k is the score of rank floor(N * rates[k]), highest first, among the samples that have not
    left before. If that rank is 0 or larger than the number of these samples, the exit is off.

    Args:
        logits: Logits of K exits on N validation samples, [K, N, C].
        rates: Share of the samples that leaves at each exit, [K], with sum 1.
        **kwargs: Further arguments of `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``,
            ``exit_names``.

    Returns:
        The policy with these thresholds.

    Raises:
        ValueError: The rates are not K shares that sum to 1.
    """
    logits = as_logits(logits)
    rates = rates.tolist() if isinstance(rates, torch.Tensor) else list(rates)
    if len(rates) != len(logits) or not all(is_number(r) and 0 <= r <= 1 for r in rates) or abs(sum(rates) - 1) > 1e-6:
        raise ValueError(f'rates={rates}: expected {len(logits)} shares, one per exit, that sum to 1.')
    all_on = ExitPolicy((0.0,) * (len(logits) - 1), **kwargs)
    samples = CachedLogits(logits, torch.zeros(logits.shape[1], dtype=torch.long))
    return all_on.with_thresholds(_thresholds_for_rates(samples, all_on, rates))


def _thresholds_for_rates(
    samples: CachedLogits, all_on: ExitPolicy, rates: Sequence[float], lowest_correct: bool = False
) -> List[float]:
    """Thresholds, [K-1], for exit rates, [K].

    With `lowest_correct`, each threshold is raised to the lowest score of the leaving samples that are classified
    correctly.
    """
    num_samples = len(samples.targets)
    counts = [math.floor(num_samples * rate + 1e-9) for rate in rates]  # 0.29 * 100 is 28.999999999999996
    remaining = torch.ones_like(samples.targets, dtype=torch.bool)
    thresholds = [0.0 if count else math.inf for count in counts[:-1]]
    for k, count in enumerate(counts[:-1]):
        if count > remaining.sum():
            thresholds[k] = math.inf
        if thresholds[k] == math.inf:
            continue
        scores, predictions = samples.answers(all_on.with_thresholds(thresholds))  # without the exits that are off
        threshold = scores[k][remaining].topk(count).values[-1].item()
        if lowest_correct:
            correct = scores[k][remaining & (predictions[k] == samples.targets) & (scores[k] >= threshold)]
            threshold = correct.min().item() if len(correct) else math.inf
        thresholds[k] = threshold
        remaining &= scores[k] < threshold
    return thresholds


def _geometric_sweep(samples: CachedLogits, all_on: ExitPolicy, lowest_correct: bool = False) -> Iterator[List[float]]:
    """Yield thresholds, [K-1], for each of MSDNet's 39 geometric distributions of the samples over the exits."""
    for p in EXIT_RATE_BASES:
        rates = [p**k for k in range(1, all_on.num_exits + 1)]
        yield _thresholds_for_rates(samples, all_on, [rate / sum(rates) for rate in rates], lowest_correct)


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

    Exactly one of `budget` and `max_drop` is given.

    Args:
        logits: Logits of K exits on N validation samples, [K, N, C].
        targets: Labels, [N].
        costs: Cumulative cost of answering at each exit, [K] (MACs or milliseconds, say); or `ExitCost` or
            `ExitTime` per exit.
        budget: Largest allowed mean cost per sample, in the unit of `costs`; fits the most accurate policy.
        max_drop: Largest allowed drop of accuracy below the last exit, in percentage points; fits the cheapest policy.
        method: ``optimal`` (default): search for the best thresholds; ``exit_rates``: the best of MSDNet's sweep of
            geometric exit rates; ``paper``: the same sweep, with each threshold at the lowest score of the samples
            that leave there and are correct (MLCSD, "Budgeted batch classification results").
        **kwargs: Further arguments of `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``,
            ``exit_names``.

    Returns:
        The fitted policy.

    Raises:
        ValueError: Neither or both of `budget` and `max_drop` are given, or no policy meets the goal; the message
            contains the reachable range.

    Examples:
        ```python
        policy = calibrate(logits, targets, exit_costs(model, (3, 32, 32)), budget=0.3e9)
        ```
    """
    if (budget is None) == (max_drop is None):
        raise ValueError(f'budget={budget}, max_drop={max_drop}: expected exactly one of the two.')
    for name, value in (('budget', budget), ('max_drop', max_drop)):
        if value is not None and (not is_number(value) or math.isnan(value)):
            raise ValueError(f'{name}={value!r}: expected a number.')
    if method not in THRESHOLD_METHODS:
        raise ValueError(f'method={method!r} is unknown; choose one of {", ".join(THRESHOLD_METHODS)}.')
    samples = CachedLogits(logits, targets)
    num_exits = len(samples.logits)
    all_on = ExitPolicy((0.0,) * (num_exits - 1), **kwargs)
    # policies with a single exit on, at which all samples leave; tried after the last exit alone
    single = [[math.inf] * k + [0.0] + [math.inf] * (num_exits - 2 - k) for k in range(num_exits - 1)]
    candidates = []
    for thresholds in ([math.inf] * (num_exits - 1), *single, *_geometric_sweep(samples, all_on, method == 'paper')):
        policy = all_on.with_thresholds(thresholds)
        candidates.append((policy, samples.evaluate(policy, costs)))
    goal = Goal(budget=budget) if max_drop is None else Goal(min_accuracy=candidates[0][1].accuracy - max_drop)
    feasible = [(policy, result) for policy, result in candidates if goal.is_met(result.accuracy, result.cost)]
    if not feasible:
        raise ValueError(_infeasible_message([result for _, result in candidates], budget, max_drop))
    policy = max(feasible, key=lambda pair: goal.key(pair[1].accuracy, pair[1].cost))[0]
    return best_thresholds(samples, costs, goal, policy) if method == 'optimal' else policy


def _infeasible_message(results: Sequence[PolicyResult], budget: Optional[float], max_drop: Optional[float]) -> str:
    if max_drop is None:
        low, high = min(r.cost for r in results), max(r.cost for r in results)
        return f'budget={budget:.6g} is out of reach: expected a mean cost from {low:.6g} to {high:.6g}.'
    gain = max(r.accuracy for r in results) - results[0].accuracy
    return f'max_drop={max_drop} is out of reach: expected at least {-gain:.2f}, the best value that was found.'


@torch.no_grad()
def budgeted_curve(
    val: Tuple[ExitLogits, torch.Tensor], test: Tuple[ExitLogits, torch.Tensor], costs: Costs, **kwargs: Any
) -> List[CurvePoint]:
    """Accuracy against mean cost in MSDNet's budgeted batch setting.

    For each of 39 geometric distributions of the samples over the exits, thresholds are fitted to the validation set
    and evaluated on the test set (Huang et al. 2018, section 5.2).

    Args:
        val: Logits [K, N, C] and labels [N] of the validation set.
        test: Logits [K, M, C] and labels [M] of the test set.
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        **kwargs: Further arguments of `ExitPolicy`: ``score``, ``aggregate``, ``temperatures``, ``weights``,
            ``exit_names``.

    Returns:
        One `CurvePoint` per distribution, by ascending mean cost on the test set.
    """
    fit, report = CachedLogits(*val), CachedLogits(*test)
    all_on = ExitPolicy((0.0,) * (len(fit.logits) - 1), **kwargs)
    policies = [all_on.with_thresholds(thresholds) for thresholds in _geometric_sweep(fit, all_on)]
    points = [CurvePoint(policy, fit.evaluate(policy, costs), report.evaluate(policy, costs)) for policy in policies]
    return sorted(points, key=lambda point: point.test.cost)
