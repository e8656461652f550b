"""Exit heads, which map the output of a tap to a feature of common shape and to logits.

Every head ends with a feature [B, D, H, W] of the shape of the backbone's last map, a global pool and a linear layer.
Heads differ in the reduction layers before the feature. ``widths`` are the channels of the backbone at each resolution
from that of the tap to the last one: n + 1 numbers for a tap with n = log2(size at the tap / size at the end).

The default pool is `DEFAULT_EXIT_POOL` in ``backbone.py``. MSDNet and RANet have heads of their own, in ``native.py``.
"""

from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d, SelectAdaptivePool2d

__all__ = ['EXIT_HEADS', 'EXIT_POOLS', 'ExitHead', 'HeadStyle', 'check_kinds', 'head_style']

EXIT_POOLS = ('max', 'avg')

# modules that define activations, and their classes that heads do not use: gates, attention, activations with weights
_ACTIVATION_MODULES = ('torch.nn.modules.activation', 'timm.layers.activations')
_NOT_ACTIVATIONS = ('Sigmoid', 'Hardsigmoid', 'HardSigmoid', 'Softmax', 'Tanh', 'MultiheadAttention', 'PReLU')


class HeadStyle(NamedTuple):
    """Norm and activation layers of the heads.

    Attributes:
        norm: Norm layer class, called with the number of channels; default BatchNorm.
        act: Activation class; default ReLU.
        first: Whether a head starts with a norm, as the residual stream of a transformer is not normalised; default
            False.
    """

    norm: Callable[..., nn.Module] = nn.BatchNorm2d
    act: Callable[[], nn.Module] = nn.ReLU
    first: bool = False


def head_style(backbone: nn.Module) -> HeadStyle:
    """Choose the norm and activation of the heads from the modules of a backbone.

    Args:
        backbone: A timm model.

    Returns:
        BatchNorm if at least half of the backbone's norms are, else LayerNorm; the backbone's most frequent
        activation, else ReLU.
    """
    modules = [type(module) for module in backbone.modules()]
    norms = Counter(t for t in modules if any(word in t.__name__ for word in ('BatchNorm', 'LayerNorm', 'RmsNorm')))
    batch = sum(count for norm, count in norms.items() if 'BatchNorm' in norm.__name__)
    acts = Counter(t for t in modules if t.__module__ in _ACTIVATION_MODULES and t.__name__ not in _NOT_ACTIVATIONS)
    act = acts.most_common(1)[0][0] if acts else nn.ReLU
    if 2 * batch >= max(sum(norms.values()), 1):
        return HeadStyle(nn.BatchNorm2d, act)
    return HeadStyle(LayerNorm2d, act, first=True)


