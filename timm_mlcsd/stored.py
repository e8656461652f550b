"""What a file may say of a network: its name, its arguments, its preprocessing and the names of its classes."""

import contextlib
import dataclasses
import math
import threading
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

import timm
import torch
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch.nn.modules.module import register_module_parameter_registration_hook

from .data import IMAGE_MODE, IMAGE_MODES
from .errors import one_line, printable
from .models import MultiExitModel, create_named

__all__ = [
    'check_config',
    'check_data_config',
    'check_model_source',
    'check_values',
    'class_list',
    'is_network_argument',
    'missing_weights',
]

Shapes = Dict[str, Tuple[int, ...]]

# four times the largest image size of timm's networks; what an image is resized to is bounded by it too
MAX_SIDE = 4096
# timm's networks have 0.875 to 1.15
CROP_PCT = (0.1, 2.0)
# timm's means and standard deviations are of pixels from 0 to 1
STATISTICS = (1e-6, 1e6)
INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')
CROP_MODES = ('center', 'squash', 'border')
# no width, depth or number of classes of timm's networks comes near it
MAX_NUMBER = 1_000_000
MAX_TEXT = 1000
MAX_DEPTH = 8

_DATA_KEYS = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode', IMAGE_MODE)
# what timm's factory takes beside a network's own arguments: where weights lie, and how and where the network runs
_NOT_OF_A_NETWORK = (
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
# entries of a pretrained_cfg that say where weights lie, or how those of another format are read
_SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load', 'label_offset')


def check_model_source(
    architecture: Any, model_args: Any, data_config: Any = None, shapes: Optional[Shapes] = None
) -> None:
    """Refuse what a file says of a network, where that could do more than make a network of this package.

    What it guarantees: `architecture` is a registered ``mlcsd_*`` name, no address and no path. `model_args` are
    plain values within bounds, and none of them names a file, an address, weights or a device. The preprocessing in
    `data_config` has known entries within bounds: an image is resized to at most 4096 pixels a side. With `shapes`,
    the network that architecture and arguments make has exactly these weights; it is made without memory for them,
    and given up when it gets many more layers than that. Without `shapes`, making the network may still take much
    memory.

    Args:
        architecture: Registered name.
        model_args: Arguments by name.
        data_config: Preprocessing by name, as timm's ``resolve_data_config`` gives it; None where there is none.
        shapes: Shapes of the stored weights by name.

    Raises:
        ValueError: One of these does not hold; the message says which.
    """
    _check_arguments(architecture, model_args)
    if data_config is not None:
        check_data_config(data_config)
        unknown = sorted(set(data_config) - set(_DATA_KEYS))
        if unknown:
            raise ValueError(f'data_config has unknown entries: {_shown(unknown)}; expected {", ".join(_DATA_KEYS)}.')
        _check_channels(model_args, data_config)
    if shapes is not None:
        _check_weights(architecture, model_args, shapes)
    if data_config is not None:
        missing = sorted({'input_size', 'interpolation', 'mean', 'std', 'crop_pct'} - set(data_config))
        if missing:
            raise ValueError(f'data_config lacks {", ".join(missing)}, without which images cannot be prepared.')


def check_config(config: Any, shapes: Shapes) -> MultiExitModel:
    """Refuse a ``config.json`` that makes another network than its weights are of, or does more than make one.

    As `check_model_source`, and all numbers of classes agree, the class names fit, and the weights lie beside it.

    Args:
        config: Its content.
        shapes: Shapes of the weights beside it, by name.

    Returns:
        The network that it makes, on the meta device.

    Raises:
        ValueError: It does; the message says why.
    """
    if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg'), dict):
        raise ValueError('it is not the config of a multi-exit network: expected architecture and pretrained_cfg.')
    architecture, model_args, cfg = config.get('architecture'), config.get('model_args', {}), config['pretrained_cfg']
    _check_arguments(architecture, model_args)
    unknown = sorted(set(cfg) - {field.name for field in dataclasses.fields(PretrainedCfg)})
    if unknown:
        raise ValueError(f'pretrained_cfg has unknown entries: {_shown(unknown)}.')
    for key in _SOURCES:
        if cfg.get(key):
            raise ValueError(
                f'pretrained_cfg.{key}={_shown(cfg[key])}: expected none; the weights are those beside the config.'
            )
    check_data_config({**cfg, IMAGE_MODE: config.get(IMAGE_MODE)}, 'pretrained_cfg')
    _check_channels(model_args, cfg)
    for key, known in (('architecture', architecture), ('fixed_input_size', None)):
        value = cfg.get(key)
        if value is not None and (value != known if known else not isinstance(value, bool)):
            raise ValueError(f'pretrained_cfg.{key}={_shown(value)}: expected {known or "true or false"}.')
    places = {
        'num_classes': config.get('num_classes'),
        'model_args.num_classes': model_args.get('num_classes'),
        'pretrained_cfg.num_classes': cfg.get('num_classes'),
    }
    numbers = {name: value for name, value in places.items() if value is not None}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f'{name} must be a whole number from 0 to {MAX_NUMBER}.')
    if len(set(numbers.values())) != 1:
        given = ', '.join(f'{name}={value}' for name, value in numbers.items()) or 'none'
        raise ValueError(f'the numbers of classes must agree, got {given}.')
    num_classes = next(iter(numbers.values()))
    model = _check_weights(architecture, {'num_classes': num_classes, **model_args}, shapes, cfg)
    _check_module_names(architecture, cfg, model)
    class_list(config.get('label_names', cfg.get('label_names')), num_classes)
    return model


