"""MSDNet (Huang et al. 2018, "Multi-Scale Dense Networks for Resource Efficient Image Classification").

Layers and arguments as in the public implementation (kalviny/MSDNet-PyTorch): same parameters, multiply-adds and exits.
"""

import math
from typing import Any, List, Optional, Sequence, Tuple, Union

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
    """One scale of a layer: its map, and what convs make of it and of the finer map above it.

    Args:
        chs: Width of its map.
        finer_chs: Width of the finer map, None where there is none.
        growth: Channels it adds.
        factor: Bottleneck factor on its map.
        finer_factor: Bottleneck factor on the finer map.
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
    """One layer over all scales that are left: the coarsest `num_scales` of those it gets."""

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
    """A 1x1 conv layer on every scale."""

    def __init__(self, in_width: int, out_width: int, growths: Sequence[int]):
        super().__init__()
        self.scales = nn.ModuleList(conv_layer(in_width * g, out_width * g, 1) for g in growths)

    def forward(self, x: Scales) -> Scales:
        return tuple(scale(m) for scale, m in zip(self.scales, x))


class MSDNet(NativeMultiExit):
    """Every layer works on several scales at once, so that the first exit already has a coarse, classifiable map.

    The state between stages is the tuple of scales, finest first; exits read the coarsest.

    Args:
        num_classes: C, 0 for pooled features.
        in_chans: Channels of the images.
        num_blocks: Exits.
        base: Layers of the first block.
        step: Layers of every further block; with ``linear`` block i (from 0) has i * step + 1.
        step_mode: ``even`` or ``linear``.
        channels: Width of the finest scale at the start.
        growth_rate: Channels that a layer adds to it.
        growth_factors: One per scale: how much wider it is.
        bottleneck_factors: One per scale: width of the 1x1 convs over that of the 3x3 convs.
        prune: ``max`` drops a scale after every third of the layers (with three scales), ``min`` only what can't reach
            an exit any more. Where the layers don't divide by the scales, ``max`` leaves finer maps at the end that no
            exit reads, and weights without a gradient, as the public code does.
        reduction: Share of the channels that a transition keeps, 0 for no transitions.
        stem: ``cifar`` or ``imagenet``.
        global_pool: ``avg``; empty, with 0 classes only, for unpooled features at all exits.
        device: Where the weights are made.
        dtype: Their type.

    Raises:
        ValueError: The arguments make no network.
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
        num_scales = len(growth_factors)
        if not num_scales or len(bottleneck_factors) != num_scales:
            raise ValueError(
                f'growth_factors={tuple(growth_factors)} and bottleneck_factors={tuple(bottleneck_factors)} must have '
                f'one number per scale each.'
            )
        if min(num_blocks, base, step, channels, growth_rate) < 1:
            raise ValueError('num_blocks, base, step, channels and growth_rate must be at least 1.')
        if any(growth_rate * g % 2 for g in growth_factors[1:]):
            raise ValueError(
                f'growth_rate={growth_rate} times each of growth_factors={tuple(growth_factors)} but the first must be '
                f'even: half of it comes from the finer scale.'
            )
        if not 0 <= reduction <= 1:
            raise ValueError(f'reduction={reduction} must lie between 0 and 1.')
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
        steps = [base] + [step if step_mode == 'even' else step * i + 1 for i in range(1, num_blocks)]
        total, n, width = sum(steps), 0, channels
        stages, widths = [], []
        for depth in steps:
            layers: List[nn.Module] = []
            for _ in range(depth):
                n += 1
                num_in = _scales_left(n - 1, total, num_scales, prune) if n > 1 else num_scales
                num_out = _scales_left(n, total, num_scales, prune)
                layers.append(_Layer(width, growth_rate, num_in, num_out, growth_factors, bottleneck_factors))
                width += growth_rate
                thirds = (math.floor(total / 3), math.floor(2 * total / 3))
                if reduction and (num_in > num_out if prune == 'max' else n in thirds):
                    kept = transition_channels(reduction, width)
                    layers.append(_Transition(width, kept, growth_factors[num_scales - num_out :]))
                    width = kept
            stages.append(nn.Sequential(*layers))
            widths.append(width * growth_factors[-1])
        scale = (4 if stem == 'imagenet' else 1) * 2 ** (num_scales - 1)
        super().__init__(stages, widths, stem, scale, num_classes, in_chans, global_pool, model_args)
        self.stem = nn.ModuleList([make_stem(stem, in_chans, channels * growth_factors[0])])
        for finer, factor in zip(growth_factors, growth_factors[1:]):
            self.stem.append(conv_layer(channels * finer, channels * factor, stride=2))
        self.init_convs(self.stem)
        self.to(device=device, dtype=dtype)

    def forward_stage(self, k: int, state: Union[torch.Tensor, Scales]) -> Scales:
        if k == 0:
            scales = []
            for layer in self.stem:
                state = layer(state)
                scales.append(state)
            state = tuple(scales)
        return self.stages[k](state)

    def tap(self, state: Scales) -> torch.Tensor:
        return state[-1]


def _scales_left(layer: int, total: int, num_scales: int, prune: str) -> int:
    """How many scales, the coarsest ones, layer number `layer` (from 1) puts out."""
    if prune == 'min':
        return min(num_scales, total - layer + 1)
    return num_scales - (layer - 1) // math.ceil(total / num_scales)


default_cfgs = generate_default_cfgs({'mlcsd_msdnet': native_cfg('arXiv:1703.09844')})


@register_model
def mlcsd_msdnet(pretrained: bool = False, **kwargs: Any) -> MSDNet:
    """MSDNet; by default the paper's "base 2, step 3, block 8". Takes the arguments of `MSDNet`."""
    return create_native(MSDNet, 'mlcsd_msdnet', pretrained, **kwargs)
