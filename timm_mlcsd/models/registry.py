"""Register a multi-exit network ``mlcsd_<arch>`` with timm for every timm architecture."""

import difflib
import pickle
from functools import partial
from typing import Any, Callable, Dict

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_input_config,
    get_pretrained_cfg,
    register_model,
)

# imported for registration: shufflenetv2 before its architectures get exits, msdnet and ranet with their own exits
from . import msdnet, ranet, shufflenetv2  # noqa: F401
from .backbone import MultiExitBackbone, create_multi_exit, without_weights
from .feature_getter import FeatureGetter
from .multi_exit import MultiExitModel
from .weights import fit_weights

__all__ = ['create_model']  # timm's register_model adds the models

PREFIX = 'mlcsd_'


def create_model(name: str, **kwargs: Any) -> MultiExitModel:
    """Create a multi-exit network with ``timm.create_model``, and raise errors that explain what to change.

    Args:
        name: ``mlcsd_<arch>``, ``hf-hub:REPO`` or ``local-dir:PATH``.
        **kwargs: Arguments of ``timm.create_model``.

    Returns:
        Multi-exit network.

    Raises:
        ValueError: The name is unknown (the message lists similar names), the network does not support the arguments,
            or it has no exits.
    """
    known = timm.list_models(PREFIX + '*')
    arch = name.split('.')[0]
    if ':' not in name and arch not in known:
        if PREFIX + arch in known:
            raise ValueError(f'{name!r} has no exits; use {PREFIX}{arch} (exits=1 is the plain backbone).')
        near = difflib.get_close_matches(arch, known, n=3, cutoff=0.4)
        hint = f'near names: {", ".join(near)}' if near else f'timm.list_models({PREFIX + "*"!r}) lists them'
        raise ValueError(f'unknown model {name!r}; {hint}.')
    try:
        model = timm.create_model(name, **kwargs)
    except (TypeError, RuntimeError, AssertionError, OSError, HfHubHTTPError, pickle.UnpicklingError) as e:
        raise ValueError(f'{name} cannot be made: {e}') from e
    if not isinstance(model, MultiExitModel):
        raise ValueError(f'{name} is not a multi-exit network; use an mlcsd_* model.')
    return model


def _multi_exit_cfg(arch: str) -> PretrainedCfg:
    return PretrainedCfg(**without_weights(vars(get_pretrained_cfg(arch) or PretrainedCfg(architecture=arch))))


_archs = [name for name in timm.list_models() if not name.startswith(PREFIX)]
default_cfgs = generate_default_cfgs({PREFIX + arch: _multi_exit_cfg(arch) for arch in _archs})


def _entrypoint(arch: str) -> Callable[..., MultiExitBackbone]:
    def create(pretrained: bool = False, **kwargs: Any) -> MultiExitBackbone:
        if pretrained and not kwargs.get('pretrained_cfg') and not kwargs.get('pretrained_cfg_overlay'):
            cfg = get_pretrained_cfg(arch)
            tag = f' (or a tag, such as {cfg.tag!r})' if cfg is not None and cfg.tag else ''
            raise ValueError(
                f'pretrained=True: there are no multi-exit weights for {PREFIX}{arch}. For timm\'s weights in the '
                f'backbone pass pretrained_backbone=True{tag}; for your own pass checkpoint_path=...'
            )
        # multi-exit weights include those of the backbone
        if pretrained:
            kwargs.pop('pretrained_backbone', None)
        if kwargs.get('feature_cls') not in (None, 'getter'):
            raise ValueError(
                f'feature_cls={kwargs["feature_cls"]!r}: expected getter, which reads the features of a backbone with '
                f'exits; leave it out, or take the plain {arch}.'
            )
        weights = kwargs.get('pretrained_backbone')
        if isinstance(weights, str) and not kwargs.get('pretrained_cfg'):
            # the preprocessing and the classes of these weights, which may not be those of the default tag
            kwargs['pretrained_cfg'] = _multi_exit_cfg(f'{arch}.{weights}')
        indices: Dict[str, Any] = {}
        if kwargs.get('features_only') and 'out_indices' not in kwargs:
            with torch.device('meta'):
                plain: Any = timm.create_model(arch, features_only=True)
            indices['out_indices'] = tuple(plain.feature_info.out_indices)
        model = build_model_with_cfg(
            partial(create_multi_exit, arch),
            PREFIX + arch,
            pretrained,
            pretrained_filter_fn=fit_weights,
            feature_cfg=dict(feature_cls=FeatureGetter, **indices),
            **kwargs,
        )
        if isinstance(model, MultiExitModel):  # not with features_only
            model.probe_size = get_model_input_config(model)['input_size']
        return model

    create.__name__ = create.__qualname__ = PREFIX + arch
    create.__doc__ = f'Create {arch} with exits; takes the arguments of `create_multi_exit` and of {arch}.'
    return create


for _arch in _archs:
    register_model(_entrypoint(_arch))
