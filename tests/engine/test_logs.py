"""What --log-* and --dry-run show."""

import re
import sys
import types

import pytest
import torch
from scripts import run

from timm_mlcsd.cli import train
from timm_mlcsd.engine.logs import CELL

VALUES = {'loss', 'cls', 'kd', 'ht', 'cwem', 'lr', 'images_per_s', 'val_mean_top1', 'val_Ex1_top1', 'val_Ex4_loss'}


def test_tensorboard(small, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(train.main, [*small, '--log-tensorboard']) == 0
    events = EventAccumulator(str(tmp_path / 'run'))
    events.Reload()
    assert set(events.Tags()['scalars']) >= VALUES
    assert [e.step for e in events.Scalars('loss')] == [0, 1]
    pictures = events.Images('teachers')
    assert [p.step for p in pictures] == [0, 1] and (pictures[0].width, pictures[0].height) == (4 * CELL, 4 * CELL)


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_services(small, monkeypatch, name):
    """Both packages have this interface; tried by hand with wandb 0.31 (offline) and trackio 0.43."""
    calls = types.SimpleNamespace(init=[], log=[], finished=0)

    def finish():
        calls.finished += 1

    module = types.ModuleType(name)
    module.init = lambda **kwargs: calls.init.append(kwargs)
    module.log = lambda values, step: calls.log.append((step, values))
    module.finish = finish
    module.Image = lambda pixels: pixels
    monkeypatch.setitem(sys.modules, name, module)
    assert run(train.main, [*small, f'--log-{name}', '--log-project', 'exits']) == 0
    (init,) = calls.init
    assert init['project'] == 'exits' and init['name'] == 'run' and init['config']['batch_size'] == 8
    assert [step for step, _ in calls.log] == [0, 1] and calls.finished == 1
    values = calls.log[0][1]
    assert set(values) >= VALUES
    picture = torch.from_numpy(values['teachers'])
    # a row of the picture is an exit's teacher: weights that sum to 1
    rows = picture[::CELL, ::CELL].float().sum(dim=1) / 255
    torch.testing.assert_close(rows, torch.ones(4), rtol=0, atol=4 / 255)


def test_without_a_teacher_there_is_no_picture(small, monkeypatch):
    logged = []
    monkeypatch.setattr('timm_mlcsd.engine.logs.MetricLoggers.add', lambda self, *args: logged.append(args))
    monkeypatch.setattr('timm_mlcsd.engine.logs._TensorBoard.__init__', lambda self, *args: None)
    monkeypatch.setattr('timm_mlcsd.engine.logs._TensorBoard.close', lambda self: None)
    assert run(train.main, [*small, '--log-tensorboard', '--distill', 'none']) == 0
    assert [(epoch, weights) for epoch, _, weights in logged] == [(0, None), (1, None)]


def test_a_missing_package_is_named(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    for more in ([], ['--dry-run']):
        assert run(train.main, [*small, '--log-wandb', *more]) == 2
        assert 'pip install ".[wandb]"' in capsys.readouterr().err


@pytest.mark.parametrize('more, images', [([], 8), (['--grad-accum-steps', 3], 24), (['--batch-size', 43], 43)])
def test_dry_run_tells_what_training_takes_and_leaves_nothing(small, tmp_path, capsys, more, images):
    assert run(train.main, [*small, '--dry-run', *more]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf'images per update +{images} in [\d.]+ s, \d+ images/s', shown)
    assert re.search(r'time of an epoch +[\d.]+ s', shown) and re.search(r'peak memory +[\d.]+ GiB on cpu', shown)
    assert not (tmp_path / 'run').exists()


def test_dry_run_where_a_run_is(small, tmp_path):
    assert run(train.main, [*small, '--epochs', 1]) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'run').iterdir()}
    assert run(train.main, [*small, '--dry-run']) == 0
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / 'run').iterdir()} == before
