"""The pages of the commands name every command and every flag."""

import argparse
import configparser
import html
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def hook(name):
    spec = importlib.util.spec_from_file_location(f'docs_{name}', ROOT / 'docs' / '_hooks' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


commands = hook('commands')


@pytest.mark.parametrize('command', commands.COMMANDS)
def test_every_flag_is_on_the_page_of_its_command(command):
    parser = commands.COMMANDS[command]()
    page = html.unescape(re.sub(r'\\(.)', r'\1', commands.page_of(command, parser)))
    listed = set(re.findall(r'<code>(-[\w-]*)', page))
    known = {flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS}
    assert listed == known - {'-h', '--help'}
    assert f'# {command}\n' in page


def test_every_console_script_has_a_page():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    scripts = setup['options.entry_points']['console_scripts'].split('\n')
    assert {script.partition(' =')[0] for script in scripts if script} <= set(commands.COMMANDS)
    nav = (ROOT / 'mkdocs.yml').read_text()
    assert all(f'commands/{command}.md' in nav for command in commands.COMMANDS)


def test_cells_of_a_table():
    parser = argparse.ArgumentParser(prog='x', description='X')
    parser.add_argument('--size', nargs=2, type=int, default=[0, 1], help='a | b of %(prog)s')
    parser.add_argument('--way', choices=('a', 'b'), help='<way> (default: by *size*)')
    parser.add_argument('--long', choices=['x' * 30, 'y' * 30], default=0)
    parser.add_argument('--on', action=argparse.BooleanOptionalAction)
    rows = [line for line in commands.page_of('x', parser).splitlines() if line.startswith('| <')]
    assert rows == [
        r'| <code>--size SIZE SIZE</code> | a \| b of x | 0 1 |',
        r'| <code>--way {a,b}</code> | &lt;way&gt; | by \*size\* |',
        f'| <code>--long LONG</code> | one of {"x" * 30}, {"y" * 30} | 0 |',
        '| <code>--on</code><br><code>--no-on</code> |  |  |',
    ]
