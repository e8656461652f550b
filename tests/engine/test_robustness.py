"""validate.py --adaptive --corruptions: a policy of clean images on corrupted ones."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run
from torch.utils.data import Dataset

from timm_mlcsd import save_pretrained
from timm_mlcsd.adaptive import ExitPolicy, evaluate_policy
from timm_mlcsd.cli import validate
from timm_mlcsd.data import CORRUPTIONS, CorruptedImages, check_corruptions
from timm_mlcsd.engine.evaluator import LabelledLogits
from timm_mlcsd.engine.robustness import RiskLimit, corruption_table, describe_corruptions, risk_limit
from timm_mlcsd.errors import UserError
from timm_mlcsd.network import load_network

pytest.importorskip('imagecorruptions')


class Ramps(Dataset):
    """Three images of a ramp, the last of them broken."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        ramp = np.tile(np.arange(40, dtype=np.uint8)[:, None, None] * 6, (1, 40, 3))
        return None if index == 2 else (Image.fromarray(ramp), index)


def corrupted(name, severity=3):
    data = CorruptedImages(Ramps(), name, severity)
    data.transform = lambda image: np.asarray(image).transpose(2, 0, 1)
    return data


def test_names_are_those_of_the_package():
    import imagecorruptions

    names = imagecorruptions.get_corruption_names('common')
    assert tuple(names) == CORRUPTIONS


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_pixels_are_corrupted_image_by_image(name):
    state = np.random.get_state()[1].copy()
    data, clean = corrupted(name), np.asarray(Ramps()[0][0]).transpose(2, 0, 1)
    first, target = data[0]
    assert first.shape == (3, 40, 40) and first.dtype == np.uint8 and target == 0
    assert first.flags.writeable  # torch.from_numpy warns otherwise
    assert data[2] is None and len(data) == 3
    assert (first != clean).mean() > 0.02
    if name not in ('impulse_noise', 'glass_blur'):
        assert (data[0][0] == first).all()
    if 'noise' in name:  # another image has other noise
        assert (data[1][0] != first).any()
    assert (np.random.get_state()[1] == state).all()


def test_severity_matters():
    clean = np.asarray(Ramps()[0][0]).transpose(2, 0, 1).astype(int)
    change = [np.abs(corrupted('gaussian_noise', severity)[0][0] - clean).mean() for severity in (1, 3, 5)]
    assert change == sorted(change) and change[2] > 1.5 * change[0]


@pytest.mark.parametrize('size', [(3, 31, 40), (1, 64, 64)])
def test_what_cannot_be_corrupted(size):
    with pytest.raises(UserError, match=f'at least 32x32, got {size[0]} channels of {size[1]}x{size[2]}'):
        check_corruptions(size)


def test_a_missing_package(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'--corruptions needs imagecorruptions; .*\[corruptions\]'):
        check_corruptions((3, 32, 32))


def rows(*risks):
    names = ('none', 'fog', 'snow', 'frost')
    return [
        dict(corruption=n, last_top1=50.0, top1=50 - r, risk=r, half_width=0.5, macs_percent=60.0, against=[])
        for n, r in zip(names, risks)
    ]


def test_the_sentence_and_the_mean():
    text = describe_corruptions(rows(0.5, 0.9, 1.2, 3.0), RiskLimit('drop', 1.0))
    assert text.startswith('The drop is at most 1 points on 1 of 3 corruptions, above it on snow (1.20), frost (3.00);')
    assert describe_corruptions(rows(0.5, 0.9), RiskLimit('selective', 1.0)) == (
        'The share of wrong early answers is at most 1 points on 1 of 1 corruptions.'
    )
    assert 'no limit; the largest drop is 1.20 points (snow)' in describe_corruptions(rows(0.5, 0.9, 1.2), RiskLimit())
    # the row of clean images is not in the mean
    assert re.search(
        r'mean of the corruptions +50\.00 +48\.30 +1\.70 +60\.00', corruption_table(rows(9, 0.9, 1.2, 3), 'drop', [])
    )


