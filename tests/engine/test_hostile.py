"""Checkpoints and images from other sources: refused by name, and nothing before or beside them is lost."""

import socket

import pytest
import torch
from PIL import Image
from scripts import run

from timm_mlcsd.cli import predict, push, validate


@pytest.fixture
def photo(folder):
    return folder / 'test' / 'red' / '0.png'


@pytest.fixture
def tampered(trained, tmp_path, monkeypatch):
    """Makes a checkpoint with other entries; every connection is an error."""

    def connect(*_):
        raise AssertionError('a connection was opened')

    monkeypatch.setattr(socket.socket, 'connect', connect)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')

    def make(**entries):
        checkpoint = torch.load(trained / 'last.pth.tar', weights_only=True)
        for name, change in entries.items():
            checkpoint[name] = change(checkpoint[name])
        torch.save(checkpoint, tmp_path / 'tampered.pth.tar')
        return tmp_path / 'tampered.pth.tar'

    return make


@pytest.mark.parametrize(
    'entries, message',
    [
        (dict(arch=lambda _: 'hf-hub:someone/net'), "architecture 'hf-hub:someone/net'"),
        (dict(arch=lambda _: 'local-dir:/etc'), "architecture 'local-dir:/etc'"),
        (dict(arch=lambda _: 'resnet18'), "architecture 'resnet18'"),
        (dict(model_args=lambda a: {**a, 'checkpoint_path': '/etc/passwd'}), 'model_args.checkpoint_path'),
        (dict(model_args=lambda a: {**a, 'pretrained_backbone': 'hf-hub:x/y'}), 'pretrained_backbone'),
        (dict(model_args=lambda a: {**a, 'channels': (10**9, 8, 8, 8)}), 'model_args.channels'),
        (dict(model_args=lambda a: {**a, 'num_classes': 10**6}), 'cannot be made again'),
        (dict(data_config=lambda c: {**c, 'crop_pct': 0.001}), 'crop_pct=0.001'),
        (dict(data_config=lambda c: {**c, 'input_size': (3, 10**6, 10**6)}), 'input_size'),
        (dict(data_config=lambda c: {**c, 'std': (0.0, 0.0, 0.0)}), 'std'),
        (dict(class_names=lambda _: ['a', 'b', 'c', 'd']), '4 names for 3 classes'),
        (dict(class_names=lambda _: 'abc'), 'class_names'),
        (dict(class_names=lambda _: ['a', 1, 'c']), 'class_names[1]'),
    ],
)
def test_checkpoints_that_say_what_they_cannot(tampered, photo, capsys, entries, message):
    path = tampered(**entries)
    for main, argv in ((predict.main, [path, photo]), (push.main, [path, 'me/net'])):
        assert run(main, argv) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1 and 'Traceback' not in error
    assert run(validate.main, ['--checkpoint', path, '--split', 'test', '--workers', 0]) == 2
    assert message in capsys.readouterr().err


def test_answers_come_before_and_after_images_that_cannot_be_read(trained, photo, tmp_path, capsys):
    Image.new('RGB', (65000, 1)).save(tmp_path / 'long.png')
    (tmp_path / 'cut.png').write_bytes(photo.read_bytes()[:60])
    bad = [tmp_path / 'long.png', tmp_path / 'cut.png', tmp_path / 'none.png']
    assert run(predict.main, [trained, photo, *bad, photo.with_name('1.png')]) == 2
    out, err = capsys.readouterr()
    assert out.count(str(photo.parent)) == 2
    assert err.count('\n') == 1 and '3 of 5 images' in err and 'its size is 65000x1' in err
