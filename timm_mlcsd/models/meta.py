"""Run part of a network on shapes alone: no memory for weights, no arithmetic."""

from typing import Any, Dict

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['OnMeta']


class _Call(nn.Module):
    """Makes any method of a module the forward that ``functional_call`` can run."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args):
        return getattr(self.module, self.method)(*args)


class OnMeta:
    """A module whose methods run in evaluation mode with all weights and tensor arguments on the meta device.

    The module itself, its device, its mode and its buffers stay as they are; its hooks fire.

    Args:
        module: The module.

    Attributes:
        tensors: The meta tensors that stand for its parameters and buffers, by name.

    Examples:
        ```python
        logits = OnMeta(model)('forward_features', torch.empty(1, 3, 224, 224))
        ```
    """

    def __init__(self, module: nn.Module):
        self.module = module
        named = (*module.named_parameters(), *module.named_buffers())
        self.tensors: Dict[str, torch.Tensor] = {name: t.detach().to('meta') for name, t in named}

    def __call__(self, method: str, *args: Any) -> Any:
        args = tree_map(lambda a: a.to('meta') if isinstance(a, torch.Tensor) else a, args)
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        try:
            with torch.no_grad():
                tensors = {f'module.{name}': t for name, t in self.tensors.items()}
                return torch.func.functional_call(_Call(self.module, method), tensors, args)
        finally:
            for m, training in modes:
                m.training = training
