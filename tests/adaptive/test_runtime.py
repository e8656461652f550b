import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

import timm_mlcsd
from timm_mlcsd.adaptive import AGGREGATES, SCORES, AdaptiveModel, ExitPolicy, evaluate_policy, fit_weights
from timm_mlcsd.adaptive.export import onnx_runner
from timm_mlcsd.cost import exit_costs

INF = math.inf
# kernels may sum in another order for another batch: a few float32 roundings of a probability
MARGIN = 1e-4
COSTS = range(1, 9)

NETWORKS = {
    'resnet18': dict(channels=(8, 16, 24, 32), small_input=True),
    'mobilenetv2_050': dict(small_input=True, exits=4),
    'test_vit': dict(exits=4),
    'test_convnext': dict(),
    'swin_tiny_patch4_window7_224': dict(img_size=56, embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)),
    'test_vit_relpos': dict(exits=3),  # out of the exported graph
}


def make(name='resnet18', **kwargs):
    torch.manual_seed(0)
    kwargs = {**NETWORKS[name], 'num_classes': 5, **kwargs}
    model = timm.create_model(f'mlcsd_{name}', **kwargs).eval()
    for module in model.modules():  # untrained, all images look alike to it
        if isinstance(module, torch.nn.Linear) and module.out_features == 5:
            module.weight.data.mul_(5)
    return model


def images_for(model, count):
    chans, height, _ = model.probe_size
    size = 32 if model.exit_args['small_input'] else height
    return torch.randn(count, chans, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, images):
    return torch.stack(model.forward_exits(images).logits)


def spread(logits, policy, seed, off=()):
    """The policy with thresholds at which some samples leave at each exit that is on."""
    generator = torch.Generator().manual_seed(seed)
    policy = policy.with_thresholds([INF if k in off else 0.0 for k in range(len(logits) - 1)])
    memory, thresholds = None, []
    for k in range(len(logits) - 1):
        if k in off:
            thresholds.append(INF)
            continue
        _, score, memory = policy.step(k, logits[k], memory)
        share = torch.rand(1, generator=generator).item()
        thresholds.append(score.double().quantile(0.2 + 0.7 * share).item())
    return policy.with_thresholds(thresholds)


@pytest.mark.parametrize(
    'name, count, batches', [*((name, 12, (1, 5, 12)) for name in NETWORKS), ('resnet18', 256, (60, 256))]
)
def test_every_sample_gets_the_exit_and_the_answer_that_its_logits_give(name, count, batches):
    model = make(name)
    images = images_for(model, count)
    logits = logits_of(model, images)
    weights = fit_weights(logits, torch.arange(count) % 5)
    costs = exit_costs(model, images.shape[1:])
    for seed, (score, aggregate) in enumerate(itertools.product(SCORES, AGGREGATES)):
        base = ExitPolicy(
            [0.0] * (model.num_exits - 1), score, None, aggregate, weights if aggregate == 'fitted' else None
        )
        policy = spread(logits, base, seed, off={1} if seed % 3 == 0 else ())
        expected = evaluate_policy(logits, torch.zeros(count, dtype=torch.long), costs, policy)
        adaptive = AdaptiveModel(model, policy, costs)
        for batch in batches:
            found = [adaptive.predict(part) for part in images.split(batch)]
            exits = torch.cat([p.exit_index for p in found])
            predictions = torch.cat([p.logits for p in found]).argmax(-1)
            same = (exits == expected.exit_index) & (predictions == expected.prediction)
            assert same.all() or on_the_edge(logits, policy, same), (score, aggregate, batch)
            cost = torch.cat([p.cost for p in found]).mean().item()
            assert not same.all() or cost == pytest.approx(expected.cost)


def on_the_edge(logits, policy, same):
    """Whether all samples that differ have a score within MARGIN of a threshold."""
    memory, close = None, torch.zeros_like(same)
    for k, threshold in enumerate(policy.thresholds):
        if policy.is_on(k):
            _, score, memory = policy.step(k, logits[k], memory)
            close |= (score - threshold).abs() < MARGIN
    return bool((same | close).all())


