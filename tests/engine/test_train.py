"""train.py as a user runs it."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from scripts import ROOT, assert_same, run, weights

from timm_mlcsd import MLCSDLoss
from timm_mlcsd.cli import train, validate
from timm_mlcsd.cli.config_file import parse_args
from timm_mlcsd.cli.flags import train_parser
from timm_mlcsd.engine import epoch
from timm_mlcsd.engine.optimizer import scaled_lr
from timm_mlcsd.network import load_checkpoint


def test_what_a_run_leaves(trained, folder):
    assert {p.name for p in trained.iterdir() if 'tfevents' not in p.name} == {
        'args.yaml',
        'summary.csv',
        'last.pth.tar',
        'model_best.pth.tar',
        'checkpoint-4.pth.tar',
        'checkpoint-5.pth.tar',
    }
    args = yaml.safe_load((trained / 'args.yaml').read_text())
    again = vars(parse_args(train_parser(), ['--config', str(trained / 'args.yaml')]))
    assert {k: again[k] for k in args} == args
    assert args['exits'] == 4 and args['model_kwargs'] == dict(channels=[8, 8, 8, 8]) and args['momentum'] == 0.9
    rows = list(csv.DictReader((trained / 'summary.csv').open()))
    assert [row['epoch'] for row in rows] == list('012345')
    assert float(rows[-1]['train_cls']) < float(rows[0]['train_cls'])
    assert {'eval_mean_top1', 'eval_Ex1_top1', 'eval_Ex4_loss', 'train_kd', 'train_ht', 'train_cwem'} <= set(rows[0])

    checkpoint = load_checkpoint(trained)
    assert checkpoint['arch'] == 'mlcsd_resnet18' and checkpoint['class_names'] == ['blue', 'green', 'red']
    # defaults are spelled out, so that they may change
    assert checkpoint['model_args']['exit_pool'] == 'max' and checkpoint['model_args']['exits'] == 4
    assert {'state_dict_ema', 'task_state', 'optimizer', 'args', 'data_config'} <= set(checkpoint)
    assert len(checkpoint['val_indices']) == 5 and checkpoint['val_fraction'] == 0.1 and checkpoint['val_seed'] == 0
    best = load_checkpoint(trained / 'model_best.pth.tar')
    assert best['metric'] == max(float(row['eval_mean_top1']) for row in rows) == checkpoint['best_metric']


@pytest.mark.parametrize('method', ['dkd', 'cc', 'crd'])
def test_distillation_methods(method, small, tmp_path):
    flags = [*small, '--distill-method', method, '--alpha', 0.5]
    assert run(train.main, [*flags, '--epochs', 2, '--experiment', 'whole', '--checkpoint-hist', 2]) == 0
    rows = list(csv.DictReader((tmp_path / 'whole' / 'summary.csv').open()))
    assert float(rows[0]['train_kd']) > 0
    if method == 'crd':
        state = load_checkpoint(tmp_path / 'whole')['task_state']['criterion']
        # 43 images to train on, of which the last batch of 3 is dropped: nearly all have been seen in two epochs
        assert state['method.labels'].shape == (43,) and state['method.labels'].ge(0).sum() >= 40


@pytest.mark.parametrize('flags', ['--distill-method crd'])
def test_what_is_remembered_resumes(flags, small, tmp_path):
    whole = [*small, *flags.split(), '--experiment', 'whole', '--checkpoint-hist', 2]
    assert run(train.main, whole) == 0
    cut = tmp_path / 'cut'
    cut.mkdir()
    (tmp_path / 'whole' / 'checkpoint-0.pth.tar').rename(cut / 'last.pth.tar')
    assert run(train.main, [*whole, '--experiment', 'cut', '--resume', cut]) == 0
    assert_same(weights(tmp_path / 'whole'), weights(cut))


def test_resume_equals_a_run_that_never_stopped(small, tmp_path):
    whole = [*small, '--epochs', 3, '--sched', 'multistep', '--decay-milestones', 1, 2, '--model-ema']
    assert run(train.main, [*whole, '--experiment', 'whole']) == 0
    # stopped for good after epoch 0: what a kill in epoch 1 leaves behind
    assert run(train.main, [*whole, '--experiment', 'cut', '--checkpoint-hist', 3]) == 0
    cut = tmp_path / 'cut'
    (cut / 'last.pth.tar').unlink()
    (cut / 'checkpoint-0.pth.tar').rename(cut / 'last.pth.tar')
    assert run(train.main, [*whole, '--experiment', 'cut', '--resume', cut]) == 0
    assert_same(weights(tmp_path / 'whole'), weights(cut))
    rows = [row['epoch'] for row in csv.DictReader((cut / 'summary.csv').open())]
    assert rows == ['0', '1', '2']


def test_sigkill_in_mid_epoch_then_resume(small, tmp_path):
    argv = [str(a) for a in [*small, '--epochs', 40]]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / 'train.py'), *argv], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    last = tmp_path / 'run' / 'last.pth.tar'
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    epoch = load_checkpoint(last)['epoch']
    assert run(train.main, [*argv[:-4], '--epochs', epoch + 2, '--resume', tmp_path / 'run']) == 0
    assert load_checkpoint(last)['epoch'] == epoch + 1


def trained_weights(small, tmp_path, flags=''):
    assert run(train.main, [*small, '--experiment', 'flags', *flags.split()]) == 0
    assert run(validate.main, ['--checkpoint', tmp_path / 'flags', '--split', 'test', '--workers', 0]) == 0
    return {name: t for name, t in weights(tmp_path / 'flags').items() if name.startswith('backbone.conv1')}


@pytest.fixture(scope='module')
def plain_weights(folder, small_flags, tmp_path_factory):
    out = tmp_path_factory.mktemp('plain')
    return trained_weights([folder, *small_flags, '--output', out], out)


@pytest.mark.parametrize(
    'flags',
    [
        '--distill none',
        '--distill one-for-all --beta 0',
        '--cwem-supervision kd',
        '--cwem-supervision none',
        '--distill-warmup-epochs 2',
        '--exit-weights 1 1 1 2',
        '--temperature 1',
        '--gamma 2',
        '--mixup 0.8 --cutmix 1.0',
        '--mixup 0.8 --mixup-off-epoch 1',
        '--bce-loss',
        '--smoothing 0.3',
        '--amp --amp-dtype bfloat16 --channels-last',
        '--amp --amp-dtype float16',
        '--clip-grad 0.1',
        '--clip-grad 0.1 --clip-mode agc',
        '--grad-accum-steps 4',
        '--exits 1',
        '--exits layer1.0,layer3',
        '--exit-pool avg',
        '--exit-head conv1x1',
        '--opt adamw',
        '--layer-decay 0.7',
        '--reprob 0.5',
        '--aa rand-m3',
        '--sched none --warmup-epochs 0 --lr 0.01',
        '--no-aug',
        '--val-split test',
        '--train-crop-mode rrc',
        '--seed 1',
        '--weight-decay 0.1',
        '--drop-path 0.5',
    ],
)
def test_flags_change_what_is_learned(small, tmp_path, plain_weights, flags):
    changed = trained_weights(small, tmp_path, flags)
    assert all(t.isfinite().all() for t in changed.values())
    assert any(not torch.equal(t, plain_weights[name]) for name, t in changed.items())


@pytest.mark.parametrize('flags', ['', '--model-ema', '--torchcompile aot_eager', '--grad-checkpointing'])
def test_flags_that_leave_what_is_learned(small, tmp_path, plain_weights, flags):
    for name, t in trained_weights(small, tmp_path, flags).items():
        # bit for bit, but where the compiler reorders sums: 10 steps of float32 rounding
        torch.testing.assert_close(t, plain_weights[name], rtol=0, atol=1e-4 if 'compile' in flags else 0)


@pytest.mark.parametrize(
    'flags',
    [
        '--model mlcsd_test_vit --img-size 160',  # runs as a whole
        '--model mlcsd_test_convnext --img-size 32 --small-input',
        '--model mlcsd_shufflenetv2_050 --img-size 32 --exits 4',
    ],
)
def test_any_backbone_trains_resumes_and_validates(folder, tmp_path, flags):
    where = ['--output', tmp_path, '--experiment', 'run']
    schedule = '--batch-size 8 --workers 0 --crop-pct 1 --layer-decay 0.9'.split()
    argv = [folder, *flags.split(), *schedule, *where]
    assert run(train.main, [*argv, '--epochs', 1]) == 0
    assert run(train.main, [*argv, '--epochs', 2, '--resume', tmp_path / 'run']) == 0
    results = tmp_path / 'r.json'
    argv = ['--checkpoint', tmp_path / 'run', '--split', 'test', '--workers', 0, '--results-file', results]
    assert run(validate.main, argv) == 0
    rows = json.loads(results.read_text())['exits']
    assert len(rows) > 3 and all(a['macs'] < b['macs'] for a, b in zip(rows, rows[1:]))


def test_gradient_accumulation_averages_groups_and_the_short_last_one(small):
    from timm.task import TrainingTask

    class Mean(TrainingTask):
        """A loss whose gradient is the mean of the batch."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.criterion = MLCSDLoss(2, 1)

        def forward(self, input, target, indices=None):
            return dict(loss=self.weight * input.mean(), exit_logits=(torch.zeros(len(target), 2),))

    class NoSchedule:
        def step_update(self, num_updates):
            self.last = num_updates

    values = [1.0, 3.0, 5.0, 9.0, 10.0]
    batches = [(torch.full((4, 1), v), torch.zeros(4, dtype=torch.long)) for v in values]
    task, schedule = Mean(), NoSchedule()
    optimizer = torch.optim.SGD([task.weight], lr=1.0)
    epoch.EpochLoop(task, batches, optimizer, epoch.LoopConfig(grad_accum_steps=2), scheduler=schedule).run(0, 10)
    assert task.weight.item() == -((1 + 3) / 2 + (5 + 9) / 2 + 10)
    assert schedule.last == 13


