"""Flags that contradict each other, though each is right alone."""

import argparse
from typing import Any, Dict, Sequence

from ..errors import UserError

__all__ = ['check_combinations']

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


def check_combinations(args: argparse.Namespace) -> None:
    """Refuse contradictions among the flags of train.py, or among those that validate.py shares.

    Raises:
        UserError: There is one.
    """
    _check_input(args)
    if 'opt' not in args:  # validate.py
        return
    _check_own_flags('--model-kwargs', args.model_kwargs, _MODEL_FLAGS)
    _check_own_flags('--opt-kwargs', args.opt_args, _OPTIMIZER_FLAGS)
    if args.exit_weights and not any(args.exit_weights):
        raise _mistake('--exit-weights', args.exit_weights, 'one number above 0 or more: with none, no exit trains')
    if not args.gamma and (args.distill == 'none' or args.exits == 1 or (args.alpha == 0 and args.beta == 0)):
        raise UserError('--gamma 0: nothing is left to train with, neither labels nor distillation.')
    if args.lr_noise and (len(args.lr_noise) > 2 or not _increase(args.lr_noise)):
        raise _mistake('--lr-noise', args.lr_noise, 'where it begins, and perhaps a later place where it ends')
    if not _increase(args.decay_milestones):
        raise _mistake('--decay-milestones', args.decay_milestones, 'epochs in increasing order')
    if args.decay_rate > 1 and args.sched != 'poly':
        raise _mistake('--decay-rate', [args.decay_rate], 'at most 1: only the power of --sched poly may be larger')
    if args.cutmix_minmax and not _increase(args.cutmix_minmax):
        raise _mistake('--cutmix-minmax', args.cutmix_minmax, 'the smaller share first')
    for flag, bounds in (('--scale', args.scale), ('--ratio', args.ratio)):
        if bounds[0] > bounds[1]:
            raise _mistake(flag, bounds, 'the smaller number first')


def _check_input(args: argparse.Namespace) -> None:
    if args.input_size:
        channels, *size = args.input_size
        if args.img_size not in (None, *size) or (args.img_size and size[0] != size[1]):
            raise UserError(
                f'--input-size {_spelled(args.input_size)} contradicts --img-size {args.img_size}: give one of them.'
            )
        if args.in_chans not in (None, channels):
            raise UserError(
                f'--input-size {_spelled(args.input_size)} contradicts --in-chans {args.in_chans}: give one of them.'
            )
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    for name in ('mean', 'std'):
        value = getattr(args, name)
        if value and len(value) not in (1, channels):
            raise UserError(f'--{name} has {len(value)} values for {channels} channels.')


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
