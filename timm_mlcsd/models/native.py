"""Common parts of networks designed with exits (MSDNet, RANet): layers, heads, timm's model interface."""

import math
import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypeVar, Union

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, get_model_input_config
from torch.utils.checkpoint import checkpoint

from .._timm import feature_take_indices
from .feature_getter import FeatureGetter
from .module_types import ModuleListOf
from .multi_exit import MultiExitModel
from .weights import drop_unfit_classifiers

__all__ = [
    'STEMS',
    'STEP_MODES',
    'NativeMultiExit',
    'check_choice',
    'conv_layer',
    'create_native',
    'transition_channels',
    'bottleneck_conv',
    'native_cfg',
    'stem',
]

STEMS = ('cifar', 'imagenet')
STEP_MODES = ('even', 'linear')

CIFAR_HEAD_WIDTH = 128
_EXIT_ARGS = ('exits', 'exit_head', 'exit_pool', 'small_input')

NetworkT = TypeVar('NetworkT', bound='NativeMultiExit')


def conv_layer(in_chs: int, out_chs: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Make a conv layer with BatchNorm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_chs),
        nn.ReLU(inplace=True),
    )


def bottleneck_conv(in_chs: int, out_chs: int, factor: int, stride: int = 1) -> nn.Sequential:
    """Make the bottleneck of DenseNet: a 1x1 conv layer, then a 3x3 conv layer.

    Args:
        in_chs: Input channels.
        out_chs: Output channels.
        factor: Channels of the 1x1 conv over `out_chs`; they are limited to `in_chs`.
        stride: Stride of the 3x3 conv in pixels; default 1.
    """
    inner = min(in_chs, factor * out_chs)
    return nn.Sequential(*conv_layer(in_chs, inner, 1), *conv_layer(inner, out_chs, 3, stride))


def stem(kind: str, in_chs: int, out_chs: int) -> nn.Sequential:
    """Make the first conv layer: 3x3 for ``cifar``, 7x7 with stride 2 and a max pool for ``imagenet``.

    Args:
        kind: One of `STEMS`.
        in_chs: Channels of the images.
        out_chs: Output channels.
    """
    if kind == 'cifar':
        return conv_layer(in_chs, out_chs)
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 7, stride=2, padding=3),
        nn.BatchNorm2d(out_chs),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def transition_channels(reduction: float, width: int) -> int:
    """Compute the output channels of a transition.

    Args:
        reduction: Share of the channels that the transition keeps.
        width: Input channels.

    Raises:
        ValueError: No channel would be left.
    """
    kept = math.floor(reduction * width)
    if not kept:
        raise ValueError(f'reduction={reduction} keeps none of {width} channels; use a larger reduction.')
    return kept


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError if the argument `name` has a value that is not in `choices`."""
    if value not in choices:
        raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(choices)}.')


def check_global_pool(global_pool: str, num_classes: int) -> None:
    """Raise a ValueError if the exits do not support `global_pool` with this number of classes."""
    if global_pool not in ('avg', '') or (global_pool == '' and num_classes):
        raise ValueError(
            f"global_pool={global_pool!r}: expected 'avg', or '' for unpooled features, which needs num_classes=0."
        )


class NativeHead(nn.Module):
    """Exit head of two stride-2 conv layers, average pool and linear layer.

    Args:
        in_chs: Channels of the map that the head reads.
        width: Channels D of its conv layers.
        num_classes: Number of classes C; 0 for features instead of logits.
        global_pool: ``avg`` (default), or empty for unpooled features.
    """

    def __init__(self, in_chs: int, width: int, num_classes: int, global_pool: str = 'avg'):
        super().__init__()
        self.reduce = nn.Sequential(conv_layer(in_chs, width, 3, 2), conv_layer(width, width, 3, 2))
        self.width = width
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str = 'avg') -> None:
        """Replace the linear layer and the pool; see `NativeHead` for the arguments."""
        self.global_pool = global_pool
        like = next(self.reduce.parameters())
        dd: Dict[str, Any] = dict(device=like.device, dtype=like.dtype)
        fc = nn.Linear(self.width, num_classes, **dd) if num_classes else nn.Identity()
        if isinstance(fc, nn.Linear):
            nn.init.zeros_(fc.bias)
        self.fc = fc.train(self.training)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map an input map [B, C_in, H, W] to logits [B, C] and feature [B, D, H/4, W/4]."""
        feature = self.reduce(x)
        return self.fc(self.pool(feature)), feature

    def pool(self, feature: torch.Tensor) -> torch.Tensor:
        """Pool a feature [B, D, H, W] to [B, D]; return it unchanged if `global_pool` is empty."""
        return feature.mean(dim=(-2, -1)) if self.global_pool else feature