@pytest.mark.parametrize(
    'flags, lr',
    [
        ('--lr 0.3 -b 64', 0.3),
        ('-b 64', 0.025),
        ('-b 64 --grad-accum-steps 4', 0.1),
        ('--opt adamw --lr-base 1e-3 -b 64', 5e-4),
        ('--opt adamw --lr-base 1e-3 -b 64 --lr-base-scale linear', 2.5e-4),
    ],
)
def test_learning_rate_grows_with_the_batch_as_in_timm(flags, lr):

    config = train.read_config(flags.split())
    images = config.data.batch_size * config.loop.grad_accum_steps
    assert scaled_lr(config.optimizer, images) == pytest.approx(lr)


def test_a_rate_that_follows_from_the_batch_follows_it_when_resumed(small, tmp_path, caplog):
    """As where a job goes on with fewer processes."""
    i = small.index('--lr')
    flags = [*small[:i], *small[i + 2 :], '--lr-base', 0.32, '--sched', 'step', '--decay-epochs', 99]
    assert run(train.main, [*flags, '--epochs', 1]) == 0
    assert run(train.main, [*flags, '--resume', tmp_path / 'run', '--batch-size', 4]) == 0
    assert 'Learning rate 0.005 instead of 0.01' in caplog.text
    after = load_checkpoint(tmp_path / 'run')
    # --lr-base is for 256 images
    assert [group['lr'] for group in after['optimizer']['param_groups']] == pytest.approx([0.005, 0.005])
    # one that was named stays
    assert run(train.main, [*flags, '--resume', tmp_path / 'run', '--lr', 0.01, '--epochs', 3]) == 2


