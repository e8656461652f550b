"""The command lines: what every flag says of itself, and what it takes and refuses."""

import argparse
import re

import pytest

from timm_mlcsd.adaptive.export import onnx_runner
from timm_mlcsd.cli.arguments import Number, ScriptParser, exits, integer, number
from timm_mlcsd.cli.cost import cost_parser
from timm_mlcsd.cli.export import export_parser
from timm_mlcsd.cli.flags import train_parser, validate_parser
from timm_mlcsd.cli.predict import predict_parser
from timm_mlcsd.cli.push import push_parser
from timm_mlcsd.errors import UserError

NOT_NUMBERS = ['nan', 'inf', '-inf', '1e308', '-1e308', '1e999', '1' * 400, '1' * 5000, '']
NOT_NUMBERS += ['1_000', ' 5', '5 ', '\u0663', '\uff15', 'True', 'None', '0x10', '1,5', '--', '1e']
PARSERS = [train_parser(), validate_parser(), predict_parser(), export_parser(), push_parser(), cost_parser()]
NUMBERS = [(parser, action) for parser in PARSERS for action in parser._actions if isinstance(action.type, Number)]
ACTIONS = [(parser, action) for parser in [*PARSERS, onnx_runner._parser()] for action in parser._actions]
ACTION_IDS = [f'{parser.prog}-{action.dest}' for parser, action in ACTIONS]


def shown_help(parser, action):
    """The sentence that --help shows of a flag, and the default behind it."""
    text = parser._get_formatter()._expand_help(action) if action.help else ''
    return re.fullmatch(r'(.*?)(?: \(default: (.+)\))?', text, re.DOTALL).groups()


@pytest.mark.parametrize('parser, action', ACTIONS, ids=ACTION_IDS)
def test_every_flag_says_what_it_does_in_one_sentence(parser, action):
    sentence, _ = shown_help(parser, action)
    assert len(sentence.split()) > 1
    assert not re.search(r'[.!?](\s|$)', sentence) and '\n' not in sentence


@pytest.mark.parametrize('parser', [*PARSERS, onnx_runner._parser()], ids=lambda parser: parser.prog)
def test_no_two_flags_of_a_command_say_the_same(parser):
    sentences = [shown_help(parser, action)[0] for action in parser._actions]
    assert len(set(sentences)) == len(sentences)


@pytest.mark.parametrize('parser, action', ACTIONS, ids=ACTION_IDS)
def test_every_flag_shows_its_default(parser, action):
    _, shown = shown_help(parser, action)
    if action.required or action.default is argparse.SUPPRESS:
        assert shown is None
        return
    assert shown
    if isinstance(action, argparse._StoreTrueAction):
        assert shown == 'off'
    elif isinstance(action.default, list) and action.default:
        assert [float(value) for value in shown.split()] == pytest.approx(action.default, abs=1e-4)
    elif action.default is not None and action.default is not False and action.default not in ('', {}, []):
        assert re.split(', ', shown)[0] == str(action.default)


MISTYPED = [
    ('train.py', '--weight-decy 1', '--weight-decy', '--weight-decay'),
    ('train.py', 'DIR --weight-decy=1', '--weight-decy', '--weight-decay'),
    ('train.py', '--weight_decay 1', '--weight_decay', '--weight-decay'),
    ('train.py', '--mean 0.5 --sdt -1', '--sdt', '--std'),
    ('train.py', '-epochs 3', '-epochs', '--epochs'),
    ('train.py', '--no-pin-men', '--no-pin-men', '--no-pin-mem'),
    ('train.py', '--nonsense', '--nonsense', None),
    ('train.py', 'DIR --nonsense=weight-decay', '--nonsense', None),
    ('validate.py', '--chekpoint PATH', '--chekpoint', '--checkpoint'),
    ('mlcsd-predict', 'network --treshold 0.5 image', '--treshold', '--threshold'),
    ('mlcsd-push', 'run target --privat', '--privat', '--private'),
    ('mlcsd-export', 'network folder --polcy=x', '--polcy', '--policy'),
    ('mlcsd-cost', 'model --repeat 3', '--repeat', '--repeats'),
]


@pytest.mark.parametrize('prog, argv, flag, near', MISTYPED, ids=[f'{prog} {argv}' for prog, argv, *_ in MISTYPED])
def test_a_mistyped_flag_names_the_near_one(prog, argv, flag, near):
    parser = {parser.prog: parser for parser in PARSERS}[prog]
    with pytest.raises(UserError) as raised:
        parser.parse_args(argv.split())
    hint = f': did you mean {near}?' if near else ''
    assert str(raised.value) == f'unknown flag {flag}{hint} (--help lists the flags)'


@pytest.mark.parametrize('argv', ['DIR -5', 'DIR -0.5', 'DIR OTHER', 'DIR -- --weight-decy', '-- DIR --epoch=3'])
def test_what_is_no_flag_is_not_taken_for_one(argv):
    with pytest.raises(UserError, match=f'^unrecognized arguments: (-- )?{argv.split()[-1]} '):
        train_parser().parse_args(argv.split())


def test_a_mistyped_flag_of_a_subcommand():
    parser = ScriptParser()
    commands = parser.add_subparsers(dest='command')
    commands.add_parser('run').add_argument('--minutes')
    commands.add_parser('list').add_argument('--scale')
    with pytest.raises(UserError, match=r'unknown flag --minuts: did you mean --minutes\?'):
        parser.parse_args(['run', '--minuts', '3'])
    # which another subcommand has
    with pytest.raises(UserError, match=r'unknown flag --minutes \('):
        parser.parse_args(['list', '--minutes', '3'])
    with pytest.raises(UserError, match=r'unknown flag --minuts \('):
        parser.parse_args(['--minuts'])


