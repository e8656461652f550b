"""Checks of stored networks: architecture, arguments, preprocessing, class names and weights from a file."""

import contextlib
import dataclasses
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch.nn.modules.module import register_module_parameter_registration_hook

from ._timm import get_global_pool
from .data import IMAGE_MODE
from .errors import one_line
from .models import MultiExitModel, create_model
from .stored_entries import (
    MAX_NUMBER,
    MAX_SIDE,
    MAX_TEXT,
    check_data_config,
    check_plain_value,
    class_list,
    short_repr,
)

__all__ = [
    'check_config',
    'check_model_source',
    'check_values',
    'is_network_argument',
    'missing_weights',
]

Shapes = Dict[str, Tuple[int, ...]]

_DATA_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode', IMAGE_MODE)
# arguments of timm.create_model that do not describe the network: source of the weights, device and mode of running
_NOT_NETWORK_ARGUMENTS = (
    'backbone',
    'cache_dir',
    'checkpoint_path',
    'custom_load',
    'device',
    'dtype',
    'exportable',
    'feature_cfg',
    'feature_cls',
    'features_only',
    'file',
    'hf_hub_filename',
    'hf_hub_id',
    'kwargs_filter',
    'model_cfg',
    'model_name',
    'no_jit',
    'out_indices',
    'pruned',
    'scriptable',
    'source',
    'state_dict',
    'url',
    'variant',
)
# entries of a pretrained_cfg that name a source of weights, or how to read another format
_WEIGHT_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load', 'label_offset')


def check_model_source(
    architecture: Any, model_args: Any, data_config: Any = None, shapes: Optional[Shapes] = None
) -> None:
    """Check an untrusted description of a network before the network is created.

    Guarantees: `architecture` is a registered ``mlcsd_*`` name, not a URL or path. `model_args` are plain values
    within bounds, and none of them names a file, a URL, weights or a device. `data_config` has known entries within
    bounds, so images are resized to at most 4096 pixels a side. With `shapes`, the described network has exactly these
    weights; it is created on the meta device, and its creation stops if it gets many more parameters than expected.
    Without `shapes`, creating the network may take much memory.

    Args:
        architecture: Registered name of the architecture.
        model_args: Arguments of the architecture by name.
        data_config: Preprocessing by name, as returned by timm's ``resolve_data_config``; None to skip the check.
        shapes: Shapes of the stored weights by name; None to skip the check.

    Raises:
        ValueError: A check failed; the message names the entry.
    """
    _check_arguments(architecture, model_args)
    if data_config is not None:
        check_data_config(data_config)
        unknown = sorted(set(data_config) - set(_DATA_KEYS))
        if unknown:
            raise ValueError(
                f'data_config has unknown entries: {short_repr(unknown)}; expected {", ".join(_DATA_KEYS)}.'
            )
        _check_channels(model_args, data_config)
    if shapes is not None:
        _check_weights(architecture, model_args, shapes)
    if data_config is not None:
        missing = sorted({'input_size', 'interpolation', 'mean', 'std', 'crop_pct'} - set(data_config))
        if missing:
            raise ValueError(f'data_config lacks {", ".join(missing)}; expected them for the preprocessing of images.')


