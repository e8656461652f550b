"""What every exit of a network gets right."""

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F

from ..errors import UserError
from ..models import MultiExitModel, MultiExitOutput

__all__ = ['Evaluation', 'ExitMetrics', 'evaluate', 'exit_logits']


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
def exit_logits(
    model: MultiExitModel,
    loader: Iterable[Any],
    device: torch.device,
    autocast: Optional[ContextManager] = None,
    channels_last: bool = False,
    forward: Optional[Callable[[torch.Tensor], MultiExitOutput]] = None,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
    """Run all exits over a loader, in evaluation mode; yields logits [K, B, C] in float32 and class indices [B].

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
    for images, target in loader:
        images, target = images.to(device), target.to(device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast or nullcontext():
            logits = torch.stack(forward(images).logits).float()
        yield logits, target
    model.train(was_training)


@torch.no_grad()
def evaluate(batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> Evaluation:
    """What every exit gets right in what `exit_logits` yields.

    Raises:
        UserError: There are no batches.
    """
    totals, num_samples = 0, 0
    for logits, target in batches:
        ranked = logits.topk(min(5, logits.shape[-1])).indices == target[:, None]
        right = ranked[..., 0]
        losses = [F.cross_entropy(z, target, reduction='sum') for z in logits]
        counts = (right.sum(dim=1), ranked.any(dim=-1).sum(dim=1), torch.stack(losses), (right & ~right[-1]).sum(dim=1))
        precise = torch.float32 if logits.device.type == 'mps' else torch.float64  # mps has no float64
        totals = totals + torch.stack(counts).to(precise)
        num_samples += len(target)
    if not num_samples:
        raise UserError('there are no images to evaluate on.')
    scale = totals.new_tensor([100.0, 100.0, 1.0, 100.0])[:, None] / num_samples
    return Evaluation([ExitMetrics(*column) for column in (totals * scale).T.tolist()], num_samples)
