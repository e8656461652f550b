"""Losses and weights that are no numbers any more: told with their images, and never saved."""

import csv
import itertools
import re

import pytest
import torch
from PIL import Image
from processes import in_two_processes
from scripts import assert_same, run, weights

from timm_mlcsd.cli import train
from timm_mlcsd.distributed import DistributedContext
from timm_mlcsd.engine import trainer
from timm_mlcsd.engine.finite import NonFiniteError, NonFiniteMonitor
from timm_mlcsd.network import load_checkpoint

NAN = float('nan')


def poison(monkeypatch, bad):
    """Make the images of some batches NaN; returns what the images of all were before."""
    count, inner, seen = itertools.count(), trainer.train_loader, []

    class Poisoned:
        def __init__(self, loader):
            self.loader = loader
            self.names = loader.names

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for images, target in self.loader:
                seen.append(images)
                yield (images * NAN if next(count) in bad else images), target

    monkeypatch.setattr(trainer, 'train_loader', lambda *args, **kwargs: Poisoned(inner(*args, **kwargs)))
    return seen


@pytest.fixture
def greys(tmp_path):
    """Two classes of 20 images, each of one grey, which its name tells."""
    for i in range(40):
        path = tmp_path / 'greys' / 'train' / 'ab'[i % 2] / f'{5 * i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16), (5 * i,) * 3).save(path)
    return tmp_path / 'greys'


@pytest.mark.parametrize('more', ['', '--workers 2', '--cache-dataset device', '--distill-method crd'])
def test_the_images_of_the_batch_are_named(greys, small, tmp_path, monkeypatch, capsys, more):
    flags = [greys, *small[1:], '--no-aug', '--mean', 0, '--std', 1, '--batch-size', 5, '--val-fraction', 0.25]
    seen = poison(monkeypatch, {6 + 3})
    # 30 images are 6 batches
    assert run(train.main, [*flags, *more.split()]) == 2
    greys_of_it = (255 * seen[9].mean(dim=(1, 2, 3))).round().int().tolist()
    names = (tmp_path / 'run' / 'not_finite.txt').read_text().split()
    assert [int(name.rpartition('/')[2].removesuffix('.png')) for name in names] == greys_of_it
    error = capsys.readouterr().err
    assert f'the loss is nan at epoch 1, batch 3 ({names[0]}, {names[1]}, {names[2]} and 2 more images)' in error
    assert f'last good checkpoint is {tmp_path}/run/last.pth.tar' in error
    assert load_checkpoint(tmp_path / 'run')['epoch'] == 0


@pytest.mark.parametrize('bad', [1, 3])
def test_they_never_reach_a_checkpoint(small, tmp_path, monkeypatch, capsys, bad):
    poison(monkeypatch, {bad})
    assert run(train.main, [*small, '--checkpoint-every-steps', 2]) == 2
    error = capsys.readouterr().err
    assert f'the loss is nan at epoch 0, batch {bad} (' in error
    if bad == 1:
        assert 'no checkpoint is there yet' in error and not list((tmp_path / 'run').glob('*.tar'))
    else:
        assert load_checkpoint(tmp_path / 'run')['progress'][0]['step'] == 2
        assert all(t.isfinite().all() for t in weights(tmp_path / 'run').values())


@pytest.mark.parametrize('more', [[], ['--checkpoint-every-steps', 2]])
def test_weights_that_an_update_made_not_finite_are_not_written(small, tmp_path, monkeypatch, capsys, more):
    def damaging(config, task, model, *rest):
        optimizer = create_optimizer(config, task, model, *rest)
        updates = itertools.count(1)

        def damage(*_):
            # the last one of the first epoch, whose loss is not read again
            if next(updates) == 5:
                with torch.no_grad():
                    next(model.heads.parameters()).view(-1)[0] = NAN

        optimizer.register_step_post_hook(damage)
        return optimizer

    create_optimizer = trainer.create_optimizer
    monkeypatch.setattr(trainer, 'create_optimizer', damaging)
    assert run(train.main, [*small, *more]) == 2
    assert 'the weights are not finite at epoch 0, batch 4' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'last.pth.tar').exists() == bool(more)


