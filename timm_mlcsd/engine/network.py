"""A trained network from wherever it lies: a checkpoint of train.py, a folder, the Hub."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from timm.data import resolve_data_config

from ..errors import UserError, blame
from ..hub import CONFIG, SOURCES, from_pretrained
from ..models import MultiExitModel
from .build import build_model
from .checkpoint import load_checkpoint

__all__ = ['Network', 'load_network', 'model_of']


class Network(NamedTuple):
    """A network with what is known of it.

    Attributes:
        model: It, in evaluation mode.
        data_config: Preprocessing.
        class_names: One per class, None where they aren't known.
        checkpoint: The checkpoint that it comes from, empty for a folder or the Hub.
    """

    model: MultiExitModel
    data_config: Dict[str, Any]
    class_names: Optional[List[str]]
    checkpoint: Dict[str, Any]


def load_network(source: str, use_ema: bool = False) -> Network:
    """Load what a user names.

    Args:
        source: A checkpoint or run folder of train.py, a folder of `save_pretrained`, or ``hf-hub:REPO``.
        use_ema: Take the averaged weights of a checkpoint.

    Raises:
        UserError: There is no such network.
    """
    if source.startswith(SOURCES) or (Path(source) / CONFIG).is_file():
        if use_ema:
            raise UserError(f'--use-ema: {source!r} has one set of weights.')
        with blame(f'{source!r} cannot be loaded'):
            model = from_pretrained(source)
        names = model.pretrained_cfg.get('label_names')
        return Network(model, resolve_data_config({}, model=model), list(names) if names else None, {})
    checkpoint = load_checkpoint(source)
    model = model_of(checkpoint, source, use_ema).eval()
    return Network(model, checkpoint['data_config'], checkpoint.get('class_names'), checkpoint)


def model_of(checkpoint: Dict[str, Any], source: str, use_ema: bool) -> MultiExitModel:
    """The network in a checkpoint of train.py."""
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(f'--use-ema: {source!r} was trained without --model-ema and has no averaged weights.')
    model = build_model(checkpoint['arch'], **checkpoint['model_args'])
    with blame(f'{source!r} does not fit {checkpoint["arch"]}'):
        model.load_state_dict(checkpoint[key])
    return model
