"""One pass over the training data, which can stop after any update and continue from there."""

import contextlib
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from tqdm import tqdm

from ..distributed import SINGLE_PROCESS, DistributedContext
from ..task import MLCSDTask
from .device import to_channels_last
from .finite import NonFiniteError, NonFiniteMonitor
from .rng import isolated_rng, rng_state, set_rng_state
from .signals import StopRequested, StopSource

__all__ = ['EpochLoop', 'LoopConfig', 'Progress', 'mean_losses']

_logger = logging.getLogger(__name__)

# smallest loss scale of float16 before the run counts as diverged; the scale starts at 65,536
SMALLEST_SCALE = 1e-3


@dataclass
class LoopConfig:
    """How batches become updates.

    Attributes:
        grad_accum_steps: Batches per update.
        clip_grad: Bound for gradients, None for no clipping.
        clip_mode: What `clip_grad` bounds: ``norm``, ``value`` or ``agc``.
        skip_nonfinite: Batches in a row whose loss may be non-finite before the run ends; their updates are skipped.
        log_interval: Batches between two looks at losses and accuracy.
        checkpoint_every_steps: Updates between two checkpoints inside an epoch; 0 for none.
        cuda_graphs: Whether forward and backward pass run as CUDA graphs of eager kernels.
    """

    grad_accum_steps: int = 1
    clip_grad: Optional[float] = None
    clip_mode: str = 'norm'
    skip_nonfinite: int = 0
    log_interval: int = 50
    checkpoint_every_steps: int = 0
    cuda_graphs: bool = False


class Progress(NamedTuple):
    """Position in an epoch: what a resumed epoch needs beside weights and optimizer.

    Attributes:
        step: Number of batches done.
        skipped: Number of these whose loss was not finite.
        seen: Number of images in the others.
        totals: Sums of the loss and its parts over the others.
        right: Number of correct answers per exit, [K].
        generators: States of all random number generators.
        statistics: Running statistics of this process, where processes have different ones.
    """

    step: int
    skipped: int
    seen: int
    totals: Dict[str, torch.Tensor]
    right: torch.Tensor
    generators: Dict[str, Any]
    statistics: Sequence[torch.Tensor] = ()

    def on_cpu(self) -> 'Progress':
        """The same with all tensors in main memory."""
        totals = {name: total.cpu() for name, total in self.totals.items()}
        statistics = [buffer.cpu() for buffer in self.statistics]
        return self._replace(totals=totals, right=self.right.cpu(), statistics=statistics)


def mean_losses(progress: Progress, dist_context: DistributedContext = SINGLE_PROCESS) -> Dict[str, float]:
    """The loss and its parts, means over the batches of an epoch and all processes."""
    batches = dist_context.size * (progress.step - progress.skipped)
    totals = progress.totals.items()
    return OrderedDict((name, (dist_context.all_reduce_sum(total) / batches).item()) for name, total in totals)


class EpochMeters:
    """Sums over the batches of an epoch, kept on the device.

    Args:
        device: Device of the task.
        start: Sums to continue from.
    """

    def __init__(self, device: torch.device, start: Optional[Progress] = None):
        self.skipped = self.seen = 0
        self.totals: Dict[str, torch.Tensor] = {}
        self.right = torch.zeros((), device=device)
        if start is not None:
            self.skipped, self.seen, self.right = start.skipped, start.seen, start.right.to(device)
            self.totals = {name: total.to(device) for name, total in start.totals.items()}

    def add(self, result: Dict[str, Any], target: torch.Tensor) -> None:
        """Add what the task returned for a batch, and its targets [B] or [B, C]."""
        labels = target if target.ndim == 1 else target.argmax(dim=1)
        answers = torch.stack(result['exit_logits']).detach().argmax(dim=-1)
        self.right = self.right + (answers == labels).sum(dim=1)
        self.seen += len(target)
        for name, value in result.items():
            if isinstance(value, torch.Tensor) and value.ndim == 0:
                self.totals[name] = self.totals.get(name, 0.0) + value.detach()

    def summary(self, batches: int) -> str:
        """Mean loss and accuracy of so many batches, for the progress bar."""
        accuracy = ' '.join(f'{a:.1f}' for a in (100 * self.right / self.seen).tolist())
        return f'loss {self.totals["loss"].item() / (batches - self.skipped):.3f}, top-1 per exit {accuracy}'


