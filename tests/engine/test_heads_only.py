"""Exits for a network that already works, and rates of their own for them."""

import shutil

import pytest
import timm
import torch
from scripts import run

from timm_mlcsd import create_multi_exit
from timm_mlcsd.cli import train
from timm_mlcsd.engine.optimizer import create_optimizer, create_scheduler
from timm_mlcsd.losses import MLCSDLoss
from timm_mlcsd.network import load_network
from timm_mlcsd.task import MLCSDTask

ARGS = dict(num_classes=3, small_input=True, channels=(8, 8, 8, 8))


@pytest.fixture
def plain(tmp_path):
    """A plain network's checkpoint, its BatchNorm statistics unlike those of any data."""
    torch.manual_seed(1)
    model = timm.create_model('mlcsd_resnet18', exits=1, **ARGS).backbone
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    path = tmp_path / 'plain.pth'
    torch.save(model.state_dict(), path)
    return model.eval(), path


@pytest.mark.parametrize(
    'more', [[], ['--model-ema', '--opt', 'adamw', '--clip-grad', 1], ['--distill', 'one-for-all']]
)
def test_the_last_exit_stays_bit_for_bit(plain, small, tmp_path, more):
    model, path = plain
    assert run(train.main, [*small, '--initial-checkpoint', path, '--heads-only', *more]) == 0
    trained = load_network(tmp_path / 'run', use_ema='--model-ema' in more).model
    state = model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in trained.backbone.state_dict().items())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(trained(images), model(images))
    torch.manual_seed(0)
    fresh = create_multi_exit('resnet18', exits=4, exit_head='slic', **ARGS)
    for (name, a), b in zip(trained.heads.named_parameters(), fresh.heads.parameters()):
        assert not torch.equal(a, b), f'{name} has not moved'


@pytest.mark.parametrize('name, is_moved', [('zinc', True), ('reds', False)])
def test_a_frozen_classifier_of_other_classes(small, folder, tmp_path, capsys, caplog, name, is_moved):
    assert run(train.main, [*small, '--exits', 1, '--distill', 'none', '--epochs', 1]) == 0
    other = shutil.copytree(folder, tmp_path / 'other')
    for split in ('train', 'test'):
        (other / split / ('green' if is_moved else 'red')).rename(other / split / name)
    start = ['--initial-checkpoint', tmp_path / 'run' / 'last.pth.tar', '--experiment', 'exits', '--epochs', 1]
    assert run(train.main, [other, *small[1:], *start, '--heads-only']) == (2 if is_moved else 0)
    text = capsys.readouterr().err + caplog.text
    assert 'was trained on the classes blue, green, red, the data has blue, ' in text
    assert ('the last exit would keep its answers' if is_moved else 'the last exit keeps them') in text
    assert run(train.main, [other, *small[1:], *start, '--experiment', 'all']) == 0
    assert 'the classifier starts with weights of those' in caplog.text
    assert run(train.main, [*small, *start, '--experiment', 'same', '--heads-only']) == 0


def test_after_some_epochs_all_trains(plain, small, tmp_path):
    model, path = plain
    flags = [*small, '--initial-checkpoint', path, '--heads-only', 1, '--epochs', 2, '--checkpoint-hist', 2]
    assert run(train.main, flags) == 0
    frozen, freed = (load_network(tmp_path / 'run' / f'checkpoint-{epoch}.pth.tar').model.backbone for epoch in (0, 1))
    for name, t in model.state_dict().items():
        assert torch.equal(frozen.state_dict()[name], t), name
        assert not torch.equal(freed.state_dict()[name], t) or not t.is_floating_point(), name


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'vit_tiny_patch16_224'])
def test_a_frozen_backbone_takes_no_gradients_and_drops_nothing(name):
    torch.manual_seed(0)
    model = create_multi_exit(name, exits=3, num_classes=5, drop_rate=0.5)
    images = torch.randn(2, 3, 224, 224)
    model.freeze_backbone()
    output = model.train()(images)
    assert not output.logits[-1].requires_grad and all(z.requires_grad for z in output.logits[:-1])
    sum(z.sum() for z in output.logits).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
    assert torch.equal(output.logits[-1], model.eval()(images))
    model.train().freeze_backbone(False)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_what_was_fixed_before_stays_so():
    model = create_multi_exit('resnet18', exits=2, num_classes=5)
    model.backbone.conv1.weight.requires_grad_(False)
    model.freeze_backbone()
    model.freeze_backbone()
    model.freeze_backbone(False)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ['backbone.conv1.weight']


