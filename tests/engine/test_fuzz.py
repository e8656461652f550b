"""Random command lines and config files: a run or one line, never a traceback, never another value than was asked for.

`FUZZ_EXAMPLES=2000 pytest tests/engine/test_fuzz.py` tries many more.
"""

import argparse
import contextlib
import io
import os
import warnings

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripts import run

from timm_mlcsd.cli import train
from timm_mlcsd.cli.arguments import Number
from timm_mlcsd.cli.config_file import parse_args
from timm_mlcsd.cli.flags import train_parser
from timm_mlcsd.errors import UserError

EXAMPLES = int(os.environ.get('FUZZ_EXAMPLES', 25))

# what needs a network, another machine, minutes, or is given to every run
LEFT_OUT = (
    'help config data data_dir dataset_download dataset_trust_remote_code pretrained pretrained_backbone torchcompile '
    'torchcompile_mode output experiment workers log_wandb log_trackio log_project dry_run device'
).split()
GARBAGE = st.sampled_from(
    ['', 'nonsense', '-1', '0', '1e999', 'nan', 'None', '[1', 'a=b', '{}', '\x00', 'ü', '3.7', '-x']
    + ['inf', '-inf', '1e308', '-1e308', '1e-320', '1' * 400, '1_000', ' 5', '٣', '1e3', 'True', '0x10', '010']
)
WORDS = {
    'model': ['mlcsd_resnet18', 'mlcsd_vit_tiny_patch16_224', 'mlcsd_msdnet', 'mlcsd_shufflenetv2_050', 'resnet18'],
    'dataset': ['', 'digits', 'hfds/none', 'torch/cifar10', 'wds/none'],
    'train_split': ['train', 'test', 'train[:10]'],
    'val_split': ['train', 'test', 'validation'],
    'opt': ['sgd', 'adamw', 'lamb', 'muon', 'lion', 'rmsproptf', 'lbfgs'],
    'sched': ['cosine', 'step', 'multistep', 'plateau', 'poly', 'none', 'tanh'],
    'aa': ['rand-m9-mstd0.5', 'v0', 'augmix-m3', 'original'],
    'gp': ['avg', 'max', 'token', 'catavgmax'],
    'exits': ['1', '2', '4', '8', '99', '0', 'layer1.0,layer2.1', 'layer1'],
    'interpolation': ['bilinear', 'bicubic', 'random'],
    'train_interpolation': ['bilinear', 'random'],
    'model_kwargs': ['channels=(8,8,8,8)', 'depth=2', 'num_blocks=2', 'nonsense=1'],
    'opt_args': ['dampening=0.1', 'nonsense=1'],
    'initial_checkpoint': [__file__],
    'class_map': [__file__],
    'resume': ['auto', __file__],
}
SMALL = {'batch_size': (1, 24), 'validation_batch_size': (1, 24), 'img_size': (1, 48), 'input_size': (1, 33)}
ACTIONS = {a.dest: a for a in train_parser()._actions if a.dest not in LEFT_OUT}
SWITCHES = (argparse._StoreTrueAction, argparse.BooleanOptionalAction)


def values(action):
    """Strings for one value of a flag, mostly such as it takes."""
    if action.dest in WORDS:
        usual = st.sampled_from(WORDS[action.dest])
    elif action.choices:
        usual = st.sampled_from([str(c) for c in action.choices])
    elif isinstance(action.type, Number) and action.type.kind is int:
        usual = st.integers(*SMALL.get(action.dest, (0, 12))).map(str)
    elif isinstance(action.type, Number):
        usual = st.floats(-1, 3, width=16).map(str)
    else:
        usual = st.text('abc/.=', min_size=1, max_size=4)
    return st.one_of(*[usual] * 9, GARBAGE)


@st.composite
def flags(draw):
    """Flags by name, with their values as strings, a truth value for a switch."""
    names = draw(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=6, unique=True))
    chosen = {}
    for name in names:
        action = ACTIONS[name]
        if isinstance(action, SWITCHES):
            chosen[name] = True if isinstance(action, argparse._StoreTrueAction) else draw(st.booleans())
        elif action.nargs in ('+', '*') or isinstance(action.nargs, int):
            count = action.nargs if isinstance(action.nargs, int) else draw(st.integers(1, 4))
            chosen[name] = [draw(values(action)) for _ in range(count)]
        else:
            chosen[name] = draw(values(action))
    return chosen


def spelled(chosen):
    argv = []
    for name, value in chosen.items():
        flags = ACTIONS[name].option_strings
        if isinstance(value, bool):
            has_two = isinstance(ACTIONS[name], argparse.BooleanOptionalAction)
            argv.append(flags[0] if has_two and value else flags[-1])
        else:
            argv += [flags[-1], *value] if isinstance(value, list) else [f'{flags[-1]}={value}']
    return argv


QUICK = dict(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 100, database=None)


@settings(**QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(chosen=flags())
def test_a_run_or_one_line(chosen, folder, tmp_path):
    base = ['--model-kwargs', 'channels=(8,8,8,8)', '--small-input', '--img-size', '16', '-b', '8', '--exits', '3']
    argv = [str(folder), *base, '--workers', '0', '--device', 'cpu', '--output', str(tmp_path), '--dry-run']
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = run(train.main, [*argv, *spelled(chosen)])
    said = errors.getvalue()
    assert code in (0, 2)
    assert 'Traceback' not in said
    if code:
        assert said.startswith('train.py: error: ') and said.count('\n') == 1, said
    assert list(tmp_path.iterdir()) == []


@settings(**QUICK, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=flags())
def test_a_config_file_says_what_the_command_line_says(chosen, tmp_path):
    try:
        expected = vars(parse_args(train_parser(), spelled(chosen)))
    except UserError:
        expected = None
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(chosen, allow_unicode=False))
    try:
        found = vars(parse_args(train_parser(), ['--config', str(config)]))
    except UserError:
        found = None
    assert repr(found) == repr(expected)
    defaults = vars(parse_args(train_parser(), []))
    for name, value in (expected or {}).items():
        # in_chans follows input_size
        if name not in chosen and not (name == 'in_chans' and 'input_size' in chosen):
            assert value == defaults[name], name


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ACTIONS, 'x']), inner, max_size=3)
            ),
            max_leaves=6,
        ).map(lambda value: yaml.safe_dump(value)),
    )
)
def test_any_text_as_config_file(text, tmp_path_factory):
    config = tmp_path_factory.mktemp('fuzz') / 'config.yaml'
    config.write_text(text, encoding='utf-8', errors='surrogatepass')
    with contextlib.suppress(UserError):
        parse_args(train_parser(), ['--config', str(config)])


def test_the_flags_are_all_there():
    assert len(ACTIONS) > 100
    assert sum(isinstance(action.type, Number) for action in ACTIONS.values()) > 60
    with pytest.raises(UserError):
        parse_args(train_parser(), ['--batch-size=nonsense'])