class EpochLoop:
    """Trains a task for one epoch after another.

    Args:
        task: Model and loss.
        batches: Loader; in the same random state it must give the same batches again.
        optimizer: Optimizer of the task's parameters.
        config: How batches become updates.
        scheduler: Schedule that is stepped at every update.
        scaler: Loss scaler for float16.
        autocast: Context of the forward passes.
        channels_last: Whether images get that memory format.
        dist_context: Processes that train together.
        names: Function from the number of a batch to the names of its images.
        compiles_graphs: Whether ``torch.compile`` has made CUDA graphs of the task.
    """

    def __init__(
        self,
        task: MLCSDTask,
        batches: Any,
        optimizer: torch.optim.Optimizer,
        config: LoopConfig,
        *,
        scheduler: Any = None,
        scaler: Optional[NativeScaler] = None,
        autocast: Optional[ContextManager[Any]] = None,
        channels_last: bool = False,
        dist_context: DistributedContext = SINGLE_PROCESS,
        names: Optional[Callable[[int], List[str]]] = None,
        compiles_graphs: bool = False,
    ):
        self.task = task
        self.batches = batches
        if config.grad_accum_steps > len(batches):
            _logger.warning(
                f'--grad-accum-steps {config.grad_accum_steps}: an epoch has {len(batches)} batches, so that an update '
                f'has fewer images than the learning rate is scaled for without --lr.'
            )
        self.optimizer = optimizer
        self.config = config
        self.scheduler = scheduler
        self.scaler = scaler
        self.autocast = autocast or contextlib.nullcontext()
        self.channels_last = channels_last
        self.dist_context = dist_context
        self.names = names
        self.compiles_graphs = compiles_graphs
        # both kinds of graphs overwrite outputs and gradients of the batch before
        self.overwrites_gradients = compiles_graphs or config.cuda_graphs

    def run(
        self,
        epoch: int,
        num_updates: int = 0,
        start: Optional[Progress] = None,
        save: Optional[Callable[[Progress], None]] = None,
        handler: Optional[StopSource] = None,
    ) -> Progress:
        """Train for an epoch, or for the rest of it.

        Args:
            epoch: Number of the epoch.
            num_updates: Updates before this epoch.
            start: Position to continue from.
            save: Function that saves a checkpoint, called every `checkpoint_every_steps` updates and before a stop.
            handler: Source of stop requests.

        Returns:
            The end of the epoch, as this process has seen it.

        Raises:
            StopRequested: The handler has a request.
            NonFiniteError: The loss is not finite, or weights that would be saved are not.
        """
        self.task.train()
        if self.task.criterion.ramp is not None:
            self.task.criterion.ramp.auto = False
        self._begin(epoch, num_updates, start)
        if start is not None and start.step == len(self.batches):
            return start
        self.optimizer.zero_grad()
        quiet = None if self.dist_context.is_primary else True
        batches = isolated_rng(self.batches, getattr(self.batches, 'draws_per_batch', True))
        bar = tqdm(batches, total=len(self.batches), desc=f'epoch {epoch}', disable=quiet, leave=False)
        for i, (images, target) in enumerate(bar):
            if start is not None and i < start.step:
                self._replay(i, start, handler)
                continue
            target, indices = target.unbind(dim=1) if self.task.criterion.needs_indices else (target, None)
            result = self._run_batch(i, images, target, indices)
            if self._ends_update(i):
                self._update()
            if result is not None:
                self.meters.add(result, target)
            if self.meters.seen and (self._is_last(i) or (i + 1) % self.config.log_interval == 0):
                self._check(i)
                bar.set_postfix_str(self.meters.summary(i + 1))
            if self._ends_update(i) and save is not None:
                self._save_or_stop(i, save, handler)
        if not self.meters.seen:
            last = self.meters.skipped - 1
            raise NonFiniteError('the loss is not finite', epoch, last, more=', as in all of this epoch')
        return self._progress(len(self.batches))

    def _begin(self, epoch: int, num_updates: int, start: Optional[Progress]) -> None:
        """Reset the counters of an epoch, or set them to those of `start`."""
        self.epoch = epoch
        self.num_updates = num_updates
        self.meters = EpochMeters(self.task.device, start)
        self.monitor = NonFiniteMonitor(self.task.device, self.dist_context, self.names)
        self.nonfinite_in_a_row = 0
        self.skip_update = False
        self.gradients_kept = False
        if start is not None:
            self.num_updates += math.ceil(start.step / self.config.grad_accum_steps)
            for buffer, before in zip(_model_buffers(self.task), start.statistics):
                buffer.copy_(before)

    def _replay(self, i: int, start: Progress, handler: Optional[StopSource]) -> None:
        """Pass over a batch that was trained on before the run was resumed."""
        if i + 1 == start.step:
            set_rng_state(start.generators)
        if self.dist_context.any_rank(handler is not None and handler.stop_requested):
            raise StopRequested  # the state is still the saved one

    def _is_last(self, i: int) -> bool:
        return i + 1 == len(self.batches)

    def _ends_update(self, i: int) -> bool:
        return (i + 1) % self.config.grad_accum_steps == 0 or self._is_last(i)

    def _batches_of_update(self, i: int) -> int:
        """Number of batches in the update of batch i; the last update of an epoch may have fewer."""
        short = len(self.batches) % self.config.grad_accum_steps
        return short if short and i >= len(self.batches) - short else self.config.grad_accum_steps

    def _run_batch(
        self, i: int, images: torch.Tensor, target: torch.Tensor, indices: Optional[torch.Tensor]
    ) -> Optional[Dict[str, Any]]:
        """Forward and backward pass; returns what the task returned, None if the loss is not finite and is skipped."""
        if self.channels_last:
            images = to_channels_last(images)
        if self.compiles_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        may_skip = self.config.skip_nonfinite > 0
        buffers = [(b, b.clone()) for b in _model_buffers(self.task)] if may_skip else []
        # gradients are exchanged once per update
        with contextlib.nullcontext() if self._ends_update(i) else self.task.no_sync():
            with self.autocast:
                result: Dict[str, Any] = self.task(images, target, indices)
            loss = result['loss'] / self._batches_of_update(i)
            self.monitor.update(i, result['loss'].detach())
            finite = not may_skip or not self.dist_context.any_rank(not loss.isfinite())
            self.nonfinite_in_a_row = 0 if finite else self.nonfinite_in_a_row + 1
            self.skip_update = self.skip_update or not finite
            if not self.skip_update:
                self._backward(loss, self._ends_update(i))
                if self.overwrites_gradients and not self._ends_update(i):
                    self._keep_gradients()
        if finite:
            return result
        self._skip_batch(i, buffers)
        return None

    def _backward(self, loss: torch.Tensor, need_update: bool) -> None:
        if self.scaler is None:
            loss.backward()
            return
        self.scaler(
            loss,
            self.optimizer,
            clip_grad=self.config.clip_grad,
            clip_mode=self.config.clip_mode,
            parameters=self._clip_parameters(),
            need_update=need_update,
        )

    def _clip_parameters(self) -> List[torch.nn.Parameter]:
        # adaptive clipping is not for classifiers, as in timm
        return list(self.task.get_clip_parameters(exclude_head=self.config.clip_mode == 'agc'))

    def _keep_gradients(self) -> None:
        """Copy the first gradients of an update out of the memory that the next batch overwrites."""
        if self.gradients_kept:
            return
        self.gradients_kept = True
        for p in self.task.parameters():
            if p.grad is not None:
                p.grad = p.grad.clone()

    def _skip_batch(self, i: int, buffers: List[Tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Undo what a batch with a non-finite loss has changed, or end the run after too many in a row."""
        self.meters.skipped += 1
        count = self.nonfinite_in_a_row
        too_many = count > self.config.skip_nonfinite
        error = self.monitor.pop(self.epoch, f', as in the {count - 1} batches before' if too_many else '')
        assert error is not None  # the monitor has noted this batch
        if too_many:
            raise error
        rest = ', with the other batches of its update' if self._batches_of_update(i) > 1 else ''
        _logger.warning(f'{error}: left out{rest} ({count} in a row)')
        for buffer, before in buffers:
            buffer.copy_(before)

    def _update(self) -> None:
        """Step the optimizer, unless the scaler has, and what follows it: ramp, EMA and schedule."""
        if not self.skip_update and self.scaler is None:
            if self.config.clip_grad is not None:
                dispatch_clip_grad(self._clip_parameters(), self.config.clip_grad, mode=self.config.clip_mode)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.skip_update = False
        self.gradients_kept = False
        self.num_updates += 1
        if self.task.criterion.ramp is not None:
            self.task.criterion.ramp.step()
        self.task.update_ema(step=self.num_updates)
        if self.scheduler is not None:
            self.scheduler.step_update(num_updates=self.num_updates)

    def _check(self, i: int) -> None:
        """Raise a `NonFiniteError` for what the batches until now have shown."""
        self.monitor.raise_if_any(self.epoch, i, self.task.parameters() if self._is_last(i) else ())
        if self.scaler and self.scaler.state_dict()['scale'] < SMALLEST_SCALE:
            raise NonFiniteError('no gradients are finite in float16, whatever they are scaled with', self.epoch, i)

    def _save_or_stop(self, i: int, save: Callable[[Progress], None], handler: Optional[StopSource]) -> None:
        stop = self.dist_context.any_rank(handler is not None and handler.stop_requested)
        every = self.config.checkpoint_every_steps
        if stop or (every and not self._is_last(i) and self.num_updates % every == 0):
            self.monitor.raise_if_any(self.epoch, i, self.task.parameters())
            save(self._progress(i + 1))
        if stop:
            raise StopRequested

    def _progress(self, step: int) -> Progress:
        meters = self.meters
        own = [buffer.clone() for buffer in _model_buffers(self.task)] if self.dist_context.size > 1 else []
        return Progress(step, meters.skipped, meters.seen, meters.totals, meters.right, rng_state(), own)


def _model_buffers(task: MLCSDTask) -> List[torch.Tensor]:
    """The buffers that a batch changes, the running statistics of BatchNorm and of accuracy: a NaN would stay there."""
    modules = (unwrap_model(task.trainable_module).model, task.criterion.mixer, task.criterion.ramp)
    return [buffer for module in modules if module is not None for buffer in module.buffers()]
