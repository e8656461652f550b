"""One pass over the training data, which may stop half-way and go on there as if it had not."""

import argparse
import contextlib
import logging
import math
import os
import random
import signal
import threading
from collections import OrderedDict
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from tqdm import tqdm

from ..task import MLCSDTask
from .finite import NotFinite, Watch
from .world import ALONE, World

__all__ = ['Progress', 'Stopped', 'Termination', 'mean_losses', 'train_epoch', 'until']

_logger = logging.getLogger(__name__)

# of float16's gradients, which start at 65,536 times their size
SMALLEST_SCALE = 1e-3

_CTRL_C = 'SIGINT (Ctrl-C)'


class Stopped(Exception):
    """Somebody wants the process to end; what was reached is saved."""


class Termination:
    """Turns SIGTERM and SIGINT into a wish that the loops look for: a machine about to go sends the one, with torchrun
    twice, and Ctrl-C is the other. A second Ctrl-C ends the process at once.

    Attributes:
        wished: Whether one has come.
        by: Its name.
    """

    def __init__(self):
        self.wished = False
        self.by: Optional[str] = None
        self._before: Dict[int, Any] = {}

    def __enter__(self) -> 'Termination':
        # signals are the main thread's alone
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # a shell lets its background jobs ignore Ctrl-C
                if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._wish)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _wish(self, number: int, *_: Any) -> None:
        is_interrupt = number == signal.SIGINT
        # torchrun passes it on, and ends its processes itself when they take too long
        alone = 'TORCHELASTIC_RUN_ID' not in os.environ
        if is_interrupt and self.by == _CTRL_C and alone:
            raise KeyboardInterrupt
        self.wished = True
        self.by = self.by or (_CTRL_C if is_interrupt else 'SIGTERM')
        if is_interrupt and int(os.environ.get('RANK', 0)) == 0:
            # print and logging must not be called from here
            again = '; press it again to stop at once, without' if alone else ''
            os.write(2, f'\nCtrl-C: saving after this update{again}\n'.encode())


class Progress(NamedTuple):
    """How far an epoch has come: what a resumed one needs beside weights and optimizer.

    Attributes:
        step: Batches done.
        skipped: Batches among them whose loss was not finite.
        seen: Images in the others.
        totals: Sums over the others of the loss and its parts.
        right: Right answers per exit, [K].
        generators: The states of all random number generators.
        statistics: This process's running statistics, where there are others with other ones.
    """

    step: int
    skipped: int
    seen: int
    totals: Dict[str, torch.Tensor]
    right: torch.Tensor
    generators: Dict[str, Any]
    statistics: Sequence[torch.Tensor] = ()

    def on_cpu(self) -> 'Progress':
        """The same in main memory, for whoever saves it."""
        totals = {name: total.cpu() for name, total in self.totals.items()}
        statistics = [buffer.cpu() for buffer in self.statistics]
        return self._replace(totals=totals, right=self.right.cpu(), statistics=statistics)


