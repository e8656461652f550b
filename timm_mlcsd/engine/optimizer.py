"""From flags to optimizer and schedule, both timm's."""

import argparse
from typing import Any, List, Optional, Tuple

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..errors import UserError, blame
from ..models import MultiExitModel
from ..task import MLCSDTask

__all__ = ['create_optimizer', 'create_scheduler', 'lr_rule', 'scaled_lr']


def lr_rule(args: argparse.Namespace) -> Optional[Tuple[float, int, str]]:
    """What the learning rate follows from: --lr-base, for how many images per update, and how it grows with them; None
    where --lr is given."""
    if args.lr is not None:
        return None
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return args.lr_base, args.lr_base_size, scale


def scaled_lr(args: argparse.Namespace, world_size: int = 1) -> float:
    """timm's rule: --lr where it is given, else --lr-base scaled by the number of images per update."""
    if args.lr is not None:
        return args.lr
    base, size, scale = lr_rule(args)
    ratio = args.batch_size * args.grad_accum_steps * world_size / size
    return base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_optimizer(args: argparse.Namespace, task: MLCSDTask, model: MultiExitModel) -> torch.optim.Optimizer:
    """timm's optimizer of network and loss; the exits learn at ``--exit-lr-mult`` times the rate."""
    with blame(f'--opt {args.opt} cannot be made'):
        optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    if args.exit_lr_mult != 1:
        exits = [*model.heads.parameters(), *task.criterion.parameters()]
        _scale_lr(optimizer, exits, args.exit_lr_mult)
    if args.sched == 'none':
        # nobody else would
        for group in optimizer.param_groups:
            group['lr'] *= group.get('lr_scale', 1.0)
    return optimizer


def _scale_lr(optimizer: torch.optim.Optimizer, parameters: List[torch.nn.Parameter], factor: float) -> None:
    """Give some parameters groups of their own, whose ``lr_scale`` timm's schedules multiply the rate with."""
    ids = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        theirs = [p for p in group['params'] if id(p) in ids]
        group['params'] = [p for p in group['params'] if id(p) not in ids]
        if theirs:
            scale = group.get('lr_scale', 1.0) * factor
            optimizer.add_param_group({**group, 'params': theirs, 'lr_scale': scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]


def create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> Tuple[Optional[Any], int]:
    """timm's schedule, None for ``--sched none``, and the number of epochs with cool-down."""
    if args.sched == 'plateau':
        raise UserError('--sched plateau: timm gives it up, because a resumed run would not go on as it had begun.')
    with blame(f'--sched {args.sched} cannot be made'):
        return create_scheduler_v2(
            optimizer, **scheduler_kwargs(args, decreasing_metric=False), updates_per_epoch=updates_per_epoch
        )
