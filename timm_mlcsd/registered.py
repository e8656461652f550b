"""Attributes of the networks that timm's registry creates, which type checkers do not find in an ``nn.Module``."""

from typing import Any, Dict, Protocol, Sequence, Tuple, Union

import torch.nn as nn

__all__ = ['RegisteredModel', 'registered']


class RegisteredModel(Protocol):
    """Attributes of a registered multi-exit network beside those of `timm_mlcsd.models.MultiExitModel`.

    Attributes:
        pretrained_cfg: timm's configuration of the weights, by name.
        default_cfg: The same dictionary under timm's other name.
        probe_size: Default size of an image, (C, H, W).
        exit_args: Arguments of the exits that create the network again, by name.
        heads: Heads of the exits.
        in_chans: Number of image channels.
    """

    pretrained_cfg: Dict[str, Any]
    default_cfg: Dict[str, Any]
    probe_size: Tuple[int, ...]
    exit_args: Dict[str, Any]
    heads: nn.ModuleList
    in_chans: int

    def get_classifier(self) -> Union[nn.Module, Sequence[nn.Module]]:
        """Classifier of the last exit, or several."""

    def check_input_size(self, height: int, width: int) -> None:
        """Check that images of this size are large enough for the network."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch the recomputation of activations in the backward pass on or off."""


def registered(model: nn.Module) -> RegisteredModel:
    """The same network, with the type of its registered attributes."""
    return model  # type: ignore[return-value]  # nn.Module declares all others as tensors or modules
