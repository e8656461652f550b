"""Check types and ranges of settings that a script, a notebook or a YAML file gives; flags check their own."""

import math
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Callable, Dict, Iterator, Tuple, Type, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from .flat_config import FlatConfig

__all__ = ['RANGES', 'check_settings']

_Range = Tuple[str, Callable[[float], bool]]
_ABOVE_0: _Range = ('above 0', lambda v: v > 0)
_FROM_0: _Range = ('at least 0', lambda v: v >= 0)
_FROM_1: _Range = ('at least 1', lambda v: v >= 1)
_PROBABILITY: _Range = ('from 0 to 1', lambda v: 0 <= v <= 1)
_FRACTION: _Range = ('from 0 to below 1', lambda v: 0 <= v < 1)
_NAMES: Dict[_Range, str] = {
    _ABOVE_0: 'clip_grad lr_base temperature opt_eps layer_decay exit_lr_mult decay_epochs decay_rate lr_noise_std '
    'lr_k_decay crop_pct std scale ratio',
    _FROM_1: 'epochs batch_size validation_batch_size grad_accum_steps lr_base_size lr_cycle_limit lr_cycle_mul '
    'recount img_size in_chans input_size train_num_samples',
    _FROM_0: 'workers lr max_bad_samples epoch_repeats val_seed seed color_jitter mixup cutmix alpha beta gamma '
    'distill_warmup_epochs weight_decay warmup_lr min_lr warmup_epochs cooldown_epochs mixup_off_epoch skip_nonfinite '
    'checkpoint_every_steps exit_weights decay_milestones',
    _PROBABILITY: 'hflip vflip color_jitter_prob grayscale_prob gaussian_blur_prob reprob mixup_prob mixup_switch_prob '
    'lr_noise_pct bce_target_thresh cutmix_minmax',
    _FRACTION: 'momentum model_ema_decay smoothing drop drop_path drop_block val_fraction',
}
RANGES: Dict[str, _Range] = {name: range_ for range_, names in _NAMES.items() for name in names.split()}


def check_settings(config: FlatConfig) -> None:
    """Check types and ranges of all settings of a configuration.

    Args:
        config: The configuration.

    Raises:
        UserError: A setting has another type than its field, is not finite, or is outside of its range.
    """
    for part in vars(config).values():
        if is_dataclass(part):
            hints = get_type_hints(type(part))
            for field in fields(part):
                _check(field.name, getattr(part, field.name), hints[field.name])


def _check(name: str, value: Any, hint: Any) -> None:
    kinds = get_args(hint) if get_origin(hint) is Union else (hint,)
    if not any(_is_of(value, kind) for kind in kinds):
        expected = ' or '.join(_kind_name(kind) for kind in kinds)
        raise UserError(f'{name}={value!r}: expected {expected}.')
    text, is_in_range = RANGES.get(name, ('finite', math.isfinite))
    if not all(math.isfinite(number) and is_in_range(number) for number in _numbers(value)):
        what = 'numbers' if isinstance(value, (list, tuple)) else 'a number'
        raise UserError(f'{name}={value!r}: expected {what} {text}.')


def _is_of(value: Any, kind: Type[Any]) -> bool:
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_of(v, get_args(kind)[0]) for v in value)
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, get_origin(kind) or kind)


def _kind_name(kind: Type[Any]) -> str:
    return {int: 'an integer', float: 'a number', bool: 'True or False', str: 'a text', type(None): 'None'}.get(
        kind, str(kind).replace('typing.', '')
    )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (list, tuple)):
        for v in value:
            yield from _numbers(v)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield float(value)