def _watch(rank):
    monitor = NonFiniteMonitor(torch.device('cpu'), DistributedContext(rank, 2), lambda batch: [f'{rank}-{batch}.png'])
    monitor.update(0, torch.tensor(1.0))
    monitor.raise_if_any(7, 0, [torch.zeros(3)])
    for batch in range(1, 6):
        monitor.update(batch, torch.tensor(NAN if batch >= 5 - 2 * rank else 1.0))
    told = []
    for weights_of_rank_1 in (1.0, float('inf')):
        with pytest.raises(NonFiniteError) as e:
            monitor.raise_if_any(7, 5, [torch.tensor([1.0, weights_of_rank_1 if rank else 1.0])])
        told.append(str(e.value))
    return told


def test_all_processes_tell_of_the_first_batch_in_any(tmp_path):
    told = ['the loss is nan at epoch 7, batch 3 (1-3.png)', 'the weights are not finite at epoch 7, batch 5']
    assert in_two_processes(_watch, tmp_path) == [told, told]


def test_batches_without_a_finite_loss_are_left_out(small, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, {1, 2, 7})
    with caplog.at_level('WARNING'):
        assert run(train.main, [*small, '--skip-nonfinite', '2', '--epochs', '2']) == 0
    assert [re.sub(r' \(.* more images\)', '', r.message) for r in caplog.records if 'left out' in r.message] == [
        'the loss is nan at epoch 0, batch 1: left out (1 in a row)',
        'the loss is nan at epoch 0, batch 2: left out (2 in a row)',
        'the loss is nan at epoch 1, batch 2: left out (1 in a row)',
    ]
    state = weights(tmp_path / 'run')
    assert all(t.isfinite().all() for t in state.values())  # running statistics, too
    assert all(float(row['train_loss']) > 0 for row in csv.DictReader((tmp_path / 'run' / 'summary.csv').open()))


def test_too_many_in_a_row_stop(small, monkeypatch, capsys):
    poison(monkeypatch, {0, 1, 2})
    assert run(train.main, [*small, '--skip-nonfinite', '2']) == 2
    error = capsys.readouterr().err
    assert 'the loss is nan at epoch 0, batch 2 (' in error and '), as in the 2 batches before' in error


def test_an_epoch_of_nothing_stops(small, monkeypatch, capsys):
    poison(monkeypatch, set(range(5)))
    assert run(train.main, [*small, '--skip-nonfinite', '100']) == 2
    assert 'as in all of this epoch' in capsys.readouterr().err


def test_a_finite_run_is_the_same_with_it(small, tmp_path):
    assert run(train.main, [*small, '--experiment', 'a', '--epochs', '1']) == 0
    assert run(train.main, [*small, '--experiment', 'b', '--epochs', '1', '--skip-nonfinite', '3']) == 0
    assert_same(weights(tmp_path / 'a'), weights(tmp_path / 'b'))


class _Infinite(torch.autograd.Function):
    """The loss as it is, its gradient infinite."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float('inf')


def test_float16_does_not_skip_updates_for_ever(small, monkeypatch, capsys):
    """Its scaler leaves out every update whose gradients are not finite, and halves the scale, without a word."""
    forward = trainer.MLCSDTask.forward

    def damaged(self, *args):
        result = forward(self, *args)
        return dict(result, loss=_Infinite.apply(result['loss']))

    monkeypatch.setattr(trainer.MLCSDTask, 'forward', damaged)
    # 65,536 falls below 0.001 after 27 updates
    assert run(train.main, [*small, '--amp', '--amp-dtype', 'float16', '--epochs', 9]) == 2
    assert 'no gradients are finite in float16' in capsys.readouterr().err
