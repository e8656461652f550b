"""Thresholds from the shares of the samples that leave at each exit."""

import math
from typing import Any, Iterator, Sequence

import numpy as np
import torch

from .evaluate import CachedLogits, ExitLogits, as_logits, is_number
from .policy import ExitPolicy
from .samples import FitSamples

__all__ = ['blended', 'geometric_sweep', 'quantile_sweep', 'thresholds_for_exit_rates']

# MSDNet's sweep: one set of exit rates per p, in proportion to p, p^2, ..., p^K
EXIT_RATE_BASES = tuple(i / 20 for i in range(1, 40))
QUANTILES = tuple(1 - i / 40 for i in range(40))


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
    samples = FitSamples(CachedLogits(logits, torch.zeros(logits.shape[1], dtype=torch.long)))
    # 0.29 * 100 is 28.999999999999996
    counts = [math.floor(len(samples) * rate + 1e-9) for rate in rates[:-1]]
    return _leaving(samples, all_on, counts)


def _leaving(
    samples: FitSamples, template: ExitPolicy, counts: Sequence[int], lowest_correct: bool = False
) -> ExitPolicy:
    """Policy under which given numbers of samples, [K-1], leave at the exits.

    With `lowest_correct`, each threshold is raised to the lowest score of the leaving samples that are classified
    correctly.
    """
    remaining = np.arange(len(samples))
    thresholds = [0.0 if count else math.inf for count in counts]
    for k, count in enumerate(counts):
        if count > len(remaining):
            thresholds[k] = math.inf
        if thresholds[k] == math.inf:
            continue
        outcomes = samples.outcomes(template.with_thresholds(thresholds))  # without the exits that are off
        scores, correct = outcomes.scores[k][remaining], outcomes.correct[k][remaining]
        threshold = float(np.partition(scores, len(scores) - count)[len(scores) - count])
        if lowest_correct:
            threshold = float(scores[correct & (scores >= threshold)].min(initial=math.inf))
        thresholds[k] = threshold
        remaining = remaining[scores < threshold]
    return template.with_thresholds(thresholds)


def geometric_sweep(samples: FitSamples, template: ExitPolicy, lowest_correct: bool = False) -> Iterator[ExitPolicy]:
    """Yield a policy for each of MSDNet's 39 geometric distributions of the samples over the exits.

    Args:
        samples: Validation samples.
        template: Policy whose score, temperatures and averages all have.
        lowest_correct: Whether each threshold is the lowest score of the samples that leave there and are correct.
    """
    for p in EXIT_RATE_BASES:
        rates = [p**k for k in range(1, template.num_exits + 1)]
        counts = [math.floor(len(samples) * rate / sum(rates) + 1e-9) for rate in rates[:-1]]
        yield _leaving(samples, template, counts, lowest_correct)


def quantile_sweep(samples: FitSamples, template: ExitPolicy) -> Iterator[ExitPolicy]:
    """Yield policies with one quantile of the scores of all samples as the threshold of each exit.

    Args:
        samples: Validation samples.
        template: Policy whose score, temperatures and averages all have.
    """
    all_on = template.with_thresholds([0.0] * (template.num_exits - 1))
    ordered = np.sort(samples.outcomes(all_on).scores[:-1], axis=1)
    for quantile in QUANTILES:
        rank = min(int(quantile * len(samples)), len(samples) - 1)
        yield template.with_thresholds([float(scores[rank]) for scores in ordered])


def _shares(samples: FitSamples, policy: ExitPolicy) -> np.ndarray:
    """Share of the samples reaching each exit that leave there, [K-1]."""
    exits, _ = samples.leave(policy)
    counts = np.bincount(exits, minlength=policy.num_exits)
    reaching = counts[::-1].cumsum()[::-1]
    shares: np.ndarray = counts[:-1] / np.maximum(reaching[:-1], 1)
    return shares


def blended(samples: FitSamples, first: ExitPolicy, second: ExitPolicy, weight: float) -> ExitPolicy:
    """Policy between two others, in terms of the share of the samples reaching an exit that leave there.

    Args:
        samples: Validation samples.
        first: Policy with the weight 1 - `weight`.
        second: Policy with the weight `weight`.
        weight: Number from 0 to 1.
    """
    shares = (1 - weight) * _shares(samples, first) + weight * _shares(samples, second)
    reaching, counts = len(samples), []
    for share in shares.tolist():
        counts.append(round(share * reaching))
        reaching -= counts[-1]
    return _leaving(samples, first, counts)
