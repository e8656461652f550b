"""What the exits said of every training image before."""

import torch
import torch.nn as nn

__all__ = ['LogitMemory']


class LogitMemory(nn.Module):
    """A running mean of the exits' logits, image by image, over the epochs: a pool of teachers that is calmer than one
    look at one crop.

    Laine and Aila 2017, "Temporal Ensembling for Semi-Supervised Learning", for the logits of all exits; an image's
    first logits start its mean, so that nothing needs a correction.

    Args:
        num_samples: Images in the training set.
        num_exits: K.
        num_classes: C.
        momentum: Share of the old mean that is kept, from 0 to below 1.
    """

    def __init__(self, num_samples: int, num_exits: int, num_classes: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer('mean', torch.zeros(num_samples, num_exits, num_classes))
        self.register_buffer('seen', torch.zeros(num_samples, dtype=torch.bool))

    @torch.no_grad()
    def forward(self, logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Add logits [B, K, C] of the images `indices` [B]; returns their means. In eval mode nothing is kept."""
        old = self.mean[indices].to(logits.dtype)
        mean = self.momentum * old + (1 - self.momentum) * logits
        mean = torch.where(self.seen[indices, None, None], mean, logits)
        if self.training:
            # one NaN would stay for good
            finite = mean.isfinite().flatten(1).all(dim=1)
            self.mean.index_copy_(0, indices, torch.where(finite[:, None, None], mean, old).to(self.mean.dtype))
            self.seen.index_copy_(0, indices, self.seen[indices] | finite)
        return mean
