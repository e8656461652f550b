"""Risk control: certify on fresh samples that a policy's risk stays under a limit.

One part of the calibration samples fits a path of policies from "no sample leaves early" to the cheapest. The other
tests them in this order, and the last policy before the first failure is taken (Learn then Test with fixed sequence
testing: Angelopoulos et al. 2021, arXiv:2110.01052, section 2.3; a path from a fit on separate data: Pareto testing,
Laufer-Goldenthal et al. 2023, arXiv:2210.07913). If every single test is valid, the probability that the risk of the
result exceeds the limit is at most 1 - confidence, over the draw of the samples.
"""

import bisect
import math
from typing import NamedTuple, Sequence, Tuple

import numpy as np

from ..file_checks import RISKS
from .policy import ExitPolicy
from .samples import FitSamples

__all__ = ['RISKS', 'Certified', 'certify', 'images_needed', 'lowest_limit', 'split']

# share of the samples that fits the path, and bounds of their number: more samples do not improve a path
FIT_SHARE = 0.2
MIN_FIT, MAX_FIT = 20, 10_000
# share of the bet with which one lost sample would lose everything
MAX_BET = 0.9
SEED = 0


class Certified(NamedTuple):
    """Result of a certification.

    Attributes:
        policy: The last policy of the path that is certified.
        bound: Test that certified it, ``binomial`` or ``betting``; empty for the first policy.
    """

    policy: ExitPolicy
    bound: str = ''


def split(num_samples: int) -> Tuple[np.ndarray, np.ndarray]:
    """Indices of the samples that fit the path and of those that certify, drawn with a fixed seed."""
    num_fit = _num_fit(num_samples)
    if num_fit == 0:
        raise ValueError(f'{num_samples} image cannot certify anything; give more.')
    order = np.random.default_rng(SEED).permutation(num_samples)
    return np.sort(order[:num_fit]), np.sort(order[num_fit:])


