"""The training loop behind train.py."""

import argparse
import logging
import math
import sys
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple

import torch
import yaml
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler, random_seed, trim_summary, update_summary
from torch.utils.data import IterableDataset

from ..data import IndexedTargets
from ..errors import UserError, blame, run_script
from ..network import LAST
from ..task import MLCSDTask
from .build import (
    autocast_of,
    build_criterion,
    build_model,
    compiled,
    data_config_of,
    identity_of,
    load_initial_checkpoint,
    model_args_of,
    resolve_device,
)
from .checkpoint import BEST, CheckpointSaver, load_newest
from .config import parse_args
from .epoch import Progress, Stopped, Termination, mean_losses, train_epoch, until
from .evaluate import Evaluation, evaluate, exit_logits
from .flags import train_parser
from .loaders import class_names, eval_loader, train_and_val_datasets, train_loader

__all__ = ['main', 'train']

_logger = logging.getLogger('train')


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Entry point of train.py and mlcsd-train."""
    run_script('train.py', lambda: train(parse_args(train_parser(), argv)))


def train(args: argparse.Namespace) -> Path:
    """Train a multi-exit network as the flags say.

    Returns:
        The folder with checkpoints, ``summary.csv`` and the resolved arguments, ``args.yaml``.

    Raises:
        UserError: The flags, the data or a checkpoint don't fit.
    """
    device = resolve_device(args)
    random_seed(args.seed)
    out_dir = _output_folder(args)
    resumed = load_newest(args.resume) if args.resume else None

    train_data, val_data, split_record = train_and_val_datasets(args)
    names = class_names(train_data)
    num_classes = args.num_classes or (len(names) if names else None)
    if num_classes is None:
        raise UserError('the data does not tell how many classes it has: give --num-classes N.')
    if names and num_classes < len(names):
        raise UserError(f'--num-classes {num_classes} is too small: the data has {len(names)} classes.')

    model_args = model_args_of(args, num_classes)
    model = build_model(
        args.model, pretrained=args.pretrained, pretrained_backbone=args.pretrained_backbone, **model_args
    )
    data_config = data_config_of(args, model)
    if args.initial_checkpoint:
        load_initial_checkpoint(model, args.initial_checkpoint)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    num_samples = None if isinstance(train_data, IterableDataset) else len(train_data)
    criterion = build_criterion(args, model, num_samples)
    task = MLCSDTask(model, criterion, device=device, verbose=False)
    args.lr, args.alpha = _scaled_lr(args), criterion.alpha
    optimizer = _create_optimizer(args, task)
    autocast = autocast_of(args, device)
    scaler = NativeScaler(device=device.type) if args.amp and args.amp_dtype == 'float16' else None
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    identity = dict(**identity_of(model, args.model, model_args), **split_record)
    start_epoch, best_metric, progress = 0, float('-inf'), None
    if resumed:
        _check_same_run(resumed, identity)
        start_epoch, best_metric, progress = _resume(resumed, task, optimizer, scaler, args)
    eval_model = task.get_eval_model(ema=args.model_ema)
    eval_forward = compiled(eval_model.forward_exits, args)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)

    if criterion.needs_indices:
        train_data = IndexedTargets(train_data)
    with blame('the data flags cannot be used'):
        batches = train_loader(args, train_data, data_config, num_classes, device)
        val_batches = eval_loader(args, val_data, data_config, device, args.validation_batch_size)
    updates_per_epoch = math.ceil(len(batches) / args.grad_accum_steps)
    scheduler, num_epochs = _create_scheduler(args, optimizer, updates_per_epoch)
    if resumed and scheduler is not None:
        steps = progress.step if progress else 0
        scheduler.step_update(start_epoch * updates_per_epoch + math.ceil(steps / args.grad_accum_steps))
        scheduler.step(start_epoch)

    with blame(f'--output {args.output!r} cannot be written'):
        out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'args.yaml').write_text(yaml.safe_dump(vars(args), sort_keys=False))
    saver = CheckpointSaver(out_dir, keep=args.checkpoint_hist, best_metric=best_metric)
    summary = out_dir / 'summary.csv'
    trim_summary(str(summary), start_epoch)
    board = _tensorboard(out_dir)
    _logger.info(
        f'{args.model}: {model.num_exits} exits, {num_classes} classes, {len(train_data)} images to train on, '
        f'{len(val_data)} to choose the best epoch, output in {out_dir}'
    )

    def state(**more: Any) -> Dict[str, Any]:
        """All that a run needs to go on."""
        return dict(
            identity,
            args=vars(args),
            data_config=data_config,
            class_names=names,
            optimizer=optimizer.state_dict(),
            **({NativeScaler.state_dict_key: scaler.state_dict()} if scaler else {}),
            **task.get_checkpoint_state(),
            **(task.get_checkpoint_state(ema=True) if args.model_ema else {}),
            **more,
        )

    with Termination() as termination:
        try:
            for epoch in range(start_epoch, num_epochs):
                # each epoch has a seed of its own, so that a resumed run sees what an uninterrupted one would have seen
                random_seed((args.seed + 1_000_003 * epoch) % 2**32)
                if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and batches.mixup_enabled:
                    batches.mixup_enabled = False
                warmup = args.distill_warmup_epochs
                task.criterion.set_distill_scale(min(1.0, epoch / warmup) if warmup else 1.0)

                def save(progress: Progress, epoch: int = epoch) -> None:
                    saver.save_last(state(epoch=epoch - 1, best_metric=saver.best_metric, progress=progress._asdict()))

                progress = train_epoch(
                    epoch,
                    task,
                    batches,
                    optimizer,
                    scheduler,
                    scaler,
                    autocast,
                    args,
                    epoch * updates_per_epoch,
                    progress,
                    save,
                    termination,
                )
                logits = exit_logits(eval_model, val_batches, device, autocast, args.channels_last, eval_forward)
                try:
                    result = evaluate(until(termination, logits))
                except Stopped:
                    save(progress)
                    raise
                train_metrics, progress = mean_losses(progress), None
                lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
                if scheduler is not None:
                    scheduler.step(epoch + 1)

                eval_metrics = _summary_of(result)
                update_summary(
                    epoch, train_metrics, eval_metrics, filename=str(summary), lr=lr, write_header=not summary.exists()
                )
                if board:
                    values = dict(train_metrics, lr=lr, **{f'val_{k}': v for k, v in eval_metrics.items()})
                    for name, value in values.items():
                        board.add_scalar(name, value, epoch)
                is_best = saver.save(
                    state(
                        epoch=epoch,
                        metric=result.mean_top1,
                        best_metric=max(saver.best_metric, result.mean_top1),
                        results=[metrics._asdict() for metrics in result.exits],
                        measured_on=f'the {len(val_data)} images that chose the epoch',
                    ),
                    epoch,
                    result.mean_top1,
                )
                accuracies = ' '.join(f'Ex{k} {e.top1:.1f}' for k, e in enumerate(result.exits, 1))
                _logger.info(
                    f'epoch {epoch}: loss {train_metrics["loss"]:.3f}, validation mean top-1 {result.mean_top1:.2f}'
                    f'{" (best)" if is_best else ""}: {accuracies}'
                )
                if termination.wished and epoch + 1 < num_epochs:
                    raise Stopped
        except Stopped:
            _logger.info(f'Stopped by SIGTERM; saved, go on with --resume {out_dir}')
            return out_dir
        finally:
            if board:
                board.close()
    where = f', in {out_dir / BEST}' if (out_dir / BEST).exists() else ' before this run was resumed'
    _logger.info(f'Best validation mean top-1 {saver.best_metric:.2f}{where}')
    return out_dir


def _scaled_lr(args: argparse.Namespace) -> float:
    """timm's rule: --lr where it is given, else --lr-base scaled by the number of images per update."""
    if args.lr is not None:
        return args.lr
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    ratio = args.batch_size * args.grad_accum_steps / args.lr_base_size
    return args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)


