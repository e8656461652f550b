"""Checks of settings that are valid each, but contradict each other."""

import logging
from typing import Any, Dict, List, Sequence, Tuple

import torch

from ..distributed import DistributedContext
from ..errors import UserError
from .config import TrainConfig
from .data_config import DataConfig
from .loaders import AugmentConfig, mixup_active
from .optimizer import SchedulerConfig
from .setting_checks import check_settings

__all__ = [
    'check_combinations',
    'check_cuda_graphs',
    'check_fsdp',
    'check_input',
    'warn_of_idle_settings',
    'warn_of_learning_rates',
]

_logger = logging.getLogger(__name__)

_CYCLIC = ('cosine', 'tanh', 'poly')
# settings that only some of timm's schedules read
_SCHEDULES = dict(
    decay_milestones=('multistep',),
    decay_epochs=('step', 'wsd', 'rsqrt'),
    decay_rate=('step', 'multistep', 'poly'),
    lr_k_decay=('cosine', 'poly'),
    min_lr=(*_CYCLIC, 'wsd', 'rsqrt'),
    lr_cycle_mul=_CYCLIC,
    lr_cycle_decay=_CYCLIC,
    lr_cycle_limit=_CYCLIC,
)

_DISTILL = 'alpha beta temperature distill_method distill_warmup_epochs distill_ramp cwem_supervision'
_AUGMENTATION = (
    'train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob aa reprob'
)
_MIXUP = 'mixup_prob mixup_switch_prob mixup_mode mixup_off_epoch'

# arguments of the network and of the optimizer that have flags of their own
_MODEL_FLAGS = dict(
    num_classes='--num-classes',
    in_chans='--in-chans',
    exits='--exits',
    exit_head='--exit-head',
    exit_pool='--exit-pool',
    small_input='--small-input',
    global_pool='--gp',
    drop_rate='--drop',
    drop_path_rate='--drop-path',
    drop_block_rate='--drop-block',
    pretrained='--pretrained',
    pretrained_backbone='--pretrained-backbone',
)
_OPTIMIZER_FLAGS = dict(
    opt='--opt',
    lr='--lr',
    momentum='--momentum',
    weight_decay='--weight-decay',
    eps='--opt-eps',
    betas='--opt-betas',
    layer_decay='--layer-decay',
    layer_decay_min_scale='--layer-decay-min-scale',
)


def check_combinations(config: TrainConfig) -> None:
    """Refuse settings of a training outside of their ranges, and contradictions among them.

    Raises:
        UserError: There is one.
    """
    check_settings(config)
    check_input(config.data)
    _check_own_flags('--model-kwargs', config.model.model_kwargs, _MODEL_FLAGS)
    _check_own_flags('--opt-kwargs', config.optimizer.opt_args, _OPTIMIZER_FLAGS)
    _check_loss(config)
    _check_schedule(config.scheduler)
    _check_augmentation(config.augment)


def warn_of_idle_settings(config: TrainConfig) -> None:
    """Log the settings that have no effect because of others."""
    schedule, default = config.scheduler, SchedulerConfig()
    idle = [
        f'--{name.replace("_", "-")} with --sched {schedule.sched}'
        for name, schedules in _SCHEDULES.items()
        if getattr(schedule, name) != getattr(default, name) and schedule.sched not in schedules
    ]
    idle += [
        f'--{name.replace("_", "-")} {why}'
        for why, part, names in _unread_settings(config)
        for name in names.split()
        if getattr(part, name) != getattr(type(part)(), name)
    ]
    if idle:
        _logger.warning(f'Without effect: {", ".join(idle)}.')
    if schedule.warmup_epochs >= schedule.epochs and not schedule.warmup_prefix and schedule.sched != 'none':
        _logger.warning(
            f'--warmup-epochs {schedule.warmup_epochs}: the training of {schedule.epochs} epochs ends before the '
            f'learning rate is reached; give fewer.'
        )


