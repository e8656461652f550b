"""Shared helpers: everything is seeded, offline and small."""

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch

from timm_mlcsd.adaptive import export

# the bound of the extra in setup.cfg: exporters before it cannot convert max pooling
OLDEST_ONNX_TORCH = (2, 13)


def pytest_configure(config):
    """All tests but those of the GPU run on the CPU, where there is a GPU too: their tolerances are a CPU's."""
    if config.getoption('markexpr') != 'gpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def onnx_needs():
    """Why this PyTorch cannot export to ONNX; None if it can."""
    found = tuple(int(number) for number in torch.__version__.split('.')[:2])
    if found < OLDEST_ONNX_TORCH:
        return f'torch {torch.__version__} cannot export to ONNX; the extra [onnx] needs 2.13'
    return None


@pytest.fixture(scope='module')
def skip_onnx_export(onnx_needs):
    """Exports to ONNX skip their test if this PyTorch is too old for them."""
    with pytest.MonkeyPatch.context() as patch:
        if onnx_needs:
            patch.setattr(export, '_write_onnx', lambda *_: pytest.skip(onnx_needs))
        yield
