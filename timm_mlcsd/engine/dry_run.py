"""Memory and time of a training, measured in two updates (``--dry-run``)."""

import contextlib
import importlib.util
import sys
import time
from typing import List

import torch

from ..report import format_table
from .logs import check_packages
from .signals import StopRequested
from .trainer import Trainer

__all__ = ['dry_run']


class _Clock:
    """Takes the place of a `SigtermHandler`: notes the times at which updates end, and ends the epoch after a few."""

    def __init__(self, updates: int, device: torch.device):
        self.updates = updates
        self.device = device
        self.ends: List[float] = []

    def tick(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    @property
    def stop_requested(self) -> bool:
        self.tick()
        return len(self.ends) > self.updates


def dry_run(trainer: Trainer) -> None:
    """Train for two updates, the first of which warms up, evaluate a batch, and print what they took; nothing is
    written.

    Raises:
        UserError: The training would not go, as far as that shows.
    """
    config, model, task, dist_context = trainer.config, trainer.model, trainer.task, trainer.dist_context
    check_packages(config.log)
    clock = _Clock(2, trainer.device)
    clock.tick()
    with contextlib.suppress(StopRequested):
        trainer.train_epoch(trainer.start_epoch, lambda progress: None, clock)
    seconds = clock.ends[-1] - clock.ends[-2]
    next(trainer.validation_logits(), None)
    if not dist_context.is_primary:
        return
    images = config.data.batch_size * dist_context.size * config.loop.grad_accum_steps
    per_epoch = seconds * trainer.updates_per_epoch
    heads = sum(p.numel() for p in model.heads.parameters())
    rows = [
        ('parameters of the backbone', f'{(sum(p.numel() for p in model.parameters()) - heads) / 1e6:.2f} M'),
        ('parameters of the heads', f'{heads / 1e6:.2f} M'),
        ('parameters of the loss', f'{sum(p.numel() for p in task.criterion.parameters()) / 1e6:.2f} M'),
        ('images per update', f'{images} in {seconds:.3f} s, {images / seconds:.0f} images/s'),
        ('time of an epoch', f'{_duration(per_epoch)}, without evaluation'),
        (f'time of {trainer.num_epochs} epochs', _duration(trainer.num_epochs * per_epoch)),
        ('peak memory', _peak_memory(trainer.device)),
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
