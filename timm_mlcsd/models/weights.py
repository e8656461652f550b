"""Weights that go from a plain backbone to its multi-exit network and back."""

import hashlib
import json
import re
from pathlib import Path
from typing import Dict, Tuple, Union

import torch
import torch.nn as nn
from timm.models import load_state_dict

from .._timm import filter_checkpoint
from ..errors import one_line
from .multi_exit import MultiExitModel

__all__ = ['drop_unfit_classifiers', 'fit_weights', 'load_backbone', 'weights_digest']

_PREFIX = 'backbone.'


def load_backbone(model: nn.Module, source: Union[str, Path, Dict[str, torch.Tensor]]) -> None:
    """Load a backbone's weights, its classifier included, from and into either kind of network.

    Weights that were made for another image size are resampled as timm does it.

    Args:
        model: A multi-exit network, or the plain timm model.
        source: A checkpoint file of either kind (read without running code in it), or its weights by name.

    Raises:
        ValueError: The file holds no weights, or they are another network's.

    Examples:
        ```python
        load_backbone(timm.create_model('mlcsd_resnet50'), 'resnet50.safetensors')
        load_backbone(timm.create_model('resnet50'), 'output/train/run/model_best.pth.tar')
        ```
    """
    if isinstance(model, MultiExitModel) and not hasattr(model, 'backbone'):
        raise ValueError(f'{type(model).__name__} has no backbone to load; use its load_state_dict.')
    if not isinstance(source, dict):
        try:
            source = load_state_dict(str(source))
        except Exception as e:  # unpickling fails in as many ways as there are files
            raise ValueError(f'{str(source)!r} cannot be read as weights: {one_line(e)}') from e
    source = _split(source)[0] or source
    backbone = model.backbone if isinstance(model, MultiExitModel) else model
    try:
        own = backbone.state_dict()
        if any(name in own and own[name].shape != t.shape for name, t in source.items()):
            source = filter_checkpoint(source, backbone)
        backbone.load_state_dict(source)
    except RuntimeError as e:
        raise ValueError(f'these are weights of another network than the backbone: {one_line(e)}') from None


def fit_weights(state_dict: Dict[str, torch.Tensor], model: MultiExitModel) -> Dict[str, torch.Tensor]:
    """What a multi-exit network can load of weights that were made for another image size or number of classes.

    The backbone's go through timm's filter for its family, which resamples what depends on the image size.
    """
    if hasattr(model, 'backbone'):
        backbone, others = _split(state_dict)
        backbone = filter_checkpoint(backbone, model.backbone, source=model)
        state_dict = {**{f'{_PREFIX}{name}': t for name, t in backbone.items()}, **others}
    return drop_unfit_classifiers(state_dict, model)


def _split(state_dict: Dict[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """The backbone's weights under its own names, and the others."""
    backbone = {name.removeprefix(_PREFIX): t for name, t in state_dict.items() if name.startswith(_PREFIX)}
    return backbone, {name: t for name, t in state_dict.items() if not name.startswith(_PREFIX)}


def drop_unfit_classifiers(state_dict: Dict[str, torch.Tensor], model: MultiExitModel) -> Dict[str, torch.Tensor]:
    """For another number of classes, leave out the exits' classifiers, as timm does with the backbone's."""
    fit = model.state_dict()
    return {
        name: t
        for name, t in state_dict.items()
        if not re.match(r'heads\.\d+\.fc\.', name) or (name in fit and fit[name].shape == t.shape)
    }


def weights_digest(model: nn.Module) -> str:
    """A digest of a network: its exits and heads, and names, types, shapes and values of its parameters and buffers.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    arguments = json.dumps(getattr(model, 'exit_args', {}), sort_keys=True, default=str)
    digest = hashlib.sha256(arguments.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f'sha256:{digest.hexdigest()}'
