"""Command line flags: timm's under timm's names, plus those of the exits."""

import argparse
import os

from ..adaptive import AGGREGATES, METHODS, SCORES
from ..arguments import (
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
from ..losses import CWEM_SUPERVISIONS, DISTILL_RAMPS, DISTILLS
from ..losses import METHODS as DISTILL_METHODS
from ..models import DEFAULT_EXIT_HEAD, DEFAULT_EXIT_POOL, EXIT_HEADS, EXIT_POOLS
from .recipe_flags import add_recipe_flags

__all__ = ['train_parser', 'validate_parser']

loss_weight = number(at_least=0, at_most=1e6)


def _add_data_flags(parser: argparse.ArgumentParser, trains: bool) -> argparse._ArgumentGroup:
    def default(new: str, trained: str = 'as in training') -> str:
        return f'(default: {new if trains else trained})'

    group = parser.add_argument_group('Data')
    group.add_argument(
        'data', nargs='?', metavar='DIR', help='path to the data, in place of --data-dir (default: as --data-dir says)'
    )
    group.add_argument(
        '--data-dir',
        metavar='DIR',
        help='path to the data, which --dataset digits and data of the Hugging Face Hub can do without '
        + default('none', 'that of the training'),
    )
    group.add_argument(
        '--dataset',
        '-d',
        default='',
        metavar='NAME',
        help='data set: digits, or in timm\'s notation hfds/PATH, hfids/PATH, tfds/NAME, wds/NAME or torch/NAME '
        + default('a folder of images', 'that of the training; with --data-dir, a folder of images'),
    )
    group.add_argument(
        '--dataset-download', action='store_true', help='download a data set of torch/, tfds/ or hfids/ that is missing'
    )
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='let a data set of the Hugging Face Hub run its code'
    )
    group.add_argument(
        '--class-map',
        default='',
        metavar='FILE',
        help='file that maps class names to indices '
        + default('the indices of the data set', 'as in training; with other data, the indices of the data set'),
    )
    group.add_argument(
        '--input-img-mode',
        default=None,
        help=f"mode of Pillow that images are converted to {default('L for 1 channel, else RGB')}",
    )
    group.add_argument(
        '--input-key',
        default=None,
        help=f'column with the images, in data that has columns {default("the usual one, such as image")}',
    )
    group.add_argument(
        '--target-key',
        default=None,
        help=f'column with the labels, in data that has columns {default("the usual one, such as label")}',
    )
    group.add_argument(
        '--img-size',
        type=image_side,
        default=None,
        metavar='N',
        help='height and width of the input in pixels (default: that of the network)',
    )
    group.add_argument(
        '--in-chans',
        type=integer(1, 1024),
        default=None,
        metavar='N',
        help=f'number of image channels {default("3", "those of the network")}',
    )
    group.add_argument(
        '--input-size',
        type=image_side,
        nargs=3,
        default=None,
        metavar='N',
        help='channels, height and width of the input (default: as --in-chans and --img-size say)',
    )
    group.add_argument(
        '--crop-pct',
        type=number(at_least=0.1, at_most=1),
        default=None,
        help="side of the crop in evaluation, as a share of the resized image's (default: that of the network)",
    )
    group.add_argument(
        '--mean',
        type=number(at_least=-10, at_most=10),
        nargs='+',
        default=None,
        help='mean to subtract from values from 0 to 1, per channel or one for all (default: that of the network)',
    )
    group.add_argument(
        '--std',
        type=number(at_least=1e-4, at_most=10),
        nargs='+',
        default=None,
        help='standard deviation to divide by after that, per channel or one for all (default: that of the network)',
    )
    group.add_argument(
        '--interpolation',
        type=interpolation,
        default='',
        help='how evaluation resizes images: nearest, bilinear, bicubic, box, hamming or lanczos '
        '(default: that of the network)',
    )
    group.add_argument(
        '-b', '--batch-size', type=positive_int, default=128, metavar='N', help='images per batch and process'
    )
    group.add_argument(
        '-j',
        '--workers',
        type=integer(0, 1024),
        default=min(4, os.cpu_count() or 1),
        metavar='N',
        help='processes that load images, 0 for none beside the main one (default: %(default)s, one per CPU up to 4)',
    )
    group.add_argument(
        '--max-bad-samples',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='number of unreadable images that are left out, each named once, before it is an error',
    )
    group.add_argument(
        '--pin-mem',
        action=argparse.BooleanOptionalAction,
        help='load batches into page-locked memory, for faster transfer to a GPU (default: on with a GPU, else off)',
    )
    return group


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group('Device')
    group.add_argument(
        '--device',
        default=None,
        help='device to run on, such as cpu, cuda or cuda:1 (default: cuda if available, else cpu)',
    )
    group.add_argument('--amp', action='store_true', help='run the network in mixed precision, by autocast')
    group.add_argument(
        '--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='lower precision of --amp'
    )
    group.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    group.add_argument(
        '--torchcompile',
        nargs='?',
        default=None,
        const='inductor',
        metavar='BACKEND',
        help='compile with torch.compile, by this backend or else inductor (default: no compilation)',
    )
    group.add_argument(
        '--torchcompile-mode',
        default=None,
        help='mode of torch.compile, such as reduce-overhead or max-autotune (default: that of torch.compile)',
    )


