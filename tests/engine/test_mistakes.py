"""A user's mistakes: one line, exit code 2, no traceback."""

from pathlib import Path

import pytest
from scripts import run

from timm_mlcsd.cli import train, validate


@pytest.mark.parametrize(
    'flags, message',
    [
        ('--model mlcsd_resnet81', 'near names: mlcsd_resnet18'),
        ('--model resnet18', 'use mlcsd_resnet18'),
        ('--exits 9', 'exits=9 is impossible'),
        ('--exits 0', "argument --exits: expected an integer from 1 to 1000, got '0'"),
        ('--gp=', "global_pool='' leaves the last exit's maps unpooled"),
        ('--exits layer7', "names 'layer7'"),
        ('--model-kwargs colour=red', 'colour'),
        ('--img-size 4', 'image size 4x4 is too small: the network reduces 8 times'),
        ('--data-dir /nowhere', "no data at '/nowhere'"),
        ('--train-split trian', "has no split 'trian'; it has test, train"),
        ('--val-split val', "has no split 'val'; it has test, train"),
        ('--sched nonsense', '--sched nonsense cannot be made'),
        ('--sched plateau', 'a resumed run would not go on'),
        ('--aa nonsense', 'the data flags cannot be used'),
        ('--interpolation nonsense', 'expected one of nearest, bilinear'),
        ('--train-interpolation nonsense', 'expected one of nearest, bilinear'),
        ('--crop-pct 0', 'expected a number from 0.1 to 1'),
        ('--scale 2 1', '--scale 2 1: expected the smaller number first'),
        ('--ratio 0 1', "argument --ratio: expected a number above 0 and at most 100, got '0'"),
        ('--input-img-mode nonsense', '--input-img-mode nonsense is no mode of Pillow'),
        ('--in-chans 4', 'images are read as RGB, with 3 channels'),
        ('--heads-only DIR', "got 'DIR'; DIR goes in front of the flags"),
        ('--smoothing 1.5', 'argument --smoothing: expected a number at least 0 and below 1'),
        ('--alpha nan', "argument --alpha: expected a number from 0 to 1000000, got 'nan'"),
        ('--exit-weights 1 1 1 -1', 'argument --exit-weights: expected a number from 0 to'),
        ('--dataset torch/cifar100 --train-split validation', "torch/cifar100 has no split 'validation'"),
        ('--dataset torch/cifar100 --data-dir', 'expected one argument'),
        ('--config', 'expected one argument'),
        ('--mixup 1 --batch-size 7', 'must be even'),
        ('--distill-method crd --mixup 1', 'leave out --mixup'),
        ('--distill-method dkd --cutmix 1', 'leave out --mixup'),
        ('--cache-dataset device --aa rand-m9', 'it does no --aa rand-m9'),
        ('--cache-dataset device --train-crop-mode rrc', 'it does no --train-crop-mode rrc'),
        ('--torchcompile nonsense', '--torchcompile nonsense is unknown'),
        ('--torchcompile --torchcompile-mode nonsense', '--torchcompile inductor --torchcompile-mode nonsense: '),
        ('--torchcompile-mode default', 'does nothing without --torchcompile'),
        ('--seed 4294967296', 'expected an integer from 0 to 2147483647'),
        ('--mixup -1', 'expected a number from 0 to 1000'),
        ('--epoch-repeats 2', '--epoch-repeats 2.0 is for streams alone'),
        ('--train-num-samples 5', '--train-num-samples 5 is for streams alone'),
        ('--in-chans 1 --mean .5 .5 .5', '--mean has 3 values for 1 channels'),
        ('--epochs 0', 'expected an integer from 1 to'),
        ('--dataset hfds//nowhere', "no data at '/nowhere'"),
        ('--dataset nonsense/x', "--dataset 'nonsense/x' is unknown"),
        ('--num-classes 2', 'the data has 3 classes'),
        ('--val-fraction 0', 'expected a number above 0 and below 1'),
        ('--batch-size 1000', 'larger than the training set'),
        ('--batch-size 0', 'argument -b/--batch-size: expected an integer from 1 to'),
        ('--resume /nowhere', "no checkpoint at '/nowhere'"),
        ('--initial-checkpoint /nowhere', 'there is no such file'),
        ('--exit-weights 1 2', 'exit_weights has 2 numbers for 4 exits'),
        ('--temperature 0', 'argument --temperature: expected a number from 0.01 to 1000'),
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


def test_a_folder_of_data_that_a_flag_took_is_named(small, capsys):
    assert run(train.main, [*small[1:], '--pretrained-backbone', small[0]]) == 2
    assert f'--pretrained-backbone {small[0]}: expected a tag of weights and data' in capsys.readouterr().err


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
    assert 'cannot be loaded' in error_of(validate.main, [*data, '--model', 'local-dir:/nowhere'])
