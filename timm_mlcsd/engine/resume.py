"""The folder of a run, and how a run is resumed."""

import contextlib
import logging
import os
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from timm.utils import NativeScaler
from torch.utils.data import Dataset

from ..data import image_name, list_classes, same_names
from ..distributed import SINGLE_PROCESS, DistributedContext
from ..errors import UserError, as_user_error, printable
from ..network import stored_names
from ..task import MLCSDTask
from .build import LossConfig
from .checkpoint import load_newest
from .claim import claimed, new_folder
from .data_config import TrainDataConfig
from .epoch import Progress
from .flat_config import as_lists
from .fsdp import load_sharded
from .held_out import is_same_place
from .loaders import AugmentConfig
from .optimizer import SchedulerConfig, load_optimizer_state

__all__ = ['AUTO', 'RunConfig', 'check_same_model_and_data', 'find_checkpoint', 'resume', 'run_folder']

_logger = logging.getLogger(__name__)

AUTO = 'auto'


@dataclass
class RunConfig:
    """Where a run is kept, and what it continues.

    Attributes:
        output: Folder of all runs.
        experiment: Name of this run's folder, empty for time and model.
        resume: Checkpoint or run folder to continue from; ``auto`` continues `experiment` if it has begun.
        no_resume_opt: Whether only the weights of `resume` are taken.
        checkpoint_hist: Number of numbered checkpoints that are kept.
        dry_run: Whether only two updates are tried and nothing is written.
    """

    output: str = './output/train'
    experiment: str = ''
    resume: str = ''
    no_resume_opt: bool = False
    checkpoint_hist: int = 10
    dry_run: bool = False


@contextlib.contextmanager
def run_folder(config: RunConfig, model: str, dist_context: DistributedContext = SINGLE_PROCESS) -> Iterator[Path]:
    """Choose the folder of a run and lock it; with ``--dry-run`` it is neither made nor locked.

    A run with ``--resume PATH`` continues in the folder of that checkpoint, ``--experiment`` names a folder, and any
    other run gets a new one. All processes call it; the folder of the first process is that of all.

    Args:
        config: Where the run is kept.
        model: Name of the model, for the name of a new folder.
        dist_context: Processes that train together.

    Raises:
        UserError: Another run has it, it cannot be written, or it could not be found again.
    """
    finds_itself = os.path.isdir(config.resume) and not config.no_resume_opt
    if not config.experiment and (config.resume == AUTO or (_may_restart() and not finds_itself)):
        why = '--resume auto' if config.resume == AUTO else 'a job that torchrun may start again (--max-restarts)'
        raise UserError(f'{why} must find its checkpoint again: give the run a name with --experiment NAME.')
    if config.dry_run:
        yield _named(config) or Path(config.output) / _new_name(model)
        return
    with contextlib.ExitStack() as stack:
        folder = error = None
        if dist_context.is_primary:
            try:
                named = _named(config)
                folder = named or new_folder(Path(config.output), _new_name(model))
                stack.enter_context(claimed(folder, is_new=named is None))
            except UserError as e:
                error = str(e)
        folder, error = dist_context.all_gather((folder, error))[0]
        if error:
            raise UserError(error)
        yield folder


def _named(config: RunConfig) -> Optional[Path]:
    """The folder that the settings name; None if they name none.

    Raises:
        UserError: There is no checkpoint to resume from.
    """
    if config.experiment:
        return Path(config.output) / config.experiment
    if not config.resume:
        return None
    given = Path(config.resume)
    folder = given if given.is_dir() else given.parent
    if not any(folder.glob('*.pth.tar')):
        load_newest(given)  # raises the error
    return folder


def _may_restart() -> bool:
    """Whether torchrun may restart the processes."""
    return int(os.environ.get('TORCHELASTIC_MAX_RESTARTS', 0)) > 0


def _new_name(model: str) -> str:
    return f'{datetime.now():%Y%m%d-%H%M%S}-{model.replace("/", "_")}'


def find_checkpoint(config: RunConfig, folder: Path) -> Tuple[Optional[Dict[str, Any]], bool]:
    """Find the checkpoint that a run continues from, None for a new run, and whether only its weights are taken.

    With ``--resume auto``, and if torchrun may restart the processes, ``--experiment`` is resumed with its whole state
    if it has begun; ``--no-resume-opt`` applies to checkpoints of other runs.

    Raises:
        UserError: The folder holds a run that is not resumed, or the checkpoint cannot be read.
    """
    # a dry run does not touch it
    has_begun = bool(config.experiment) and any(folder.glob('*.pth.tar')) and not config.dry_run
    if has_begun and (config.resume == AUTO or _may_restart()):
        if config.resume not in ('', AUTO):
            _logger.warning(f'Going on with {folder}, which has begun, not with --resume {config.resume}')
        return load_newest(folder), False
    given = Path(config.resume) if config.resume not in ('', AUTO) else None
    checkpoint = load_newest(given) if given else None
    is_own = given is not None and (given if given.is_dir() else given.parent).resolve() == folder.resolve()
    if has_begun and not is_own:
        raise UserError(
            f'{str(folder)!r} holds a run already: go on with --resume {folder}, or name another --experiment.'
        )
    return checkpoint, checkpoint is not None and config.no_resume_opt


