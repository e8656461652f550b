"""From a trained checkpoint to labels for a photo, by way of the Hub or without it."""

import os
import re
import subprocess
import sys

import pytest
from hub_server import hub_server
from scripts import run

from timm_mlcsd.cli import predict


@pytest.fixture
def photo(folder):
    return folder / 'test' / 'red' / '0.png'


def test_labels_of_a_photo(trained, photo, capsys):
    last = trained / 'last.pth.tar'
    assert run(predict.main, [last, photo, '--topk', 2]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split() == ['Image', 'Labels', 'Exit', 'ms']
    labels = row.split('  ')[1].split(', ')
    assert labels[0].startswith('red ') and len(labels) == 2
    assert row.split()[-2] == 'Ex4' and float(row.split()[-1]) > 0
    assert run(predict.main, [last, photo, '--threshold', 0]) == 0
    assert ' Ex1 ' in capsys.readouterr().out


def test_push_then_predict_from_the_hub(trained, photo, tmp_path):
    with hub_server() as server:
        environment = dict(os.environ, HF_ENDPOINT=server.address, HF_HOME=str(tmp_path), HF_HUB_OFFLINE='0')
        environment.update(HF_TOKEN='hf_' + 'x' * 34, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')

        def command(module, *argv):
            command = [sys.executable, '-m', f'timm_mlcsd.cli.{module}', *map(str, argv)]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)

        pushed = command('push', trained / 'model_best.pth.tar', 'me/colours', '--private')
        assert pushed.returncode == 0 and '/me/colours/commit/' in pushed.stdout, pushed.stderr
        assert 'HTTP' not in pushed.stderr  # requests are not listed
        card = server.repos['me/colours']['files']['README.md'].decode()
        assert 'Top-1 on the 5 images that chose the epoch.' in card and '| `alpha` | `1.0` |' in card
        there, here = (
            command('predict', source, photo) for source in ('hf-hub:me/colours', trained / 'model_best.pth.tar')
        )
        assert there.returncode == 0, there.stderr
        labels = [re.findall(r'\S+ [\d.]+%|Ex\d+', run.stdout) for run in (there, here)]
        assert labels[0] == labels[1] != []  # all but the milliseconds

        missing = command('predict', 'hf-hub:me/nothing', photo)
        assert missing.returncode == 2 and 'Traceback' not in missing.stderr
        assert "mlcsd-predict: error: 'hf-hub:me/nothing' cannot be loaded" in missing.stderr


def test_mistakes(trained, photo, tmp_path, capsys):
    (tmp_path / 'text.jpg').write_text('no image')
    for argv, message in (
        (['/nowhere', photo], "no checkpoint at '/nowhere'"),
        ([trained, tmp_path / 'text.jpg'], 'cannot be read as an image'),
        ([trained, tmp_path / 'none.jpg'], 'cannot be read as an image'),
        ([trained, photo, '--threshold', 2], "argument --threshold: expected a number from 0 to 1, got '2'"),
        ([trained, photo, '--device', 'nonsense'], '--device nonsense cannot be used'),
    ):
        assert run(predict.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and 'Traceback' not in error
