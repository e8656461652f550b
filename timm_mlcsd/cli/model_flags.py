"""Flags of the network and its loss, for train.py."""

import argparse

from ..losses import CWEM_SUPERVISIONS, DISTILL_METHODS, DISTILL_RAMPS, TEACHERS
from ..models import DEFAULT_EXIT_HEAD, DEFAULT_EXIT_POOL, EXIT_HEADS, EXIT_POOLS
from .arguments import KeyValues, epochs, exits, fraction, integer, non_negative_int, number

__all__ = ['add_loss_flags', 'add_model_flags']

loss_weight = number(at_least=0, at_most=1e6)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group Model."""
    group = parser.add_argument_group('Model')
    _add_exit_flags(group)
    _add_weight_flags(group)
    _add_backbone_flags(group)


def _add_exit_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--model',
        metavar='NAME',
        help='multi-exit model: mlcsd_ARCH, hf-hub:REPO or local-dir:PATH',
    )
    group.add_argument(
        '--exits',
        type=exits,
        metavar='N',
        help='number of exits, or comma-separated modules to tap; 1 is the plain backbone (default: 8, or as many '
        'as there are blocks)',
    )
    group.add_argument(
        '--exit-head', choices=tuple(EXIT_HEADS), help=f'kind of layers of an exit head (default: {DEFAULT_EXIT_HEAD})'
    )
    group.add_argument(
        '--exit-pool', choices=EXIT_POOLS, help=f'global pool at the end of an exit head (default: {DEFAULT_EXIT_POOL})'
    )
    group.add_argument(
        '--small-input', action='store_true', help='take the first two downsamplings out, for images of about 32x32'
    )


def _add_weight_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--pretrained-backbone',
        nargs='?',
        const=True,
        metavar='TAG',
        help="start from timm's weights for the backbone, those of TAG if it is given (default: random weights)",
    )
    group.add_argument(
        '--pretrained', action='store_true', help='start from the weights of --model hf-hub:REPO or local-dir:PATH'
    )
    group.add_argument(
        '--initial-checkpoint',
        metavar='PATH',
        help='file with weights to start from, of the whole network or of its backbone (default: none)',
    )
    group.add_argument(
        '--heads-only',
        nargs='?',
        type=epochs,
        const=True,
        metavar='EPOCHS',
        help='train the exits and leave the backbone, and so the last exit, as it is, for so many epochs or, without a '
        'number, always (default: train everything)',
    )


def _add_backbone_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--num-classes',
        type=integer(1, 10_000_000),
        metavar='N',
        help='number of classes (default: that of the data)',
    )
    group.add_argument(
        '--gp',
        metavar='POOL',
        help="global pool of the backbone, as timm names it (default: the model's)",
    )
    group.add_argument(
        '--grad-checkpointing', action='store_true', help='save memory: recompute blocks in the backward pass'
    )
    group.add_argument(
        '--drop',
        type=fraction,
        metavar='P',
        help="probability of dropout in the backbone (default: the model's)",
    )
    group.add_argument(
        '--drop-path',
        type=fraction,
        metavar='P',
        help="probability of stochastic depth in the backbone (default: the model's)",
    )
    group.add_argument(
        '--drop-block',
        type=fraction,
        metavar='P',
        help="probability of DropBlock in the backbone (default: the model's)",
    )
    group.add_argument(
        '--model-kwargs',
        nargs='*',
        action=KeyValues,
        metavar='KEY=VALUE',
        help='further arguments of the model (default: none)',
    )


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group Distillation."""
    group = parser.add_argument_group('Distillation')
    _add_teacher_flags(group)
    _add_strength_flags(group)


def _add_teacher_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--distill',
        choices=('none', *TEACHERS),
        help='teacher of the exits: none; one-for-all, the last exit; minimum, the exit with the least loss on an '
        'image; average, the mean of all exits; deeper, the mean of the deeper ones; attention and confidence, means '
        'weighted by entropy and by loss; all-for-all, a mean with learned weights',
    )
    group.add_argument(
        '--distill-method',
        choices=tuple(DISTILL_METHODS),
        help='loss between an exit and its teacher: kd and dkd compare logits, cc and crd features',
    )
    group.add_argument(
        '--alpha',
        type=loss_weight,
        help='weight of the loss of --distill-method, L_KD (default: '
        + ', '.join(f'{m.weight:g} for {name}' for name, m in DISTILL_METHODS.items())
        + ')',
    )
    group.add_argument('--beta', type=loss_weight, help='weight of L_HT, the distance to the features of the teacher')
    group.add_argument('--gamma', type=loss_weight, help='weight of the classification loss L_CLS')
    group.add_argument(
        '--temperature',
        type=number(at_least=0.01, at_most=1000),
        help='temperature of kd and dkd, which divides logits',
    )


def _add_strength_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--distill-warmup-epochs',
        type=non_negative_int,
        metavar='N',
        help='epochs in which --alpha and --beta grow linearly from 0',
    )
    group.add_argument(
        '--distill-ramp',
        choices=DISTILL_RAMPS,
        help='strength of distillation: accuracy scales it for each exit by its running training accuracy and limits '
        'the gradient of every image, none keeps it constant, as in the paper',
    )
    group.add_argument(
        '--exit-weights',
        type=loss_weight,
        nargs='+',
        metavar='W',
        help='weights of the exits in the loss, one number per exit (default: 1 for each)',
    )
    group.add_argument(
        '--cwem-supervision',
        choices=CWEM_SUPERVISIONS,
        help='loss of the learned weights of all-for-all: cross-entropy of the mixed logits (ce), L_KD (kd), or none',
    )
