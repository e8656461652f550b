"""Command line flags: timm's under timm's names, plus those of the exits."""

import argparse
import os

from ..adaptive import AGGREGATES, SCORES, THRESHOLD_METHODS
from ..losses import CWEM_SUPERVISIONS, DISTILL_METHODS, DISTILL_MODES, DISTILL_RAMPS
from ..models import DEFAULT_EXIT_HEAD, DEFAULT_EXIT_POOL, EXIT_HEADS, EXIT_POOLS
from .arguments import (
    KeyValues,
    ScriptParser,
    budget,
    epochs,
    exits,
    fraction,
    image_side,
    integer,
    interpolation,
    non_negative_int,
    number,
    positive_float,
    positive_int,
    seed,
)
from .recipe_flags import add_recipe_flags

__all__ = ['train_parser', 'validate_parser']

loss_weight = number(at_least=0, at_most=1e6)


def _add_data_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group('Data')
    group.add_argument('data', nargs='?', metavar='DIR', help='path to the data (as --data-dir)')
    group.add_argument('--data-dir', metavar='DIR', help='path to the data')
    group.add_argument(
        '--dataset',
        '-d',
        default='',
        metavar='NAME',
        help="type of data as in timm ('' for image folders, hfds/PATH, tfds/NAME, wds/NAME, torch/NAME), or digits",
    )
    group.add_argument('--dataset-download', action='store_true', help='let torch/, tfds/ and hfids/ data download')
    group.add_argument('--dataset-trust-remote-code', action='store_true', help='let a Hub data set run its code')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    group.add_argument('--input-img-mode', default=None, help="PIL mode of the images (default: 'L' or 'RGB')")
    group.add_argument('--input-key', default=None, help='column with the images, where data has columns')
    group.add_argument('--target-key', default=None, help='column with the labels, where data has columns')
    group.add_argument(
        '--img-size', type=image_side, default=None, metavar='N', help='height and width (default: model)'
    )
    group.add_argument(
        '--in-chans', type=integer(1, 1024), default=None, metavar='N', help='image channels (default: 3)'
    )
    group.add_argument(
        '--input-size', type=image_side, nargs=3, default=None, metavar='N', help='channels, height, width'
    )
    group.add_argument(
        '--crop-pct',
        type=number(at_least=0.1, at_most=1),
        default=None,
        help='share of the image in the evaluation crop',
    )
    group.add_argument(
        '--mean', type=number(at_least=-10, at_most=10), nargs='+', default=None, help='channel means (default: model)'
    )
    group.add_argument(
        '--std', type=number(at_least=1e-4, at_most=10), nargs='+', default=None, help='channel standard deviations'
    )
    group.add_argument('--interpolation', type=interpolation, default='', help='to resize with (default: of the model)')
    group.add_argument('-b', '--batch-size', type=positive_int, default=128, metavar='N')
    group.add_argument(
        '-j',
        '--workers',
        type=integer(0, 1024),
        default=min(4, os.cpu_count() or 1),
        metavar='N',
        help='loader processes',
    )
    group.add_argument(
        '--max-bad-samples',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='leave out up to N images that cannot be read, each named once',
    )
    group.add_argument(
        '--pin-mem',
        action=argparse.BooleanOptionalAction,
        help='pin CPU memory, so that nobody waits for the transfer to a GPU (default: with a GPU)',
    )
    return group


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument('--device', default=None, help='cuda, cpu, ... (default: cuda where there is one)')
    group.add_argument('--amp', action='store_true', help='mixed precision by autocast')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'))
    group.add_argument('--channels-last', action='store_true', help='use that memory layout')
    group.add_argument(
        '--torchcompile', nargs='?', default=None, const='inductor', metavar='BACKEND', help='use torch.compile'
    )
    group.add_argument('--torchcompile-mode', default=None)


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = ScriptParser(
        prog='train.py',
        description='Train a multi-exit network',
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with flags; the command line wins')

    group = _add_data_flags(parser)
    group.add_argument('--train-split', default='train', metavar='NAME', help='split to train on')
    group.add_argument(
        '--cache-dataset',
        default='',
        choices=('', 'device'),
        help='keep small images, decoded, on the training device and augment them there',
    )
    group.add_argument(
        '--train-num-samples',
        type=positive_int,
        default=None,
        metavar='N',
        help='length of streamed data that does not tell',
    )
    group.add_argument(
        '--epoch-repeats',
        type=number(at_least=0, at_most=1e6),
        default=0.0,
        metavar='N',
        help='passes per epoch, streamed data',
    )
    group.add_argument(
        '--val-split',
        default=None,
        metavar='NAME',
        help='split that chooses the best epoch (default: held out of the train split, see --val-fraction)',
    )
    group.add_argument(
        '--val-fraction',
        type=number(above=0, below=1),
        default=0.1,
        metavar='F',
        help='share of the train split that is held out',
    )
    group.add_argument('--val-seed', type=seed, default=0, metavar='N', help='seed of that choice')
    group.add_argument('-vb', '--validation-batch-size', type=positive_int, default=None, metavar='N')

    group = parser.add_argument_group('Model')
    group.add_argument('--model', default='mlcsd_resnet18', metavar='NAME', help='a multi-exit model')
    group.add_argument(
        '--exits',
        type=exits,
        default=None,
        metavar='N',
        help='number of exits, or comma-separated modules to tap; 1 is the plain backbone (default: 8, or as many '
        'as there are blocks)',
    )
    group.add_argument('--exit-head', choices=tuple(EXIT_HEADS), help=f'(default: {DEFAULT_EXIT_HEAD})')
    group.add_argument('--exit-pool', choices=EXIT_POOLS, help=f'(default: {DEFAULT_EXIT_POOL})')
    group.add_argument('--small-input', action='store_true', help='take the first two downsamplings out')
    group.add_argument(
        '--pretrained-backbone',
        nargs='?',
        default=False,
        const=True,
        metavar='TAG',
        help="start from timm's weights for the backbone",
    )
    group.add_argument('--pretrained', action='store_true', help='start from multi-exit weights (hf-hub: models)')
    group.add_argument(
        '--initial-checkpoint', default='', metavar='PATH', help='weights to start from, of all or of the backbone'
    )
    group.add_argument(
        '--heads-only',
        nargs='?',
        type=epochs,
        default=False,
        const=True,
        metavar='EPOCHS',
        help='train the exits and leave the backbone, and so the last exit, as it is: for so many epochs, or always',
    )
    group.add_argument(
        '--num-classes', type=integer(1, 10_000_000), default=None, metavar='N', help='(default: of the data)'
    )
    group.add_argument('--gp', default=None, metavar='POOL', help="the backbone's global pool")
    group.add_argument('--grad-checkpointing', action='store_true', help='recompute blocks in the backward pass')
    group.add_argument('--drop', type=fraction, default=None, metavar='PCT', help='dropout rate')
    group.add_argument('--drop-path', type=fraction, default=None, metavar='PCT', help='drop path rate')
    group.add_argument('--drop-block', type=fraction, default=None, metavar='PCT', help='drop block rate')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE')

    group = parser.add_argument_group('Distillation')
    group.add_argument('--distill', default='all-for-all', choices=DISTILL_MODES, help='who teaches')
    group.add_argument(
        '--distill-method', default='kd', choices=tuple(DISTILL_METHODS), help='how exits learn from their teacher'
    )
    group.add_argument(
        '--alpha',
        type=loss_weight,
        default=None,
        help='weight of that distillation, L_KD (default: '
        + ', '.join(f'{m.weight:g} for {name}' for name, m in DISTILL_METHODS.items())
        + ')',
    )
    group.add_argument('--beta', type=loss_weight, default=10.0, help='weight of the feature distillation L_HT')
    group.add_argument('--gamma', type=loss_weight, default=1.0, help='weight of the classification loss L_CLS')
    group.add_argument('--temperature', type=number(at_least=0.01, at_most=1000), default=4.0)
    group.add_argument(
        '--distill-warmup-epochs',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='epochs in which alpha and beta grow from 0',
    )
    group.add_argument(
        '--distill-ramp',
        default='accuracy',
        choices=DISTILL_RAMPS,
        help="accuracy: scale each exit's distillation by its running training accuracy; none: full strength from the "
        'first batch on, the loss of the paper',
    )
    group.add_argument('--exit-weights', type=loss_weight, nargs='+', default=None, metavar='W', help='one per exit')
    group.add_argument('--cwem-supervision', default='ce', choices=CWEM_SUPERVISIONS, help='what trains the CWEM')

    add_recipe_flags(parser)
    _add_device_flags(parser)

    group = parser.add_argument_group('Processes', 'torchrun --nproc-per-node N train.py ... trains with N')
    group.add_argument(
        '--dist-bn',
        default='reduce',
        choices=('reduce', 'broadcast', ''),
        help="what becomes of BatchNorm's statistics after an epoch: their mean, the first process's, or nothing",
    )
    group.add_argument(
        '--fsdp', action='store_true', help='share parameters and optimizer out (FSDP2), for what one GPU cannot hold'
    )
    group.add_argument('--sync-bn', action='store_true', help='one BatchNorm over all processes (GPUs only)')

    group = parser.add_argument_group('Run')
    group.add_argument('--seed', type=seed, default=42)
    group.add_argument('--output', default='./output/train', metavar='DIR')
    group.add_argument('--experiment', default='', metavar='NAME', help='sub-folder (default: time and model)')
    group.add_argument(
        '--resume',
        default='',
        metavar='PATH',
        help="go on from a checkpoint, or from a run; auto: go on with --experiment's, if it has begun",
    )
    group.add_argument('--no-resume-opt', action='store_true', help='resume weights only')
    group.add_argument(
        '--checkpoint-hist', type=positive_int, default=10, metavar='N', help='numbered checkpoints to keep'
    )
    group.add_argument(
        '--checkpoint-every-steps',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='also save the last checkpoint every N updates (default: after epochs alone)',
    )
    group.add_argument(
        '--dry-run', action='store_true', help='build everything, train two steps, print memory and time; write nothing'
    )
    group.add_argument('--log-tensorboard', action='store_true', help='curves and teachers for TensorBoard')
    group.add_argument('--log-wandb', action='store_true', help='the same for Weights & Biases')
    group.add_argument('--log-trackio', action='store_true', help='the same for trackio')
    group.add_argument('--log-project', default='timm_mlcsd', metavar='NAME', help='project of those two')
    group.add_argument(
        '--log-interval', type=positive_int, default=50, metavar='N', help='batches between updates of the bar'
    )
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """The flags of validate.py."""
    parser = ScriptParser(
        prog='validate.py',
        description='What every exit of a network costs and gets right',
    )
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML file with flags; the command line wins')
    group = _add_data_flags(parser)
    group.add_argument('--split', default='validation', metavar='NAME', help='split to evaluate on')
    group.add_argument(
        '--held-out', action='store_true', help='evaluate on what training held out of its train split instead'
    )
    group = parser.add_argument_group('Model')
    group.add_argument('--checkpoint', default='', metavar='PATH', help='a checkpoint of train.py')
    group.add_argument('--model', default='', metavar='NAME', help='or a model: hf-hub:REPO or local-dir:PATH')
    group.add_argument('--use-ema', action='store_true', help='evaluate the averaged weights of the checkpoint')
    _add_device_flags(parser)
    group = parser.add_argument_group('Adaptive inference')
    group.add_argument(
        '--adaptive',
        action='store_true',
        help='let images leave early, by a policy fitted to what training held out or by --policy; report on --split',
    )
    group.add_argument(
        '--budget',
        type=budget,
        metavar='B',
        help='mean cost per image: MMACs, or a percentage of the plain backbone (60%%)',
    )
    group.add_argument(
        '--latency-budget',
        type=positive_float,
        metavar='MS',
        help='mean milliseconds per image, measured here at batch 1',
    )
    group.add_argument(
        '--max-drop',
        type=number(at_least=-100, at_most=100),
        metavar='P',
        help='the least cost that loses at most P points of accuracy',
    )
    group.add_argument('--score', choices=SCORES, help='how sure an exit is (default: confidence)')
    group.add_argument('--aggregate', choices=AGGREGATES, help='what an exit answers (default: last)')
    group.add_argument('--method', choices=THRESHOLD_METHODS, help='how thresholds are found (default: optimal)')
    group.add_argument(
        '--calibration-split',
        metavar='NAME',
        help='split to fit the policy to (default: what chose the best epoch of the training)',
    )
    group.add_argument('--policy', metavar='FILE', help='use this policy (default: the one beside the weights)')
    group.add_argument(
        '--save-policy',
        nargs='?',
        const=True,
        metavar='FILE',
        help='write the policy that was fitted (default: exit_policy.json beside the weights)',
    )
    group = parser.add_argument_group('Results')
    group.add_argument(
        '--report', default='', metavar='FILE', help='with --adaptive: write a page to look at in a browser, .html'
    )
    group.add_argument('--results-file', default='', metavar='FILE', help='also write the table as .csv or .json')
    group.add_argument('--plot', default='', metavar='FILE', help='draw accuracy against cost as .png')
    return parser
