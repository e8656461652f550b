"""ShuffleNetV2 (Ma et al. 2018, "Practical Guidelines for Efficient CNN Architecture Design") as a timm model.

timm has no ShuffleNetV2. Layers, parameter names and pretrained weights are those of torchvision; this file adds the
interface of timm models.
"""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torchvision
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model

from .._timm import feature_take_indices

__all__ = ['ShuffleNetV2']  # timm's register_model adds the models

_WIDTHS = {
    'shufflenetv2_050': (24, 48, 96, 192, 1024),
    'shufflenetv2_100': (24, 116, 232, 464, 1024),
    'shufflenetv2_150': (24, 176, 352, 704, 1024),
    'shufflenetv2_200': (24, 244, 488, 976, 2048),
}


class ShuffleNetV2(torchvision.models.ShuffleNetV2):
    """torchvision's ShuffleNetV2 with timm's interface.

    Args:
        widths: Channels of the stem, the three stages and the last conv, [5].
        num_classes: Number of classes C; 0 for pooled features instead of logits. Default 1000.
        in_chans: Channels of the images; default 3.
        global_pool: Global pool before the classifier; default ``avg``.
        drop_rate: Dropout probability before the classifier; default 0.
        device: Device of the weights; default PyTorch's.
        dtype: Type of the weights; default PyTorch's.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: Optional[torch.device] = None,
        dtype: Optional[torch.dtype] = None,
    ):
        super().__init__([4, 8, 4], list(widths), num_classes=max(num_classes, 1))
        if in_chans != 3:
            self.conv1[0] = nn.Conv2d(in_chans, widths[0], 3, stride=2, padding=1, bias=False)
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = widths[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=2 ** (i + 1), module=module)
            for i, (width, module) in enumerate(zip((24, *widths), ('conv1', 'maxpool', 'stage2', 'stage3', 'stage4')))
        ]
        self.grad_checkpointing = False
        self.head_drop = nn.Dropout(drop_rate)
        self.global_pool: SelectAdaptivePool2d
        self.fc: nn.Module
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Return the patterns of the layer groups, for layer-wise learning rates."""
        blocks = r'^stage(\d)' if coarse else [(r'^stage(\d)\.(\d+)', None), (r'^conv5', (99999,))]
        return dict(stem=r'^conv1', blocks=blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stages in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the linear layer.

        Args:
            num_classes: Number of classes C; 0 for pooled features instead of logits.
            global_pool: Global pool before the classifier; default None for no change.
        """
        self.num_classes = num_classes
        weight = self.conv1[0].weight
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=global_pool if global_pool is not None else self.global_pool.pool_type,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _stage(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(stage, x)
        else:
            x = stage(x)
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute unpooled features [B, D, H/32, W/32] from images [B, C, H, W]."""
        x = self.maxpool(self.conv1(x))
        for stage in (self.stage2, self.stage3, self.stage4):
            x = self._stage(stage, x)
        features: torch.Tensor = self.conv5(x)
        return features

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Compute logits [B, C], or pooled features with `pre_logits`, from unpooled features."""
        x = self.head_drop(self.global_pool(x))
        if not pre_logits:
            x = self.fc(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits [B, C] from images [B, C, H, W]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Compute intermediate features.

        Args:
            x: Images [B, C, H, W].
            indices: Indices into `feature_info`, or number of last entries; default None for all.
            norm: Ignored, for compatibility; the features are normalised already.
            stop_early: Whether to stop at the last of these features; default False.
            output_fmt: Memory format, ``NCHW``.
            intermediates_only: Whether to return the intermediate features only; default False.

        Returns:
            Final features and list of intermediate features; the list alone with `intermediates_only`.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        for i, info in enumerate(self.feature_info):
            if stop_early and i > last:
                break
            module = getattr(self, info['module'])
            x = self._stage(module, x) if info['module'].startswith('stage') else module(x)
            if i in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (self.conv5(x), intermediates)

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers after the last of the features at `indices`.

        Args:
            indices: Indices into `feature_info`, or number of last entries; default 1.
            prune_norm: Ignored, for compatibility.
            prune_head: Whether to remove the last conv and the classifier; default True.

        Returns:
            Indices of the features.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        for info in self.feature_info[last + 1 :]:
            setattr(self, info['module'], nn.Identity())
        if prune_head:
            self.conv5 = nn.Identity()
            self.reset_classifier(0, '')
        return take


def _cfg(weights: torchvision.models.WeightsEnum) -> Dict[str, Any]:
    preset = weights.transforms.keywords
    return dict(
        url=weights.url,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=preset['crop_size'] / preset.get('resize_size', 256),
        interpolation='bilinear',
        first_conv='conv1.0',
        classifier='fc',
        license='bsd-3-clause',
        paper_ids='arXiv:1807.11164',
        origin_url='https://github.com/pytorch/vision',
    )


default_cfgs = generate_default_cfgs(
    {
        'shufflenetv2_050.tv_in1k': _cfg(torchvision.models.ShuffleNet_V2_X0_5_Weights.DEFAULT),
        'shufflenetv2_100.tv_in1k': _cfg(torchvision.models.ShuffleNet_V2_X1_0_Weights.DEFAULT),
        'shufflenetv2_150.tv_in1k': _cfg(torchvision.models.ShuffleNet_V2_X1_5_Weights.DEFAULT),
        'shufflenetv2_200.tv_in1k': _cfg(torchvision.models.ShuffleNet_V2_X2_0_Weights.DEFAULT),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ShuffleNetV2:
    return build_model_with_cfg(ShuffleNetV2, variant, pretrained, widths=_WIDTHS[variant], **kwargs)


@register_model
def shufflenetv2_050(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 0.5x."""
    return _create('shufflenetv2_050', pretrained, **kwargs)


@register_model
def shufflenetv2_100(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1x, as used in the MLCSD paper."""
    return _create('shufflenetv2_100', pretrained, **kwargs)


@register_model
def shufflenetv2_150(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 1.5x."""
    return _create('shufflenetv2_150', pretrained, **kwargs)


@register_model
def shufflenetv2_200(pretrained: bool = False, **kwargs: Any) -> ShuffleNetV2:
    """ShuffleNetV2 2x."""
    return _create('shufflenetv2_200', pretrained, **kwargs)
