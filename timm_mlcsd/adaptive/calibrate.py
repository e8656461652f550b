"""Calibration of exit thresholds on cached validation logits."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch

from .evaluate import CachedLogits, Costs, ExitLogits, PolicyResult, as_logits, is_number
from .exit_rates import geometric_sweep
from .methods import (
    FIT_METHODS,
    best_policy,
    choose_method,
    cross_validated,
    last_exit_alone,
    policy_path,
    single_exits,
)
from .policy import ExitPolicy
from .risk import RISKS, certify, images_needed, lowest_limit, split
from .samples import FitSamples
from .scaling import fit_temperatures, fit_weights
from .search import Goal

__all__ = ['THRESHOLD_METHODS', 'Calibration', 'CurvePoint', 'budgeted_curve', 'calibrate', 'run_calibration']

THRESHOLD_METHODS = (*FIT_METHODS, 'auto')

# methods among which `auto` chooses for a budget, the default first
CANDIDATES = ('shrunk', 'exit_rates', 'optimal', 'quantile')
# with fewer samples to fit a path to, the exit rates alone vary less
FEW = 1000
# thresholds are searched for on at most that many samples, and checked on all
MAX_SEARCH = 20_000
# shares of the goal that are kept back where the search sees a part of the samples
MARGINS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


class Calibration(NamedTuple):
    """Result of a calibration.

    Attributes:
        policy: The fitted policy.
        method: Method that fitted its thresholds.
        accuracy: Accuracy on the samples that it was fitted to, in percent.
        cost: Mean cost on these samples.
        cross_validated: Accuracy in percent and mean cost of the method on samples that it was not fitted to, by
            cross-validation; None without it.
    """

    policy: ExitPolicy
    method: str
    accuracy: float
    cost: float
    cross_validated: Optional[Tuple[float, float]] = None


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


def calibrate(logits: ExitLogits, targets: Optional[torch.Tensor], costs: Costs, **kwargs: Any) -> ExitPolicy:
    """Fit thresholds to validation logits: the policy of `run_calibration`, with the same arguments.

    Examples:
        ```python
        policy = calibrate(logits, targets, exit_costs(model, (3, 32, 32)), budget=0.3e9)
        policy = calibrate(logits, targets, exit_costs(model, (3, 32, 32)), max_drop=2.0, temperatures='fit')
        ```
    """
    return run_calibration(logits, targets, costs, **kwargs).policy


@torch.no_grad()
def run_calibration(
    logits: ExitLogits,
    targets: Optional[torch.Tensor],
    costs: Costs,
    *,
    budget: Optional[float] = None,
    max_drop: Optional[float] = None,
    confidence: Optional[float] = 0.95,
    risk: str = 'drop',
    method: str = 'auto',
    temperatures: Union[str, Sequence[float], None] = None,
    weights: Union[str, Sequence[Sequence[float]], None] = None,
    **kwargs: Any,
) -> Calibration:
    """Fit thresholds to validation logits.

    Exactly one of `budget` and `max_drop` is given. With `max_drop`, the samples must not have been used before: one
    part of them fits the policies, the other part certifies one of them (`timm_mlcsd.adaptive.risk`).

    Args:
        logits: Logits of K exits on N validation samples, [K, N, C].
        targets: Labels, [N]; None for samples without labels, with ``risk='disagreement'``.
        costs: Cumulative cost of answering at each exit, [K], in any unit; or `ExitCost` or `ExitTime` per exit.
        budget: Largest allowed mean cost per sample, in the unit of `costs`; fits the most accurate policy.
        max_drop: Largest allowed risk, in percentage points; fits the cheapest policy.
        confidence: Probability that the risk of the policy on new samples is at most `max_drop`, over the draw of the
            validation samples; default 0.95. None: the drop on the validation samples themselves is at most
            `max_drop`, without a guarantee for others.
        risk: ``drop`` (default): accuracy below that of the last exit; ``selective``: share of wrong answers among the
            samples that leave early; ``disagreement``: share of samples whose answer differs from the last exit's.
        method: One of `timm_mlcsd.adaptive.methods`; ``auto`` (default): for a budget, ``shrunk`` unless another one
            is clearly better in cross-validation; for a certified risk, ``exit_rates`` or, with many samples,
            ``shrunk``; otherwise ``optimal``.
        temperatures: Temperatures of the policy, [K]; ``'fit'`` fits them to the samples that thresholds are fitted
            to; None (default) for 1.
        weights: Weights of the policy; ``'fit'`` fits them to these samples too.
        **kwargs: Further arguments of `ExitPolicy`: ``score``, ``aggregate``, ``exit_names``.

    Returns:
        The fitted policy; with a certified risk it has a ``certificate``.

    Raises:
        ValueError: Neither or both of `budget` and `max_drop` are given, no policy meets the goal, or the samples are
            too few to certify it; the message contains the reachable range.
    """
    _check(budget, max_drop, confidence, risk, method, targets)
    cached, samples = _samples(logits, targets, risk)
    certified = max_drop is not None and confidence is not None
    fit_rows, fresh_rows = split(len(cached.targets)) if certified else (np.arange(len(cached.targets)), None)
    template = _template(cached, fit_rows, targets is not None, temperatures, weights, kwargs)
    if budget is not None:
        return _within_budget(samples, costs, budget, template, method)
    assert max_drop is not None  # as budget is None
    if fresh_rows is not None and confidence is not None:
        parts = samples.subset(fit_rows), samples.subset(fresh_rows)
        policy, method = _certified(*parts, costs, template, method, risk, max_drop, confidence)
    else:
        policy, method = _within_drop(samples, costs, max_drop, template, method)
    # with labels, the accuracy is that of the labels for every risk
    return Calibration(policy, method, *FitSamples(cached).evaluate(policy, costs)[:2])


def _check(
    budget: Optional[float],
    max_drop: Optional[float],
    confidence: Optional[float],
    risk: str,
    method: str,
    targets: Optional[torch.Tensor],
) -> None:
    if (budget is None) == (max_drop is None):
        raise ValueError(f'budget={budget}, max_drop={max_drop}: expected exactly one of the two.')
    for name, value in (('budget', budget), ('max_drop', max_drop)):
        if value is not None and (not is_number(value) or math.isnan(value)):
            raise ValueError(f'{name}={value!r}: expected a number.')
    if max_drop is not None and not -100 <= max_drop <= 100:
        raise ValueError(f'max_drop={max_drop}: expected percentage points, a number from -100 to 100.')
    if method not in THRESHOLD_METHODS:
        raise ValueError(f'method={method!r} is unknown; choose one of {", ".join(THRESHOLD_METHODS)}.')
    if risk not in RISKS:
        raise ValueError(f'risk={risk!r} is unknown; choose one of {", ".join(RISKS)}.')
    if confidence is not None and not (is_number(confidence) and 0.5 <= confidence < 1):
        raise ValueError(f'confidence={confidence!r}: expected a number from 0.5 to below 1, or None.')
    if budget is not None and risk != 'drop':
        raise ValueError(f'risk={risk!r}: expected max_drop, the limit of the risk, got budget={budget}.')
    if confidence is None and risk == 'selective':
        raise ValueError("risk='selective': expected a confidence, got None; it is only certified, not fitted.")
    if targets is None and risk != 'disagreement':
        raise ValueError("targets=None: expected labels; only risk='disagreement' does without them.")


def _samples(logits: ExitLogits, targets: Optional[torch.Tensor], risk: str) -> Tuple[CachedLogits, FitSamples]:
    """Logits with their labels, and with what is right for the risk; the last exit's answers replace missing labels."""
    logits = as_logits(logits)
    last_answers = logits[-1].argmax(-1)
    cached = CachedLogits(logits, last_answers if targets is None else targets)
    return cached, FitSamples(CachedLogits(logits, last_answers) if risk == 'disagreement' else cached)


