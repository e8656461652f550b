"""A YAML file of flags, as in timm: the command line wins."""

import argparse
import difflib
import os
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple

import yaml

from ..errors import UserError
from .arguments import KeyValues, ScriptParser, exits

__all__ = ['parse_args']


def parse_args(parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the flags of ``--config``, if there is one, then the command line over them.

    Raises:
        UserError: A flag is wrong, or the config file is missing or holds a key that no flag has.
    """
    config_parser = ScriptParser(add_help=False)
    config_parser.add_argument('-c', '--config')
    given, rest = config_parser.parse_known_args(argv)
    # two passes, so that a list at the end of the file can't take the command line's DIR for one of its values
    from_config = parser.parse_args(_config_to_argv(parser, given.config)) if given.config else None
    configured = from_config and from_config.data_dir
    if from_config:
        from_config.data_dir = None
    args = parser.parse_args(rest, namespace=from_config)
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UserError(f'the data is named twice, as {args.data!r} and as --data-dir {args.data_dir!r}: give one.')
    args.data_dir = args.data or args.data_dir or configured
    if args.data_dir:
        args.data_dir = os.path.expanduser(args.data_dir)
    del args.config, args.data
    return args


# args.yaml of older runs holds these flags, nearly always at a value without effect
REMOVED = ('jsd_loss', 'aug_splits', 'pool_momentum')


class _Written(str):
    """A number as it is written, also inside of lists and dicts."""

    def __repr__(self) -> str:
        return str(self)


class _FlagLoader(yaml.SafeLoader):
    """YAML whose keys are there once (PyYAML takes the last of two), and whose numbers are text, as those on a command
    line are: YAML makes 8 of 010, 90 of 1:30 and 1.1 of a run with the name 1.10."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        merge = 'tag:yaml.org,2002:merge'
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f'it has {key!r} twice', node.start_mark)
        mapping: Dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_written(self, node: yaml.ScalarNode) -> _Written:
        return _Written(self.construct_scalar(node))


for _kind in ('int', 'float'):
    _FlagLoader.add_constructor(f'tag:yaml.org,2002:{_kind}', _FlagLoader.construct_written)
# numbers that YAML 1.1 takes for words
_FlagLoader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'[-+]?[0-9]+[eE][-+]?[0-9]+$'), [*'-+0123456789']
)


def _config_to_argv(parser: argparse.ArgumentParser, path: str) -> List[str]:
    """Spell a YAML config as command line arguments, so that types and choices are checked like any flag's."""
    flags: Dict[str, Tuple[str, argparse.Action]] = {}
    for action in parser._actions:
        if action.option_strings and action.dest not in ('help', 'config'):
            spelt = [s for s in action.option_strings if s[:2] == '--' and s[:5] != '--no-'] or action.option_strings
            names = {action.dest, *(s.lstrip('-').replace('-', '_') for s in spelt)}
            flags.update((name, (spelt[-1], action)) for name in names)
    try:
        with open(path) as f:
            config = yaml.load(f, _FlagLoader) or {}
    except OSError as e:
        raise UserError(f'--config {path!r} cannot be read: {e.strerror}.') from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f'--config {path!r} is not valid YAML: {e}') from None
    if not isinstance(config, dict):
        raise UserError(f'--config {path!r} must hold "flag: value" lines.')
    argv: List[str] = []
    given: Dict[str, Any] = {}
    for key, value in config.items():
        dest = str(key).replace('-', '_')
        if dest in REMOVED:
            if str(value) not in ('False', '0', '0.0'):
                raise UserError(f'--config {path!r}: the flag {key} was removed; take {key}: {value} out.')
            continue
        if dest not in flags:
            near = difflib.get_close_matches(dest, flags, n=3)
            raise UserError(
                f'--config {path!r}: no flag has the name {key!r}'
                + (f'; near names: {", ".join(near)}.' if near else '; --help lists them.')
            )
        name = flags[dest][1].dest
        if name in given:
            raise UserError(f'--config {path!r}: {given[name]!r} and {key!r} are the same flag: give one of them.')
        given[name] = key
        argv += _spell(*flags[dest], value, path)
    return argv


def _spell(flag: str, action: argparse.Action, value: Any, path: str) -> List[str]:
    if value is None:
        return []
    if isinstance(action, (argparse._StoreTrueAction, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise UserError(f'--config {path!r}: {action.dest} is a switch; give true or false, not {value!r}.')
        off = list(action.option_strings[-1:]) if isinstance(action, argparse.BooleanOptionalAction) else []
        return [flag] if value else off
    if isinstance(value, bool) and action.nargs == '?':
        return [flag] if value else []
    if isinstance(value, dict) and isinstance(action, KeyValues):
        return [flag, *(f'{k}={v!r}' for k, v in value.items())]
    if isinstance(value, list) and action.type is exits:
        return [flag, ','.join(str(v) for v in value)]
    if isinstance(value, list) and action.nargs not in (None, '?'):
        return [flag, *(str(v) for v in value)]
    if isinstance(value, (bool, dict, list)):
        raise UserError(f'--config {path!r}: {action.dest} takes {_wanted(action)}, not {value!r}.')
    return [f'{flag}={value}']


def _wanted(action: argparse.Action) -> str:
    if isinstance(action, KeyValues):
        return 'key: value pairs'
    return 'one value (quote it if it is text)' if action.nargs in (None, '?') else 'a list of values'
