"""Confidence calibration: temperatures, weights of averaged exits, and the calibration error."""

import math
from functools import partial
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..file_checks import check_scales
from .evaluate import ExitLogits, as_logits, as_targets, check_finite

# replaces logits of -inf: below every real logit, and finite, so that gradients are 0 and not NaN
MIN_LOGIT = -1e200

__all__ = ['confidence_bins', 'expected_calibration_error', 'fit_temperatures', 'fit_weights']


@torch.inference_mode(False)
def fit_temperatures(logits: ExitLogits, targets: torch.Tensor) -> Tuple[float, ...]:
    """Fit one temperature per exit by minimising the negative log-likelihood (Guo et al. 2017, section 4.2).

    A normal prior on the logarithms (mean 0, deviation 1) keeps few samples that are all classified correctly from
    making every confidence 1.

    Args:
        logits: Logits of K exits on N validation samples, [K, N, C].
        targets: Labels, [N].

    Returns:
        Temperatures, [K], positive; the logits are divided by them.

    Raises:
        ValueError: Logits and targets do not fit each other, or the logit of a label is -inf.
    """
    logits, targets = _float64_copies(logits, targets)

    def loss(log_temperature: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z / log_temperature.exp(), targets)

    log_t = [_minimise(partial(loss, z=z), 1, z) for z in logits]
    return tuple(t.exp().item() for t in log_t)


@torch.inference_mode(False)
def fit_weights(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None
) -> Tuple[Tuple[float, ...], ...]:
    """Fit the weights of each exit's geometric mean over exits 0..k by minimising the negative log-likelihood.

    A normal prior on the logarithms (mean that of equal weights, deviation 1) matters for few samples only.

    Args:
        logits: Logits of K exits on N validation samples, [K, N, C].
        targets: Labels, [N].
        temperatures: Temperatures of the policy, [K]; None for 1.

    Returns:
        The argument ``weights`` of `ExitPolicy`: K rows, row k with k+1 positive numbers.

    Raises:
        ValueError: Logits and targets do not fit each other, the logit of a label is -inf, or the temperatures are not
            K positive numbers.
    """
    logits, targets = _float64_copies(logits, targets)
    if temperatures is not None:
        logits = logits / logits.new_tensor(_check_temperatures(temperatures, logits))[:, None, None]
    log_probs = logits.log_softmax(-1)

    def loss(log_weights: torch.Tensor) -> torch.Tensor:
        first_exits = log_probs[: len(log_weights)]
        return F.cross_entropy(torch.einsum('k,knc->nc', log_weights.exp(), first_exits), targets)

    sizes = range(1, len(logits) + 1)
    return tuple(tuple(_minimise(loss, size, logits[0], -math.log(size)).exp().tolist()) for size in sizes)


def _float64_copies(logits: ExitLogits, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Copies of logits (float64) and targets that autograd can use, even if they come from inference mode.

    Raises:
        ValueError: Logits and targets do not fit each other, or the logit of a label is -inf.
    """
    logits = as_logits(logits)
    targets = as_targets(targets, logits)
    label_logits = logits.gather(-1, targets.expand(len(logits), -1)[..., None])[..., 0]
    if label_logits.isinf().any():
        exit_, sample = (int(i) for i in label_logits.isinf().nonzero()[0])
        raise ValueError(
            f'the logit of the label is -inf, first at exit {exit_}, sample {sample}: no temperature or weight can '
            f'raise its probability; remove the sample.'
        )
    return logits.to(torch.float64, copy=True).clamp_min(MIN_LOGIT), targets.clone()


def _check_temperatures(temperatures: Sequence[float], logits: torch.Tensor) -> List[float]:
    temperatures = temperatures.tolist() if isinstance(temperatures, torch.Tensor) else temperatures
    return check_scales('temperatures', temperatures, len(logits))


def _minimise(
    loss: Callable[[torch.Tensor], torch.Tensor], size: int, samples: torch.Tensor, start: float = 0.0
) -> torch.Tensor:
    """Minimise a smooth mean loss of `size` log-parameters over N samples, clamped to -9..9, with L-BFGS.

    The parameters have a normal prior with mean `start` and deviation 1.
    """
    parameters = torch.full((size,), start, dtype=torch.float64, device=samples.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn='strong_wolfe')

    @torch.enable_grad()
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # if all samples are correct, or all wrong, the minimum without the prior is at infinity
        prior = 0.5 * (parameters - start).square().sum()
        value = loss(parameters.clamp(-9, 9)) + prior / len(samples)
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach().clamp(-9, 9)


@torch.no_grad()
def confidence_bins(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None, bins: int = 15
) -> List[List[Tuple[float, float, float, float, float]]]:
    """Compute a reliability diagram per exit: accuracy in bins of confidence.

    Args:
        logits: Logits of K exits on N samples, [K, N, C].
        targets: Labels, [N].
        temperatures: Temperatures, [K]; None for 1.
        bins: Number of bins of equal width.

    Returns:
        Per exit, one tuple per non-empty bin: lower bound, upper bound, accuracy, share of the samples, mean
        confidence, all from 0 to 1.

    Raises:
        ValueError: Logits and targets do not fit each other, or `bins` or the temperatures are invalid.
    """
    logits = as_logits(logits)
    targets = as_targets(targets, logits)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f'bins={bins!r}: expected an integer of at least 1.')
    diagrams = []
    temperatures = [1.0] * len(logits) if temperatures is None else _check_temperatures(temperatures, logits)
    for z, t in zip(logits, temperatures):
        check_finite((z / t)[None])
        confidence, prediction = (z / t).softmax(-1).max(-1)
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        columns = torch.stack([torch.ones_like(confidence), prediction == targets, confidence]).double()
        sums = columns.new_zeros(3, bins).index_add_(1, index, columns)
        diagrams.append(
            [
                (i / bins, (i + 1) / bins, correct / count, count / len(targets), total / count)
                for i, (count, correct, total) in enumerate(sums.T.tolist())
                if count
            ]
        )
    return diagrams


def expected_calibration_error(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None, bins: int = 15
) -> List[float]:
    """Expected calibration error (ECE) per exit, in percent (Guo et al. 2017, equation 3).

    Args:
        logits: Logits of K exits on N samples, [K, N, C].
        targets: Labels, [N].
        temperatures: Temperatures, [K]; None for 1.
        bins: Number of bins of equal width.

    Returns:
        ECE per exit, [K], from 0 to 100.

    Raises:
        ValueError: Logits and targets do not fit each other, or `bins` or the temperatures are invalid.
    """
    diagrams = confidence_bins(logits, targets, temperatures, bins)
    return [
        100 * sum(share * abs(accuracy - confidence) for _, _, accuracy, share, confidence in diagram)
        for diagram in diagrams
    ]
