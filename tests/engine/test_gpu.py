"""What only a GPU can show; `make test` runs these tests where there is one, and all others on the CPU."""

import json
import os
import warnings

import pytest
import timm
import torch
from scripts import assert_same, run, weights
from timm.utils import NativeScaler

from timm_mlcsd import MLCSDLoss, MLCSDTask
from timm_mlcsd.adaptive import AdaptiveModel, ExitPolicy, evaluate_policy
from timm_mlcsd.cli import train, validate
from timm_mlcsd.cost import exit_costs
from timm_mlcsd.data import CachedLoader
from timm_mlcsd.engine import signals, trainer
from timm_mlcsd.network import load_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')]

# float32 in another order of operations, over 20 updates with a learning rate of 0.02
CLOSE = dict(rtol=1e-2, atol=1e-3)


@pytest.fixture
def on_gpu(small):
    return [*small, '--device', 'cuda']


def trained(flags, tmp_path, name):
    assert run(train.main, [*flags, '--experiment', name]) == 0
    return weights(tmp_path / name)


@pytest.mark.parametrize(
    'more',
    [
        '--cuda-graphs',
        '--cuda-graphs --grad-accum-steps 2 --model-ema',
        '--cuda-graphs --cache-dataset device --channels-last',
        '--torchcompile',
        '--torchcompile --torchcompile-mode reduce-overhead',
        '--torchcompile --torchcompile-mode reduce-overhead --grad-accum-steps 2',
    ],
)
def test_modes_train_as_eager_mode_does(more, on_gpu, tmp_path):
    own = more.split()
    shared = [f for f in own if 'torchcompile' not in f and f not in ('--cuda-graphs', 'reduce-overhead')]
    flags = [*on_gpu, '--epochs', '4', '--distill-ramp', 'accuracy']
    eager, other = trained([*flags, *shared], tmp_path, 'eager'), trained([*flags, *own], tmp_path, 'other')
    assert eager.keys() == other.keys()
    for name, weight in eager.items():
        torch.testing.assert_close(other[name], weight, **CLOSE, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('mode', ['', '--cuda-graphs'])
def test_float16_lowers_a_scale_that_overflows_and_trains(mode, on_gpu, tmp_path, monkeypatch):
    start = 2.0**40

    class HighScaler(NativeScaler):
        def __init__(self, device):
            super().__init__(device=device)
            self._scaler = torch.amp.GradScaler(device, init_scale=start)

    monkeypatch.setattr(trainer, 'NativeScaler', HighScaler)
    trained([*on_gpu, '--amp', '--channels-last', '--epochs', '12', *mode.split()], tmp_path, 'run')
    checkpoint = load_checkpoint(tmp_path / 'run')
    assert 0 < checkpoint[NativeScaler.state_dict_key]['scale'] < start
    assert all(w.isfinite().all() for w in checkpoint['state_dict'].values())
    assert checkpoint['best_metric'] > 60  # three colours


def test_bfloat16_validates_as_float32_does(on_gpu, tmp_path):
    trained([*on_gpu, '--amp', '--amp-dtype', 'bfloat16', '--epochs', '6'], tmp_path, 'run')
    means = []
    for name, amp in (('half', ['--amp', '--amp-dtype', 'bfloat16']), ('full', [])):
        results = tmp_path / f'{name}.json'
        flags = ['--checkpoint', tmp_path / 'run' / 'model_best.pth.tar', '--held-out', '--device', 'cuda']
        assert run(validate.main, [*flags, *amp, '--results-file', results]) == 0
        means.append([exit_['top1'] for exit_ in json.loads(results.read_text())['exits']])
    # the held-out images are 5, so that one of them is 20 points
    assert all(abs(a - b) <= 20 for a, b in zip(*means))


@pytest.mark.parametrize('mode', ['', '--cuda-graphs'])
def test_a_stopped_run_goes_on_on_the_gpu(mode, on_gpu, tmp_path, monkeypatch):
    # dropout, so that the state of the GPU's generator matters
    flags = [*on_gpu, '--drop', '0.3', '--checkpoint-every-steps', '2', *mode.split()]
    whole = trained(flags, tmp_path, 'whole')

    def stop(*_):
        raise signals.StopRequested

    with monkeypatch.context() as patch:
        patch.setattr(trainer, 'iterate_in_lockstep', stop)
        assert run(train.main, [*flags, '--experiment', 'cut']) == 0
    assert 'progress' in load_checkpoint(tmp_path / 'cut')
    assert run(train.main, [*flags, '--experiment', 'cut', '--resume', tmp_path / 'cut']) == 0
    cut = weights(tmp_path / 'cut')
    for name, weight in whole.items():
        torch.testing.assert_close(cut[name], weight, **CLOSE, msg=lambda text, name=name: f'{name}: {text}')


def test_a_run_of_the_gpu_goes_on_on_the_cpu(on_gpu, small, tmp_path):
    trained([*on_gpu, '--epochs', '1'], tmp_path, 'run')
    assert run(train.main, [*small, '--epochs', '2', '--resume', tmp_path / 'run']) == 0


def test_cached_batches_are_in_the_right_form():
    images = torch.randint(256, (64, 32, 32, 3), dtype=torch.uint8, device='cuda')
    half = torch.full((3,), 0.5)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        loader = CachedLoader(
            images,
            torch.arange(64, device='cuda'),
            16,
            half,
            half,
            training=True,
            padding=4,
            hflip=0.5,
            channels_last=True,
            dtype=torch.bfloat16,
        )
        runs.append(list(loader))
    assert all(torch.equal(x, x2) and torch.equal(y, y2) for (x, y), (x2, y2) in zip(*runs))
    x, y = runs[0][0]
    assert x.dtype == torch.bfloat16 and x.is_contiguous(memory_format=torch.channels_last)
    assert x.device.type == y.device.type == 'cuda' and sorted(torch.cat([y for _, y in runs[0]]).tolist()) == [
        *range(64)
    ]


def test_images_that_leave_are_those_of_the_policy():
    """The host waits once per exit and is never sent an index."""
    model = timm.create_model('mlcsd_resnet18', num_classes=10, exits=5, small_input=True).cuda()
    images = torch.randn(64, 3, 32, 32, device='cuda')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100 if parameter.ndim == 2 else 1)  # of the classifiers, for confidences that differ
        for _ in range(20):
            model.train()(images)  # gives BatchNorm its statistics
        model.eval()
        logits = torch.stack(model.forward_exits(images).logits)
    thresholds = [z.softmax(-1).amax(-1).quantile(0.6).item() for z in logits[:-1]]
    policy, costs = ExitPolicy(thresholds), exit_costs(model, (3, 32, 32))
    adaptive = AdaptiveModel(model, policy, costs)
    adaptive.predict(images)
    torch.cuda.set_sync_debug_mode('warn')
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter('always')
            prediction = adaptive.predict(images)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert len([w for w in waits if 'synchronizing' in str(w.message)]) <= 4
    assert len(prediction.exit_index.unique()) > 1
    # smaller batches round differently, which matters within rounding of a threshold
    leaves = torch.stack([z.softmax(-1).amax(-1) for z in logits[:-1]])
    close = ((leaves - torch.tensor(thresholds, device='cuda')[:, None]).abs() < 1e-4).any(0)
    expected = (leaves >= torch.tensor(thresholds, device='cuda')[:, None]).float()
    expected = torch.cat([expected, torch.ones_like(expected[:1])]).argmax(0)
    assert torch.equal(prediction.exit_index[~close], expected[~close]) and close.sum() < 5
    labels = torch.zeros(64, dtype=torch.long)
    mean = evaluate_policy(logits.cpu(), labels, costs, policy).cost
    assert prediction.cost.mean().item() == pytest.approx(mean, rel=0.05)
    for model_in_use in (adaptive, AdaptiveModel(model, policy, costs).use_cuda_graphs()):
        stream = list(model_in_use.predict_stream(images.split(5)))
        assert torch.equal(torch.cat([p.exit_index for p in stream])[~close], expected[~close])
        again = model_in_use.predict(images)
        assert torch.equal(again.exit_index[~close], expected[~close])


