"""validate.py --adaptive --against: an adaptive network beside networks without early exits."""

import json
import re

import pytest
import timm
from scripts import run

from timm_mlcsd import from_pretrained, save_pretrained
from timm_mlcsd.cli import validate
from timm_mlcsd.cost import exit_costs


@pytest.fixture
def flags(adaptive_run, folder):
    return [folder, '--checkpoint', adaptive_run, '--split', 'test', '--device', 'cpu', '-j', 0, '-b', 5, '--adaptive']


def small(path, **kwargs):
    model = timm.create_model('mlcsd_resnet18', exits=1, channels=(4, 4, 4, 4), small_input=True, **kwargs)
    save_pretrained(model, path, data_config=dict(input_size=(3, 24, 24)))
    return path


def test_table_record_plot_and_page(flags, adaptive_run, folder, tmp_path, capsys):
    other = small(tmp_path / 'small', num_classes=3)
    more = ['--against', adaptive_run, other, '--results-file', tmp_path / 'a.json', '--plot', tmp_path / 'a.png']
    assert run(validate.main, [*flags, *more, '--budget', '97%', '--report', tmp_path / 'a.html']) == 0
    assert re.search(r'^adaptive +\d', capsys.readouterr().out, re.M)
    results = json.loads((tmp_path / 'a.json').read_text())
    adaptive, plain, same, tiny = results['adaptive']['against']
    assert [row['name'] for row in (adaptive, plain, same, tiny)] == [
        'adaptive',
        'plain backbone',
        str(adaptive_run),
        str(other),
    ]
    # the network beside itself, without its exits
    assert (same['top1'], same['mmacs']) == (plain['top1'], plain['mmacs'])
    assert plain['top1'] == results['exits'][-1]['top1']
    assert adaptive['top1'] == results['adaptive']['adaptive']['Top-1 %'] and adaptive['mmacs'] < plain['mmacs']
    # at its own image size, with its own preprocessing
    alone = [folder, '--model', f'local-dir:{other}', '--split', 'test', '--device', 'cpu', '-j', 0, '-b', 5]
    assert run(validate.main, [*alone, '--results-file', tmp_path / 'b.json']) == 0
    assert tiny['top1'] == json.loads((tmp_path / 'b.json').read_text())['exits'][-1]['top1']
    assert tiny['mmacs'] == exit_costs(from_pretrained(other), (3, 24, 24))[0].macs / 1e6
    assert all(0 < row['ms_median'] <= row['ms_90'] <= row['ms_99'] for row in (adaptive, plain, same, tiny))
    data = json.loads(re.search(r'id="data">(.*?)</script>', (tmp_path / 'a.html').read_text(), re.DOTALL).group(1))
    assert [network['name'] for network in data['against']] == [str(adaptive_run), str(other)]


def test_mistakes(flags, tmp_path, capsys):
    other = small(tmp_path / 'ten', num_classes=10)
    cases = [
        ([*flags, '--against', other], 'expected a network of 3 classes, got 10'),
        (
            [*flags, '--against', tmp_path / 'none'],
            'expected a checkpoint, a folder, hf-hub:REPO, or the name of a network of timm',
        ),
        ([*flags, '--against', 'resnet18'], "--against 'resnet18' cannot be loaded"),
        ([*flags[:-1], '--against', other], '--against: only with --adaptive'),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert run(validate.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error