def test_parts_whose_results_are_not_used_do_not_run():
    model = make()
    calls = []
    run_stage, run_head = model.run_stage, model.run_head
    model.run_stage = lambda k, state: (calls.append(('stage', k, len(state))), run_stage(k, state))[1]
    model.run_head = lambda k, state: (calls.append(('head', k, len(state))), run_head(k, state))[1]
    images = images_for(model, 4)
    prediction = AdaptiveModel(model, ExitPolicy([INF, 0.0, *[0.5] * 5]), COSTS).predict(images)
    assert calls == [('stage', 0, 4), ('stage', 1, 4), ('head', 1, 4)]
    assert prediction.exit_index.tolist() == [1] * 4


class HandsOn(timm_mlcsd.MultiExitModel):
    """Two exits; the state holds the images themselves, and their halves."""

    num_exits, exit_names, num_classes, exit_feature_dim, probe_size = 2, ['a', 'b'], 3, 3, (3, 4, 4)

    def run_stage(self, k, state):
        return (state, state / 2) if k == 0 else state

    def run_head(self, k, state):
        return (state[0] if k == 0 else 2 * state[1]).amax((2, 3)), state[0]


def test_images_stay_as_they_were():
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    for layout in (torch.contiguous_format, torch.channels_last):
        given = images.contiguous(memory_format=layout)
        found = AdaptiveModel(HandsOn(), ExitPolicy([0.45]), (1, 2)).predict(given)
        assert 0 < found.exit_index.sum() < 8  # some leave, others move into their places
        assert torch.equal(given, before)
        assert torch.equal(found.logits, before.amax((2, 3)))


def test_the_batch_shrinks():
    model = make()
    images = images_for(model, 16)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 7), seed=3)
    adaptive = AdaptiveModel(model, policy, COSTS)
    sizes = []
    adaptive._run_exit = [
        lambda state, run=run: (sizes.append(len(state)), run(state))[1] for run in adaptive._run_exit
    ]
    exits = adaptive.predict(images).exit_index
    assert sizes == [int((exits >= k).sum()) for k in range(model.num_exits) if (exits >= k).any()]
    assert sizes[-1] < 16


def test_last_exit_is_the_plain_network():
    model = make()
    images = images_for(model, 6)
    prediction = AdaptiveModel(model, ExitPolicy([INF] * 7), COSTS).predict(images)
    with torch.no_grad():
        assert torch.equal(prediction.logits, model(images))
    assert set(prediction.exit_index.tolist()) == {7}


def test_costs_are_those_of_the_exits():
    model = make()
    images = images_for(model, 2)
    costs = exit_costs(model, (3, 32, 32))
    adaptive = AdaptiveModel(model, ExitPolicy([INF, 0.0, *[0.5] * 5]), costs)
    assert adaptive.predict(images).cost.tolist() == [costs[1].macs - costs[0].head_macs] * 2


def test_channels_last_stays():
    model = make().to(memory_format=torch.channels_last)
    images = images_for(model, 16).to(memory_format=torch.channels_last)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 7), seed=3)
    adaptive = AdaptiveModel(model, policy, COSTS)
    seen = []

    def look(state, run):
        seen.append(state.is_contiguous(memory_format=torch.channels_last))
        return run(state)

    adaptive._run_exit = [lambda state, run=run: look(state, run) for run in adaptive._run_exit]
    adaptive.predict(images)
    assert len(seen) > 2 and all(seen)


