"""Detect hooks and replaced forwards, which a call of a module runs and calls of its children alone would skip."""

from typing import Any, List, Optional, Tuple

import torch.nn as nn
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

__all__ = ['ModuleState', 'find_call_override', 'find_training']

# modules that compute something else in training mode; any new module is in that mode
_OTHER_IN_TRAINING = (_BatchNorm, _DropoutNd, DropBlock2d, DropPath, PatchDropout)


def find_call_override(module: nn.Module) -> Optional[str]:
    """Describe what a call of a module runs beyond its class's forward.

    Args:
        module: Module to inspect; its children are not inspected.

    Returns:
        Description for an error message; None if a call runs the class's forward and nothing else.
    """
    if module._forward_pre_hooks or module._forward_hooks:
        return 'forward hooks'
    if module._backward_pre_hooks or module._backward_hooks:
        return 'backward hooks'
    if 'forward' in module.__dict__ or 'forward_features' in module.__dict__:
        return 'a replaced forward or forward_features'
    return None


def find_training(backbone: nn.Module) -> Optional[str]:
    """Name a module that is in training mode and computes something else in it; None if there is none."""
    modules = backbone.named_modules()
    return next((name for name, m in modules if m.training and isinstance(m, _OTHER_IN_TRAINING)), None)


class ModuleState:
    """The class, children, hooks, numbers, texts and functions of a module at the time when this was made.

    Args:
        module: Module to watch; the children of its children are not watched.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.children = [*module._modules.values()]
        self.calls = self._calls()
        self.names = [name for name, value in vars(module).items() if _is_setting(value) and name != 'training']
        self.values = self._values()

    def _calls(self) -> Tuple[Any, ...]:
        """The class, the forward hooks, and the forward of the instance if it has one."""
        module = self.module
        hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
        return type(module), hooks, module.__dict__.get('forward')

    def _values(self) -> List[Any]:
        return [self.module.__dict__.get(name) for name in self.names]

    def is_current(self) -> bool:
        """Whether all of it is still the same."""
        children = [*self.module._modules.values()]
        try:
            return children == self.children and self._calls() == self.calls and self._values() == self.values
        except (RuntimeError, ValueError):  # a number was replaced by a tensor or an array of several
            return False


def _is_setting(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return all(part is None or callable(part) or isinstance(part, (bool, int, float, str)) for part in parts)
