"""A small folder of images and a network that trains on it in seconds."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import run

from timm_mlcsd.adaptive import ExitPolicy
from timm_mlcsd.cli import train
from timm_mlcsd.data import Preprocessing
from timm_mlcsd.network import load_network

SMALL = (
    '--model mlcsd_resnet18 --model-kwargs channels=(8,8,8,8) --exits 4 --small-input --img-size 16 --crop-pct 1 '
    '--exit-head slic --epochs 2 --batch-size 8 --workers 0 --lr 0.02 --warmup-epochs 0 --alpha 1 --beta 1 '
    '--smoothing 0 --train-crop-mode pad4 --color-jitter 0 --device cpu'
).split()


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """Three colours to tell apart: train (48 images) and test (12), noisy and 16x16."""
    root = tmp_path_factory.mktemp('colours')
    random = np.random.default_rng(0)
    for split, count in (('train', 16), ('test', 4)):
        for channel, name in enumerate(('red', 'green', 'blue')):
            path = root / split / name
            path.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(path / f'{i}.png')
    return root


@pytest.fixture
def images(folder, tmp_path):
    """A folder of 12 images in folders of classes, without splits."""
    path = tmp_path / 'images'
    shutil.copytree(folder / 'test', path)
    return path


@pytest.fixture(scope='session')
def small_flags():
    return SMALL


@pytest.fixture
def small(folder, tmp_path):
    """Command line of a small run into tmp_path/run."""
    return [str(folder), *SMALL, '--output', str(tmp_path), '--experiment', 'run']


@pytest.fixture(scope='session')
def trained(folder, small_flags, tmp_path_factory):
    """One run that learns the colours."""
    out = tmp_path_factory.mktemp('trained')
    where = ['--output', out, '--experiment', 'run', '--checkpoint-hist', 2]
    assert run(train.main, [folder, *small_flags, *where, '--epochs', 6, '--model-ema', '--model-ema-decay', 0.5]) == 0
    return out / 'run'


@pytest.fixture(scope='session')
def adaptive_run(folder, trained, tmp_path_factory):
    """The trained run with a policy by which images leave at different exits."""
    path = tmp_path_factory.mktemp('adaptive') / 'run'
    shutil.copytree(trained, path)
    network = load_network(path)
    read = Preprocessing(network.data_config)
    batch = torch.cat([read(file) for file in sorted((folder / 'test').glob('*/*.png'))])
    with torch.no_grad():
        exits = [logits.softmax(-1).amax(-1) for logits in network.model.forward_exits(batch).logits[:-1]]
    thresholds = [confidence.quantile(0.6).item() for confidence in exits]
    policy = ExitPolicy(thresholds, exit_names=network.model.exit_names).for_weights(network.model)
    policy.save(path / 'exit_policy.json')
    return path