def test_autocast():
    model = make()
    images = images_for(model, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = logits_of(model, images)
        policy = spread(logits, ExitPolicy([0.0] * 7), seed=2)
        prediction = AdaptiveModel(model, policy, COSTS).predict(images)
    expected = evaluate_policy(logits, torch.zeros(8, dtype=torch.long), range(8), policy)
    # bfloat16 has 8 bits: another batch may move a score by some hundredths
    assert (prediction.exit_index == expected.exit_index).float().mean() > 0.5
    assert prediction.logits.dtype == torch.float32


def test_iter_exits_gives_the_aggregated_answers():
    model = make()
    images = images_for(model, 4)
    policy = ExitPolicy([0.9, INF, *[0.9] * 5], aggregate='mean')
    found = list(AdaptiveModel(model, policy, COSTS).iter_exits(images))
    assert [k for k, _ in found] == [0, 2, 3, 4, 5, 6, 7]
    logits = logits_of(model, images)[[0, 2]]
    expected = logits.log_softmax(-1).mean(0).log_softmax(-1)
    torch.testing.assert_close(found[1][1], expected)


def test_deadlines():
    model = make()
    images = images_for(model, 4)
    adaptive = AdaptiveModel(model, ExitPolicy([2.0] * 7), COSTS)  # no score is that high
    slow = adaptive._run_exit
    adaptive._run_exit = [lambda state, run=run: (time.sleep(0.02), run(state))[1] for run in slow]
    assert set(adaptive.predict_anytime(images, 10.0).exit_index.tolist()) == {7}
    with torch.no_grad():
        exits = model.forward_exits(images).logits
    for deadline in (-1.0, 0.0, 0.05, 0.1, 1.0):
        start = time.perf_counter()
        logits, exit_index, _ = adaptive.predict_anytime(images, deadline)
        over = time.perf_counter() - start - deadline
        k = exit_index[0].item()
        assert torch.equal(logits, exits[k]) and (exit_index == k).all()
        # the first exit always answers; a stage takes 20 ms, and a busy machine may stop us for some more
        assert k == 0 or over < 0.25
        assert deadline > 0 or k == 0
    assert k == 7


def test_one_slow_call_is_forgotten():
    model = make(exits=2)
    images = images_for(model, 1)
    adaptive = AdaptiveModel(model, ExitPolicy([2.0]), COSTS[:2])
    delays, run = iter([0.3, 0.0, 0.5]), adaptive._run_exit[1]
    adaptive._run_exit[1] = lambda state: (time.sleep(next(delays, 0.0)), run(state))[1]
    # the first run may have compiled something and doesn't count
    assert [adaptive.predict_anytime(images, 0.2).exit_index.item() for _ in range(3)] == [1, 1, 1]
    adaptive._seconds[1, 1, (3, 32, 32), images.device] = [0.5]  # as if the last runs had all been slow
    found = [adaptive.predict_anytime(images, 0.2).exit_index.item() for _ in range(120)]
    assert found[0] == 0 and found[-1] == 1  # 0.5 * 0.99 ** 100 is less than 0.2


def test_sure_samples_do_not_wait_for_a_deadline():
    model = make()
    images = images_for(model, 8)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 7), seed=2)
    adaptive = AdaptiveModel(model, policy, COSTS)
    assert torch.equal(adaptive.predict_anytime(images, 60.0).exit_index, adaptive.predict(images).exit_index)


def test_threads_share_it():
    model = make()
    images = images_for(model, 40)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 7, aggregate='mean'), seed=4)
    adaptive = AdaptiveModel(model, policy, COSTS)
    parts = images.split(5)
    expected = [adaptive.predict(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, once in zip(pool.map(adaptive.predict, parts), expected):
                assert torch.equal(found.exit_index, once.exit_index) and torch.equal(found.logits, once.logits)


def test_compiled_stages_answer_alike():
    model = make()
    images = images_for(model, 8)
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * 7), seed=2)
    expected = AdaptiveModel(model, policy, COSTS).predict(images)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = AdaptiveModel(model, policy, COSTS).compile(backend=counter)
    for batch in (images, images[:3], images[:1]):
        found = compiled.predict(batch)
        assert torch.equal(found.exit_index, expected.exit_index[: len(batch)])
        torch.testing.assert_close(found.logits, expected.logits[: len(batch)], rtol=1e-4, atol=1e-4)
    # every exit that was reached is compiled for any batch and, where one image comes, for one
    assert 8 <= counter.frame_count <= 2 * 8
    before = counter.frame_count
    for batch in (images[:6], images[:2], images[7:]):
        compiled.predict(batch)
    assert counter.frame_count - before <= 2  # an exit that only one image, or none, had reached


