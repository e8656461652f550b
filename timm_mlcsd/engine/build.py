"""From flags to model, loss and device, with every mistake named."""

import argparse
import contextlib
import logging
import os
from typing import Any, Callable, ContextManager, Dict, Optional

import torch
from timm.data.model_config import resolve_input_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import load_state_dict

from ..data import IMAGE_MODE, default_image_mode
from ..errors import UserError, blame
from ..losses import MLCSDLoss
from ..models import MultiExitModel, create_named, load_backbone
from ..task import MLCSDTask
from .loaders import mixup_active

__all__ = [
    'autocast_of',
    'build_criterion',
    'build_model',
    'check_heads_only',
    'compiled',
    'data_config_of',
    'identity_of',
    'load_initial_checkpoint',
    'model_args_of',
    'resolve_device',
    'synchronize_norms',
]

_logger = logging.getLogger(__name__)


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names, or the best there is."""
    backends = torch.compiler.list_backends(exclude_tags=())
    if args.torchcompile and args.torchcompile not in backends:
        raise UserError(f'--torchcompile {args.torchcompile} is unknown; choose one of {", ".join(backends)}.')
    if args.torchcompile_mode and not args.torchcompile:
        raise UserError(f'--torchcompile-mode {args.torchcompile_mode} does nothing without --torchcompile.')
    with blame(f'--device {args.device} cannot be used'):
        device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if device.type == 'meta':
            raise UserError('--device meta: expected a device that computes, cpu or cuda say.')
        if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
            device = _own_gpu(device)
        if device.index is not None and device.type == 'cuda':
            torch.cuda.set_device(device)  # whose random numbers a checkpoint keeps
        torch.empty(0, device=device)
    return device


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of one of the processes that torchrun has started."""
    rank, count = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
    if device.index is not None:
        raise UserError(
            f'--device {device} is one GPU for all processes of torchrun: --device cuda gives each its own.'
        )
    if rank >= count:
        raise UserError(
            f'{count} GPUs for {os.environ.get("LOCAL_WORLD_SIZE")} processes on this machine: start no more than that '
            f'(torchrun --nproc-per-node), or train with --device cpu.'
        )
    return torch.device('cuda', rank)


def compiled(forward: Callable, args: argparse.Namespace) -> Callable:
    """The function as ``--torchcompile`` wants it, unchanged without that flag."""
    if not args.torchcompile:
        return forward
    with blame(f'--torchcompile {args.torchcompile} --torchcompile-mode {args.torchcompile_mode}'):
        return torch.compile(forward, backend=args.torchcompile, mode=args.torchcompile_mode)


def autocast_of(args: argparse.Namespace, device: torch.device) -> ContextManager:
    """The context for forward passes."""
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype))


def model_args_of(args: argparse.Namespace, num_classes: int) -> Dict[str, Any]:
    """What ``timm.create_model`` needs to build the network again, weights aside."""
    model_args = dict(
        num_classes=num_classes,
        in_chans=args.in_chans,
        exits=args.exits,
        exit_head=args.exit_head,
        exit_pool=args.exit_pool,
        small_input=args.small_input or None,
        global_pool=args.gp,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
    )
    return {k: v for k, v in {**model_args, **args.model_kwargs}.items() if v is not None}


def build_model(name: str, **model_args: Any) -> MultiExitModel:
    """`create_named`, its errors the user's."""
    with blame('--model'):
        return create_named(name, **model_args)


def identity_of(model: MultiExitModel, name: str, model_args: Dict[str, Any]) -> Dict[str, Any]:
    """Registered name and arguments that make the same network again, also where it came from the Hub or a folder."""
    if ':' in name:
        # timm keeps the arguments stored with a model together with those given
        model_args = {k: v for k, v in model._model_args.items() if k != 'pretrained_backbone'}
    return dict(arch=model.default_cfg['architecture'], model_args={**model_args, **model.exit_args})


def data_config_of(
    args: argparse.Namespace, model: MultiExitModel, stored: Optional[Dict[str, Any]] = None
) -> Dict[str, Any]:
    """Input size, normalisation and crop: from the flags, else as stored in a checkpoint, else the model's own."""
    # timm's name for networks that are made for one size
    fixed = args.img_size and getattr(model, 'backbone', model).pretrained_cfg.get('fixed_input_size')
    hint = f' (--model-kwargs img_size={args.img_size} makes it for that size)' if fixed else ''
    with blame(f'the data flags do not fit the model{hint}'):
        config = resolve_input_data_config(model, vars(args), pretrained_cfg=stored)
        model.check_input_size(*config['input_size'][1:])
        mode = args.input_img_mode or (stored or {}).get(IMAGE_MODE)
        if mode and mode != default_image_mode(config['input_size'][0]):
            config[IMAGE_MODE] = mode
    return config


