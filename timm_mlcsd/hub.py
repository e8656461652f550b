"""Networks in a folder and on the Hugging Face Hub, as timm reads them: safetensors and one ``config.json``."""

import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Protocol, Sequence, Union

import safetensors
import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import validate_repo_id

from ._timm import (
    HF_SAFE_WEIGHTS_NAME,
    get_global_pool,
    hf_split,
    resolve_input_data_config,
    save_config_for_hf,
)
from .cost import exit_costs
from .data import IMAGE_MODE
from .errors import UserError, as_user_error, one_line
from .file_checks import read_json
from .files import atomic_write_all
from .hub_errors import explained, has_no_connection, is_not_there, reason_of
from .models import MultiExitModel, create_named, is_tap
from .report import is_own_card, model_card
from .stored import (
    check_config,
    check_data_config,
    check_values,
    class_list,
    is_network_argument,
    missing_weights,
)
from .version import __version__

__all__ = ['find_policy', 'from_pretrained', 'label_names', 'push_to_hub', 'save_pretrained']

_logger = logging.getLogger(__name__)

CONFIG = 'config.json'
CARD = 'README.md'
POLICY = 'exit_policy.json'
HUB = ('hf-hub', 'hf_hub')
# what a name starts with that is not a path
URI_SCHEMES = ('hf-hub:', 'hf_hub:', 'local-dir:')


