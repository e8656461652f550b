"""One page per command, written from its argument parser when the site is built."""

import argparse
import html
import re
from typing import TYPE_CHECKING, Callable, Dict, Iterator, Sequence, Tuple

from timm_mlcsd.cli.cost import cost_parser
from timm_mlcsd.cli.export import export_parser
from timm_mlcsd.cli.flags import train_parser, validate_parser
from timm_mlcsd.cli.predict import predict_parser
from timm_mlcsd.cli.push import push_parser

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

# longer lists of choices would make a table's first column too wide
MAX_CHOICES = 40


# what a user types, and its parser
COMMANDS: Dict[str, Callable[[], argparse.ArgumentParser]] = {
    'mlcsd-train': train_parser,
    'mlcsd-validate': validate_parser,
    'mlcsd-predict': predict_parser,
    'mlcsd-push': push_parser,
    'mlcsd-cost': cost_parser,
    'mlcsd-export': export_parser,
}
# other ways to run the same command
ALIASES = {
    'mlcsd-train': './train.py',
    'mlcsd-validate': './validate.py',
    'mlcsd-cost': 'python -m timm_mlcsd.cost',
    'mlcsd-export': 'python -m timm_mlcsd.adaptive.export',
}


def page_of(command: str, parser: argparse.ArgumentParser) -> str:
    """The Markdown page of a command."""
    positionals = [_values(action) for action in parser._actions if not action.option_strings]
    usage = ' '.join([command, *positionals, '[FLAGS]'])
    lines = [f'# {command}', '', f'{parser.description}.', '', f'```\n{usage}\n```', '']
    if command in ALIASES:
        where = 'In a checkout, ' if ALIASES[command].startswith('./') else ''
        lines += [f'{where}`{ALIASES[command]}` is the same command.', '']
    for group in parser._action_groups:
        actions = [
            action for action in group._group_actions if action.dest != 'help' and action.help != argparse.SUPPRESS
        ]
        if actions:
            lines += [f'## {(group.title or "Flags").capitalize()}', '', *_table(actions, parser), '']
    return '\n'.join(lines)


def _table(actions: Sequence[argparse.Action], parser: argparse.ArgumentParser) -> Iterator[str]:
    yield '| flag | meaning | default |'
    yield '|---|---|---|'
    for action in actions:
        yield '| ' + ' | '.join((_flags(action), *_meaning(action, parser))) + ' |'


def _flags(action: argparse.Action) -> str:
    values = _values(action)
    if not action.option_strings:
        return _code(values)
    return '<br>'.join(_code(f'{flag} {values}'.rstrip()) for flag in action.option_strings)


def _values(action: argparse.Action) -> str:
    """The values of a flag or the name of a positional argument, as a usage line shows them."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ''
    name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if action.choices is not None and not action.metavar:
        choices = ','.join(str(choice) for choice in action.choices)
        name = f'{{{choices}}}' if len(choices) <= MAX_CHOICES else name
    if isinstance(action.nargs, int):
        return ' '.join([name] * action.nargs)
    return {'?': f'[{name}]', '*': f'[{name} ...]', '+': f'{name} [{name} ...]'}.get(action.nargs or '', name)


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> Tuple[str, str]:
    """What a flag means, and its default: the help text's own words where it has some."""
    text = (action.help or '') % {**vars(action), 'prog': parser.prog}
    text, default = re.fullmatch(r'(.*?)\s*(?:\(default: (.*)\))?', text, re.DOTALL).groups()
    choices = ', '.join(str(choice) for choice in action.choices or ())
    if len(choices.replace(' ', '')) > MAX_CHOICES:
        text = f'{text}; one of {choices}' if text else f'one of {choices}'
    if default is None and not any(action.default is nothing for nothing in (None, False, argparse.SUPPRESS)):
        values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        default = '' if action.default in ('', {}) else ' '.join(str(value) for value in values)
    return _text(text), _text(default or '')


def _code(text: str) -> str:
    return f'<code>{_text(text)}</code>' if text else ''


def _text(text: str) -> str:
    """Text of a table cell, with everything escaped that Markdown or HTML would read."""
    return re.sub(r'([\\`*_\[\]|])', r'\\\1', html.escape(text, quote=False))


def on_files(files: 'Files', config: 'MkDocsConfig') -> 'Files':
    """Add the pages."""
    from mkdocs.structure.files import File

    for command, parser in COMMANDS.items():
        place = f'commands/{command}.md'
        files.append(File.generated(config, place, content=page_of(command, parser())))
    return files