def check_values(tensors: Mapping[str, torch.Tensor], model: MultiExitModel) -> None:
    """Refuse stored weights that are of another kind than the network's, or not finite: loading would cast them, and
    answers would be NaN.

    Args:
        tensors: Weights by name.
        model: The network.
    """
    for name, own in model.state_dict().items():
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.is_floating_point() != own.is_floating_point() or stored.is_complex():
            raise ValueError(f'the weight {_shown(name)} is of type {stored.dtype}; expected {own.dtype}.')
        if stored.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f'the weight {_shown(name)} has values that are not finite; train the network again.')


def class_list(names: Any, num_classes: int) -> Optional[List[Optional[str]]]:
    """Class names as a list, from any form in which timm's configs hold them.

    Args:
        names: One name per class, None where a class has none; or names by index, a number or its digits.
        num_classes: C.

    Returns:
        C names, None where a class has none; None where no class has one.

    Raises:
        ValueError: There are other classes than that, or two have the same name, or a name is empty or not text.
    """
    if names is None:
        return None
    if isinstance(names, dict):
        listed: List[Any] = [None] * num_classes
        for key, name in names.items():
            index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
            is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < num_classes
            if not is_index or str(index) != str(key):
                raise ValueError(f'class_names[{_shown(key)}]: expected an index from 0 to {num_classes - 1}.')
            if listed[index] is not None:
                raise ValueError(f'class_names names class {index} twice.')
            listed[index] = name
    elif isinstance(names, (list, tuple)):
        listed = list(names)
    else:
        raise ValueError(f'class_names={_shown(names)}: expected a list of names, or names by index.')
    if len(listed) != num_classes:
        raise ValueError(f'class_names has {len(listed)} names for {num_classes} classes.')
    first: Dict[str, int] = {}
    for index, name in enumerate(listed):
        if name is None:
            continue
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'class_names[{index}]={_shown(name)}: expected a name that is not empty, or none.')
        if first.setdefault(name, index) != index:
            raise ValueError(f'class_names: classes {first[name]} and {index} are both named {_shown(name)}.')
    return listed if first else None


def is_network_argument(name: str) -> bool:
    """Whether an argument of timm's factory is about the network itself, not about weights or how and where it runs."""
    return name not in _NOT_OF_A_NETWORK and (name == 'pretrained_backbone' or not name.startswith('pretrained'))


