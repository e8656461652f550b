"""RANet (Yang et al. 2020, "Resolution Adaptive Networks for Efficient Inference").

Layers and arguments follow the public implementation (yangle15/RANet-pytorch): same parameters, MACs and exits.
"""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
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

__all__ = ['RANet']  # timm's register_model adds the model

Maps = Tuple[torch.Tensor, ...]


def _resized(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Resize the map `x` to the height and width of the map `like`."""
    size = like.shape[-2:]
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode='bilinear', align_corners=True)


class _DenseLayer(nn.Module):
    """Layer that adds channels to a map; in a fused layer some of them come from the next coarser sub-network.

    Args:
        chs: Input channels.
        growth: Channels that the layer adds.
        factor: Bottleneck factor.
        lower: Channels of the coarser sub-network's map, its bottleneck factor and its share of `growth`; default None
            for a layer that is not fused.
        down: Whether to halve the resolution; default False.
    """

    def __init__(
        self,
        chs: int,
        growth: int,
        factor: int,
        lower: Optional[Tuple[int, int, float]] = None,
        down: bool = False,
    ):
        super().__init__()
        own, self.up = growth, None
        if lower is not None:
            lower_chs, lower_factor, share = lower
            own = growth - math.floor(growth * share)
            self.up = bottleneck_conv(lower_chs, growth - own, lower_factor)
        self.normal = bottleneck_conv(chs, own, factor, stride=2 if down else 1)

    def forward(self, x: torch.Tensor, lower: Optional[torch.Tensor]) -> torch.Tensor:
        new = self.normal(x)
        if self.up is None:
            return torch.cat((x, new), dim=1)
        return torch.cat((_resized(x, new), _resized(self.up(lower), new), new), dim=1)


class _Block(nn.Module):
    """Dense layers, fused with the block of the same number in the next coarser sub-network if that has one.

    Args:
        chs: Input channels.
        depth: Number of layers.
        growth: Channels that a layer adds.
        factor: Bottleneck factor.
        keep: Share of the channels that the transition at the end keeps; None for no transition.
        lower: Channels of the coarser block's maps, its bottleneck factor and its share of the new channels; default
            None for a block that is not fused.
        down: Whether the last layer of a fused block halves the resolution; default False.

    Attributes:
        map_widths: Channels of the maps that the block of the next finer sub-network fuses: those of the input, then
            those of each layer, [depth + 1].
        width: Output channels.
    """

    def __init__(
        self,
        chs: int,
        depth: int,
        growth: int,
        factor: int,
        keep: Optional[float],
        lower: Optional[Tuple[Sequence[int], int, float]] = None,
        down: bool = False,
    ):
        super().__init__()
        self.map_widths = [chs + i * growth for i in range(depth + 1)]
        self.width = self.map_widths[-1]
        self.layers, self.last = nn.ModuleList(), None
        for i, width in enumerate(self.map_widths[:-1]):
            below = (lower[0][i], *lower[1:]) if lower else None
            self.layers.append(_DenseLayer(width, growth, factor, below, down and i == depth - 1))
        if lower:
            added = math.floor(self.width * lower[2])
            self.last = conv_layer(lower[0][depth], added, 1)
            self.width += added
        self.transition = None
        if keep is not None:
            kept = transition_channels(keep, self.width)
            self.transition = conv_layer(self.width, kept, 1)
            self.width = kept

    def forward(self, x: torch.Tensor, lower: Maps = ()) -> Tuple[torch.Tensor, Maps]:
        """Compute the output map and the maps for the finer block.

        Args:
            x: Input map [B, C, H, W].
            lower: Maps of the coarser block; default empty for a block that is not fused.

        Returns:
            Output map, and the input map followed by the output map of each layer.
        """
        maps = [x]
        for i, layer in enumerate(self.layers):
            maps.append(layer(maps[-1], lower[i] if self.last is not None else None))
        x = maps[-1]
        if self.last is not None:
            x = torch.cat((x, _resized(self.last(lower[len(self.layers)]), x)), dim=1)
        return x if self.transition is None else self.transition(x), tuple(maps)


class RANet(NativeMultiExit):
    """Network of sub-networks from coarse to fine; a finer one runs only for images that no coarser exit accepted.

    Sub-network i (from 0) has ``num_blocks + i * block_step`` blocks. Exits follow the blocks whose number exceeds the
    blocks of the next coarser sub-network. The state between stages is (map, input maps of the finer sub-networks, maps
    of every block of this sub-network that the next finer one fuses).

    Args:
        num_classes: Number of classes C; 0 for pooled features instead of logits. Default 1000.
        in_chans: Channels of the images; default 3.
        num_blocks: Blocks of the coarsest sub-network; default 2.
        block_step: Additional blocks of every finer sub-network; default 2.
        step: Layers of a block; with ``linear``, block j (from 0) has (j + 1) * step. Default 3.
        step_mode: ``even`` (default) or ``linear``.
        channels: Channels of the input map of a sub-network, over its growth factor; default 16.
        growth_rate: Channels that a layer adds, over the growth factor; default 6.
        scales: Resolution per sub-network, coarsest first: 1 for the coarsest, doubled with each increment. Default
            (1, 2, 3, 3).
        growth_factors: Factors of `channels` and `growth_rate`, one per sub-network; default (4, 2, 2, 1).
        bottleneck_factors: Channels of the 1x1 convs over those of the 3x3 convs, one per sub-network; default
            (4, 2, 2, 1).
        compress_factor: Share of the new channels of a fused layer that come from the coarser sub-network; default
            0.25.
        reduction: Share of the channels that a transition keeps; default 0.5.
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
        num_blocks: int = 2,
        block_step: int = 2,
        step: int = 3,
        step_mode: str = 'even',
        channels: int = 16,
        growth_rate: int = 6,
        scales: Sequence[int] = (1, 2, 3, 3),
        growth_factors: Sequence[int] = (4, 2, 2, 1),
        bottleneck_factors: Sequence[int] = (4, 2, 2, 1),
        compress_factor: float = 0.25,
        reduction: float = 0.5,
        stem: str = 'cifar',
        global_pool: str = 'avg',
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        check_choice('step_mode', step_mode, STEP_MODES)
        check_choice('stem', stem, STEMS)
        model_args = dict(
            num_blocks=num_blocks,
            block_step=block_step,
            step=step,
            step_mode=step_mode,
            channels=channels,
            growth_rate=growth_rate,
            scales=list(scales),
            growth_factors=list(growth_factors),
            bottleneck_factors=list(bottleneck_factors),
            compress_factor=compress_factor,
            reduction=reduction,
            stem=stem,
        )
        _check_args(model_args)
        parts = _make_stages(model_args)
        reduction_of_stem = 4 if stem == 'imagenet' else 1
        scale = reduction_of_stem * 2 ** (scales[-1] - 1)
        super().__init__(parts.stages, parts.widths, stem, scale, num_classes, in_chans, global_pool, model_args)
        self.first_exits = parts.first_exits
        # finest first
        self.stem = nn.ModuleList([make_stem(stem, in_chans, channels * growth_factors[-1])])
        for i in range(len(scales) - 1, 0, -1):
            stride = 1 if scales[i] == scales[i - 1] else 2
            self.stem.append(conv_layer(channels * growth_factors[i], channels * growth_factors[i - 1], stride=stride))
        self.init_convs(self.stem)
        self.to(device=device, dtype=dtype)

    def forward_stage(self, k: int, state: Union[torch.Tensor, Tuple[torch.Tensor, Maps, Tuple[Maps, ...]]]) -> Any:
        """Compute the state of stage k from that of stage k-1, or from images [B, C, H, W] for stage 0."""
        x: Any
        starts: Maps
        maps: Tuple[Maps, ...]
        lower: Tuple[Maps, ...]
        if k == 0:
            x = state
            found = []
            for layer in self.stem:
                x = layer(x)
                found.append(x)
            # the coarsest is needed first
            starts, maps, lower = tuple(found[:-1]), (), ()
        else:
            x, starts, maps = state
            lower = ()
            if k in self.first_exits:
                x, starts, maps, lower = starts[-1], starts[:-1], (), maps
        blocks: Any = self.stages[k]
        for i, block in enumerate(blocks):
            x, own = block(x, lower[i] if i < len(lower) else ())
            maps = (*maps, own)
        # the maps of the finest sub-network are not fused
        return x, starts, maps if starts else ()

    def tap(self, state: Tuple[torch.Tensor, Maps, Tuple[Maps, ...]]) -> torch.Tensor:
        """Return the map that the exit reads."""
        return state[0]


default_cfgs = generate_default_cfgs({'mlcsd_ranet': native_cfg('arXiv:2003.07326')})


@register_model
def mlcsd_ranet(pretrained: bool = False, **kwargs: Any) -> RANet:
    """RANet, by default with 8 exits; takes the arguments of `RANet`."""
    return create_native(RANet, 'mlcsd_ranet', pretrained, **kwargs)


class _Stages(NamedTuple):
    """Stages of all sub-networks in the order in which they run.

    Attributes:
        stages: One module per exit, [K].
        widths: Channels at each exit, [K].
        first_exits: Index of the first exit of each sub-network.
    """

    stages: List[nn.Module]
    widths: List[int]
    first_exits: List[int]


def _check_args(args: Dict[str, Any]) -> None:
    """Raise a ValueError for arguments of `RANet` that describe no network."""
    scales, growth_factors, bottleneck_factors = args['scales'], args['growth_factors'], args['bottleneck_factors']
    growth_rate, compress_factor = args['growth_rate'], args['compress_factor']
    if not len(scales) == len(growth_factors) == len(bottleneck_factors) > 0:
        raise ValueError(
            f'scales={tuple(scales)}, growth_factors={tuple(growth_factors)} and bottleneck_factors='
            f'{tuple(bottleneck_factors)} must each have one number per sub-network.'
        )
    if scales[0] != 1 or any(b - a not in (0, 1) for a, b in zip(scales, scales[1:])):
        raise ValueError(f'scales={tuple(scales)} must begin with 1 and increase by 0 or 1.')
    counts = ('num_blocks', 'block_step', 'step', 'channels', 'growth_rate')
    if min(args[name] for name in counts) < 1:
        raise ValueError('num_blocks, block_step, step, channels and growth_rate must be at least 1.')
    for name in ('compress_factor', 'reduction'):
        if not 0 < args[name] <= 1:
            raise ValueError(f'{name}={args[name]}: expected a number above 0 and at most 1.')
    if any(math.floor(growth_rate * g * compress_factor) in (0, growth_rate * g) for g in growth_factors[1:]):
        raise ValueError(
            f'compress_factor={compress_factor} leaves one side of a fused layer without channels, with '
            f'growth_rate={growth_rate} and growth_factors={tuple(growth_factors)}.'
        )


def _make_stages(args: Dict[str, Any]) -> _Stages:
    """Make the blocks of all sub-networks, and group them into stages that end at an exit."""
    scales, bottleneck_factors = args['scales'], args['bottleneck_factors']
    depths = [args['num_blocks'] + i * args['block_step'] for i in range(len(scales))]
    made = _Stages([], [], [])
    lower_widths: List[List[int]] = []
    for i, (scale, growth, factor) in enumerate(zip(scales, args['growth_factors'], bottleneck_factors)):
        fused = depths[i - 1] if i else 0
        # blocks whose last layer halves the resolution, as many as needed to reach the coarsest one
        downs = [0, *depths][: i + 1][1 - scale :] if scale > 1 else []
        transitions = {math.floor((j + 1) * depths[i] / scale) for j in range(scale - 1)}
        width = args['channels'] * growth
        map_widths: List[List[int]] = []
        blocks: List[nn.Module] = []
        made.first_exits.append(len(made.stages))
        for n in range(1, depths[i] + 1):
            block = _Block(
                width,
                args['step'] if args['step_mode'] == 'even' else args['step'] * n,
                args['growth_rate'] * growth,
                factor,
                args['reduction'] if n in transitions else None,
                (lower_widths[n - 1], bottleneck_factors[i - 1], args['compress_factor']) if n <= fused else None,
                down=n in downs,
            )
            width = block.width
            map_widths.append(block.map_widths)
            blocks.append(block)
            if n > fused:
                made.stages.append(nn.ModuleList(blocks))
                made.widths.append(width)
                blocks = []
        lower_widths = map_widths
    return made
