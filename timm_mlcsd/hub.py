"""Save and load networks in folders and on the Hugging Face Hub, in timm's format: safetensors and ``config.json``."""

import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, Union

import safetensors
import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from ._timm import HF_SAFE_WEIGHTS_NAME, hf_split, resolve_input_data_config
from .cost import exit_costs
from .data import IMAGE_MODE, default_image_mode
from .errors import UserError, as_user_error, one_line
from .file_checks import read_json
from .files import atomic_write_all
from .hub_config import write_config
from .hub_errors import explain_hub_errors, failure_reason, has_no_connection, is_missing_file
from .models import MultiExitModel, create_model
from .report import is_own_card, model_card
from .stored import check_config, check_values, missing_weights
from .stored_entries import check_data_config, class_list
from .version import __version__

__all__ = ['find_policy', 'from_pretrained', 'label_names', 'push_to_hub', 'save_pretrained']

_logger = logging.getLogger(__name__)

CONFIG = 'config.json'
CARD = 'README.md'
POLICY = 'exit_policy.json'
HUB_SCHEMES = ('hf-hub', 'hf_hub')
# prefixes of names that are not plain paths
URI_SCHEMES = ('hf-hub:', 'hf_hub:', 'local-dir:')


class SavablePolicy(Protocol):
    """Interface of an exit policy that is saved with its network; see `timm_mlcsd.adaptive.ExitPolicy`."""

    weights_digest: Optional[str]

    def check(self, num_exits: int, exit_names: Optional[Sequence[str]] = None) -> None:
        """Check that the policy fits a network."""

    def check_weights(self, model: torch.nn.Module) -> None:
        """Check that the policy was fitted to the weights of a network."""

    def for_weights(self, model: torch.nn.Module) -> 'SavablePolicy':
        """Copy of the policy that is bound to a network's weights."""

    def save(self, path: Union[str, Path]) -> None:
        """Write the policy as JSON."""


def save_pretrained(
    model: MultiExitModel,
    directory: Union[str, Path],
    *,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Union[Sequence[Optional[str]], Dict[int, str], None] = None,
    source: Optional[str] = None,
    policy: Optional[SavablePolicy] = None,
    **card: Any,
) -> None:
    """Save a network for ``timm.create_model('local-dir:DIRECTORY', pretrained=True)``.

    The folder holds the weights (safetensors only), ``config.json`` with the architecture, its arguments, the class
    names and the preprocessing, a model card, and the exit policy if there is one. The files of an earlier network
    are replaced, all or none; its policy is removed. A model card that differs from what this function wrote is kept.

    Args:
        model: Registered multi-exit network.
        directory: Folder to write; created if it does not exist.
        data_config: Preprocessing by name (``input_size``, ``mean``, ``std``, ``crop_pct``, ...), as returned by
            timm's ``resolve_data_config``; default: the preprocessing of the model.
        class_names: Class names, [C], None for a class without a name; or names by index. Default: the names that the
            network was loaded with.
        source: Name of the network in the example of the model card; default: ``local-dir:DIRECTORY``.
        policy: Exit policy, saved as ``exit_policy.json`` and bound to the weights; default: none.
        **card: Arguments of `timm_mlcsd.report.model_card`: ``results`` (one dict per exit with ``top1`` in percent),
            ``measured_on``, ``training``, ``license``.

    Raises:
        ValueError: Class names, results or license are invalid; the policy belongs to another network or was fitted
            to other weights; name and arguments of the network would create a different one; or the folder cannot be
            written. The folder is unchanged then.
    """
    directory = Path(directory)
    _check_directory(directory)
    if policy is not None:
        policy = _bound_policy(policy, model)
    names = label_names(model) if class_names is None else class_list(class_names, model.num_classes)
    data_config = _complete(data_config or {}, model)
    source = source or f'local-dir:{directory}'
    card_text = _card(model, directory.name, source, data_config, adaptive=policy is not None, **card)
    # safetensors rejects shared tensors, so each name gets its own copy
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    try:
        with atomic_write_all(directory, _replaced_files(directory, policy)) as new:
            write_config(model, new / CONFIG, names, data_config, tensors)
            safetensors.torch.save_file(tensors, new / HF_SAFE_WEIGHTS_NAME, metadata={'format': 'pt'})
            # safetensors lets the owner alone read its files
            shutil.copymode(new / CONFIG, new / HF_SAFE_WEIGHTS_NAME)
            (new / CARD).write_text(card_text, encoding='utf-8')
            if policy is not None:
                policy.save(new / POLICY)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{str(directory)!r} cannot be written: {one_line(e)}; nothing in it was changed.') from e


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f'{str(directory)!r} is not a folder; choose a folder, or a path that does not exist.')
    if any(directory.glob('*.pth.tar')):
        raise UserError(f'{str(directory)!r} holds checkpoints of train.py; choose another folder.')


