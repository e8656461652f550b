"""The command line and its config file."""

import re

import pytest
import yaml

from timm_mlcsd.cli import train, validate
from timm_mlcsd.cli.config_file import parse_args
from timm_mlcsd.cli.flags import train_parser
from timm_mlcsd.errors import UserError


def parse(tmp_path, config, argv=()):
    """Arguments of a config file and a command line, whose combination is checked."""
    path = tmp_path / 'config.yaml'
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    argv = ['--config', str(path), *argv]
    train.read_config(argv)
    return parse_args(train_parser(), argv)


def test_command_line_wins_over_config(tmp_path):
    config = dict(
        epochs=7, lr=0.5, amp=True, small_input=False, scale=[0.5, 1.0], model_kwargs=dict(channels=[8, 8, 8, 8], x='y')
    )
    args = parse(tmp_path, config, ['--lr', '0.1', 'data'])
    assert (args.epochs, args.lr, args.amp, args.small_input, args.scale) == (7, 0.1, True, False, [0.5, 1.0])
    assert args.model_kwargs == dict(channels=[8, 8, 8, 8], x='y')
    assert args.data_dir == 'data'
    assert args.momentum == 0.9


def test_config_values_of_every_shape(tmp_path):
    args = parse(
        tmp_path,
        'exits: [layer1.1, layer2.0]\npretrained-backbone: true\nlr: 1e-3\nseed: null\ndata_dir: /d\nmin_lr: 1.5e-06\n',
    )
    assert args.exits == ['layer1.1', 'layer2.0']
    assert args.pretrained_backbone is True and args.lr == 0.001 and args.seed == 42 and args.data_dir == '/d'
    assert args.min_lr == 1.5e-6
    assert parse(tmp_path, 'pretrained_backbone: a1_in1k').pretrained_backbone == 'a1_in1k'
    assert parse(tmp_path, 'pretrained_backbone: false').pretrained_backbone is False
    assert parse(tmp_path, 'exits: 4').exits == 4
    assert parse(tmp_path, '').epochs == 300
    merged = parse(tmp_path, 'model_kwargs: &a {x: 1, y: 2}\nopt_kwargs: {<<: *a, y: 3}\n')
    assert merged.model_kwargs == dict(x=1, y=2) and merged.opt_args == dict(x=1, y=3)
    assert [parse(tmp_path, f'pin_mem: {value}').pin_mem for value in ('true', 'false', 'null')] == [True, False, None]


def test_resolved_arguments_are_a_config(tmp_path):
    args = parse(tmp_path, dict(model_kwargs=dict(channels=(8, 8, 8, 8)), exits=['layer1', 'layer2'], amp=True))
    assert vars(parse(tmp_path, yaml.safe_dump(vars(args)))) == vars(args)


@pytest.mark.parametrize(
    'config, message',
    [
        ('epoch: 3', "no flag has the name 'epoch'; near names: epochs"),
        ('zzz: 3', "no flag has the name 'zzz'; --help lists them"),
        ('config: other.yaml', "no flag has the name 'config'"),
        ('epochs: many', "argument --epochs: expected an integer from 1 to 2147483647, got 'many'"),
        ('epochs: 0', "argument --epochs: expected an integer from 1 to 2147483647, got '0'"),
        ('distill: some', 'invalid choice'),
        ('mean: [0.5, 0.5]', '--mean has 2 values for 3 channels'),
        ('amp: 3', 'amp is a switch; give true or false'),
        ('pin_mem: 3', 'pin_mem is a switch; give true or false'),
        ('no_pin_mem: true', "no flag has the name 'no_pin_mem'"),
        ('lr: 0.1\nepochs: 3\nlr: 0.2', "it has 'lr' twice"),
        ('batch-size: 8\nlr: 0.1\nbatch_size: 16', "'batch-size' and 'batch_size' are the same flag"),
        ('dr: 0.5\ndecay-rate: 0.1', "'dr' and 'decay-rate' are the same flag"),
        ('opt_args: {nesterov: true}\nopt-kwargs: {nesterov: false}', "'opt_args' and 'opt-kwargs' are the same flag"),
        ('lr: .nan', "argument --lr: expected a number at least 0, got '.nan'"),
        ('batch_size: true', 'batch_size takes one value'),
        ('epochs: 1:30', "got '1:30'"),
        ('epochs: 1_000', "got '1_000'"),
        ('mean: 0x1', "got '0x1'"),
        ('experiment: [a, b]', 'experiment takes one value'),
        ('experiment: {a: 1}', 'experiment takes one value'),
        ('model: on', 'quote it if it is text'),
        ('opt_kwargs: [1, 2]', "expected KEY=VALUE, got '1'"),
        ('opt_kwargs: true', 'opt_args takes key: value pairs'),
        ('opt_kwargs: {eps: .inf}', 'expected finite numbers'),
        ('- epochs', 'must hold "flag: value" lines'),
        ('a: [', 'is not valid YAML'),
    ],
)
def test_mistakes_in_a_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, config)