def check_same_model_and_data(
    checkpoint: Dict[str, Any],
    identity: Dict[str, Any],
    val_data: Dataset[Any],
    weights_only: bool = False,
    same_data: bool = True,
) -> None:
    """Refuse to resume a run with another model, other classes or other held-out images.

    Args:
        checkpoint: The checkpoint.
        identity: Model, classes and split of this run, by the checkpoint's keys; `Trainer._identify` builds it.
        val_data: The images that choose the epoch in this run.
        weights_only: Whether only weights are taken, so that classes may differ.
        same_data: Whether this run has the data of the checkpoint.
    """
    held_out = ('val_fraction', 'val_seed', 'val_indices', 'val_keys', 'val_probe', 'train_size')
    with as_user_error('--resume'):
        checkpoint = {**checkpoint, 'class_names': stored_names(checkpoint)}
    for key, value in identity.items():
        if weights_only and not same_data and key in held_out:
            continue  # of the images held out now, the weights have seen none
        if key in ('train_probe', 'started_from') or (key == 'train_size' and 'val_indices' not in identity):
            continue  # a data set may grow where nothing is held out of it
        before = checkpoint.get(key)
        if key in ('val_indices', 'val_keys'):
            is_older = key == 'val_keys' and before is None  # than the keys
            if not is_older and not _equal(before, value):
                raise UserError(_other_held_out(before, value, val_data))
            same = True
        elif key == 'val_probe':
            if before is not None and not _equal(before, value):
                raise UserError(
                    '--resume: the images that would be held out now have the names of those that the run held out and '
                    'other contents, and may have been trained on; put the data back as it was, or train anew.'
                )
            same = True
        elif key == 'class_names':
            if weights_only or before is None or value is None or same_names(before, value):
                continue
            raise UserError(
                f'--resume: the run was trained on the classes {list_classes(before)}, not {list_classes(value)}; '
                f'--no-resume-opt takes its weights alone.'
            )
        else:
            same = as_lists(before) == as_lists(value)
        if not same:
            raise UserError(f'--resume: the checkpoint is of another run: its {key} is {before}, not {value}.')


def _equal(before: Any, now: torch.Tensor) -> bool:
    return isinstance(before, torch.Tensor) and torch.equal(before, now)


def _other_held_out(before: Any, now: torch.Tensor, val_data: Dataset[Any]) -> str:
    """The error message for held-out images that are not those of the checkpoint."""
    others = list(range(len(now)))
    if isinstance(before, torch.Tensor) and before.shape == now.shape:
        others = (before != now).nonzero().flatten().tolist()
    return (
        f'--resume: {len(others)} of the {len(now)} images that would be held out now are not those that the run held '
        f'out, {printable(image_name(val_data, others[0]))} for one, and may have been trained on: files of the data '
        f'were added, removed, renamed or moved, or --val-fraction or --val-seed is another; put the data back as it '
        f'was, or train anew.'
    )


def resume(
    checkpoint: Dict[str, Any],
    task: MLCSDTask,
    optimizer: torch.optim.Optimizer,
    scaler: Optional[NativeScaler],
    settings: Dict[str, Any],
    data: TrainDataConfig,
    dist_context: DistributedContext,
    weights_only: bool = False,
    lr_rule: Optional[Tuple[Any, ...]] = None,
) -> Tuple[int, float, Optional[Progress]]:
    """Restore the state of a checkpoint.

    Args:
        checkpoint: Checkpoint of train.py.
        task: Task that is restored.
        optimizer: Optimizer that is restored.
        scaler: Loss scaler that is restored, None without float16.
        settings: Settings of this run by the names of the flags, with the resolved learning rate.
        data: Data of this run.
        dist_context: Processes that train together.
        weights_only: Whether only weights and epoch are restored.
        lr_rule: What the learning rate was derived from, None where the user gave it; under the same rule it may
            change with the number of processes.

    Returns:
        The epoch to start with, the best metric so far, and the position in that epoch if it is not finished.

    Raises:
        UserError: The checkpoint does not fit the settings.
    """
    rescaled = lr_rule is not None and as_lists(checkpoint.get('lr_rule')) == as_lists(lr_rule)
    if not weights_only:
        _check_same_settings(checkpoint, settings, rescaled)
        _warn_of_changed_settings(checkpoint, settings)
    if not is_same_place(data, checkpoint):
        before, now = (
            ' '.join(filter(None, (s.get('dataset'), s.get('data_dir')))) for s in (checkpoint['args'], settings)
        )
        _logger.warning(f'The run was trained on {before}, and goes on with {now}')
    start = settings['initial_checkpoint']
    if start and start != checkpoint['args'].get('initial_checkpoint'):
        _logger.warning(f'Without effect: --initial-checkpoint {start} with --resume, whose weights are taken.')
    with as_user_error('the checkpoint to go on from does not fit these flags'):
        _load_states(checkpoint, task, optimizer, scaler, settings, weights_only)
    before, now = checkpoint['args']['lr'], settings['lr']
    if before != now and rescaled and not weights_only:
        _logger.warning(f'Learning rate {now} instead of {before}: so --lr-base says for the images of an update now')
        for group in optimizer.param_groups:
            for key in {'lr', 'initial_lr'} & group.keys():
                group[key] *= now / before
    epoch, best = checkpoint['epoch'] + 1, checkpoint.get('best_metric')
    if not isinstance(best, float) or epoch < 0:
        raise UserError(
            f'--resume: the checkpoint has epoch {epoch - 1} and best_metric {best!r}; train.py did not write it.'
        )
    if 'progress' not in checkpoint or weights_only:
        _logger.info(f'Resuming after epoch {epoch - 1}')
        return epoch, best, None
    return epoch, best, _position(checkpoint['progress'], epoch, dist_context)