class SavablePolicy(Protocol):
    """What is needed of an exit policy to save it with its network: see `timm_mlcsd.adaptive.ExitPolicy`."""

    weights_digest: Optional[str]

    def check(self, num_exits: int, exit_names: Optional[Sequence[str]] = None) -> None: ...

    def check_weights(self, model: torch.nn.Module) -> None: ...

    def for_weights(self, model: torch.nn.Module) -> 'SavablePolicy': ...

    def save(self, path: Union[str, Path]) -> None: ...


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
    """Write a network so that ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` makes it again.

    The folder holds the weights (safetensors only), ``config.json`` with the architecture, its arguments, the class
    names and the preprocessing, a model card, and the exit policy if there is one. Files of a network that was there
    before are replaced, all or none: its policy goes, too. A card that is not as this function wrote it stays.

    Args:
        model: A registered multi-exit network.
        directory: Where to write; made if it isn't there.
        data_config: Preprocessing: ``input_size``, ``mean``, ``std``, ``crop_pct``, ... as timm's
            ``resolve_data_config`` gives it; default: the model's own.
        class_names: One per class, None for a class without a name; or names by index. Default: those that the
            network was loaded with.
        source: What the card tells people to load; default ``local-dir:DIRECTORY``.
        policy: When images leave early; written beside the weights as ``exit_policy.json``, bound to them.
        **card: More for `timm_mlcsd.report.model_card`: ``results`` (one dict per exit with ``top1``),
            ``measured_on``, ``training``, ``license``.

    Raises:
        ValueError: Class names, results or license don't fit; the policy is another network's or of other weights;
            the network is not one that its name and arguments make again; or the folder cannot be written. It is as
            it was before then.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f'{str(directory)!r} is not a folder; name another place.')
    if any(directory.glob('*.pth.tar')):
        raise UserError(f'{str(directory)!r} holds checkpoints of train.py; name another folder for the network.')
    if policy is not None:
        policy.check(model.num_exits, model.exit_names)
        policy.check_weights(model)
        if policy.weights_digest is None:
            policy = policy.for_weights(model)
    names = label_names(model) if class_names is None else class_list(class_names, model.num_classes)
    check_data_config(data_config or {})
    image_mode = (data_config or {}).get(IMAGE_MODE, model.pretrained_cfg.get(IMAGE_MODE))
    data_config = resolve_input_data_config(model, {'input_size': model.probe_size, **(data_config or {})})
    data_config[IMAGE_MODE] = image_mode
    card = _card(
        model,
        directory.name,
        source or f'local-dir:{directory}',
        data_config['input_size'],
        adaptive=policy is not None,
        **card,
    )
    # a module that sits in two places would be refused: each name gets a tensor of its own
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    replaced = [CONFIG, HF_SAFE_WEIGHTS_NAME, POLICY, CARD]
    if (directory / CARD).exists() and not _is_own(directory / CARD):
        _logger.warning(f'{directory / CARD} is kept: it is not as save_pretrained wrote it. Does it fit the network?')
        replaced.remove(CARD)
    if policy is None and (directory / POLICY).exists():
        _logger.warning(f'{directory / POLICY} is removed: it belonged to the weights that were here before.')
    try:
        with atomic_write_all(directory, replaced) as new:
            _write_config(model, new / CONFIG, names, data_config, tensors)
            safetensors.torch.save_file(tensors, new / HF_SAFE_WEIGHTS_NAME, metadata={'format': 'pt'})
            (new / CARD).write_text(card, encoding='utf-8')
            if policy is not None:
                policy.save(new / POLICY)
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f'{str(directory)!r} cannot be written: {one_line(e)}; nothing in it was changed.') from e


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
    """Upload a network so that ``timm.create_model('hf-hub:REPO_ID', pretrained=True)`` makes it again.

    All files are written to a temporary folder first; only then is a repository made.

    Args:
        model: A registered multi-exit network.
        repo_id: ``owner/name``, or a name in your own namespace; made if it isn't there.
        private: Make a new repository private; one that is there and public is refused.
        token: Access token; default: the one that you logged in with.
        revision: Branch.
        commit_message: Of the commit.
        **kwargs: As for `save_pretrained`. A model card that others wrote or changed is kept.

    Returns:
        The address of the commit.

    Raises:
        ValueError: As for `save_pretrained`, or the Hub cannot be reached or refuses.
    """
    what = f'hf-hub:{repo_id} cannot be pushed to'
    api = HfApi(token=token, library_name='timm_mlcsd', library_version=__version__)
    with explained(what):
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            repo_id = f'{api.whoami()["name"]}/{repo_id}'
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / repo_id.rpartition('/')[2]
        save_pretrained(model, directory, source=f'hf-hub:{repo_id}', **kwargs)
        with explained(what):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise UserError(f'{what}: private was asked for, and the repository is there already and is public.')
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if _has_foreign_card(api, repo_id, revision):
                _logger.warning(f'The model card of {repo_id} is kept: others wrote it. Does it fit the network?')
                (directory / CARD).unlink()
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=directory,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=None if (directory / POLICY).exists() else POLICY,  # of the weights there before
            )
    return str(commit)


def from_pretrained(source: Union[str, Path], **kwargs: Any) -> MultiExitModel:
    """Load a network with its weights, in evaluation mode.

    What the files say is checked first, `timm_mlcsd.stored.check_config` has the list: no code runs, and nothing but
    the files of that network is opened.

    Args:
        source: A folder that `save_pretrained` wrote, ``hf-hub:REPO`` or ``local-dir:FOLDER``.
        **kwargs: What ``timm.create_model`` takes: ``num_classes`` for new classifiers, say, which are untrained.

    Raises:
        ValueError: There is no such network, what is there is not a multi-exit network that can be trusted, or its
            files contradict each other.
    """
    name = str(source)
    scheme, _, place = name.partition(':')
    on_hub = scheme in HUB
    refused = {'pretrained', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay'} & set(kwargs)
    if refused:
        raise ValueError(
            f'{", ".join(sorted(refused))}: the weights and their config are those of {name!r}; leave it out.'
        )
    if on_hub:
        with explained(f'{name!r} cannot be loaded'):
            folder = _download(place, kwargs.get('cache_dir'))
    else:
        folder = Path(place if scheme == 'local-dir' else name)
        if not (folder / CONFIG).is_file():
            raise UserError(
                f'{name!r} cannot be made: it is not a folder with a {CONFIG}; give one, or hf-hub:OWNER/NAME.'
            )
        if not (folder / HF_SAFE_WEIGHTS_NAME).is_file():
            raise UserError(f'{name!r} has no {HF_SAFE_WEIGHTS_NAME}; weights in other formats are not read.')
    try:
        config = read_json(folder / CONFIG)
        shapes = _stored_shapes(folder / HF_SAFE_WEIGHTS_NAME)
        check_config(config, shapes)
        model = create_named(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
    except Exception as e:  # files that others made are broken in as many ways as there are files
        raise UserError(f'{name!r} cannot be loaded: {one_line(e)}') from e
    with as_user_error(f'{name!r} cannot be loaded'):
        check_values(safetensors.torch.load_file(folder / HF_SAFE_WEIGHTS_NAME), model)
    missing = missing_weights(model, shapes)
    if missing and kwargs.get('pretrained_strict', True):
        raise UserError(f'{name} has no weights for {", ".join(missing[:3])}, {len(missing)} in all.')
    stored = model.pretrained_cfg['num_classes']
    if model.num_classes not in (0, stored):
        _logger.warning(f'{name} has {stored} classes: the classifiers for {model.num_classes} are new and untrained.')
    if config.get(IMAGE_MODE):
        model.pretrained_cfg[IMAGE_MODE] = config[IMAGE_MODE]
    if on_hub:
        model.pretrained_cfg.pop('file', None)
        model.pretrained_cfg.update(source='hf-hub', hf_hub_id=place)
    return model


def label_names(model: torch.nn.Module) -> Optional[List[Optional[str]]]:
    """The class names that a network was loaded with.

    Returns:
        One per class, None for a class without a name; None where none is known, or the classifiers are new ones for
        another number of classes.

    Raises:
        ValueError: They are not names of its classes.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('num_classes') != model.num_classes:
        return None
    return class_list(cfg.get('label_names'), model.num_classes)