def test_a_deadline_ends_early_and_a_long_one_does_not():
    model = timm.create_model('mlcsd_resnet18', num_classes=10, exits=5, small_input=True).cuda().eval()
    adaptive = AdaptiveModel(model, ExitPolicy([2.0] * 4))
    images = torch.randn(8, 3, 32, 32, device='cuda')
    assert adaptive.predict_anytime(images, 60.0).exit_index.tolist() == [4] * 8
    assert adaptive.predict_anytime(images, 0.0).exit_index.tolist() == [0] * 8


@pytest.mark.parametrize('more', ['', '--sync-bn', '--cuda-graphs'])
def test_one_process_of_nccl(more, on_gpu, tmp_path, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1', MASTER_PORT=29511).items():
        monkeypatch.setenv(name, str(value))
    try:
        trained([*on_gpu, '--epochs', '2', *more.split()], tmp_path, 'run')
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert os.path.exists(tmp_path / 'run' / 'model_best.pth.tar')


def test_graphs_replay_what_is_captured_without_a_trace():
    """Weights, statistics and random numbers are those before the capture."""
    from types import SimpleNamespace

    from timm_mlcsd.engine import TrainConfig
    from timm_mlcsd.engine.graphs import capture_step

    model = timm.create_model('mlcsd_test_resnet', num_classes=5, exits=3)
    task = MLCSDTask(model, MLCSDLoss(3, model.exit_feature_dim), torch.device('cuda'), verbose=False)
    model.cuda()
    before = {name: t.clone() for name, t in task.trainable_module.state_dict().items()}
    state = torch.cuda.get_rng_state()
    loader = SimpleNamespace(loader=None)
    capture_step(task, loader, TrainConfig.from_dict(dict(batch_size=4)), dict(input_size=(3, 32, 32)), 5)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_same(before, task.trainable_module.state_dict())
    images, target = torch.randn(4, 3, 32, 32, device='cuda'), torch.arange(4, device='cuda')
    replayed = task(images, target)['loss'].item()
    task.trainable_module.load_state_dict(before)
    eager = type(task.trainable_module).forward(task.trainable_module, images, target)['loss'].item()
    assert replayed == pytest.approx(eager, rel=1e-3)
