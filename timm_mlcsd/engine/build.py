"""Network and loss, from their configuration."""

import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union

import torch
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss

from .._timm import resolve_input_data_config
from ..data import IMAGE_MODE, default_image_mode
from ..errors import UserError, as_user_error
from ..losses import MLCSDLoss
from ..models import MultiExitModel, create_model
from ..task import MLCSDTask
from .data_config import DataConfig
from .loaders import AugmentConfig, mixup_active

__all__ = [
    'LossConfig',
    'ModelConfig',
    'build_criterion',
    'build_model',
    'check_heads_only',
    'resolve_data_config',
    'model_identity',
    'model_kwargs',
    'synchronize_norms',
]

_logger = logging.getLogger(__name__)


@dataclass
class ModelConfig:
    """The network and the weights that it starts from.

    Attributes:
        model: Registered name, or ``hf-hub:REPO``.
        exits: Number of exits or names of the tapped modules, None for the default.
        exit_head: Kind of head, None for the default.
        exit_pool: Kind of pool, None for the default.
        small_input: Whether the first two downsamplings are taken out.
        pretrained_backbone: Whether the backbone starts from timm's weights, or the tag of these.
        pretrained: Whether the whole network starts from stored weights.
        initial_checkpoint: File of weights to start from, of the network or of its backbone.
        heads_only: Whether only the exits train, or for how many epochs.
        num_classes: Number of classes, None for that of the data.
        gp: Global pool of the backbone.
        grad_checkpointing: Whether blocks are computed again in the backward pass.
        drop: Dropout rate.
        drop_path: Drop path rate.
        drop_block: Drop block rate.
        model_kwargs: Further arguments of the network.
    """

    model: str = 'mlcsd_resnet18'
    exits: Union[int, List[str], None] = None
    exit_head: Optional[str] = None
    exit_pool: Optional[str] = None
    small_input: bool = False
    pretrained_backbone: Union[bool, str] = False
    pretrained: bool = False
    initial_checkpoint: str = ''
    heads_only: Union[bool, int] = False
    num_classes: Optional[int] = None
    gp: Optional[str] = None
    grad_checkpointing: bool = False
    drop: Optional[float] = None
    drop_path: Optional[float] = None
    drop_block: Optional[float] = None
    model_kwargs: Dict[str, Any] = field(default_factory=dict)


@dataclass
class LossConfig:
    """The loss: see `MLCSDLoss`.

    Attributes:
        distill: Teacher of the exits.
        distill_method: How exits learn from their teacher.
        alpha: Weight of L_KD, None for the method's default.
        beta: Weight of L_HT.
        gamma: Weight of L_CLS.
        temperature: T.
        distill_warmup_epochs: Epochs in which alpha and beta grow from 0.
        distill_ramp: ``accuracy`` scales distillation by each exit's training accuracy, ``none`` does not.
        exit_weights: Weight of each exit, None for 1.
        cwem_supervision: What trains the CWEM.
        smoothing: Label smoothing.
        bce_loss: Whether L_CLS is binary cross-entropy.
        bce_sum: Whether that is summed over the classes.
        bce_target_thresh: Threshold that makes its soft targets binary.
    """

    distill: str = 'all-for-all'
    distill_method: str = 'kd'
    alpha: Optional[float] = None
    beta: float = 10.0
    gamma: float = 1.0
    temperature: float = 4.0
    distill_warmup_epochs: int = 0
    distill_ramp: str = 'accuracy'
    exit_weights: Optional[List[float]] = None
    cwem_supervision: str = 'ce'
    smoothing: float = 0.1
    bce_loss: bool = False
    bce_sum: bool = False
    bce_target_thresh: Optional[float] = None


def model_kwargs(config: ModelConfig, num_classes: int, in_chans: Optional[int] = None) -> Dict[str, Any]:
    """Arguments with which ``timm.create_model`` makes the network again, without its weights."""
    model_args = dict(
        num_classes=num_classes,
        in_chans=in_chans,
        exits=config.exits,
        exit_head=config.exit_head,
        exit_pool=config.exit_pool,
        small_input=config.small_input or None,
        global_pool=config.gp,
        drop_rate=config.drop,
        drop_path_rate=config.drop_path,
        drop_block_rate=config.drop_block,
    )
    return {k: v for k, v in {**model_args, **config.model_kwargs}.items() if v is not None}


def build_model(name: str, **model_args: Any) -> MultiExitModel:
    """`create_model`, with its errors as `UserError`."""
    with as_user_error('--model'):
        return create_model(name, **model_args)


