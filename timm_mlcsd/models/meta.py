"""Run part of a network on shapes alone: no memory for weights, no arithmetic."""

from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['call_on_meta']


class _Call(nn.Module):
    """Makes any method of a module the forward that ``functional_call`` can run."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args):
        return getattr(self.module, self.method)(*args)


def call_on_meta(module: nn.Module, method: str, *args: Any) -> Any:
    """Call ``module.method(*args)`` in evaluation mode with every weight and tensor argument on the meta device.

    The module itself, its device, its mode and its buffers stay as they are; its hooks fire.

    Returns:
        What the method returns, tensors on the meta device.
    """
    call = _Call(module, method)
    modes = [(m, m.training) for m in module.modules()]
    tensors = {name: t.detach().to('meta') for name, t in (*call.named_parameters(), *call.named_buffers())}
    args = tree_map(lambda a: a.to('meta') if isinstance(a, torch.Tensor) else a, args)
    module.eval()
    try:
        with torch.no_grad():
            return torch.func.functional_call(call, tensors, args)
    finally:
        for m, training in modes:
            m.training = training
