"""train.py and validate.py as a user runs them."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_mlcsd.engine import train, validate
from timm_mlcsd.engine.checkpoint import load_checkpoint
from timm_mlcsd.engine.config import parse_args
from timm_mlcsd.engine.flags import train_parser

ROOT = Path(__file__).parents[2]


def run(main, argv):
    """Exit code of a script."""
    try:
        main([str(a) for a in argv])
    except SystemExit as e:
        return e.code
    return 0


def weights(path):
    checkpoint = load_checkpoint(path)
    return {**checkpoint['state_dict'], **checkpoint.get('task_state', {}).get('criterion', {})}


def assert_same(a, b):
    assert set(a) == set(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope='module')
def trained(folder, small_flags, tmp_path_factory):
    """One run that learns the colours."""
    out = tmp_path_factory.mktemp('trained')
    where = ['--output', out, '--experiment', 'run', '--checkpoint-hist', 2]
    assert run(train.main, [folder, *small_flags, *where, '--epochs', 6, '--model-ema']) == 0
    return out / 'run'


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


def test_validate_reports_every_exit(trained, folder, tmp_path, capsys):
    argv = ['--checkpoint', trained, '--split', 'test', '--workers', 0]
    plot = tmp_path / 'new' / 'plot.png'
    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.json', '--plot', plot]) == 0
    printed = capsys.readouterr().out
    assert '12 images of test, input 3x16x16' in printed and 'Right here, wrong at the last' in printed
    results = json.loads((tmp_path / 'r.json').read_text())
    assert [e['exit'] for e in results['exits']] == ['Ex1', 'Ex2', 'Ex3', 'Ex4']
    assert results['mean_top1'] == pytest.approx(sum(e['top1'] for e in results['exits']) / 4)
    assert results['exits'][-1]['rescued'] == 0 and results['num_samples'] == 12
    assert plot.read_bytes().startswith(b'\x89PNG')

    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.csv']) == 0
    rows = list(csv.DictReader((tmp_path / 'r.csv').open()))
    assert [float(r['top1']) for r in rows] == [e['top1'] for e in results['exits']]

    # the numbers are those of the network: recomputed from its logits
    checkpoint = load_checkpoint(trained)
    model = timm.create_model(checkpoint['arch'], **checkpoint['model_args']).eval()
    model.load_state_dict(checkpoint['state_dict'])
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    config = checkpoint['data_config']
    data = ImageFolder(str(folder / 'test'), Compose([ToTensor(), Normalize(config['mean'], config['std'])]))
    images, target = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    with torch.no_grad():
        right = torch.stack(model.forward_exits(images).logits).argmax(-1) == target
    assert [e['top1'] for e in results['exits']] == pytest.approx((100 * right.double().mean(1)).tolist())
    rescued = 100 * (right & ~right[-1]).double().mean(1)
    assert [e['rescued'] for e in results['exits']] == pytest.approx(rescued.tolist())
    assert right.float().mean() > 0.9


def test_validate_on_the_held_out_part(trained, tmp_path):
    argv = ['--checkpoint', trained / 'model_best.pth.tar', '--held-out', '--use-ema', '--workers', 0]
    assert run(validate.main, [*argv, '--results-file', tmp_path / 'r.json']) == 0
    results = json.loads((tmp_path / 'r.json').read_text())
    # training chose the best epoch by the averaged weights on these very images
    assert results['mean_top1'] == pytest.approx(load_checkpoint(trained / 'model_best.pth.tar')['metric'])
    assert results['num_samples'] == 5 and results['split'] == 'the held-out part of train'


def test_validate_a_folder_for_the_hub(trained, tmp_path):
    from timm.models import save_for_hf

    checkpoint = load_checkpoint(trained)
    model = timm.create_model(checkpoint['arch'], **checkpoint['model_args'])
    model.load_state_dict(checkpoint['state_dict'])
    save_for_hf(model, tmp_path / 'hub', model_args=checkpoint['model_args'], safe_serialization=True)
    data = [checkpoint['args']['data_dir'], '--split', 'test', '--workers', 0]
    size = ['--img-size', 16, '--crop-pct', 1]
    for i, source in enumerate((['--model', f'local-dir:{tmp_path / "hub"}', *size], ['--checkpoint', trained])):
        assert run(validate.main, [*data, *source, '--results-file', tmp_path / f'{i}.json']) == 0
    first, second = (json.loads((tmp_path / f'{i}.json').read_text())['exits'] for i in (0, 1))
    assert [e['loss'] for e in first] == pytest.approx([e['loss'] for e in second])


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


def test_the_test_split_is_never_read(small, folder, tmp_path):
    import shutil

    shutil.copytree(folder / 'train', tmp_path / 'data' / 'train')
    for name in ('red', 'green', 'blue'):
        broken = tmp_path / 'data' / 'test' / name / 'x.png'
        broken.parent.mkdir(parents=True)
        broken.write_text('not an image')
    assert run(train.main, [tmp_path / 'data', *small[1:], '--epochs', 1]) == 0
    assert len(load_checkpoint(tmp_path / 'run')['val_indices']) == 5


def test_a_folder_without_splits_is_no_validation_data(small, folder, tmp_path, capsys):
    classes = folder / 'train'
    assert run(train.main, [classes, *small[1:], '--epochs', 1]) == 0
    checkpoint = ['--checkpoint', tmp_path / 'run', '--workers', 0]
    assert run(validate.main, [*checkpoint, '--held-out']) == 0
    for main, argv in (
        (validate.main, checkpoint),
        (train.main, [classes, *small[1:], '--experiment', 'b', '--val-split', 'validation']),
    ):
        assert run(main, argv) == 2
        assert 'is not divided into splits' in capsys.readouterr().err


def test_validation_classes_must_be_those_of_training(small, folder, tmp_path, capsys):
    for split, names in dict(train=('red', 'green', 'blue'), val=('red', 'green')).items():
        for name in names:
            (tmp_path / 'data' / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'data' / split / name).symlink_to(folder / 'train' / name)
    assert run(train.main, [tmp_path / 'data', *small[1:], '--val-split', 'val']) == 2
    assert "the classes of split 'val'" in capsys.readouterr().err


def test_torchvision_images_get_the_mode_that_the_model_wants(small, folder, tmp_path):
    data = ['--dataset', 'torch/image_folder', '--val-split', 'test', '--in-chans', 1]
    assert run(train.main, [*small, *data, '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['blue', 'green', 'red']


def test_greyscale_images(small, tmp_path):
    assert run(train.main, [*small, '--epochs', 1, '--input-size', 1, 16, 16]) == 0
    checkpoint = load_checkpoint(tmp_path / 'run')
    assert checkpoint['model_args']['in_chans'] == 1 and checkpoint['data_config']['input_size'] == (1, 16, 16)
    argv = ['--checkpoint', tmp_path / 'run', '--split', 'test', '--workers', 0]
    assert run(validate.main, argv) == 0
    assert run(validate.main, [*argv, '--in-chans', 3]) == 2


def test_fine_tuning_what_a_folder_holds(small, folder, tmp_path):
    from timm.models import save_for_hf

    model_args = dict(exits=3, exit_head='conv1x1', small_input=True, channels=(8, 8, 8, 8))
    model = timm.create_model('mlcsd_resnet18', num_classes=9, **model_args)
    save_for_hf(model, tmp_path / 'hub', model_args=model_args, safe_serialization=True)
    flags = '--pretrained --img-size 16 --epochs 1 --batch-size 8 --workers 0 --lr 0 --warmup-epochs 0'.split()
    where = ['--output', tmp_path, '--experiment', 'tuned']
    argv = [folder, '--model', f'local-dir:{tmp_path / "hub"}', *flags, *where]
    assert run(train.main, argv) == 0
    checkpoint = load_checkpoint(tmp_path / 'tuned')
    assert checkpoint['arch'] == 'mlcsd_resnet18' and checkpoint['model_args']['exits'] == 3
    name = 'heads.0.reduce.1.weight'
    assert torch.equal(checkpoint['state_dict'][name], model.state_dict()[name])
    assert run(validate.main, ['--checkpoint', tmp_path / 'tuned', '--split', 'test', '--workers', 0]) == 0


def test_gradient_accumulation_averages_groups_and_the_short_last_one(small):
    from timm.task import TrainingTask

    class Mean(TrainingTask):
        """A loss whose gradient is the mean of the batch."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input, target):
            return dict(loss=self.weight * input.mean(), exit_logits=(torch.zeros(len(target), 2),))

    class NoSchedule:
        def step_update(self, num_updates):
            self.last = num_updates

    args = parse_args(train_parser(), [*map(str, small), '--grad-accum-steps', '2'])
    values = [1.0, 3.0, 5.0, 9.0, 10.0]
    batches = [(torch.full((4, 1), v), torch.zeros(4, dtype=torch.long)) for v in values]
    task, schedule = Mean(), NoSchedule()
    optimizer = torch.optim.SGD(task.parameters(), lr=1.0)
    train._train_epoch(0, task, batches, optimizer, schedule, None, contextlib.nullcontext(), args, 10)
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

    assert train._scaled_lr(parse_args(train_parser(), flags.split())) == pytest.approx(lr)


