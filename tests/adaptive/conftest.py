"""Tests that export to ONNX are skipped with a PyTorch that is too old for the extra [onnx]."""

import pytest


@pytest.fixture(autouse=True, scope='module')
def skip_if_too_old(skip_onnx_export):
    pass
