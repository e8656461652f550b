"""A checkpoint is whole or not there."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from timm_mlcsd.engine.checkpoint import BEST, PREVIOUS, CheckpointSaver, load_newest
from timm_mlcsd.errors import UserError
from timm_mlcsd.network import LAST, load_checkpoint

WEIGHTS = torch.tensor([0.125, -3.75, 42.0]).numpy().tobytes()


def state(epoch):
    tensors = {'w': torch.tensor([0.125, -3.75, 42.0])}
    return dict(arch='a', model_args={}, data_config={}, args={}, state_dict=tensors, epoch=epoch)


def test_keeps_last_best_and_newest(tmp_path):
    saver = CheckpointSaver(tmp_path, keep=2)
    best = [saver.save(state(epoch), epoch, metric) for epoch, metric in enumerate([1.0, 3.0, 3.0, 2.0])]
    assert best == [True, True, False, False]
    assert {p.name for p in tmp_path.iterdir()} == {
        LAST,
        BEST,
        'checkpoint-2.pth.tar',
        'checkpoint-3.pth.tar',
    }
    assert load_checkpoint(tmp_path)['epoch'] == 3
    assert load_checkpoint(tmp_path / BEST)['epoch'] == 1
    assert saver.best_metric == 3.0


def test_an_unfinished_epoch_has_a_stand_in(tmp_path, caplog):
    saver = CheckpointSaver(tmp_path)
    for step in (1, 2):
        saver.save_last(dict(state(-1), step=step))
    assert load_newest(tmp_path)['step'] == 2
    (tmp_path / LAST).write_bytes(b'')
    assert load_newest(tmp_path)['step'] == 1 and PREVIOUS in caplog.text
    saver.save(state(0), 0, 1.0)
    assert {p.name for p in tmp_path.iterdir()} == {LAST, BEST, 'checkpoint-0.pth.tar'}


def test_a_damaged_checkpoint_takes_no_good_ones_place(tmp_path):
    saver = CheckpointSaver(tmp_path)
    for step in (1, 2):
        saver.save_last(dict(state(-1), step=step))
    (tmp_path / LAST).write_bytes(b'')
    # another process goes on from the stand-in
    CheckpointSaver(tmp_path).save_last(dict(state(-1), step=3))
    assert load_checkpoint(tmp_path)['step'] == 3
    assert load_checkpoint(tmp_path / PREVIOUS)['step'] == 1


def test_a_resumed_saver_remembers_the_best(tmp_path):
    assert not CheckpointSaver(tmp_path, best_metric=5.0).save(state(7), 7, 4.0)
    assert not (tmp_path / BEST).exists()


def test_numbered_checkpoints_go_by_age_not_by_number(tmp_path):
    for epoch in (4, 5):
        CheckpointSaver(tmp_path, keep=2).save(state(epoch), epoch, 1.0)
    CheckpointSaver(tmp_path, keep=2).save(state(2), 2, 1.0)  # resumed from an earlier epoch
    assert {p.name for p in tmp_path.glob('checkpoint-*')} == {'checkpoint-5.pth.tar', 'checkpoint-2.pth.tar'}


def test_other_peoples_files_stay(tmp_path):
    (tmp_path / '.notes.tmp').touch()
    (tmp_path / '.last.pth.tar.tmp').touch()
    CheckpointSaver(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['.notes.tmp']


def test_works_without_hard_links(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError('not supported')

    monkeypatch.setattr(os, 'link', no_link)
    CheckpointSaver(tmp_path).save(state(0), 0, 1.0)
    assert load_checkpoint(tmp_path / BEST)['epoch'] == 0


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_last_good_one(tmp_path, monkeypatch, error):
    saver = CheckpointSaver(tmp_path)
    saver.save(state(0), 0, 1.0)
    save = torch.save

    def half(obj, f):
        save(obj, f)
        f.truncate(f.tell() // 2)
        raise error

    monkeypatch.setattr(torch, 'save', half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        saver.save(state(1), 1, 2.0)
    assert load_checkpoint(tmp_path)['epoch'] == 0
    assert {p.name for p in tmp_path.iterdir()} == {LAST, BEST, 'checkpoint-0.pth.tar'}


KILLED = """
import os, signal, sys, torch
from timm_mlcsd.engine.checkpoint import CheckpointSaver
saver = CheckpointSaver(sys.argv[1])
state = lambda epoch: dict(arch='a', model_args={}, data_config={}, args={}, state_dict={}, epoch=epoch)
saver.save(state(0), 0, 1.)
where = sys.argv[2]
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if where == 'writing':
    save = torch.save
    torch.save = lambda obj, f: (f.write(b'PK half a file'), f.flush(), kill())