def train_epoch(
    epoch: int,
    task: MLCSDTask,
    batches: Any,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scaler: Optional[NativeScaler],
    autocast: ContextManager,
    args: argparse.Namespace,
    num_updates: int,
    start: Optional[Progress] = None,
    save: Optional[Callable[[Progress], None]] = None,
    termination: Optional[Termination] = None,
    world: World = ALONE,
    names: Optional[Callable[[int], List[str]]] = None,
) -> Progress:
    """Train for one epoch, or for what is left of it.

    Args:
        epoch: Its number.
        task: Model and loss.
        batches: The loader; in the same random state it must give the same batches again.
        optimizer: Of the task's parameters.
        scheduler: Stepped at every update.
        scaler: For float16.
        autocast: Context of the forward passes.
        args: The flags.
        num_updates: Updates before this epoch.
        start: Where to go on.
        save: Called every ``--checkpoint-every-steps`` updates, and before the process stops.
        termination: Whether to stop after the next update.
        world: The processes that train.
        names: What the images of the batch of a number are called.

    Returns:
        The end of the epoch, as this process saw it.

    Raises:
        Stopped: By `termination`.
        NotFinite: The loss is not finite, or weights aren't that would be saved.
    """
    task.train()
    if task.criterion.ramp is not None:
        task.criterion.ramp.auto = False
    accumulate = args.grad_accum_steps
    short_group = len(batches) % accumulate
    skipped, seen, totals, right = 0, 0, {}, torch.zeros((), device=task.device)
    in_a_row, spoilt, watch = 0, False, Watch(task.device, world, names)
    if start is not None:
        skipped, seen, right = start.skipped, start.seen, start.right.to(task.device)
        totals = {name: total.to(task.device) for name, total in start.totals.items()}
        num_updates += math.ceil(start.step / accumulate)
        for buffer, before in zip(_statistics(task), start.statistics):
            buffer.copy_(before)
        if start.step == len(batches):
            return start

    def own_statistics() -> List[torch.Tensor]:
        return [buffer.clone() for buffer in _statistics(task)] if world.size > 1 else []

    optimizer.zero_grad()
    quiet = None if world.is_first else True
    bar = tqdm(_apart(batches), total=len(batches), desc=f'epoch {epoch}', disable=quiet, leave=False)
    for i, (images, target) in enumerate(bar):
        if start is not None and i < start.step:
            if i + 1 == start.step:
                _set_generators(start.generators)
            if world.any(termination is not None and termination.wished):
                raise Stopped  # all is as it was saved
            continue
        is_last = i + 1 == len(batches)
        # the last group of an epoch may hold fewer batches
        group_size = short_group if short_group and i >= len(batches) - short_group else accumulate
        need_update = (i + 1) % accumulate == 0 or is_last
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        target, indices = target.unbind(dim=1) if task.criterion.needs_indices else (target, None)
        statistics = [(b, b.clone()) for b in _statistics(task)] if args.skip_nonfinite else []
        # gradients that are still to be added to need not go round
        with contextlib.nullcontext() if need_update else task.no_sync():
            with autocast:
                result = task(images, target, indices)
            loss = result['loss'] / group_size
            watch.see(i, result['loss'].detach())
            finite = not args.skip_nonfinite or not world.any(not loss.isfinite())
            in_a_row = 0 if finite else in_a_row + 1
            # of an update that is left out nothing stays
            spoilt = spoilt or not finite
            if not spoilt and scaler:
                scaler(
                    loss,
                    optimizer,
                    clip_grad=args.clip_grad,
                    clip_mode=args.clip_mode,
                    parameters=task.get_clip_parameters(),
                    need_update=need_update,
                )
            elif not spoilt:
                loss.backward()
        if not finite:
            skipped += 1
            too_many = in_a_row > args.skip_nonfinite
            bad = watch.found(epoch, f', as in the {in_a_row - 1} batches before' if too_many else '')
            if too_many:
                raise bad
            rest = ', with the other batches of its update' if group_size > 1 else ''
            _logger.warning(f'{bad}: left out{rest} ({in_a_row} in a row)')
            for buffer, before in statistics:
                buffer.copy_(before)
        if need_update and not spoilt and not scaler:
            if args.clip_grad is not None:
                dispatch_clip_grad(task.get_clip_parameters(), args.clip_grad, mode=args.clip_mode)
            optimizer.step()
        if need_update:
            optimizer.zero_grad()
            spoilt = False
            num_updates += 1
            if task.criterion.ramp is not None:
                task.criterion.ramp.step()
            task.update_ema(step=num_updates)
            if scheduler is not None:
                scheduler.step_update(num_updates=num_updates)

        if finite:
            labels = target if target.ndim == 1 else target.argmax(dim=1)
            right = right + (torch.stack(result['exit_logits']).detach().argmax(dim=-1) == labels).sum(dim=1)
            seen += len(target)
            for name, value in result.items():
                if isinstance(value, torch.Tensor) and value.ndim == 0:
                    totals[name] = totals.get(name, 0.0) + value.detach()
        if seen and (is_last or (i + 1) % args.log_interval == 0):
            watch.check(epoch, i, task.parameters() if is_last else ())
            if scaler and scaler.state_dict()['scale'] < SMALLEST_SCALE:
                raise NotFinite('no gradients are finite in float16, whatever they are scaled with', epoch, i)
            accuracy = ' '.join(f'{a:.1f}' for a in (100 * right / seen).tolist())
            bar.set_postfix_str(f'loss {totals["loss"].item() / (i + 1 - skipped):.3f}, top-1 per exit {accuracy}')
        if need_update and save is not None:
            stop = world.any(termination is not None and termination.wished)
            every = args.checkpoint_every_steps
            if stop or (every and not is_last and num_updates % every == 0):
                watch.check(epoch, i, task.parameters())
                save(Progress(i + 1, skipped, seen, totals, right, _generators(), own_statistics()))
            if stop:
                raise Stopped
    if not seen:
        raise NotFinite('the loss is not finite', epoch, skipped - 1, more=', as in all of this epoch')
    return Progress(len(batches), skipped, seen, totals, right, _generators(), own_statistics())


def until(termination: Termination, batches: Iterator[Any], world: World) -> Iterator[Any]:
    """This process's batches, as long as nobody wants any of the processes to end; they go in step, because one that is
    to end cannot wait for what the others still have.

    Raises:
        Stopped: Somebody does; in all processes at once.
    """
    while True:
        batch = next(batches, None)
        if world.any(termination.wished):
            raise Stopped
        # one may have a batch more than another
        if not world.any(batch is not None):
            return
        if batch is not None:
            yield batch


def mean_losses(progress: Progress, world: World = ALONE) -> Dict[str, float]:
    """The loss and its parts, means over the batches of an epoch and all processes."""
    batches = world.size * (progress.step - progress.skipped)
    return OrderedDict((name, (world.sum(total) / batches).item()) for name, total in progress.totals.items())


def _apart(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, drawn with generators of their own: what the network draws (dropout, say) changes no batch, so that
    the first batches can be passed over without computing anything."""
    own = _generators()
    iterator = iter(batches)
    while True:
        outer = _generators()
        _set_generators(own)
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            own = _generators()
            _set_generators(outer)
        yield batch


def _statistics(task: MLCSDTask) -> List[torch.Tensor]:
    """The buffers that a batch changes: running statistics of BatchNorm, which one NaN would spoil for good, and of
    accuracy."""
    modules = (unwrap_model(task.trainable_module).model, task.criterion.mixer, task.criterion.ramp)
    return [buffer for module in modules if module is not None for buffer in module.buffers()]


def _generators() -> Dict[str, Any]:
    """The states of all generators, as tensors and plain values."""
    name, keys, *rest = np.random.get_state()
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), *rest),
        python=random.getstate(),
    )


def _set_generators(states: Dict[str, Any]) -> None:
    torch.set_rng_state(states['torch'])
    if states['cuda'] is not None:
        torch.cuda.set_rng_state(states['cuda'])
    name, keys, *rest = states['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    random.setstate(states['python'])
