"""A training: network, loss, optimizer and data of one run, and its position in them."""

import math
import time
from dataclasses import replace
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
from timm.utils import NativeScaler, random_seed
from torch.utils.data import IterableDataset

from ..data import IndexedTargets, checked_images, class_label, pad_names
from ..distributed import SINGLE_PROCESS, DistributedContext
from ..errors import UserError, as_user_error, printable
from ..models import MultiExitBackbone, MultiExitModel, MultiExitOutput
from ..stored import check_model_source
from ..task import MLCSDTask
from .build import (
    build_criterion,
    build_model,
    check_heads_only,
    model_identity,
    model_kwargs,
    resolve_data_config,
    synchronize_norms,
)
from .combinations import (
    check_combinations,
    check_cuda_graphs,
    check_fsdp,
    warn_of_idle_settings,
    warn_of_learning_rates,
)
from .config import TrainConfig
from .datasets import class_names, num_images, train_and_val_datasets
from .device import compile_forward, make_autocast
from .epoch import EpochLoop, Progress, mean_losses
from .evaluator import Evaluation, Evaluator, accumulate, finalize
from .fsdp import shard_task, sharded_state
from .graphs import capture_step
from .held_out import is_same_data
from .initial_checkpoint import load_initial_checkpoint
from .loaders import eval_loader, set_epoch, train_loader
from .optimizer import create_optimizer, create_scheduler, lr_rule, scaled_lr
from .resume import check_same_model_and_data, resume
from .seen_images import check_not_moved, trainings, warn_of_copies
from .signals import SigtermHandler, StopRequested, StopSource, iterate_in_lockstep

__all__ = ['EpochResult', 'Trainer']


class EpochResult(NamedTuple):
    """A finished epoch.

    Attributes:
        losses: The loss and its parts.
        evaluation: Metrics of the exits on the images that choose the epoch.
        lr: Learning rate at the end of the epoch, mean over the groups.
        speed: Images trained on per second.
    """

    losses: Dict[str, float]
    evaluation: Evaluation
    lr: float
    speed: float


