"""Load trained networks from a checkpoint of train.py, a folder or the Hugging Face Hub."""

import pickle
import zipfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import torch
from timm.data import resolve_data_config

from .data import IMAGE_MODE, pad_names
from .errors import UserError, as_user_error
from .hub import CONFIG, HUB_SCHEMES, POLICY, URI_SCHEMES, find_policy, from_pretrained, label_names
from .models import MultiExitModel, create_model
from .stored import check_model_source, check_values
from .stored_entries import class_list

__all__ = ['BEST', 'LAST', 'Network', 'load_checkpoint', 'load_network', 'policy_path', 'stored_names']

BEST = 'model_best.pth.tar'
LAST = 'last.pth.tar'


class Network(NamedTuple):
    """A loaded network with its metadata.

    Attributes:
        model: Network in evaluation mode.
        data_config: Preprocessing by name, as returned by timm's ``resolve_data_config``.
        class_names: Class names, [C], None for a class without a name; None if no names are known.
        checkpoint: Content of the checkpoint; empty for a folder of `save_pretrained` or the Hub.
        policy_file: Path of the exit policy that is stored with the weights; None if there is none.
    """

    model: MultiExitModel
    data_config: Dict[str, Any]
    class_names: Optional[List[Optional[str]]]
    checkpoint: Dict[str, Any]
    policy_file: Optional[Path]


def load_network(source: Union[str, Path], use_ema: bool = False) -> Network:
    """Load a trained network.

    Args:
        source: Checkpoint of train.py, folder of a run (loads its best epoch), folder of `save_pretrained`, or
            ``hf-hub:REPO``.
        use_ema: Whether to load the averaged weights (EMA) of a checkpoint; default: False.

    Returns:
        The network with its metadata.

    Raises:
        UserError: The network does not exist or cannot be loaded.
    """
    source = str(source)
    if source.startswith(URI_SCHEMES) or (Path(source) / CONFIG).is_file():
        if use_ema:
            raise UserError(
                f'--use-ema: {source!r} has no averaged weights; only checkpoints of train.py --model-ema have them.'
            )
        with as_user_error(f'{source!r} cannot be loaded'):
            model = from_pretrained(source)
            policy_file = find_policy(source)
            names = label_names(model)
        data_config = resolve_data_config({}, model=model)
        cfg = model.pretrained_cfg
        if cfg.get(IMAGE_MODE):
            data_config[IMAGE_MODE] = cfg[IMAGE_MODE]
        return Network(model, data_config, names, {}, policy_file)
    checkpoint = load_checkpoint(_best_of_run(source))
    model = _model_of(checkpoint, source, use_ema).eval()
    policy_file = policy_path(source)
    if policy_file is not None and not policy_file.is_file():
        policy_file = None
    with as_user_error(f'{source!r} cannot be used'):
        names = stored_names(checkpoint)
    return Network(model, checkpoint['data_config'], names, checkpoint, policy_file)


def stored_names(checkpoint: Dict[str, Any]) -> Optional[List[Optional[str]]]:
    """Class names in a checkpoint of train.py.

    Args:
        checkpoint: Content of the checkpoint.

    Returns:
        Class names, [C], None for a class without a name; None if there are no names.

    Raises:
        ValueError: The names do not fit the classes of the network.
    """
    names = checkpoint.get('class_names')
    num_classes = checkpoint['model_args'].get('num_classes', len(names) if isinstance(names, list) else 0)
    # older checkpoints do not have names for all classes
    return class_list(pad_names(names, num_classes) if isinstance(names, list) else names, num_classes)


def _best_of_run(source: str) -> Path:
    """Path of the checkpoint that `source` stands for: the best epoch for the folder of a run."""
    path = Path(source)
    if not path.is_dir() or (path / BEST).is_file():
        return path / BEST if path.is_dir() else path
    if (path / LAST).is_file():
        raise UserError(
            f'{source!r} has no {BEST}, because no epoch is finished; give {path / LAST} for its last state.'
        )
    return path / BEST


def policy_path(source: str) -> Optional[Path]:
    """Path of the exit policy of a network, whether the file exists or not.

    Args:
        source: Source of the network, as for `load_network`.

    Returns:
        Path of the policy file; None for a network on the Hub.
    """
    scheme, _, place = source.partition(':')
    if scheme in HUB_SCHEMES:
        return None
    path = Path(place if scheme == 'local-dir' else source)
    return (path if path.is_dir() else path.parent) / POLICY


def _model_of(checkpoint: Dict[str, Any], source: str, use_ema: bool = False) -> MultiExitModel:
    """Create the network of a checkpoint of train.py and load its weights."""
    key = 'state_dict_ema' if use_ema else 'state_dict'
    if key not in checkpoint:
        raise UserError(
            f'--use-ema: {source!r} was trained without --model-ema and has no averaged weights; remove --use-ema.'
        )
    with as_user_error(f'{source!r} cannot be made again'):
        shapes = {name: tuple(t.shape) for name, t in checkpoint[key].items()}
        check_model_source(checkpoint['arch'], checkpoint['model_args'], checkpoint['data_config'], shapes)
        model = create_model(checkpoint['arch'], **checkpoint['model_args'])
    with as_user_error(f'{source!r} does not fit {checkpoint["arch"]}'):
        check_values(checkpoint[key], model)
        model.load_state_dict(checkpoint[key])
    return model


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """Load a checkpoint of train.py on the CPU, without running code from the file.

    Args:
        path: Path of the checkpoint, or folder of a run, whose last checkpoint is loaded.

    Returns:
        Content of the checkpoint.

    Raises:
        UserError: The file does not exist, is damaged, or is not a checkpoint of train.py.
    """
    path = Path(path)
    if path.is_dir():
        path = path / LAST
    if not path.is_file():
        raise UserError(f'no checkpoint at {str(path)!r}; give a .pth.tar file, or the folder of a run that saved one.')
    advice = 'the weights of a plain network get exits with train.py --heads-only --initial-checkpoint FILE'
    if path.stat().st_size and not zipfile.is_zipfile(path):
        raise UserError(
            f'{str(path)!r} cannot be read as a checkpoint, it is damaged or another kind of file; {advice}.'
        )
    with as_user_error(f'{str(path)!r} cannot be read as a checkpoint'):
        # torch.load does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f'it is damaged, the checksum of {damaged} is wrong')
        try:
            state: Dict[str, Any] = torch.load(path, map_location='cpu', weights_only=True)
        except pickle.UnpicklingError:
            raise UserError(
                f'{str(path)!r} cannot be read as a checkpoint, it holds more than tensors and plain values; {advice}.'
            ) from None
    kinds = dict(arch=str, model_args=dict, state_dict=dict, data_config=dict, args=dict, epoch=int)
    wrong = [key for key, kind in kinds.items() if not isinstance(state, dict) or not isinstance(state.get(key), kind)]
    if wrong:
        raise UserError(f'{str(path)!r} is not a checkpoint of train.py: it has no {", ".join(wrong)}; {advice}.')
    return state