elif where == 'before rename':
    os.replace = kill
elif where == 'before links':
    os.link = kill
saver.save(state(1), 1, 2.)
"""


@pytest.mark.parametrize('where', ['writing', 'before rename', 'before links'])
def test_sigkill_while_saving(tmp_path, where):
    process = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), where], timeout=120)
    assert process.returncode == -signal.SIGKILL
    for name in (LAST, BEST):
        assert load_checkpoint(tmp_path / name)['epoch'] == 0
    for path in tmp_path.glob('*.tar'):
        load_checkpoint(path)
    CheckpointSaver(tmp_path).save(state(1), 1, 2.0)
    assert load_checkpoint(tmp_path)['epoch'] == 1
    assert not list(tmp_path.glob('.*'))


def damage(path, how):
    data = path.read_bytes()
    path.unlink()  # the numbered checkpoint is the same file
    if how == 'flipped':
        place = data.index(WEIGHTS)
        data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    path.write_bytes({'truncated': data[: len(data) // 2], 'empty': b'', 'flipped': data}[how])


@pytest.mark.parametrize('how', ['truncated', 'empty', 'flipped'])
def test_a_damaged_last_checkpoint_has_a_stand_in(how, tmp_path, caplog):
    saver = CheckpointSaver(tmp_path)
    for epoch, metric in enumerate([3.0, 1.0, 2.0]):
        saver.save(state(epoch), epoch, metric)
    damage(tmp_path / LAST, how)
    with caplog.at_level('WARNING'):
        assert load_newest(tmp_path)['epoch'] == 2  # a numbered one, with the same content
    assert f'Going on from {tmp_path / "checkpoint-2.pth.tar"} instead' in caplog.text
    damage(tmp_path / 'checkpoint-2.pth.tar', how)
    assert load_newest(tmp_path / LAST)['epoch'] == 1
    with pytest.raises(UserError, match='cannot be read as a checkpoint'):
        load_newest(tmp_path / 'checkpoint-2.pth.tar')
    for path in tmp_path.glob('*.tar'):
        damage(path, 'empty')
    with pytest.raises(UserError, match=r'last\.pth\.tar.* cannot be read as a checkpoint'):
        load_newest(tmp_path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    saver = CheckpointSaver(tmp_path)
    monkeypatch.setattr(torch, 'save', lambda *_: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(UserError, match=r'No space left on device\. Earlier ones are kept; .* --resume'):
        saver.save_last(state(0))


def test_hostile_and_foreign_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ('touch ' + str(tmp_path / 'hacked'),)

    path = tmp_path / 'x.pth.tar'
    torch.save(dict(state(0), extra=Evil()), path)
    with pytest.raises(UserError, match='cannot be read as a checkpoint'):
        load_checkpoint(path)
    assert not (tmp_path / 'hacked').exists()
    path.write_bytes(b'')
    with pytest.raises(UserError, match='cannot be read as a checkpoint'):
        load_checkpoint(path)
    torch.save({'w': torch.zeros(1)}, path)
    with pytest.raises(UserError, match='it has no arch, model_args, state_dict, data_config, args, epoch'):
        load_checkpoint(path)
    torch.save(dict(state(0), model_args=[1], state_dict=3), path)
    with pytest.raises(UserError, match='it has no model_args, state_dict'):
        load_checkpoint(path)
    with pytest.raises(UserError, match='no checkpoint at'):
        load_checkpoint(tmp_path / 'nowhere')
