"""Methods that fit thresholds to samples: to a goal, or as a path of policies from the last exit alone to the first.

- ``optimal``: search for the best thresholds;
- ``exit_rates``: the best of MSDNet's sweep of geometric exit rates (Huang et al. 2018, section 5.2);
- ``shrunk``: halfway between these two;
- ``quantile``: one quantile of the scores for all exits;
- ``paper``: the sweep, with each threshold at the lowest score of the samples that leave there and are correct (MLCSD,
  "Budgeted batch classification results").
"""

import math
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

from .evaluate import Costs, cumulative_costs
from .exit_rates import blended, geometric_sweep, quantile_sweep
from .policy import ExitPolicy
from .samples import FitSamples
from .search import Goal, best_thresholds

__all__ = [
    'FIT_METHODS',
    'HeldOut',
    'best_policy',
    'choose_method',
    'cross_validated',
    'last_exit_alone',
    'policy_path',
    'single_exits',
]

# weight of the exit rates in the policies of `shrunk`
SHRINKAGE = 0.5
# shares of the early leavers of the most careful policy, with which a path begins
CAREFUL = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
FOLDS = 5
# with more samples than that, two folds tell as much
MANY = 2000
SEED = 0


def last_exit_alone(template: ExitPolicy) -> ExitPolicy:
    """Policy whose exits are off, but for the last."""
    return template.with_thresholds([math.inf] * (template.num_exits - 1))


def single_exits(template: ExitPolicy) -> List[ExitPolicy]:
    """Policies with one exit at which all samples leave, the last one first."""
    off = [math.inf] * (template.num_exits - 1)
    first = [template.with_thresholds([*off[:k], 0.0, *off[k + 1 :]]) for k in range(template.num_exits - 1)]
    return [last_exit_alone(template), *first]


def _exit_rates(samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy) -> Optional[ExitPolicy]:
    return best_policy(samples, costs, goal, [*single_exits(template), *geometric_sweep(samples, template)])


def _paper(samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy) -> Optional[ExitPolicy]:
    return best_policy(samples, costs, goal, [*single_exits(template), *geometric_sweep(samples, template, True)])


def _quantile(samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy) -> Optional[ExitPolicy]:
    return best_policy(samples, costs, goal, [*single_exits(template), *quantile_sweep(samples, template)])


def _optimal(samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy) -> Optional[ExitPolicy]:
    start = _exit_rates(samples, costs, goal, template)
    return None if start is None else best_thresholds(samples, costs, goal, start)


def _shrunk(samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy) -> Optional[ExitPolicy]:
    start = _exit_rates(samples, costs, goal, template)
    if start is None:
        return None
    best = best_thresholds(samples, costs, goal, start)
    for weight in np.linspace(SHRINKAGE, 1, 6):
        policy = blended(samples, best, start, float(weight))
        if goal.is_met(*samples.evaluate(policy, costs)[:2]):
            return policy
    return start


def best_policy(samples: FitSamples, costs: Costs, goal: Goal, policies: Sequence[ExitPolicy]) -> Optional[ExitPolicy]:
    """The best of some policies that meets a goal, None if none does; of equal ones the first."""
    results = [samples.evaluate(policy, costs) for policy in policies]
    feasible = [i for i, result in enumerate(results) if goal.is_met(*result[:2])]
    return policies[max(feasible, key=lambda i: goal.key(*results[i][:2]))] if feasible else None


# docs/adaptive.md describes them
FIT_METHODS: Dict[str, Callable[[FitSamples, Costs, Goal, ExitPolicy], Optional[ExitPolicy]]] = {
    'optimal': _optimal,
    'shrunk': _shrunk,
    'exit_rates': _exit_rates,
    'quantile': _quantile,
    'paper': _paper,
}


