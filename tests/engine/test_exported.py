"""validate.py --exported: what a folder of exported stages answers, beside the network that it was made of."""

import json

import pytest
import torch
from scripts import run

from timm_mlcsd.cli import export, validate

pytestmark = pytest.mark.usefixtures('skip_onnx_export')


@pytest.fixture
def flags(adaptive_run, folder):
    return [folder, '--checkpoint', adaptive_run / 'model_best.pth.tar', '--split', 'test', '--device', 'cpu', '-j', 0]


@pytest.mark.parametrize('format', ['onnx', 'torch'])
def test_same_answers(adaptive_run, flags, tmp_path, format, capsys):
    assert run(export.main, [adaptive_run, tmp_path / 'out', '--format', format]) == 0
    flags = [*flags, '--exported', tmp_path / 'out', '--results-file', tmp_path / 'a.json', '-b', 5]
    if format == 'torch':
        assert run(validate.main, flags) == 2 and 'can run code' in capsys.readouterr().err
        flags.append('--trust-exported')
    assert run(validate.main, flags) == 0
    assert 'of 12 images, 0 have another label and 0 another exit' in capsys.readouterr().out
    found = json.loads((tmp_path / 'a.json').read_text())['exported']
    assert found['top1'][0] == found['top1'][1] > 50 and found['macs'][0] == found['macs'][1]
    # float32 sums in another order
    assert found['num_images'] == 12 and 0 <= found['largest_difference'] < 1e-4


def test_other_answers_are_counted(adaptive_run, flags, tmp_path, capsys):
    assert run(export.main, [adaptive_run, tmp_path / 'out']) == 0
    manifest = json.loads((tmp_path / 'out' / 'manifest.json').read_text())
    del manifest['weights_digest'], manifest['policy']['weights_digest']
    (tmp_path / 'out' / 'manifest.json').write_text(json.dumps(manifest))
    other = tmp_path / 'other.pth.tar'
    checkpoint = torch.load(adaptive_run / 'model_best.pth.tar', weights_only=True)
    checkpoint['state_dict']['backbone.fc.bias'] += torch.tensor([9.0, 0.0, 0.0])
    checkpoint['state_dict']['heads.0.fc.bias'] += torch.tensor([9.0, 0.0, 0.0])
    torch.save(checkpoint, other)
    flags[2] = other
    assert run(validate.main, [*flags, '--exported', tmp_path / 'out']) == 0
    assert '0 have another label' not in capsys.readouterr().out


def test_mistakes(adaptive_run, flags, tmp_path, capsys):
    assert run(export.main, [adaptive_run, tmp_path / 'out']) == 0
    for argv, message in [
        ([*flags, '--exported', tmp_path], 'holds no exported stages'),
        ([*flags, '--trust-exported'], '--trust-exported: expected --exported FOLDER'),
        ([*flags, '--exported', tmp_path / 'out', '--crop-pct', 0.5], 'its crop_pct is 1.0, here crop_pct is 0.5'),
        ([*flags, '--exported', tmp_path / 'out', '--use-ema'], 'exported from other weights'),
    ]:
        capsys.readouterr()
        assert run(validate.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1
