"""Fit a backbone made for large images to small ones: take its first two downsamplings out."""

from contextlib import ExitStack
from typing import Optional

import torch
import torch.nn as nn

from .probe import ModuleCall

__all__ = ['has_small_input', 'remove_first_downsamplings']

_MARK = '_timm_mlcsd_small_input'


def has_small_input(backbone: nn.Module) -> bool:
    """Whether its first two downsamplings have been taken out; copies know it too."""
    return getattr(backbone, _MARK, False)


def remove_first_downsamplings(backbone: nn.Module, root: ModuleCall, undo: ExitStack) -> None:
    """Change `backbone` in place so that it keeps four times the resolution: a 32x32 image ends at 4x4, not at 1x1.

    Every strided layer that reads a map of more than a quarter of the image's width loses its stride: a 3x3 or 1x1
    conv keeps its weights, another conv becomes a new 3x3 one, a pool goes (the paper's CIFAR networks, section
    "Multi-exit network architectures").

    Args:
        backbone: A timm model.
        root: What `probe` recorded of it.
        undo: Gets what puts the backbone back as it was.

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
        _remove_stride(backbone, call.name, undo)
        found = True
    if not found:
        raise ValueError('small_input=True: this backbone has no strided convs or pools at its beginning to take out.')
    for info in backbone.feature_info:
        undo.callback(info.__setitem__, 'reduction', info['reduction'])
        info['reduction'] = max(1, info['reduction'] // 4)
    setattr(backbone, _MARK, True)
    undo.callback(delattr, backbone, _MARK)


def _reduction(call: ModuleCall) -> Optional[int]:
    """How many times a single strided layer reduces its map's width; None for any other call."""
    stride = getattr(call.module, 'stride', 1)
    stride = max(stride) if isinstance(stride, (tuple, list)) else stride
    maps = (call.input, call.output)
    is_layer = not any(True for _ in call.module.children()) and all(
        isinstance(t, torch.Tensor) and t.ndim == 4 for t in maps
    )
    return stride if is_layer and isinstance(stride, int) and stride > 1 else None


def _remove_stride(backbone: nn.Module, name: str, undo: ExitStack) -> None:
    layer = backbone.get_submodule(name)
    if isinstance(layer, nn.Conv2d) and tuple(layer.kernel_size) in ((1, 1), (3, 3)):
        undo.callback(setattr, layer, 'stride', layer.stride)
        layer.stride = (1, 1)
    else:
        undo.callback(backbone.set_submodule, name, layer)
        backbone.set_submodule(name, _stride_one(layer) if isinstance(layer, nn.Conv2d) else nn.Identity())


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