def model_identity(model: MultiExitModel, name: str, model_args: Dict[str, Any]) -> Dict[str, Any]:
    """Registered name and arguments that make the same network again, also for a network of the Hub or a folder."""
    if ':' in name:
        # timm keeps the arguments stored with a model together with those given
        model_args = {k: v for k, v in getattr(model, '_model_args', {}).items() if k != 'pretrained_backbone'}
    return dict(arch=model.default_cfg['architecture'], model_args={**model_args, **model.exit_args})


def resolve_data_config(
    data: DataConfig, model: MultiExitModel, stored: Optional[Dict[str, Any]] = None
) -> Dict[str, Any]:
    """Input size, normalisation and crop of the images.

    Args:
        data: Settings of the user.
        model: The network, whose own values come last.
        stored: Preprocessing stored with a checkpoint, which comes second.

    Raises:
        UserError: The values do not fit the network.
    """
    # timm's name for networks that are made for one size
    fixed = data.img_size and getattr(model, 'backbone', model).pretrained_cfg.get('fixed_input_size')
    hint = f' (--model-kwargs img_size={data.img_size} makes it for that size)' if fixed else ''
    with as_user_error(f'the data flags do not fit the model{hint}'):
        config = resolve_input_data_config(model, vars(data), pretrained_cfg=stored)
        model.check_input_size(*config['input_size'][1:])
        mode = data.input_img_mode or (stored or {}).get(IMAGE_MODE)
        if mode and mode != default_image_mode(config['input_size'][0]):
            config[IMAGE_MODE] = mode
    return config


def check_heads_only(config: ModelConfig, model: MultiExitModel, resumed: bool) -> None:
    """Refuse to freeze a backbone that is untrained, or that has no exits apart from it."""
    if not hasattr(model, 'freeze_backbone'):
        raise UserError(f'--heads-only: {config.model} was made with its exits, it has no backbone of its own.')
    if model.num_exits == 1:
        raise UserError('--heads-only: --exits 1 is the plain backbone, nothing would train.')
    if resumed or config.initial_checkpoint:
        return
    if not (config.pretrained_backbone or config.pretrained):
        raise UserError(
            '--heads-only leaves the backbone as it is, which is random so far: name its weights with '
            '--initial-checkpoint FILE, or take those of --model with --pretrained-backbone or --pretrained.'
        )
    source = getattr(model, 'backbone', model) if config.pretrained_backbone else model
    classes = source.pretrained_cfg.get('num_classes')
    if classes != model.num_classes:
        raise UserError(
            f'--heads-only: these weights know {classes} classes and the data has {model.num_classes}, so the last '
            f'exit is new and would stay random; train all of it, or bring weights with --initial-checkpoint FILE.'
        )
    if config.small_input and config.pretrained_backbone:
        raise UserError('--heads-only: with --small-input the first layers of pretrained weights are new, and random.')


def synchronize_norms(task: MLCSDTask, device: torch.device) -> None:
    """One BatchNorm over all processes, in network and loss."""
    if device.type != 'cuda':
        raise UserError(f'--sync-bn works on GPUs alone, not on --device {device.type}.')
    task.trainable_module = convert_sync_batchnorm(task.trainable_module)


def build_criterion(
    config: LossConfig, augment: AugmentConfig, model: MultiExitModel, num_samples: Optional[int] = None
) -> MLCSDLoss:
    """Create the loss.

    Args:
        config: The loss.
        augment: Augmentation, which may make soft targets.
        model: The network.
        num_samples: Number of images in the training set, None for a stream.

    Raises:
        UserError: The settings do not go together.
    """
    with as_user_error('the loss cannot be made'):
        cls_loss = create_classification_loss(
            'bce' if config.bce_loss else 'ce',
            smoothing=config.smoothing,
            soft_targets=mixup_active(augment),
            bce_target_thresh=config.bce_target_thresh,
            bce_sum=config.bce_sum,
        )
        criterion = MLCSDLoss(
            model.num_exits,
            model.exit_feature_dim,
            alpha=config.alpha,
            beta=config.beta,
            gamma=config.gamma,
            temperature=config.temperature,
            cls_loss=cls_loss,
            exit_weights=config.exit_weights,
            distill=config.distill,
            cwem_supervision=config.cwem_supervision,
            method=config.distill_method,
            distill_ramp=config.distill_ramp,
            num_samples=num_samples,
        )
    flag = f'--distill-method {config.distill_method}'
    if criterion.needs_hard_labels and mixup_active(augment):
        raise UserError(f'{flag} is about single images and their classes: leave out --mixup and --cutmix.')
    if criterion.needs_indices and num_samples is None:
        raise UserError(f'{flag} remembers every image: it cannot train on a stream.')
    return criterion
