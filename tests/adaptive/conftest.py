"""Tests that export to ONNX are skipped with a PyTorch that is too old for the extra [onnx]."""

import pytest
import torch

from timm_mlcsd.adaptive import export

# the bound of the extra in setup.cfg: exporters before it cannot convert max pooling
OLDEST_TORCH = (2, 13)


@pytest.fixture(autouse=True, scope='module')
def skip_onnx_export():
    found = tuple(int(number) for number in torch.__version__.split('.')[:2])
    with pytest.MonkeyPatch.context() as patch:
        if found < OLDEST_TORCH:
            reason = f'torch {torch.__version__} cannot export to ONNX; the extra [onnx] needs 2.13'
            patch.setattr(export, '_write_onnx', lambda *_: pytest.skip(reason))
        yield
