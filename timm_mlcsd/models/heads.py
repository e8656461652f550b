"""Exit heads: from a map somewhere in the backbone to logits, by way of a feature all exits have in common.

Every head ends alike: a feature [B, D, H, W] with the D, H, W of the backbone's last map, a global pool, a linear
layer. They differ in how they get there. ``widths`` are the widths that the backbone itself has from the tap's
resolution down to its last: a tap with n = log2(size here / size at the end) has n + 1 of them.
"""

from collections import Counter
from typing import Callable, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SelectAdaptivePool2d

__all__ = ['EXIT_HEADS', 'EXIT_POOLS', 'ExitHead', 'HeadStyle', 'check_kinds', 'head_style']

EXIT_POOLS = ('max', 'avg')

# where activations live, and what lives there too: gates, attention, an activation with weights
_ACTIVATIONS = ('torch.nn.modules.activation', 'timm.layers.activations')
_OTHERS = ('Sigmoid', 'Hardsigmoid', 'HardSigmoid', 'Softmax', 'Tanh', 'MultiheadAttention', 'PReLU')


class HeadStyle(NamedTuple):
    """How heads normalise and activate.

    Attributes:
        norm: Norm layer of a width.
        act: Activation.
        first: Whether the tap itself needs a norm: what a transformer adds up from block to block has none.
    """

    norm: Callable[..., nn.Module] = nn.BatchNorm2d
    act: Callable[[], nn.Module] = nn.ReLU
    first: bool = False


def head_style(backbone: nn.Module) -> HeadStyle:
    """The backbone's own style: BatchNorm where it has most of that, else a LayerNorm; its commonest activation."""
    modules = [type(module) for module in backbone.modules()]
    norms = Counter(t for t in modules if any(word in t.__name__ for word in ('BatchNorm', 'LayerNorm', 'RmsNorm')))
    batch = sum(count for norm, count in norms.items() if 'BatchNorm' in norm.__name__)
    acts = Counter(t for t in modules if t.__module__ in _ACTIVATIONS and t.__name__ not in _OTHERS).most_common(1)
    act = acts[0][0] if acts else nn.ReLU
    if 2 * batch >= max(sum(norms.values()), 1):
        return HeadStyle(nn.BatchNorm2d, act)
    return HeadStyle(LayerNorm2d, act, first=True)


def _conv_norm_act(in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, *, style: HeadStyle, **dd):
    act = style.act()
    if hasattr(act, 'inplace'):
        act.inplace = True
    return (
        nn.Conv2d(in_chs, out_chs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False, **dd),
        style.norm(out_chs, **dd),
        act,
    )


class _StridedDepthwise(nn.Conv2d):
    """3x3 stride-2 depthwise convolution that trains in at least float32 on a CPU.

    oneDNN's backward of it in bfloat16 takes 20 to 50 times as long as in float32 (torch 2.15): with it the heads of a
    ResNet18 took longer than the ResNet18.
    """

    def __init__(self, width: int, **dd):
        super().__init__(width, width, 3, stride=2, padding=1, groups=width, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _strided_depthwise(x, self.weight, self.training)


@torch.fx.wrap  # one node of a traced graph: which branch is taken depends on the device
def _strided_depthwise(x: torch.Tensor, weight: torch.Tensor, training: bool) -> torch.Tensor:
    conv = dict(stride=2, padding=1, groups=weight.shape[0])
    if not training or x.device.type != 'cpu':
        return F.conv2d(x, weight, **conv)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast('cpu', enabled=False):
        return F.conv2d(x.to(dtype), weight.to(dtype), **conv).to(x.dtype)


def _slic(widths: Sequence[int], style: HeadStyle, **dd) -> nn.Sequential:
    """The paper's SLIC (section "Multi-exit network architectures"): n times 3x3 stride-2 conv, then 1x1 conv."""
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers += _conv_norm_act(width, width, 3, stride=2, style=style, **dd)
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


def _slic_dw(widths: Sequence[int], style: HeadStyle, **dd) -> nn.Sequential:
    """SLIC with a depthwise 3x3, as in the code that the paper's authors released."""
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers.append(_StridedDepthwise(width, **dd))
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


def _conv1x1(widths: Sequence[int], style: HeadStyle, **dd) -> nn.Sequential:
    """Direct prediction, the paper's baseline: shrink by averaging, then one 1x1 conv to the last width."""
    factor = 2 ** (len(widths) - 1)
    if factor == 1:
        return nn.Sequential()
    shrink = nn.AvgPool2d(factor, stride=factor, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(shrink, *_conv_norm_act(widths[0], widths[-1], 1, style=style, **dd))


def _bottleneck(widths: Sequence[int], style: HeadStyle, **dd) -> nn.Sequential:
    """The heavier rival of the paper's Table 7: n times 1x1, 3x3 stride-2, 1x1 conv (the paper gives no widths)."""
    layers = []
    for width, next_width in zip(widths, widths[1:]):
        layers += _conv_norm_act(width, width, 1, style=style, **dd)
        layers += _conv_norm_act(width, width, 3, stride=2, style=style, **dd)
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


EXIT_HEADS = {'slic': _slic, 'slic_dw': _slic_dw, 'conv1x1': _conv1x1, 'bottleneck': _bottleneck}


def check_kinds(exit_head: str, exit_pool: str) -> None:
    """Raise a ValueError that names the argument that is unknown."""
    for name, value, known in (('exit_head', exit_head, EXIT_HEADS), ('exit_pool', exit_pool, EXIT_POOLS)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(known)}.')


class ExitHead(nn.Module):
    """Reduction layers, pool and linear layer of one exit.

    Args:
        widths: The n + 1 widths from the tap to the common feature.
        exit_feature_dim: Width D of the common feature; a 1x1 conv adapts where ``widths`` ends elsewhere.
        num_classes: C, 0 for pooled features.
        kind: Reduction layers, one of `EXIT_HEADS`.
        pool: Global pool, one of `EXIT_POOLS`.
        style: Norm and activation; default BatchNorm and ReLU, as in the paper.
        device: Where the weights are made.
        dtype: Their type.
    """

    def __init__(
        self,
        widths: Sequence[int],
        exit_feature_dim: int,
        num_classes: int,
        kind: str,
        pool: str,
        style: Optional[HeadStyle] = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        style = style or HeadStyle()
        check_kinds(kind, pool)
        self.exit_feature_dim = exit_feature_dim
        self.reduce = EXIT_HEADS[kind](widths, style, **dd)
        if style.first:
            self.reduce.insert(0, style.norm(widths[0], **dd))
        if widths[-1] != exit_feature_dim:
            self.reduce.extend(_conv_norm_act(widths[-1], exit_feature_dim, 1, style=style, **dd))
        self.pool = SelectAdaptivePool2d(pool_type=pool, flatten=True)
        for module in self.reduce.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        self.reset_classifier(num_classes, **dd)

    def reset_classifier(self, num_classes: int, device=None, dtype=None) -> None:
        """Make a new linear layer for `num_classes`, none for 0; in the mode that the head is in."""
        fc = nn.Linear(self.exit_feature_dim, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map a tap's output [B, C_tap, H_tap, W_tap] to logits [B, C] and feature [B, D, H, W]."""
        feature = self.reduce(x)
        return self.fc(self.pool(feature)), feature
