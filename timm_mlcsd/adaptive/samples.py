"""Samples that thresholds are fitted to: the scores of all exits, and whether their answers are right."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from .evaluate import CachedLogits, Costs, cumulative_costs
from .policy import ExitPolicy

__all__ = ['FitResult', 'FitSamples', 'Outcomes']


class Outcomes(NamedTuple):
    """What all exits would answer if no sample left.

    Attributes:
        scores: Scores, [K, N].
        correct: Whether the answers are right, [K, N].
    """

    scores: np.ndarray
    correct: np.ndarray


class FitResult(NamedTuple):
    """Result of a policy on the samples.

    Attributes:
        accuracy: Top-1 accuracy in percent.
        cost: Mean cost per sample, in the unit of the costs.
        exit_fractions: Share of the samples that leave at each exit, [K].
    """

    accuracy: float
    cost: float
    exit_fractions: List[float]


class FitSamples:
    """Scores and correctness of N samples on the CPU, computed once for all policies that differ in thresholds alone.

    Args:
        cached: Logits and labels of the samples.
        rows: Indices of the samples to use, [N]; None for all.
    """

    def __init__(self, cached: CachedLogits, rows: Optional[np.ndarray] = None):
        self.cached = cached
        self.rows = rows
        self._outcomes: Dict[Tuple[Any, ...], Outcomes] = {}

    def __len__(self) -> int:
        return len(self.cached.targets) if self.rows is None else len(self.rows)

    def subset(self, rows: np.ndarray) -> 'FitSamples':
        """The samples of given rows; the logits are shared."""
        return FitSamples(self.cached, rows if self.rows is None else self.rows[rows])

    def outcomes(self, policy: ExitPolicy) -> Outcomes:
        """Scores and correctness of all exits if no sample leaves.

        Args:
            policy: Exit policy with K exits; its thresholds only matter for which exits are on.
        """
        key = self.cached.key(policy)
        if key not in self._outcomes:
            scores, correct = self.cached.scored(policy)
            if self.rows is not None:
                scores, correct = scores[:, self.rows], correct[:, self.rows]
            self._outcomes[key] = Outcomes(scores, correct)
        return self._outcomes[key]

    def leave(self, policy: ExitPolicy) -> Tuple[np.ndarray, np.ndarray]:
        """Exit of each sample under a policy, [N], and whether its answer is right, [N]."""
        outcomes = self.outcomes(policy)
        exits = np.full(len(self), policy.num_exits - 1, dtype=np.int16)
        correct = outcomes.correct[-1].copy()
        for k in reversed(range(policy.num_exits - 1)):
            if policy.is_on(k):
                leaves = outcomes.scores[k] >= policy.thresholds[k]
                np.copyto(exits, k, where=leaves)
                np.copyto(correct, outcomes.correct[k], where=leaves)
        return exits, correct

    def evaluate(self, policy: ExitPolicy, costs: Costs) -> FitResult:
        """Accuracy and mean cost of a policy.

        Args:
            policy: Exit policy with K exits.
            costs: Cumulative cost of answering at each exit, [K]; or `ExitCost` or `ExitTime` per exit.
        """
        exits, correct = self.leave(policy)
        shares = np.bincount(exits, minlength=policy.num_exits) / len(self)
        cost = float(shares @ cumulative_costs(costs, policy).numpy())
        return FitResult(100 * float(correct.mean()), cost, shares.tolist())