def _create_optimizer(args: argparse.Namespace, task: MLCSDTask) -> torch.optim.Optimizer:
    with blame(f'--opt {args.opt} cannot be made'):
        return create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))


def _create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Tuple[Optional[Any], int]:
    """timm's schedule, None for ``--sched none``, and the number of epochs with cool-down."""
    if args.sched == 'plateau':
        raise UserError('--sched plateau: timm gives it up, because a resumed run would not go on as it had begun.')
    with blame(f'--sched {args.sched} cannot be made'):
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=False), updates_per_epoch=updates_per_epoch
        )


def _summary_of(result: Evaluation) -> Dict[str, float]:
    columns = OrderedDict(mean_top1=result.mean_top1)
    for k, metrics in enumerate(result.exits, 1):
        columns.update({f'Ex{k}_top1': metrics.top1, f'Ex{k}_loss': metrics.loss})
    return columns


def _check_same_run(checkpoint: Dict[str, Any], identity: Dict[str, Any]) -> None:
    """Refuse to resume what another model, or another choice of held-out images, has begun."""
    for key, value in identity.items():
        before = checkpoint.get(key)
        if isinstance(value, torch.Tensor):
            same = isinstance(before, torch.Tensor) and torch.equal(before, value)
            before, value = 'other images', 'these'
        else:
            same = _as_lists(before) == _as_lists(value)
        if not same:
            raise UserError(f'--resume: the checkpoint is of another run: its {key} is {before}, not {value}.')