def load_initial_checkpoint(model: MultiExitModel, path: str) -> None:
    """Start from the weights in `path`: of a multi-exit network like this one, or of its plain backbone."""
    if not os.path.isfile(path):
        raise UserError(f'--initial-checkpoint {path!r}: there is no such file.')
    with blame(f'--initial-checkpoint {path!r} cannot be read'):
        state_dict = load_state_dict(path)
    with blame(f'--initial-checkpoint {path!r} does not fit the model'):
        if model.num_exits > 1 and any(name.startswith('heads.') for name in state_dict):
            model.load_state_dict(state_dict)
        else:
            load_backbone(model, state_dict)
    _logger.info(f'Starting from {path}')


def check_heads_only(args: argparse.Namespace, model: MultiExitModel, resumed: bool) -> None:
    """Refuse to leave alone what has not been trained, or cannot be told from the exits."""
    if not hasattr(model, 'freeze_backbone'):
        raise UserError(f'--heads-only: {args.model} was made with its exits, it has no backbone of its own.')
    if model.num_exits == 1:
        raise UserError('--heads-only: --exits 1 is the plain backbone, nothing would train.')
    if resumed or args.initial_checkpoint:
        return
    if not (args.pretrained_backbone or args.pretrained):
        raise UserError(
            '--heads-only leaves the backbone as it is, which is random so far: name its weights with '
            '--initial-checkpoint FILE, or take those of --model with --pretrained-backbone or --pretrained.'
        )
    classes = (model.backbone if args.pretrained_backbone else model).pretrained_cfg.get('num_classes')
    if classes != model.num_classes:
        raise UserError(
            f'--heads-only: these weights know {classes} classes and the data has {model.num_classes}, so the last '
            f'exit is new and would stay random; train all of it, or bring weights with --initial-checkpoint FILE.'
        )
    if args.small_input and args.pretrained_backbone:
        raise UserError('--heads-only: with --small-input the first layers of pretrained weights are new, and random.')


def synchronize_norms(task: MLCSDTask, device: torch.device) -> None:
    """One BatchNorm over all processes, in network and loss."""
    if device.type != 'cuda':
        raise UserError(f'--sync-bn works on GPUs alone, not on --device {device.type}.')
    task.trainable_module = convert_sync_batchnorm(task.trainable_module)


def build_criterion(args: argparse.Namespace, model: MultiExitModel, num_samples: Optional[int] = None) -> MLCSDLoss:
    """The loss that the flags describe, for a training set of `num_samples` images."""
    if args.jsd_loss or args.aug_splits:
        raise UserError(
            '--jsd-loss/--aug-splits compare augmented copies of each image across the batch, while the teachers of '
            'self-distillation and their targets are per image; leave them out.'
        )
    with blame('the loss cannot be made'):
        cls_loss = create_classification_loss(
            'bce' if args.bce_loss else 'ce',
            smoothing=args.smoothing,
            soft_targets=mixup_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
        )
        criterion = MLCSDLoss(
            model.num_exits,
            model.exit_feature_dim,
            alpha=args.alpha,
            beta=args.beta,
            gamma=args.gamma,
            temperature=args.temperature,
            cls_loss=cls_loss,
            exit_weights=args.exit_weights,
            distill=args.distill,
            cwem_supervision=args.cwem_supervision,
            method=args.distill_method,
            distill_ramp=args.distill_ramp,
            pool_momentum=args.pool_momentum,
            num_samples=num_samples,
            num_classes=model.num_classes,
        )
    flag = f'--pool-momentum {args.pool_momentum}' if criterion.memory else f'--distill-method {args.distill_method}'
    if criterion.needs_hard_labels and mixup_active(args):
        raise UserError(f'{flag} is about single images and their classes: leave out --mixup and --cutmix.')
    if criterion.needs_indices and num_samples is None:
        raise UserError(f'{flag} remembers every image: it cannot train on a stream.')
    return criterion
