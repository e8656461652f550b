"""What scripts show: one line for a mistake, and no text that the terminal would obey."""

import io
import logging
import os
import subprocess
import sys

import pytest

from timm_mlcsd.errors import UserError, printable, run_script
from timm_mlcsd.report import format_table

EVIL = 'cat\x1b]0;owned\x07\x1b[2J\u202egnp\r\x9b31m'
SHOWN = r'cat\x1b]0;owned\x07\x1b[2J\u202egnp\r\x9b31m'


def test_printable_keeps_letters_and_escapes_control():
    assert printable('größe 猫 naïve') == 'größe 猫 naïve'
    assert printable(EVIL) == SHOWN


def test_errors_logs_and_tables_are_escaped(capsys, monkeypatch):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [handler])

    def main():
        logging.getLogger('x').warning('left out %s\nsecond line', EVIL)
        print(format_table(('Tap',), [(EVIL,)]))
        raise UserError(f'{EVIL} is bad')

    with pytest.raises(SystemExit) as e:
        run_script('train.py', main)
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert stream.getvalue() == f'left out {SHOWN}\nsecond line\n'
    assert out.splitlines()[-1] == SHOWN
    # white space of an error becomes single spaces
    assert err == f'train.py: error: {SHOWN.replace(chr(92) + "r", " ")} is bad\n'


@pytest.mark.parametrize(
    'path, message',
    [
        ('x' * 5000, "'" + 'x' * 299 + ' ...: File name too long'),
        ('a\nb', r"'a\nb': No such file or directory"),
    ],
)
def test_paths_that_the_system_refuses(path, message, capsys):
    with pytest.raises(SystemExit) as e:
        run_script('train.py', lambda: os.stat(path))
    assert e.value.code == 2 and capsys.readouterr().err == f'train.py: error: {message}\n'


def test_an_error_without_a_file_keeps_its_traceback():
    def main():
        raise OSError('of the program')

    with pytest.raises(OSError, match='of the program'):
        run_script('train.py', main)


def test_a_terminal_without_the_letters_gets_escapes():
    script = "from timm_mlcsd.errors import run_script; run_script('x', lambda: print('猫 ant'))"
    done = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, env={'PYTHONIOENCODING': 'ascii', 'PATH': ''}, timeout=100
    )
    assert done.returncode == 0 and done.stdout == b'\\u732b ant\n'