def _as_lists(value: Any) -> Any:
    """The same value with lists for tuples: a YAML file has only the one, the command line may have either."""
    if isinstance(value, dict):
        return {k: _as_lists(v) for k, v in value.items()}
    return [_as_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _resume(
    checkpoint: Dict[str, Any],
    task: MLCSDTask,
    optimizer: torch.optim.Optimizer,
    scaler: Optional[NativeScaler],
    args: argparse.Namespace,
) -> Tuple[int, float, Optional[Progress]]:
    """Put the state of a checkpoint back; returns the epoch to start with, the best metric so far, and where to go on
    in an epoch that was not finished."""
    fixed = ('opt', 'lr', 'weight_decay', 'momentum', 'layer_decay')
    if 'progress' in checkpoint:
        fixed += ('batch_size', 'workers', 'grad_accum_steps', 'cache_dataset')
    for name in fixed:
        before, now = checkpoint['args'].get(name), getattr(args, name)
        if before != now and not args.no_resume_opt:
            raise UserError(
                f'--resume: the run used --{name.replace("_", "-")} {before}, not {now}, and goes on with it; '
                f'--no-resume-opt takes its weights only.'
            )
    with blame(f'--resume {args.resume!r} does not fit these flags'):
        task.load_checkpoint_state(checkpoint['state_dict'], checkpoint.get('task_state'))
        if args.model_ema:
            if 'state_dict_ema' in checkpoint:
                task.load_checkpoint_state(checkpoint['state_dict_ema'], checkpoint.get('task_state_ema'), ema=True)
            else:
                task.get_trainable_module(ema=True).set(task.get_trainable_module())
        if not args.no_resume_opt:
            optimizer.load_state_dict(checkpoint['optimizer'])
            if scaler and NativeScaler.state_dict_key in checkpoint:
                scaler.load_state_dict(checkpoint[NativeScaler.state_dict_key])
    epoch = checkpoint['epoch'] + 1
    if 'progress' not in checkpoint or args.no_resume_opt:
        _logger.info(f'Resuming after epoch {epoch - 1}')
        return epoch, checkpoint['best_metric'], None
    progress = Progress(**checkpoint['progress'])
    _logger.info(f'Resuming in epoch {epoch}, after {progress.step} batches')
    return epoch, checkpoint['best_metric'], progress


def _output_folder(args: argparse.Namespace) -> Path:
    """A resumed run goes on where its checkpoint lies; any other gets a folder of its own."""
    name = args.experiment or f'{datetime.now():%Y%m%d-%H%M%S}-{args.model.replace("/", "_")}'
    folder = Path(args.output) / name
    if args.resume:
        resumed = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
        if not args.experiment or folder.resolve() == resumed.resolve():
            return resumed
    if (folder / LAST).exists():
        raise UserError(
            f'{str(folder)!r} holds a run already: go on with --resume {folder}, or name another --experiment.'
        )
    return folder


def _tensorboard(folder: Path) -> Optional[Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


if __name__ == '__main__':
    main(sys.argv[1:])
