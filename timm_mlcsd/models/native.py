"""What networks designed with exits (MSDNet, RANet) share: layers, heads, timm's model contract."""

import math
import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg
from torch.utils.checkpoint import checkpoint

from .._timm import feature_take_indices
from .feature_getter import FeatureGetter
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


def conv_layer(in_chs: int, out_chs: int, kernel_size: int = 3, stride: int = 1) -> nn.Sequential:
    """Conv, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_chs),
        nn.ReLU(inplace=True),
    )


def bottleneck_conv(in_chs: int, out_chs: int, factor: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 conv layer behind a 1x1 one of at most `factor` times its width: DenseNet's bottleneck."""
    inner = min(in_chs, factor * out_chs)
    return nn.Sequential(*conv_layer(in_chs, inner, 1), *conv_layer(inner, out_chs, 3, stride))


def stem(kind: str, in_chs: int, out_chs: int) -> nn.Sequential:
    """The first conv layer: 3x3 for ``cifar``, 7x7 with stride 2 and a max-pool for ``imagenet``."""
    if kind == 'cifar':
        return conv_layer(in_chs, out_chs)
    return nn.Sequential(
        nn.Conv2d(in_chs, out_chs, 7, stride=2, padding=3),
        nn.BatchNorm2d(out_chs),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def transition_channels(reduction: float, width: int) -> int:
    """What a transition keeps of `width` channels."""
    kept = math.floor(reduction * width)
    if not kept:
        raise ValueError(f'reduction={reduction} leaves nothing of {width} channels.')
    return kept


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the argument."""
    if value not in choices:
        raise ValueError(f'{name}={value!r} is unknown; choose one of {", ".join(choices)}.')


def check_global_pool(global_pool: str, num_classes: int) -> None:
    """Raise a ValueError where the exits cannot pool like this."""
    if global_pool not in ('avg', '') or (global_pool == '' and num_classes):
        raise ValueError(
            f'global_pool={global_pool!r}: the exits of this network pool by their mean, avg; with num_classes=0 they '
            f"can give unpooled features too, ''."
        )


class NativeHead(nn.Module):
    """Two stride-2 conv layers, mean pool, linear layer.

    Args:
        in_chs: Width of the map it reads.
        width: Width of its own layers.
        num_classes: C, 0 for features.
        global_pool: ``avg``, or empty for unpooled features.
    """

    def __init__(self, in_chs: int, width: int, num_classes: int, global_pool: str = 'avg'):
        super().__init__()
        self.reduce = nn.Sequential(conv_layer(in_chs, width, 3, 2), conv_layer(width, width, 3, 2))
        self.width = width
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str = 'avg') -> None:
        """Make a new linear layer for `num_classes`, none for 0."""
        self.global_pool = global_pool
        like = self.reduce[0][0].weight
        dd = dict(device=like.device, dtype=like.dtype)
        self.fc = nn.Linear(self.width, num_classes, **dd) if num_classes else nn.Identity()
        if num_classes:
            nn.init.zeros_(self.fc.bias)
        self.fc.train(self.training)

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Map [B, C_in, H, W] to logits [B, C] and feature [B, D, H/4, W/4]."""
        feature = self.reduce(x)
        return self.fc(self.pool(feature)), feature

    def pool(self, feature: torch.Tensor) -> torch.Tensor:
        """Feature [B, D, H, W] to [B, D]; as it is where the pool is off."""
        return feature.mean(dim=(-2, -1)) if self.global_pool else feature


class NativeMultiExit(MultiExitModel):
    """A network with stages and heads of its own; a subclass says how a stage runs.

    Args:
        stages: K modules.
        widths: Width of the map that each head reads.
        stem_kind: One of `STEMS`.
        reduction: How often smaller than the image those maps are.
        num_classes: C, 0 for features.
        in_chans: Channels of the images.
        global_pool: ``avg``; empty, with 0 classes only, for unpooled features at all exits.
        model_args: The arguments that make this network again.
    """

    why_not_resumable = None

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
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * reduction, module=f'heads.{k}.reduce') for k, dim in enumerate(dims)
        ]
        self.stages = nn.ModuleList(stages)
        self.heads = nn.ModuleList(NativeHead(w, dim, num_classes, global_pool) for w, dim in zip(widths, dims))
        self.grad_checkpointing = False
        self.init_convs(self)

    @staticmethod
    def init_convs(module: nn.Module) -> None:
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')

    def forward_stage(self, k: int, state: Any) -> Any:
        """Stage k, from the state that stage k-1 left."""
        raise NotImplementedError

    def tap(self, state: Any) -> torch.Tensor:
        """The map in a state that its exit reads."""
        raise NotImplementedError

    def run_stage(self, k: int, state: Any) -> Any:
        if self.grad_checkpointing and self.training:
            return checkpoint(self.forward_stage, k, state, use_reentrant=False)
        return self.forward_stage(k, state)

    def run_head(self, k: int, state: Any) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.heads[k](self.tap(state))

    def check_input_size(self, height: int, width: int) -> None:
        """Raise a ValueError for images smaller than one pixel of the coarsest map."""
        if min(height, width) < self.reduction:
            raise ValueError(
                f'image size {height}x{width} is too small: the network reduces {self.reduction} times; '
                f'use at least {self.reduction}x{self.reduction}.'
            )

    # timm's model contract

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last exit's unpooled feature [B, D, H, W]."""
        for k in range(self.num_exits):
            x = self.run_stage(k, x)
        return self.heads[-1].reduce(self.tap(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last exit's feature to logits [B, C], or to pooled features with `pre_logits`."""
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
        """The features of the exits.

        Args:
            x: Images [B, C, H, W].
            indices: Which exits: a list, or how many of the last; None for all.
            norm: For compatibility; the features are normalised.
            stop_early: Run no further than the last of them.
            output_fmt: Must be ``NCHW``.
            intermediates_only: Return them without the last exit's.
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
        """The last exit's linear layer."""
        return self.heads[-1].fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Make new linear layers for all exits.

        Args:
            num_classes: C, 0 for features.
            global_pool: ``avg``; empty, with 0 classes only, for unpooled features; None to leave it.

        Raises:
            ValueError: The exits have no such pool.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        check_global_pool(global_pool, num_classes)
        self.num_classes, self.global_pool = num_classes, global_pool
        for head in self.heads:
            head.reset_classifier(num_classes, global_pool)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Take out the stages behind the features at `indices`; returns the indices."""
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
        """Recompute the stages in the backward pass instead of keeping what is inside them."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that want no weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer group by name: the stem, then every stage with its head."""

        def match(name: str) -> int:
            found = re.match(r'(?:stages|heads)\.(\d+)', name)
            return int(found[1]) + 1 if found else 0

        return match


def create_native(cls: Callable[..., NativeMultiExit], name: str, pretrained: bool, **kwargs: Any) -> NativeMultiExit:
    """Build a registered network; flags that are meant for backbones get an error that says what to use instead."""
    if pretrained and not kwargs.get('pretrained_cfg') and not kwargs.get('pretrained_cfg_overlay'):
        raise ValueError(f'pretrained=True: there are no weights for {name}; pass your own as checkpoint_path=...')
    for flag in _EXIT_ARGS:
        if kwargs.pop(flag, None):
            raise ValueError(
                f'{name} has exits of its own, so {flag} does not apply; see its arguments, num_blocks say.'
            )
    if kwargs.pop('pretrained_backbone', False):
        raise ValueError(f'pretrained_backbone: {name} is no wrapped backbone, and timm has no weights for it.')
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
        model.default_cfg['classifier'] = f'heads.{model.num_exits - 1}.fc'
    return model


def native_cfg(paper: str) -> Dict[str, Any]:
    """A default cfg: images of CIFAR's size and statistics."""
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
        classifier='heads.7.fc',  # by default there are 8 exits
        paper_ids=paper,
    )
