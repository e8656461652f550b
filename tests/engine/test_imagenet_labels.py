"""validate.py --real-labels and --valid-labels, on a small folder with the names of ImageNet's validation images."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import run

from timm_mlcsd import save_pretrained
from timm_mlcsd.cli import validate
from timm_mlcsd.data import Preprocessing

CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bilinear')


@pytest.fixture
def network(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('mlcsd_test_resnet', exits=2, num_classes=6).eval()
    save_pretrained(model, tmp_path / 'net', data_config=CONFIG)
    return model


@pytest.fixture
def data(tmp_path):
    """12 images of 3 classes, named as those of ImageNet, with their class indices."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / 'data' / 'val' / 'abc'[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f'ILSVRC2012_val_{i + 1:08d}.JPEG')
    return tmp_path / 'data'


def logits_of(model, data):
    """Logits [2, 12, 6] in the order of the numbers in the names."""
    files = sorted(data.glob('*/*/*'), key=lambda path: path.name)
    with torch.no_grad():
        return torch.stack(model.forward_exits(torch.cat([Preprocessing(CONFIG)(f) for f in files])).logits)


def validated(tmp_path, data, *flags):
    argv = [data, '--model', f'local-dir:{tmp_path / "net"}', '--split', 'val', '-j', 0, '-b', 5, '--device', 'cpu']
    code = run(validate.main, [*argv, '--results-file', tmp_path / 'a.json', *flags])
    return code, json.loads((tmp_path / 'a.json').read_text())['exits'] if code == 0 else None


def test_real_labels(tmp_path, network, data):
    # several labels, one, and none
    real = [[i % 6, (i + 1) % 6][: i % 3] for i in range(12)]
    (tmp_path / 'real.json').write_text(json.dumps(real))
    code, exits = validated(tmp_path, data, '--real-labels', tmp_path / 'real.json')
    assert code == 0
    for row, logits in zip(exits, logits_of(network, data)):
        for key, k in (('top1', 1), ('top5', 5)):
            right = [bool(set(logits[i].topk(k).indices.tolist()) & set(real[i])) for i in range(12) if real[i]]
            assert row[key] == pytest.approx(100 * sum(right) / 8)


def test_valid_labels(tmp_path, network, data):
    (tmp_path / 'valid.txt').write_text('5\n1\n\n2\n')
    code, exits = validated(tmp_path, data, '--valid-labels', tmp_path / 'valid.txt')
    assert code == 0
    target = torch.arange(12) % 3
    for row, logits in zip(exits, logits_of(network, data)):
        assert row['top1'] == pytest.approx(100 * (logits[:, [1, 2, 5]].argmax(-1) == target).double().mean().item())
        assert row['top5'] == 100
    classes = json.loads((tmp_path / 'a.json').read_text())['classes']
    assert {row['index'] for row in classes} <= {1, 2, 5}
    assert sum(row['images'] for row in classes) == 12


def test_mistakes(tmp_path, network, data, capsys):
    (tmp_path / 'real.json').write_text(json.dumps([[0]] * 12))
    (tmp_path / 'short.json').write_text(json.dumps([[0]] * 11))
    for name, text in (('big', '6\n1'), ('word', '1\ntwo\n'), ('twice', '1\n1\n2'), ('one', '1')):
        (tmp_path / f'{name}.txt').write_text(text)
    cases = [
        (['--real-labels', tmp_path / 'none.json'], 'none.json'),
        (['--real-labels', tmp_path / 'short.json'], 'it has labels of 11 images, the split has 12'),
        (['--real-labels'], 'it has labels of 50000 images, the split has 12'),
        (['--valid-labels', tmp_path / 'big.txt'], "expected a class index from 0 to 5 per line, got '6'"),
        (['--valid-labels', tmp_path / 'word.txt'], "got 'two'"),
        (['--valid-labels', tmp_path / 'twice.txt'], 'at least two classes, each once; got 2 in 3 lines'),
        (['--valid-labels', tmp_path / 'one.txt'], 'got 1 in 1 lines'),
        (['--valid-labels', tmp_path / 'none.txt'], 'none.txt'),
        (['--real-labels', tmp_path / 'real.json', '--adaptive'], 'only without --adaptive'),
    ]
    for flags, message in cases:
        capsys.readouterr()
        assert validated(tmp_path, data, *flags)[0] == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1, error
    path = data / 'val' / 'a' / 'ILSVRC2012_val_00000001.JPEG'
    shutil.move(path, path.with_name('photo.JPEG'))
    assert validated(tmp_path, data, '--real-labels', tmp_path / 'real.json')[0] == 2
    assert 'expected files named as ILSVRC2012_val_00000001.JPEG, got photo.JPEG' in capsys.readouterr().err
    shutil.move(path.with_name('photo.JPEG'), path)
    path.write_bytes(b'damaged')
    assert validated(tmp_path, data, '--real-labels', tmp_path / 'real.json', '--max-bad-samples', 1)[0] == 2
    assert 'only 11 of 12 images can be read' in capsys.readouterr().err
