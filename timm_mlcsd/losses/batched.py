"""Losses of all exits in a few large operations, which a GPU runs much faster than many small ones."""

from typing import Optional, Sequence, Union

import torch
import torch.nn as nn
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

__all__ = [
    'Weights',
    'at_least_float32',
    'expand_target',
    'is_mean_over_rows',
    'scaled',
    'stack_maps',
    'sum_of_losses',
    'weighted',
]

# one weight for all exits, or one per exit, [K]
Weights = Union[float, torch.Tensor]


def is_mean_over_rows(loss: nn.Module) -> bool:
    """Whether a classification loss is the mean of one number per row, so that rows of all exits can share a call.

    Subclasses may compute something else, so that only the losses themselves count.
    """
    if type(loss) is BinaryCrossEntropy:
        # weights per sample would not fit the rows of all exits
        weights = [w for w in (loss.weight, loss.pos_weight) if isinstance(w, torch.Tensor)]
        return all(w.ndim <= 1 for w in weights) and (loss.reduction == 'mean' or bool(loss.sum_classes))
    if type(loss) is nn.CrossEntropyLoss:
        return loss.reduction == 'mean'
    return type(loss) in (LabelSmoothingCrossEntropy, SoftTargetCrossEntropy)


def expand_target(target: torch.Tensor, num_exits: int) -> torch.Tensor:
    """Repeat a target [B, ...] for the rows of K exits, [B * K, ...]."""
    return target.unsqueeze(1).expand(-1, num_exits, *target.shape[1:]).reshape(-1, *target.shape[1:])


def sum_of_losses(
    loss: nn.Module, logits: torch.Tensor, target: torch.Tensor, expanded: Optional[torch.Tensor], weights: Weights
) -> torch.Tensor:
    """Weighted sum of a classification loss over the exits.

    Args:
        loss: Classification loss.
        logits: Logits, [B, K, C].
        target: Class indices [B], or another target that `loss` supports.
        expanded: The target for the rows of all exits (`expand_target`), if one call can compute them; else None.
        weights: Weight of every exit, or weights of the exits, [K].

    Returns:
        A scalar.
    """
    if expanded is not None and isinstance(weights, float):
        # every exit has the same labels, so the mean over all rows is the mean of the exits' losses
        mean: torch.Tensor = loss(logits.reshape(-1, logits.shape[-1]), expanded)
        return logits.shape[1] * weights * mean
    each = [weights] * logits.shape[1] if isinstance(weights, float) else weights
    first, *others = [torch.as_tensor(w * loss(z, target)) for w, z in zip(each, logits.unbind(dim=1))]
    return sum(others, first)


def weighted(losses: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Weighted sum of the losses of the exits, [K]."""
    if not isinstance(weights, float):
        return weights @ losses
    return scaled(losses.sum(), weights)


def scaled(loss: torch.Tensor, factor: float) -> torch.Tensor:
    """A loss times a factor, without an operation for the factor 1."""
    return loss if factor == 1 else factor * loss


def stack_maps(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack maps [B, D, H, W] of K exits in their memory order, with the channels in front: [B, K, D, H, W]."""
    if features[-1].is_contiguous(memory_format=torch.channels_last):
        stacked = torch.stack([f.permute(0, 2, 3, 1) for f in features], dim=1).permute(0, 1, 4, 2, 3)
    else:
        stacked = torch.stack(list(features), dim=1)
    return at_least_float32(stacked)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float32 if it has half precision, else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
