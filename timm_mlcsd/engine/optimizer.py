"""Optimizer and schedule, both timm's, from their configuration."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from ..errors import UserError, as_user_error
from ..models import MultiExitModel
from ..task import MLCSDTask

__all__ = [
    'OptimizerConfig',
    'SchedulerConfig',
    'create_optimizer',
    'create_scheduler',
    'load_optimizer_state',
    'lr_rule',
    'scaled_lr',
]

# how PyTorch computes an update, not what
_IMPLEMENTATIONS = ('capturable', 'foreach', 'fused')


@dataclass
class OptimizerConfig:
    """Optimizer and learning rate, as in timm.

    Attributes:
        opt: Name of the optimizer.
        opt_eps: Epsilon, None for the optimizer's default.
        opt_betas: Betas, None for the optimizer's default.
        momentum: Momentum.
        weight_decay: Weight decay.
        layer_decay: Factor from one layer group to the one below, None for one rate for all.
        layer_decay_min_scale: Smallest such factor.
        exit_lr_mult: Learning rate of the exits and of the loss's own parameters, as a multiple.
        opt_args: Further arguments of the optimizer. On CUDA the fused implementation of PyTorch's optimizers is the
            default; ``fused=False`` or ``foreach=True`` is another.
        lr: Learning rate, None to derive it from `lr_base`.
        lr_base: Learning rate of an update of `lr_base_size` images.
        lr_base_size: Number of images per update that `lr_base` is for.
        lr_base_scale: How the rate grows with the images per update: ``linear``, ``sqrt``, or empty for timm's choice.
    """

    opt: str = 'sgd'
    opt_eps: Optional[float] = None
    opt_betas: Optional[List[float]] = None
    momentum: float = 0.9
    weight_decay: float = 2e-5
    layer_decay: Optional[float] = None
    layer_decay_min_scale: float = 0.0
    exit_lr_mult: float = 1.0
    opt_args: Dict[str, Any] = field(default_factory=dict)
    lr: Optional[float] = None
    lr_base: float = 0.1
    lr_base_size: int = 256
    lr_base_scale: str = ''


@dataclass
class SchedulerConfig:
    """Length of the training and schedule of the learning rate, as in timm.

    Attributes:
        epochs: Number of epochs, cool-down aside.
        sched: Name of the schedule.
        sched_on_updates: Whether the schedule steps on updates instead of epochs.
        lr_noise: Where noise on the learning rate begins and ends, as shares of the epochs.
        lr_noise_pct: Largest share of the rate that the noise adds or takes away.
        lr_noise_std: Standard deviation of the noise.
        lr_cycle_mul: Factor of the cycle length from cycle to cycle.
        lr_cycle_decay: Factor of the rate from cycle to cycle.
        lr_cycle_limit: Number of cycles.
        lr_k_decay: Exponent of the k-decay of cosine and poly.
        warmup_lr: Learning rate that warm-up begins with.
        min_lr: Smallest learning rate of cyclic schedules.
        decay_milestones: Epochs at which multistep lowers the rate.
        decay_epochs: Epochs between two decays of step.
        decay_rate: Factor of a decay.
        warmup_epochs: Number of warm-up epochs.
        warmup_prefix: Whether warm-up epochs come before the schedule instead of being its first ones.
        cooldown_epochs: Epochs at the smallest rate after the schedule.
    """

    epochs: int = 300
    sched: str = 'cosine'
    sched_on_updates: bool = False
    lr_noise: Optional[List[float]] = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    lr_cycle_mul: float = 1.0
    lr_cycle_decay: float = 0.5
    lr_cycle_limit: int = 1
    lr_k_decay: float = 1.0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_milestones: List[int] = field(default_factory=lambda: [90, 180, 270])
    decay_epochs: float = 90
    decay_rate: float = 0.1
    warmup_epochs: int = 5
    warmup_prefix: bool = False
    cooldown_epochs: int = 0


def lr_rule(config: OptimizerConfig) -> Optional[Tuple[float, int, str]]:
    """The values that the learning rate is derived from: `lr_base`, its images per update, and the kind of growth.

    None where `lr` is given.
    """
    if config.lr is not None:
        return None
    scale = config.lr_base_scale or ('sqrt' if any(o in config.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return config.lr_base, config.lr_base_size, scale


def scaled_lr(config: OptimizerConfig, images_per_update: int) -> float:
    """timm's rule: `lr` where it is given, else `lr_base` scaled by the number of images per update."""
    if config.lr is not None:
        return config.lr
    rule = lr_rule(config)
    assert rule is not None  # there is no lr
    base, size, scale = rule
    ratio = images_per_update / size
    return base * (ratio**0.5 if scale == 'sqrt' else ratio)


