"""Rows that leave and remain, as a GPU keeps them: the same code runs here, on a CPU."""

import pytest
import torch
from test_runtime import logits_of, spread
from test_stream import RAGGED, Layers, assert_like_predict
from torch.utils._python_dispatch import TorchDispatchMode

from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy, active


@pytest.mark.parametrize('score, aggregate', [('confidence', 'last'), ('margin', 'mean'), ('patience', 'last')])
def test_rows_that_the_device_finds_itself(score, aggregate, monkeypatch):
    """What runs on a GPU: the order of the remaining images differs from that on a CPU, the answers do not."""
    model = Layers()
    images = 3 * torch.randn(48, 3, 4, 4)
    logits = logits_of(model, images)
    policy = spread(logits, ExitPolicy([0.0] * 4, score, aggregate=aggregate), 5)
    if score == 'patience':  # the number at the first exit is always 1
        policy = policy.with_thresholds([2] * 4)
    adaptive = AdaptiveModel(model, policy, range(5))
    for size in (1, 16, RAGGED):
        batches = images.split(size)
        expected = [adaptive.predict(batch) for batch in batches]
        with monkeypatch.context() as patch:
            patch.setattr(active, '_is_on_host', lambda t: False)
            assert_like_predict([adaptive.predict(batch) for batch in batches], expected)
            for kwargs in ({}, dict(batch_size=7, max_waiting=20)):
                assert_like_predict(adaptive.predict_stream(batches, **kwargs), expected)


@pytest.mark.parametrize('off, waits', [((), 4), ({1, 2}, 2), ({0, 1, 2, 3}, 0)])
def test_one_wait_for_the_device_per_exit(off, waits, monkeypatch):
    model = Layers()
    images = 3 * torch.randn(48, 3, 4, 4)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 4), 5, off)
    adaptive = AdaptiveModel(model, policy, range(5))
    monkeypatch.setattr(active, '_is_on_host', lambda t: False)
    adaptive.predict(images)  # copies the costs to the device
    counted = Waits()
    inner = torch.Tensor.tolist
    with monkeypatch.context() as patch, counted:
        patch.setattr(torch.Tensor, 'tolist', lambda t: counted.calls.append('tolist') or inner(t))
        prediction = adaptive.predict(images)
    assert prediction.exit_index.max() == 4 and (prediction.exit_index.min() < 4) == bool(waits)
    assert counted.calls == ['tolist'] * waits


class Waits(TorchDispatchMode):
    """Operations for whose result the host waits, or that copy from the host."""

    NAMES = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique2', 'lift_fresh', '_to_copy', 'equal')

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition('::')[2]
        # a change of the data type alone stays on the device
        if name in self.NAMES and not (name == '_to_copy' and 'device' not in (kwargs or {})):
            self.calls.append(name)
        return func(*args, **(kwargs or {}))
