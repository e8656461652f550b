"""What hangs on a module and acts when it is called, so that calling its children in its place is not the same."""

from typing import Optional, Sequence

import torch.nn as nn

__all__ = ['count_hooks', 'what_hangs_on']


def what_hangs_on(module: nn.Module) -> Optional[str]:
    """What acts when `module` is called, its own class's forward aside; None where there is nothing."""
    if module._forward_pre_hooks or module._forward_hooks:
        return 'forward hooks'
    if module._backward_pre_hooks or module._backward_hooks:
        return 'backward hooks'
    if 'forward' in module.__dict__ or 'forward_features' in module.__dict__:
        return 'another forward or forward_features than its class'
    return None


def count_hooks(modules: Sequence[nn.Module]) -> int:
    """How many forward hooks and replaced forwards the modules have."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ('forward' in m.__dict__) for m in modules)