def test_a_resumed_run_tells_what_changed(small, tmp_path, caplog):
    assert run(train.main, [*small, '--epochs', 1]) == 0
    caplog.clear()
    assert run(train.main, [*small, '--epochs', 2, '--resume', tmp_path / 'run']) == 0
    assert caplog.text == ''
    again = [*small, '--epochs', 2, '--resume', tmp_path / 'run', '--smoothing', 0.2, '--hflip', 0.3]
    assert run(train.main, again) == 0
    text = 'Going on with other settings than before: --smoothing 0.2 (was 0.0), --hflip 0.3 (was 0.5).'
    assert text in caplog.text and 'Nothing is left to train: 2 epochs are finished' in caplog.text


def test_more_batches_per_update_than_an_epoch_has(small, caplog):
    assert run(train.main, [*small, '--grad-accum-steps', 100]) == 0
    assert '--grad-accum-steps 100: an epoch has 5 batches' in caplog.text


def test_initial_checkpoint_of_a_plain_backbone(small, tmp_path):
    plain = timm.create_model('mlcsd_resnet18', num_classes=3, exits=1, small_input=True, channels=(8, 8, 8, 8))
    path = tmp_path / 'plain.pth'
    torch.save(plain.backbone.state_dict(), path)
    assert run(train.main, [*small, '--initial-checkpoint', path, '--lr', 1e-30, '--min-lr', 0]) == 0
    state = load_checkpoint(tmp_path / 'run')['state_dict']
    for n, p in plain.backbone.named_parameters():
        # updates of 1e-30 times a gradient, which change nothing but zeros
        torch.testing.assert_close(p.detach(), state[f'backbone.{n}'], rtol=0, atol=1e-20)


