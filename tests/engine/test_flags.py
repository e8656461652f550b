"""The command line and its config file."""

import pytest
import yaml

from timm_mlcsd.engine.config import parse_args
from timm_mlcsd.engine.flags import train_parser
from timm_mlcsd.errors import UserError


def parse(tmp_path, config, argv=()):
    """Arguments of a config file and a command line."""
    path = tmp_path / 'config.yaml'
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return parse_args(train_parser(), ['--config', str(path), *argv])


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
        'exits: [layer1.1, layer2.0]\npretrained-backbone: true\nlr: 1e-3\nseed: null\ndata_dir: /d\nmin_lr: -1.0\n',
    )
    assert args.exits == ['layer1.1', 'layer2.0']
    assert args.pretrained_backbone is True and args.lr == 0.001 and args.seed == 42 and args.data_dir == '/d'
    assert args.min_lr == -1.0
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
        ('epochs: many', "argument --epochs: invalid positive_int value: 'many'"),
        ('epochs: 0', 'argument --epochs: 0 must be at least 1'),
        ('distill: some', 'invalid choice'),
        ('mean: [0.5, 0.5]', '--mean has 2 values for 3 channels'),
        ('amp: 3', 'amp is a switch; give true or false'),
        ('pin_mem: 3', 'pin_mem is a switch; give true or false'),
        ('no_pin_mem: true', "no flag has the name 'no_pin_mem'"),
        ('lr: 0.1\nepochs: 3\nlr: 0.2', "it has 'lr' twice"),
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
        ('--epochs x', 'invalid positive_int'),
        ('--seed -1', 'argument --seed: -1 must be from 0 to 2147483647'),
        ('--workers -1', 'must be at least 0'),
        ('--model-kwargs foo', "expected KEY=VALUE, got 'foo'"),
        ('--nonsense', 'unrecognized arguments: --nonsense'),
        ('--epoch 3', 'unrecognized arguments'),
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


def test_input_size_tells_the_channels():
    assert parse_args(train_parser(), '--input-size 1 28 28'.split()).in_chans == 1


def test_missing_config():
    with pytest.raises(UserError, match=r"--config 'nowhere.yaml' cannot be read: No such file"):
        parse_args(train_parser(), ['--config', 'nowhere.yaml'])
