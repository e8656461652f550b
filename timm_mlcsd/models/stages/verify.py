"""Verify that stages in sequence compute the same as the backbone they were made from."""

import contextlib
import math
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['PartitionError', 'default_mode', 'verify']


class PartitionError(ValueError):
    """A backbone cannot be run in stages."""


@contextlib.contextmanager
def default_mode(device: torch.device) -> Iterator[None]:
    """Run without gradients, inference mode and autocast, and restore the random state afterwards.

    Args:
        device: Device of the computation; its random state is restored in addition to the CPU's.
    """
    on_gpu = [device] if device.type == 'cuda' else []
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(on_gpu),
    ):
        yield


def verify(steps: Sequence[Callable[[Any], Any]], backbone: nn.Module, input_size: Sequence[int]) -> None:
    """Run steps in sequence and compare with the backbone, then again with a smaller batch after the first step.

    Args:
        steps: Functions that each take the result of the previous one. The first takes images [B, C, H, W], the last
            returns logits [B, C].
        backbone: Backbone that the steps were made from, in evaluation mode.
        input_size: (C, H, W) of the images.

    Raises:
        PartitionError: The steps compute something else than the backbone.
    """
    weight = next(backbone.parameters())
    with default_mode(weight.device):
        count = 2 * math.prod(input_size)
        images = torch.arange(count, device=weight.device, dtype=torch.float32).sin().view(2, *input_size)
        images = images.to(weight.dtype)
        expected = backbone(images)
        whole = rest = steps[0](images)
        rest = tree_map(lambda t: t[1:].clone(), rest)  # copied, because a step may modify its input
        for step in steps[1:]:
            whole, rest = step(whole), step(rest)
    # the operations and their order are the same; kernels for GPUs or other batch sizes may sum in another order
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.1
    on_cpu = weight.device.type == 'cpu'
    for ours, theirs, exactly in ((whole, expected, on_cpu), (rest, expected[1:], False)):
        close = 0.0 if exactly else tolerance
        if ours.shape != theirs.shape:
            raise PartitionError(
                f'its stages in sequence return shape {list(ours.shape)}: expected {list(theirs.shape)}, as from the '
                f'backbone'
            )
        # relative to the spread of the logits, which is small where a classifier is new
        finite = theirs[theirs.isfinite()].float()
        spread = float(finite.std()) if len(finite) > 1 else 1.0
        if not torch.allclose(ours, theirs, rtol=close, atol=close * min(spread, 1.0), equal_nan=True):
            worst = (ours - theirs).abs().max().item()
            raise PartitionError(
                f'the output of its stages in sequence differs from that of the backbone by {worst:.1e}'
            )