def test_no_flag_reads_numbers_in_another_way():
    assert len(NUMBERS) > 80
    assert not [a.dest for parser in PARSERS for a in parser._actions if a.type in (int, float)]


@pytest.mark.parametrize('parser, action', NUMBERS, ids=[f'{p.prog}{a.option_strings[-1]}' for p, a in NUMBERS])
def test_every_number_flag_refuses_what_is_not_a_number(parser, action):
    flag = action.option_strings[-1]
    count = action.nargs if isinstance(action.nargs, int) else 1
    # so that what is required is there
    others = {'train.py': [], 'mlcsd-cost': ['x']}.get(parser.prog, ['x', 'y'])
    for text in NOT_NUMBERS:
        with pytest.raises(UserError) as raised:
            values = [f'{flag}={text}'] if count == 1 else [flag, *[text] * count]
            parser.parse_args([*others, *values])
        message = str(raised.value)
        assert message.startswith('argument ') and flag in message and len(message) < 250 and '\n' not in message
    with pytest.raises(argparse.ArgumentTypeError, match=r'^expected an? .*, got .*'):
        action.type('nan')


@pytest.mark.parametrize(
    'flags, refused, taken',
    [
        ('lr-base clip-grad opt-eps exit-lr-mult', '-1 0 -0.0', '1e-5 1 5'),
        ('lr min-lr warmup-lr weight-decay', '-1 -1e-9', '0 1e-5'),
        (
            'momentum smoothing model-ema-decay opt-betas bce-target-thresh drop drop-path',
            '-0.1 1 2',
            '0 0.9',
        ),
        ('alpha beta gamma exit-weights', '-1 1e7', '0 1 10'),
        ('temperature', '0 -4 1e-9 1e9', '1 4 20'),
        ('std', '0 -1 123.675', '0.0039 0.25 1'),
        ('mean', '123.675', '-1 0 0.5'),
        ('val-fraction', '-1 0 1 2', '0.1 0.99'),
        ('crop-pct', '0 0.001 2', '0.875 1'),
        ('hflip vflip reprob mixup-prob', '-0.1 1.1', '0 1'),
        ('scale ratio', '0 -1', '0.08 1'),
        ('layer-decay lr-cycle-decay', '0 1.1', '0.75 1'),
        ('lr-noise-pct', '0 1', '0.67'),
        ('decay-rate', '0 -1', '0.1'),
        ('batch-size epochs img-size recount checkpoint-hist grad-accum-steps', '0 -1 1.0 1e3', '1 007 +5'),
        ('img-size input-size', '65536', '16 1024'),
        ('workers', '-1 100000', '0 8'),
        ('decay-milestones', '0 -5 1.5', '30'),
        ('seed val-seed', '-1 2147483648 4294967296', '0 2147483647'),
    ],
)
def test_domains(flags, refused, taken):
    types = {s[2:]: a.type for a in train_parser()._actions for s in a.option_strings}
    for flag in flags.split():
        for text in refused.split():
            with pytest.raises(argparse.ArgumentTypeError):
                types[flag](text)
        for text in taken.split():
            assert types[flag](text) == float(text)


def test_adaptive_goals_and_thresholds():
    def refuses(parser, *argv):
        with pytest.raises(UserError, match=f'argument {argv[-2]}: expected '):
            parser.parse_args([str(a) for a in argv])

    for budget in ('nan', '0', '-1', '1_0%', '%', '60 %', '\u0663'):
        refuses(validate_parser(), '--budget', budget) if budget[0] != '-' else None
    refuses(validate_parser(), '--latency-budget', 0)
    refuses(validate_parser(), '--max-drop', 'nan')
    for threshold in ('nan', '1.1', '-0.1'):
        refuses(predict_parser(), 'network', 'image', '--threshold', threshold)
    refuses(predict_parser(), 'network', 'image', '--topk', 0)


def test_bounds_are_told():
    assert str(number(above=0)) == 'a number above 0'
    assert str(number(at_least=0, below=1)) == 'a number at least 0 and below 1'
    assert str(number()) == 'a finite number'
    assert str(integer(1, 10_000_000)) == 'an integer from 1 to 10000000'


def test_exits():
    assert exits('4') == 4 and exits('layer1.0,layer2.1') == ['layer1.0', 'layer2.1']
    for text in ('0', '-1', '\u0663', '1' * 400):
        with pytest.raises(argparse.ArgumentTypeError, match='expected an integer from 1 to 1000'):
            exits(text)


@pytest.mark.parametrize(
    'argv, images',
    [
        ('net --threshold .9 a.jpg b.jpg', ['a.jpg', 'b.jpg']),
        ('--amp net a.jpg --topk 2 b.jpg', ['a.jpg', 'b.jpg']),
        ('net --amp -- -a.jpg --b.jpg', ['-a.jpg', '--b.jpg']),
        ('net a.jpg --amp -- -b.jpg', ['a.jpg', '-b.jpg']),
        ('net --dataset digits', []),
    ],
)
def test_inputs_may_follow_flags(argv, images):
    args = predict_parser().parse_args(argv.split())
    assert (args.network, args.images) == ('net', images)
    assert predict_parser().get_default('images') == []


def test_an_unknown_flag_is_no_input():
    with pytest.raises(UserError, match=r'unknown flag --thresold: did you mean --threshold'):
        predict_parser().parse_args('net --thresold .9 a.jpg'.split())