class Trainer:
    """Everything that a configuration describes, ready to train.

    Args:
        config: Configuration of the training; it is not changed.
        device: Device to train on.
        dist_context: Processes that train together.
        checkpoint: Checkpoint to continue from, None for a new training.
        weights_only: Whether only weights and epoch are taken from it.

    Attributes:
        config: The configuration with the learning rate and alpha that follow from it.
        best: Best metric so far.
        start_epoch: The epoch to begin with.
        num_epochs: Number of epochs, with cool-down.

    Raises:
        UserError: Settings, data or checkpoint do not fit.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        dist_context: DistributedContext = SINGLE_PROCESS,
        checkpoint: Optional[Dict[str, Any]] = None,
        weights_only: bool = False,
    ):
        check_combinations(config)
        warn_of_idle_settings(config)
        if config.loop.cuda_graphs:
            check_cuda_graphs(config, device)
        self.config, self.device, self.dist_context = config, device, dist_context
        self._load_data()
        self._make_network(checkpoint is not None)
        self._make_task()
        self._identify()
        self.start_epoch, self.best = 0, float('-inf')
        self.progress: Optional[Progress] = None
        if checkpoint:
            self._resume(checkpoint, weights_only)
        self._check_same_start()
        self._make_evaluator()
        if config.device.torchcompile:
            self.task.compile(backend=config.device.torchcompile, mode=config.device.torchcompile_mode)
        self._make_loaders()
        self._make_scheduler(checkpoint is not None)
        self.loop = EpochLoop(
            self.task,
            self.batches,
            self.optimizer,
            self.config.loop,
            scheduler=self.scheduler,
            scaler=self.scaler,
            autocast=make_autocast(config.device, device),
            channels_last=config.device.channels_last,
            dist_context=dist_context,
            names=self.batches.names,
            compiles_graphs=config.device.compiles_graphs,
        )

    def _load_data(self) -> None:
        config = self.config
        self.train_data, self.val_data, self.split_record = train_and_val_datasets(config.data, config.trainer.seed)
        if self.dist_context.is_primary:
            warn_of_copies(self.val_data, self.train_data, config.data)
        names = class_names(self.train_data)
        num_classes = config.model.num_classes or (len(names) if names else None)
        if num_classes is None:
            raise UserError('the data does not tell how many classes it has: give --num-classes N.')
        self.num_classes = num_classes
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
        config, data = self.config.model, self.config.data
        self.model_args = model_kwargs(config, self.num_classes, data.in_chans)
        weights = dict(pretrained=config.pretrained, pretrained_backbone=config.pretrained_backbone)
        self.model = build_model(config.model, **weights, **self.model_args)
        self.data_config = resolve_data_config(data, self.model)
        if config.initial_checkpoint:
            record = self.split_record
            record['started_from'] = load_initial_checkpoint(
                self.model, config, self.class_names, data, record, self.val_data
            )
        if config.heads_only:
            check_heads_only(config, self.model, resumed)
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        fsdp = self.config.trainer.fsdp
        if fsdp:
            check_fsdp(self.config, self.dist_context, self.device)
        else:
            self.model.to(device=self.device)
        # FSDP shards contiguous weights only
        if self.config.device.channels_last and not fsdp:
            self.model.to(memory_format=torch.channels_last)

    def _make_task(self) -> None:
        config = self.config
        num_samples = None if isinstance(self.train_data, IterableDataset) else num_images(self.train_data)
        criterion = build_criterion(config.loss, config.augment, self.model, num_samples)
        self.task = MLCSDTask(self.model, criterion, device=self.device, verbose=False)
        if config.trainer.sync_bn:
            synchronize_norms(self.task, self.device)
        if config.trainer.fsdp:
            shard_task(self.task, self.model, self.dist_context)
        self.lr_rule = lr_rule(config.optimizer)
        images_per_update = config.data.batch_size * config.loop.grad_accum_steps * self.dist_context.size
        self.config = replace(
            config,
            optimizer=replace(config.optimizer, lr=scaled_lr(config.optimizer, images_per_update)),
            loss=replace(config.loss, alpha=criterion.alpha),
        )
        warn_of_learning_rates(self.config)
        has_scheduler = config.scheduler.sched != 'none'
        self.optimizer = create_optimizer(self.config.optimizer, self.task, self.model, has_scheduler)
        half = config.device.amp and config.device.amp_dtype == 'float16'
        self.scaler = NativeScaler(device=self.device.type) if half else None
        if config.trainer.model_ema:
            self.task.setup_ema(decay=config.trainer.model_ema_decay, use_warmup=config.trainer.model_ema_warmup)

    def _identify(self) -> None:
        """Collect what makes this run the same run again, as checkpoints keep it."""
        self.identity = dict(
            **model_identity(self.model, self.config.model.model, self.model_args),
            class_names=self.class_names,
            **self.split_record,
        )
        with as_user_error('the flags make a network that could not be loaded again'):
            check_model_source(self.identity['arch'], self.identity['model_args'], self.data_config)

    def _resume(self, checkpoint: Dict[str, Any], weights_only: bool) -> None:
        data = self.config.data
        identity = self.identity if weights_only else dict(self.identity, data_config=self.data_config)
        check_same_model_and_data(checkpoint, identity, self.val_data, weights_only, is_same_data(data, checkpoint))
        check_not_moved(self.val_data, data, checkpoint)
        self.identity['started_from'] = trainings(checkpoint)[0 if weights_only else 1 :]
        self.start_epoch, self.best, self.progress = resume(
            checkpoint,
            self.task,
            self.optimizer,
            self.scaler,
            self.config.to_dict(),
            self.config.data,
            self.dist_context,
            weights_only,
            self.lr_rule,
        )

    def _check_same_start(self) -> None:
        start = (self.start_epoch, self.progress.step if self.progress else 0)
        starts = sorted(set(self.dist_context.all_gather(start)))
        if len(starts) > 1:
            places = ', '.join(f'epoch {epoch} batch {step}' for epoch, step in starts)
            raise UserError(
                f'the processes would begin at different places ({places}): all machines of a job that goes on must '
                f'see the same --output and --resume.'
            )

    def _make_evaluator(self) -> None:
        config = self.config
        eval_model = self.task.get_eval_model(ema=config.trainer.model_ema)
        assert isinstance(eval_model, MultiExitModel)  # it is compiled later
        forward: Callable[[torch.Tensor], MultiExitOutput] = eval_model.forward_exits
        if config.trainer.fsdp:
            # under FSDP every forward pass must enter through the outermost module
            outermost: Any = self.task.trainable_module
            forward = outermost.forward_exits
        self.evaluator = Evaluator(
            eval_model,
            self.data_config,
            config.data,
            config.device,
            device=self.device,
            forward=compile_forward(forward, config.device),
        )

    def _make_loaders(self) -> None:
        config = self.config
        if self.task.criterion.needs_indices:
            self.train_data = IndexedTargets(self.train_data)
        # under FSDP all processes must evaluate the same number of batches
        sharers = SINGLE_PROCESS if config.trainer.fsdp else self.dist_context
        with as_user_error('the data flags cannot be used'):
            self.batches = train_loader(
                config.data,
                config.augment,
                self.train_data,
                self.data_config,
                self.num_classes,
                self.device,
                smoothing=config.loss.smoothing,
                seed=config.trainer.seed,
                channels_last=config.device.channels_last,
                dtype=getattr(torch, config.device.amp_dtype) if config.device.amp else torch.float32,
            )
            self.val_batches = eval_loader(
                config.data,
                self.val_data,
                self.data_config,
                self.device,
                batch_size=config.data.validation_batch_size,
                dist_context=sharers,
                num_classes=self.num_classes,
                channels_last=config.device.channels_last,
            )

    def _make_scheduler(self, resumed: bool) -> None:
        config = self.config
        accumulate_steps = config.loop.grad_accum_steps
        self.updates_per_epoch = math.ceil(len(self.batches) / accumulate_steps)
        self.scheduler, self.num_epochs = create_scheduler(
            config.scheduler, self.optimizer, self.updates_per_epoch, config.trainer.seed
        )
        if resumed and self.scheduler is not None:
            updates = math.ceil((self.progress.step if self.progress else 0) / accumulate_steps)
            self.scheduler.step_update(self.start_epoch * self.updates_per_epoch + updates)
            self.scheduler.step(self.start_epoch)

    def train_epoch(
        self,
        epoch: int,
        save: Optional[Callable[[Progress], None]] = None,
        handler: Optional[StopSource] = None,
        start: Optional[Progress] = None,
    ) -> Progress:
        """Train for an epoch, or for the rest of it.

        Args:
            epoch: Number of the epoch.
            save: Function that saves a checkpoint of an unfinished epoch.
            handler: Source of stop requests.
            start: Position to continue from.

        Raises:
            StopRequested: The handler has a request.
            NonFiniteError: The loss is not finite.
        """
        config, model_config = self.config, self.config.model
        if model_config.heads_only:
            assert isinstance(self.model, MultiExitBackbone)  # see check_heads_only
            self.model.freeze_backbone(model_config.heads_only is True or epoch < model_config.heads_only)
        # DDP looks once at which parameters train, and so do graphs
        thaws = not isinstance(model_config.heads_only, bool) and epoch == model_config.heads_only
        changed = epoch == self.start_epoch or thaws
        if config.loop.cuda_graphs and changed:
            capture_step(self.task, self.batches, config, self.data_config, self.num_classes)
        if self.dist_context.size > 1 and not config.trainer.fsdp and changed:
            self.task.prepare_distributed([self.dist_context.local_rank] if self.device.type == 'cuda' else None)
        # a seed per epoch: a resumed run sees the same images as an uninterrupted one
        random_seed((config.trainer.seed + 1_000_003 * epoch) % 2**31, self.dist_context.rank)
        set_epoch(self.batches, self.train_data, epoch)
        off_epoch = config.augment.mixup_off_epoch
        if off_epoch and epoch >= off_epoch and self.batches.mixup_enabled:
            self.batches.mixup_enabled = False
        warmup = config.loss.distill_warmup_epochs
        self.task.criterion.set_distill_scale(min(1.0, epoch / warmup) if warmup else 1.0)
        return self.loop.run(epoch, epoch * self.updates_per_epoch, start, save, handler)

    def validation_logits(self) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Logits of this process's share of the images that choose the epoch: see `Evaluator.batches`."""
        return self.evaluator.batches(self.val_batches)

    def evaluate(self, handler: Optional[SigtermHandler] = None) -> Evaluation:
        """The metrics of the exits on the images that choose the epoch.

        Raises:
            StopRequested: The handler of any process has a request.
        """
        totals = accumulate(
            iterate_in_lockstep(handler or SigtermHandler(), self.validation_logits(), self.dist_context)
        )
        if totals is None:
            totals = torch.zeros(5, self.model.num_exits, dtype=torch.float64)
        # under FSDP each process has evaluated all images
        return finalize(totals if self.config.trainer.fsdp else self.dist_context.all_reduce_sum(totals))

    def run_epoch(
        self,
        epoch: int,
        save: Optional[Callable[[Progress], None]] = None,
        handler: Optional[SigtermHandler] = None,
    ) -> EpochResult:
        """Train for an epoch and evaluate.

        Raises:
            StopRequested: The handler has a request; the state is saved.
            UserError: The loss is not finite, or too many images are broken.
        """
        began = time.perf_counter()
        seen_before = self.progress.seen if self.progress else 0
        progress, self.progress = self.train_epoch(epoch, save, handler, self.progress), None
        seconds = time.perf_counter() - began
        if self.dist_context.size > 1:
            self.task.synchronize_statistics(self.dist_context.size, self.config.trainer.dist_bn)
        try:
            evaluation = self.evaluate(handler)
        except StopRequested:
            if save is not None:
                save(progress)
            raise
        self._share_broken_images()
        rates = [group['lr'] for group in self.optimizer.param_groups]
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1)
        self.best = max(self.best, evaluation.mean_top1)
        losses = mean_losses(progress, self.dist_context)
        speed = self.dist_context.size * (progress.seen - seen_before) / seconds
        return EpochResult(losses, evaluation, sum(rates) / len(rates), speed)

    def _share_broken_images(self) -> None:
        """Exchange which images could not be read, so that all processes count and name the same ones."""
        for data in (self.train_data, self.val_data):
            images = checked_images(data)
            if images is not None and self.dist_context.size > 1:
                images.merge(self.dist_context.all_gather(images.found))
                images.check()

    def mixing_weights(self) -> Optional[torch.Tensor]:
        """Mean mixing weights of the teachers on one batch, [K, K]; None without a teacher."""
        return self.evaluator.mean_mixing_weights(self.task.criterion, self.val_batches, max_batches=1)

    def state(self, **more: Any) -> Dict[str, Any]:
        """Everything that a run needs to continue, for a checkpoint; under FSDP all processes call it."""
        if self.config.trainer.fsdp:
            trained = sharded_state(self.task, self.optimizer)
        else:
            trained = dict(self.task.get_checkpoint_state(), optimizer=self.optimizer.state_dict())
        return dict(
            self.identity,
            args=self.config.to_dict(),
            data_config=self.data_config,
            best_metric=self.best,
            lr_rule=self.lr_rule,
            **trained,
            **({NativeScaler.state_dict_key: self.scaler.state_dict()} if self.scaler else {}),
            **(self.task.get_checkpoint_state(ema=True) if self.config.trainer.model_ema else {}),
            **more,
        )
