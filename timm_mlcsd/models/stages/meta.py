"""Run methods of a network on the meta device: shapes only, without memory for weights or arithmetic."""

import contextlib
from typing import Any, Dict, Iterator

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

__all__ = ['MetaRunner', 'eval_mode']


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode, and restore the mode of every submodule afterwards."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


class _MethodAsForward(nn.Module):
    """Expose a method of a module as forward, which is all that ``functional_call`` can run."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.method)(*args)


class MetaRunner:
    """Run methods of a module in evaluation mode, with weights and tensor arguments on the meta device.

    Device, mode and buffers of the module stay unchanged; its hooks run.

    Args:
        module: Module to run.

    Attributes:
        tensors: Meta tensors that replace the parameters and buffers, by name.

    Examples:
        ```python
        logits = MetaRunner(model)('forward_features', torch.empty(1, 3, 224, 224))
        ```
    """

    def __init__(self, module: nn.Module):
        self.module = module
        # one entry per owner of a tensor: functional_call's own handling of ties restores a module that two others
        # share (CoaT) incorrectly
        copies: Dict[torch.Tensor, torch.Tensor] = {}
        self.tensors: Dict[str, torch.Tensor] = {}
        for path, owner in module.named_modules():
            for name, t in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
                if t not in copies:
                    copies[t] = t.detach().to('meta')
                self.tensors[f'{path}.{name}' if path else name] = copies[t]

    def __call__(self, method: str, *args: Any) -> Any:
        """Run a method.

        Args:
            method: Name of the method.
            *args: Arguments of the method; tensors are moved to the meta device.

        Returns:
            Result of the method, with tensors on the meta device.
        """
        args = tree_map(lambda a: a.to('meta') if isinstance(a, torch.Tensor) else a, args)
        with torch.no_grad(), eval_mode(self.module):
            tensors = {f'module.{name}': t for name, t in self.tensors.items()}
            return torch.func.functional_call(_MethodAsForward(self.module, method), tensors, args, tie_weights=False)
