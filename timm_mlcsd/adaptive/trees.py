"""Nested tuples of tensors, as the states between two stages are; faster than PyTorch's pytree utilities."""

from typing import Any, Callable, List, Sequence

import torch

__all__ = ['concatenate', 'map_tensors', 'tensors_of']


def map_tensors(tree: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to all tensors of a tree; None stays."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    return tree if tree is None else tuple(map_tensors(t, function) for t in tree)


def tensors_of(tree: Any) -> List[torch.Tensor]:
    """List all tensors of a tree."""
    found: List[torch.Tensor] = []
    map_tensors(tree, lambda t: found.append(t) or t)  # type: ignore[func-returns-value]
    return found


def concatenate(trees: Sequence[Any]) -> Any:
    """Concatenate trees of the same structure, tensor by tensor, along the batch dimension."""
    if isinstance(trees[0], torch.Tensor):
        return torch.cat(list(trees))
    return None if trees[0] is None else tuple(concatenate(parts) for parts in zip(*trees))