def missing_weights(model: MultiExitModel, shapes: Shapes) -> List[str]:
    """Names of the weights of `model`, classifiers left out, that the file with these `shapes` does not have."""
    ours = tuple(f'heads.{k}.fc.' for k in range(model.num_exits))
    classifiers = ours + tuple(f'{name}.' for name in _classifier_names(model))
    return [name for name in model.state_dict() if name not in shapes and not name.startswith(classifiers)]


def _check_arguments(architecture: Any, model_args: Any) -> None:
    if not isinstance(architecture, str) or architecture not in timm.list_models('mlcsd_*'):
        raise ValueError(f'architecture {_shown(architecture)}: expected a registered name that begins with mlcsd_.')
    if not isinstance(model_args, dict) or not all(isinstance(key, str) for key in model_args):
        raise ValueError('model_args must be arguments by name.')
    if model_args.get('pretrained_backbone') not in (None, False):
        raise ValueError(
            f'model_args.pretrained_backbone={_shown(model_args["pretrained_backbone"])}: expected false; the stored '
            f'weights hold those of the backbone.'
        )
    for key, value in model_args.items():
        if not is_network_argument(key):
            raise ValueError(f'model_args.{_shown(key)[1:-1]}: a stored network cannot have this argument; remove it.')
        _check_plain(value, f'model_args.{_shown(key)[1:-1]}')
        if key.startswith('drop') and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f'model_args.{_shown(key)[1:-1]}={value}: expected a rate from 0 to below 1.')
    sizes = model_args.get('img_size')
    for side in sizes if isinstance(sizes, (list, tuple)) else [sizes]:
        if side is not None and not (isinstance(side, int) and 1 <= side <= MAX_SIDE):
            raise ValueError(f'model_args.img_size={_shown(sizes)}: expected sides from 1 to {MAX_SIDE}.')


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raise a ValueError for what is not a plain value of JSON, or is larger than any that a network needs."""
    if depth > MAX_DEPTH:
        raise ValueError(f'{where} is nested more than {MAX_DEPTH} deep.')
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_TEXT:
            raise ValueError(f'{where} has {len(value)} entries; expected at most {MAX_TEXT}.')
        for entry in value:
            _check_plain(entry, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f'{where} has {len(value)} characters; expected at most {MAX_TEXT}.')
    elif isinstance(value, (int, float)):  # a bool is an int
        if not abs(value) <= MAX_NUMBER:
            raise ValueError(f'{where}: expected numbers from {-MAX_NUMBER} to {MAX_NUMBER}.')
    elif value is not None:
        raise ValueError(f'{where} holds a {type(value).__name__}; expected plain values of JSON.')


def check_data_config(config: Any, where: str = 'data_config') -> None:
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f'{where} must be entries by name.')
    side = 1
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = config.get(key)
        if size is None:
            continue
        if (
            not isinstance(size, (list, tuple))
            or len(size) != 3
            or not all(type(n) is int and 1 <= n <= MAX_SIDE for n in size)
            or math.prod(size) > 3 * MAX_SIDE**2
        ):
            raise ValueError(
                f'{where}.{key}={_shown(size)}: expected channels, height and width, each side from 1 to {MAX_SIDE} '
                f'and together at most three channels of the largest.'
            )
        side = max(side, *size[1:])
    for key in ('crop_pct', 'test_crop_pct'):
        if config.get(key) is not None:
            _check_number(config[key], f'{where}.{key}', CROP_PCT)
            if side / config[key] > MAX_SIDE:
                raise ValueError(
                    f'{where}.{key}={config[key]} resizes images to {side / config[key]:.0f} pixels a side; expected '
                    f'at most {MAX_SIDE}.'
                )
    channels = (config.get('input_size') or (None,))[0]
    for key, bounds in (('mean', (-STATISTICS[1], STATISTICS[1])), ('std', STATISTICS)):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or not values or len(values) not in (1, channels or len(values)):
            raise ValueError(f'{where}.{key}={_shown(values)}: expected one number, or one per channel ({channels}).')
        for value in values:
            _check_number(value, f'{where}.{key}', bounds)
    for key, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES), (IMAGE_MODE, IMAGE_MODES)):
        if config.get(key) is not None and config[key] not in known:
            raise ValueError(f'{where}.{key}={_shown(config[key])}: expected one of {", ".join(known)}.')


def _check_number(value: Any, where: str, bounds: Tuple[float, float]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not bounds[0] <= value <= bounds[1]:
        raise ValueError(f'{where}={_shown(value)}: expected a number from {bounds[0]:g} to {bounds[1]:g}.')


def _check_channels(model_args: Dict[str, Any], config: Dict[str, Any]) -> None:
    channels, size = model_args.get('in_chans'), config.get('input_size')
    if channels is not None and size is not None and channels != size[0]:
        raise ValueError(f'input_size has {size[0]} channels, model_args.in_chans is {_shown(channels)}.')


def _check_weights(
    architecture: str, model_args: Dict[str, Any], shapes: Shapes, cfg: Optional[Dict[str, Any]] = None
) -> MultiExitModel:
    """The network on the meta device; a ValueError where it has other weights than those of `shapes`."""
    # some parameters are made and then replaced, by new classifiers say
    with torch.device('meta'), _at_most(4 * len(shapes) + 1000):
        try:
            model = create_named(architecture, **model_args, **(dict(pretrained_cfg=dict(cfg)) if cfg else {}))
        except ValueError:
            raise
        except Exception as e:  # arguments are wrong in as many ways as there are networks
            raise ValueError(f'{architecture} cannot be made with these arguments: {one_line(e)}') from e
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    differing = {
        'missing': [name for name in own if name not in shapes],
        'unexpected': [name for name in shapes if name not in own],
        'of another shape': [name for name in own if name in shapes and own[name] != tuple(shapes[name])],
    }
    if any(differing.values()):
        found = '; '.join(
            f'{kind}: {_shown(names[:3])}, {len(names)} in all' for kind, names in differing.items() if names
        )
        raise ValueError(f'the weights are not those of {architecture} with these arguments ({found}).')
    return model


@contextlib.contextmanager
def _at_most(parameters: int) -> Iterator[None]:
    """Give up, with a ValueError, a network that is made inside when it gets more parameters than that."""
    here, left = threading.get_ident(), parameters

    def count(*_: Any) -> None:
        nonlocal left
        left -= threading.get_ident() == here
        if left < 0:
            raise ValueError('the arguments make a network with many more layers than there are weights for.')

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_module_names(architecture: str, cfg: Dict[str, Any], model: MultiExitModel) -> None:
    """timm leaves out or adapts the weights of the modules that these entries name."""
    registered = get_pretrained_cfg(architecture)
    for key in ('classifier', 'first_conv'):
        known = _names(getattr(registered, key))
        below = tuple(_classifier_names(model)) if key == 'classifier' else ()
        for name in _names(cfg.get(key)):
            if name not in known and not any(name == c or name.startswith(f'{c}.') for c in below):
                raise ValueError(f'pretrained_cfg.{key}={_shown(cfg[key])}: expected {" or ".join(sorted(known))}.')


def _names(value: Any) -> Set[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return {v if isinstance(v, str) else repr(v)[:MAX_TEXT] for v in values if v is not None}


def _classifier_names(model: MultiExitModel) -> List[str]:
    last = model.get_classifier()
    modules = last if isinstance(last, (list, tuple)) else [last]
    return [name for name, module in model.named_modules() if any(module is m for m in modules)]


def _shown(value: Any) -> str:
    """A value from a file as the start of one line that a terminal can show."""
    if isinstance(value, int) and value.bit_length() > 64:
        return 'a number of very many digits'
    try:
        text = printable(repr(value))
    except RecursionError:
        return 'a value that is nested very deeply'
    return text if len(text) <= 80 else f'{text[:80]} ...'