def _check_same_settings(checkpoint: Dict[str, Any], settings: Dict[str, Any], rescaled: bool) -> None:
    """Refuse settings that a run must not change half-way."""
    fixed: Tuple[str, ...] = ('opt', 'lr', 'weight_decay', 'momentum', 'opt_betas', 'opt_eps', 'opt_args')
    fixed += ('layer_decay', 'exit_lr_mult', 'fsdp', 'heads_only', 'distill', 'distill_method', 'distill_ramp')
    if 'progress' in checkpoint:
        fixed += ('batch_size', 'workers', 'grad_accum_steps', 'cache_dataset', 'seed')
    for name in (name for name in fixed if not (rescaled and name == 'lr')):
        # a flag that is newer than the checkpoint had its default then; the ramp's was none
        absent = 'none' if name == 'distill_ramp' else settings[name]
        before, now = checkpoint['args'].get(name, absent), settings[name]
        if before != now:
            flag = '--opt-kwargs' if name == 'opt_args' else f'--{name.replace("_", "-")}'
            raise UserError(
                f'--resume: the run used {flag} {before}, not {now}, and goes on with '
                f'it: say so, or take its weights only with --no-resume-opt.'
            )


def _warn_of_changed_settings(checkpoint: Dict[str, Any], settings: Dict[str, Any]) -> None:
    """Log the settings of loss, augmentation and schedule with which a run goes on otherwise than it began."""
    names = [
        f.name for part in (LossConfig, AugmentConfig, SchedulerConfig) for f in fields(part) if f.name != 'epochs'
    ]
    before = checkpoint['args']
    changed = [
        f'--{name.replace("_", "-")} {settings[name]} (was {before[name]})'
        for name in names
        if name in before and as_lists(before[name]) != as_lists(settings[name])
    ]
    if changed:
        _logger.warning(f'Going on with other settings than before: {printable(", ".join(changed))}.')


def _load_states(
    checkpoint: Dict[str, Any],
    task: MLCSDTask,
    optimizer: torch.optim.Optimizer,
    scaler: Optional[NativeScaler],
    settings: Dict[str, Any],
    weights_only: bool,
) -> None:
    if settings['fsdp']:
        load_sharded(task, checkpoint, optimizer, weights_only)
    else:
        task.load_checkpoint_state(checkpoint['state_dict'], checkpoint.get('task_state'))
    if settings['model_ema']:
        if 'state_dict_ema' in checkpoint:
            task.load_checkpoint_state(checkpoint['state_dict_ema'], checkpoint.get('task_state_ema'), ema=True)
        else:
            task.trainable_module_ema.set(task.trainable_module)
    if not (weights_only or settings['fsdp']):
        load_optimizer_state(optimizer, checkpoint['optimizer'])
        if scaler and NativeScaler.state_dict_key in checkpoint:
            scaler.load_state_dict(checkpoint[NativeScaler.state_dict_key])


def _position(by_rank: List[Dict[str, Any]], epoch: int, dist_context: DistributedContext) -> Optional[Progress]:
    """The position of this process in an unfinished epoch, None where the epoch begins at its first batch."""
    if len(by_rank) != dist_context.size:
        _logger.warning(
            f'Resuming with {dist_context.size} processes what {len(by_rank)} were doing: epoch {epoch} begins anew, '
            f'with the weights that it had reached.'
        )
        return None
    progress = Progress(**by_rank[dist_context.rank])
    _logger.info(f'Resuming in epoch {epoch}, after {progress.step} batches')
    return progress
