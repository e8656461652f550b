"""One training: network, loss, optimizer, data and how far it has come."""

import argparse
import math
import time
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
from timm.utils import NativeScaler, random_seed
from torch.utils.data import IterableDataset

from ..data import IndexedTargets, checked_images, class_label, pad_names
from ..errors import UserError, blame, printable
from ..stored import check_model_source
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
    synchronize_norms,
)
from .datasets import class_names, train_and_val_datasets
from .epoch import Progress, Stopped, Termination, mean_losses, train_epoch, until
from .evaluate import Evaluation, count, exit_logits, mean_mixing_weights, tally
from .fsdp import check_fsdp, shard_task, sharded_state
from .held_out import is_same_data, warn_of_seen_images
from .loaders import eval_loader, set_epoch, train_loader
from .optimizer import create_optimizer, create_scheduler, lr_rule, scaled_lr
from .resume import check_same_run, resume
from .world import ALONE, World

__all__ = ['EpochResult', 'Training']


class EpochResult(NamedTuple):
    """A finished epoch.

    Attributes:
        losses: The loss and its parts.
        evaluation: What the exits get right.
        lr: Learning rate that it ended with, mean over the groups.
        speed: Images trained on per second.
    """

    losses: Dict[str, float]
    evaluation: Evaluation
    lr: float
    speed: float


