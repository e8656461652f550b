"""Detect hooks and replaced forwards, which a call of a module runs and calls of its children alone would skip."""

from typing import Optional, Sequence

import torch.nn as nn

__all__ = ['count_hooks', 'find_call_override']


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


def count_hooks(modules: Sequence[nn.Module]) -> int:
    """Count the forward hooks and replaced forwards of modules, their children not included."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ('forward' in m.__dict__) for m in modules)
