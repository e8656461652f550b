"""Feature extractor that ``features_only=True`` makes from a multi-exit network."""

from typing import Any

import torch.nn as nn

from .._timm import FeatureGetterNet

__all__ = ['FeatureGetter']


class FeatureGetter(FeatureGetterNet):
    """timm's ``FeatureGetterNet`` with ``set_grad_checkpointing``, which timm adds to its other feature networks only.

    Args:
        model: A multi-exit network; a wrapped backbone is not pruned.
        **kwargs: Arguments of ``FeatureGetterNet``.
    """

    def __init__(self, model: nn.Module, **kwargs: Any):
        super().__init__(model, **{**kwargs, 'prune': kwargs.get('prune', True) and not hasattr(model, 'backbone')})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        model: Any = getattr(self.model, 'backbone', self.model)
        model.set_grad_checkpointing(enable)
