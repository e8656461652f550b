"""A stream answers as `predict` does, on fuller batches."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_runtime import Given, given_runner, images_for, logits_of, make, on_the_edge, spread

import timm_mlcsd
from timm_mlcsd.adaptive import AGGREGATES, SCORES, AdaptiveModel, ExitPolicy, fit_weights
from timm_mlcsd.adaptive.active import CostTable
from timm_mlcsd.adaptive.stream import HELD, WAITING, Stream

INF = math.inf
RAGGED = [5, 1, 16, 2, 9, 7, 1, 1, 6]


def assert_like_predict(found, expected, tolerance=1e-4):
    found, expected = list(found), list(expected)
    assert [len(p.logits) for p in found] == [len(p.logits) for p in expected]
    for one, other in zip(found, expected):
        assert torch.equal(one.exit_index, other.exit_index) and torch.equal(one.cost, other.cost)
        assert not one.logits.requires_grad
        torch.testing.assert_close(one.logits, other.logits, rtol=tolerance, atol=tolerance, equal_nan=True)


class Layers(timm_mlcsd.MultiExitModel):
    """Five exits with random weights; the state is nested, holds None and grows."""

    num_exits, exit_names, num_classes, feature_dim, probe_size = 5, list('abcde'), 4, 8, (3, 4, 4)

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.randn(5, 8, 8, generator=generator) / 2
        self.heads = torch.randn(5, 8, 4, generator=generator)

    def run_stage(self, k, state):
        if k == 0:
            features = state.mean((2, 3)).repeat(1, 3)[:, :8]
            return ((4 * features, None), (state,), ())
        (x, _), images, earlier = state
        return ((torch.tanh(x @ self.layers[k]) + x, None), images, (*earlier, x))

    def run_head(self, k, state):
        (x, _), (images,), earlier = state
        # every part of the state counts
        return (x + sum(earlier, images.amax((1, 2, 3))[:, None])) @ self.heads[k] / 2, x


@pytest.mark.parametrize('score, aggregate', list(itertools.product(SCORES, AGGREGATES)))
def test_answers_are_those_of_predict(score, aggregate):
    model = Layers()
    images = 3 * torch.randn(48, 3, 4, 4)
    logits = logits_of(model, images)
    weights = fit_weights(logits, torch.arange(48) % 4) if aggregate == 'fitted' else None
    base = ExitPolicy([0.0] * 4, score, [1.3, 1.2, 1.0, 0.9, 0.8], aggregate, weights)
    seed = 12 * SCORES.index(score) + AGGREGATES.index(aggregate)
    for size, off in itertools.product((1, 3, 16, RAGGED), ((), {1}, {0, 2})):
        seed += 1
        policy = spread(logits, base, seed, off)
        if score == 'patience':  # the number at the first exit is always 1
            policy = policy.with_thresholds([INF if k in off else 2 for k in range(4)])
        adaptive = AdaptiveModel(model, policy, range(5))
        batches = images.split(size)
        expected = [adaptive.predict(batch) for batch in batches]
        exits = torch.cat([p.exit_index for p in expected])
        assert len(exits.unique()) > 1
        for kwargs in ({}, dict(batch_size=7), dict(batch_size=16, max_waiting=20)):
            found = list(adaptive.predict_stream(batches, **kwargs))
            same = torch.cat([p.exit_index for p in found]) == exits
            if same.all():
                assert_like_predict(found, expected)
            else:
                assert on_the_edge(logits, policy, same)


def test_a_timm_backbone():
    model = make(exits=3).to(memory_format=torch.channels_last)
    images = images_for(model, 30).to(memory_format=torch.channels_last)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 2, aggregate='mean'), seed=1)
    adaptive = AdaptiveModel(model, policy, range(3))
    expected = [adaptive.predict(batch) for batch in images.split(6)]
    seen = []

    def look(state, run):
        seen.append(state.is_contiguous(memory_format=torch.channels_last))
        return run(state)

    adaptive._run_exit = [lambda state, run=run: look(state, run) for run in adaptive._run_exit]
    assert_like_predict(adaptive.predict_stream(images.split(6)), expected, 1e-3)
    assert len(seen) > 5 and all(seen)  # the memory format stays


class Told(timm_mlcsd.MultiExitModel):
    """Four exits; an image [2, H, W] says at which one it leaves, and holds a number that its logits repeat."""

    num_exits, exit_names, num_classes, feature_dim, probe_size = 4, list('abcd'), 3, 2, (2, 1, 1)

    def __init__(self):
        super().__init__()
        self.turn = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        self.calls, self.num_left = [], 0

    def run_stage(self, k, state):
        images, (numbers, _) = (state, (state[:, :, 0, 0], None)) if k == 0 else state
        self.calls.append((k, len(images)))
        return images, (numbers @ self.turn.to(images.dtype), None)

    def run_head(self, k, state):
        images, (numbers, _) = state
        leaves = images[:, 0, 0, 0] <= k
        self.num_left += int(leaves.sum())
        sure = torch.where(leaves, 20.0, 0.0).to(images.dtype)
        return torch.stack([sure, torch.zeros_like(sure), numbers[:, 1].to(images.dtype) - 500], dim=1), images

    def calls_of(self, predict):
        self.calls.clear()
        self.num_left = 0
        result = list(predict())
        return list(self.calls), result


def told(exits, size=1, dtype=torch.float32):
    """Images that leave at the given exits, numbered."""
    exits = torch.as_tensor(exits)
    images = torch.stack([exits, torch.arange(len(exits))], dim=1).to(dtype)
    return images[:, :, None, None].expand(-1, -1, size, size).contiguous()


def told_model(**kwargs):
    model = Told()
    return model, AdaptiveModel(model, ExitPolicy([0.9] * 3, **kwargs), range(4))


def test_order_and_time_of_the_answers():
    _, adaptive = told_model()
    # batches of two: 0 at once; 1 waits for one more image at the last stage, which batch 3 brings; 2 for batch 1
    batches = told([0, 0, 0, 3, 0, 0, 1, 3, 0, 2]).split(2)
    pulled, times = [], []

    def iterate():
        for i, batch in enumerate(batches):
            pulled.append(i)
            yield batch

    found = []
    for prediction in adaptive.predict_stream(iterate()):
        times.append(len(pulled))
        found.append(prediction)
    assert times == [1, 4, 4, 4, 5]
    assert [p.exit_index.tolist() for p in found] == [[0, 0], [0, 3], [0, 0], [1, 3], [0, 2]]
    numbers = torch.cat([p.logits[:, 2] for p in found]) + 500
    assert numbers.tolist() == list(range(10))


def test_late_stages_run_on_full_batches():
    model, adaptive = told_model()
    images = told([0, 0, 1, 2, 0, 3, 1, 0] * 41 + [3])  # at the end, images wait in front of several stages
    batches = images.split(16)
    often, expected = model.calls_of(lambda: (adaptive.predict(batch) for batch in batches))
    rarely, found = model.calls_of(lambda: adaptive.predict_stream(batches, max_waiting=1000))
    assert_like_predict(found, expected)
    for k in range(4):
        sizes = [n for j, n in rarely if j == k]
        assert sum(sizes) == sum(n for j, n in often if j == k)
        assert all(n >= 16 for n in sizes[:-1])  # the last run takes what is left at the end
        assert len(sizes) <= sum(sizes) // 16 + 1
    assert len(rarely) < 0.6 * len(often)
    single = images.split(1)
    calls, found = model.calls_of(lambda: adaptive.predict_stream(single, batch_size=16))
    assert calls == rarely and torch.equal(torch.cat([p.exit_index for p in found]), images[:, 0, 0, 0].long())


@pytest.mark.parametrize('max_waiting', [0, 5, 40, None])
def test_a_bounded_number_of_images_waits(max_waiting):
    model, adaptive = told_model()
    batches = told(torch.randint(0, 4, (480,))).split(16)
    waiting = []

    def iterate():
        for i, batch in enumerate(batches):
            waiting.append(16 * i - model.num_left)
            yield batch

    calls, found = model.calls_of(lambda: adaptive.predict_stream(iterate(), max_waiting=max_waiting))
    assert len(found) == 30
    limit = WAITING * 16 if max_waiting is None else max_waiting
    assert max(waiting) <= limit
    if max_waiting == 0:
        assert calls == model.calls_of(lambda: map(adaptive.predict, batches))[0]
    else:
        assert max(waiting) > min(limit, 45) / 2  # three stages hold less than 48


def test_waiting_images_hold_no_memory_of_others():
    _, adaptive = told_model()
    stream = Stream(adaptive._run_exit, adaptive.policy, CostTable(adaptive.costs), adaptive._check_mode)
    for batch in told([0, 0, 0, 1, 0, 2, 0, 0] * 3, size=4).split(8):
        stream.add(batch)
    tensors = [t for queue in stream.waiting for b in queue for t in (b.state[0], b.state[1][0])]
    assert stream.counts == [0, 6, 0, 0]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in tensors)
    assert sum(len(t) for t in tensors) == 2 * sum(stream.counts)
    assert len(stream.finish()) == 3 and not stream.open and not any(stream.counts)


def test_a_rare_late_image_does_not_hold_the_answers_for_ever():
    _, adaptive = told_model()
    batches = itertools.chain([told([0, 3, 0, 0])], itertools.repeat(told([0] * 4), 100))
    pulled = itertools.count()
    stream = adaptive.predict_stream((batch for batch, _ in zip(batches, pulled)), max_waiting=2)
    assert next(stream).exit_index.tolist() == [0, 3, 0, 0]
    assert next(pulled) == HELD * 2 // 4 + 1


def test_other_images_wait_apart():
    model, adaptive = told_model()
    exits = [[0, 3], [2, 1, 3], [1, 3], [3], [3, 2], [3, 3]]
    kinds = [(1, torch.float32), *2 * [(2, torch.float32)], (2, torch.float64), *2 * [(1, torch.float32)]]
    batches = [told(leave, *kind) for leave, kind in zip(exits, kinds)]
    expected = [adaptive.predict(batch) for batch in batches]
    for batch_size in (None, 1, 4, 9):
        calls, found = model.calls_of(lambda n=batch_size: adaptive.predict_stream(batches, batch_size=n))
        assert_like_predict(found, expected)
        assert [p.logits.dtype for p in found] == [p.logits.dtype for p in expected]
        assert batch_size != 9 or max(n for _, n in calls) == 5  # the second and the third batch


def test_the_autocast_of_the_caller():
    _, adaptive = told_model()
    # numbers above 256 are rounded to even ones in bfloat16
    batches = [batch + 257 * torch.tensor([[[0.0]], [[1.0]]]) for batch in told([1, 2, 3, 3, 3, 0, 1, 3]).split(2)]

    def numbers(predictions):
        return [(p.logits[:, 2] + 500).tolist() for p in predictions]

    stream = adaptive.predict_stream(batches, batch_size=3, max_waiting=7)
    with torch.autocast('cpu', torch.bfloat16):
        inside = numbers(map(adaptive.predict, batches))
        found = numbers([next(stream)])  # needs the first two batches; an image of the second waits on
        assert torch.is_autocast_enabled('cpu')
    outside = numbers(map(adaptive.predict, batches))
    assert inside[0] != outside[0] and inside[1] != outside[1]
    found += numbers(stream)
    assert found == inside[:2] + outside[2:]


def test_images_of_the_caller():
    _, adaptive = told_model()
    batches = told([3, 0, 1, 2, 0, 0, 2, 3, 3, 1, 0, 2]).split(3)
    before = [batch.clone() for batch in batches]
    expected = [adaptive.predict(batch) for batch in batches]
    buffer = torch.empty_like(batches[0])

    def reused():
        for batch in batches:
            yield buffer.copy_(batch)
            buffer.fill_(-1)

    for batch_size in (None, 2, 5, 100):
        assert_like_predict(adaptive.predict_stream(batches, batch_size=batch_size), expected)
        assert_like_predict(adaptive.predict_stream(reused(), batch_size=batch_size), expected)
    assert all(torch.equal(batch, copy) for batch, copy in zip(batches, before))
    assert all(p.logits.untyped_storage().nbytes() == 36 for p in adaptive.predict_stream(batches, batch_size=100))


@pytest.mark.filterwarnings('error')  # NumPy's, of numbers that are not finite
@pytest.mark.parametrize('score, aggregate', list(itertools.product(SCORES, AGGREGATES)))
def test_logits_that_are_not_finite_and_the_runner(score, aggregate):
    x = 2 * torch.randn(60, 3, 4, 1)
    x[:8, :, 1] = -INF  # a class that cannot be
    for i, (k, value) in {20: (0, INF), 21: (1, INF), 22: (0, math.nan), 23: (2, math.nan), 24: (2, INF)}.items():
        x[i, k, 2] = value
    weights = [[1.0], [0.5, 1.0], [0.2, 0.3, 0.7]] if aggregate == 'fitted' else None
    for off in ((), {0}):
        thresholds = [2, 2] if score == 'patience' else [0.55, 0.5]
        thresholds = [INF if k in off else t for k, t in enumerate(thresholds)]
        policy = ExitPolicy(thresholds, score, [1.2, 1.0, 0.8], aggregate, weights)
        adaptive, runner = AdaptiveModel(Given(), policy, range(3)), given_runner(policy)
        for size, kwargs in ((1, dict(batch_size=8)), (7, {}), (16, dict(max_waiting=3)), ([*RAGGED, 12], {})):
            batches = x.split(size)
            expected = [adaptive.predict(batch) for batch in batches]
            assert_like_predict(adaptive.predict_stream(batches, **kwargs), expected)
            arrays = [batch.numpy().copy() for batch in batches]
            found = [tuple(map(torch.from_numpy, p)) for p in runner.predict_stream(arrays, **kwargs)]
            assert [len(logits) for logits, *_ in found] == [len(batch) for batch in batches]
            for (logits, exits, cost), other in zip(found, expected):
                assert torch.equal(exits, other.exit_index) and torch.equal(cost, other.cost)
                torch.testing.assert_close(logits, other.logits, equal_nan=True, rtol=1e-4, atol=1e-4)
            assert all(np.array_equal(a, b.numpy(), equal_nan=True) for a, b in zip(arrays, batches))


def test_the_runner_runs_the_same_stages_and_bounds():
    exits = torch.randint(0, 3, (96,))
    x = torch.zeros(96, 3, 4, 1)
    for k in range(3):
        x[:, k, 0, 0] = torch.where(exits <= k, 20.0, 0.0)
    policy = ExitPolicy([0.9, 0.9])
    model, runner = Given(), given_runner(policy)
    adaptive, calls, run = AdaptiveModel(model, policy, range(3)), [], runner._run
    adaptive._run_exit = [
        lambda state, k=k, run=run: (calls.append((k, len(state))), run(state))[1]
        for k, run in enumerate(adaptive._run_exit)
    ]
    runner._run = lambda k, state: (calls.append((k, len(state[0]))), run(k, state))[1]
    for size, kwargs in itertools.product((1, 8), ({}, dict(batch_size=8), dict(batch_size=12, max_waiting=9))):
        answers = [len(p.logits) for p in adaptive.predict_stream(x.split(size), **kwargs)]
        expected = calls.copy()
        calls.clear()
        buffer = np.empty((size, 3, 4, 1), np.float32)

        def reused(buffer=buffer, size=size):
            for batch in x.split(size):
                buffer[:] = batch.numpy()
                yield buffer

        found = list(runner.predict_stream(reused(), **kwargs))
        assert [len(p.logits) for p in found] == answers and calls == expected
        assert np.concatenate([p.exit_index for p in found]).tolist() == exits.tolist()
        calls.clear()
    rare = itertools.chain([x[exits == 2][:1]], itertools.repeat(x[exits == 0][:1], 100))
    pulled = itertools.count()
    stream = runner.predict_stream((b.numpy() for b, _ in zip(rare, pulled)), batch_size=2, max_waiting=2)
    assert next(stream).exit_index.tolist() == [2] and next(pulled) == HELD * 2 + 1


def test_training_mode_is_refused():
    model, adaptive = told_model()
    batches = told([0, 0, 3, 0, 0, 0]).split(2)
    model.train()
    with pytest.raises(RuntimeError, match=r'is in training mode; call model\.eval\(\)'):
        adaptive.predict_stream(batches)
    model.eval()
    stream = adaptive.predict_stream(batches)
    next(stream)
    model.train()
    before = len(model.calls)
    with pytest.raises(RuntimeError, match=r'is in training mode; call model\.eval\(\)'):
        next(stream)
    assert len(model.calls) == before
    model.eval()

    def until_the_end():
        yield from batches[1:2]
        model.train()

    with pytest.raises(RuntimeError, match=r'is in training mode; call model\.eval\(\)'):
        list(adaptive.predict_stream(until_the_end()))  # an image still waits
    assert model.calls[before:] == [(0, 2)]


def test_what_the_caller_iterates_over():
    _, adaptive = told_model()
    assert list(adaptive.predict_stream([])) == [] and list(adaptive.predict_stream(iter(()), batch_size=3)) == []
    error, grad_enabled = KeyError('mine'), []

    def broken():
        for _ in range(2):
            grad_enabled.append(torch.is_grad_enabled())
            yield told([0])
        raise error

    stream = adaptive.predict_stream(broken())
    assert next(stream).exit_index.tolist() == next(stream).exit_index.tolist() == [0]
    with pytest.raises(KeyError) as found:
        next(stream)
    assert found.value is error and grad_enabled == [True, True]
    with pytest.raises(TypeError, match='not iterable'):
        next(adaptive.predict_stream(3))


def test_batches_that_are_no_images():
    for batch, message in (
        (torch.zeros(0, 2, 1, 1), r'shape \(0, 2, 1, 1\); expected \[B, C, H, W\]'),
        (torch.zeros(2, 1, 1), r'shape \(2, 1, 1\)'),
        (torch.zeros(2, 2, 1, 1, dtype=torch.uint8), 'images are torch.uint8'),
        ([torch.zeros(2, 2, 1, 1), 1], 'images are list'),
    ):
        stream = told_model()[1].predict_stream([told([0]), batch])
        next(stream)
        with pytest.raises(ValueError, match=message):
            next(stream)


REFUSED = [('batch_size', 0), ('batch_size', True), ('batch_size', 2.0), ('max_waiting', -1), ('max_waiting', '4')]


@pytest.mark.parametrize('name, value', REFUSED)
def test_numbers_of_images_that_are_refused(name, value):
    policy = ExitPolicy([0.9, 0.9])
    for model in (AdaptiveModel(Given(), policy, range(3)), given_runner(policy)):
        with pytest.raises(ValueError, match=rf'{name}.* integer'):
            model.predict_stream([], **{name: value})  # before the first item