def create_optimizer(
    config: OptimizerConfig, task: MLCSDTask, model: MultiExitModel, has_scheduler: bool = True
) -> torch.optim.Optimizer:
    """Create timm's optimizer of network and loss.

    Args:
        config: The optimizer; `lr` is set.
        task: Task that owns network and loss.
        model: The network, whose exits learn at `exit_lr_mult` times the rate.
        has_scheduler: Whether a schedule will apply the rates of the groups.

    Raises:
        UserError: timm cannot create it.
    """
    with as_user_error(f'--opt {config.opt} cannot be made'):
        kwargs = optimizer_kwargs(cfg=config)
        optimizer = create_optimizer_v2(task.trainable_module, **_implementation(config, task), **kwargs)
    if config.exit_lr_mult != 1:
        exits = [*model.heads.parameters(), *task.criterion.parameters()]
        _scale_lr(optimizer, exits, config.exit_lr_mult)
    if not has_scheduler:
        # timm's schedules do this otherwise
        for group in optimizer.param_groups:
            group['lr'] *= group.get('lr_scale', 1.0)
    return optimizer


def _implementation(config: OptimizerConfig, task: MLCSDTask) -> Dict[str, Any]:
    """The arguments that choose PyTorch's fastest implementation: one kernel per update, fused, where there is one."""
    sharded = any(hasattr(p, 'to_local') for p in task.parameters())
    if task.device.type != 'cuda' or sharded or any(name in config.opt_args for name in _IMPLEMENTATIONS):
        return {}
    optimizer = get_optimizer_class(config.opt.lower().rpartition('_')[2], bind_defaults=False)
    # others have no fused kernels, or not in every PyTorch that is supported
    return {'fused': True} if optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) else {}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Dict[str, Any]) -> None:
    """Load the state of an optimizer that may have been on another device: its implementation is not taken over."""
    own = optimizer.param_groups
    groups = [
        {**group, **{name: mine[name] for name in _IMPLEMENTATIONS if name in mine}}
        for group, mine in zip(state['param_groups'], own)
    ]
    groups += state['param_groups'][len(own) :]
    optimizer.load_state_dict(dict(state, param_groups=groups))


def _scale_lr(optimizer: torch.optim.Optimizer, parameters: List[torch.nn.Parameter], factor: float) -> None:
    """Move parameters to groups of their own with an ``lr_scale``, which timm's schedules apply."""
    ids = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        theirs = [p for p in group['params'] if id(p) in ids]
        group['params'] = [p for p in group['params'] if id(p) not in ids]
        if theirs:
            scale = group.get('lr_scale', 1.0) * factor
            optimizer.add_param_group({**group, 'params': theirs, 'lr_scale': scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group['params']]


def create_scheduler(
    config: SchedulerConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int, seed: int = 42
) -> Tuple[Optional[Any], int]:
    """Create timm's schedule, None for ``none``; also returns the number of epochs with cool-down."""
    if config.sched == 'plateau':
        raise UserError('--sched plateau: timm gives it up, because a resumed run would not go on as it had begun.')
    with as_user_error(f'--sched {config.sched} cannot be made'):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            **{**scheduler_kwargs(config, decreasing_metric=False), 'noise_seed': seed},
            updates_per_epoch=updates_per_epoch,
        )
    return scheduler, num_epochs