def _template(
    cached: CachedLogits,
    rows: np.ndarray,
    has_labels: bool,
    temperatures: Union[str, Sequence[float], None],
    weights: Union[str, Sequence[Sequence[float]], None],
    kwargs: Dict[str, Any],
) -> ExitPolicy:
    """Policy with all exits on, whose temperatures and weights see the given samples only."""
    for name, value in (('temperatures', temperatures), ('weights', weights)):
        if isinstance(value, str) and value != 'fit':
            raise ValueError(f"{name}={value!r}: expected numbers, 'fit' or None.")
    if isinstance(temperatures, str) or isinstance(weights, str):
        index = torch.from_numpy(rows[:: max(1, len(rows) // MAX_SEARCH)]).to(cached.targets.device)
        data = cached.logits[:, index], cached.targets[index]
        if isinstance(temperatures, str):
            temperatures = fit_temperatures(*data)
            if not has_labels:
                # the others agree with the last exit as often as their scores say; its own says nothing without labels
                temperatures = (*temperatures[:-1], 1.0)
        if isinstance(weights, str):
            weights = fit_weights(*data, temperatures)
    return ExitPolicy(
        (0.0,) * (len(cached.logits) - 1),
        temperatures=temperatures,  # type: ignore[arg-type]  # the policy converts sequences to tuples
        weights=weights,  # type: ignore[arg-type]
        **kwargs,
    )


def _fit_checked(
    samples: FitSamples, costs: Costs, goal_of: Callable[[FitSamples, float], Goal], template: ExitPolicy, method: str
) -> Optional[ExitPolicy]:
    """Fit to a goal on a part of the samples, with the smallest margin with which all samples meet it.

    Args:
        samples: Validation samples.
        costs: Costs of the exits.
        goal_of: Function that makes the goal for samples, with a margin from 0 to 1.
        template: Policy whose score, temperatures and averages the result has.
        method: One of `FIT_METHODS`.
    """
    part, goal = _part(samples), goal_of(samples, 0.0)
    for margin in MARGINS:
        policy = FIT_METHODS[method](part, costs, goal_of(part, margin), template)
        if policy is not None and goal.is_met(*samples.evaluate(policy, costs)[:2]):
            return policy
        if part is samples:
            return None
    # at the end of the range a margin leaves nothing
    return best_policy(samples, costs, goal, _reach(samples, template))


def _part(samples: FitSamples) -> FitSamples:
    """At most MAX_SEARCH of the samples, evenly spaced."""
    if len(samples) <= MAX_SEARCH:
        return samples
    return samples.subset(np.linspace(0, len(samples) - 1, MAX_SEARCH).astype(int))


def _reach(samples: FitSamples, template: ExitPolicy) -> List[ExitPolicy]:
    """Policies whose costs and accuracies show what is in reach."""
    return [*single_exits(template), *geometric_sweep(_part(samples), template)]


def _within_budget(samples: FitSamples, costs: Costs, budget: float, template: ExitPolicy, method: str) -> Calibration:
    """Fit the most accurate policy within a budget."""
    validated: Optional[Tuple[float, float]] = None
    if method == 'auto':
        held_out = cross_validated(_part(samples), costs, Goal(budget=budget), template, CANDIDATES)
        method = choose_method(held_out, _price(samples, costs, budget, template)) or CANDIDATES[0]
        if method in held_out:
            validated = 100 * float(held_out[method].correct.mean()), float(held_out[method].costs.mean())
    policy = _fit_checked(samples, costs, lambda _, margin: Goal(budget=budget * (1 - margin)), template, method)
    if policy is None:
        reach = [samples.evaluate(p, costs).cost for p in _reach(samples, template)]
        raise ValueError(
            f'budget={budget:.6g} is out of reach: expected a mean cost from {min(reach):.6g} to {max(reach):.6g}.'
        )
    return Calibration(policy, method, *samples.evaluate(policy, costs)[:2], validated)


def _within_drop(
    samples: FitSamples, costs: Costs, max_drop: float, template: ExitPolicy, method: str
) -> Tuple[ExitPolicy, str]:
    """The cheapest policy whose drop on the samples is at most a number of points, and the method that fitted it."""
    method = 'optimal' if method == 'auto' else method

    def goal_of(some: FitSamples, margin: float) -> Goal:
        last = some.evaluate(last_exit_alone(template), costs).accuracy
        return Goal(min_accuracy=last - max_drop + 10 * margin)  # in points

    policy = _fit_checked(samples, costs, goal_of, template, method)
    if policy is None:
        accuracies = [samples.evaluate(p, costs).accuracy for p in _reach(samples, template)]
        gain = max(accuracies) - accuracies[0]
        raise ValueError(
            f'max_drop={max_drop} is out of reach: expected at least {-gain:.2f}, the best that was found.'
        )
    return policy, method


def _price(samples: FitSamples, costs: Costs, budget: float, template: ExitPolicy) -> float:
    """Accuracy in points per unit of cost around a budget, along MSDNet's sweep."""
    results = sorted(samples.evaluate(p, costs)[1::-1] for p in geometric_sweep(_part(samples), template))
    nearest = min(range(len(results)), key=lambda i: abs(results[i][0] - budget))
    (low, worse), (high, better) = results[max(nearest - 2, 0)], results[min(nearest + 2, len(results) - 1)]
    return max(better - worse, 0.0) / (high - low) if high > low else 0.0


def _certified(
    fit: FitSamples,
    fresh: FitSamples,
    costs: Costs,
    template: ExitPolicy,
    method: str,
    risk: str,
    max_drop: float,
    confidence: float,
) -> Tuple[ExitPolicy, str]:
    """The certified policy of a path with the most early answers, and the method that made the path."""
    best = lowest_limit(len(fresh), confidence)
    what = {'drop': 'a drop', 'selective': 'a share of wrong early answers', 'disagreement': 'a disagreement'}[risk]
    about = (
        f'max_drop={max_drop:g}: {len(fit) + len(fresh)} images ({len(fit)} to fit, {len(fresh)} to certify) can '
        f'certify {what} of {best:.2f} points at best with confidence {confidence:g}'
    )
    if max_drop < best:
        # what would take more images than there are is not worth a number
        more = f'give {images_needed(max_drop, confidence)} images, ' if max_drop > 1e-6 else ''
        raise ValueError(f'{about}; {more}allow more, or ask for no guarantee (confidence none).')
    if method == 'auto':
        method = 'exit_rates' if len(fit) < FEW else 'shrunk'
    path = policy_path(fit, costs, template, method)
    found = certify(path, fit, fresh, risk, max_drop, confidence)
    if len(path) > 1 and (fresh.leave(found.policy)[0] == template.num_exits - 1).all():
        raise ValueError(
            f'{about}, if no sample is lost; under the most careful of {len(path) - 1} policies too many are; give '
            f'more images, allow more, or ask for no guarantee (confidence none).'
        )
    numbers = dict(limit=float(max_drop), confidence=float(confidence), images=len(fresh))
    certificate = dict(risk=risk, **numbers, bound=found.bound or 'none needed')
    return found.policy.certified(certificate), method


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
    policies = geometric_sweep(FitSamples(fit), all_on)
    points = [CurvePoint(policy, fit.evaluate(policy, costs), report.evaluate(policy, costs)) for policy in policies]
    return sorted(points, key=lambda point: point.test.cost)