def _conv_norm_act(
    in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, *, style: HeadStyle, **dd: Any
) -> Tuple[nn.Module, ...]:
    act: Any = style.act()
    if hasattr(act, 'inplace'):
        act.inplace = True
    return (
        nn.Conv2d(in_chs, out_chs, kernel_size, stride=stride, padding=kernel_size // 2, bias=False, **dd),
        style.norm(out_chs, **dd),
        act,
    )


class _StridedDepthwise(nn.Conv2d):
    """3x3 stride-2 depthwise convolution that trains in at least float32 on a CPU.

    Its bfloat16 backward in oneDNN takes 20 to 50 times as long as in float32 (torch 2.15), which made the heads of a
    ResNet18 slower than the ResNet18.
    """

    def __init__(self, width: int, **dd: Any):
        super().__init__(width, width, 3, stride=2, padding=1, groups=width, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _strided_depthwise(x, self.weight, self.training)


@torch.fx.wrap  # one node of a traced graph, because the branch depends on the device
def _strided_depthwise(x: torch.Tensor, weight: torch.Tensor, training: bool) -> torch.Tensor:
    conv: Dict[str, Any] = dict(stride=2, padding=1, groups=weight.shape[0])
    if not training or x.device.type != 'cpu':
        return F.conv2d(x, weight, **conv)
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    with torch.autocast('cpu', enabled=False):
        return F.conv2d(x.to(dtype), weight.to(dtype), **conv).to(x.dtype)


def _slic(widths: Sequence[int], style: HeadStyle, **dd: Any) -> nn.Sequential:
    """Make the paper's SLIC, n times a 3x3 stride-2 conv and a 1x1 conv.

    Simple and low-computational intermediate classifier, section "Multi-exit network architectures".
    """
    layers: List[nn.Module] = []
    for width, next_width in zip(widths, widths[1:]):
        layers += _conv_norm_act(width, width, 3, stride=2, style=style, **dd)
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


def _slic_dw(widths: Sequence[int], style: HeadStyle, **dd: Any) -> nn.Sequential:
    """Make SLIC with a depthwise 3x3 conv, as in the code released by the paper's authors."""
    layers: List[nn.Module] = []
    for width, next_width in zip(widths, widths[1:]):
        layers.append(_StridedDepthwise(width, **dd))
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


def _conv1x1(widths: Sequence[int], style: HeadStyle, **dd: Any) -> nn.Sequential:
    """Make the paper's baseline, direct prediction: average pool, then one 1x1 conv to the last width."""
    factor = 2 ** (len(widths) - 1)
    if factor == 1:
        return nn.Sequential()
    pool = nn.AvgPool2d(factor, stride=factor, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, *_conv_norm_act(widths[0], widths[-1], 1, style=style, **dd))


def _bottleneck(widths: Sequence[int], style: HeadStyle, **dd: Any) -> nn.Sequential:
    """Make the bottleneck head of the paper's Table 7: n times 1x1, 3x3 stride-2, 1x1 conv; its widths are ours."""
    layers: List[nn.Module] = []
    for width, next_width in zip(widths, widths[1:]):
        layers += _conv_norm_act(width, width, 1, style=style, **dd)
        layers += _conv_norm_act(width, width, 3, stride=2, style=style, **dd)
        layers += _conv_norm_act(width, next_width, 1, style=style, **dd)
    return nn.Sequential(*layers)


EXIT_HEADS = {'slic': _slic, 'slic_dw': _slic_dw, 'conv1x1': _conv1x1, 'bottleneck': _bottleneck}


def check_kinds(exit_head: str, exit_pool: str) -> None:
    """Check the kinds of head and pool.

    Args:
        exit_head: Reduction layers, a key of `EXIT_HEADS`.
        exit_pool: Global pool, one of `EXIT_POOLS`.

    Raises:
        ValueError: One of them is unknown.
    """
    for name, value, known in (('exit_head', exit_head, EXIT_HEADS), ('exit_pool', exit_pool, EXIT_POOLS)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(known)}.')


class ExitHead(nn.Module):
    """Reduction layers, pool and linear layer of one exit.

    Args:
        widths: Channels at each resolution from the tap to the feature, [n + 1].
        exit_feature_dim: Channels D of the feature; a 1x1 conv is added if `widths` ends with another number.
        num_classes: Number of classes C; 0 for pooled features instead of logits.
        kind: Reduction layers, a key of `EXIT_HEADS`.
        pool: Global pool, one of `EXIT_POOLS`.
        style: Norm and activation; default BatchNorm and ReLU, as in the paper.
        device: Device of the weights; default PyTorch's.
        dtype: Type of the weights; default PyTorch's.
    """

    def __init__(
        self,
        widths: Sequence[int],
        exit_feature_dim: int,
        num_classes: int,
        kind: str,
        pool: str,
        style: Optional[HeadStyle] = None,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: Dict[str, Any] = {'device': device, 'dtype': dtype}
        style = style or HeadStyle()
        check_kinds(kind, pool)
        self.exit_feature_dim = exit_feature_dim
        self.reduce = EXIT_HEADS[kind](widths, style, **dd)
        if style.first:
            self.reduce.insert(0, style.norm(widths[0], **dd))
        if widths[-1] != exit_feature_dim:
            self.reduce.extend(_conv_norm_act(widths[-1], exit_feature_dim, 1, style=style, **dd))
        self.pool = SelectAdaptivePool2d(pool_type='fast' + pool, flatten=True)
        for module in self.reduce.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        self.reset_classifier(num_classes, **dd)

    def reset_classifier(
        self, num_classes: int, device: Optional[torch.device] = None, dtype: Optional[torch.dtype] = None
    ) -> None:
        """Replace the linear layer.

        Args:
            num_classes: Number of classes C; 0 for pooled features instead of logits.
            device: Device of the weights; default PyTorch's.
            dtype: Type of the weights; default PyTorch's.
        """
        fc = nn.Linear(self.exit_feature_dim, num_classes, device=device, dtype=dtype) if num_classes else nn.Identity()
        self.fc = fc.train(self.training)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map the output of the tap [B, C_tap, H_tap, W_tap] to logits [B, C] and feature [B, D, H, W]."""
        feature = self.reduce(x)
        return self.fc(self.pool(feature)), feature