@pytest.mark.parametrize('num_classes', [0, 7])
def test_a_frozen_backbone_with_another_classifier(num_classes):
    model = create_multi_exit('resnet18', exits=2, num_classes=5)
    model.freeze_backbone()
    model.reset_classifier(num_classes)
    trains = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    assert trains == ({'fc.weight', 'fc.bias'} if num_classes else set())  # the new one is untrained
    model.freeze_backbone(False)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    'flags, words',
    [
        ([], '--initial-checkpoint'),
        (['--exits', 1, '--pretrained-backbone', 'x'], '--exits 1'),
        (['--model', 'mlcsd_msdnet', '--model-kwargs', 'num_blocks=2'], 'no backbone'),
    ],
)
def test_mistakes(small, capsys, monkeypatch, flags, words):
    monkeypatch.setattr('timm_mlcsd.engine.trainer.build_model', _untrained)
    assert run(train.main, [*small, '--exits', 4, '--heads-only', *flags]) == 2
    assert words in capsys.readouterr().err


def _untrained(name, pretrained, pretrained_backbone, **model_args):
    model_args = {k: v for k, v in model_args.items() if name != 'mlcsd_msdnet' or k in ('num_classes', 'num_blocks')}
    return timm.create_model(name, **model_args)


@pytest.mark.parametrize('sched', ['none', 'cosine'])
@pytest.mark.parametrize('layer_decay', [None, 0.5])
def test_exits_learn_at_a_multiple_of_the_rate(sched, layer_decay):
    def rates(*flags):
        decay = ['--layer-decay', layer_decay] if layer_decay else []
        flags = [*flags, '--sched', sched, '--lr', 0.2, '--warmup-epochs', 0, '--weight-decay', 0.1, *decay]
        config = train.read_config([str(f) for f in flags])
        torch.manual_seed(0)
        model = create_multi_exit('resnet18', exits=3, num_classes=5)
        task = MLCSDTask(model, MLCSDLoss(3, model.exit_feature_dim))
        optimizer = create_optimizer(config.optimizer, task, model, sched != 'none')
        create_scheduler(config.scheduler, optimizer, 10)
        names = {id(p): name for name, p in task.trainable_module.named_parameters()}
        groups = {names[id(p)]: group for group in optimizer.param_groups for p in group['params']}
        assert len(groups) == sum(len(group['params']) for group in optimizer.param_groups) == len(names)
        return {name: (group['lr'], group['weight_decay']) for name, group in groups.items()}

    usual, scaled = rates(), rates('--exit-lr-mult', 3)
    assert usual['model.backbone.fc.weight'] == (pytest.approx(0.2), 0.1)
    if layer_decay:
        assert usual['model.backbone.conv1.weight'][0] < 0.1
    for name, (lr, decay) in scaled.items():
        factor = 1 if name.startswith('model.backbone.') else 3
        assert lr == pytest.approx(factor * usual[name][0]) and decay == usual[name][1], name


def test_it_is_not_forgotten_by_a_resumed_run(plain, small, tmp_path, capsys):
    flags = [*small, '--epochs', 1, '--initial-checkpoint', plain[1]]
    assert run(train.main, [*flags, '--heads-only']) == 0
    capsys.readouterr()
    assert run(train.main, [*flags[:-2], '--epochs', 2, '--resume', tmp_path / 'run']) == 2
    assert 'the run used --heads-only True, not False' in capsys.readouterr().err


@pytest.mark.parametrize('how', ['reduce', 'broadcast'])
def test_frozen_statistics_do_not_go_round(monkeypatch, how):
    model = create_multi_exit('resnet18', exits=4, **ARGS)
    task = MLCSDTask(model, MLCSDLoss(4, model.exit_feature_dim), verbose=False)
    model.freeze_backbone()
    task.train()
    gone_round = []
    monkeypatch.setattr(
        'timm_mlcsd.task.distribute_bn', lambda module, size, reduce: gone_round.append((module, size, reduce))
    )
    task.synchronize_statistics(3, how)
    trained = {m for part in (model.heads, task.criterion) for m in part.modules() if hasattr(m, 'running_mean')}
    assert trained and {module for module, *_ in gone_round} == trained
    assert all((size, reduce) == (3, how == 'reduce') for _, size, reduce in gone_round)
