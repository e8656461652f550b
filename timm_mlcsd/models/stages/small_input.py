"""Adapt a backbone made for large images to small ones by removing its first two downsamplings."""

from contextlib import ExitStack
from typing import Optional

import torch
import torch.nn as nn

from ..module_types import TimmModel
from .probe import ModuleCall

__all__ = ['has_small_input', 'remove_first_downsamplings']

_MARK = '_timm_mlcsd_small_input'


def has_small_input(backbone: nn.Module) -> bool:
    """Whether the first two downsamplings of `backbone` have been removed; true of its copies too."""
    return getattr(backbone, _MARK, False)


def remove_first_downsamplings(backbone: TimmModel, root: ModuleCall, undo: ExitStack) -> None:
    """Quadruple the resolution of all maps in place: a 32x32 image is reduced to 4x4 instead of 1x1.

    Every strided layer whose input map is wider than a quarter of the image loses its stride. A 3x3 or 1x1 conv keeps
    its weights, any other conv is replaced by a new 3x3 conv, and a pool is removed, as in the paper's CIFAR networks
    (section "Multi-exit network architectures").

    Args:
        backbone: A timm model, changed in place.
        root: Recorded call of its ``forward_features``, from `probe`.
        undo: Stack that receives callbacks which restore the backbone.

    Raises:
        ValueError: The backbone has no strided layers at its beginning, or one that reduces more than 4 times.
    """
    image_width = root.image_size[-1]
    found = False
    for call in root.in_return_order():
        factor = _reduction(call)
        if factor is None or call.input is None or round(image_width / call.input.shape[-1]) >= 4:
            continue
        if factor > 4:
            raise ValueError(
                f'small_input=True: expected layers that reduce at most 4 times, got {call.name!r}, which reduces '
                f'{factor} times; use images of the size that the backbone was made for, or a backbone with a smaller '
                f'patch.'
            )
        _remove_stride(backbone, call.name, undo)
        found = True
    if not found:
        raise ValueError(
            'small_input=True: expected strided convs or pools at the beginning of the backbone, got none; use '
            'small_input=False.'
        )
    for info in backbone.feature_info:
        undo.callback(info.__setitem__, 'reduction', info['reduction'])
        info['reduction'] = max(1, info['reduction'] // 4)
    setattr(backbone, _MARK, True)
    undo.callback(delattr, backbone, _MARK)


def _reduction(call: ModuleCall) -> Optional[int]:
    """Factor by which a single strided layer reduces the width of its map; None for any other call."""
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
    """Make a 3x3 stride-1 conv with new weights to replace a larger strided one."""
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