def find_policy(source: Union[str, Path]) -> Optional[Path]:
    """The exit policy beside a network's weights; None where there is none.

    Without a connection, where it is not known whether there is one, a warning says that none is used.

    Args:
        source: As for `from_pretrained`.

    Raises:
        ValueError: The Hub was reached and did not tell.
    """
    name = str(source)
    scheme, _, place = name.partition(':')
    if scheme not in HUB:
        path = Path(place if scheme == 'local-dir' else name) / POLICY
        return path if path.is_file() else None
    with explained(f'whether {name} has an exit policy is not known'):
        repo_id, revision = hf_split(place)
        try:
            return Path(hf_hub_download(repo_id, POLICY, revision=revision))
        except Exception as e:
            if is_not_there(e):
                return None
            if not has_no_connection(e):
                raise
            _logger.warning(f'Whether {name} has an exit policy is not known, none is used: {reason_of(e)}.')
            return None


def _download(place: str, cache_dir: Union[str, Path, None]) -> Path:
    """The folder in the local cache with config and weights of one commit."""
    repo_id, revision = hf_split(place)
    folder = Path(hf_hub_download(repo_id, CONFIG, revision=revision, cache_dir=cache_dir)).parent
    try:
        hf_hub_download(repo_id, HF_SAFE_WEIGHTS_NAME, revision=folder.name, cache_dir=cache_dir)
    except Exception as e:
        if is_not_there(e):
            raise UserError(
                f"'hf-hub:{place}' has no {HF_SAFE_WEIGHTS_NAME}; weights in other formats are not read."
            ) from None
        raise
    return folder


def _stored_shapes(path: Path) -> Dict[str, Sequence[int]]:
    """Shapes by name, from the head of a safetensors file."""
    with safetensors.safe_open(path, framework='pt') as f:
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118


