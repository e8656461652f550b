"""Training steps as CUDA graphs: what they must not change, with a stand-in for the graphs where there is no GPU."""

import csv

import pytest
import timm
import torch
import torch.distributed as dist
from scripts import assert_same, run, weights

from timm_mlcsd import MLCSDLoss, MLCSDTask
from timm_mlcsd.cli import train
from timm_mlcsd.engine import TrainConfig, trainer
from timm_mlcsd.engine.combinations import check_cuda_graphs
from timm_mlcsd.engine.epoch import EpochLoop, LoopConfig
from timm_mlcsd.engine.graphs import capture_step
from timm_mlcsd.errors import UserError


def settings_of(step):
    """What graphs cannot look at again."""
    ramp = step.module.criterion.ramp
    return [m.training for m in step.modules()], ramp is not None and ramp.auto


def stand_in(module, sample_args, num_warmup_iters=3, allow_unused_input=False):
    """What PyTorch's function promises: fixed inputs, and outputs and gradients that every replay overwrites."""
    forward, was_training, parameters = module.forward, module.training, tuple(module.parameters())
    inputs = [arg.clone() for arg in sample_args]
    kept = {}

    def differentiable(tensors):
        return [t for t in tensors if t.requires_grad]

    def gradients(outputs, grads):
        return torch.autograd.grad(outputs, differentiable(parameters), grads, allow_unused=allow_unused_input)

    before = settings_of(module)
    for _ in range(num_warmup_iters):
        outputs = differentiable(forward(*inputs))
        gradients(outputs, [torch.ones_like(o) for o in outputs])

    def overwrite(name, values):
        if name not in kept:
            kept[name] = [None if v is None else v.detach().clone() for v in values]
        for place, value in zip(kept[name], values):
            if value is not None:
                place.copy_(value.detach())
        return [None if place is None else place.detach() for place in kept[name]]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            for place, value in zip(inputs, given):
                place.copy_(value)
            assert settings_of(module) == before
            with torch.enable_grad():
                kept['graph'] = forward(*inputs)
            return tuple(overwrite('outputs', kept['graph']))

        @staticmethod
        def backward(ctx, *grads):
            pairs = [(o, g) for o, g in zip(kept['graph'], grads) if o.requires_grad]
            found = iter(overwrite('gradients', gradients(*zip(*pairs))))
            return (*[None] * len(inputs), *[next(found) if p.requires_grad else None for p in parameters])

    def replay(*args):
        return Replay.apply(*args, *parameters) if module.training == was_training else forward(*args)

    module.forward = replay
    return module


@pytest.fixture
def graphs(monkeypatch):
    """Graphs on a machine without a GPU; the modules that were captured."""
    captured = []
    monkeypatch.setattr(
        torch.cuda,
        'make_graphed_callables',
        lambda module, *a, **k: captured.append(module) or stand_in(module, *a, **k),
    )
    monkeypatch.setattr(torch.cuda, 'get_rng_state', lambda device: torch.get_rng_state())
    monkeypatch.setattr(torch.cuda, 'set_rng_state', lambda state, device: torch.set_rng_state(state))
    monkeypatch.setattr(trainer, 'check_cuda_graphs', lambda config, device: None)
    return captured


@pytest.mark.parametrize(
    'more, captures',
    [
        ('--drop 0.3 --distill-ramp accuracy --clip-grad 1', 1),
        ('--grad-accum-steps 2 --model-ema', 1),
        ('--mixup 0.5 --mixup-off-epoch 1 --cache-dataset device --amp --amp-dtype bfloat16 --channels-last', 1),
        ('--distill none --skip-nonfinite 2', 1),
        ('--heads-only 1 --distill-warmup-epochs 2 --initial-checkpoint {trained}/last.pth.tar', 2),
    ],
)
def test_training_is_that_without_graphs(more, captures, small, trained, tmp_path, graphs):
    more = more.format(trained=trained).split()
    for name, flags in (('eager', []), ('graphs', ['--cuda-graphs'])):
        assert run(train.main, [*small, '--epochs', 2, '--experiment', name, *more, *flags]) == 0
    assert len(graphs) == captures
    assert_same(weights(tmp_path / 'eager'), weights(tmp_path / 'graphs'))
    rows = [list(csv.DictReader((tmp_path / name / 'summary.csv').open())) for name in ('eager', 'graphs')]
    assert rows[0] == rows[1]


