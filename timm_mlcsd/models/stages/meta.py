"""Run part of a network on shapes alone: no memory for weights, no arithmetic."""

import contextlib
from typing import Any, Dict, Iterator

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['MetaRunner', 'eval_mode']


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every submodule's own mode again afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


class _Call(nn.Module):
    """Makes any method of a module the forward that ``functional_call`` can run."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args):
        return getattr(self.module, self.method)(*args)


class MetaRunner:
    """A module whose methods run in evaluation mode with all weights and tensor arguments on the meta device.

    The module itself, its device, its mode and its buffers stay as they are; its hooks fire.

    Args:
        module: The module.

    Attributes:
        tensors: The meta tensors that stand for its parameters and buffers, by name.

    Examples:
        ```python
        logits = MetaRunner(model)('forward_features', torch.empty(1, 3, 224, 224))
        ```
    """

    def __init__(self, module: nn.Module):
        self.module = module
        # every place that holds a tensor once: functional_call's own search for ties restores a module that is shared
        # by two others (CoaT) wrongly
        copies: Dict[torch.Tensor, torch.Tensor] = {}
        self.tensors: Dict[str, torch.Tensor] = {}
        for path, owner in module.named_modules():
            for name, t in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                if t not in copies:
                    copies[t] = t.detach().to('meta')
                self.tensors[f'{path}.{name}' if path else name] = copies[t]

    def __call__(self, method: str, *args: Any) -> Any:
        args = tree_map(lambda a: a.to('meta') if isinstance(a, torch.Tensor) else a, args)
        with torch.no_grad(), eval_mode(self.module):
            tensors = {f'module.{name}': t for name, t in self.tensors.items()}
            return torch.func.functional_call(_Call(self.module, method), tensors, args, tie_weights=False)
