"""A trained network from wherever it lies: a checkpoint of train.py, a folder, the Hub."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from timm.data import resolve_data_config

from .data import IMAGE_MODE, pad_names
from .errors import UserError, as_user_error
from .hub import CONFIG, POLICY, URI_SCHEMES, find_policy, from_pretrained, label_names
from .models import MultiExitModel, create_named
from .stored import check_model_source, check_values, class_list

__all__ = ['BEST', 'LAST', 'Network', 'load_checkpoint', 'load_network', 'policy_path', 'stored_names']

BEST = 'model_best.pth.tar'
LAST = 'last.pth.tar'


class Network(NamedTuple):
    """A network with what is known of it.

    Attributes:
        model: It, in evaluation mode.
        data_config: Preprocessing.
        class_names: One per class index, None for an index without a name; None where they aren't known.
        checkpoint: The checkpoint that it comes from, empty for a folder or the Hub.
        policy_file: The exit policy that lies beside the weights, None where there is none.
    """

    model: MultiExitModel
    data_config: Dict[str, Any]
    class_names: Optional[List[Optional[str]]]
    checkpoint: Dict[str, Any]
    policy_file: Optional[Path]


def load_network(source: Union[str, Path], use_ema: bool = False) -> Network:
    """Load what a user names.

    Args:
        source: A checkpoint of train.py, the folder of a run, which stands for its best epoch, a folder of
            `save_pretrained`, or ``hf-hub:REPO``.
        use_ema: Take the averaged weights of a checkpoint.

    Raises:
        UserError: There is no such network.
    """
    source = str(source)
    if source.startswith(URI_SCHEMES) or (Path(source) / CONFIG).is_file():
        if use_ema:
            raise UserError(f'--use-ema: {source!r} has one set of weights.')
        with as_user_error(f'{source!r} cannot be loaded'):
            model = from_pretrained(source)
            policy_file = find_policy(source)
            names = label_names(model)
        data_config = resolve_data_config({}, model=model)
        if model.pretrained_cfg.get(IMAGE_MODE):
            data_config[IMAGE_MODE] = model.pretrained_cfg[IMAGE_MODE]
        return Network(model, data_config, names, {}, policy_file)
    checkpoint = load_checkpoint(_best_of_run(source))
    model = _model_of(checkpoint, source, use_ema).eval()
    policy_file = policy_path(source)
    policy_file = policy_file if policy_file.is_file() else None
    with as_user_error(f'{source!r} cannot be used'):
        names = stored_names(checkpoint)
    return Network(model, checkpoint['data_config'], names, checkpoint, policy_file)


def stored_names(checkpoint: Dict[str, Any]) -> Optional[List[Optional[str]]]:
    """The class names in a checkpoint of train.py, one per class, None for a class without a name.

    Raises:
        ValueError: They are not names of its classes.
    """
    names = checkpoint.get('class_names')
    num_classes = checkpoint['model_args'].get('num_classes', len(names) if isinstance(names, list) else 0)
    # checkpoints did not always name all classes
    return class_list(pad_names(names, num_classes) if isinstance(names, list) else names, num_classes)


def _best_of_run(source: str) -> Path:
    """The file with the weights that a user means by a run folder: those of its best epoch."""
    path = Path(source)
    if not path.is_dir() or (path / BEST).is_file():
        return path / BEST if path.is_dir() else path
    if (path / LAST).is_file():
        raise UserError(
            f'{source!r} has no {BEST}, because no epoch is finished; name {path / LAST} for its last state.'
        )
    return path / BEST


def policy_path(source: str) -> Optional[Path]:
    """Where the exit policy of a network lies, or would lie; None on the Hub."""
    scheme, _, place = source.partition(':')
    if scheme in ('hf-hub', 'hf_hub'):
        return None
    path = Path(place if scheme == 'local-dir' else source)
    return (path if path.is_dir() else path.parent) / POLICY


def _model_of(checkpoint: Dict[str, Any], source: str, use_ema: bool = False) -> MultiExitModel:
    """The network in a checkpoint of train.py."""
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(f'--use-ema: {source!r} was trained without --model-ema and has no averaged weights.')
    with as_user_error(f'{source!r} cannot be made again'):
        shapes = {name: tuple(t.shape) for name, t in checkpoint[key].items()}
        check_model_source(checkpoint['arch'], checkpoint['model_args'], checkpoint['data_config'], shapes)
        model = create_named(checkpoint['arch'], **checkpoint['model_args'])
    with as_user_error(f'{source!r} does not fit {checkpoint["arch"]}'):
        check_values(checkpoint[key], model)
        model.load_state_dict(checkpoint[key])
    return model


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Load a checkpoint of ours on the CPU, without running any code that it might hold.

    Args:
        path: A file, or the folder of a run, which stands for the state that it has reached, its last checkpoint.

    Raises:
        UserError: There is no such file, or it is no checkpoint of a multi-exit network.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise UserError(f'no checkpoint at {str(path)!r}; give a .pth.tar file, or the folder of a run that saved one.')
    plain = 'the weights of a plain network get exits with train.py --heads-only --initial-checkpoint FILE'
    if path.stat().st_size and not zipfile.is_zipfile(path):
        raise UserError(f'{str(path)!r} cannot be read as a checkpoint, it is damaged or something else; {plain}.')
    with as_user_error(f'{str(path)!r} cannot be read as a checkpoint'):
        # torch.load does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f'it is damaged, {damaged} has not the checksum it was written with')
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f'{str(path)!r} cannot be read as a checkpoint, it holds more than tensors and plain values; {plain}.'
            ) from None
    kinds = dict(arch=str, model_args=dict, state_dict=dict, data_config=dict, args=dict, epoch=int)
    wrong = [key for key, kind in kinds.items() if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise UserError(f'{str(path)!r} is no checkpoint that train.py wrote: it has no {", ".join(wrong)}; {plain}.')
    return state