def _complete(data_config: Dict[str, Any], model: MultiExitModel) -> Dict[str, Any]:
    """Preprocessing with the entries of the model where they are missing."""
    check_data_config(data_config)
    image_mode = data_config.get(IMAGE_MODE, model.pretrained_cfg.get(IMAGE_MODE))
    resolved = resolve_input_data_config(model, {'input_size': model.probe_size, **data_config})
    return {**resolved, IMAGE_MODE: image_mode}


def _replaced_files(directory: Path, policy: Optional[SavablePolicy]) -> List[str]:
    """Names of the files that a new network replaces, with a warning of what is kept and what is removed."""
    replaced = [CONFIG, HF_SAFE_WEIGHTS_NAME, POLICY, CARD]
    if (directory / CARD).exists() and not _is_generated(directory / CARD):
        _logger.warning(
            f'{directory / CARD} is kept, because save_pretrained did not write it; check that it fits the network.'
        )
        replaced.remove(CARD)
    if policy is None and (directory / POLICY).exists():
        _logger.warning(f'{directory / POLICY} is removed: it belonged to the previous weights.')
    return replaced


def _bound_policy(policy: SavablePolicy, model: MultiExitModel) -> SavablePolicy:
    """Check that a policy was fitted to a network as it will be loaded, and bind it to the weights."""
    policy.check(model.num_exits, model.exit_names)
    policy.check_weights(model)
    dtype = next(model.parameters()).dtype
    if dtype != torch.float32:
        raise ValueError(
            f'the network is in {dtype} and is loaded in torch.float32, which the policy was not fitted to; call '
            f'model.float() and fit a policy to it, or save it without one.'
        )
    return policy.for_weights(model) if policy.weights_digest is None else policy


def push_to_hub(
    model: MultiExitModel,
    repo_id: str,
    *,
    private: bool = False,
    token: Optional[str] = None,
    revision: Optional[str] = None,
    commit_message: str = 'Add a multi-exit network',
    **kwargs: Any,
) -> str:
    """Upload a network for ``timm.create_model('hf-hub:REPO_ID', pretrained=True)``.

    All files are written to a temporary folder before the repository is created.

    Args:
        model: Registered multi-exit network.
        repo_id: ``OWNER/NAME``, or a name in the user's namespace; created if it does not exist.
        private: Whether the repository must be private, default False; an existing public one is an error.
        token: Access token; default: the token of the login.
        revision: Branch, created if it does not exist; default: the main branch.
        commit_message: Message of the commit.
        **kwargs: Arguments of `save_pretrained`. A model card that differs from a generated one is kept.

    Returns:
        URL of the commit.

    Raises:
        ValueError: `save_pretrained` would fail, or the Hub cannot be reached or rejects the request.
    """
    what = f'hf-hub:{repo_id} cannot be pushed to'
    api = HfApi(token=token, library_name='timm_mlcsd', library_version=__version__)
    with explain_hub_errors(what):
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            repo_id = f'{api.whoami()["name"]}/{repo_id}'
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / repo_id.rpartition('/')[2]
        save_pretrained(model, directory, source=f'hf-hub:{repo_id}', **kwargs)
        with explain_hub_errors(what):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise UserError(
                    f'{what}: expected a private repository, got an existing public one; make it private first.'
                )
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if _keeps_card(api, repo_id, revision):
                (directory / CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                commit_message=commit_message,
                # an existing policy belongs to the previous weights
                delete_patterns=None if (directory / POLICY).exists() else POLICY,
            )
    return str(commit)


