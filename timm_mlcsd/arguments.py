"""What the command lines of all scripts share."""

import argparse
import math
from typing import List, NoReturn, Union

from timm.utils import ParseKwargs

from .errors import UserError

__all__ = [
    'KeyValues',
    'ScriptParser',
    'epochs',
    'exits',
    'interpolation',
    'non_negative_float',
    'non_negative_int',
    'positive_float',
    'positive_int',
    'probability',
    'seed',
]


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something."""

    def _get_help_string(self, action):
        if action.default in (None, False, '', {}) or '(default' in (action.help or ''):
            return action.help
        return super()._get_help_string(action)


class ScriptParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message} (--help lists the flags)')


class KeyValues(ParseKwargs):
    """timm's ``KEY=VALUE ...``, with an error for anything else."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'argument {option_string}: expected KEY=VALUE, got {value!r}')
        super().__call__(parser, namespace, values, option_string)


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} must be at least 1')
    return value


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f'{value} must be at least 0')
    return value


def seed(text: str) -> int:
    """An integer that all random number generators take."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f'{value} must be from 0 to {2**31 - 1}')
    return value


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f'{value} must be at least 0')
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f'{value} must be positive')
    return value


def probability(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f'{value} must be from 0 to 1')
    return value


def epochs(text: str) -> int:
    """A number of epochs behind a flag that can do without one."""
    if not text.lstrip('-').isdigit():
        raise argparse.ArgumentTypeError(f'{text!r} is no number of epochs; DIR goes in front of the flags')
    return positive_int(text)


def interpolation(text: str) -> str:
    """How images are resized, in timm's words; empty for the model's way."""
    known = ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random')
    if text and text not in known:
        raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join(known)}')
    return text


def exits(text: str) -> Union[int, List[str]]:
    """A number of exits, or comma-separated names of the modules to tap."""
    return int(text) if text.lstrip('-').isdigit() else text.split(',')
