"""What the command lines of all scripts share."""

import argparse
import difflib
import math
import re
import sys
from typing import Any, Dict, Generic, List, NoReturn, Optional, Sequence, Tuple, Type, TypeVar, Union

from timm.utils import ParseKwargs

from ..errors import UserError
from ..file_checks import INTERPOLATIONS

__all__ = [
    'KeyValues',
    'Number',
    'ScriptParser',
    'budget',
    'confidence',
    'epochs',
    'exits',
    'fraction',
    'image_side',
    'integer',
    'interpolation',
    'non_negative_float',
    'non_negative_int',
    'number',
    'positive_float',
    'positive_int',
    'probability',
    'seed',
    'text',
    'train_interpolation',
]

# what every seed, counter and tensor size takes
LARGEST_INT = 2**31 - 1
# no more than float32 takes, with room to multiply
LARGEST_FLOAT = 1e30

_FORMS = {int: r'[+-]?[0-9]+', float: r'[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?'}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as they are written on a command line; of None and empty ones the help itself tells."""

    def _get_help_string(self, action: argparse.Action) -> Optional[str]:
        text = action.help or ''
        if '(default' in text:
            return text
        if isinstance(action, argparse._StoreTrueAction):
            return f'{text} (default: off)'
        if isinstance(action.default, list):
            shown = (f'{value:g}' if isinstance(value, float) else str(value) for value in action.default)
            return f'{text} (default: {" ".join(shown)})'
        # 0 is a default to show, though it equals False
        if action.default is None or action.default is False or action.default in ('', {}):
            return text
        return super()._get_help_string(action)


class ScriptParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line.

    Args:
        inputs: Name of the list that arguments after flags belong to; default empty: they are errors.
        **kwargs: Arguments of ``argparse.ArgumentParser``.
    """

    def __init__(self, *, inputs: str = '', **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)
        self.inputs = inputs

    def parse_known_args(  # type: ignore[override]  # the stub has overloads for classes other than Namespace
        self, args: Optional[Sequence[str]] = None, namespace: Optional[argparse.Namespace] = None
    ) -> Tuple[argparse.Namespace, List[str]]:
        """Parse the arguments that are known, as argparse does, and refuse ``--flag=--``.

        Args:
            args: Arguments; None for those of the process.
            namespace: Object that receives the values; None for a new one.

        Returns:
            The values, and the arguments that are left.

        Raises:
            UserError: An argument is wrong.
        """
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            # argparse makes an empty list of it, whatever the type
            if re.fullmatch(r'--?[\w-]+=--', arg):
                self.error(f"argument {arg[:-3]}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def parse_args(  # type: ignore[override]  # the stub has overloads for classes other than Namespace
        self, args: Optional[Sequence[str]] = None, namespace: Optional[argparse.Namespace] = None
    ) -> argparse.Namespace:
        """Parse all arguments; an unknown flag is an error that names the nearest known one.

        Args:
            args: Arguments; None for those of the process.
            namespace: Object that receives the values; None for a new one.

        Returns:
            The values.

        Raises:
            UserError: An argument is wrong or unknown.
        """
        args = sys.argv[1:] if args is None else list(args)
        namespace, rest = self.parse_known_args(args, namespace)
        if rest and self.inputs and not self._unknown_flags(args, rest):
            # argparse ends a list at the first flag
            setattr(namespace, self.inputs, [*getattr(namespace, self.inputs), *(arg for arg in rest if arg != '--')])
        elif rest:
            self.error(self._about_unknown(args, rest, namespace))
        return namespace

    def _about_unknown(self, args: List[str], rest: List[str], namespace: argparse.Namespace) -> str:
        """What to say of arguments that no flag takes: the first that looks like a flag, with the nearest that is one.

        Args:
            args: The command line.
            rest: What is left of it.
            namespace: What was parsed, with the name of a subcommand.
        """
        unknown = self._unknown_flags(args, rest)
        if not unknown:
            return f'unrecognized arguments: {" ".join(rest)}'
        name, flags = unknown[0].partition('=')[0], self._long_flags(namespace)
        near = difflib.get_close_matches(_plain(name), flags, n=1)
        return f'unknown flag {name}' + (f': did you mean {flags[near[0]]}?' if near else '')

    @staticmethod
    def _unknown_flags(args: List[str], rest: List[str]) -> List[str]:
        """Those of the remaining arguments that look like flags."""
        # what follows -- is never a flag, nor is a negative number
        before = args[: args.index('--')] if '--' in args else args
        return [arg for arg in rest if arg in before and re.fullmatch(r'--?[^\W\d][^\s=]*(=.*)?', arg, re.DOTALL)]

    def _long_flags(self, namespace: argparse.Namespace) -> Dict[str, str]:
        """The flags of this parser and of the subcommand, by their plain names."""
        flags = {_plain(s): s for s in self._option_string_actions if s.startswith('--')}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                command = action.choices.get(getattr(namespace, action.dest, ''))
                flags.update(command._long_flags(namespace) if command else {})
        return flags

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`, instead of printing it and exiting as argparse does."""
        raise UserError(f'{message} (--help lists the flags)')


class KeyValues(ParseKwargs):
    """timm's ``KEY=VALUE ...``; anything else, a key twice and numbers that are not finite are errors."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Union[str, Sequence[Any], None],
        option_string: Optional[str] = None,
    ) -> None:
        """Store the pairs of an argument as a dictionary.

        Args:
            parser: Parser that reports errors.
            namespace: Object that receives the dictionary.
            values: Texts of the form KEY=VALUE.
            option_string: Flag as it was written.
        """
        assert isinstance(values, list)  # the flags have nargs='*'
        keys = [value.partition('=')[0] for value in values if value]
        for value in filter(None, values):
            if not value.partition('=')[1] or not value.partition('=')[0].isidentifier():
                parser.error(f'argument {option_string}: expected KEY=VALUE, got {_short(value)}')
        for key in keys:
            if keys.count(key) > 1:
                parser.error(f'argument {option_string}: expected every KEY once, got {key} {keys.count(key)} times')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (MemoryError, RecursionError, TypeError):  # of a literal that is nested too deeply, or no literal
            parser.error(f'argument {option_string}: expected plain values, got {_short(" ".join(values))}')
        for key, value in getattr(namespace, self.dest).items():
            # Python's literals are True and False only; any other text would count as true
            if isinstance(value, str) and value.lower() in ('true', 'false', 'yes', 'no', 'on', 'off', 'null'):
                parser.error(f'argument {option_string}: {_short(f"{key}={value}")}: expected True, False or None')
            if not _all_finite(value):
                parser.error(f'argument {option_string}: expected finite numbers, got {_short(f"{key}={value}")}')


def _all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return _all_finite(list(value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(_all_finite(v) for v in value)
    if isinstance(value, str):
        return not re.fullmatch(r'[+-]?\.?(nan|inf|infinity)', value.strip(), re.I)
    if isinstance(value, complex):
        return False
    return not isinstance(value, float) or math.isfinite(value)


_Kind = TypeVar('_Kind', int, float)


class Number(Generic[_Kind]):
    """A number between bounds, as the type of a flag: ASCII digits, without spaces or underscores.

    Args:
        kind: int or float.
        at_least: The smallest value; None for no bound.
        at_most: The largest value.
        above: The bound that every value exceeds, instead of `at_least`.
        below: The bound that every value stays under, instead of `at_most`.
    """

    def __init__(
        self,
        kind: Type[_Kind],
        at_least: Optional[float] = None,
        at_most: Optional[float] = None,
        above: Optional[float] = None,
        below: Optional[float] = None,
    ):
        self.kind: Type[_Kind] = kind
        self.at_least = at_least
        self.at_most = at_most
        self.above = above
        self.below = below

    def __call__(self, text: str) -> _Kind:
        """The number.

        Raises:
            argparse.ArgumentTypeError: The text is not one, or it lies outside the bounds.
        """
        # longer ones are outside all bounds, and Python refuses to read them
        if re.fullmatch(_FORMS[self.kind], text) and len(text) < 1000:
            value = self.kind(text)
            if value in self:
                return value
        raise argparse.ArgumentTypeError(f'expected {self}, got {_short(text)}')

    def __contains__(self, value: Union[int, float]) -> bool:
        limit = LARGEST_INT if self.kind is int else LARGEST_FLOAT
        return (
            abs(value) <= limit
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        what = 'an integer' if self.kind is int else 'a number'
        if self.at_least is not None and self.at_most is not None:
            return f'{what} from {self.at_least:.10g} to {self.at_most:.10g}'
        words = {'at least': self.at_least, 'above': self.above, 'at most': self.at_most, 'below': self.below}
        bounds = [f'{word} {bound:.10g}' for word, bound in words.items() if bound is not None]
        return f'{what} {" and ".join(bounds)}' if bounds else f'a finite {what[2:]}'


def number(**bounds: float) -> Number[float]:
    """The type of a flag that takes a finite number; see `Number` for the bounds."""
    return Number(float, **bounds)


def integer(at_least: int, at_most: int = LARGEST_INT) -> Number[int]:
    """The type of a flag that takes an integer."""
    return Number(int, at_least=at_least, at_most=at_most)


def _plain(flag: str) -> str:
    """The name of a flag as it is compared with others."""
    return flag.lstrip('-').lower().replace('_', '-')


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f'{text[:40]}...')


positive_int = integer(1)
non_negative_int = integer(0)
positive_float = number(above=0)
non_negative_float = number(at_least=0)
probability = number(at_least=0, at_most=1)
# of a running mean, say: with 1 nothing would move
fraction = number(at_least=0, below=1)
# random number generators take these seeds
seed = integer(0)
# in pixels: larger images fit no memory
image_side = integer(1, 16384)


def epochs(text: str) -> int:
    """A number of epochs behind a flag that can do without one."""
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError as e:
        raise argparse.ArgumentTypeError(f'{e}; DIR goes in front of the flags') from None


def budget(text: str) -> str:
    """A positive number of MMACs, or a percentage with its sign."""
    try:
        positive_float(text[:-1] if text.endswith('%') else text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'expected a positive number of MMACs, or a percentage of the plain backbone such as 60%, got '
            f'{_short(text)}'
        ) from None
    return text


def text(text: str) -> str:
    """Type of a flag whose value is a text that is not empty, unlike that of a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("expected a text, got ''")
    return text


def confidence(text: str) -> Optional[float]:
    """A probability from 0.5, or none."""
    return None if text == 'none' else number(at_least=0.5, below=1)(text)


def interpolation(text: str) -> str:
    """How images are resized, in timm's words; empty for the model's way."""
    if text and text not in INTERPOLATIONS:
        raise argparse.ArgumentTypeError(f'expected one of {", ".join(INTERPOLATIONS)}, got {_short(text)}')
    return text


def train_interpolation(text: str) -> str:
    """How images are resized in training, where ``random`` takes another way each time."""
    return text if text == 'random' else interpolation(text)


def exits(text: str) -> Union[int, List[str]]:
    """A number of exits, or comma-separated names of the modules to tap."""
    return integer(1, 1000)(text) if re.fullmatch(r'[+-]?\d+', text) else text.split(',')