def test_initial_checkpoint_of_a_plain_backbone(small, tmp_path):
    plain = timm.create_model('mlcsd_resnet18', num_classes=3, exits=1, small_input=True, channels=(8, 8, 8, 8))
    path = tmp_path / 'plain.pth'
    torch.save(plain.backbone.state_dict(), path)
    assert run(train.main, [*small, '--initial-checkpoint', path, '--lr', 0, '--min-lr', 0]) == 0
    state = load_checkpoint(tmp_path / 'run')['state_dict']
    assert all(torch.equal(p, state[f'backbone.{n}']) for n, p in plain.backbone.named_parameters())


def test_local_parquet(small, tmp_path):
    datasets = pytest.importorskip('datasets')
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    features = datasets.Features(img=datasets.Image(), fine_label=datasets.ClassLabel(names=['a', 'b', 'c']))
    for split in ('train', 'test'):
        rows = [
            dict(img=Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)), fine_label=i % 3)
            for i in range(30)
        ]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / 'data' / f'{split}-0.parquet')
    data = ['--dataset', f'hfds/{tmp_path / "data"}', '--data-dir', tmp_path / 'cache']
    keys = ['--input-key', 'img', '--target-key', 'fine_label']
    assert run(train.main, [*small[1:], *data, *keys, '--epochs', 1]) == 0
    assert load_checkpoint(tmp_path / 'run')['class_names'] == ['a', 'b', 'c']
    assert run(validate.main, ['--checkpoint', tmp_path / 'run', '--split', 'test', '--workers', 0]) == 0


