"""Flags of how to train: optimizer, schedule, augmentation, averaging, all under timm's names."""

import argparse

from .arguments import (
    KeyValues,
    fraction,
    integer,
    non_negative_float,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    probability,
    train_interpolation,
)

__all__ = ['add_recipe_flags']


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups Optimizer, Schedule, Augmentation and EMA."""
    _add_optimizer_flags(parser.add_argument_group('Optimizer'))
    _add_schedule_flags(parser.add_argument_group('Schedule'))
    _add_augmentation_flags(parser.add_argument_group('Augmentation'))
    group = parser.add_argument_group('EMA')
    group.add_argument('--model-ema', action='store_true', help='keep and evaluate an average of the weights')
    group.add_argument('--model-ema-decay', type=fraction, default=0.9998)
    group.add_argument('--model-ema-warmup', action='store_true')


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--opt', default='sgd', metavar='NAME')
    group.add_argument('--opt-eps', type=positive_float, default=None)
    group.add_argument('--opt-betas', type=fraction, nargs='+', default=None)
    group.add_argument('--momentum', type=fraction, default=0.9)
    group.add_argument('--weight-decay', type=non_negative_float, default=2e-5)
    group.add_argument('--clip-grad', type=positive_float, default=None, metavar='NORM')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'))
    group.add_argument('--layer-decay', type=number(above=0, at_most=1), default=None)
    group.add_argument('--layer-decay-min-scale', type=probability, default=0.0)
    group.add_argument(
        '--exit-lr-mult',
        type=positive_float,
        default=1.0,
        metavar='X',
        help='learning rate of the exits, and of what the loss trains, as a multiple',
    )
    group.add_argument('--opt-kwargs', dest='opt_args', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE')
    group.add_argument(
        '--skip-nonfinite',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='leave out updates with a loss that is not finite, up to N batches in a row; looks at every loss, which '
        'makes a GPU wait (default: stop at the next look, every --log-interval batches)',
    )
    group.add_argument('--grad-accum-steps', type=positive_int, default=1, metavar='N')


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--epochs', type=positive_int, default=300, metavar='N')
    group.add_argument('--sched', default='cosine', metavar='NAME')
    group.add_argument('--sched-on-updates', action='store_true', help='step on updates instead of epochs')
    group.add_argument('--lr', type=number(at_least=0), default=None, help='learning rate (default: from --lr-base)')
    group.add_argument('--lr-base', type=positive_float, default=0.1, help='learning rate of a batch of --lr-base-size')
    group.add_argument('--lr-base-size', type=positive_int, default=256, metavar='N')
    group.add_argument(
        '--lr-base-scale',
        default='',
        choices=('', 'linear', 'sqrt'),
        help='how the rate grows with the batch (default: sqrt for Adam-like optimizers and LAMB, else linear)',
    )
    group.add_argument('--lr-noise', type=probability, nargs='+', default=None)
    group.add_argument('--lr-noise-pct', type=number(at_least=0.01, below=1), default=0.67)
    group.add_argument('--lr-noise-std', type=number(above=0, at_most=10), default=1.0)
    group.add_argument('--lr-cycle-mul', type=number(at_least=1, at_most=100), default=1.0)
    group.add_argument('--lr-cycle-decay', type=number(above=0, at_most=1), default=0.5)
    group.add_argument('--lr-cycle-limit', type=integer(1, 1000), default=1)
    group.add_argument('--lr-k-decay', type=number(above=0, at_most=10), default=1.0)
    group.add_argument('--warmup-lr', type=non_negative_float, default=1e-5)
    group.add_argument('--min-lr', type=non_negative_float, default=0.0)
    group.add_argument('--decay-milestones', type=positive_int, nargs='+', default=[90, 180, 270])
    group.add_argument('--decay-epochs', type=number(at_least=0.001), default=90)
    group.add_argument('--decay-rate', '--dr', type=number(above=0, at_most=100), default=0.1)
    group.add_argument('--warmup-epochs', type=non_negative_int, default=5)
    group.add_argument('--warmup-prefix', action='store_true')
    group.add_argument('--cooldown-epochs', type=non_negative_int, default=0)


def _add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--no-aug', action='store_true')
    group.add_argument(
        '--train-crop-mode',
        default=None,
        choices=('rrc', 'rkrc', 'rkrr', 'pad4'),
        help="timm's crops, or pad4: 4 pixels at every side, then a random crop, as is usual for CIFAR",
    )
    group.add_argument('--scale', type=number(above=0, at_most=100), nargs=2, default=[0.08, 1.0])
    group.add_argument('--ratio', type=number(above=0, at_most=100), nargs=2, default=[3.0 / 4.0, 4.0 / 3.0])
    group.add_argument('--hflip', type=probability, default=0.5)
    group.add_argument('--vflip', type=probability, default=0.0)
    group.add_argument('--color-jitter', type=number(at_least=0, at_most=10), default=0.4)
    group.add_argument('--color-jitter-prob', type=probability, default=None)
    group.add_argument('--grayscale-prob', type=probability, default=0.0)
    group.add_argument('--gaussian-blur-prob', type=probability, default=0.0)
    group.add_argument('--aa', default=None, metavar='NAME', help='AutoAugment policy')
    group.add_argument('--reprob', type=probability, default=0.0, help='random erasing probability')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'))
    group.add_argument('--recount', type=positive_int, default=1)
    group.add_argument('--train-interpolation', type=train_interpolation, default='random')
    group.add_argument('--mixup', type=number(at_least=0, at_most=1000), default=0.0)
    group.add_argument('--cutmix', type=number(at_least=0, at_most=1000), default=0.0)
    group.add_argument('--cutmix-minmax', type=probability, nargs=2, default=None)
    group.add_argument('--mixup-prob', type=probability, default=1.0)
    group.add_argument('--mixup-switch-prob', type=probability, default=0.5)
    group.add_argument('--mixup-mode', default='batch', choices=('batch', 'pair', 'elem'))
    group.add_argument('--mixup-off-epoch', type=non_negative_int, default=0, metavar='N')
    group.add_argument('--smoothing', type=fraction, default=0.1, help='label smoothing')
    group.add_argument('--bce-loss', action='store_true')
    group.add_argument('--bce-sum', action='store_true')
    group.add_argument('--bce-target-thresh', type=fraction, default=None)
