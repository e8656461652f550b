"""What ``features_only=True`` makes of a multi-exit network."""

from typing import Any

import torch.nn as nn

from .._timm import FeatureGetterNet

__all__ = ['FeatureGetter']


class FeatureGetter(FeatureGetterNet):
    """timm's, with gradient checkpointing, which timm gives to its other feature networks only.

    Args:
        model: A multi-exit network; a wrapped backbone is kept as it is, not pruned.
        **kwargs: As for timm's.
    """

    def __init__(self, model: nn.Module, **kwargs: Any):
        super().__init__(model, **{**kwargs, 'prune': kwargs.get('prune', True) and not hasattr(model, 'backbone')})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what is inside them."""
        getattr(self.model, 'backbone', self.model).set_grad_checkpointing(enable)