def check_config(config: Any, shapes: Shapes) -> MultiExitModel:
    """Check an untrusted ``config.json`` against the weights in its folder.

    Guarantees those of `check_model_source`, and that all numbers of classes agree, the class names fit, and the
    config names no other source of weights.

    Args:
        config: Content of the file.
        shapes: Shapes of the stored weights by name.

    Returns:
        The described network, on the meta device.

    Raises:
        ValueError: A check failed; the message names the entry.
    """
    if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg'), dict):
        raise ValueError('it is not the config of a multi-exit network; expected architecture and pretrained_cfg.')
    architecture, model_args, cfg = config.get('architecture'), config.get('model_args', {}), config['pretrained_cfg']
    _check_arguments(architecture, model_args)
    unknown = sorted(set(cfg) - {field.name for field in dataclasses.fields(PretrainedCfg)})
    if unknown:
        raise ValueError(f'pretrained_cfg has unknown entries: {short_repr(unknown)}.')
    for key in _WEIGHT_SOURCES:
        if cfg.get(key):
            raise ValueError(
                f'pretrained_cfg.{key}={short_repr(cfg[key])}: expected none; the weights are those beside the config.'
            )
    check_data_config({**cfg, IMAGE_MODE: config.get(IMAGE_MODE)}, 'pretrained_cfg')
    _check_channels(model_args, cfg)
    for key, known in (('architecture', architecture), ('fixed_input_size', None)):
        value = cfg.get(key)
        if value is not None and (value != known if known else not isinstance(value, bool)):
            raise ValueError(f'pretrained_cfg.{key}={short_repr(value)}: expected {known or "true or false"}.')
    entries = {
        'num_classes': config.get('num_classes'),
        'model_args.num_classes': model_args.get('num_classes'),
        'pretrained_cfg.num_classes': cfg.get('num_classes'),
    }
    numbers = {name: value for name, value in entries.items() if value is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f'{name}={short_repr(value)}: expected an integer from 0 to {MAX_NUMBER}.')
    if len(set(numbers.values())) != 1:
        given = ', '.join(f'{name}={value}' for name, value in numbers.items()) or 'none'
        raise ValueError(f'expected equal numbers of classes, got {given}.')
    num_classes = next(iter(numbers.values()))
    assert isinstance(architecture, str)  # see _check_arguments
    model = _check_weights(architecture, {'num_classes': num_classes, **model_args}, shapes, cfg)
    _check_module_names(architecture, cfg, model)
    _check_pool(config, model)
    class_list(config.get('label_names', cfg.get('label_names')), num_classes)
    return model


def check_values(tensors: Mapping[str, torch.Tensor], model: MultiExitModel) -> None:
    """Check types and values of stored weights, because loading would cast them silently and accept NaN.

    Args:
        tensors: Stored weights by name.
        model: Network for the weights.

    Raises:
        ValueError: A weight has another kind of type than in the network, or is not finite.
    """
    for name, expected in model.state_dict().items():
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.is_floating_point() != expected.is_floating_point() or stored.is_complex():
            raise ValueError(f'the weight {short_repr(name)} is of type {stored.dtype}; expected {expected.dtype}.')
        if stored.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f'the weight {short_repr(name)} has values that are not finite; train the network again.')


def is_network_argument(name: str) -> bool:
    """Whether an argument of ``timm.create_model`` describes the network, not the source of weights or the device."""
    return name not in _NOT_NETWORK_ARGUMENTS and (name == 'pretrained_backbone' or not name.startswith('pretrained'))


def missing_weights(model: MultiExitModel, shapes: Shapes) -> List[str]:
    """List the weights of a network that a file does not have, without those of the classifiers.

    Args:
        model: Network.
        shapes: Shapes of the stored weights by name.

    Returns:
        Names of the missing weights.
    """
    exit_classifiers = tuple(f'heads.{k}.fc.' for k in range(model.num_exits))
    classifiers = exit_classifiers + tuple(f'{name}.' for name in _classifier_names(model))
    return [name for name in model.state_dict() if name not in shapes and not name.startswith(classifiers)]


