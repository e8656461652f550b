"""Files of earlier versions of the package load, and mean what they meant."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import timm_mlcsd
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy
from timm_mlcsd.cli import train, validate
from timm_mlcsd.network import load_checkpoint, load_network

OLD = sorted(path for path in Path(__file__).parent.iterdir() if (path / 'expected.json').is_file())
# float32 sums in another order, through some ten layers
CLOSE = dict(rtol=1e-4, atol=1e-4)

pytestmark = pytest.mark.parametrize('old', OLD, ids=lambda path: path.name)


def expected(old):
    return json.loads((old / 'expected.json').read_text())


def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def assert_logits(model, old):
    with torch.inference_mode():
        logits = model.eval().forward_exits(images()).logits
    for ours, theirs in zip(logits, expected(old)['logits'], strict=True):
        torch.testing.assert_close(ours, torch.tensor(theirs), **CLOSE)


def test_checkpoint(old):
    network = load_network(old / 'run' / 'last.pth.tar')
    assert_logits(network.model, old)
    assert network.class_names == [str(digit) for digit in range(10)]
    assert network.data_config['input_size'] == (3, 16, 16)


def test_saved_folder(old):
    assert_logits(timm_mlcsd.from_pretrained(str(old / 'hub')), old)
    assert load_network(old / 'hub').class_names == [str(digit) for digit in range(10)]


@pytest.mark.parametrize('folder', ['run', 'hub'])
def test_policy(old, folder):
    network = load_network(old / 'run' / 'last.pth.tar')
    policy = ExitPolicy.load(old / folder / 'exit_policy.json')
    prediction = AdaptiveModel(network.model, policy).predict(images())
    assert prediction.exit_index.tolist() == expected(old)['exit_index']
    torch.testing.assert_close(prediction.logits, torch.tensor(expected(old)['prediction']), **CLOSE)


def test_exported_folder(old):
    ours = pytest.importorskip('timm_mlcsd.adaptive.export.onnx_runner', exc_type=ImportError)
    spec = importlib.util.spec_from_file_location('old_runner', old / 'exported' / 'runner.py')
    runner = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = runner  # NamedTuple looks its module up
    spec.loader.exec_module(runner)
    for module in (runner, ours):
        prediction = module.AdaptiveModel(old / 'exported').predict(images().numpy())
        assert prediction.exit_index.tolist() == expected(old)['exit_index']
        np.testing.assert_allclose(prediction.logits, expected(old)['prediction'], **CLOSE)


def test_run_goes_on(old, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(old / 'run', run)
    flags = ['--config', run / 'args.yaml', '--output', tmp_path, '--experiment', 'run', '--resume', run]
    train.main([str(flag) for flag in [*flags, '--epochs', 9, '--device', 'cpu']])
    assert load_checkpoint(run)['epoch'] == 8
    assert len((run / 'summary.csv').read_text().splitlines()) == 10


def test_validation(old, tmp_path):
    results = tmp_path / 'results.json'
    checkpoint = old / 'run' / 'last.pth.tar'
    flags = ['--checkpoint', checkpoint, '--split', 'test', '-j', 0, '--device', 'cpu', '--results-file', results]
    validate.main([str(flag) for flag in flags])
    top1 = [row['top1'] for row in json.loads(results.read_text())['exits']]
    # one of the 360 images may fall on the other side
    assert top1 == pytest.approx(expected(old)['top1'], abs=0.3)
