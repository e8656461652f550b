"""What every exit of a network gets right."""

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Iterable, List, NamedTuple, Optional

import torch
import torch.nn.functional as F

from ..models import MultiExitModel, MultiExitOutput

__all__ = ['ExitMetrics', 'Evaluation', 'evaluate']


class ExitMetrics(NamedTuple):
    """One exit on one data set.

    Attributes:
        top1: Accuracy in %.
        top5: Share of samples with the label among the five surest classes, in %.
        loss: Mean cross-entropy.
        rescued: Share of samples that are right here and wrong at the last exit, in % (paper, Table 1).
    """

    top1: float
    top5: float
    loss: float
    rescued: float


class Evaluation(NamedTuple):
    """All exits on one data set."""

    exits: List[ExitMetrics]
    num_samples: int

    @property
    def mean_top1(self) -> float:
        """Mean accuracy over the exits in %: what chooses the best epoch."""
        return sum(e.top1 for e in self.exits) / len(self.exits)


@torch.no_grad()
def evaluate(
    model: MultiExitModel,
    loader: Iterable[Any],
    device: torch.device,
    autocast: Optional[ContextManager] = None,
    channels_last: bool = False,
    forward: Optional[Callable[[torch.Tensor], MultiExitOutput]] = None,
) -> Evaluation:
    """Run all exits over a loader, in evaluation mode.

    Args:
        model: The network; its mode is restored.
        loader: Batches of (images, class indices).
        device: Where the network is.
        autocast: Context for the forward pass.
        channels_last: Use that memory layout for the images.
        forward: A compiled ``model.forward_exits``.
    """
    forward = forward or model.forward_exits
    was_training = model.training
    model.eval()
    precise = torch.float32 if device.type == 'mps' else torch.float64  # mps has no float64
    totals = torch.zeros(4, model.num_exits, dtype=precise, device=device)
    num_samples = 0
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast or nullcontext():
            logits = torch.stack(forward(images).logits).float()
        ranked = logits.topk(min(5, logits.shape[-1])).indices == target[:, None]
        right = ranked[..., 0]
        losses = [F.cross_entropy(z, target, reduction='sum') for z in logits]
        totals += torch.stack(
            [
                right.sum(dim=1),
                ranked.any(dim=-1).sum(dim=1),
                torch.stack(losses),
                (right & ~right[-1]).sum(dim=1),
            ]
        ).to(precise)
        num_samples += len(target)
    model.train(was_training)
    scale = torch.tensor([100.0, 100.0, 1.0, 100.0], dtype=precise, device=device)[:, None] / max(num_samples, 1)
    return Evaluation([ExitMetrics(*column) for column in (totals * scale).T.tolist()], num_samples)