def _num_fit(num_samples: int) -> int:
    return min(max(round(FIT_SHARE * num_samples), min(MIN_FIT, num_samples // 2)), MAX_FIT)


def lowest_limit(num_samples: int, confidence: float) -> float:
    """Lowest limit, in percentage points, that samples without a single loss can certify."""
    return 100 * (1 - math.exp(math.log(1 - confidence) / num_samples))


def images_needed(limit: float, confidence: float) -> int:
    """Number of calibration samples of which the certifying part reaches a limit in points, without a single loss."""
    certifying = math.ceil(math.log(1 - confidence) / math.log1p(-limit / 100))
    return bisect.bisect_left(range(2 * certifying + 2), certifying, key=lambda n: n - _num_fit(n))


def certify(
    path: Sequence[ExitPolicy],
    fit: FitSamples,
    fresh: FitSamples,
    risk: str,
    limit: float,
    confidence: float,
) -> Certified:
    """Test the policies of a path in order, up to the first whose risk is not shown to stay under the limit.

    Args:
        path: Policies; the first one lets no sample leave early, so that its risk is 0.
        fit: Samples that the path was fitted to.
        fresh: Samples that neither the path nor the template (temperatures, weights) was fitted to.
        risk: One of `RISKS`.
        limit: Largest risk, in percentage points, above 0.
        confidence: Probability that the risk of the result is at most the limit, over the draw of `fresh`.
    """
    fitted = [_losses(fit, path[0], policy, risk) for policy in path]
    expected = [losses.scaled(len(fresh) / len(fit)) for losses in fitted]
    tests = [_choose_test(f, e, len(fresh), limit / 100, confidence) for f, e in zip(fitted, expected)]
    start = 1
    if risk == 'selective' and len(path) > 1:
        # too few leave early under careful policies to certify them: begin where the evidence should be best
        start = min(range(1, len(path)), key=lambda i: tests[i].p_value(expected[i], limit / 100))
    certified = Certified(path[0])
    for i in range(start, len(path)):
        if tests[i].p_value(_losses(fresh, path[0], path[i], risk), limit / 100) > 1 - confidence:
            break
        certified = Certified(path[i], tests[i].name)
    return certified


class _Losses(NamedTuple):
    """Numbers of samples by loss.

    Attributes:
        lost: With the loss 1.
        gained: With the loss -1.
        total: All.
    """

    lost: int
    gained: int
    total: int

    def scaled(self, factor: float) -> '_Losses':
        """The numbers that so many times as many samples can be expected to have."""
        return _Losses(round(factor * self.lost), round(factor * self.gained), round(factor * self.total))


class _Test(NamedTuple):
    """A test of "the mean loss exceeds the limit".

    Attributes:
        name: ``binomial``, which ignores gains, or ``betting``.
        bet: Bet for `_betting`.
    """

    name: str
    bet: float = 0.0

    def p_value(self, losses: _Losses, limit: float) -> float:
        """P-value for losses, with the limit as a share."""
        return _binomial(losses, limit) if self.name == 'binomial' else _betting(losses, limit, self.bet)


def _choose_test(losses: _Losses, expected: _Losses, num_fresh: int, limit: float, confidence: float) -> _Test:
    """Choose the test that is more powerful if fresh samples are as expected; only other samples may choose."""
    binomial, betting = _Test('binomial'), _Test('betting', _bet(losses, num_fresh, limit, confidence))
    if not losses.gained:
        return binomial
    return min(binomial, betting, key=lambda test: test.p_value(expected, limit))


def _losses(samples: FitSamples, last: ExitPolicy, policy: ExitPolicy, risk: str) -> _Losses:
    """Losses of a policy; for ``disagreement``, a sample is correct if the answer is that of the last exit."""
    exits, correct = samples.leave(policy)
    if risk == 'selective':
        early = exits < policy.num_exits - 1
        return _Losses(int((early & ~correct).sum()), 0, int(early.sum()))
    _, whole = samples.leave(last)
    return _Losses(int((whole & ~correct).sum()), int((correct & ~whole).sum()), len(samples))


def _binomial(losses: _Losses, limit: float) -> float:
    """P-value of "the probability of a loss exceeds the limit": the exact binomial tail (Clopper and Pearson 1934).

    The mean loss is at most that probability, as gains only lower it.
    """
    if limit >= 1:
        return 0.0
    k = np.arange(1, losses.lost + 1)
    steps = np.log((losses.total - k + 1) / k) + math.log(limit / (1 - limit))
    log_terms = losses.total * math.log1p(-limit) + np.concatenate([[0.0], steps.cumsum()])
    return float(min(1.0, np.exp(log_terms - log_terms.max()).sum() * math.exp(log_terms.max())))


def _bet(losses: _Losses, num_fresh: int, limit: float, confidence: float) -> float:
    """Bet for `_betting`, from other samples: the best one for a mean loss that is only just certified.

    Waudby-Smith and Ramdas 2024, equation 15, with the variance of the losses from the samples that fitted the path.
    """
    if limit >= 1:
        return 0.0
    variance = (losses.lost + losses.gained + 0.5) / (losses.total + 1)
    bet = math.sqrt(2 * math.log(1 / (1 - confidence)) / (num_fresh * variance))
    return min(bet, MAX_BET / (1 - limit))


def _betting(losses: _Losses, limit: float, bet: float) -> float:
    """P-value of "the mean loss exceeds the limit", for losses from -1 to 1.

    The capital of a gambler who bets that losses are below the limit has a mean of at most 1 if they are not, so its
    inverse is a p-value (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting",
    section 4). The bet does not depend on the samples, so their order does not matter.
    """
    if limit >= 1:
        return 0.0
    even = losses.total - losses.lost - losses.gained
    capital = (
        losses.lost * math.log1p(bet * (limit - 1))
        + losses.gained * math.log1p(bet * (limit + 1))
        + even * math.log1p(bet * limit)
    )
    return math.exp(-max(capital, 0.0))
