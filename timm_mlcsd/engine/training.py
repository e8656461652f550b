"""A training from its first epoch to its last, with checkpoints, logs and stop requests."""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Optional

import torch
from timm.utils import random_seed
from torch.utils.data import Dataset, IterableDataset

from ..distributed import SINGLE_PROCESS, DistributedContext
from ..errors import UserError, as_user_error
from ..files import atomic_write
from ..network import BEST, LAST
from .config import TrainConfig
from .datasets import num_images
from .device import resolve_device
from .dry_run import dry_run
from .epoch import Progress
from .finite import NonFiniteError
from .logs import LOGS
from .resume import RunConfig, find_checkpoint, run_folder
from .run_folder import RunFolder
from .signals import SigtermHandler, StopRequested
from .trainer import EpochResult, Trainer

__all__ = ['train']

_logger = logging.getLogger('train')


def train(
    config: TrainConfig,
    device: Optional[torch.device] = None,
    dist_context: DistributedContext = SINGLE_PROCESS,
) -> Path:
    """Train a multi-exit network.

    Args:
        config: Configuration of the training; with its `run.dry_run` two updates are tried and nothing is written.
        device: Device to train on, None for the one that the configuration names.
        dist_context: Processes that train together.

    Returns:
        The folder with checkpoints, ``summary.csv`` and the configuration, ``args.yaml``.

    Raises:
        UserError: Settings, data or a checkpoint do not fit.
    """
    device = device or resolve_device(config.device)
    random_seed(config.trainer.seed)
    with run_folder(config.run, config.model.model, dist_context) as folder:
        checkpoint, weights_only = find_checkpoint(config.run, folder)
        trainer = Trainer(config, device, dist_context, checkpoint, weights_only)
        del checkpoint  # it takes as much memory as all that trains
        if config.run.dry_run:
            dry_run(trainer)
        else:
            _train(trainer, folder, weights_only)
    return folder


def _train(trainer: Trainer, folder: Path, weights_only: bool) -> None:
    dist_context = trainer.dist_context
    if dist_context.is_primary and not weights_only:
        _copy_best_checkpoint(trainer.config.run, folder)
    if not (folder / BEST).exists():
        trainer.best = float('-inf')  # the best checkpoint is of another run
    files = RunFolder(trainer.config, folder, trainer.start_epoch, trainer.best) if dist_context.is_primary else None
    _logger.info(
        f'{trainer.config.model.model}: {trainer.model.num_exits} exits, {trainer.num_classes} classes, '
        f'{num_images(trainer.train_data)} images to train on, {_number(trainer.val_data)} to choose the best epoch, '
        f'{dist_context.size} process(es), output in {folder}'
    )
    handler = SigtermHandler()
    try:
        with handler:
            _run_epochs(trainer, files, handler)
    except NonFiniteError as e:
        raise UserError(f'{e}: {_advice(e, folder, dist_context.is_primary)}') from e
    except StopRequested:
        by = next(filter(None, dist_context.all_gather(handler.by)), 'a signal')
        _logger.info(f'Stopped by {by}; saved, go on with --resume {folder}')
    else:
        where = f', in {folder / BEST}' if (folder / BEST).exists() else ' before this run was resumed'
        _logger.info(f'Best validation mean top-1 {trainer.best:.2f}{where}')
    finally:
        if files:
            files.logs.close()


def _copy_best_checkpoint(config: RunConfig, folder: Path) -> None:
    """Copy the best checkpoint of a run that continues in another folder."""
    resumed = Path(config.resume) if os.path.isdir(config.resume) else Path(config.resume).parent
    best = resumed / BEST
    if os.path.exists(config.resume) and best.is_file() and not (folder / BEST).exists():
        with as_user_error(f'--output {config.output!r} cannot be written'):
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / BEST) as temporary:
                shutil.copyfile(best, temporary)


def _run_epochs(trainer: Trainer, files: Optional[RunFolder], handler: SigtermHandler) -> None:
    """Train epoch by epoch and record them; only the primary process has `files`.

    Raises:
        StopRequested: The process was asked to end; the state is saved.
    """
    config, dist_context = trainer.config, trainer.dist_context
    # under FSDP no process can compute the weights alone
    has_logs = any(getattr(config.log, f'log_{name}') for name in LOGS)
    log_weights = has_logs and (files is not None or config.trainer.fsdp)
    if files is not None and trainer.start_epoch >= trainer.num_epochs:
        _logger.warning(f'Nothing is left to train: {trainer.start_epoch} epochs are finished; give more --epochs.')
    for epoch in range(trainer.start_epoch, trainer.num_epochs):

        def save(progress: Progress, epoch: int = epoch) -> None:
            by_rank = dist_context.all_gather(progress.on_cpu()._asdict())
            state = trainer.state(epoch=epoch - 1, progress=by_rank)
            if files:
                files.saver.save_last(state)

        began, best = time.perf_counter(), trainer.best
        result = trainer.run_epoch(epoch, save, handler)
        weights = trainer.mixing_weights() if log_weights else None
        state = trainer.state(
            epoch=epoch,
            metric=result.evaluation.mean_top1,
            results=[metrics._asdict() for metrics in result.evaluation.exits],
            measured_on=f'the {result.evaluation.num_samples} images that chose the epoch',
        )
        if files:
            files.add(epoch, result, weights)
            files.saver.save(state, epoch, result.evaluation.mean_top1)
        minutes = (trainer.num_epochs - epoch - 1) * (time.perf_counter() - began) / 60
        _logger.info(_epoch_summary(epoch, result, trainer.best > best, minutes))
        if dist_context.any_rank(handler.stop_requested) and epoch + 1 < trainer.num_epochs:
            raise StopRequested


def _number(images: Dataset[Any]) -> str:
    """The number of images as text; a stream has an unknown one."""
    return 'a stream of them' if isinstance(images, IterableDataset) else str(num_images(images))


def _advice(error: NonFiniteError, folder: Path, is_primary: bool) -> str:
    """What to do about it; the primary process also writes all images of the batch into a file."""
    images = ''
    if error.images and is_primary:
        path = folder / 'not_finite.txt'
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            path.write_text('\n'.join(error.images) + '\n')
            images = f' The images are listed in {path}.'
    kept = f'the last good checkpoint is {folder / LAST}' if (folder / LAST).exists() else 'no checkpoint is there yet'
    return f'try a smaller --lr, --clip-grad or --distill-warmup-epochs; {kept}.{images}'


def _epoch_summary(epoch: int, result: EpochResult, is_best: bool, minutes: float) -> str:
    accuracies = ' '.join(f'Ex{k} {e.top1:.1f}' for k, e in enumerate(result.evaluation.exits, 1))
    return (
        f'epoch {epoch}: loss {result.losses["loss"]:.3f}, validation mean top-1 {result.evaluation.mean_top1:.2f}'
        f'{" (best)" if is_best else ""}: {accuracies}; {result.speed:.0f} images/s, {minutes:.0f} min to go'
    )