class Training:
    """What train.py's flags describe, ready to go on.

    Args:
        args: The flags; ``lr`` and ``alpha`` are set to what they stand for.
        device: Where it trains.
        world: The processes that train.
        checkpoint: What it goes on from, if anything.
        weights_only: Take no more than weights and epoch from it.

    Raises:
        UserError: The flags, the data or the checkpoint don't fit.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        device: torch.device,
        world: World,
        checkpoint: Optional[Dict[str, Any]],
        weights_only: bool = False,
    ):
        self.args, self.device, self.world = args, device, world
        self._load_data()
        self._make_network(checkpoint is not None)
        self._make_task()
        self.identity = dict(
            **identity_of(self.model, args.model, model_args_of(args, self.num_classes)),
            class_names=self.class_names,
            **self.split_record,
        )
        with blame('the flags make a network that could not be loaded again'):
            check_model_source(self.identity['arch'], self.identity['model_args'], self.data_config)
        self.start_epoch, self.best, self.progress = 0, float('-inf'), None
        if checkpoint:
            same_data = is_same_data(args, checkpoint)
            identity = self.identity if weights_only else dict(self.identity, data_config=self.data_config)
            check_same_run(checkpoint, identity, self.val_data, weights_only, same_data)
            self.start_epoch, self.best, self.progress = resume(
                checkpoint, self.task, self.optimizer, self.scaler, args, world, weights_only, self.lr_rule
            )
        starts = sorted(set(world.gather((self.start_epoch, self.progress.step if self.progress else 0))))
        if len(starts) > 1:
            places = ', '.join(f'epoch {epoch} batch {step}' for epoch, step in starts)
            raise UserError(
                f'the processes would begin at different places ({places}): all machines of a job that goes on must '
                f'see the same --output and --resume.'
            )
        self.eval_model = self.task.get_eval_model(ema=args.model_ema)
        # under FSDP all that runs must run inside the outermost module
        evaluated = self.task.trainable_module if args.fsdp else self.eval_model
        self.eval_forward = compiled(evaluated.forward_exits, args)
        if args.torchcompile:
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        self._make_loaders()
        self.updates_per_epoch = math.ceil(len(self.batches) / args.grad_accum_steps)
        self.scheduler, self.num_epochs = create_scheduler(args, self.optimizer, self.updates_per_epoch)
        if checkpoint and self.scheduler is not None:
            steps = self.progress.step if self.progress else 0
            updates = math.ceil(steps / args.grad_accum_steps)
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch + updates)
            self.scheduler.step(self.start_epoch)

    def _load_data(self) -> None:
        args = self.args
        self.train_data, self.val_data, self.split_record = train_and_val_datasets(args)
        names = class_names(self.train_data)
        self.num_classes = args.num_classes or (len(names) if names else None)
        if self.num_classes is None:
            raise UserError('the data does not tell how many classes it has: give --num-classes N.')
        if names and self.num_classes < len(names):
            raise UserError(f'--num-classes {self.num_classes} is too small: the data has {len(names)} classes.')
        if self.num_classes < 2:
            only = f', {printable(class_label(names, 0))!r}' if names else ''
            raise UserError(
                f'the data has one class{only}, so every answer would be right; give images of several classes, one '
                f'folder each, or --num-classes N for more to come.'
            )
        self.class_names = pad_names(names, self.num_classes)

    def _make_network(self, resumed: bool) -> None:
        args = self.args
        weights = dict(pretrained=args.pretrained, pretrained_backbone=args.pretrained_backbone)
        self.model = build_model(args.model, **weights, **model_args_of(args, self.num_classes))
        self.data_config = data_config_of(args, self.model)
        if args.initial_checkpoint:
            load_initial_checkpoint(self.model, args.initial_checkpoint)
            warn_of_seen_images(args, self.split_record)
        if args.heads_only:
            check_heads_only(args, self.model, resumed)
        if args.grad_checkpointing:
            self.model.set_grad_checkpointing()
        if args.fsdp:
            check_fsdp(args, self.world)
        else:
            self.model.to(device=self.device)
        # FSDP shares out contiguous weights alone
        if args.channels_last and not args.fsdp:
            self.model.to(memory_format=torch.channels_last)

    def _make_task(self) -> None:
        args = self.args
        num_samples = None if isinstance(self.train_data, IterableDataset) else len(self.train_data)
        criterion = build_criterion(args, self.model, num_samples)
        self.task = MLCSDTask(self.model, criterion, device=self.device, verbose=False)
        if args.sync_bn:
            synchronize_norms(self.task, self.device)
        if args.fsdp:
            shard_task(self.task, self.model, self.world)
        self.lr_rule = lr_rule(args)
        args.lr, args.alpha = scaled_lr(args, self.world.size), criterion.alpha
        self.optimizer = create_optimizer(args, self.task, self.model)
        self.autocast = autocast_of(args, self.device)
        half = args.amp and args.amp_dtype == 'float16'
        self.scaler = NativeScaler(device=self.device.type) if half else None
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def _make_loaders(self) -> None:
        args = self.args
        if self.task.criterion.needs_indices:
            self.train_data = IndexedTargets(self.train_data)
        # under FSDP all processes must do the same number of batches
        sharers = ALONE if args.fsdp else self.world
        with blame('the data flags cannot be used'):
            self.batches = train_loader(args, self.train_data, self.data_config, self.num_classes, self.device)
            self.val_batches = eval_loader(
                args,
                self.val_data,
                self.data_config,
                self.device,
                args.validation_batch_size,
                sharers,
                self.num_classes,
            )

    def train_epoch(
        self,
        epoch: int,
        save: Callable[[Progress], None],
        termination: Termination,
        start: Optional[Progress] = None,
    ) -> Progress:
        """Train for an epoch, or for what is left of it.

        Raises:
            Stopped: By `termination`.
            NotFinite: The loss is not finite.
        """
        args = self.args
        # each epoch has a seed of its own, so that a resumed run sees what an uninterrupted one would have seen
        random_seed((args.seed + 1_000_003 * epoch) % 2**31, self.world.rank)
        set_epoch(self.batches, self.train_data, epoch)
        if args.mixup_off_epoch and epoch >= args.mixup_off_epoch and self.batches.mixup_enabled:
            self.batches.mixup_enabled = False
        warmup = args.distill_warmup_epochs
        self.task.criterion.set_distill_scale(min(1.0, epoch / warmup) if warmup else 1.0)
        if args.heads_only:
            self.model.freeze_backbone(args.heads_only is True or epoch < args.heads_only)
        # DDP asks once which parameters train
        asks = epoch in (self.start_epoch, args.heads_only)
        if self.world.size > 1 and not args.fsdp and asks:
            self.task.prepare_distributed([self.world.local_rank] if self.device.type == 'cuda' else None)
        return train_epoch(
            epoch,
            self.task,
            self.batches,
            self.optimizer,
            self.scheduler,
            self.scaler,
            self.autocast,
            args,
            epoch * self.updates_per_epoch,
            start,
            save,
            termination,
            self.world,
            self.batches.names,
        )

    def evaluate(self, termination: Termination) -> Evaluation:
        """What the exits get right on the images that choose the epoch.

        Raises:
            Stopped: By `termination`, in any of the processes.
        """
        totals = count(until(termination, self.validation_logits(), self.world))
        if totals is None:
            totals = torch.zeros(5, self.model.num_exits, dtype=torch.float64)
        # under FSDP each process has seen all images
        return tally(totals if self.args.fsdp else self.world.sum(totals))

    def validation_logits(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """What the exits answer to this process's part of the images that choose the epoch: see `exit_logits`."""
        return exit_logits(
            self.eval_model, self.val_batches, self.device, self.autocast, self.args.channels_last, self.eval_forward
        )

    def run_epoch(self, epoch: int, save: Callable[[Progress], None], termination: Termination) -> EpochResult:
        """Train and evaluate.

        Raises:
            Stopped: By `termination`, after saving.
            UserError: The loss is not finite, or too many images are broken.
        """
        began = time.perf_counter()
        seen_before = self.progress.seen if self.progress else 0
        progress, self.progress = self.train_epoch(epoch, save, termination, self.progress), None
        seconds = time.perf_counter() - began
        if self.world.size > 1:
            self.task.synchronize_statistics(self.world.size, self.args.dist_bn)
        try:
            evaluation = self.evaluate(termination)
        except Stopped:
            save(progress)
            raise
        self._share_broken_images()
        rates = [group['lr'] for group in self.optimizer.param_groups]
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)
        self.best = max(self.best, evaluation.mean_top1)
        losses = mean_losses(progress, self.world)
        speed = self.world.size * (progress.seen - seen_before) / seconds
        return EpochResult(losses, evaluation, sum(rates) / len(rates), speed)

    def _share_broken_images(self) -> None:
        """Tell all processes which images could not be read, so that one names all and all count alike."""
        for data in (self.train_data, self.val_data):
            images = checked_images(data)
            if images is not None and self.world.size > 1:
                images.merge(self.world.gather(images.found))
                images.check()

    def mixing_weights(self) -> Optional[torch.Tensor]:
        """The teachers' mean mixing weights [K, K] on some images; None without a teacher."""
        return mean_mixing_weights(self.task, self.val_batches, self.autocast, self.args.channels_last)

    def state(self, **more: Any) -> Dict[str, Any]:
        """All that a run needs to go on, for a checkpoint; under FSDP all processes call it."""
        if self.args.fsdp:
            trained = sharded_state(self.task, self.optimizer)
        else:
            trained = dict(self.task.get_checkpoint_state(), optimizer=self.optimizer.state_dict())
        return dict(
            self.identity,
            args=vars(self.args),
            data_config=self.data_config,
            best_metric=self.best,
            lr_rule=self.lr_rule,
            **trained,
            **({NativeScaler.state_dict_key: self.scaler.state_dict()} if self.scaler else {}),
            **(self.task.get_checkpoint_state(ema=True) if self.args.model_ema else {}),
            **more,
        )