def from_pretrained(source: Union[str, Path], **kwargs: Any) -> MultiExitModel:
    """Load a network with its weights, in evaluation mode.

    The files are checked before the network is created (see `timm_mlcsd.stored.check_config`): no code from them runs,
    and only the files of that network are opened.

    Args:
        source: Folder that `save_pretrained` wrote, ``hf-hub:REPO`` or ``local-dir:FOLDER``.
        **kwargs: Arguments of ``timm.create_model``, for example ``num_classes`` for new, untrained classifiers.

    Returns:
        The network.

    Raises:
        ValueError: The network does not exist, its files fail a check, or `kwargs` name other weights.
    """
    name = str(source)
    scheme, _, place = name.partition(':')
    on_hub = scheme in HUB_SCHEMES
    forbidden = {'pretrained', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay'} & set(kwargs)
    if forbidden:
        raise ValueError(f'{", ".join(sorted(forbidden))}: weights and config come from {name!r}; remove the argument.')
    if on_hub:
        with explain_hub_errors(f'{name!r} cannot be loaded'):
            folder = _download(place, kwargs.get('cache_dir'))
    else:
        folder = Path(place if scheme == 'local-dir' else name)
        if not (folder / CONFIG).is_file():
            raise UserError(
                f'{name!r} cannot be loaded: expected a folder with a {CONFIG}; give one, or hf-hub:OWNER/NAME.'
            )
        if not (folder / HF_SAFE_WEIGHTS_NAME).is_file():
            raise UserError(f'{name!r} has no {HF_SAFE_WEIGHTS_NAME}; weights in other formats are not read.')
    try:
        config = read_json(folder / CONFIG)
        shapes = _stored_shapes(folder / HF_SAFE_WEIGHTS_NAME)
        check_config(config, shapes)
        model = create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    except Exception as e:  # broken files can cause any error
        raise UserError(f'{name!r} cannot be loaded: {one_line(e)}') from e
    with as_user_error(f'{name!r} cannot be loaded'):
        check_values(safetensors.torch.load_file(folder / HF_SAFE_WEIGHTS_NAME), model)
    missing = missing_weights(model, shapes)
    if missing and kwargs.get('pretrained_strict', True):
        raise UserError(f'{name} has no weights for {", ".join(missing[:3])}, {len(missing)} in all.')
    cfg = model.pretrained_cfg
    stored = cfg['num_classes']
    if model.num_classes not in (0, stored):
        _logger.warning(f'{name} has {stored} classes: the classifiers for {model.num_classes} are new and untrained.')
    if config.get(IMAGE_MODE):
        cfg[IMAGE_MODE] = config[IMAGE_MODE]
    if on_hub:
        cfg.pop('file', None)
        cfg.update(source='hf-hub', hf_hub_id=place)
    return model


def label_names(model: MultiExitModel) -> Optional[List[Optional[str]]]:
    """Class names that a network was loaded with.

    Args:
        model: Network.

    Returns:
        Class names, [C], None for a class without a name; None if no name is known, or the number of classes was
        changed.

    Raises:
        ValueError: The names do not fit the classes of the network.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('num_classes') != model.num_classes:
        return None
    return class_list(cfg.get('label_names'), model.num_classes)


def find_policy(source: Union[str, Path]) -> Optional[Path]:
    """Find the exit policy that is stored with a network.

    If the Hub cannot be reached, a warning is logged and no policy is used.

    Args:
        source: Folder that `save_pretrained` wrote, ``hf-hub:REPO`` or ``local-dir:FOLDER``.

    Returns:
        Path of the policy file; None if there is no policy.

    Raises:
        ValueError: The Hub was reached and reported an error.
    """
    name = str(source)
    scheme, _, place = name.partition(':')
    if scheme not in HUB_SCHEMES:
        path = Path(place if scheme == 'local-dir' else name) / POLICY
        return path if path.is_file() else None
    with explain_hub_errors(f'the exit policy of {name} cannot be loaded'):
        repo_id, revision = hf_split(place)
        try:
            return Path(hf_hub_download(repo_id, POLICY, revision=revision))
        except Exception as e:
            if is_missing_file(e):
                return None
            if not has_no_connection(e):
                raise
            _logger.warning(f'The exit policy of {name} cannot be loaded; none is used: {failure_reason(e)}.')
            return None


def _download(place: str, cache_dir: Union[str, Path, None]) -> Path:
    """Download config and weights of one commit, and return their folder in the local cache."""
    repo_id, revision = hf_split(place)
    folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision, cache_dir=cache_dir)).parent
    try:
        hf_hub_download(repo_id, HF_SAFE_WEIGHTS_NAME, revision=folder.name, cache_dir=cache_dir)
    except Exception as e:
        if is_missing_file(e):
            raise UserError(
                f"'hf-hub:{place}' has no {HF_SAFE_WEIGHTS_NAME}; weights in other formats are not read."
            ) from None
        raise
    return folder


def _stored_shapes(path: Path) -> Dict[str, Tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name, read from its header."""
    with safetensors.safe_open(path, framework='pt') as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118


def _is_generated(card: Path) -> bool:
    try:
        return is_own_card(card.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError):
        return False


def _keeps_card(api: HfApi, repo_id: str, revision: Optional[str]) -> bool:
    """Whether a repository has a model card that `push_to_hub` did not write, with a warning if so."""
    try:
        card = Path(api.hf_hub_download(repo_id, CARD, revision=revision))
    except Exception as e:
        if is_missing_file(e):
            return False
        raise
    if _is_generated(card):
        return False
    _logger.warning(
        f'The model card of {repo_id} is kept, because push_to_hub did not write it; check that it fits the network.'
    )
    return True


def _default_mode(channels: int) -> Optional[str]:
    try:
        return default_image_mode(channels)
    except ValueError:
        return None


def _card(
    model: MultiExitModel,
    name: str,
    source: str,
    data_config: Dict[str, Any],
    results: Optional[Sequence[Dict[str, Any]]] = None,
    **kwargs: Any,
) -> str:
    input_size = data_config['input_size']
    image_mode = data_config[IMAGE_MODE] or _default_mode(input_size[0])
    costs = exit_costs(model, input_size) if model.resumable else [None] * model.num_exits
    rows = [
        dict(exit=f'Ex{k}', tap=tap, **(dict(macs=cost.macs, params=cost.params) if cost else {}))
        for k, (tap, cost) in enumerate(zip(model.exit_names, costs), 1)
    ]
    if results is not None:
        if len(results) != len(rows):
            raise ValueError(f'results: expected {len(rows)} entries, one per exit, got {len(results)}.')
        accuracies = [result.get('top1') if isinstance(result, dict) else None for result in results]
        if not all(isinstance(top1, (int, float)) and math.isfinite(top1) for top1 in accuracies):
            raise ValueError(f'results: expected a dict with a number top1 for each of {len(rows)} exits.')
        rows = [dict(row, top1=top1) for row, top1 in zip(rows, accuracies)]
    architecture = model.default_cfg['architecture']
    return model_card(name, source, architecture, input_size, rows, image_mode=image_mode, **kwargs)