def test_digits_from_the_quickstart_config(tmp_path):
    pytest.importorskip('sklearn')
    argv = ['--config', ROOT / 'configs' / 'quickstart.yaml', '--epochs', 1, '--output', tmp_path, '--workers', 0]
    assert run(train.main, argv) == 0
    assert run(validate.main, ['--checkpoint', tmp_path / 'quickstart', '--split', 'test', '--workers', 0]) == 0


@pytest.mark.parametrize('config', sorted(p.name for p in (ROOT / 'configs').glob('*.yaml')))
def test_configs_parse(config):

    assert parse_args(train_parser(), ['--config', str(ROOT / 'configs' / config)]).model.startswith('mlcsd_')


# mistakes: one line, exit code 2, no traceback


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model mlcsd_resnet81', 'near names: mlcsd_resnet18'),
        ('--model resnet18', 'use mlcsd_resnet18'),
        ('--exits 9', 'exits=9 is impossible'),
        ('--exits 0', 'exits=0 is impossible'),
        ('--exits layer7', "names 'layer7'"),
        ('--model-kwargs colour=red', 'colour'),
        ('--img-size 4', 'image size 4x4 is too small: the network reduces 8 times'),
        ('--data-dir /nowhere', "no data at '/nowhere'"),
        ('--train-split trian', "has no split 'trian'; it has test, train"),
        ('--val-split val', "has no split 'val'; it has test, train"),
        ('--sched nonsense', '--sched nonsense cannot be made'),
        ('--sched plateau', 'a resumed run would not go on'),
        ('--aa nonsense', 'the data flags cannot be used'),
        ('--interpolation nonsense', 'the data flags cannot be used'),
        ('--smoothing 1.5', '--smoothing 1.5 must be at least 0 and less than 1'),
        ('--alpha nan', 'alpha=nan must not be negative'),
        ('--exit-weights 1 1 1 -1', 'must not be negative'),
        ('--dataset torch/cifar100 --train-split validation', "torch/cifar100 has no split 'validation'"),
        ('--dataset torch/cifar100 --data-dir', 'expected one argument'),
        ('--config', 'expected one argument'),
        ('--mixup 1 --batch-size 7', 'must be even'),
        ('--torchcompile nonsense', '--torchcompile nonsense is unknown'),
        ('--in-chans 1 --mean .5 .5 .5', '--mean has 3 values for 1 channels'),
        ('--epochs 0', 'must be at least 1'),
        ('--dataset hfds//nowhere', "no data at '/nowhere'"),
        ('--dataset nonsense/x', "--dataset 'nonsense/x' is unknown"),
        ('--num-classes 2', 'the data has 3 classes'),
        ('--val-fraction 0', '--val-fraction 0.0 must lie between 0 and 1'),
        ('--batch-size 1000', 'larger than the training set'),
        ('--batch-size 0', 'must be at least 1'),
        ('--resume /nowhere', "no checkpoint at '/nowhere'"),
        ('--initial-checkpoint /nowhere', 'there is no such file'),
        ('--jsd-loss --aug-splits 3', 'teachers of self-distillation and their targets are per image'),
        ('--exit-weights 1 2', 'exit_weights has 2 numbers for 4 exits'),
        ('--temperature 0', 'temperature=0.0 must be positive'),
        ('--opt nonsense', '--opt nonsense cannot be made'),
        ('--device nonsense', '--device nonsense cannot be used'),
        ('--pretrained', 'no multi-exit weights'),
        ('--lr 1e30', 'the loss is'),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(small, folder, flags, message, capsys):
    data = [] if '--data-dir' in flags else [small[0]]
    code = run(train.main, [*data, *small[1:], *flags.split()])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if 'error:' in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith('train.py: error: ') and message in lines[0]
    assert 'Traceback' not in error


