"""The training loop behind train.py."""

import argparse
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch
from timm.utils import NativeScaler, random_seed
from torch.utils.data import IterableDataset

from ..data import IndexedTargets
from ..errors import UserError, blame, run_script
from ..task import MLCSDTask
from .build import (
    autocast_of,
    build_criterion,
    build_model,
    check_heads_only,
    compiled,
    data_config_of,
    identity_of,
    load_initial_checkpoint,
    model_args_of,
    resolve_device,
    synchronize_norms,
)
from .checkpoint import BEST
from .config import parse_args
from .dry_run import rehearse
from .epoch import Progress, Stopped, Termination, mean_losses, train_epoch, until
from .evaluate import count, exit_logits, mean_mixing_weights, tally
from .flags import train_parser
from .fsdp import check_fsdp, shard_task, sharded_state
from .loaders import class_names, eval_loader, set_epoch, shard, train_and_val_datasets, train_loader
from .logs import LOGS
from .optimizer import create_optimizer, create_scheduler, scaled_lr
from .record import RunRecord
from .resume import check_same_run, find_run, resume
from .world import join_world

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
    world = join_world(device.type)
    random_seed(args.seed)
    out_dir, checkpoint = find_run(args)

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
    if args.heads_only:
        check_heads_only(args, model, checkpoint is not None)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.fsdp:
        check_fsdp(args, world)
    else:
        model.to(device=device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)

    num_samples = None if isinstance(train_data, IterableDataset) else len(train_data)
    criterion = build_criterion(args, model, num_samples)
    task = MLCSDTask(model, criterion, device=device, verbose=False)
    if args.sync_bn:
        synchronize_norms(task, device)
    if args.fsdp:
        shard_task(task, model, world)
    args.lr, args.alpha = scaled_lr(args, world.size), criterion.alpha
    optimizer = create_optimizer(args, task, model)
    autocast = autocast_of(args, device)
    scaler = NativeScaler(device=device.type) if args.amp and args.amp_dtype == 'float16' else None
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    identity = dict(**identity_of(model, args.model, model_args), **split_record)
    start_epoch, best_metric, progress = 0, float('-inf'), None
    if checkpoint:
        check_same_run(checkpoint, identity)
        start_epoch, best_metric, progress = resume(checkpoint, task, optimizer, scaler, args, world)
    eval_model = task.get_eval_model(ema=args.model_ema)
    eval_forward = compiled(eval_model.forward_exits, args)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)

    if criterion.needs_indices:
        train_data = IndexedTargets(train_data)
    with blame('the data flags cannot be used'):
        batches = train_loader(args, train_data, data_config, num_classes, device)
        val_batches = eval_loader(args, shard(val_data, world), data_config, device, args.validation_batch_size)
    updates_per_epoch = math.ceil(len(batches) / args.grad_accum_steps)
    scheduler, num_epochs = create_scheduler(args, optimizer, updates_per_epoch)
    if checkpoint and scheduler is not None:
        steps = progress.step if progress else 0
        scheduler.step_update(start_epoch * updates_per_epoch + math.ceil(steps / args.grad_accum_steps))
        scheduler.step(start_epoch)

    def train_one(epoch: int, start: Optional[Progress] = None, **kwargs: Any) -> Progress:
        """Train for an epoch, or for what is left of it."""
        # each epoch has a seed of its own, so that a resumed run sees what an uninterrupted one would have seen
        random_seed((args.seed + 1_000_003 * epoch) % 2**32, world.rank)
        set_epoch(batches, train_data, epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and batches.mixup_enabled:
            batches.mixup_enabled = False
        warmup = args.distill_warmup_epochs
        task.criterion.set_distill_scale(min(1.0, epoch / warmup) if warmup else 1.0)
        freeze = args.heads_only is True or epoch < args.heads_only
        if args.heads_only:
            model.freeze_backbone(freeze)
        if world.size > 1 and not args.fsdp and (epoch == start_epoch or epoch == args.heads_only):
            # DDP asks once which parameters train
            task.prepare_distributed(device_ids=[world.local_rank] if device.type == 'cuda' else None)
        updates = epoch * updates_per_epoch
        return train_epoch(
            epoch, task, batches, optimizer, scheduler, scaler, autocast, args, updates, start, world=world, **kwargs
        )

    if args.dry_run:
        rehearse(args, model, task, train_one, start_epoch, len(batches), num_epochs, world)
        return out_dir

    def state(**more: Any) -> Dict[str, Any]:
        """All that a run needs to go on."""
        if args.fsdp:
            trained = sharded_state(task, optimizer)
        else:
            trained = dict(task.get_checkpoint_state(), optimizer=optimizer.state_dict())
        return dict(
            identity,
            args=vars(args),
            data_config=data_config,
            class_names=names,
            **trained,
            **({NativeScaler.state_dict_key: scaler.state_dict()} if scaler else {}),
            **(task.get_checkpoint_state(ema=True) if args.model_ema else {}),
            **more,
        )

    record = RunRecord(args, out_dir, start_epoch, best_metric) if world.is_first else None
    best, drawn = best_metric, any(getattr(args, f'log_{name}') for name in LOGS)
    _logger.info(
        f'{args.model}: {model.num_exits} exits, {num_classes} classes, {len(train_data)} images to train on, '
        f'{len(val_data)} to choose the best epoch, {world.size} process(es), output in {out_dir}'
    )
    with Termination() as termination:
        try:
            for epoch in range(start_epoch, num_epochs):

                def save(progress: Progress, epoch: int = epoch, best: float = best) -> None:
                    by_rank = world.gather(progress.on_cpu()._asdict())
                    reached = state(epoch=epoch - 1, best_metric=best, progress=by_rank)
                    if record:
                        record.saver.save_last(reached)

                began = time.perf_counter()
                progress = train_one(epoch, progress, save=save, termination=termination)
                seconds = time.perf_counter() - began
                if world.size > 1:
                    task.synchronize_statistics(world.size, args.dist_bn)
                logits = exit_logits(eval_model, val_batches, device, autocast, args.channels_last, eval_forward)
                totals, stopped = torch.zeros(5, model.num_exits, dtype=torch.float64, device=device), False
                try:
                    counted = count(until(termination, logits))
                    totals = totals if counted is None else counted
                except Stopped:
                    stopped = True
                if world.any(stopped):
                    save(progress)
                    raise Stopped
                result = tally(world.sum(totals))
                losses = mean_losses(progress, world)
                speed = world.size * progress.seen / seconds
                progress = None
                rates = [group['lr'] for group in optimizer.param_groups]
                if scheduler is not None:
                    scheduler.step(epoch + 1)
                is_best = result.mean_top1 > best
                best = max(best, result.mean_top1)
                weights = mean_mixing_weights(task, val_batches, autocast, args.channels_last) if drawn else None
                reached = state(
                    epoch=epoch,
                    metric=result.mean_top1,
                    best_metric=best,
                    results=[metrics._asdict() for metrics in result.exits],
                    measured_on=f'the {len(val_data)} images that chose the epoch',
                )
                if record:
                    record.add(epoch, losses, result, sum(rates) / len(rates), speed, weights)
                    record.saver.save(reached, epoch, result.mean_top1)
                accuracies = ' '.join(f'Ex{k} {e.top1:.1f}' for k, e in enumerate(result.exits, 1))
                _logger.info(
                    f'epoch {epoch}: loss {losses["loss"]:.3f}, validation mean top-1 {result.mean_top1:.2f}'
                    f'{" (best)" if is_best else ""}: {accuracies}; {speed:.0f} images/s, '
                    f'{(num_epochs - epoch - 1) * (time.perf_counter() - began) / 60:.0f} min to go'
                )
                if world.any(termination.wished) and epoch + 1 < num_epochs:
                    raise Stopped
        except Stopped:
            _logger.info(f'Stopped by SIGTERM; saved, go on with --resume {out_dir}')
            return out_dir
        finally:
            if record:
                record.logs.close()
    where = f', in {out_dir / BEST}' if (out_dir / BEST).exists() else ' before this run was resumed'
    _logger.info(f'Best validation mean top-1 {best:.2f}{where}')
    world.leave()
    return out_dir


if __name__ == '__main__':
    main(sys.argv[1:])