def test_weights_that_the_policy_was_not_fitted_to(tmp_path):
    model = make(exits=2)
    policy = ExitPolicy([0.5]).for_weights(model, 'pictures', 30)
    images = images_for(model, 2)
    expected = AdaptiveModel(model, policy, COSTS[:2]).predict(images)
    timm_mlcsd.save_pretrained(model, tmp_path, data_config=dict(input_size=(3, 32, 32)), policy=policy)
    assert torch.equal(AdaptiveModel.from_pretrained(tmp_path).predict(images).logits, expected.logits)
    with torch.no_grad():
        model.get_classifier().bias[0] += 1
    with pytest.raises(ValueError, match=r'fitted to other weights .*data pictures, images 30'):
        AdaptiveModel(model, policy, COSTS[:2])
    AdaptiveModel(model, policy.without_digest(), COSTS[:2])
    AdaptiveModel(model, ExitPolicy([0.5]), COSTS[:2])
    policy.for_weights(model).save(tmp_path)  # of other weights, in the folder
    with pytest.raises(ValueError, match='fitted to other weights'):
        AdaptiveModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match='fitted to other weights'):
        AdaptiveModel.from_pretrained(tmp_path, policy.for_weights(model))


@pytest.mark.parametrize('part', ['', 'backbone.layer1.0.bn1'])
@pytest.mark.parametrize('compiled', [False, True])
def test_training_mode_is_refused_and_changes_nothing(part, compiled):
    model = make(exits=2)
    images = images_for(model, 2)
    adaptive = AdaptiveModel(model, ExitPolicy([2.0]), COSTS[:2])
    if compiled:
        adaptive.compile(backend='eager')
    expected = adaptive.predict(images).logits
    before = {name: t.clone() for name, t in model.state_dict().items()}
    exits = adaptive.iter_exits(images)
    next(exits)
    model.get_submodule(part).train()
    what = f'its module {part!r}' if part else "its module .*|the network"
    for answer in (
        lambda: adaptive.predict(images),
        lambda: adaptive.predict_anytime(images, 1.0),
        lambda: adaptive.iter_exits(images),
        lambda: next(exits),  # begun before
    ):
        with pytest.raises(RuntimeError, match=rf'({what}) is in training mode; call model\.eval\(\)'):
            answer()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.eval()
    assert torch.equal(adaptive.predict(images).logits, expected)


def test_a_module_that_came_later_in_training_mode():
    model = make(exits=2)
    adaptive = AdaptiveModel(model, ExitPolicy([2.0]), COSTS[:2])
    model.backbone.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), model.backbone.fc)
    with pytest.raises(RuntimeError, match=r"its module 'backbone\.fc' is in training mode"):
        adaptive.predict(images_for(model, 2))


class Given(timm_mlcsd.MultiExitModel):
    """Three exits whose logits are what comes in: images [B, 3, C, 1]."""

    num_exits, exit_names, num_classes, feature_dim, probe_size = 3, ['a', 'b', 'c'], 4, 3, (3, 4, 1)

    def run_stage(self, k, state):
        return state

    def run_head(self, k, state):
        return state[:, k, :, 0], None


def given_runner(policy):
    """The exported runner over the same exits, without graphs."""
    runner = object.__new__(onnx_runner.AdaptiveModel)
    runner.stages = [{}] * 3
    runner.manifest = dict(num_classes=4, data_config=dict(input_size=[3, 4, 1]))
    runner.policy = onnx_runner.check_policy(policy.to_dict(), 'policy')
    runner.thresholds, runner.is_on = [*runner.policy['thresholds'], -INF], [policy.is_on(k) for k in range(3)]
    runner.costs = np.arange(3.0)
    runner._run = lambda k, state: ([state[0].copy()], state[0][:, k, :, 0].copy() if runner.is_on[k] else None)
    return runner