def test_mistakes_with_checkpoints(trained, small, tmp_path, capsys):
    def error_of(main, argv):
        assert run(main, argv) == 2
        error = capsys.readouterr().err
        assert 'Traceback' not in error
        return error.splitlines()[-1]

    arguments = [*small[:-2], '--resume', trained]
    assert 'its arch is mlcsd_resnet18' in error_of(train.main, [*arguments, '--model', 'mlcsd_resnet34'])
    assert 'its model_args is' in error_of(train.main, [*arguments, '--exits', 2])
    assert 'its val_seed is 0, not 1' in error_of(train.main, [*arguments, '--val-seed', 1])
    assert 'holds a run already' in error_of(
        train.main, [*small, '--output', trained.parent, '--experiment', trained.name]
    )
    initial = ['--initial-checkpoint', trained / 'last.pth.tar']
    assert 'does not fit the model' in error_of(train.main, [*small, *initial, '--model', 'mlcsd_resnet50'])

    assert 'the run used --lr 0.02, not 0.1' in error_of(train.main, [*arguments, '--lr', 0.1])
    assert 'the run used --opt sgd, not adamw' in error_of(train.main, [*arguments, '--opt', 'adamw'])

    assert "has no split 'tset'" in error_of(validate.main, ['--checkpoint', trained, '--split', 'tset'])
    (tmp_path / 'other' / 'test').mkdir(parents=True)
    for name in ('green', 'red', 'violet'):
        (tmp_path / 'other' / 'test' / name).symlink_to(Path(small[0]) / 'test' / 'red')
    other = [tmp_path / 'other', '--split', 'test', '--checkpoint', trained]
    assert 'are not those that are trained on' in error_of(validate.main, other)

    data = [small[0], '--split', 'test']
    assert 'give either --checkpoint' in error_of(validate.main, data)
    for results, message in (('r.txt', 'must end in .csv or .json'), ('/proc/x/r.json', 'cannot be written')):
        argv = [*data, '--checkpoint', trained, '--results-file', results]
        assert message in error_of(validate.main, argv)
    assert 'cannot be made' in error_of(validate.main, [*data, '--model', 'local-dir:/nowhere'])


def test_scripts_run_as_they_stand():
    for script in ('train.py', 'validate.py'):
        assert os.access(ROOT / script, os.X_OK)
        assert (ROOT / script).read_text().startswith('#!/usr/bin/env python3\n')
    help_text = subprocess.run(
        [sys.executable, str(ROOT / 'train.py'), '--help'], capture_output=True, text=True, check=True
    ).stdout
    for flag in ('--distill', '--small-input', '--val-fraction', '--model-ema', '--channels-last', '--resume'):
        assert flag in help_text
