"""Strength of the distillation of each exit: scaled by its training accuracy, limited by the pull of the label."""

import torch
import torch.distributed as dist
import torch.nn as nn

from ..distributed import all_reduce_mean

__all__ = ['DISTILL_RAMPS', 'FEATURE_SHARE', 'LOGIT_SHARE', 'AccuracyRamp', 'label_pull', 'limit_gradient']

DISTILL_RAMPS = ('none', 'accuracy')
# largest gradients of L_KD on the logits and of L_HT on the map, as shares of the label's gradient on the logits; on a
# map, the label's own gradient is 0.6 (max pool) and 0.15 times (average pool) as long when training begins
LOGIT_SHARE, FEATURE_SHARE = 0.5, 0.1


class AccuracyRamp(nn.Module):
    """Scale per exit: its running accuracy on training batches, mapped from chance level (0) to 100% (1).

    The gradient of L_KD with respect to the logits of an exit can be alpha * T times as long as that of the
    cross-entropy, which is 20 times with the paper's settings. Early in training this acts like a learning rate that is
    too high: heads collapse, or imitate teachers that are not better than chance. As the training accuracy of an exit
    approaches 100%, its scale approaches 1. The ramp is not part of the paper; docs/training.md has measurements.

    The scale of a batch depends on earlier batches only, which `step` includes in the running accuracy. By default a
    step is made with every batch. A training loop that sets `auto` to False and calls `step` after every update of the
    weights gets the same scales for any number of processes and of batches per update.

    Args:
        num_exits: Number of exits K.
        momentum: Weight of the past in the running accuracy, per 64 images; default 0.9.

    Attributes:
        auto: Whether to make a step with every batch; default True.
    """

    accuracy: torch.Tensor
    right: torch.Tensor
    seen: torch.Tensor

    def __init__(self, num_exits: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.auto = True
        self.register_buffer('accuracy', torch.zeros(num_exits))  # above chance
        self.register_buffer('right', torch.zeros(num_exits))
        self.register_buffer('seen', torch.zeros(()))

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the scales for a batch, and in training mode accumulate its accuracy.

        Args:
            logits: Logits of all exits, [B, K, C].
            target: Class indices [B], or soft targets [B, C], whose largest entry is taken as the class.

        Returns:
            Scales from 0 to 1, [K], in the dtype of the logits.
        """
        if self.training:
            if self.auto:
                self.step()
            labels = target if target.ndim == 1 else target.argmax(dim=-1)
            right = (logits.argmax(dim=-1) == labels[:, None]).to(self.right.dtype).mean(dim=0)
            chance = 1 / max(logits.shape[-1], 2)
            self.right += len(labels) * (right - chance) / (1 - chance)
            self.seen += len(labels)
        return self.accuracy.clamp(0, 1).to(logits.dtype)

    @torch.no_grad()
    def step(self) -> None:
        """Include the batches since the last step, of all processes, in the running accuracy."""
        right, seen = all_reduce_mean(torch.cat([self.right, self.seen[None]])).split([len(self.right), 1])
        images = seen * (dist.get_world_size() if dist.is_initialized() else 1)
        share = 1 - self.momentum ** (images / 64)
        self.accuracy.add_(share * (right / seen.clamp_min(1) - self.accuracy))
        self.right.zero_()
        self.seen.zero_()


def label_pull(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Length of the gradient of the cross-entropy on the logits of every sample and exit.

    Args:
        logits: Logits of all exits, [B, K, C].
        target: Class indices [B], or soft targets [B, C].

    Returns:
        Lengths from 0 (the label is predicted with certainty) to the square root of 2, [B, K], without gradient.
    """
    probs = logits.detach().softmax(dim=-1)
    if target.ndim == 1:
        # labels that the loss ignores are outside the classes
        labels = target.long().clamp(0, probs.shape[-1] - 1)[:, None, None].expand(-1, probs.shape[1], 1)
        gap = probs.scatter_add(-1, labels, torch.full_like(probs[..., :1], -1))
    else:
        gap = probs - target.to(probs.dtype).unsqueeze(1)
    lengths: torch.Tensor = torch.linalg.vector_norm(gap, dim=-1)
    return lengths


def limit_gradient(losses: torch.Tensor, lengths: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Shrink the losses of single samples until their gradients are no longer than a bound.

    Args:
        losses: Loss per sample and exit, [B, K].
        lengths: Lengths of the gradients of the weighted losses, [B, K]; constants.
        bounds: Largest lengths, [B, K]; constants.
    """
    return losses * (bounds / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)).clamp_max(1)
