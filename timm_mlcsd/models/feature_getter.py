"""What ``features_only=True`` makes of a multi-exit network."""

from timm.models._features import FeatureGetterNet

__all__ = ['FeatureGetter']


class FeatureGetter(FeatureGetterNet):
    """timm's, with gradient checkpointing, which timm gives to its other feature networks only."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping what is inside them."""
        getattr(self.model, 'backbone', self.model).set_grad_checkpointing(enable)