def train_parser() -> argparse.ArgumentParser:
    """The flags of train.py."""
    parser = ScriptParser(
        prog='train.py',
        description='Train a multi-exit network',
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of flags, which the command line overrides (default: none)'
    )

    group = _add_data_flags(parser, trains=True)
    group.add_argument('--train-split', default='train', metavar='NAME', help='name of the split to train on')
    group.add_argument(
        '--cache-dataset',
        default='',
        choices=('', 'device'),
        help='device: keep small images decoded on the training device and augment them there (default: no cache)',
    )
    group.add_argument(
        '--train-num-samples',
        type=positive_int,
        default=None,
        metavar='N',
        help='number of images in a stream of training data (default: as the data set says)',
    )
    group.add_argument(
        '--epoch-repeats',
        type=number(at_least=0, at_most=1e6),
        default=0.0,
        metavar='N',
        help='passes over streamed training data of tfds/ or hfids/ per epoch, where less than 1 counts as 1',
    )
    group.add_argument(
        '--val-split',
        default=None,
        metavar='NAME',
        help='name of the split that chooses the best epoch (default: none, --val-fraction holds images out instead)',
    )
    group.add_argument(
        '--val-fraction',
        type=number(above=0, below=1),
        default=0.1,
        metavar='F',
        help='share of the train split that is held out to choose the best epoch, where there is no --val-split',
    )
    group.add_argument(
        '--val-seed', type=seed, default=0, metavar='N', help='random seed for the choice of the held-out images'
    )
    group.add_argument(
        '-vb',
        '--validation-batch-size',
        type=positive_int,
        default=None,
        metavar='N',
        help='images per batch and process in evaluation (default: as --batch-size says)',
    )

    group = parser.add_argument_group('Model')
    group.add_argument(
        '--model',
        default='mlcsd_resnet18',
        metavar='NAME',
        help='multi-exit model: mlcsd_ARCH, hf-hub:REPO or local-dir:PATH',
    )
    group.add_argument(
        '--exits',
        type=exits,
        default=None,
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
    group.add_argument(
        '--pretrained-backbone',
        nargs='?',
        default=False,
        const=True,
        metavar='TAG',
        help="start from timm's weights for the backbone, those of TAG if it is given (default: random weights)",
    )
    group.add_argument(
        '--pretrained', action='store_true', help='start from the weights of --model hf-hub:REPO or local-dir:PATH'
    )
    group.add_argument(
        '--initial-checkpoint',
        default='',
        metavar='PATH',
        help='file with weights to start from, of the whole network or of its backbone (default: none)',
    )
    group.add_argument(
        '--heads-only',
        nargs='?',
        type=epochs,
        default=False,
        const=True,
        metavar='EPOCHS',
        help='train the exits and leave the backbone, and so the last exit, as it is, for so many epochs or, without a '
        'number, always (default: train everything)',
    )
    group.add_argument(
        '--num-classes',
        type=integer(1, 10_000_000),
        default=None,
        metavar='N',
        help='number of classes (default: that of the data)',
    )
    group.add_argument(
        '--gp',
        default=None,
        metavar='POOL',
        help="global pool of the backbone, as timm names it (default: the model's)",
    )
    group.add_argument(
        '--grad-checkpointing', action='store_true', help='save memory: recompute blocks in the backward pass'
    )
    group.add_argument(
        '--drop',
        type=fraction,
        default=None,
        metavar='P',
        help="probability of dropout in the backbone (default: the model's)",
    )
    group.add_argument(
        '--drop-path',
        type=fraction,
        default=None,
        metavar='P',
        help="probability of stochastic depth in the backbone (default: the model's)",
    )
    group.add_argument(
        '--drop-block',
        type=fraction,
        default=None,
        metavar='P',
        help="probability of DropBlock in the backbone (default: the model's)",
    )
    group.add_argument(
        '--model-kwargs',
        nargs='*',
        default={},
        action=KeyValues,
        metavar='KEY=VALUE',
        help='further arguments of the model (default: none)',
    )

    group = parser.add_argument_group('Distillation')
    group.add_argument(
        '--distill',
        default='all-for-all',
        choices=DISTILLS,
        help='teacher of the exits: none; one-for-all, the last exit; minimum, the exit with the least loss on an '
        'image; average, the mean of all exits; deeper, the mean of the deeper ones; attention and confidence, means '
        'weighted by entropy and by loss; all-for-all, a mean with learned weights',
    )
    group.add_argument(
        '--distill-method',
        default='kd',
        choices=tuple(DISTILL_METHODS),
        help='loss between an exit and its teacher: kd and dkd compare logits, cc and crd features',
    )
    group.add_argument(
        '--alpha',
        type=loss_weight,
        default=None,
        help='weight of the loss of --distill-method, L_KD (default: '
        + ', '.join(f'{m.weight:g} for {name}' for name, m in DISTILL_METHODS.items())
        + ')',
    )
    group.add_argument(
        '--pool-momentum',
        type=fraction,
        default=0.0,
        metavar='M',
        help='mix teachers from a running mean of the logits over the epochs, image by image: share of the old mean',
    )
    group.add_argument(
        '--beta', type=loss_weight, default=10.0, help='weight of L_HT, the distance to the features of the teacher'
    )
    group.add_argument('--gamma', type=loss_weight, default=1.0, help='weight of the classification loss L_CLS')
    group.add_argument(
        '--temperature',
        type=number(at_least=0.01, at_most=1000),
        default=4.0,
        help='temperature of kd and dkd, which divides logits',
    )
    group.add_argument(
        '--distill-warmup-epochs',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='epochs in which --alpha and --beta grow linearly from 0',
    )
    group.add_argument(
        '--distill-ramp',
        default='accuracy',
        choices=DISTILL_RAMPS,
        help='strength of distillation: accuracy scales it for each exit by its running training accuracy and limits '
        'the gradient of every image, none keeps it constant, as in the paper',
    )
    group.add_argument(
        '--exit-weights',
        type=loss_weight,
        nargs='+',
        default=None,
        metavar='W',
        help='weights of the exits in the loss, one number per exit (default: 1 for each)',
    )
    group.add_argument(
        '--cwem-supervision',
        default='ce',
        choices=CWEM_SUPERVISIONS,
        help='loss of the learned weights of all-for-all: cross-entropy of the mixed logits (ce), L_KD (kd), or none',
    )

    add_recipe_flags(parser)
    _add_device_flags(parser)

    group = parser.add_argument_group('Processes', 'torchrun --nproc-per-node N train.py ... trains with N')
    group.add_argument(
        '--dist-bn',
        default='reduce',
        choices=('reduce', 'broadcast', ''),
        help="BatchNorm's statistics after an epoch: the mean over all processes (reduce), those of the first process "
        "(broadcast), or each process's own ('')",
    )
    group.add_argument(
        '--fsdp',
        action='store_true',
        help='divide parameters, gradients and optimizer state among the processes (FSDP2)',
    )
    group.add_argument(
        '--sync-bn', action='store_true', help='compute BatchNorm over the batches of all processes, on GPUs'
    )

    group = parser.add_argument_group('Run')
    group.add_argument(
        '--seed', type=seed, default=42, help='seed of all random numbers but those that choose held-out images'
    )
    group.add_argument('--output', default='./output/train', metavar='DIR', help='folder for the folders of all runs')
    group.add_argument(
        '--experiment',
        default='',
        metavar='NAME',
        help="name of the run's folder in --output (default: time and model)",
    )
    group.add_argument(
        '--resume',
        default='',
        metavar='PATH',
        help='checkpoint or run folder to go on from, or auto: the run of --experiment if it has begun (default: none)',
    )
    group.add_argument(
        '--no-resume-opt', action='store_true', help='take weights and epoch from --resume, but no optimizer state'
    )
    group.add_argument(
        '--checkpoint-hist',
        type=positive_int,
        default=10,
        metavar='N',
        help='number of checkpoints of epochs to keep, beside the last and the best',
    )
    group.add_argument(
        '--checkpoint-every-steps',
        type=non_negative_int,
        default=0,
        metavar='N',
        help='save the last checkpoint every N updates too, 0 for only after every epoch',
    )
    group.add_argument(
        '--dry-run',
        action='store_true',
        help='build everything, train for two updates, print memory and time, and write nothing',
    )
    group.add_argument(
        '--log-tensorboard', action='store_true', help='log losses, accuracies and mixing weights for TensorBoard'
    )
    group.add_argument('--log-wandb', action='store_true', help='log the same to Weights & Biases')
    group.add_argument('--log-trackio', action='store_true', help='log the same to trackio')
    group.add_argument(
        '--log-project', default='timm_mlcsd', metavar='NAME', help='project of --log-wandb and --log-trackio'
    )
    group.add_argument(
        '--log-interval',
        type=positive_int,
        default=50,
        metavar='N',
        help='batches between updates of the progress bar, with a check of the loss',
    )
    return parser


def validate_parser() -> argparse.ArgumentParser:
    """The flags of validate.py."""
    parser = ScriptParser(
        prog='validate.py',
        description='What every exit of a network costs and gets right',
    )
    parser.add_argument(
        '-c', '--config', metavar='FILE', help='YAML file of flags, which the command line overrides (default: none)'
    )
    group = _add_data_flags(parser, trains=False)
    group.add_argument('--split', default='validation', metavar='NAME', help='name of the split to evaluate on')
    group.add_argument(
        '--held-out',
        action='store_true',
        help='evaluate on the images that training held out of its train split, not on --split',
    )
    group = parser.add_argument_group('Model')
    group.add_argument(
        '--checkpoint',
        default='',
        metavar='PATH',
        help='checkpoint of train.py, or folder of a run for its best one (default: none, --model names the network)',
    )
    group.add_argument(
        '--model',
        default='',
        metavar='NAME',
        help='saved network, hf-hub:REPO or local-dir:PATH (default: none, --checkpoint names the network)',
    )
    group.add_argument('--use-ema', action='store_true', help='evaluate the averaged weights of the checkpoint')
    _add_device_flags(parser)
    group = parser.add_argument_group('Adaptive inference')
    group.add_argument(
        '--adaptive',
        action='store_true',
        help='let images leave at early exits by an exit policy, and report that too',
    )
    group.add_argument(
        '--budget',
        type=budget,
        metavar='B',
        help='fit a policy: the best within a mean cost per image of B MMACs, or of a percentage of the plain backbone '
        'such as 60%% (default: no such limit)',
    )
    group.add_argument(
        '--latency-budget',
        type=positive_float,
        metavar='MS',
        help='fit a policy: the best within a mean of MS milliseconds per image, measured here at batch size 1 '
        '(default: no such limit)',
    )
    group.add_argument(
        '--max-drop',
        type=number(at_least=-100, at_most=100),
        metavar='P',
        help='fit a policy: the cheapest that loses at most P percentage points of accuracy against the last exit '
        '(default: no such limit)',
    )
    group.add_argument(
        '--score',
        choices=SCORES,
        help='certainty of an exit: top probability, 1 less the normalised entropy, margin of the two top '
        'probabilities, or number of exits in a row that agree (default: confidence)',
    )
    group.add_argument(
        '--aggregate',
        choices=AGGREGATES,
        help='answer of an exit: its own, or a mean of all so far, with equal or with fitted weights (default: last)',
    )
    group.add_argument(
        '--method',
        choices=METHODS,
        help="how thresholds are found: a search for the best, the best of MSDNet's exit rates, or the way of the "
        'paper (default: optimal)',
    )
    group.add_argument(
        '--calibration-split',
        metavar='NAME',
        help='name of the split to fit the policy to (default: the images that chose the best epoch of the training)',
    )
    group.add_argument(
        '--policy',
        metavar='FILE',
        help='file of the policy to use, if none is fitted (default: that beside the weights)',
    )
    group.add_argument(
        '--save-policy',
        nargs='?',
        const=True,
        metavar='FILE',
        help='write the fitted policy to FILE or else to exit_policy.json beside the weights (default: write none)',
    )
    group = parser.add_argument_group('Results')
    group.add_argument(
        '--report',
        default='',
        metavar='FILE',
        help='write a page on --adaptive for the browser to this .html file (default: no page)',
    )
    group.add_argument(
        '--results-file', default='', metavar='FILE', help='write the table to this .csv or .json file (default: none)'
    )
    group.add_argument(
        '--plot', default='', metavar='FILE', help='draw accuracy against cost to this .png file (default: no plot)'
    )
    return parser
