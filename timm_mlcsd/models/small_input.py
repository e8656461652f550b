"""Fit a backbone made for large images to small ones: take its first two downsamplings out."""

from typing import Optional

import torch
import torch.nn as nn

from .probe import Call

__all__ = ['remove_first_downsamplings']


def remove_first_downsamplings(backbone: nn.Module, root: Call) -> None:
    """Change `backbone` in place so that it keeps four times the resolution: a 32x32 image ends at 4x4, not at 1x1.

    Every strided layer that reads a map of more than a quarter of the image's width loses its stride: a 3x3 or 1x1
    conv keeps its weights, another conv becomes a new 3x3 one, a pool goes (the paper's CIFAR networks, section
    "Multi-exit network architectures").

    Args:
        backbone: A timm model.
        root: What `probe` recorded of it.

    Raises:
        ValueError: The backbone does not begin with downsamplings of two or four.
    """
    image_width = root.input.shape[-1]
    found = False
    for call in root.ended():
        factor = _reduction(call)
        if factor is None or round(image_width / call.input.shape[-1]) >= 4:
            continue
        if factor > 4:
            raise ValueError(
                f'small_input=True takes two halvings out; {call.name!r} of this backbone reduces the image {factor} '
                f'times at once. Use images of its own size, or a backbone with a smaller patch.'
            )
        _remove_stride(backbone, call.name)
        found = True
    if not found:
        raise ValueError('small_input=True: this backbone has no strided convs or pools at its beginning to take out.')
    for info in backbone.feature_info:
        info['reduction'] = max(1, info['reduction'] // 4)


def _reduction(call: Call) -> Optional[int]:
    """How many times a single strided layer reduces its map's width; None for any other call."""
    stride = getattr(call.module, 'stride', 1)
    stride = max(stride) if isinstance(stride, (tuple, list)) else stride
    maps = (call.input, call.output)
    is_layer = not any(True for _ in call.module.children()) and all(
        isinstance(t, torch.Tensor) and t.ndim == 4 for t in maps
    )
    return stride if is_layer and isinstance(stride, int) and stride > 1 else None


def _remove_stride(backbone: nn.Module, name: str) -> None:
    layer = backbone.get_submodule(name)
    if not isinstance(layer, nn.Conv2d):
        backbone.set_submodule(name, nn.Identity())
    elif tuple(layer.kernel_size) in ((1, 1), (3, 3)):
        layer.stride = (1, 1)
    else:
        backbone.set_submodule(name, _stride_one(layer))


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