class NativeMultiExit(MultiExitModel):
    """Base class of networks designed with exits; a subclass defines how a stage runs.

    Args:
        stages: Modules of the stages, K.
        widths: Channels of the maps that the heads read, [K].
        stem_kind: Kind of the first layer, one of `STEMS`.
        reduction: Width of the image over the width of those maps.
        num_classes: Number of classes C; 0 for features instead of logits.
        in_chans: Channels of the images.
        global_pool: ``avg``; empty, with 0 classes only, for unpooled features at all exits.
        model_args: Arguments with which a subclass creates the same network, by name.

    Raises:
        ValueError: The exits do not support `global_pool`.
    """

    why_not_resumable: Optional[str] = None

    def __init__(
        self,
        stages: Sequence[nn.Module],
        widths: Sequence[int],
        stem_kind: str,
        reduction: int,
        num_classes: int,
        in_chans: int,
        global_pool: str,
        model_args: Dict[str, Any],
    ):
        super().__init__()
        check_global_pool(global_pool, num_classes)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_exits = len(stages)
        self.exit_names = [f'stages.{k}' for k in range(self.num_exits)]
        self.exit_args = model_args
        self.probe_size = (in_chans, *((224, 224) if stem_kind == 'imagenet' else (32, 32)))
        self.reduction = reduction
        dims = [CIFAR_HEAD_WIDTH if stem_kind == 'cifar' else width for width in widths]
        self.exit_feature_dim = dims[0] if len(set(dims)) == 1 else dims
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info: List[Dict[str, Any]] = [
            dict(num_chs=dim, reduction=4 * reduction, module=f'heads.{k}.reduce') for k, dim in enumerate(dims)
        ]
        self.stages = nn.ModuleList(stages)
        self.heads: ModuleListOf[NativeHead] = ModuleListOf(
            NativeHead(w, dim, num_classes, global_pool) for w, dim in zip(widths, dims)
        )
        self.grad_checkpointing = False
        self.init_convs(self)

    @staticmethod
    def init_convs(module: nn.Module) -> None:
        """Initialise the weights of all convolutions in `module` (Kaiming normal)."""
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    def forward_stage(self, k: int, state: Any) -> Any:
        """Compute the state of stage k from that of stage k-1, or from images [B, C, H, W] for stage 0."""
        raise NotImplementedError

    def tap(self, state: Any) -> torch.Tensor:
        """Return the map [B, C, H, W] in a state that the exit reads."""
        raise NotImplementedError

    def run_stage(self, k: int, state: Any) -> Any:
        """Run stage k; see `MultiExitModel.run_stage`."""
        if self.grad_checkpointing and self.training:
            return checkpoint(self.forward_stage, k, state, use_reentrant=False)
        return self.forward_stage(k, state)

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        """Run the head of exit k; see `MultiExitModel.run_head`."""
        logits, feature = self.heads[k](self.tap(state))
        return logits, feature

    def check_input_size(self, height: int, width: int) -> None:
        """Check that images are large enough for the reduction of the network.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.

        Raises:
            ValueError: The images are smaller than one pixel of the coarsest map.
        """
        if min(height, width) < self.reduction:
            raise ValueError(
                f'image size {height}x{width} is too small: the network reduces {self.reduction} times; '
                f'use at least {self.reduction}x{self.reduction}.'
            )

    # timm's model interface

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the unpooled feature [B, D, H, W] of the last exit from images [B, C, H, W]."""
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
        feature: torch.Tensor = self.heads[-1].reduce(self.tap(x))
        return feature

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute the logits [B, C] of the last exit, or pooled features with `pre_logits`, from its feature."""
        x = self.heads[-1].pool(x)
        return x if pre_logits else self.heads[-1].fc(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Compute the features of several exits.

        Args:
            x: Images [B, C, H, W].
            indices: Indices of the exits, or number of last exits; default None for all.
            norm: Ignored, for compatibility; the features are normalised already.
            stop_early: Whether to stop at the last of these exits; needs `intermediates_only`. Default False.
            output_fmt: Memory format, ``NCHW``.
            intermediates_only: Whether to return the intermediate features only; default False.

        Returns:
            Feature of the last exit and list of features [B, D, H, W]; the list alone with `intermediates_only`.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take, last = feature_take_indices(self.num_exits, indices)
        intermediates = []
        for k in range(last + 1 if stop_early and intermediates_only else self.num_exits):
            x = self.run_stage(k, x)
            if k in take:
                intermediates.append(self.heads[k].reduce(self.tap(x)))
        return intermediates if intermediates_only else (self.heads[-1].reduce(self.tap(x)), intermediates)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the last exit."""
        return self.heads[-1].fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the linear layers of all exits.

        Args:
            num_classes: Number of classes C; 0 for features instead of logits.
            global_pool: ``avg``; empty, with 0 classes only, for unpooled features; default None for no change.

        Raises:
            ValueError: The exits do not support `global_pool`.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_global_pool(global_pool, num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        for head in self.heads:
            head.reset_classifier(num_classes, global_pool)
        self.forget_class_names()

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove the stages and heads after the last of the features at `indices`.

        Args:
            indices: Indices of the exits, or number of last exits; default 1.
            prune_norm: Ignored, for compatibility.
            prune_head: Whether to remove the linear layers and pools; default True.

        Returns:
            Indices of the features.
        """
        take, last = feature_take_indices(self.num_exits, indices)
        self.stages, self.heads = self.stages[: last + 1], self.heads[: last + 1]
        self.num_exits = last + 1
        self.exit_names, self.feature_info = self.exit_names[: last + 1], self.feature_info[: last + 1]
        if not isinstance(self.exit_feature_dim, int):
            self.exit_feature_dim = self.exit_feature_dim[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
        if prune_head:
            self.reset_classifier(0, '')
        return take

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from names to layer groups: 0 for the stem, then one group per stage and its head."""

        def match(name: str) -> int:
            found = re.match(r'(?:stages|heads)\.(\d+)', name)
            return int(found[1]) + 1 if found else 0

        return match


def create_native(cls: Callable[..., NetworkT], name: str, pretrained: bool, **kwargs: Any) -> NetworkT:
    """Create a registered network.

    Args:
        cls: Class of the network.
        name: Registered name.
        pretrained: Whether to load weights; needs a source of weights in `kwargs`.
        **kwargs: Arguments of `cls` and of ``build_model_with_cfg``.

    Raises:
        ValueError: There are no weights, or an argument applies to wrapped backbones only.
    """
    if pretrained and not kwargs.get('pretrained_cfg') and not kwargs.get('pretrained_cfg_overlay'):
        raise ValueError(f'pretrained=True: there are no weights for {name}; pass your own as checkpoint_path=...')
    for flag in _EXIT_ARGS:
        if kwargs.pop(flag, None):
            raise ValueError(
                f'{flag} does not apply to {name}, which is designed with exits; use arguments such as num_blocks.'
            )
    if kwargs.pop('pretrained_backbone', False):
        raise ValueError(f'pretrained_backbone does not apply to {name}, which has no timm backbone.')
    if kwargs.get('stem') == 'imagenet' and not kwargs.get('pretrained_cfg'):
        kwargs['pretrained_cfg_overlay'] = {'input_size': (3, 224, 224), **(kwargs.get('pretrained_cfg_overlay') or {})}
    model = build_model_with_cfg(
        cls,
        name,
        pretrained,
        pretrained_filter_fn=drop_unfit_classifiers,
        feature_cfg=dict(feature_cls=FeatureGetter),
        **kwargs,
    )
    if isinstance(model, NativeMultiExit):
        model.probe_size = get_model_input_config(model)['input_size']
        model.default_cfg['classifier'] = f'heads.{model.num_exits - 1}.fc'
    return model


def native_cfg(paper: str) -> Dict[str, Any]:
    """Make a default cfg with the image size and statistics of CIFAR.

    Args:
        paper: Identifier of the paper, such as ``arXiv:1703.09844``.
    """
    return dict(
        url='',
        num_classes=1000,
        input_size=(3, 32, 32),
        pool_size=None,
        crop_pct=1.0,
        interpolation='bicubic',
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        first_conv='stem.0.0',
        classifier='heads.7.fc',  # the default is 8 exits
        paper_ids=paper,
    )
