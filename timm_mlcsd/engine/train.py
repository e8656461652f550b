"""The training loop behind train.py."""

import argparse
import contextlib
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Optional, Sequence

import torch
from timm.utils import random_seed
from torch.utils.data import Dataset, IterableDataset

from ..errors import UserError, blame, run_script
from ..files import replacing
from ..network import BEST, LAST
from .build import resolve_device
from .config import parse_args
from .dry_run import rehearse
from .epoch import Progress, Stopped, Termination
from .finite import NotFinite
from .flags import train_parser
from .logs import LOGS
from .record import RunRecord
from .resume import find_checkpoint, run_folder
from .training import EpochResult, Training
from .world import World, end_process, join_world

__all__ = ['main', 'train']

_logger = logging.getLogger('train')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of train.py and mlcsd-train."""
    run_script('train.py', lambda: train(parse_args(train_parser(), argv)))
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        end_process()


def train(args: argparse.Namespace) -> Path:
    """Train a multi-exit network as the flags say.

    Returns:
        The folder with checkpoints, ``summary.csv`` and the resolved arguments, ``args.yaml``.

    Raises:
        UserError: The flags, the data or a checkpoint don't fit.
    """
    device = resolve_device(args)
    world = join_world(device)
    random_seed(args.seed)
    with run_folder(args, world) as folder:
        _train(args, device, world, folder)
    world.leave()
    return folder


def _train(args: argparse.Namespace, device: torch.device, world: World, folder: Path) -> None:
    """Train, or rehearse that, in a folder that is this run's alone."""
    checkpoint, weights_only = find_checkpoint(args, folder)
    training = Training(args, device, world, checkpoint, weights_only)
    del checkpoint  # as large as all that trains
    if args.dry_run:
        rehearse(training)
        return
    if world.is_first and not weights_only:
        _take_best_along(args, folder)
    if not (folder / BEST).exists():
        training.best = float('-inf')  # the best so far lies elsewhere, perhaps on other data
    record = RunRecord(args, folder, training.start_epoch, training.best) if world.is_first else None
    _logger.info(
        f'{args.model}: {training.model.num_exits} exits, {training.num_classes} classes, {len(training.train_data)} '
        f'images to train on, {_number(training.val_data)} to choose the best epoch, {world.size} process(es), output '
        f'in {folder}'
    )
    termination = Termination()
    try:
        with termination:
            _run(training, record, termination)
    except NotFinite as e:
        raise UserError(f'{e}: {_way_out(e, folder, world.is_first)}') from e
    except Stopped:
        by = next(filter(None, world.gather(termination.by)), 'a signal')
        _logger.info(f'Stopped by {by}; saved, go on with --resume {folder}')
    else:
        where = f', in {folder / BEST}' if (folder / BEST).exists() else ' before this run was resumed'
        _logger.info(f'Best validation mean top-1 {training.best:.2f}{where}')
    finally:
        if record:
            record.logs.close()


def _take_best_along(args: argparse.Namespace, folder: Path) -> None:
    """Copy the best checkpoint of a run that goes on in another folder."""
    resumed = Path(args.resume) if os.path.isdir(args.resume) else Path(args.resume).parent
    best = resumed / BEST
    if os.path.exists(args.resume) and best.is_file() and not (folder / BEST).exists():
        with blame(f'--output {args.output!r} cannot be written'):
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / BEST) as temporary:
                shutil.copyfile(best, temporary)


def _run(training: Training, record: Optional[RunRecord], termination: Termination) -> None:
    """Train epoch by epoch and record them; `record` is the first process's.

    Raises:
        Stopped: Somebody wants the process to end; what was reached is saved.
    """
    args, world = training.args, training.world
    # under FSDP no process can look alone
    drawn = any(getattr(args, f'log_{name}') for name in LOGS) and (record is not None or args.fsdp)
    for epoch in range(training.start_epoch, training.num_epochs):

        def save(progress: Progress, epoch: int = epoch) -> None:
            by_rank = world.gather(progress.on_cpu()._asdict())
            state = training.state(epoch=epoch - 1, progress=by_rank)
            if record:
                record.saver.save_last(state)

        began, best = time.perf_counter(), training.best
        result = training.run_epoch(epoch, save, termination)
        weights = training.mixing_weights() if drawn else None
        state = training.state(
            epoch=epoch,
            metric=result.evaluation.mean_top1,
            results=[metrics._asdict() for metrics in result.evaluation.exits],
            measured_on=f'the {result.evaluation.num_samples} images that chose the epoch',
        )
        if record:
            record.add(epoch, result, weights)
            record.saver.save(state, epoch, result.evaluation.mean_top1)
        minutes = (training.num_epochs - epoch - 1) * (time.perf_counter() - began) / 60
        _logger.info(_line(epoch, result, training.best > best, minutes))
        if world.any(termination.wished) and epoch + 1 < training.num_epochs:
            raise Stopped


def _number(images: Dataset) -> str:
    """How many there are; streams don't tell."""
    return 'a stream of them' if isinstance(images, IterableDataset) else str(len(images))


def _way_out(error: NotFinite, folder: Path, writes: bool) -> str:
    """What to do about it; the first process also writes down all images of the batch."""
    images = ''
    if error.images and writes:
        path = folder / 'not_finite.txt'
        with contextlib.suppress(OSError):  # a full disk must not hide what was found
            path.write_text('\n'.join(error.images) + '\n')
            images = f' The images are listed in {path}.'
    kept = f'the last good checkpoint is {folder / LAST}' if (folder / LAST).exists() else 'no checkpoint is there yet'
    return f'try a smaller --lr, --clip-grad or --distill-warmup-epochs; {kept}.{images}'


def _line(epoch: int, result: EpochResult, is_best: bool, minutes: float) -> str:
    accuracies = ' '.join(f'Ex{k} {e.top1:.1f}' for k, e in enumerate(result.evaluation.exits, 1))
    return (
        f'epoch {epoch}: loss {result.losses["loss"]:.3f}, validation mean top-1 {result.evaluation.mean_top1:.2f}'
        f'{" (best)" if is_best else ""}: {accuracies}; {result.speed:.0f} images/s, {minutes:.0f} min to go'
    )


if __name__ == '__main__':
    main(sys.argv[1:])