def test_an_initial_checkpoint_that_is_no_checkpoint(small, tmp_path, capsys):
    (tmp_path / 'lfs.pth.tar').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n')
    assert run(train.main, [*small, '--initial-checkpoint', tmp_path / 'lfs.pth.tar']) == 2
    error = capsys.readouterr().err
    assert (
        'expected a file of weights, got one that is damaged, of another kind' in error and 'weights_only' not in error
    )


@pytest.mark.parametrize('config', sorted(p.name for p in (ROOT / 'configs').glob('*.yaml')))
def test_configs_train(config, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('timm.models._builder.load_pretrained', lambda *args, **kwargs: None)
    plain = timm.create_model('mlcsd_resnet18', num_classes=3, exits=1)
    torch.save(plain.backbone.state_dict(), tmp_path / 'plain.pth')
    flags = ['--config', ROOT / 'configs' / config, '--device', 'cpu', '--workers', 0, '-b', 2, '--img-size', 32]
    more = ['--initial-checkpoint', tmp_path / 'plain.pth'] if config == 'heads_only.yaml' else []
    data = [] if config == 'quickstart.yaml' else [folder, '--train-split', 'train']
    assert run(train.main, [*data, *flags, *more, '--dry-run']) == 0
    assert 'images per update' in capsys.readouterr().out


def test_scripts_run_as_they_stand():
    for script in ('train.py', 'validate.py'):
        assert os.access(ROOT / script, os.X_OK)
        assert (ROOT / script).read_text().startswith('#!/usr/bin/env python3\n')
    help_text = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), '--help'], capture_output=True, text=True, check=True
    ).stdout
    for flag in ('--distill', '--small-input', '--val-fraction', '--model-ema', '--channels-last', '--resume'):
        assert flag in help_text


@pytest.mark.parametrize(
    'more', ['', '--distill-method crd', '--mixup 0.5 --reprob 0.5 --mixup-off-epoch 4', '--no-aug']
)
def test_data_kept_on_the_device(more, small, folder, tmp_path):
    flags = [*small, '--cache-dataset', 'device', '--epochs', 6, *more.split()]
    assert run(train.main, [*flags, '--experiment', 'whole', '--checkpoint-hist', 6]) == 0
    rows = list(csv.DictReader((tmp_path / 'whole' / 'summary.csv').open()))
    assert float(rows[-1]['train_cls']) < float(rows[0]['train_cls'])
    # the standard loader, reading the same held-out images for the same network, finds the same
    results = tmp_path / 'results.json'
    held_out = [folder, '--checkpoint', tmp_path / 'whole' / 'last.pth.tar', '--held-out', '--results-file', results]
    assert run(validate.main, [*held_out, '--device', 'cpu']) == 0
    found = [exit['top1'] for exit in json.loads(results.read_text())['exits']]
    assert found == pytest.approx([float(rows[-1][f'eval_Ex{k}_top1']) for k in range(1, 5)])
    cut = tmp_path / 'cut'
    cut.mkdir()
    (tmp_path / 'whole' / 'checkpoint-2.pth.tar').rename(cut / 'last.pth.tar')
    assert run(train.main, [*flags, '--experiment', 'cut', '--resume', cut]) == 0
    assert_same(weights(tmp_path / 'whole'), weights(cut))