def _unread_settings(config: TrainConfig) -> List[Tuple[str, Any, str]]:
    """Names of settings that others switch off, with the reason and the part of the configuration that has them."""
    loss, augment, optimizer, data = config.loss, config.augment, config.optimizer, config.data
    pads = config.augment.train_crop_mode == 'pad4'
    unread = [
        (config.loop.clip_grad is None, 'without --clip-grad', config.loop, 'clip_mode'),
        (not config.trainer.model_ema, 'without --model-ema', config.trainer, 'model_ema_decay model_ema_warmup'),
        (not config.scheduler.lr_noise, 'without --lr-noise', config.scheduler, 'lr_noise_pct lr_noise_std'),
        (not config.device.amp, 'without --amp', config.device, 'amp_dtype'),
        (not config.run.resume, 'without --resume', config.run, 'no_resume_opt'),
        (optimizer.layer_decay is None, 'without --layer-decay', optimizer, 'layer_decay_min_scale'),
        (optimizer.lr is not None, 'with --lr', optimizer, 'lr_base lr_base_size lr_base_scale'),
        (bool(data.val_split), 'with --val-split', data, 'val_fraction val_seed'),
        (loss.distill == 'none', 'with --distill none', loss, _DISTILL),
        (loss.distill_method not in ('kd', 'dkd'), f'with --distill-method {loss.distill_method}', loss, 'temperature'),
        (not loss.bce_loss, 'without --bce-loss', loss, 'bce_sum bce_target_thresh'),
        (augment.no_aug, 'with --no-aug', augment, _AUGMENTATION),
        (pads and not augment.no_aug, 'with --train-crop-mode pad4', augment, 'scale ratio train_interpolation'),
        (not augment.reprob, 'without --reprob', augment, 'remode recount'),
        (not mixup_active(augment), 'without --mixup or --cutmix', augment, _MIXUP),
    ]
    return [(why, part, names) for is_unread, why, part, names in unread if is_unread]


def warn_of_learning_rates(config: TrainConfig) -> None:
    """Warn of a schedule that begins or ends above the learning rate, which must be a number already."""
    schedule, lr = config.scheduler, config.optimizer.lr
    assert lr is not None
    if lr == 0:
        _logger.warning('--lr 0: the weights do not change after the warm-up; give a learning rate above 0.')
    ends = dict(min_lr=schedule.sched in _SCHEDULES['min_lr'], warmup_lr=schedule.warmup_epochs > 0)
    for name, is_read in ends.items():
        value = getattr(schedule, name)
        if is_read and schedule.sched != 'none' and value > lr:
            _logger.warning(
                f'--{name.replace("_", "-")} {value:g} is above the learning rate, {lr:g}; give a lower one.'
            )


def _check_loss(config: TrainConfig) -> None:
    loss = config.loss
    if loss.exit_weights and not any(loss.exit_weights):
        raise _mistake('--exit-weights', loss.exit_weights, 'one number above 0 or more: with none, no exit trains')
    no_distillation = loss.distill == 'none' or config.model.exits == 1 or (loss.alpha == 0 and loss.beta == 0)
    if not loss.gamma and no_distillation:
        raise UserError('--gamma 0: nothing is left to train with, neither labels nor distillation.')


def _check_schedule(schedule: SchedulerConfig) -> None:
    if schedule.lr_noise and (len(schedule.lr_noise) > 2 or not _increase(schedule.lr_noise)):
        raise _mistake('--lr-noise', schedule.lr_noise, 'where it begins, and perhaps a later place where it ends')
    if not _increase(schedule.decay_milestones):
        raise _mistake('--decay-milestones', schedule.decay_milestones, 'epochs in increasing order')
    if schedule.decay_rate > 1 and schedule.sched != 'poly':
        raise _mistake('--decay-rate', [schedule.decay_rate], 'at most 1: only the power of --sched poly may be larger')