def test_the_limit_is_the_certified_one():
    policy = ExitPolicy([0.9])
    assert risk_limit(policy, None, 'drop') == ('drop', None) and risk_limit(policy, 2.0, 'drop') == ('drop', 2.0)
    certificate = dict(risk='selective', limit=4.0, confidence=0.95, images=100, bound='betting')
    assert risk_limit(policy.certified(certificate), None, 'drop') == ('selective', 4.0)


def test_risks_against_their_definitions():
    from timm_mlcsd.engine.robustness import _losses

    torch.manual_seed(0)
    test = LabelledLogits(torch.randn(3, 200, 4), torch.randint(4, (200,)))
    result = evaluate_policy(*test, [1.0, 2.0, 3.0], ExitPolicy([0.6, 0.5]))
    last = test.logits[-1].argmax(-1)
    args = result.prediction, result.exit_index, last, test
    drop = (last == test.targets).double().mean() - (result.prediction == test.targets).double().mean()
    assert _losses(*args, 'drop').double().mean().item() == pytest.approx(drop.item())
    assert _losses(*args, 'disagreement').double().mean() == (result.prediction != last).double().mean()
    early = result.exit_index < 2
    assert 0 < early.sum() < 200
    wrong = (result.prediction != test.targets)[early].double().mean()
    assert _losses(*args, 'selective').double().mean() == wrong


@pytest.fixture
def flags(adaptive_run, folder):
    more = ['--split', 'test', '--device', 'cpu', '-j', 0, '-b', 5, '--img-size', 32, '--adaptive', '--budget', '97%']
    return [folder, '--checkpoint', adaptive_run, *more]


def test_table_and_record(flags, adaptive_run, tmp_path, capsys, monkeypatch):
    import imagecorruptions

    corrupt = imagecorruptions.corrupt

    def black_instead_of_contrast(pixels, severity, corruption_name):
        assert severity == 5
        return np.zeros_like(pixels) if corruption_name == 'contrast' else corrupt(pixels, severity, corruption_name)

    monkeypatch.setattr(imagecorruptions, 'corrupt', black_instead_of_contrast)
    network = load_network(str(adaptive_run))
    same = tmp_path / 'same'  # the run's own preprocessing has smaller images
    save_pretrained(network.model, same, data_config={**network.data_config, 'input_size': (3, 32, 32)})
    more = ['--corruptions', 'contrast', 'gaussian_noise', '--severity', 5, '--against', same, same]
    assert run(validate.main, [*flags, *more, '--results-file', tmp_path / 'a.json']) == 0
    out = capsys.readouterr().out
    assert 'Corrupted images, severity 5:' in out and re.search(r'^contrast +\d', out, re.M)
    results = json.loads((tmp_path / 'a.json').read_text())
    clean, contrast, noise = results['adaptive']['corruptions']
    assert [row['corruption'] for row in (clean, contrast, noise)] == ['none', 'contrast', 'gaussian_noise']
    assert clean['top1'] == results['adaptive']['adaptive']['Top-1 %']
    assert clean['last_top1'] == pytest.approx(results['exits'][-1]['top1'])
    for row in (clean, contrast, noise):
        assert row['risk'] == pytest.approx(row['last_top1'] - row['top1'])
        assert (
            row['against'] == [pytest.approx(row['last_top1'])] * 2
        )  # the same network beside itself, on the same pixels
    # one answer for all black images, right for the four of its class among twelve
    assert contrast['last_top1'] == pytest.approx(100 / 3) != clean['last_top1']


def test_mistakes(flags, capsys):
    cases = [
        ([*flags, '--corruptions', 'rain'], "invalid choice: 'rain'"),
        ([*flags, '--corruptions', 'fog', '--severity', 6], '--severity'),
        ([*flags, '--corruptions', 'fog', '--img-size', 24], 'at least 32x32, got 3 channels of 24x24'),
        ([*flags[:-3], '--corruptions', 'fog'], '--corruptions: only with --adaptive'),
        ([*flags, '--severity', 2], '--severity 2: expected --corruptions'),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert run(validate.main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error
