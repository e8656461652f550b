"""Settings that a script or a YAML file gives to the engine have the ranges of the flags."""

import math

import pytest

from timm_mlcsd import engine
from timm_mlcsd.cli.config_file import parse_args
from timm_mlcsd.cli.flags import train_parser
from timm_mlcsd.cli.train import read_config
from timm_mlcsd.engine.combinations import warn_of_idle_settings, warn_of_learning_rates
from timm_mlcsd.engine.setting_checks import RANGES, check_settings
from timm_mlcsd.errors import UserError

# just outside of each range
OUTSIDE = {'above 0': 0, 'at least 0': -1, 'at least 1': 0, 'from 0 to 1': 1.5, 'from 0 to below 1': 1}
LENGTHS = dict(mean=3, std=3, input_size=3, scale=2, ratio=2, cutmix_minmax=2, exit_weights=8, decay_milestones=2)


@pytest.mark.parametrize('name', sorted(RANGES))
def test_the_engine_refuses_what_the_flags_refuse(name):
    number, count = OUTSIDE[RANGES[name][0]], LENGTHS.get(name)
    config = engine.TrainConfig.from_dict({name: [number] * count if count else number})
    with pytest.raises(UserError, match=r'=.*: expected (a number|numbers) '):
        check_settings(config)
    flag = f'--{name.replace("_", "-")}'
    with pytest.raises((UserError, SystemExit)):
        parse_args(train_parser(), ['images', flag, *[str(number)] * (count or 1)])


@pytest.mark.parametrize('name', sorted(RANGES))
def test_the_engine_accepts_what_the_flags_accept(name):
    flag, accepted = f'--{name.replace("_", "-")}', 0
    for number in ('0', '0.5', '1', '2', '64'):
        try:
            args = parse_args(train_parser(), ['images', flag, *[number] * LENGTHS.get(name, 1)])
        except (UserError, SystemExit):
            continue
        check_settings(engine.TrainConfig.from_dict(vars(args)))
        accepted += 1
    assert accepted


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(lr='1e-3'), "lr='1e-3': expected a number or None"),
        (dict(epochs=True), 'epochs=True: expected an integer'),
        (dict(epochs=1.5), r'epochs=1.5: expected an integer'),
        (dict(amp='false'), "amp='false': expected True or False"),
        (dict(small_input='false'), "small_input='false': expected True or False"),
        (dict(clip_grad=-1.0), r'clip_grad=-1.0: expected a number above 0'),
        (dict(warmup_lr=math.nan), r'warmup_lr=nan: expected a number at least 0'),
        (dict(beta=math.inf), r'beta=inf: expected a number at least 0'),
        (dict(mean=[0.5, 'x', 0.5]), r'mean=.*: expected List\[float\] or None'),
        (dict(std=[0.5, 0.0, 0.5]), r'std=.*: expected numbers above 0'),
        (dict(opt=3), 'opt=3: expected a text'),
        (dict(model_kwargs=[1]), r'model_kwargs=\[1\]: expected Dict'),
    ],
)
def test_types_and_ranges(settings, message):
    with pytest.raises(UserError, match=message):
        engine.train(engine.TrainConfig.from_dict(settings))


def test_what_is_right_passes():
    check_settings(engine.TrainConfig())
    given = dict(
        exits=['layer1', 'layer2'], heads_only=True, pretrained_backbone='a1_in1k', epoch_repeats=1, mean=(0, 1)
    )
    check_settings(engine.TrainConfig.from_dict(given))


@pytest.mark.parametrize(
    'argv, message',
    [
        ('--decay-milestones 1 2', 'Without effect: --decay-milestones with --sched cosine.'),
        ('--sched step --lr-cycle-mul 2 --min-lr .1', '--min-lr with --sched step'),
        ('--clip-mode value', 'Without effect: --clip-mode without --clip-grad.'),
        ('--lr-noise-std .5', '--lr-noise-std without --lr-noise'),
        ('--model-ema-decay .5', 'Without effect: --model-ema-decay without --model-ema.'),
        ('--model-ema-warmup', 'Without effect: --model-ema-warmup without --model-ema.'),
        ('--model-ema --model-ema-decay .5', None),
        ('--distill none --alpha 9 --temperature 9', '--alpha with --distill none, --temperature with --distill none.'),
        ('--distill-method cc --temperature 9', 'Without effect: --temperature with --distill-method cc.'),
        ('--amp-dtype bfloat16', '--amp-dtype without --amp'),
        ('--remode const --recount 3', '--remode without --reprob, --recount without --reprob'),
        ('--mixup-mode elem --mixup-prob .5', '--mixup-prob without --mixup or --cutmix'),
        ('--no-aug --aa rand-m9 --hflip 1', '--hflip with --no-aug, --aa with --no-aug'),
        ('--train-crop-mode pad4 --scale .5 .6', '--scale with --train-crop-mode pad4'),
        ('--layer-decay-min-scale .5', '--layer-decay-min-scale without --layer-decay'),
        ('--val-split val --val-seed 3', '--val-seed with --val-split'),
        ('--lr .1 --lr-base .5', '--lr-base with --lr'),
        ('--no-resume-opt', '--no-resume-opt without --resume'),
        ('--bce-target-thresh .2', '--bce-target-thresh without --bce-loss'),
        ('--cutmix 1 --mixup-prob .5 --reprob .1 --recount 3 --layer-decay .9 --layer-decay-min-scale .5', None),
        ('--epochs 3', '--warmup-epochs 5: the training of 3 epochs ends before the learning rate is reached'),
        ('--sched multistep --decay-milestones 1 2', None),
        ('--clip-mode value --clip-grad 1', None),
        ('--lr-noise .5 --lr-noise-std .5', None),
        ('--epochs 3 --warmup-prefix', None),
        ('', None),
    ],
)
def test_settings_without_effect_are_told(argv, message, caplog):
    warn_of_idle_settings(read_config(['--dataset', 'digits', *argv.split()]))
    assert message in caplog.text if message else caplog.text == ''


@pytest.mark.parametrize(
    'argv, message',
    [
        ('--min-lr 1', '--min-lr 1 is above the learning rate, 0.1; give a lower one.'),
        ('--warmup-lr 5', '--warmup-lr 5 is above the learning rate, 0.1; give a lower one.'),
        ('--warmup-lr 5 --warmup-epochs 0', None),
        ('--min-lr 1 --sched multistep', None),
        ('--min-lr .1', None),
        ('--lr 0', '--lr 0: the weights do not change'),
    ],
)
def test_rates_above_the_learning_rate_are_told(argv, message, caplog):
    warn_of_learning_rates(read_config(['--dataset', 'digits', '--lr', '.1', *argv.split()]))
    assert message in caplog.text if message else caplog.text == ''