@pytest.mark.parametrize(
    'argv, message',
    [
        ('--epochs x', "expected an integer from 1 to 2147483647, got 'x'"),
        ('--seed -1', "argument --seed: expected an integer from 0 to 2147483647, got '-1'"),
        ('--workers -1', "argument -j/--workers: expected an integer from 0 to 1024, got '-1'"),
        ('--model-kwargs foo', "expected KEY=VALUE, got 'foo'"),
        ('--epoch 3', 'unknown flag --epoch: did you mean --epochs?'),
        ('DIR OTHER', 'unrecognized arguments: OTHER'),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse_args(train_parser(), argv.split())


@pytest.mark.parametrize('last', ['std: [0.1, 0.2, 0.3]', 'pretrained_backbone: true', 'model_kwargs: {a: 1}'])
def test_a_config_never_swallows_the_folder(tmp_path, last):
    args = parse(tmp_path, f'epochs: 3\n{last}\n', ['DIR'])
    assert args.data_dir == 'DIR' and args.epochs == 3
    name = last.split(':')[0]
    assert getattr(args, name) == yaml.safe_load(last)[name]


def test_a_key_may_be_the_flag_or_its_name_in_python(tmp_path):
    assert parse(tmp_path, 'opt_kwargs: {nesterov: false}').opt_args == dict(nesterov=False)
    assert parse(tmp_path, 'opt_args: {nesterov: false}').opt_args == dict(nesterov=False)


def test_numbers_of_a_config_are_read_as_they_are_written(tmp_path):
    config = 'experiment: 1.10\nbatch_size: 010\nlr: 1e-3\nopt_kwargs: {dampening: 1e-8, a: [1, 2.50], b: "5"}\n'
    args = parse(tmp_path, config)
    assert (args.experiment, args.batch_size, args.lr) == ('1.10', 10, 0.001)
    assert args.opt_args == dict(dampening=1e-8, a=[1, 2.5], b='5')


@pytest.mark.parametrize(
    'argv, message',
    [
        ('DIR --data-dir OTHER', "the data is named twice, as 'DIR' and as --data-dir 'OTHER'"),
        ('--input-size 3 32 32 --img-size 64', '--input-size 3 32 32 contradicts --img-size 64'),
        ('--input-size 3 32 48 --img-size 32', '--input-size 3 32 48 contradicts --img-size 32'),
        ('--input-size 3 32 32 --in-chans 1', '--input-size 3 32 32 contradicts --in-chans 1'),
        ('--exit-weights 0 0 0', '--exit-weights 0 0 0: expected one number above 0 or more'),
        ('--gamma 0 --distill none', 'nothing is left to train with'),
        ('--gamma 0 --alpha 0 --beta 0', 'nothing is left to train with'),
        ('--lr-noise 0.5 0.2', '--lr-noise 0.5 0.2: expected where it begins'),
        ('--lr-noise 0.1 0.2 0.3', '--lr-noise 0.1 0.2 0.3: expected where it begins'),
        ('--decay-milestones 20 10', '--decay-milestones 20 10: expected epochs in increasing order'),
        ('--decay-rate 2', '--decay-rate 2: expected at most 1'),
        ('--cutmix-minmax 0.8 0.2', '--cutmix-minmax 0.8 0.2: expected the smaller share first'),
        ('--scale 1 0.5', '--scale 1 0.5: expected the smaller number first'),
        ('--model-kwargs num_classes=7', 'num_classes has a flag of its own, --num-classes'),
        ('--opt-kwargs lr=1', 'lr has a flag of its own, --lr'),
        ('--opt-kwargs nesterov=false', "'nesterov=false': expected True, False or None"),
        ('--model-kwargs qk_norm=No', "'qk_norm=No': expected True, False or None"),
        ('--opt-kwargs a=1 a=2', 'expected every KEY once, got a 2 times'),
        ('--opt-kwargs a=nan', "expected finite numbers, got 'a=nan'"),
        ('--opt-kwargs a=[1,1e999]', 'expected finite numbers'),
        ('--opt-kwargs =1', "expected KEY=VALUE, got '=1'"),
    ],
)
def test_contradictions(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train.read_config(argv.split())


def test_what_agrees_may_be_said_twice(tmp_path):
    argv = 'DIR --data-dir DIR --input-size 1 32 32 --img-size 32 --in-chans 1 --sched poly --decay-rate 2'.split()
    config = train.read_config(argv)
    assert (config.data.data_dir, config.data.in_chans, config.scheduler.decay_rate) == ('DIR', 1, 2.0)
    # the command line wins over a config, whichever name it uses
    assert parse(tmp_path, 'data_dir: old', ['new']).data_dir == 'new'
    assert parse(tmp_path, 'data_dir: old', ['--data-dir', 'new']).data_dir == 'new'
    assert validate.read_config(['DIR', '--input-size', '1', '8', '8']).data.in_chans == 1


def test_input_size_tells_the_channels():
    assert train.read_config('--input-size 1 28 28'.split()).data.in_chans == 1


def test_missing_config():
    with pytest.raises(UserError, match=r"--config 'nowhere.yaml' cannot be read: No such file"):
        parse_args(train_parser(), ['--config', 'nowhere.yaml'])
