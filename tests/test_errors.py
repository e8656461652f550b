"""What scripts show: one line for a mistake, and no text that the terminal would obey."""

import io
import logging
import os
import subprocess
import sys

import pytest

from timm_mlcsd.errors import UserError, one_line, printable, run_script
from timm_mlcsd.report import format_table

EVIL = 'cat\x1b]0;owned\x07\x1b[2J\u202egnp\r\x9b31m'
SHOWN = r'cat\x1b]0;owned\x07\x1b[2J\u202egnp\r\x9b31m'


def test_printable_keeps_letters_and_escapes_control():
    assert printable('größe 猫 naïve') == 'größe 猫 naïve'
    assert printable(EVIL) == SHOWN


def test_one_line_of_an_error_has_no_control_characters():
    assert one_line(ValueError('a\n  b \x1b[31m')) == r'a b \x1b[31m'
    assert one_line(ValueError('\x07' * 400), length=3) == r'\x07\x07\x07 ...'


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


def run_with_output(script, output, **env):
    """Exit code and stderr of a script in `run_script`."""
    script = f"from timm_mlcsd.errors import run_script; run_script('x', lambda: {script})"
    done = subprocess.run(
        [sys.executable, '-c', script], stdout=output, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
@pytest.mark.parametrize('unbuffered', ['', '1'])
@pytest.mark.parametrize('script', ["print('a')", "print('a', flush=True)", "print('a' * 100000)"])
def test_an_output_that_is_full_is_one_line(script, unbuffered):
    with open('/dev/full', 'w') as full:
        code, error = run_with_output(script, full, PYTHONUNBUFFERED=unbuffered)
    assert (code, error) == (2, 'x: error: the output cannot be written: No space left on device\n')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_a_full_output_does_not_hide_the_error_of_the_script():
    with open('/dev/full', 'w') as full:
        code, error = run_with_output("print('a') or open('missing')", full, PYTHONUNBUFFERED='')
    first, second = error.splitlines()
    assert code == 2 and first == "x: error: 'missing': No such file or directory" and 'No space left' in second


@pytest.mark.parametrize('script', ["print('a')", "print('a', flush=True)", "print('a') or exit(0)"])
def test_closing_the_pipe_early_is_no_error(script):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run_with_output(script, writer) == (1, '')
    finally:
        os.close(writer)
