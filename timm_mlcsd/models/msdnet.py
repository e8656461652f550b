"""MSDNet (Huang et al. 2018, "Multi-Scale Dense Networks for Resource Efficient Image Classification").

Layers and arguments follow the public implementation (kalviny/MSDNet-PyTorch): same parameters, MACs and exits.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model

from .native import (
    STEMS,
    STEP_MODES,
    NativeMultiExit,
    bottleneck_conv,
    check_choice,
    conv_layer,
    create_native,
    native_cfg,
    transition_channels,
)
from .native import stem as make_stem

__all__ = ['MSDNet']  # timm's register_model adds the model

PRUNES = ('max', 'min')

Scales = Tuple[torch.Tensor, ...]


class _DenseScale(nn.Module):
    """One scale of a layer: its input map, concatenated with convs of this map and of the next finer map.

    Args:
        chs: Channels of the input map.
        finer_chs: Channels of the next finer map; None if there is none.
        growth: Channels that the scale adds.
        factor: Bottleneck factor of the conv on the input map.
        finer_factor: Bottleneck factor of the conv on the finer map.
    """

    def __init__(self, chs: int, finer_chs: Union[int, None], growth: int, factor: int, finer_factor: int):
        super().__init__()
        own = growth if finer_chs is None else growth // 2
        self.down = None if finer_chs is None else bottleneck_conv(finer_chs, own, finer_factor, stride=2)
        self.normal = bottleneck_conv(chs, own, factor)

    def forward(self, x: torch.Tensor, finer: Union[torch.Tensor, None]) -> torch.Tensor:
        new = (self.normal(x),) if self.down is None else (self.down(finer), self.normal(x))
        return torch.cat((x, *new), dim=1)


class _Layer(nn.Module):
    """One layer over the coarsest `num_scales` scales of its input.

    Args:
        width: Input channels, over the growth factor of a scale.
        growth: Channels that the layer adds, over the growth factor of a scale.
        num_in: Number of input scales.
        num_scales: Number of output scales.
        growths: Growth factors of all scales of the network, finest first.
        factors: Bottleneck factors of all scales of the network, finest first.
    """

    def __init__(
        self, width: int, growth: int, num_in: int, num_scales: int, growths: Sequence[int], factors: Sequence[int]
    ):
        super().__init__()
        first = len(growths) - num_scales
        self.dropped = num_in - num_scales  # the finest ones
        self.scales = nn.ModuleList()
        for s in range(first, len(growths)):
            has_finer = s > first or self.dropped
            finer = (width * growths[s - 1], factors[s - 1]) if has_finer else (None, 0)
            self.scales.append(_DenseScale(width * growths[s], finer[0], growth * growths[s], factors[s], finer[1]))

    def forward(self, x: Scales) -> Scales:
        finer = x[self.dropped - 1 : -1] if self.dropped else (None, *x[:-1])
        return tuple(scale(m, f) for scale, m, f in zip(self.scales, x[self.dropped :], finer))


class _Transition(nn.Module):
    """1x1 conv layer on every scale, to reduce the channels.

    Args:
        in_width: Input channels, over the growth factor of a scale.
        out_width: Output channels, over the growth factor of a scale.
        growths: Growth factors of the scales, finest first.
    """

    def __init__(self, in_width: int, out_width: int, growths: Sequence[int]):
        super().__init__()
        self.scales = nn.ModuleList(conv_layer(in_width * g, out_width * g, 1) for g in growths)

    def forward(self, x: Scales) -> Scales:
        return tuple(scale(m) for scale, m in zip(self.scales, x))


class MSDNet(NativeMultiExit):
    """Network whose layers work on several scales at once, so that the first exit already reads a coarse map.

    The state between stages is the tuple of the maps of all scales, finest first; exits read the coarsest map.

    Args:
        num_classes: Number of classes C; 0 for pooled features instead of logits. Default 1000.
        in_chans: Channels of the images; default 3.
        num_blocks: Number of blocks, which is the number of exits K; default 8.
        base: Layers of the first block; default 2.
        step: Layers of every further block; with ``linear``, block i (from 0) has i * step + 1. Default 3.
        step_mode: ``even`` (default) or ``linear``.
        channels: Channels of the finest scale after the stem; default 16.
        growth_rate: Channels that a layer adds to the finest scale; default 6.
        growth_factors: Factors of `channels` and `growth_rate`, one per scale, finest first; default (1, 2, 4).
        bottleneck_factors: Channels of the 1x1 convs over those of the 3x3 convs, one per scale; default (1, 2, 4).
        prune: ``max`` (default) divides the layers into as many equal parts as there are scales and drops the finest
            scale after each part; ``min`` drops only scales that can no longer reach an exit. If the layers do not
            divide evenly, ``max`` keeps finer maps at the end that no exit reads, and weights without gradients, as in
            the public implementation.
        reduction: Share of the channels that a transition keeps; 0 for no transitions. Default 0.5.
        stem: ``cifar`` (default) or ``imagenet``.
        global_pool: ``avg`` (default); empty, with 0 classes only, for unpooled features at all exits.
        device: Device of the weights; default PyTorch's.
        dtype: Type of the weights; default PyTorch's.

    Raises:
        ValueError: An argument is unknown or out of range, or the arguments do not fit together.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        num_blocks: int = 8,
        base: int = 2,
        step: int = 3,
        step_mode: str = 'even',
        channels: int = 16,
        growth_rate: int = 6,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck_factors: Sequence[int] = (1, 2, 4),
        prune: str = 'max',
        reduction: float = 0.5,
        stem: str = 'cifar',
        global_pool: str = 'avg',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_choice('step_mode', step_mode, STEP_MODES)
        check_choice('prune', prune, PRUNES)
        check_choice('stem', stem, STEMS)
        model_args = dict(
            num_blocks=num_blocks,
            base=base,
            step=step,
            step_mode=step_mode,
            channels=channels,
            growth_rate=growth_rate,
            growth_factors=list(growth_factors),
            bottleneck_factors=list(bottleneck_factors),
            prune=prune,
            reduction=reduction,
            stem=stem,
        )
        _check_args(model_args)
        stages, widths = _make_stages(model_args)
        scale = (4 if stem == 'imagenet' else 1) * 2 ** (len(growth_factors) - 1)
        super().__init__(stages, widths, stem, scale, num_classes, in_chans, global_pool, model_args)
        self.stem = nn.ModuleList([make_stem(stem, in_chans, channels * growth_factors[0])])
        for finer, factor in zip(growth_factors, growth_factors[1:]):
            self.stem.append(conv_layer(channels * finer, channels * factor, stride=2))
        self.init_convs(self.stem)
        self.to(device=device, dtype=dtype)

    def forward_stage(self, k: int, state: Union[torch.Tensor, Scales]) -> Scales:
        """Compute the maps of stage k, finest first, from those of stage k-1 or from images [B, C, H, W]."""
        x: Any = state
        if k == 0:
            scales = []
            for layer in self.stem:
                x = layer(x)
                scales.append(x)
            x = tuple(scales)
        maps: Scales = self.stages[k](x)
        return maps

    def tap(self, state: Scales) -> torch.Tensor:
        """Return the coarsest map."""
        return state[-1]


