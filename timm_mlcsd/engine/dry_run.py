"""``--dry-run``: what a training would take, found out in two steps."""

import contextlib
import importlib.util
import sys
import time
from typing import List

import torch

from ..report import format_table
from .epoch import Stopped
from .logs import check_packages
from .training import Training

__all__ = ['rehearse']


class _Clock:
    """In the place of a `Termination`: notes when updates end, and ends the epoch after a few."""

    def __init__(self, updates: int, device: torch.device):
        self.updates = updates
        self.device = device
        self.ends: List[float] = []

    def tick(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def wished(self) -> bool:
        self.tick()
        return len(self.ends) > self.updates


def rehearse(training: Training) -> None:
    """Train for two updates, the first of which warms up, evaluate a batch, and print what they took; nothing is
    written.

    Raises:
        UserError: The training would not go, as far as that shows.
    """
    args, model, task, world = training.args, training.model, training.task, training.world
    check_packages(args)
    clock = _Clock(2, training.device)
    clock.tick()
    with contextlib.suppress(Stopped):
        training.train_epoch(training.start_epoch, lambda progress: None, clock)
    seconds = clock.ends[-1] - clock.ends[-2]
    next(training.validation_logits(), None)
    if not world.is_first:
        return
    images = args.batch_size * world.size * args.grad_accum_steps
    per_epoch = seconds * training.updates_per_epoch
    heads = sum(p.numel() for p in model.heads.parameters())
    rows = [
        ('parameters of the backbone', f'{(sum(p.numel() for p in model.parameters()) - heads) / 1e6:.2f} M'),
        ('parameters of the heads', f'{heads / 1e6:.2f} M'),
        ('parameters of the loss', f'{sum(p.numel() for p in task.criterion.parameters()) / 1e6:.2f} M'),
        ('images per update', f'{images} in {seconds:.3f} s, {images / seconds:.0f} images/s'),
        ('time of an epoch', f'{_duration(per_epoch)}, without evaluation'),
        (f'time of {training.num_epochs} epochs', _duration(training.num_epochs * per_epoch)),
        ('peak memory', _peak_memory(training.device)),
    ]
    print(format_table(('what', 'how much'), rows))


def _peak_memory(device: torch.device) -> str:
    if device.type == 'cuda':
        memory = torch.cuda.max_memory_allocated(device)
    elif importlib.util.find_spec('resource'):
        import resource

        # macOS counts bytes, Linux KiB
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    else:  # Windows
        return 'unknown'
    return f'{memory / 2**30:.2f} GiB on {device}'


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f'{seconds:.1f} s'
    return f'{seconds / 60:.1f} min' if seconds < 7200 else f'{seconds / 3600:.1f} h'