def policy_path(samples: FitSamples, costs: Costs, template: ExitPolicy, method: str) -> List[ExitPolicy]:
    """Policies from the last exit alone to the cheapest, by descending mean cost on the samples.

    Args:
        samples: Validation samples.
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        template: Policy whose score, temperatures and averages all have.
        method: One of `FIT_METHODS`.
    """
    first = last_exit_alone(template)
    if template.score == 'patience':
        # its scores are few numbers, of which quantiles say little: leave after so many exits that agree
        policies = [
            template.with_thresholds([float(count)] * (template.num_exits - 1))
            for count in reversed(range(1, template.num_exits))
        ]
    else:
        policies = _dense_path(samples, costs, template, method, first)
    limit = samples.evaluate(first, costs).cost * (1 - 1e-9)  # with a tolerance for sums in another order
    priced = [(samples.evaluate(policy, costs).cost, i) for i, policy in enumerate(policies)]
    return [first, *(policies[i] for cost, i in sorted(priced, reverse=True) if cost < limit)]


def _dense_path(
    samples: FitSamples, costs: Costs, template: ExitPolicy, method: str, first: ExitPolicy
) -> List[ExitPolicy]:
    """Policies of a method, and policies between them and between the first and the most careful one."""
    if method == 'quantile':
        policies = list(quantile_sweep(samples, template))
    else:
        policies = list(geometric_sweep(samples, template, method == 'paper'))[::-1]
    if method in ('optimal', 'shrunk'):
        improved = []
        for policy in policies[::3]:
            goal = Goal(budget=samples.evaluate(policy, costs).cost)
            best = best_thresholds(samples, costs, goal, policy)
            improved.append(best if method == 'optimal' else blended(samples, best, policy, SHRINKAGE))
        policies = improved
    careful = [blended(samples, first, policies[0], share) for share in CAREFUL]
    between = [
        blended(samples, one, other, weight)
        for one, other in zip(policies, policies[1:])
        for weight in (0.25, 0.5, 0.75)
    ]
    return [*careful, *policies, *between]


class HeldOut(NamedTuple):
    """A method on samples that its thresholds were not fitted to.

    Attributes:
        correct: Whether each answer is right, [N].
        costs: Cost of each sample, [N].
    """

    correct: np.ndarray
    costs: np.ndarray


def cross_validated(
    samples: FitSamples, costs: Costs, goal: Goal, template: ExitPolicy, methods: Sequence[str]
) -> Dict[str, HeldOut]:
    """Fit methods to parts of the samples, and evaluate each on the rest.

    Args:
        samples: Validation samples; each is left out of the fits once.
        costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        goal: The goal that every fit meets.
        template: Policy whose score, temperatures and averages all have.
        methods: Some of `FIT_METHODS`.

    Returns:
        Results by method; none for a method that cannot meet the goal on a part of the samples.
    """
    order = np.random.default_rng(SEED).permutation(len(samples))
    folds = np.array_split(order, min(2 if len(samples) > MANY else FOLDS, len(samples)))
    results = {m: HeldOut(np.zeros(len(samples), dtype=bool), np.zeros(len(samples))) for m in methods}
    for held_out in folds:
        kept, rest = samples.subset(np.setdiff1d(order, held_out)), samples.subset(held_out)
        for method in list(results):
            policy = FIT_METHODS[method](kept, costs, goal, template) if len(kept) else None
            if policy is None:
                del results[method]
                continue
            exits, results[method].correct[held_out] = rest.leave(policy)
            results[method].costs[held_out] = cumulative_costs(costs, policy).numpy()[exits]
    return results


def choose_method(results: Dict[str, HeldOut], price: float) -> Optional[str]:
    """Choose among cross-validated methods; None without any.

    Args:
        results: Results by method, the default first. Another one must be better by two standard errors, because the
            best of several results on few samples is often chance.
        price: Accuracy in points per unit of cost, because methods use a budget differently on other samples.
    """
    values = {method: 100 * held.correct - price * held.costs for method, held in results.items()}
    default = next(iter(values), None)
    if default is None:
        return None
    leads = {method: value - values[default] for method, value in values.items()}
    clear = [m for m, lead in leads.items() if lead.mean() > 2 * lead.std() / len(lead) ** 0.5]
    return max(clear, key=lambda m: leads[m].mean(), default=default)
