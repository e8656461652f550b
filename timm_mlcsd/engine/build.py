"""From flags to model, loss and device, with every mistake named."""

import argparse
import contextlib
import logging
import os
from typing import Any, ContextManager, Dict

import torch
from timm.loss import create_classification_loss
from timm.models import load_state_dict

from ..errors import UserError, shortened
from ..losses import MLCSDLoss
from ..models import MultiExitModel, create_named
from .loaders import mixup_active

__all__ = [
    'autocast_of',
    'build_criterion',
    'build_model',
    'load_initial_checkpoint',
    'model_args_of',
    'resolve_device',
]

_logger = logging.getLogger(__name__)


def resolve_device(args: argparse.Namespace) -> torch.device:
    """The device that ``--device`` names, or the best there is."""
    try:
        device = torch.device(args.device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'--device {args.device} cannot be used: {shortened(e)}') from None
    return device


def autocast_of(args: argparse.Namespace, device: torch.device) -> ContextManager:
    """The context for forward passes."""
    if not args.amp:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, args.amp_dtype))


def model_args_of(args: argparse.Namespace, num_classes: int) -> Dict[str, Any]:
    """What ``timm.create_model`` needs to build the network again, weights aside."""
    model_args = dict(
        num_classes=num_classes,
        in_chans=args.input_size[0] if args.input_size else args.in_chans,
        exits=args.exits,
        exit_head=args.exit_head,
        exit_pool=args.exit_pool,
        small_input=args.small_input,
        global_pool=args.gp,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=args.drop_block,
        **args.model_kwargs,
    )
    return {k: v for k, v in model_args.items() if v is not None}


def build_model(name: str, **model_args: Any) -> MultiExitModel:
    """`create_named`, its errors the user's."""
    try:
        return create_named(name, **model_args)
    except ValueError as e:
        raise UserError(f'--model: {e}') from None


def load_initial_checkpoint(model: MultiExitModel, path: str) -> None:
    """Start from the weights in `path`: of a multi-exit network like this one, or of its plain backbone."""
    if not os.path.isfile(path):
        raise UserError(f'--initial-checkpoint {path!r}: there is no such file.')
    try:
        state_dict = load_state_dict(path)
    except Exception as e:  # timm reads many formats, each with errors of its own
        raise UserError(f'--initial-checkpoint {path!r} cannot be read: {shortened(e)}') from None
    try:
        if any(name.startswith('heads.') for name in state_dict):
            model.load_state_dict(state_dict)
        else:
            model.load_backbone(state_dict)
    except (RuntimeError, ValueError) as e:
        raise UserError(f'--initial-checkpoint {path!r} does not fit the model: {shortened(e)}') from None
    _logger.info(f'Starting from {path}')


def build_criterion(args: argparse.Namespace, model: MultiExitModel) -> MLCSDLoss:
    """The loss that the flags describe."""
    if args.jsd_loss or args.aug_splits:
        raise UserError(
            '--jsd-loss/--aug-splits compare augmented copies of each image across the batch, while the teachers of '
            'self-distillation and their targets are per image; leave them out.'
        )
    if args.distill_warmup_epochs < 0:
        raise UserError(f'--distill-warmup-epochs {args.distill_warmup_epochs} must not be negative.')
    try:
        cls_loss = create_classification_loss(
            'bce' if args.bce_loss else 'ce',
            smoothing=args.smoothing,
            soft_targets=mixup_active(args),
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
        )
        return MLCSDLoss(
            model.num_exits,
            model.feature_dim,
            alpha=args.alpha,
            beta=args.beta,
            gamma=args.gamma,
            temperature=args.temperature,
            cls_loss=cls_loss,
            exit_weights=args.exit_weights,
            distill=args.distill,
            cwem_supervision=args.cwem_supervision,
        )
    except ValueError as e:
        raise UserError(str(e)) from None
