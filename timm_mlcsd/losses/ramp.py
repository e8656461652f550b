"""How strongly an exit is distilled: by what it has learned from the labels, and no more than labels teach it."""

import torch
import torch.nn as nn

__all__ = ['DISTILL_RAMPS', 'AccuracyRamp', 'limit_gradient']

DISTILL_RAMPS = ('none', 'accuracy')


class AccuracyRamp(nn.Module):
    """A scale per exit: its running accuracy on training batches, from chance (0) to all right (1).

    The gradient of L_KD on an exit's logits is up to alpha * T times as long as that of the cross-entropy, 20 times
    with the paper's settings. On an exit that has learned nothing yet it acts like a learning rate that is too high:
    heads die, or follow teachers that know nothing either. Far into fitting the training set the scale is 1, and the
    loss the paper's but for `limit_gradient`. Not in the paper; measured in docs/training.md.

    Args:
        num_exits: K.
        momentum: Share of the past in the running accuracy, per batch.
    """

    def __init__(self, num_exits: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer('accuracy', torch.zeros(num_exits))

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Take a batch into account, in training mode, and give the scales.

        Args:
            logits: Logits of all exits, [B, K, C].
            target: Class indices [B], or soft targets [B, C], of which the largest counts.

        Returns:
            Scales from 0 to 1, [K], in the type of the logits.
        """
        if self.training:
            labels = target if target.ndim == 1 else target.argmax(dim=-1)
            right = (logits.argmax(dim=-1) == labels[:, None]).to(self.accuracy.dtype).mean(dim=0)
            chance = 1 / max(logits.shape[-1], 2)
            self.accuracy.lerp_((right - chance) / (1 - chance), 1 - self.momentum)
        return self.accuracy.clamp(0, 1).to(logits.dtype)


def limit_gradient(losses: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Shrink losses of single samples so that none pulls harder than a label does.

    The cross-entropy's gradient on a sample's logits is of length 1 to the square root of 2 where the answer is wrong
    and sure. A distillation loss of which it is longer than 1 is divided by its length.

    Args:
        losses: One per sample and exit, [B, K].
        lengths: Lengths of their gradients with all weights, in the same shape; constants.
    """
    return losses / lengths.clamp_min(1)