@pytest.mark.parametrize('score, aggregate', list(itertools.product(SCORES, AGGREGATES)))
def test_logits_that_are_not_finite_are_treated_alike_everywhere(score, aggregate):
    torch.manual_seed(0)
    x = 2 * torch.randn(40, 3, 4, 1)
    x[:8, :, 1] = -INF  # a class that cannot be: numbers as usual
    bad = {20: (0, INF), 21: (1, INF), 22: (0, math.nan), 23: (2, math.nan), 24: (2, INF)}
    for i, (k, value) in bad.items():
        x[i, k, 2] = value
    x[25, 0] = -INF
    fine = [i for i in range(40) if i not in (*bad, 25)]
    weights = [[1.0], [0.5, 1.0], [0.2, 0.3, 0.7]] if aggregate == 'fitted' else None
    policy = ExitPolicy([2, 2] if score == 'patience' else [0.55, 0.5], score, [1.2, 1.0, 0.8], aggregate, weights)
    found = AdaptiveModel(Given(), policy, range(3)).predict(x)
    logits, exit_index, _ = map(torch.from_numpy, given_runner(policy).predict(x.numpy()))
    assert torch.equal(exit_index, found.exit_index)
    torch.testing.assert_close(logits, found.logits, equal_nan=True, rtol=1e-5, atol=1e-5)  # other exponentials
    counted = evaluate_policy(x[fine, :, :, 0].transpose(0, 1), torch.zeros(len(fine)).long(), range(3), policy)
    assert torch.equal(counted.exit_index, exit_index[fine]) and len(counted.exit_index.unique()) > 1
    assert torch.equal(counted.prediction, logits[fine].argmax(-1))
    for i in (*bad, 25):
        with pytest.raises(ValueError, match=r'not finite, first at exit \d, sample 0'):
            evaluate_policy(x[[i], :, :, 0].transpose(0, 1), torch.zeros(1).long(), range(3), policy)
    never = policy.with_thresholds([-1e9, -1e9])  # everything that is a number leaves at once
    found = AdaptiveModel(Given(), never, range(3)).predict(x)
    assert torch.equal(found.exit_index, torch.from_numpy(given_runner(never).predict(x.numpy()).exit_index))
    # an answer that is a mean stays broken once an exit was
    later = 1 if aggregate == 'last' else 2
    assert found.exit_index.tolist() == [later if i in (20, 22, 25) else 0 for i in range(40)]


def test_mistakes():
    model = make()
    with pytest.raises(ValueError, match='3 thresholds, for 4 exits; the network has 8 exits'):
        AdaptiveModel(model, ExitPolicy([0.5] * 3))
    with pytest.raises(ValueError, match=r'the network has them at layer1\.0'):
        AdaptiveModel(model, ExitPolicy([0.5] * 7, exit_names=list('abcdefgh')))
    with pytest.raises(ValueError, match='has no classes'):
        AdaptiveModel(make(num_classes=0), ExitPolicy([0.5] * 7))
    adaptive = AdaptiveModel(model, ExitPolicy([0.5] * 7), COSTS)
    with pytest.raises(ValueError, match=r'shape \(0, 3, 32, 32\); expected'):
        adaptive.predict(torch.empty(0, 3, 32, 32))
    for deadline, message in ((float('nan'), 'deadline_s=nan'), (None, 'deadline_s=None'), ('1', "deadline_s='1'")):
        with pytest.raises(ValueError, match=f'{message}: expected a number of seconds'):
            adaptive.predict_anytime(images_for(model, 1), deadline)
    assert len(adaptive.predict_anytime(images_for(model, 1), np.float32(60)).logits) == 1


@pytest.mark.parametrize('name', ['resnet18', 'test_vit'])
@torch.no_grad()
def test_what_a_hook_keeps_is_not_overwritten(name):
    model = make(name)
    images, kept = images_for(model, 6), []
    policy = spread(logits_of(model, images), ExitPolicy([0.0] * (model.num_exits - 1)), seed=0)
    adaptive = AdaptiveModel(model, policy)
    expected = adaptive.predict(images)
    assert len(expected.exit_index.unique()) > 1
    model.backbone.get_submodule(model.exit_names[0]).register_forward_hook(lambda module, args, out: kept.append(out))
    model.forward_exits(images)
    for prediction in (adaptive.predict(images), next(iter(adaptive.predict_stream([images])))):
        assert torch.equal(prediction.logits, expected.logits)
    assert len(kept) == 3 and torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