def made_task():
    model = timm.create_model('mlcsd_test_resnet', num_classes=5, exits=3)
    return MLCSDTask(model, MLCSDLoss(3, model.exit_feature_dim, distill_ramp='accuracy'), verbose=False)


class Batches(list):
    """Two batches of four images, as a loader."""

    loader = None

    def __init__(self, sizes=(4, 4)):
        super().__init__((torch.randn(n, 3, 32, 32), torch.arange(n) % 5) for n in sizes)


def captured(task, batches=None):
    config = TrainConfig.from_dict(dict(batch_size=4))
    capture_step(task, batches or Batches(), config, dict(input_size=(3, 32, 32)), 5)
    return task


def test_capturing_changes_no_state(graphs):
    task = made_task()
    before = {name: t.clone() for name, t in task.trainable_module.named_buffers()}
    batches, state = Batches(), torch.get_rng_state()
    captured(task, batches)
    assert len(before) > 20 and torch.equal(torch.get_rng_state(), state)
    assert_same(before, dict(task.trainable_module.named_buffers()))
    assert all(p.grad is None for p in task.parameters())


def test_other_batches_run_without_graphs_and_say_so(graphs, caplog):
    task = captured(made_task())
    images, target = Batches([3])[0]
    results = [task(images, target), captured(made_task()).train()(*Batches([4])[0])]
    assert len(results[0]['exit_logits'][0]) == 3 and results[0].keys() == results[1].keys()
    task(images, target)
    warnings = [r.getMessage() for r in caplog.records]
    assert warnings == [
        '--cuda-graphs: a batch of (3, 3, 32, 32) with targets (3,) runs without graphs, which are for (4, 3, 32, 32) '
        'with (4,)'
    ]


def test_gradients_of_an_unfinished_update_are_copied(graphs):
    """A loop that is not told would add a batch's gradient to itself."""
    found = {}
    for overwrites in (True, False):
        torch.manual_seed(0)
        task, batches = captured(made_task()), Batches()
        optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
        loop = EpochLoop(task, batches, optimizer, LoopConfig(grad_accum_steps=2), compiles_graphs=overwrites)
        seen = []
        optimizer.step = lambda seen=seen, task=task: seen.append([p.grad.clone() for p in task.parameters()])
        loop.run(0)
        found[overwrites] = seen[0]
    assert not all(torch.equal(a, b) for a, b in zip(found[True], found[False]))


def test_ddp_wraps_what_is_captured_and_captured_again(graphs, tmp_path):
    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        task, batches = made_task(), Batches()
        task.criterion.ramp.auto = False
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/{graph}', rank=0, world_size=1)
        try:
            for trains in (False, True):
                task.get_eval_model().freeze_backbone(not trains)
                if graph:
                    captured(task, batches)
                task.prepare_distributed().train()
                optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
                for images, target in batches:
                    task(images, target)['loss'].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        finally:
            dist.destroy_process_group()
        found.append({name: w.clone() for name, w in task.get_eval_model().state_dict().items()})
    assert len(graphs) == 2
    assert_same(*found)


@pytest.mark.parametrize(
    'flags, message',
    [
        (dict(torchcompile='inductor'), r'--torchcompile \(its own graphs: --torchcompile-mode reduce-overhead\)'),
        (dict(distill_method='crd'), '--distill-method crd'),
        (dict(grad_checkpointing=True, sync_bn=True), '--grad-checkpointing, .*; --sync-bn'),
    ],
)
def test_what_cannot_be_captured_is_refused(flags, message):
    config = TrainConfig.from_dict(dict(cuda_graphs=True, **flags))
    with pytest.raises(UserError, match=message):
        check_cuda_graphs(config, torch.device('cuda'))
    check_cuda_graphs(TrainConfig.from_dict(dict(cuda_graphs=True)), torch.device('cuda'))


def test_no_gpu(small, capsys):
    assert run(train.main, [*small, '--cuda-graphs']) == 2
    assert '--cuda-graphs: expected a CUDA device, got cpu' in capsys.readouterr().err
