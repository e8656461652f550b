"""What every exit of a network gets right."""

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.utils import unwrap_model

from ..errors import UserError
from ..models import MultiExitModel, MultiExitOutput
from ..task import MLCSDTask

__all__ = ['Evaluation', 'ExitMetrics', 'count', 'evaluate', 'exit_logits', 'mean_mixing_weights', 'tally']


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
def count(batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> Optional[torch.Tensor]:
    """Sums over what `exit_logits` yields, to be added up before `tally`: [5, K] on the CPU, None without batches."""
    totals = None
    for logits, target in batches:
        ranked = logits.topk(min(5, logits.shape[-1])).indices == target[:, None]
        right = ranked[..., 0]
        losses = torch.stack([F.cross_entropy(z, target, reduction='sum') for z in logits])
        seen = torch.full_like(losses, len(target))
        counts = (right.sum(dim=1), ranked.any(dim=-1).sum(dim=1), losses, (right & ~right[-1]).sum(dim=1), seen)
        precise = torch.float32 if logits.device.type == 'mps' else torch.float64  # mps has no float64
        counts = torch.stack(counts).to(precise)
        totals = counts if totals is None else totals + counts
    return None if totals is None else totals.cpu().double()


def tally(totals: Optional[torch.Tensor]) -> Evaluation:
    """Means from sums.

    Raises:
        UserError: They are of no images.
    """
    if totals is None or not totals[-1, 0]:
        raise UserError('there are no images to evaluate on.')
    scale = totals.new_tensor([100.0, 100.0, 1.0, 100.0])[:, None] / totals[-1]
    return Evaluation([ExitMetrics(*column) for column in (totals[:-1] * scale).T.tolist()], int(totals[-1, 0]))


def evaluate(batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> Evaluation:
    """What every exit gets right in what `exit_logits` yields.

    Raises:
        UserError: There are no batches.
    """
    return tally(count(batches))


@torch.no_grad()
def mean_mixing_weights(
    task: MLCSDTask, loader: Iterable[Tuple[torch.Tensor, torch.Tensor]], autocast: ContextManager, channels_last: bool
) -> Optional[torch.Tensor]:
    """The teachers' mixing weights (paper, Table 15) [K, K], mean over the first batch; None without a teacher."""
    if task.criterion.mixer is None:
        return None
    model, criterion = task.get_eval_model(), task.criterion
    modes = model.training, criterion.training
    model.eval()
    criterion.eval()
    images, target = next(iter(loader))
    images, target = images.to(task.device), target.to(task.device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast:
        weights = criterion.mixing_weights(unwrap_model(model).forward_exits(images), target)
    model.train(modes[0])
    criterion.train(modes[1])
    return weights.mean(dim=0)
