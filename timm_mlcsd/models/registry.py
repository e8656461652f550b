"""``mlcsd_<arch>``: multi-exit networks by name, for ``timm.create_model``."""

import dataclasses
from functools import partial
from typing import Any, Callable

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model

from .backbone import MultiExitBackbone, create_multi_exit

__all__ = []  # timm's register_model adds the names

PREFIX = 'mlcsd_'
_ARCHS = ('mobilenetv2_100', 'resnet18', 'resnet34', 'resnet50', 'resnet101')


def _multi_exit_cfg(arch: str) -> dataclasses.dataclass:
    """The backbone's cfg without its weights; what the cfg names now lies below ``backbone.``."""
    cfg = get_pretrained_cfg(arch)
    return dataclasses.replace(
        cfg,
        url='',
        file=None,
        hf_hub_id=None,
        hf_hub_filename=None,
        architecture=PREFIX + arch,
        tag=None,
        first_conv=f'backbone.{cfg.first_conv}',
        classifier=f'backbone.{cfg.classifier}',
    )


default_cfgs = generate_default_cfgs({PREFIX + arch: _multi_exit_cfg(arch) for arch in _ARCHS})


def _entrypoint(arch: str) -> Callable[..., MultiExitBackbone]:
    def create(pretrained: bool = False, **kwargs: Any) -> MultiExitBackbone:
        if pretrained and not kwargs.get('pretrained_cfg') and not kwargs.get('pretrained_cfg_overlay'):
            raise ValueError(
                f'pretrained=True: there are no multi-exit weights for {PREFIX}{arch}. For timm\'s weights in the '
                f'backbone pass pretrained_backbone=True (or a tag, such as '
                f'{get_pretrained_cfg(arch).tag!r}); for your own pass checkpoint_path=...')
        # weights that come from the Hub or a folder already hold the backbone's
        if pretrained:
            kwargs.pop('pretrained_backbone', None)
        return build_model_with_cfg(partial(create_multi_exit, arch), PREFIX + arch, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = PREFIX + arch
    create.__doc__ = f'{arch} with exits; takes the arguments of `create_multi_exit` and of {arch}.'
    return create


for _arch in _ARCHS:
    register_model(_entrypoint(_arch))
