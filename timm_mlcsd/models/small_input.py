"""Fit a backbone made for large images to small ones: take its first two downsamplings out."""

from typing import Sequence

import torch.nn as nn

from .chain import Leaf

__all__ = ['remove_first_downsamplings']


def remove_first_downsamplings(backbone: nn.Module, leaves: Sequence[Leaf], input_width: int) -> None:
    """Change `backbone` in place so that it keeps four times the resolution: a 32x32 image ends at 4x4, not at 1x1.

    A stem conv larger than 3x3 becomes a new 3x3 stride-1 conv, a pool goes, any other strided layer keeps its
    weights and loses its stride (the paper's CIFAR networks, section "Multi-exit network architectures").

    Args:
        backbone: A timm model.
        leaves: The backbone as a chain, as it was before.
        input_width: Width of the image that `leaves` was traced with.

    Raises:
        ValueError: The backbone has no two downsamplings made of strided convs and pools.
    """
    widths = [input_width] + [leaf.shape[-1] for leaf in leaves]
    strided = [(leaf.name, before / after) for leaf, before, after in zip(leaves, widths, widths[1:]) if after < before]
    if len(strided) < 2 or any(round(factor) != 2 for _, factor in strided[:2]):
        factors = [round(factor) for _, factor in strided]
        raise ValueError(f'small_input=True takes two halvings out; this backbone reduces its maps by {factors}.')
    for name, _ in strided[:2]:
        _remove_stride(backbone, name)
    for info in backbone.feature_info:
        info['reduction'] = max(1, info['reduction'] // 4)


def _remove_stride(backbone: nn.Module, name: str) -> None:
    module = backbone.get_submodule(name)
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        backbone.set_submodule(name, nn.Identity())
        return
    convs = {n: m for n, m in module.named_modules(prefix=name) if isinstance(m, nn.Conv2d) and max(m.stride) > 1}
    if not convs:
        raise ValueError(f'small_input=True cannot take out {name!r}: it shrinks the map without a strided conv.')
    for path, conv in convs.items():
        if max(conv.kernel_size) > 3:
            backbone.set_submodule(path, _stride_one(conv))
        else:
            conv.stride = (1, 1)


def _stride_one(conv: nn.Conv2d) -> nn.Conv2d:
    """A new 3x3 stride-1 conv in the place of a larger strided one."""
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=3,
        padding=1,
        groups=conv.groups,
        bias=conv.bias is not None,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    nn.init.kaiming_normal_(new.weight, mode='fan_out', nonlinearity='relu')
    return new
