"""All uses of timm's private modules and attributes, to be checked when timm changes."""

import sys
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Type

import torch
import torch.nn as nn
from timm.data.loader import fast_collate
from timm.data.model_config import resolve_input_data_config
from timm.data.readers import class_map
from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions
from timm.data.readers.targets import get_field
from timm.models import is_model, model_entrypoint
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, hf_split, save_config_for_hf
from timm.models._hub import _get_global_pool as get_global_pool

__all__ = [
    'HF_SAFE_WEIGHTS_NAME',
    'FeatureGetterNet',
    'class_map',
    'fast_collate',
    'feature_take_indices',
    'filter_checkpoint',
    'get_field',
    'get_global_pool',
    'get_img_extensions',
    'hf_split',
    'input_decoders',
    'intercept_open',
    'names_of_reader',
    'resolve_input_data_config',
    'save_config_for_hf',
    'set_img_extensions',
    'wds_target_error',
]

# names of the checkpoint filters in timm's model files
_FILTERS = ('checkpoint_filter_fn', 'checkpoint_filter_fn_classifier')


def filter_checkpoint(
    state_dict: Dict[str, torch.Tensor], model: nn.Module, source: Optional[nn.Module] = None
) -> Dict[str, torch.Tensor]:
    """Adapt weights to a timm model of another image size, as timm does for pretrained weights.

    Args:
        state_dict: Weights of the same architecture, by name.
        model: Model that loads them.
        source: Model whose `pretrained_cfg` and `pretrained_model_args` describe the images that the weights were made
            for; default `model`.

    Returns:
        Weights after timm's filter for the model's family, which resamples position embeddings and tables of relative
        positions; unchanged if the family has no filter.
    """
    filter_fn = _find_filter(model)
    if filter_fn is None:
        return state_dict
    with _made_for(model, source or model):
        filtered: Dict[str, torch.Tensor] = filter_fn(dict(state_dict), model)
        return filtered


def _find_filter(model: nn.Module) -> Optional[Callable[..., Any]]:
    arch = getattr(model, 'pretrained_cfg', {}).get('architecture')
    modules = [model_entrypoint(arch).__module__] if arch and is_model(arch) else []
    modules += [cls.__module__ for cls in type(model).__mro__]
    for module in modules:
        if module.startswith('timm.models.'):
            for name in _FILTERS:
                found: Optional[Callable[..., Any]] = getattr(sys.modules[module], name, None)
                if found is not None:
                    return found
    return None


@contextmanager
def _made_for(model: nn.Module, source: nn.Module) -> Iterator[None]:
    """Replace the image size in the pretrained configuration of `model` by that of `source`, and restore it."""
    own: Dict[str, Any] = {name: getattr(model, name, {}) for name in ('pretrained_cfg', 'pretrained_model_args')}
    try:
        size = getattr(source, 'pretrained_cfg', {}).get('input_size')
        of_source: Dict[str, Any] = dict(
            pretrained_model_args=getattr(source, 'pretrained_model_args', {}),
            pretrained_cfg={**own['pretrained_cfg'], **(dict(input_size=size) if size else {})},
        )
        for name, value in of_source.items():
            setattr(model, name, value)
        yield
    finally:
        for name, value in own.items():
            setattr(model, name, value)


def names_of_reader(reader: Any) -> Dict[int, str]:
    """Return the class names of a data set by label, as known to its timm reader; empty if it has none."""
    return {index: str(name) for index, name in getattr(reader, '_source_names', {}).items()}


def intercept_open(reader: Any, prepare: Callable[[Callable[[], None]], None]) -> None:
    """Replace the function with which a reader opens its data, which runs in the process that reads.

    Args:
        reader: timm reader of a stream that has not been opened yet.
        prepare: Replacement; it receives the reader's own function and must call it.
    """
    open_reader = partial(type(reader)._lazy_init, reader)
    reader._lazy_init = partial(prepare, open_reader)


def input_decoders(reader: Any, change: Callable[[Any], Any]) -> None:
    """Change the decoders that a TFDS reader passes to TFDS.

    Args:
        reader: timm reader of a TFDS data set that has not been opened yet.
        change: Function from the reader's own decoders to the new ones.
    """
    decoders = change(type(reader)._input_decoders(reader))
    reader._input_decoders = lambda: decoders


def wds_target_error() -> Type[Exception]:
    """Return the class of the error that timm's webdataset reader raises for a missing label; needs webdataset."""
    from timm.data.readers.reader_wds import WdsTargetKeyError

    error: Type[Exception] = WdsTargetKeyError
    return error
