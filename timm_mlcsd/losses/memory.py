"""What the exits said of every training image before."""

from typing import List

import torch
import torch.distributed as dist
import torch.nn as nn

__all__ = ['LogitMemory', 'mean_of_processes', 'rows_of_processes']


def rows_of_processes(*tensors: torch.Tensor) -> List[torch.Tensor]:
    """Each tensor [B, ...] with those of all processes that train together behind one another: what one has seen, all
    remember. Without gradients; every process has the same B."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    gathered = []
    for tensor in tensors:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        gathered.append(torch.cat(parts))
    return gathered


def mean_of_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all processes that train together, without gradients."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


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
            kept = torch.where(finite[:, None, None], mean, old).to(self.mean.dtype)
            seen = self.seen[indices] | finite
            indices, kept, seen = rows_of_processes(indices, kept, seen)
            self.mean.index_copy_(0, indices, kept)
            self.seen.index_copy_(0, indices, seen)
        return mean
