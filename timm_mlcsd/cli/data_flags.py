"""Flags of data, preprocessing and device, which train.py and validate.py share."""

import argparse

from .arguments import image_side, integer, interpolation, non_negative_int, number, positive_int, seed

__all__ = ['add_data_flags', 'add_device_flags', 'add_loader_flags', 'add_train_data_flags']


def add_data_flags(parser: argparse.ArgumentParser, trains: bool) -> argparse._ArgumentGroup:
    """Add the group Data.

    Args:
        parser: Parser to extend.
        trains: Whether it is the parser of train.py.

    Returns:
        The group, for further flags.
    """
    group = parser.add_argument_group('Data')
    _add_source_flags(group, trains)
    _add_image_flags(group, trains)
    add_loader_flags(group)
    return group


def _default(trains: bool, new: str, trained: str = 'as in training') -> str:
    return f'(default: {new if trains else trained})'


def _add_source_flags(group: argparse._ArgumentGroup, trains: bool) -> None:
    group.add_argument(
        'data', nargs='?', metavar='DIR', help='path to the data, in place of --data-dir (default: as --data-dir says)'
    )
    group.add_argument(
        '--data-dir',
        metavar='DIR',
        help='path to the data, which --dataset digits and data of the Hugging Face Hub can do without '
        + _default(trains, 'none', 'that of the training'),
    )
    group.add_argument(
        '--dataset',
        '-d',
        metavar='NAME',
        help='data set: digits, or in timm\'s notation hfds/PATH, hfids/PATH, tfds/NAME, wds/NAME or torch/NAME '
        + _default(trains, 'a folder of images', 'that of the training; with --data-dir, a folder of images'),
    )
    group.add_argument(
        '--dataset-download', action='store_true', help='download a data set of torch/, tfds/ or hfids/ that is missing'
    )
    group.add_argument(
        '--dataset-trust-remote-code', action='store_true', help='let a data set of the Hugging Face Hub run its code'
    )
    group.add_argument(
        '--class-map',
        metavar='FILE',
        help='file that maps class names to indices '
        + _default(
            trains, 'the indices of the data set', 'as in training; with other data, the indices of the data set'
        ),
    )
    group.add_argument(
        '--input-img-mode',
        help=f"mode of Pillow that images are converted to {_default(trains, 'L for 1 channel, else RGB')}",
    )
    group.add_argument(
        '--input-key',
        help=f'column with the images, in data that has columns {_default(trains, "the usual one, such as image")}',
    )
    group.add_argument(
        '--target-key',
        help=f'column with the labels, in data that has columns {_default(trains, "the usual one, such as label")}',
    )


def _add_image_flags(group: argparse._ArgumentGroup, trains: bool) -> None:
    group.add_argument(
        '--img-size',
        type=image_side,
        metavar='N',
        help='height and width of the input in pixels (default: that of the network)',
    )
    group.add_argument(
        '--in-chans',
        type=integer(1, 1024),
        metavar='N',
        help=f'number of image channels {_default(trains, "3", "those of the network")}',
    )
    group.add_argument(
        '--input-size',
        type=image_side,
        nargs=3,
        metavar='N',
        help='channels, height and width of the input (default: as --in-chans and --img-size say)',
    )
    group.add_argument(
        '--crop-pct',
        type=number(at_least=0.1, at_most=1),
        help="side of the crop in evaluation, as a share of the resized image's (default: that of the network)",
    )
    group.add_argument(
        '--mean',
        type=number(at_least=-10, at_most=10),
        nargs='+',
        help='mean to subtract from values from 0 to 1, per channel or one for all (default: that of the network)',
    )
    group.add_argument(
        '--std',
        type=number(at_least=1e-4, at_most=10),
        nargs='+',
        help='standard deviation to divide by after that, per channel or one for all (default: that of the network)',
    )
    group.add_argument(
        '--interpolation',
        type=interpolation,
        help='how evaluation resizes images: nearest, bilinear, bicubic, box, hamming or lanczos '
        '(default: that of the network)',
    )


def add_loader_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the loader to the group Data."""
    group.add_argument('-b', '--batch-size', type=positive_int, metavar='N', help='images per batch and process')
    group.add_argument(
        '-j',
        '--workers',
        type=integer(0, 1024),
        metavar='N',
        help='processes that load images, 0 for none beside the main one (default: %(default)s, one per CPU up to 4)',
    )
    group.add_argument(
        '--max-bad-samples',
        type=non_negative_int,
        metavar='N',
        help='number of unreadable images that are left out, each named once, before it is an error',
    )
    group.add_argument(
        '--pin-mem',
        action=argparse.BooleanOptionalAction,
        help='load batches into page-locked memory, for faster transfer to a GPU (default: on with a GPU, else off)',
    )


def add_train_data_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the group Data that only train.py has."""
    group.add_argument('--train-split', metavar='NAME', help='name of the split to train on')
    group.add_argument(
        '--cache-dataset',
        choices=('', 'device'),
        help='device: keep small images decoded on the training device and augment them there (default: no cache)',
    )
    group.add_argument(
        '--train-num-samples',
        type=positive_int,
        metavar='N',
        help='number of images in a stream of training data (default: as the data set says)',
    )
    group.add_argument(
        '--epoch-repeats',
        type=number(at_least=0, at_most=1e6),
        metavar='N',
        help='passes over streamed training data of tfds/ or hfids/ per epoch, where less than 1 counts as 1',
    )
    group.add_argument(
        '--val-split',
        metavar='NAME',
        help='name of the split that chooses the best epoch (default: none, --val-fraction holds images out instead)',
    )
    group.add_argument(
        '--val-fraction',
        type=number(above=0, below=1),
        metavar='F',
        help='share of the train split that is held out to choose the best epoch, where there is no --val-split',
    )
    group.add_argument('--val-seed', type=seed, metavar='N', help='random seed for the choice of the held-out images')
    group.add_argument(
        '-vb',
        '--validation-batch-size',
        type=positive_int,
        metavar='N',
        help='images per batch and process in evaluation (default: as --batch-size says)',
    )


def add_device_flags(parser: argparse.ArgumentParser, compiles: bool = True) -> None:
    """Add the group Device.

    Args:
        parser: Parser to extend.
        compiles: Whether the script can compile the network; default: True.
    """
    group = parser.add_argument_group('Device')
    group.add_argument(
        '--device',
        help='device to run on, such as cpu, cuda or cuda:1 (default: cuda if available, else cpu)',
    )
    group.add_argument('--amp', action='store_true', help='run the network in mixed precision, by autocast')
    group.add_argument('--amp-dtype', choices=('float16', 'bfloat16'), help='lower precision of --amp')
    group.add_argument('--channels-last', action='store_true', help='use the channels-last memory layout')
    if not compiles:
        return
    group.add_argument(
        '--torchcompile',
        nargs='?',
        const='inductor',
        metavar='BACKEND',
        help='compile with torch.compile, by this backend or else inductor (default: no compilation)',
    )
    group.add_argument(
        '--torchcompile-mode',
        help='mode of torch.compile, such as reduce-overhead or max-autotune (default: that of torch.compile)',
    )