def _check_arguments(architecture: Any, model_args: Any) -> None:
    if not isinstance(architecture, str) or architecture not in timm.list_models('mlcsd_*'):
        raise ValueError(
            f'architecture {short_repr(architecture)}: expected a registered name that begins with mlcsd_.'
        )
    if not isinstance(model_args, dict) or not all(isinstance(key, str) for key in model_args):
        raise ValueError('model_args: expected arguments by name.')
    if model_args.get('pretrained_backbone') not in (None, False):
        raise ValueError(
            f'model_args.pretrained_backbone={short_repr(model_args["pretrained_backbone"])}: expected false; the '
            f'stored weights contain those of the backbone.'
        )
    for key, value in model_args.items():
        if not is_network_argument(key):
            raise ValueError(
                f'model_args.{short_repr(key)[1:-1]}: a stored network cannot have this argument; remove it.'
            )
        check_plain_value(value, f'model_args.{short_repr(key)[1:-1]}')
        if key.startswith('drop') and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f'model_args.{short_repr(key)[1:-1]}={value}: expected a rate from 0 to below 1.')
    sizes = model_args.get('img_size')
    for side in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
        if side is not None and not (isinstance(side, int) and 1 <= side <= MAX_SIDE):
            raise ValueError(f'model_args.img_size={short_repr(sizes)}: expected sides from 1 to {MAX_SIDE}.')


def _check_channels(model_args: Dict[str, Any], config: Dict[str, Any]) -> None:
    channels, size = model_args.get('in_chans'), config.get('input_size')
    if channels is not None and size is not None and channels != size[0]:
        raise ValueError(f'input_size has {size[0]} channels; expected model_args.in_chans, {short_repr(channels)}.')


def _check_pool(config: Dict[str, Any], model: MultiExitModel) -> None:
    pool, stored = get_global_pool(getattr(model, 'backbone', model)), config.get('global_pool')
    if pool is not None and stored is not None and stored != pool:
        raise ValueError(f'global_pool={short_repr(stored)}: expected {pool!r}, as model_args creates the network.')


def _check_weights(
    architecture: str, model_args: Dict[str, Any], shapes: Shapes, cfg: Optional[Dict[str, Any]] = None
) -> MultiExitModel:
    """Create the network on the meta device; raise a ValueError if its weights do not have these names and shapes."""
    # some parameters are replaced after their creation, those of classifiers for example
    with torch.device('meta'), _limit_parameters(4 * len(shapes) + 1000):
        try:
            model = create_model(architecture, **model_args, **(dict(pretrained_cfg=dict(cfg)) if cfg else {}))
        except ValueError:
            raise
        except Exception as e:  # wrong arguments can cause any error
            raise ValueError(f'{architecture} cannot be created with these arguments: {one_line(e)}') from e
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    differences = {
        'missing': [name for name in expected if name not in shapes],
        'unexpected': [name for name in shapes if name not in expected],
        'of another shape': [name for name in expected if name in shapes and expected[name] != tuple(shapes[name])],
    }
    if any(differences.values()):
        found = '; '.join(
            f'{kind}: {short_repr(names[:3])}, {len(names)} in all' for kind, names in differences.items() if names
        )
        raise ValueError(f'the weights are not those of {architecture} with these arguments ({found}).')
    return model


@contextlib.contextmanager
def _limit_parameters(limit: int) -> Iterator[None]:
    """Raise a ValueError if this thread registers more than `limit` parameters in the block."""
    thread, left = threading.get_ident(), limit

    def count(*_: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise ValueError('the arguments describe a network with many more layers than there are weights for.')

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_module_names(architecture: str, cfg: Dict[str, Any], model: MultiExitModel) -> None:
    """Check the entries that name modules, because timm skips or adapts the weights of these modules."""
    registered = get_pretrained_cfg(architecture)
    for key in ('classifier', 'first_conv'):
        known = _as_names(getattr(registered, key))
        classifiers = tuple(_classifier_names(model)) if key == 'classifier' else ()
        for name in _as_names(cfg.get(key)):
            if name not in known and not any(name == c or name.startswith(f'{c}.') for c in classifiers):
                raise ValueError(f'pretrained_cfg.{key}={short_repr(cfg[key])}: expected {" or ".join(sorted(known))}.')


def _as_names(value: Any) -> Set[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {v if isinstance(v, str) else repr(v)[:MAX_TEXT] for v in values if v is not None}


def _classifier_names(model: MultiExitModel) -> List[str]:
    last = model.get_classifier()
    modules = [last] if isinstance(last, torch.nn.Module) else last
    return [name for name, module in model.named_modules() if any(module is m for m in modules)]
