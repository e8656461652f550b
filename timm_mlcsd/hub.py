"""Networks in a folder and on the Hugging Face Hub, as timm reads them: safetensors and one ``config.json``."""

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional, Sequence, Union

import safetensors.torch
import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.data.model_config import resolve_input_data_config
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, _get_global_pool, hf_split, save_config_for_hf

from .errors import shortened
from .models import MultiExitModel, create_named
from .report import model_card
from .version import __version__

if TYPE_CHECKING:
    from .adaptive import ExitPolicy

__all__ = ['find_policy', 'from_pretrained', 'push_to_hub', 'save_pretrained']

_logger = logging.getLogger(__name__)

CONFIG = 'config.json'
CARD = 'README.md'
POLICY = 'exit_policy.json'
# what a name starts with that is no path
SOURCES = ('hf-hub:', 'hf_hub:', 'local-dir:')


def save_pretrained(
    model: MultiExitModel,
    directory: Union[str, Path],
    *,
    data_config: Optional[Dict[str, Any]] = None,
    class_names: Optional[Sequence[str]] = None,
    source: Optional[str] = None,
    policy: Optional['ExitPolicy'] = None,
    **card: Any,
) -> None:
    """Write a network so that ``timm.create_model('local-dir:DIRECTORY', pretrained=True)`` makes it again.

    The folder holds the weights (safetensors only), ``config.json`` with the architecture, its arguments, the class
    names and the preprocessing, a model card, and the exit policy if there is one.

    Args:
        model: A registered multi-exit network.
        directory: Where to write; made if it isn't there.
        data_config: Preprocessing: ``input_size``, ``mean``, ``std``, ``crop_pct``, ... as timm's
            ``resolve_data_config`` gives it; default: the model's own.
        class_names: One per class.
        source: What the card tells people to load; default ``local-dir:DIRECTORY``.
        policy: When images leave early; written beside the weights as ``exit_policy.json``.
        **card: More for `timm_mlcsd.report.model_card`: ``results`` (one dict per exit with ``top1``),
            ``measured_on``, ``training``, ``license``.

    Raises:
        ValueError: The number of class names or results doesn't fit, or the policy is another network's; or the
            network has arguments that cannot be written as JSON. Nothing is written then.
    """
    if policy is not None:
        policy.check(model.num_exits, model.exit_names)
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f'class_names has {len(class_names)} names for {model.num_classes} classes.')
    directory = Path(directory)
    data_config = resolve_input_data_config(model, {'input_size': model.probe_size, **(data_config or {})})
    card = _card(
        model,
        directory.name,
        source or f'local-dir:{directory}',
        data_config['input_size'],
        adaptive=policy is not None,
        **card,
    )
    # a backbone that was made first keeps its own arguments; the stored weights hold timm's already
    backbone = getattr(model, 'backbone', model)
    model_args = {**_own_args(backbone), **_own_args(model), **model.exit_args, 'pretrained_backbone': False}
    pool = _get_global_pool(backbone)
    if isinstance(pool, str):
        model_args['global_pool'] = pool  # as it is now
    directory.mkdir(parents=True, exist_ok=True)
    save_config_for_hf(
        model,
        str(directory / CONFIG),
        model_config=dict(label_names=list(class_names)) if class_names is not None else None,
        model_args=model_args,
        data_config=data_config,
    )
    # a module that sits in two places would be refused: each name gets a tensor of its own
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(tensors, directory / HF_SAFE_WEIGHTS_NAME, metadata={'format': 'pt'})
    (directory / CARD).write_text(card, encoding='utf-8')
    if policy is not None:
        policy.save(directory / POLICY)
    else:
        (directory / POLICY).unlink(missing_ok=True)  # of the weights that were here before


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

    Args:
        model: A registered multi-exit network.
        repo_id: ``owner/name``, or a name in your own namespace; made if it isn't there.
        private: Make a new repository private.
        token: Access token; default: the one that you logged in with.
        revision: Branch.
        commit_message: Of the commit.
        **kwargs: As for `save_pretrained`. A model card that the repository has already is kept.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=token, library_name='timm_mlcsd', library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / repo_id.rpartition('/')[2]
        save_pretrained(model, directory, source=f'hf-hub:{repo_id}', **kwargs)
        if api.file_exists(repo_id, CARD, revision=revision):
            (directory / CARD).unlink()
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=None if (directory / POLICY).exists() else POLICY,  # of the weights that were there before
        )
    return str(commit)


def from_pretrained(source: Union[str, Path], **kwargs: Any) -> MultiExitModel:
    """Load a network with its weights, in evaluation mode.

    Args:
        source: A folder that `save_pretrained` wrote, ``hf-hub:REPO`` or ``local-dir:FOLDER``.
        **kwargs: What ``timm.create_model`` takes: ``num_classes`` for new classifiers, say.

    Raises:
        ValueError: There is no such network, or what is there is no multi-exit network.
    """
    name = str(source)
    if not name.startswith(SOURCES):
        if not (Path(name) / CONFIG).is_file():
            raise ValueError(f'{name!r} is no folder with a {CONFIG}; give one, or hf-hub:OWNER/NAME.')
        name = f'local-dir:{name}'
    try:
        return create_named(name, pretrained=True, **kwargs).eval()
    except ValueError:
        raise
    except Exception as e:  # files that others made are broken in as many ways as there are files
        raise ValueError(f'{name} cannot be loaded: {shortened(e)}') from e


def find_policy(source: Union[str, Path]) -> Optional[Path]:
    """The exit policy beside a network's weights; None where there is none.

    Args:
        source: As for `from_pretrained`.
    """
    name = str(source)
    scheme, _, place = name.partition(':')
    if scheme not in ('hf-hub', 'hf_hub'):
        path = Path(place if scheme == 'local-dir' else name) / POLICY
        return path if path.is_file() else None
    repo_id, revision = hf_split(place)
    try:
        return Path(hf_hub_download(repo_id, POLICY, revision=revision))
    except LocalEntryNotFoundError:
        _logger.warning(f'No connection: whether {repo_id} has an exit policy is not known; none is used.')
        return None
    except EntryNotFoundError:
        return None


def _own_args(model: torch.nn.Module) -> Dict[str, Any]:
    """The arguments that timm's factory noted when it made `model`; the number of classes may have changed since."""
    skipped = ('num_classes', 'pretrained_backbone')
    return {key: value for key, value in getattr(model, '_model_args', {}).items() if key not in skipped}


def _card(
    model: MultiExitModel,
    name: str,
    source: str,
    input_size: Sequence[int],
    results: Optional[Sequence[Dict[str, Any]]] = None,
    **kwargs: Any,
) -> str:
    from .cost import exit_costs  # here, so that `python -m timm_mlcsd.cost` finds it not yet imported

    costs = exit_costs(model, input_size) if model.resumable else [None] * model.num_exits
    rows = [
        dict(exit=f'Ex{k}', tap=tap, **(dict(macs=cost.macs, params=cost.params) if cost else {}))
        for k, (tap, cost) in enumerate(zip(model.exit_names, costs), 1)
    ]
    if results is not None:
        if len(results) != len(rows):
            raise ValueError(f'results has {len(results)} entries for {len(rows)} exits.')
        rows = [dict(row, top1=result['top1']) for row, result in zip(rows, results)]
    return model_card(name, source, model.default_cfg['architecture'], input_size, rows, **kwargs)
