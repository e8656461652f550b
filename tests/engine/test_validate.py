"""validate.py as a user runs it."""

import csv
import json

import pytest
import timm
import torch
from scripts import run

from timm_mlcsd.cli import validate
from timm_mlcsd.network import load_checkpoint


def test_validate_reports_every_exit(trained, folder, tmp_path, capsys):
    argv = ['--checkpoint', trained, '--split', 'test', '--workers', 0]
    plot = tmp_path / 'new' / 'plot.png'
    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.json', '--plot', plot]) == 0
    printed = capsys.readouterr().out
    assert '12 images of test, input 3x16x16' in printed and 'Overthinking %' in printed
    results = json.loads((tmp_path / 'r.json').read_text())
    assert [e['exit'] for e in results['exits']] == ['Ex1', 'Ex2', 'Ex3', 'Ex4']
    assert results['mean_top1'] == pytest.approx(sum(e['top1'] for e in results['exits']) / 4)
    assert results['exits'][-1]['rescued'] == 0 and results['num_samples'] == 12
    assert plot.read_bytes().startswith(b'\x89PNG')

    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.csv']) == 0
    rows = list(csv.DictReader((tmp_path / 'r.csv').open()))
    assert [float(r['top1']) for r in rows] == [e['top1'] for e in results['exits']]

    # the numbers are those of the network: recomputed from its logits
    checkpoint = load_checkpoint(trained / 'model_best.pth.tar')
    model = timm.create_model(checkpoint['arch'], **checkpoint['model_args']).eval()
    model.load_state_dict(checkpoint['state_dict'])
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    config = checkpoint['data_config']
    data = ImageFolder(str(folder / 'test'), Compose([ToTensor(), Normalize(config['mean'], config['std'])]))
    images, target = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    with torch.no_grad():
        right = torch.stack(model.forward_exits(images).logits).argmax(-1) == target
    assert [e['top1'] for e in results['exits']] == pytest.approx((100 * right.double().mean(1)).tolist())
    rescued = 100 * (right & ~right[-1]).double().mean(1)
    assert [e['rescued'] for e in results['exits']] == pytest.approx(rescued.tolist())
    assert right.float().mean() > 0.9


def test_validate_on_the_held_out_part(trained, tmp_path):
    argv = ['--checkpoint', trained / 'model_best.pth.tar', '--held-out', '--use-ema', '--workers', 0]
    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.json']) == 0
    results = json.loads((tmp_path / 'r.json').read_text())
    # training chose the best epoch by the averaged weights on these very images
    assert results['mean_top1'] == pytest.approx(load_checkpoint(trained / 'model_best.pth.tar')['metric'])
    assert results['num_samples'] == 5 and results['split'] == 'the held-out part of train'


def test_validate_a_folder_for_the_hub(trained, tmp_path):
    from timm.models import save_for_hf

    checkpoint = load_checkpoint(trained / 'model_best.pth.tar')
    model = timm.create_model(checkpoint['arch'], **checkpoint['model_args'])
    model.load_state_dict(checkpoint['state_dict'])
    save_for_hf(model, tmp_path / 'hub', model_args=checkpoint['model_args'], safe_serialization=True)
    data = [checkpoint['args']['data_dir'], '--split', 'test', '--workers', 0]
    size = ['--img-size', 16, '--crop-pct', 1]
    for i, source in enumerate((['--model', f'local-dir:{tmp_path / "hub"}', *size], ['--checkpoint', trained])):
        assert run(validate.main, [*data, *source, '--results-file', tmp_path / f'{i}.json']) == 0
    first, second = (json.loads((tmp_path / f'{i}.json').read_text())['exits'] for i in (0, 1))
    assert [e['loss'] for e in first] == pytest.approx([e['loss'] for e in second])
