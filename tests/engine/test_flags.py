"""The command line and its config file."""

import pytest
import yaml

from timm_mlcsd.engine.flags import parse_args, train_parser
from timm_mlcsd.errors import UserError


def parse(tmp_path, config, argv=()):
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


def test_resolved_arguments_are_a_config(tmp_path):
    args = parse(tmp_path, dict(model_kwargs=dict(channels=(8, 8, 8, 8)), exits=['layer1', 'layer2'], amp=True))
    written = {k: v for k, v in vars(args).items() if k != 'config'}
    again = parse(tmp_path, yaml.safe_dump(yaml.safe_load(yaml.safe_dump(written))))
    assert {k: v for k, v in vars(again).items() if k != 'config'} == written


@pytest.mark.parametrize(
    'config, message',
    [
        ('epoch: 3', "no flag has the name 'epoch'; near names: epochs"),
        ('zzz: 3', "no flag has the name 'zzz'; --help lists them"),
        ('config: other.yaml', "no flag has the name 'config'"),
        ('amp: 3', 'amp is a switch; give true or false'),
        ('- epochs', 'must hold "flag: value" lines'),
        ('a: [', 'is not valid YAML'),
    ],
)
def test_mistakes_in_a_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        parse(tmp_path, config)


def test_values_in_a_config_are_checked_like_flags(tmp_path, capsys):
    for config, message in (('epochs: many', 'invalid int value'), ('distill: some', 'invalid choice')):
        with pytest.raises(SystemExit) as e:
            parse(tmp_path, config)
        assert e.value.code == 2
        assert message in capsys.readouterr().err


def test_missing_config():
    with pytest.raises(UserError, match=r"--config 'nowhere.yaml' cannot be read: No such file"):
        parse_args(train_parser(), ['--config', 'nowhere.yaml'])
