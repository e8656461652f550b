"""Flags of the run: its processes, folder, checkpoints and logs, for train.py."""

import argparse

from .arguments import non_negative_int, positive_int, seed

__all__ = ['add_process_flags', 'add_run_flags']


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group Processes."""
    group = parser.add_argument_group('Processes', 'torchrun --nproc-per-node N train.py ... trains with N')
    group.add_argument(
        '--dist-bn',
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


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the group Run."""
    group = parser.add_argument_group('Run')
    _add_folder_flags(group)
    _add_log_flags(group)


def _add_folder_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument('--seed', type=seed, help='seed of all random numbers but those that choose held-out images')
    group.add_argument('--output', metavar='DIR', help='folder for the folders of all runs')
    group.add_argument(
        '--experiment',
        metavar='NAME',
        help="name of the run's folder in --output (default: time and model)",
    )
    group.add_argument(
        '--resume',
        metavar='PATH',
        help='checkpoint or run folder to go on from, or auto: the run of --experiment if it has begun (default: none)',
    )
    group.add_argument(
        '--no-resume-opt', action='store_true', help='take weights and epoch from --resume, but no optimizer state'
    )
    group.add_argument(
        '--checkpoint-hist',
        type=positive_int,
        metavar='N',
        help='number of checkpoints of epochs to keep, beside the last and the best',
    )
    group.add_argument(
        '--checkpoint-every-steps',
        type=non_negative_int,
        metavar='N',
        help='save the last checkpoint every N updates too, 0 for only after every epoch',
    )
    group.add_argument(
        '--dry-run',
        action='store_true',
        help='build everything, train for two updates, print memory and time, and write nothing',
    )


def _add_log_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        '--log-tensorboard', action='store_true', help='log losses, accuracies and mixing weights for TensorBoard'
    )
    group.add_argument('--log-wandb', action='store_true', help='log the same to Weights & Biases')
    group.add_argument('--log-trackio', action='store_true', help='log the same to trackio')
    group.add_argument('--log-project', metavar='NAME', help='project of --log-wandb and --log-trackio')
    group.add_argument(
        '--log-interval',
        type=positive_int,
        metavar='N',
        help='batches between updates of the progress bar, with a check of the loss',
    )
