"""Flags of how to train: optimizer, schedule, augmentation, averaging, all under timm's names.

Their defaults are those of the configurations in `timm_mlcsd.engine` (`engine/optimizer.py`: learning rate, schedule;
`engine/loaders.py`: augmentation; `engine/config.py` lists all); `cli/flags.py` sets them.
"""

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

__all__ = ['add_training_flags']


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups Optimizer, Schedule, Augmentation and EMA."""
    group = parser.add_argument_group('Optimizer')
    _add_optimizer_flags(group)
    _add_update_flags(group)
    group = parser.add_argument_group('Schedule')
    _add_lr_flags(group)
    _add_noise_and_cycle_flags(group)
    _add_decay_flags(group)
    group = parser.add_argument_group('Augmentation')
    _add_image_flags(group)
    _add_erasing_flags(group)
    _add_mixing_flags(group)
    _add_target_flags(group)
    group = parser.add_argument_group('EMA')
    group.add_argument(
        '--model-ema', action='store_true', help='keep an exponential moving average of the weights and evaluate it'
    )
    group.add_argument('--model-ema-decay', type=fraction, help='share of the old average that an update keeps')
    group.add_argument(
        '--model-ema-warmup',
        action='store_true',
        help='let the decay grow with the number of updates from 0 to --model-ema-decay',
    )


def _add_optimizer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--opt', metavar='NAME', help="optimizer, by timm's name for it")
    group.add_argument(
        '--opt-eps',
        type=positive_float,
        help="epsilon in the denominator of the optimizer's step (default: the optimizer's own)",
    )
    group.add_argument(
        '--opt-betas',
        type=fraction,
        nargs='+',
        help="decay rates of the optimizer's running means, as Adam has them (default: the optimizer's own)",
    )
    group.add_argument('--momentum', type=fraction, help='momentum of optimizers that have one, such as sgd')
    group.add_argument(
        '--weight-decay',
        type=non_negative_float,
        help='weight decay of all parameters but biases, those of norm layers and those that the model exempts',
    )


def _add_update_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--clip-grad',
        type=positive_float,
        metavar='NORM',
        help='limit of the gradients, which --clip-mode applies (default: no clipping)',
    )
    group.add_argument(
        '--clip-mode',
        choices=('norm', 'value', 'agc'),
        help='what --clip-grad limits: the norm of all gradients together, the size of each value, or (agc) the norm '
        'of a gradient relative to that of its weight',
    )
    group.add_argument(
        '--layer-decay',
        type=number(above=0, at_most=1),
        help='factor on the learning rate from each layer to the one before it (default: the same rate in all layers)',
    )
    group.add_argument(
        '--layer-decay-min-scale',
        type=probability,
        help='smallest factor on the learning rate that --layer-decay leads to',
    )
    group.add_argument(
        '--exit-lr-mult',
        type=positive_float,
        metavar='X',
        help="learning rate of the exit heads and of the loss's own parameters, as a multiple of the backbone's",
    )
    group.add_argument(
        '--opt-kwargs',
        dest='opt_args',
        nargs='*',
        action=KeyValues,
        metavar='KEY=VALUE',
        help='further arguments of the optimizer (default: none)',
    )
    group.add_argument(
        '--cuda-graphs',
        action='store_true',
        help='run forward and backward pass as CUDA graphs, which start all their kernels at once',
    )
    group.add_argument(
        '--skip-nonfinite',
        type=non_negative_int,
        metavar='N',
        help='leave out updates with a loss that is not finite, up to N batches in a row, which takes a check of every '
        'loss that slows a GPU down (default: 0, stop at the next check, every --log-interval batches)',
    )
    group.add_argument(
        '--grad-accum-steps',
        type=positive_int,
        metavar='N',
        help='batches per update, over which the gradients are averaged',
    )


def _add_lr_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--epochs',
        type=positive_int,
        metavar='N',
        help='epochs of the schedule or of its first cycle, to which --warmup-prefix and --cooldown-epochs add',
    )
    group.add_argument(
        '--sched',
        metavar='NAME',
        help='learning rate schedule: cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, or none',
    )
    group.add_argument(
        '--sched-on-updates', action='store_true', help='change the learning rate after updates instead of epochs'
    )
    group.add_argument(
        '--lr',
        type=number(at_least=0),
        help='learning rate after the warm-up (default: --lr-base, scaled to the number of images per update)',
    )
    group.add_argument(
        '--lr-base',
        type=positive_float,
        help='learning rate for --lr-base-size images per update, where --lr is not given',
    )
    group.add_argument('--lr-base-size', type=positive_int, metavar='N', help='images per update that --lr-base is for')
    group.add_argument(
        '--lr-base-scale',
        choices=('', 'linear', 'sqrt'),
        help='how the learning rate grows from --lr-base with the images per update (default: sqrt for optimizers with '
        'ada or lamb in their name, else linear)',
    )


def _add_noise_and_cycle_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--lr-noise',
        type=probability,
        nargs='+',
        help='random noise on the learning rate from this share of the schedule on, and up to the second share if two '
        'are given (default: no noise)',
    )
    group.add_argument(
        '--lr-noise-pct',
        type=number(at_least=0.01, below=1),
        help='largest noise, as a share of the learning rate',
    )
    group.add_argument(
        '--lr-noise-std',
        type=number(above=0, at_most=10),
        help='standard deviation of the noise, as a share of the learning rate',
    )
    group.add_argument(
        '--lr-cycle-mul',
        type=number(at_least=1, at_most=100),
        help='length of a cycle of cosine, tanh or poly as a multiple of the one before it',
    )
    group.add_argument(
        '--lr-cycle-decay',
        type=number(above=0, at_most=1),
        help='learning rate at the start of a cycle of cosine, tanh or poly as a multiple of that of the one before it',
    )
    group.add_argument('--lr-cycle-limit', type=integer(1, 1000), help='number of cycles of cosine, tanh or poly')
    group.add_argument(
        '--lr-k-decay',
        type=number(above=0, at_most=10),
        help='exponent of the time in cosine and poly schedules, above 1 for a rate that falls later',
    )


def _add_decay_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--warmup-lr', type=non_negative_float, help='learning rate that the warm-up starts with')
    group.add_argument(
        '--min-lr',
        type=non_negative_float,
        help='learning rate that cosine, tanh, poly, wsd and rsqrt end at',
    )
    group.add_argument(
        '--decay-milestones',
        type=positive_int,
        nargs='+',
        help='epochs at which multistep changes the learning rate',
    )
    group.add_argument(
        '--decay-epochs',
        type=number(at_least=0.001),
        help='epochs between the changes of step; for wsd and rsqrt epochs of the final decay, or below 1 its share',
    )
    group.add_argument(
        '--decay-rate',
        '--dr',
        type=number(above=0, at_most=100),
        help='factor on the learning rate at every change of step and multistep; for poly the exponent',
    )
    group.add_argument(
        '--warmup-epochs',
        type=non_negative_int,
        help='epochs in which the learning rate grows linearly from --warmup-lr',
    )
    group.add_argument(
        '--warmup-prefix', action='store_true', help='put the warm-up before the schedule, not in place of its start'
    )
    group.add_argument(
        '--cooldown-epochs',
        type=non_negative_int,
        help='epochs at --min-lr after a cosine, tanh, poly, wsd or rsqrt schedule',
    )


def _add_image_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--no-aug',
        action='store_true',
        help='train on central crops without random flips, changes of colour and erasing',
    )
    group.add_argument(
        '--train-crop-mode',
        choices=('rrc', 'rkrc', 'rkrr', 'pad4'),
        help='how training images are cropped: rrc takes a part of random size and shape; rkrc (at the centre) and '
        'rkrr (at random) resize by random factors and crop; pad4 adds 4 pixels at every side and crops at random, as '
        'is usual for CIFAR (default: rrc)',
    )
    group.add_argument(
        '--scale',
        type=number(above=0, at_most=100),
        nargs=2,
        help='smallest and largest random scale of rrc, rkrc and rkrr, for rrc the share of the area that it keeps',
    )
    group.add_argument(
        '--ratio',
        type=number(above=0, at_most=100),
        nargs=2,
        help='smallest and largest random aspect ratio of rrc, rkrc and rkrr, for rrc width by height',
    )
    group.add_argument('--hflip', type=probability, help='probability of a horizontal flip')
    group.add_argument('--vflip', type=probability, help='probability of a vertical flip')
    group.add_argument(
        '--color-jitter',
        type=number(at_least=0, at_most=10),
        help='largest relative change of brightness, contrast and saturation, unused with --aa policies other than 3a',
    )
    group.add_argument(
        '--color-jitter-prob',
        type=probability,
        help='probability of that change of colours (default: every image gets it)',
    )
    group.add_argument('--grayscale-prob', type=probability, help='probability of a conversion to grey')
    group.add_argument('--gaussian-blur-prob', type=probability, help='probability of a Gaussian blur')
    group.add_argument(
        '--aa',
        metavar='NAME',
        help="policy of AutoAugment, RandAugment or AugMix in timm's notation, such as rand-m9-mstd0.5 (default: none)",
    )


def _add_erasing_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--reprob', type=probability, help='probability of random erasing')
    group.add_argument(
        '--remode',
        choices=('const', 'rand', 'pixel'),
        help='content of an erased region: the mean colour, one random colour, or a random colour for every pixel',
    )
    group.add_argument('--recount', type=positive_int, help='largest number of erased regions of an image')
    group.add_argument(
        '--train-interpolation',
        type=train_interpolation,
        help='how training images are resized, as for --interpolation, or random: bilinear or bicubic at random',
    )


def _add_mixing_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--mixup',
        type=number(at_least=0, at_most=1000),
        help='alpha of the Beta distribution of the ratio in which mixup mixes two images, 0 for no mixup',
    )
    group.add_argument(
        '--cutmix',
        type=number(at_least=0, at_most=1000),
        help='alpha of the Beta distribution of the area that cutmix leaves of an image, 0 for no cutmix',
    )
    group.add_argument(
        '--cutmix-minmax',
        type=probability,
        nargs=2,
        help="smallest and largest side of cutmix's rectangle, as shares of the image's (default: as --cutmix says)",
    )
    group.add_argument(
        '--mixup-prob', type=probability, help='probability that mixup or cutmix is applied, if it is on'
    )
    group.add_argument(
        '--mixup-switch-prob',
        type=probability,
        help='probability of cutmix instead of mixup, if both are on',
    )
    group.add_argument(
        '--mixup-mode',
        choices=('batch', 'pair', 'elem'),
        help='images that share one mixing ratio: the whole batch, the two of a pair, or none (elem)',
    )
    group.add_argument(
        '--mixup-off-epoch',
        type=non_negative_int,
        metavar='N',
        help='first epoch, numbered from 0, without mixup and cutmix, where 0 itself means that they stay on',
    )


def _add_target_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--smoothing', type=fraction, help='label smoothing: share of a target spread over all classes')
    group.add_argument(
        '--bce-loss', action='store_true', help='train with binary cross-entropy instead of cross-entropy'
    )
    group.add_argument(
        '--bce-sum', action='store_true', help='sum binary cross-entropy over the classes instead of averaging it'
    )
    group.add_argument(
        '--bce-target-thresh',
        type=fraction,
        help='threshold of binary cross-entropy: targets above it become 1, others 0 (default: targets stay soft)',
    )
