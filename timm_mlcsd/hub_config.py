"""The ``config.json`` of a saved network, in timm's format."""

import json
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

from ._timm import get_global_pool, save_config_for_hf
from .data import IMAGE_MODE
from .errors import one_line
from .file_checks import read_json
from .models import MultiExitModel, find_hooked
from .stored import check_config, is_network_argument

__all__ = ['write_config']


def write_config(
    model: MultiExitModel,
    path: Path,
    names: Optional[Sequence[Optional[str]]],
    data_config: Dict[str, Any],
    tensors: Dict[str, torch.Tensor],
) -> None:
    """Write the config of a network, and check that it describes the same network.

    Args:
        model: Registered multi-exit network.
        path: Path of the file.
        names: Class names, [C], None for a class without a name; None for no names at all.
        data_config: Preprocessing by name, as returned by timm's ``resolve_data_config``.
        tensors: Weights of the network by name.

    Raises:
        ValueError: The config would not create the same network again.
    """
    # arguments of a backbone that was created before; its pretrained weights are part of the stored ones
    backbone = getattr(model, 'backbone', model)
    exit_args = model.exit_args
    model_args = {**_creation_args(backbone), **_creation_args(model), **exit_args, 'pretrained_backbone': False}
    pool = get_global_pool(backbone)
    if isinstance(pool, str):
        model_args['global_pool'] = pool  # may have changed since creation
    save_config_for_hf(model, str(path), model_args=model_args, data_config=data_config)
    config = read_json(path)
    # timm stores all arguments of create_model
    config['model_args'] = {key: value for key, value in config['model_args'].items() if is_network_argument(key)}
    for key in ('label_names', 'label_descriptions', IMAGE_MODE):
        config['pretrained_cfg'].pop(key, None)
    if data_config.get(IMAGE_MODE):
        config[IMAGE_MODE] = data_config[IMAGE_MODE]
    if names is not None:
        with_gaps = {str(index): name for index, name in enumerate(names) if name is not None}
        config['label_names'] = with_gaps if None in names else list(names)
    try:
        created = check_config(config, {name: tuple(t.shape) for name, t in tensors.items()})
        _check_same_modules(model, created)
    except ValueError as e:
        raise ValueError(f'the network cannot be saved so that it loads again: {one_line(e)}') from e
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _check_same_modules(model: MultiExitModel, created: MultiExitModel) -> None:
    """Raise a ValueError if a network has other modules than its arguments create, or hooks, which are not stored."""
    expected_kinds = {name: type(module).__name__ for name, module in created.named_modules()}
    for name, module in model.named_modules():
        kind, expected = type(module).__name__, expected_kinds.get(name)
        if kind != expected and not ('BatchNorm' in kind and 'BatchNorm' in str(expected)):
            raise ValueError(f'its module {name!r} is a {kind}, but would be loaded as {expected}')
    hooked = find_hooked(model)
    if hooked is not None:
        raise ValueError(f'its module {hooked!r} has forward hooks, which cannot be stored')


def _creation_args(model: torch.nn.Module) -> Dict[str, Any]:
    """Arguments that timm recorded when it created a model, without the number of classes, which may have changed."""
    args = getattr(model, '_model_args', {}).items()
    return {key: value for key, value in args if key != 'num_classes' and is_network_argument(key)}