def _check_augmentation(augment: AugmentConfig) -> None:
    if augment.cutmix_minmax and not _increase(augment.cutmix_minmax):
        raise _mistake('--cutmix-minmax', augment.cutmix_minmax, 'the smaller share first')
    for flag, bounds in (('--scale', augment.scale), ('--ratio', augment.ratio)):
        if not 0 < bounds[0] <= bounds[1]:
            raise _mistake(flag, bounds, 'the smaller number first, and both above 0')


def check_input(data: DataConfig) -> None:
    """Refuse contradictions among the sizes and channels of the images.

    Raises:
        UserError: There is one.
    """
    if data.input_size:
        channels, *size = data.input_size
        if data.img_size not in (None, *size) or (data.img_size and size[0] != size[1]):
            raise UserError(
                f'--input-size {_spelled(data.input_size)} contradicts --img-size {data.img_size}: give one of them.'
            )
        if data.in_chans not in (None, channels):
            raise UserError(
                f'--input-size {_spelled(data.input_size)} contradicts --in-chans {data.in_chans}: give one of them.'
            )
    channels = data.input_size[0] if data.input_size else data.in_chans or 3
    for name in ('mean', 'std'):
        value = getattr(data, name)
        if value and len(value) not in (1, channels):
            raise UserError(f'--{name} has {len(value)} values for {channels} channels.')


def check_fsdp(config: TrainConfig, dist_context: DistributedContext, device: torch.device) -> None:
    """Refuse what does not go together with ``--fsdp``."""
    if dist_context.size == 1:
        raise UserError('--fsdp shares a network out among processes: start several with torchrun.')
    switches = dict(
        model_ema=config.trainer.model_ema,
        torchcompile=config.device.torchcompile,
        heads_only=config.model.heads_only,
        sync_bn=config.trainer.sync_bn,
        grad_checkpointing=config.model.grad_checkpointing,
        cuda_graphs=config.loop.cuda_graphs,
    )
    others = [f'--{name.replace("_", "-")}' for name, given in switches.items() if given]
    if config.loop.clip_grad is not None and config.loop.clip_mode == 'agc':
        others.append('--clip-mode agc (take norm)')
    if config.device.amp and config.device.amp_dtype == 'float16':
        others.append('--amp-dtype float16 (take bfloat16)')
    if others:
        raise UserError(f'--fsdp does not go together with {", ".join(others)}.')
    # FSDP of torch 2.6 records events of this class, which has none there
    if device.type == 'cpu' and not hasattr(torch.cpu.Stream, 'record_event'):
        raise UserError(
            f'--fsdp --device cpu: torch {torch.__version__} shards networks on GPUs only; install a newer torch, or '
            f'leave --fsdp out.'
        )


def check_cuda_graphs(config: TrainConfig, device: torch.device) -> None:
    """Refuse what does not go together with ``--cuda-graphs``."""
    if device.type != 'cuda':
        raise UserError(f'--cuda-graphs: expected a CUDA device, got {device}; leave it out, or give --device cuda.')
    others = []
    if config.device.torchcompile:
        others.append('--torchcompile (its own graphs: --torchcompile-mode reduce-overhead)')
    if config.loss.distill_method == 'crd':
        others.append('--distill-method crd, whose memory changes with every batch')
    if config.model.grad_checkpointing:
        others.append('--grad-checkpointing, which reads random states')
    if config.trainer.sync_bn:
        others.append('--sync-bn, whose processes wait for each other')
    if others:
        raise UserError(f'--cuda-graphs does not go together with {"; ".join(others)}.')


def _check_own_flags(flag: str, given: Dict[str, Any], own: Dict[str, str]) -> None:
    for key in given:
        if key in own:
            raise UserError(f'{flag} {key}={given[key]}: {key} has a flag of its own, {own[key]}: give that.')


def _increase(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in zip(numbers, numbers[1:]))


def _spelled(values: Sequence[Any]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _mistake(flag: str, values: Sequence[float], expected: str) -> UserError:
    return UserError(f'{flag} {_spelled(values)}: expected {expected}.')
