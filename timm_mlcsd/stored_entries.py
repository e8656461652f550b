"""Checks of single entries of a stored network's config: preprocessing, class names and plain values."""

import math
from typing import Any, Dict, List, Optional, Tuple

from .data import IMAGE_MODE, IMAGE_MODES
from .errors import printable
from .file_checks import CROP_MODES, INTERPOLATIONS

__all__ = ['MAX_NUMBER', 'MAX_SIDE', 'MAX_TEXT', 'check_data_config', 'check_plain_value', 'class_list', 'short_repr']

# largest side of an image and of a resized image, in pixels: four times the largest of timm's networks
MAX_SIDE = 4096
# range of crop fractions; timm's networks have 0.875 to 1.15
CROP_PCT = (0.1, 2.0)
# smallest standard deviation, and largest absolute mean and standard deviation, for pixels from 0 to 1
STATISTICS = (1e-6, 1e6)
# far above any width, depth or number of classes of timm's networks
MAX_NUMBER = 1_000_000
MAX_TEXT = 1000
MAX_DEPTH = 8


def check_data_config(config: Any, where: str = 'data_config') -> None:
    """Check the entries of a preprocessing config.

    Args:
        config: Preprocessing by name, as returned by timm's ``resolve_data_config``; missing entries are allowed.
        where: Name of the config in error messages.

    Raises:
        ValueError: An entry is invalid or out of its range.
    """
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f'{where}: expected entries by name.')
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
                f'{where}.{key}={short_repr(size)}: expected channels, height and width, each from 1 to {MAX_SIDE}, '
                f'with a product of at most {3 * MAX_SIDE**2}.'
            )
        side = max(side, *size[1:])
    for key in ('crop_pct', 'test_crop_pct'):
        if config.get(key) is not None:
            _check_number(config[key], f'{where}.{key}', CROP_PCT)
            if side / config[key] > MAX_SIDE:
                raise ValueError(
                    f'{where}.{key}={config[key]}: expected resized images of at most {MAX_SIDE} pixels a side, got '
                    f'{side / config[key]:.0f}.'
                )
    _check_statistics(config, where)
    for key, known in (('interpolation', INTERPOLATIONS), ('crop_mode', CROP_MODES), (IMAGE_MODE, IMAGE_MODES)):
        if config.get(key) is not None and config[key] not in known:
            raise ValueError(f'{where}.{key}={short_repr(config[key])}: expected one of {", ".join(known)}.')


def _check_statistics(config: Dict[str, Any], where: str) -> None:
    """Check means and standard deviations: one number, or one per channel."""
    channels = (config.get('input_size') or (None,))[0]
    for key, bounds in (('mean', (-STATISTICS[1], STATISTICS[1])), ('std', STATISTICS)):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or not values or len(values) not in (1, channels or len(values)):
            raise ValueError(
                f'{where}.{key}={short_repr(values)}: expected one number, or one per channel ({channels}).'
            )
        for value in values:
            _check_number(value, f'{where}.{key}', bounds)


def _check_number(value: Any, where: str, bounds: Tuple[float, float]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not bounds[0] <= value <= bounds[1]:
        raise ValueError(f'{where}={short_repr(value)}: expected a number from {bounds[0]:g} to {bounds[1]:g}.')


def class_list(names: Any, num_classes: int) -> Optional[List[Optional[str]]]:
    """Convert class names from any form of timm's configs to a list.

    Args:
        names: Class names, [C], None for a class without a name; or names by index, an integer or its digits; or None.
        num_classes: Number of classes C.

    Returns:
        Class names, [C], None for a class without a name; None if no class has a name.

    Raises:
        ValueError: The number of names or an index is wrong, two classes have the same name, or a name is empty or not
            text.
    """
    if names is None:
        return None
    if isinstance(names, dict):
        listed: List[Any] = [None] * num_classes
        for key, name in names.items():
            index = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10 else key
            is_index = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < num_classes
            if not is_index or str(index) != str(key):
                raise ValueError(f'class_names[{short_repr(key)}]: expected an index from 0 to {num_classes - 1}.')
            if listed[index] is not None:
                raise ValueError(f'class_names: expected one name for class {index}, got two.')
            listed[index] = name
    elif isinstance(names, (list, tuple)):
        listed = list(names)
    else:
        raise ValueError(f'class_names={short_repr(names)}: expected a list of names, or names by index.')
    if len(listed) != num_classes:
        raise ValueError(f'class_names has {len(listed)} names for {num_classes} classes.')
    first: Dict[str, int] = {}
    for index, name in enumerate(listed):
        if name is None:
            continue
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f'class_names[{index}]={short_repr(name)}: expected a name that is not empty, or None.')
        if first.setdefault(name, index) != index:
            raise ValueError(f'class_names: classes {first[name]} and {index} are both named {short_repr(name)}.')
    return listed if first else None


def check_plain_value(value: Any, where: str, depth: int = 0) -> None:
    """Check that a value is a plain JSON value within the bounds of this module.

    Args:
        value: Value to check, with nested lists and objects.
        where: Name of the value in error messages.
        depth: Depth of nesting of the value; for recursion.

    Raises:
        ValueError: The value is of another type, or too large.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f'{where}: expected at most {MAX_DEPTH} levels of nesting.')
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_TEXT:
            raise ValueError(f'{where} has {len(value)} entries; expected at most {MAX_TEXT}.')
        for entry in value:
            check_plain_value(entry, where, depth + 1)
    elif isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise ValueError(f'{where} has {len(value)} characters; expected at most {MAX_TEXT}.')
    elif isinstance(value, (int, float)):  # a bool is an int
        if not abs(value) <= MAX_NUMBER:
            raise ValueError(f'{where}: expected numbers from {-MAX_NUMBER} to {MAX_NUMBER}.')
    elif value is not None:
        raise ValueError(f'{where}: expected plain JSON values, got a {type(value).__name__}.')


def short_repr(value: Any) -> str:
    """The repr of an untrusted value for an error message, limited in length and without control characters."""
    if isinstance(value, int) and value.bit_length() > 64:
        return 'a very long integer'
    try:
        text = printable(repr(value))
    except RecursionError:
        return 'a deeply nested value'
    return text if len(text) <= 80 else f'{text[:80]} ...'
