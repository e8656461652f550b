"""Fitted on validation logits: temperatures, and the weights of aggregated answers."""

import math
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

from ..file_checks import check_scales
from .evaluate import ExitLogits, as_logits, as_targets, check_finite

# far below every logit, and finite, so that gradients are 0 and not NaN
IMPOSSIBLE = -1e200

__all__ = ['confidence_bins', 'expected_calibration_error', 'fit_temperatures', 'fit_weights']


@torch.inference_mode(False)
def fit_temperatures(logits: ExitLogits, targets: torch.Tensor) -> Tuple[float, ...]:
    """One temperature per exit that minimises the negative log-likelihood (Guo et al. 2017, section 4.2).

    Args:
        logits: Of K exits on N validation samples, [K, N, C].
        targets: Labels [N].

    Returns:
        K positive numbers; logits are divided by them.
    """
    logits, targets = _own_copies(logits, targets)
    log_t = [_minimise(lambda p, z=z: F.cross_entropy(z / p.exp(), targets), 1, z.device) for z in logits]
    return tuple(t.exp().item() for t in log_t)


@torch.inference_mode(False)
def fit_weights(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None
) -> Tuple[Tuple[float, ...], ...]:
    """Weights of the exits so far in each exit's answer, a geometric mean, that minimise the negative log-likelihood.

    Args:
        logits: Of K exits on N validation samples, [K, N, C].
        targets: Labels [N].
        temperatures: What the policy divides the logits by.

    Returns:
        K rows, row k with k+1 positive numbers: what `ExitPolicy` takes as ``weights``.
    """
    logits, targets = _own_copies(logits, targets)
    if temperatures is not None:
        logits = logits / logits.new_tensor(_checked(temperatures, logits))[:, None, None]
    log_probs = logits.log_softmax(-1)

    def loss(log_weights: torch.Tensor) -> torch.Tensor:
        passed = log_probs[: len(log_weights)]
        return F.cross_entropy(torch.einsum('k,knc->nc', log_weights.exp(), passed), targets)

    sizes = range(1, len(logits) + 1)
    return tuple(tuple(_minimise(loss, size, logits.device, -math.log(size)).exp().tolist()) for size in sizes)


def _own_copies(logits: ExitLogits, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """In float64, and for autograd to keep, also where the originals come from inference mode.

    Raises:
        ValueError: They don't fit each other, or a label is a class that an exit's logits say cannot be.
    """
    logits = as_logits(logits)
    targets = as_targets(targets, logits)
    of_labels = logits.gather(-1, targets.expand(len(logits), -1)[..., None])[..., 0]
    if of_labels.isinf().any():
        exit_, sample = (int(i) for i in of_labels.isinf().nonzero()[0])
        raise ValueError(
            f'the logit of the label is -inf, first at exit {exit_}, sample {sample}: no temperature or weight makes '
            f'it likely; leave the sample out.'
        )
    return logits.to(torch.float64, copy=True).clamp_min(IMPOSSIBLE), targets.clone()


def _checked(temperatures: Sequence[float], logits: torch.Tensor) -> List[float]:
    temperatures = temperatures.tolist() if isinstance(temperatures, torch.Tensor) else temperatures
    return check_scales('temperatures', temperatures, len(logits))


def _minimise(
    loss: Callable[[torch.Tensor], torch.Tensor], size: int, device: torch.device, start: float = 0.0
) -> torch.Tensor:
    """Parameters, logarithms within e^-9 to e^9, at a minimum of a smooth loss."""
    parameters = torch.full((size,), start, dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn='strong_wolfe')

    @torch.enable_grad()
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        # a set that is all right or all wrong has its minimum at infinity
        value = loss(parameters.clamp(-9, 9)) + 1e-6 * parameters.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return parameters.detach().clamp(-9, 9)


@torch.no_grad()
def confidence_bins(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None, bins: int = 15
) -> List[List[Tuple[float, float, float, float, float]]]:
    """How right the samples of each confidence are, per exit: a reliability diagram.

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].
        temperatures: What to divide the logits by.
        bins: Number of bins, of equal width.

    Returns:
        Per exit, for each bin that isn't empty: where it begins and ends, accuracy, share of the samples, mean
        confidence.
    """
    logits = as_logits(logits)
    targets = as_targets(targets, logits)
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f'bins={bins!r}: expected an integer of at least 1.')
    found = []
    for z, t in zip(logits, [1.0] * len(logits) if temperatures is None else _checked(temperatures, logits)):
        check_finite((z / t)[None])
        confidence, prediction = (z / t).softmax(-1).max(-1)
        index = (confidence * bins).ceil().long().clamp(1, bins) - 1
        columns = torch.stack([torch.ones_like(confidence), prediction == targets, confidence]).double()
        sums = columns.new_zeros(3, bins).index_add_(1, index, columns)
        found.append(
            [
                (i / bins, (i + 1) / bins, right / count, count / len(targets), total / count)
                for i, (count, right, total) in enumerate(sums.T.tolist())
                if count
            ]
        )
    return found


def expected_calibration_error(
    logits: ExitLogits, targets: torch.Tensor, temperatures: Optional[Sequence[float]] = None, bins: int = 15
) -> List[float]:
    """How far confidence is from accuracy, per exit, in percent (ECE, Guo et al. 2017, equation 3).

    Args:
        logits: Of K exits on N samples, [K, N, C].
        targets: Labels [N].
        temperatures: What to divide the logits by.
        bins: Number of bins, of equal width.
    """
    found = confidence_bins(logits, targets, temperatures, bins)
    return [100 * sum(share * abs(right - sure) for _, _, right, share, sure in exit_) for exit_ in found]
