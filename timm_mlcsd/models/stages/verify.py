"""Compare stages that run one by one with the backbone that they were made of."""

import contextlib
import math
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['PartitionError', 'plainly', 'verify']


class PartitionError(ValueError):
    """Why a backbone cannot be run in stages."""


@contextlib.contextmanager
def plainly(device: torch.device) -> Iterator[None]:
    """No gradients, nothing of the caller's modes, and the caller's random state afterwards."""
    on_gpu = [device] if device.type == 'cuda' else []
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(on_gpu),
    ):
        yield


def verify(steps: Sequence[Callable[[Any], Any]], backbone: nn.Module, input_size: Sequence[int]) -> None:
    """Run steps in a row and compare with the backbone, then again with an image leaving after the first step.

    Args:
        steps: Each takes what the one before returned: the first images [B, C, H, W], the last returns logits.
        backbone: The backbone in evaluation mode that they come from.
        input_size: (C, H, W) of the images.

    Raises:
        PartitionError: They compute something else.
    """
    weight = next(backbone.parameters())
    with plainly(weight.device):
        count = 2 * math.prod(input_size)
        images = torch.arange(count, device=weight.device, dtype=torch.float32).sin().view(2, *input_size)
        images = images.to(weight.dtype)
        expected = backbone(images)
        whole = rest = steps[0](images)
        rest = tree_map(lambda t: t[1:].clone(), rest)  # its own: a step may write to its input
        for step in steps[1:]:
            whole, rest = step(whole), step(rest)
    # the same operations in the same order; only GPU kernels, and kernels for another batch, sum in another one
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 0.1
    on_cpu = weight.device.type == 'cpu'
    for ours, theirs, exactly in ((whole, expected, on_cpu), (rest, expected[1:], False)):
        close = 0.0 if exactly else tolerance
        if ours.shape != theirs.shape:
            raise PartitionError(f'its stages in a row give {list(ours.shape)}, the whole {list(theirs.shape)}')
        if not torch.allclose(ours, theirs, rtol=close, atol=close, equal_nan=True):
            worst = (ours - theirs).abs().max().item()
            raise PartitionError(f'its stages in a row differ from the whole by {worst:.1e}')
