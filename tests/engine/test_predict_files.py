"""mlcsd-predict: which images are labelled, and files of rows that must not be mixed or damaged."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from scripts import PREDICT_FLAGS as FLAGS
from scripts import rows_of, run

from timm_mlcsd.cli import predict
from timm_mlcsd.engine.prediction import find_images, predictor
from timm_mlcsd.engine.prediction.output import OutputFile, record_path
from timm_mlcsd.errors import UserError
from timm_mlcsd.network import load_network


def open_output(path, resume=True):
    return OutputFile(path, dict(name=str, exit=int), dict(topk=1), resume)


def test_a_file_is_labelled_once_by_its_place(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ('deep/sub', '.', 'deep'):
        os.makedirs(place, exist_ok=True)
        shutil.copy(images / 'red' / '0.png', f'{place}/x.png')
    os.symlink('deep/sub', 'lnk')
    os.symlink('x.png', 'y.png')
    inputs = ['x.png', 'lnk/../x.png', 'y.png', './x.png', 'deep/x.png', 'lnk/x.png', 'deep/sub', 'lnk/*.png']
    assert find_images(inputs) == ['x.png', 'lnk/../x.png', 'y.png', 'lnk/x.png']


def test_patterns_leave_out_what_folders_leave_out(images, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    places = ('mac', 'mac/__MACOSX', 'mac/a/@eaDir/b', 'mac/.hid', '.typed', '.typed/__MACOSX')
    for place in places:
        os.makedirs(place)
        shutil.copy(images / 'red' / '0.png', f'{place}/x.png')
    for pattern, expected, hidden in (
        ('mac/**/*.png', ['mac/x.png'], 2),
        ('mac/*/*.png', None, 1),
        ('mac/**', ['mac/x.png'], 2),
        ('*/**/x.png', ['mac/x.png'], 2),
        ('mac/__MACOSX/*.png', ['mac/__MACOSX/x.png'], 0),
        ('./mac//**/@eaDir/**/*.png', ['./mac/a/@eaDir/b/x.png'], 0),
        ('.typed/**/*.png', ['.typed/x.png'], 1),
        ('.ty*/*.png', ['.typed/x.png'], 0),
        (f'{tmp_path}/.typed/*.png', [f'{tmp_path}/.typed/x.png'], 0),
    ):
        caplog.clear()
        if expected is None:
            with pytest.raises(UserError, match=f'no file of this pattern is an image.*; {hidden} hidden left out'):
                find_images([pattern])
            continue
        assert find_images([pattern]) == expected, pattern
        assert (f'{pattern}: left out {hidden} hidden; images end in' in caplog.text) == bool(hidden), pattern
        assert len(caplog.records) == bool(hidden)


def nan_for_red(load):
    """The loader of a network that answers red images with NaN."""

    def damage(module, inputs, logits):
        red, green, blue = inputs[0].mean((2, 3)).unbind(1)
        return logits.masked_fill(((red > green) & (red > blue))[:, None], float('nan'))

    def loaded(config):
        network = load(config)
        network.model.register_forward_hook(damage)
        return network

    return loaded


@pytest.mark.parametrize('ending', ['csv', 'jsonl', 'parquet'])
@pytest.mark.parametrize('output_type', ['prob', 'logit'])
def test_logits_that_are_not_finite_are_no_answer(
    adaptive_run, images, tmp_path, ending, output_type, capsys, monkeypatch
):
    monkeypatch.setattr(predictor, 'load', nan_for_red(predictor.load))
    out = tmp_path / f'a.{ending}'
    argv = [adaptive_run, images, '--output', out, '--no-policy', '--output-type', output_type, *FLAGS]
    assert run(predict.main, argv) == 2
    printed = capsys.readouterr()
    assert '4 images cannot be labelled' in printed.err and 'the logits of the network are not finite' in printed.err
    assert '8 images labelled; 4 that cannot be labelled' in printed.out
    assert [os.path.basename(os.path.dirname(row['filename'])) for row in rows_of(out)] == ['blue'] * 4 + ['green'] * 4
    record = json.loads(record_path(out).read_text())
    assert record['answered'] == sum(record['exits']) == 8 and record['unreadable'] == 4
    assert all('red' in name for name in record['unreadable_images'])
    assert run(predict.main, [*argv, '--resume', '--max-bad-samples', 4]) == 0
    assert len(rows_of(out)) == 8


def test_logits_that_are_not_finite_in_the_terminal(adaptive_run, images, capsys, monkeypatch):
    monkeypatch.setattr(predict, 'load', nan_for_red(predict.load))
    assert run(predict.main, [adaptive_run, images, '--no-policy']) == 2
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 + 8 and 'nan' not in printed.out
    assert '4 of 12 images' in printed.err and 'the logits of the network are not finite' in printed.err
    assert run(predict.main, [adaptive_run, images, '--no-policy', '--max-bad-samples', 4]) == 0


def test_json_has_no_nan(tmp_path):
    with open_output(tmp_path / 'a.jsonl') as output, pytest.raises(ValueError, match='JSON'):
        output.write([['a', float('nan')]])


def test_rows_of_other_preprocessing_or_names_are_not_mixed(adaptive_run, images, tmp_path, capsys, monkeypatch):
    argv = [adaptive_run, images, '--output', tmp_path / 'a.csv', '--resume', *FLAGS]
    load = predictor.load
    network = load_network(adaptive_run)
    config, names = network.data_config, network.class_names
    assert run(predict.main, argv) == run(predict.main, argv) == 0
    for change, message in (
        (
            dict(data_config={**config, 'mean': (0.1, 0.2, 0.3)}),
            r'it was made with mean \[.*\], this would be \[0.1, 0.2',
        ),
        (
            dict(data_config={**config, 'crop_pct': 0.5}),
            'it was made with crop_pct .*, this would be 0.5; use the same',
        ),
        (
            dict(data_config={**config, 'input_img_mode': 'L'}),
            'it was made with input_img_mode null, this would be "L"',
        ),
        (dict(class_names=names[::-1]), 'it was made with class_names "sha256:'),
    ):
        monkeypatch.setattr(predictor, 'load', lambda c, change=change: load(c)._replace(**change))
        assert run(predict.main, argv) == 2, change
        assert re.search(message, capsys.readouterr().err)
    monkeypatch.setattr(predictor, 'load', lambda c: load(c)._replace(class_names=names[::-1]))
    out = tmp_path / 'b.csv'
    assert run(predict.main, [*argv[:3], out, *argv[4:], '--label-type', 'none']) == 0
    monkeypatch.setattr(predictor, 'load', load)
    # the rows have no names
    assert run(predict.main, [*argv[:3], out, *argv[4:], '--label-type', 'none']) == 0
    with OutputFile(tmp_path / 'd.csv', dict(name=str, exit=int), dict(topk=1, mode='L'), False):
        pass
    with (
        pytest.raises(UserError, match='it was made with mode "L", this would be null'),
        open_output(tmp_path / 'd.csv'),
    ):
        pass


def test_a_file_in_use_and_a_damaged_one(tmp_path):
    path = tmp_path / 'a.csv'
    with open_output(path) as output:
        output.write([['a', 1], ['b, "c"\nd', 2]])
        code = (
            f'from pathlib import Path; from timm_mlcsd.engine.prediction.output import OutputFile\n'
            f'OutputFile(Path({str(path)!r}), dict(name=str, exit=int), dict(topk=1), True).__enter__()'
        )
        other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert 'is in use by process' in other.stderr
    with open_output(path) as output:
        assert output.done == {'a', 'b, "c"\nd'} and output.exits == {1: 1, 2: 1}
    path.write_text('name,exit\na\nb,2\n')
    with pytest.raises(UserError, match='its row 2 is not one'), open_output(path):
        pass
    assert path.read_text() == 'name,exit\na\nb,2\n'
    path = tmp_path / 'a.jsonl'
    with open_output(path) as output:
        output.write([['a', 1]])
    for text in ('{"name": ["a"], "exit": 1}\n{}\n', '{"file": "a", "exit": 1}\n{}\n', '[1, 2]\n{}\n'):
        path.write_text(text)
        with pytest.raises(UserError, match='its row 1 is not one'), open_output(path):
            pass


@pytest.mark.parametrize('ending', ['csv', 'jsonl'])
def test_every_text_is_read_back(tmp_path, ending):
    texts = [
        a + b + c for a in ('\r', '\n', '"', ',', '') for b in ('\r', '\n', '"', 'x') for c in ('\r', ' ', '"', '')
    ]
    path = tmp_path / f'a.{ending}'
    kinds = {'na\rme': str, 'label': str, 'exit': int}
    with OutputFile(path, kinds, {}, True) as output:
        output.write([[text, text, 1] for text in texts])
    with OutputFile(path, kinds, {}, True) as output:
        assert output.done == set(texts) and output.exits == {1: len(texts)}
    rows = rows_of(path)
    assert [row['na\rme'] for row in rows] == [row['label'] for row in rows] == texts


def test_class_names_with_bytes_that_are_no_text(adaptive_run, images, tmp_path):
    """A folder of a Latin-1 archive has such a name."""
    checkpoint = torch.load(adaptive_run / 'model_best.pth.tar', weights_only=True)
    checkpoint['class_names'] = [os.fsdecode(b'caf\xe9'), 'green', 'red']
    path = tmp_path / 'other.pth.tar'
    torch.save(checkpoint, path)
    for ending in ('.csv', '.jsonl', '.parquet'):
        output = tmp_path / f'a{ending}'
        assert run(predict.main, [path, images, '--output', output, '--no-policy', '--topk', 3, *FLAGS]) == 0
        found = {value for row in rows_of(output) for value in str(row).replace("'", '"').split('"')}
        assert any(name.replace('\\\\', '\\') == r'caf\udce9' for name in found), ending


def test_digits_that_are_no_numbers(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    for name in ('2\u00b23.png', '10.png', '9.png', '\u0663.png'):  # a superscript, and an Arabic 3
        shutil.copy(images / 'red' / '0.png', name)
    assert find_images(['*.png']) == ['2\u00b23.png', '\u0663.png', '9.png', '10.png']
