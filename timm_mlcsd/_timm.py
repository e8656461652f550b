"""What is used of timm's private parts: the one place to look at when timm changes."""

import sys
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Optional

import torch
import torch.nn as nn
from timm.models import is_model, model_entrypoint
from timm.models._features import FeatureGetterNet, feature_take_indices

__all__ = ['FeatureGetterNet', 'feature_take_indices', 'filter_checkpoint', 'names_of_reader']

# the names under which timm's modules keep the filter of their checkpoints
_FILTERS = ('checkpoint_filter_fn', 'checkpoint_filter_fn_classifier')


def filter_checkpoint(
    state_dict: Dict[str, torch.Tensor], model: nn.Module, source: Optional[nn.Module] = None
) -> Dict[str, torch.Tensor]:
    """Fit weights to a timm model of another image size, as timm does with pretrained ones.

    Args:
        state_dict: Weights of the same architecture.
        model: The model that shall load them.
        source: What says for which images they were made (`pretrained_cfg`, `pretrained_model_args`), where it is not
            `model`.

    Returns:
        The weights as the filter of the model's family leaves them: position embeddings and tables of relative
        positions resampled. They are as they came where the family has no filter.
    """
    filter_fn = _find_filter(model)
    if filter_fn is None:
        return state_dict
    with _made_for(model, source or model):
        return filter_fn(dict(state_dict), model)


def _find_filter(model: nn.Module) -> Optional[Callable]:
    arch = getattr(model, 'pretrained_cfg', {}).get('architecture')
    modules = [model_entrypoint(arch).__module__] if arch and is_model(arch) else []
    modules += [cls.__module__ for cls in type(model).__mro__]
    for module in modules:
        if module.startswith('timm.models.'):
            for name in _FILTERS:
                if hasattr(sys.modules[module], name):
                    return getattr(sys.modules[module], name)
    return None


@contextmanager
def _made_for(model: nn.Module, source: nn.Module) -> Iterator[None]:
    """Let `model` say inside that its weights were made for the images of `source`."""
    own: Dict[str, Any] = {name: getattr(model, name, {}) for name in ('pretrained_cfg', 'pretrained_model_args')}
    try:
        model.pretrained_model_args = getattr(source, 'pretrained_model_args', {})
        size = getattr(source, 'pretrained_cfg', {}).get('input_size')
        model.pretrained_cfg = {**own['pretrained_cfg'], **(dict(input_size=size) if size else {})}
        yield
    finally:
        for name, value in own.items():
            setattr(model, name, value)


def names_of_reader(reader: Any) -> Dict[int, str]:
    """The names that a data set's own labels stand for, by index; empty where timm's reader does not know."""
    return {index: str(name) for index, name in getattr(reader, '_source_names', {}).items()}