def _write_config(
    model: MultiExitModel,
    path: Path,
    names: Optional[Sequence[Optional[str]]],
    data_config: Dict[str, Any],
    tensors: Dict[str, torch.Tensor],
) -> None:
    """Write ``config.json``; raise a ValueError where it would not make the network again."""
    # a backbone that was made first keeps its own arguments; the stored weights hold timm's already
    backbone = getattr(model, 'backbone', model)
    model_args = {**_own_args(backbone), **_own_args(model), **model.exit_args, 'pretrained_backbone': False}
    pool = get_global_pool(backbone)
    if isinstance(pool, str):
        model_args['global_pool'] = pool  # as it is now
    save_config_for_hf(model, str(path), model_args=model_args, data_config=data_config)
    config = read_json(path)
    # timm adds all that its factory was called with
    config['model_args'] = {key: value for key, value in config['model_args'].items() if is_network_argument(key)}
    for key in ('label_names', 'label_descriptions', IMAGE_MODE):
        config['pretrained_cfg'].pop(key, None)
    if data_config.get(IMAGE_MODE):
        config[IMAGE_MODE] = data_config[IMAGE_MODE]
    if names is not None:
        with_gaps = {str(index): name for index, name in enumerate(names) if name is not None}
        config['label_names'] = with_gaps if None in names else list(names)
    try:
        made = check_config(config, {name: tuple(t.shape) for name, t in tensors.items()})
        _check_same_modules(model, made)
    except ValueError as e:
        raise ValueError(f'the network cannot be saved so that it loads again: {one_line(e)}') from e
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _check_same_modules(model: MultiExitModel, made: MultiExitModel) -> None:
    """Refuse a network with other modules than its arguments make, or with hooks: these cannot be stored."""
    theirs = {name: type(module).__name__ for name, module in made.named_modules()}
    for name, module in model.named_modules():
        kind, expected = type(module).__name__, theirs.get(name)
        if kind != expected and not ('BatchNorm' in kind and 'BatchNorm' in str(expected)):
            raise ValueError(f'its module {name!r} is a {kind}, and would be loaded as {expected}')
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(is_tap(hook) for hook in hooks):
            raise ValueError(f'its module {name!r} has forward hooks, which would not be loaded')


def _is_own(card: Path) -> bool:
    try:
        return is_own_card(card.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError):
        return False


def _has_foreign_card(api: HfApi, repo_id: str, revision: Optional[str]) -> bool:
    try:
        return not _is_own(Path(api.hf_hub_download(repo_id, CARD, revision=revision)))
    except Exception as e:
        if is_not_there(e):
            return False
        raise


def _own_args(model: torch.nn.Module) -> Dict[str, Any]:
    """The arguments that timm's factory noted when it made `model`; the number of classes may have changed since."""
    args = getattr(model, '_model_args', {}).items()
    return {key: value for key, value in args if key != 'num_classes' and is_network_argument(key)}


def _card(
    model: MultiExitModel,
    name: str,
    source: str,
    input_size: Sequence[int],
    results: Optional[Sequence[Dict[str, Any]]] = None,
    **kwargs: Any,
) -> str:
    costs = exit_costs(model, input_size) if model.resumable else [None] * model.num_exits
    rows = [
        dict(exit=f'Ex{k}', tap=tap, **(dict(macs=cost.macs, params=cost.params) if cost else {}))
        for k, (tap, cost) in enumerate(zip(model.exit_names, costs), 1)
    ]
    if results is not None:
        if len(results) != len(rows):
            raise ValueError(f'results has {len(results)} entries for {len(rows)} exits.')
        accuracies = [result.get('top1') if isinstance(result, dict) else None for result in results]
        if not all(isinstance(top1, (int, float)) and math.isfinite(top1) for top1 in accuracies):
            raise ValueError(f'results: expected a dict with a number top1 for each of {len(rows)} exits.')
        rows = [dict(row, top1=top1) for row, top1 in zip(rows, accuracies)]
    return model_card(name, source, model.default_cfg['architecture'], input_size, rows, **kwargs)