def _check_args(args: Dict[str, Any]) -> None:
    """Raise a ValueError for arguments of `MSDNet` that describe no network."""
    growth_rate, growth_factors = args['growth_rate'], args['growth_factors']
    if not growth_factors or len(args['bottleneck_factors']) != len(growth_factors):
        raise ValueError(
            f'growth_factors={tuple(growth_factors)} and bottleneck_factors={tuple(args["bottleneck_factors"])} must '
            f'each have one number per scale.'
        )
    if min(args[name] for name in ('num_blocks', 'base', 'step', 'channels', 'growth_rate')) < 1:
        raise ValueError('num_blocks, base, step, channels and growth_rate must be at least 1.')
    if any(growth_rate * g % 2 for g in growth_factors[1:]):
        raise ValueError(
            f'growth_rate={growth_rate} times each of growth_factors={tuple(growth_factors)} but the first must be '
            f'even, because half of the new channels come from the finer scale.'
        )
    if not 0 <= args['reduction'] <= 1:
        raise ValueError(f'reduction={args["reduction"]}: expected a number from 0 to 1.')


def _make_stages(args: Dict[str, Any]) -> Tuple[List[nn.Module], List[int]]:
    """Make the stages, [K], and their numbers of channels at the coarsest scale, [K]."""
    growth_rate, growth_factors, reduction = args['growth_rate'], args['growth_factors'], args['reduction']
    num_scales, step, prune = len(growth_factors), args['step'], args['prune']
    further = [step if args['step_mode'] == 'even' else step * i + 1 for i in range(1, args['num_blocks'])]
    steps = [args['base'], *further]
    total, n, width = sum(steps), 0, args['channels']
    stages: List[nn.Module] = []
    widths: List[int] = []
    for depth in steps:
        layers: List[nn.Module] = []
        for _ in range(depth):
            n += 1
            num_in = _scales_left(n - 1, total, num_scales, prune) if n > 1 else num_scales
            num_out = _scales_left(n, total, num_scales, prune)
            layers.append(_Layer(width, growth_rate, num_in, num_out, growth_factors, args['bottleneck_factors']))
            width += growth_rate
            thirds = (math.floor(total / 3), math.floor(2 * total / 3))
            if reduction and (num_in > num_out if prune == 'max' else n in thirds):
                kept = transition_channels(reduction, width)
                layers.append(_Transition(width, kept, growth_factors[num_scales - num_out :]))
                width = kept
        stages.append(nn.Sequential(*layers))
        widths.append(width * growth_factors[-1])
    return stages, widths


def _scales_left(layer: int, total: int, num_scales: int, prune: str) -> int:
    """Return the number of output scales, the coarsest ones, of layer number `layer` (from 1)."""
    if prune == 'min':
        return min(num_scales, total - layer + 1)
    return num_scales - (layer - 1) // math.ceil(total / num_scales)


default_cfgs = generate_default_cfgs({'mlcsd_msdnet': native_cfg('arXiv:1703.09844')})


@register_model
def mlcsd_msdnet(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet, by default with the paper's "base 2, step 3, block 8"; takes the arguments of `MSDNet`."""
    return create_native(MSDNet, 'mlcsd_msdnet', pretrained, **kwargs)
