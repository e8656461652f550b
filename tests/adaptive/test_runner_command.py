"""``python runner.py`` in an exported folder: one line per image, one line per mistake, and never a traceback."""

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from test_runtime import make

from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.adaptive.export import export_stages

NAMES = ['ant', None, 'cat', 'dog', 'eel']


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp('exported') / 'out'
    export_stages(
        make('resnet18', exits=2, channels=(4, 6, 8, 10)),
        ExitPolicy([0.0]),
        folder,
        data_config=dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.2,) * 3),
        class_names=NAMES,
    )
    return folder


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    photo = Image.new('RGB', (50, 40), (250, 20, 20))
    for name in ('good.png', 'also good.jpg'):
        photo.save(folder / name)
    (folder / 'folder.png').mkdir()
    (folder / 'cut.png').write_bytes((folder / 'good.png').read_bytes()[:60])
    (folder / 'empty.png').touch()
    (folder / 'notes.txt').write_text('no image')
    Image.new('L', (65000, 1)).save(folder / 'long.png')
    header = io.BytesIO()
    Image.new('L', (1, 1)).save(header, 'BMP')
    huge = bytearray(header.getvalue())
    huge[18:26] = (60_000).to_bytes(4, 'little') * 2
    (folder / 'huge.bmp').write_bytes(huge)
    return folder


def run(folder, *argv, cwd=None, **env):
    done = subprocess.run(
        [sys.executable, str(folder / 'runner.py'), *map(str, argv)],
        cwd=cwd,
        env={**os.environ, 'PYTHONIOENCODING': 'utf-8', **env},
        capture_output=True,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert 'Traceback' not in err, err
    return done.returncode, out.splitlines(), err.splitlines()


def test_help_and_no_arguments(exported):
    code, out, err = run(exported, '--help')
    assert code == 0 and out[0] == 'usage: runner.py [-h] IMAGE [IMAGE ...]' and not err
    for argv in ([], ['--nonsense', 'x.png']):
        code, out, err = run(exported, *argv)
        assert code == 2 and not out and len(err) == 1 and err[0].startswith('runner.py: error: ')


def test_a_bad_file_is_one_line_and_the_others_are_answered(exported, files):
    bad = ['folder.png', 'missing.png', 'cut.png', 'empty.png', 'notes.txt', 'long.png', 'huge.bmp']
    code, out, err = run(exported, 'good.png', *bad, 'also good.jpg', cwd=files)
    assert code == 2
    assert [line.split(':')[0] for line in out] == ['good.png', 'also good.jpg']
    assert [line.split(': ')[:3] for line in err] == [['runner.py', 'error', name] for name in bad]
    assert 'it is a folder; give the image files in it' in err[0] and 'No such file' in err[1]
    assert '65000x1; expected sides that differ by a factor of at most 256' in err[5]
    assert run(exported, 'good.png', cwd=files)[0] == 0


@pytest.mark.parametrize(
    'name, shown, in_ascii',
    [
        ('ant', 'ant', 'ant'),
        ('a\x1b[2J', r'a\x1b[2J', r'a\x1b[2J'),
        ('猫', '猫', r'\u732b'),
        ('\ud800', r'\ud800', r'\ud800'),
    ],
)
def test_names_are_shown_as_they_can_be(exported, files, name, shown, in_ascii):
    path = exported / 'manifest.json'
    manifest = path.read_text()
    path.write_text(json.dumps(dict(json.loads(manifest), class_names=[name] * 5)))
    for encoding, expected in (('utf-8', shown), ('ascii', in_ascii)):
        code, (line,), err = run(exported, files / 'good.png', PYTHONIOENCODING=encoding)
        assert code == 0 and not err and line.count(f' {expected} ') == 3
    path.write_text(manifest)


def test_classes_without_a_name_are_numbers(exported, files):
    path = exported / 'manifest.json'
    manifest = json.loads(path.read_text())
    assert manifest['class_names'] == NAMES
    labels = run(exported, files / 'good.png')[1][0].split(': ')[1]
    best = [NAMES.index(part.split()[0]) if part.split()[0] in NAMES else 1 for part in labels.split(', ')[:3]]
    path.write_text(json.dumps(dict(manifest, class_names=[None] * 5)))
    labels = run(exported, files / 'good.png')[1][0].split(': ')[1]
    assert [int(part.split()[0]) for part in labels.split(', ')[:3]] == best
    path.write_text(json.dumps(manifest))


def test_file_names_are_escaped(exported, files, tmp_path):
    odd = 'a\x1b[2J\nb.png'
    shutil.copy(files / 'good.png', tmp_path / odd)
    code, out, err = run(exported, odd, '\x1b[31mmissing', cwd=tmp_path)
    assert code == 2 and out[0].startswith('a\\x1b[2J\\nb.png: ')
    assert len(err) == 1 and '\\x1b[31mmissing' in err[0] and '\x1b' not in err[0]


def test_a_folder_that_is_broken(exported, files, tmp_path):
    shutil.copytree(exported, tmp_path / 'out')
    for name in ('stage_1.onnx', 'manifest.json'):
        data = (tmp_path / 'out' / name).read_bytes()
        (tmp_path / 'out' / name).write_bytes(data[: len(data) // 2])
        code, out, err = run(tmp_path / 'out', files / 'good.png')
        assert code == 2 and not out and len([line for line in err if line.startswith('runner.py: error: ')]) == 1
        (tmp_path / 'out' / name).unlink()
        code, out, err = run(tmp_path / 'out', files / 'good.png')
        assert code == 2 and not out and name in ''.join(err)


def test_without_pillow(exported, files):
    code = 'import sys; sys.modules["PIL"] = None; sys.path.insert(0, "."); import runner; sys.exit(runner.main(["x"]))'
    done = subprocess.run([sys.executable, '-c', code], cwd=exported, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'pip install pillow' in done.stderr


def test_answers_come_one_by_one_after_a_first_run_that_is_not_timed(exported, files, monkeypatch, capsys):
    monkeypatch.syspath_prepend(exported)
    sys.modules.pop('runner', None)
    runner = __import__('runner')
    calls = []
    for name in ('warm_up', 'prepare', 'predict'):
        method = getattr(runner.AdaptiveModel, name)
        monkeypatch.setattr(
            runner.AdaptiveModel, name, lambda *args, name=name, method=method: (calls.append(name), method(*args))[1]
        )
    monkeypatch.setattr(
        'builtins.print', lambda *args, **kwargs: calls.append('print' if kwargs.get('flush') else 'not flushed')
    )
    assert runner.main([str(files / 'good.png')] * 2) == 0
    assert calls == ['warm_up', *['prepare', 'predict', 'print'] * 2]
    sys.modules.pop('runner', None)


def test_reading_the_first_lines_only_is_no_error(exported, files):
    with subprocess.Popen(
        [sys.executable, exported / 'runner.py', *[files / 'good.png'] * 20],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b''
    assert process.returncode == 1


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
def test_an_output_that_is_full_is_one_line(exported, files):
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, exported / 'runner.py', 'good.png'], cwd=files, stdout=full, stderr=subprocess.PIPE
        )
    message = b'runner.py: error: the output cannot be written: No space left on device\n'
    assert (done.returncode, done.stderr) == (2, message)
