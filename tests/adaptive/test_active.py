"""Rows that leave and remain, as a GPU keeps them: the same code runs here, on a CPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_runtime import logits_of, spread
from test_stream import RAGGED, Layers, assert_like_predict
from torch.utils._python_dispatch import TorchDispatchMode

from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy, active, graphs
from timm_mlcsd.adaptive.trees import map_tensors, tensors_of


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


def recorded(run, inputs):
    """What `graphs._record` returns, without a GPU: every replay overwrites the same outputs."""
    outputs = map_tensors(run(inputs), torch.clone)

    def replay():
        for place, t in zip(tensors_of(outputs), tensors_of(run(inputs))):
            place.copy_(t)

    return graphs._Recorded(replay, inputs, outputs)


@pytest.fixture
def graphed(monkeypatch):
    """Early-exit inference, images for it, and the same with stages as graphs."""
    monkeypatch.setattr(graphs, '_record', recorded)
    model = Layers()
    images = 3 * torch.randn(48, 3, 4, 4)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 4, 'margin', aggregate='mean'), 5, {1})
    plain, with_graphs = (AdaptiveModel(model, policy, range(5)) for _ in range(2))
    with_graphs._run_exit = [graphs.GraphedStage(run) for run in with_graphs._run_exit]
    return plain, images, with_graphs


def test_graphs_of_few_sizes_answer_alike(graphed):
    plain, images, with_graphs = graphed
    for size in (1, 3, 16, 48, RAGGED):
        batches = images.split(size)
        expected = [plain.predict(batch) for batch in batches]
        # kept until the end: later replays must not change them
        assert_like_predict([with_graphs.predict(batch) for batch in batches], expected)
        assert_like_predict(with_graphs.predict_stream(batches, batch_size=7, max_waiting=20), expected)
    # 1, 2, 4, ... 64
    assert all(2 <= len(stage.graphs) <= 7 for stage in with_graphs._run_exit)
    # other images have graphs of their own
    larger = 3 * torch.randn(5, 3, 6, 6)
    assert_like_predict([with_graphs.predict(larger)], [plain.predict(larger)])


def test_threads_share_graphs(graphed):
    plain, _, with_graphs = graphed
    batches = [3 * torch.randn(n, 3, 4, 4) for n in (5, 7, 8, 6) * 25]
    expected = [plain.predict(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        assert_like_predict(list(pool.map(with_graphs.predict, batches)), expected)


def test_graphs_need_a_gpu():
    adaptive = AdaptiveModel(Layers(), ExitPolicy([0.5] * 4), range(5))
    with pytest.raises(ValueError, match='CUDA graphs need a network on a CUDA device, not on cpu'):
        adaptive.use_cuda_graphs()
