"""Exchange weights between a plain backbone and its multi-exit network."""

import hashlib
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Dict, Tuple, Union

import torch
import torch.nn as nn
from timm.models import load_state_dict

from .._timm import filter_checkpoint
from ..errors import one_line
from .multi_exit import MultiExitModel

__all__ = ['drop_unfit_classifiers', 'fit_weights', 'load_backbone', 'read_weights', 'weights_digest']

_logger = logging.getLogger(__name__)

_PREFIX = 'backbone.'


def load_backbone(
    model: nn.Module, source: Union[str, Path, Dict[str, torch.Tensor]], *, use_ema: bool = False
) -> None:
    """Load the weights of a backbone, including its classifier, into a multi-exit network or a plain timm model.

    Weights for another image size are resampled with timm's filter. The heads of the exits stay as they are; a network
    with its heads is loaded with ``timm.create_model(name, checkpoint_path=...)`` or `from_pretrained`.

    Args:
        model: A multi-exit network with a backbone, or a plain timm model.
        source: Checkpoint file of either kind of network, read without running code in it; or weights by name.
        use_ema: Whether to take the averaged weights of a checkpoint that has them; default False.

    Raises:
        ValueError: The file cannot be read as weights, or the weights do not fit the backbone.

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
            source = read_weights(source, use_ema=use_ema)
        except Exception as e:  # damaged files raise errors of any type
            raise ValueError(f'{str(source)!r} cannot be read as weights: {one_line(e)}') from e
    of_backbone, others = _split(source)
    heads = sum(name.startswith('heads.') for name in others)
    if of_backbone and heads and isinstance(model, MultiExitModel) and model.num_exits > 1:
        _logger.warning(
            f'load_backbone left {heads} weights of exit heads out, so the heads stay as they are; to load them too, '
            f'use timm.create_model(name, checkpoint_path=...), from_pretrained or load_state_dict.'
        )
    source = of_backbone or source
    backbone = model.get_submodule('backbone') if isinstance(model, MultiExitModel) else model
    try:
        own = backbone.state_dict()
        if any(name in own and own[name].shape != t.shape for name, t in source.items()):
            source = filter_checkpoint(source, backbone)
        backbone.load_state_dict(source)
    except RuntimeError as e:
        raise ValueError(f'the weights do not fit the backbone: {one_line(e)}') from None


def read_weights(path: Union[str, Path], use_ema: bool = False) -> Dict[str, torch.Tensor]:
    """Read weights from a checkpoint file of any kind that timm reads, without running code in it.

    Args:
        path: Path of the file.
        use_ema: Whether to take the averaged weights of a checkpoint that has them; default False.

    Raises:
        ValueError: The file is damaged, of another kind, or holds more than tensors and plain values.
    """
    try:
        state_dict: Dict[str, torch.Tensor] = load_state_dict(str(path), use_ema=use_ema)
    except (pickle.UnpicklingError, RuntimeError) as e:
        if not isinstance(e.__cause__ or e, pickle.UnpicklingError):
            raise
        raise ValueError(  # PyTorch's own message says how to load the file unsafely
            'expected a file of weights, got one that is damaged, of another kind, or that holds more than tensors and '
            'plain values; download it again, or save its state_dict alone.'
        ) from None
    return state_dict


def fit_weights(state_dict: Dict[str, torch.Tensor], model: MultiExitModel) -> Dict[str, torch.Tensor]:
    """Adapt weights for another image size or number of classes to a multi-exit network.

    The weights of the backbone pass through timm's filter for its family, which resamples those that depend on the
    image size.

    Args:
        state_dict: Weights of a multi-exit network of the same architecture, by name.
        model: Network that loads them.

    Returns:
        Weights that fit `model`, by name; classifiers for another number of classes are left out.
    """
    if hasattr(model, 'backbone'):
        backbone, others = _split(state_dict)
        backbone = filter_checkpoint(backbone, model.get_submodule('backbone'), source=model)
        state_dict = {**{f'{_PREFIX}{name}': t for name, t in backbone.items()}, **others}
    return drop_unfit_classifiers(state_dict, model)


def _split(state_dict: Dict[str, torch.Tensor]) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Split weights into those of the backbone, by their names in the backbone, and the others."""
    backbone = {name.removeprefix(_PREFIX): t for name, t in state_dict.items() if name.startswith(_PREFIX)}
    return backbone, {name: t for name, t in state_dict.items() if not name.startswith(_PREFIX)}


def drop_unfit_classifiers(state_dict: Dict[str, torch.Tensor], model: MultiExitModel) -> Dict[str, torch.Tensor]:
    """Leave out the classifiers of exits for another number of classes, as timm does for the backbone's classifier.

    Args:
        state_dict: Weights by name.
        model: Network that loads them.
    """
    fit = model.state_dict()
    return {
        name: t
        for name, t in state_dict.items()
        if not re.match(r'heads\.\d+\.fc\.', name) or (name in fit and fit[name].shape == t.shape)
    }


def weights_digest(model: nn.Module) -> str:
    """Compute a digest of a network.

    It covers the exits and heads, and names, types, shapes and values of all parameters and buffers in the state dict.

    Args:
        model: Any network.

    Returns:
        ``sha256:`` and 64 hexadecimal digits.
    """
    arguments = json.dumps(getattr(model, 'exit_args', {}), sort_keys=True, default=str)
    digest = hashlib.sha256(arguments.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f'sha256:{digest.hexdigest()}'
