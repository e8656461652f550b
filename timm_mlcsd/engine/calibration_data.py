"""Checks of the images that a policy is fitted to: not those that it is reported on, nor those of training."""

import hashlib
import logging
import os
import re
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional

from torch.utils.data import Dataset

from ..adaptive import ExitPolicy
from ..data import ConvertedImages, TransformSubset
from ..errors import UserError, printable
from ..network import Network
from .data_config import DataConfig
from .datasets import num_images, same_split
from .held_out import held_out_names, is_same_data, load_if_there
from .validate_config import ValidateConfig

__all__ = ['check_calibration_split', 'check_not_fitted_to', 'check_unlabelled']

_logger = logging.getLogger(__name__)


class _File(NamedTuple):
    """An image file, or a member of a tar file: its size in bytes, and a function that reads it."""

    size: int
    read: Callable[[], bytes]

    def content(self) -> Optional[bytes]:
        """Digest of the file; None if it cannot be read."""
        try:
            return hashlib.sha256(self.read()).digest()
        except (OSError, tarfile.TarError):
            return None


_Files = Dict[str, _File]
# images of a split that are looked for among others, so that few of those have the same size and must be read
_SAMPLE = 64


def check_unlabelled(
    images: Dataset, config: DataConfig, checkpoint: Dict[str, Any], reported: Dataset, split: str
) -> None:
    """Refuse calibration images that are reported on, or that the checkpoint was trained on.

    Args:
        images: Calibration images.
        config: Data that is reported on.
        checkpoint: Checkpoint of the network.
        reported: Images that are reported on.
        split: Their name.

    Raises:
        UserError: One of the files is among them.
    """
    calibration, reported_files = _files_of(images), _files_of(reported)
    if not reported_files:
        _logger.warning(
            f'--calibration-images: {split} has no files, so whether the images are among those that the policy is '
            f'reported on, or the network was trained on, cannot be checked.'
        )
    groups = {
        f'is one of the images of {split} that the policy is reported on': reported_files,
        'was trained on': _trained_files(config, checkpoint),
    }
    for what, files in groups.items():
        if both := _files_among(calibration, files):
            raise UserError(
                f'--calibration-images: {printable(min(both))} {what}, so the policy would promise too much; name '
                f'others.'
            )


def check_calibration_split(
    images: Dataset, name: str, config: DataConfig, checkpoint: Dict[str, Any], reported: Dataset, split: str
) -> None:
    """Refuse a calibration split whose images are reported on, or trained on, under another name or as copies.

    Args:
        images: Calibration images.
        name: Their split.
        config: Data that is reported on.
        checkpoint: Checkpoint of the network.
        reported: Images that are reported on.
        split: Their name.

    Raises:
        UserError: Half of the images or more are among them.
    """
    files = _files_of(images)
    if not files:
        return
    groups = {f'are images of {split}, which the policy is reported on': _files_of(reported)}
    if name not in held_out_names(checkpoint):  # those are compared one by one when they are loaded
        groups['were trained on'] = _trained_files(config, checkpoint)
    for what, others in groups.items():
        if _is_mostly_among(files, others):
            raise UserError(
                f'calibration: half of the images of {name} or more {what}, so the policy would promise too much; '
                f'name another split with --calibration-split.'
            )


def _is_mostly_among(files: _Files, others: _Files) -> bool:
    """Whether half of the files or more are among the others, by a sample."""
    names = [*files][:: -(-len(files) // _SAMPLE)]
    return 2 * len(_files_among({name: files[name] for name in names}, others)) >= len(names)


def _trained_files(config: DataConfig, checkpoint: Dict[str, Any]) -> _Files:
    """The files that a checkpoint was trained on, if they are still there, or copies of them are."""
    trained = checkpoint.get('args', {})
    files: _Files = {}
    # other sources have no files
    if 'train_split' not in checkpoint or (trained.get('dataset') or 'torch/').partition('/')[0] != 'torch':
        return files
    places = {os.path.realpath(place): place for place in (config.data_dir, trained.get('data_dir')) if place}
    for data_dir in places.values():
        data = replace(config, dataset=trained.get('dataset') or '', data_dir=data_dir)
        data.class_map = trained.get('class_map') or ''
        whole = load_if_there(data, checkpoint['train_split']) if is_same_data(data, checkpoint) else None
        if whole is not None:
            is_unchanged = num_images(whole) == checkpoint.get('train_size')  # else the indices are of other files
            held = checkpoint['val_indices'].tolist() if is_unchanged and 'val_indices' in checkpoint else []
            held_files = _files_of(whole, held)
            files.update({name: file for name, file in _files_of(whole).items() if name not in held_files})
    return files


def check_not_fitted_to(
    policy: ExitPolicy,
    path: Path,
    config: ValidateConfig,
    network: Network,
    reported: Dataset,
) -> None:
    """Refuse to report on the images that a policy was fitted to; warn where that cannot be checked.

    Args:
        policy: The policy.
        path: Its file.
        config: Data that is reported on.
        network: The network.
        reported: Images that are reported on.

    Raises:
        UserError: They are the same images.
    """
    name, checkpoint = policy.calibration_data, network.checkpoint
    if name is None:
        return
    if name in held_out_names(checkpoint) if config.held_out else same_split(name, config.split):
        has_record = 'train_split' in checkpoint
        is_known, is_unknown = has_record and is_same_data(config.data, checkpoint), not has_record
    elif os.sep in name:  # images without labels
        # compared by place, because a name from a policy's file must not make us read what it names
        first = re.sub(r' and \d+ more$', '', name)
        place = os.path.realpath(first)
        is_known = any(file == place or file.startswith(place + os.sep) for file in _files_of(reported))
        is_unknown = first != name or not os.path.exists(place)
    else:
        return
    if is_known:
        raise UserError(
            f'{path} was fitted to {name}, so a report on these images would promise too much; report on others, or '
            f'fit a policy with --budget, --latency-budget or --max-drop.'
        )
    if is_unknown:
        _logger.warning(
            f'{path} was fitted to {policy.calibration_images} images of {name}; whether they are reported on cannot '
            f'be checked. If they are, the report promises too much.'
        )


def _files_among(files: _Files, others: _Files) -> List[str]:
    """Names of those files that are among the others, themselves or as copies."""
    sizes = {file.size for file in files.values()}
    contents = {file.content() for file in others.values() if file.size in sizes}  # the other sizes need no reading
    contents.discard(None)
    return [name for name, file in files.items() if name in others or (contents and file.content() in contents)]


def _files_of(dataset: Any, indices: Optional[Iterable[int]] = None) -> _Files:
    """The files of a data set by their real paths, of all or of some indices; none for data sets without files."""
    if isinstance(dataset, TransformSubset):
        return _files_of(dataset.dataset, dataset.indices)
    if isinstance(dataset, ConvertedImages):
        return _files_of(dataset.dataset, indices)
    # timm's folders and tar files have a reader, torchvision's folders the list of their files
    reader: Any = getattr(dataset, 'reader', dataset)
    if not hasattr(reader, 'samples'):
        return {}
    chosen = range(len(reader.samples)) if indices is None else indices
    if not hasattr(reader, 'class_name_to_idx'):
        is_timm = hasattr(reader, 'filename')
        paths = [reader.filename(i, absolute=True) if is_timm else reader.samples[i][0] for i in chosen]
        files = filter(os.path.isfile, map(os.path.realpath, paths))  # what is not there is counted as broken later
        return {path: _File(os.path.getsize(path), Path(path).read_bytes) for path in files}
    members = [(i, *reader.samples[i]) for i in chosen]
    return {
        f'{os.path.realpath(reader.root)}/{parent or ""}/{child.name if child else ""}/{info.path}': _File(
            info.size, partial(_read_member, reader, i)
        )
        for i, info, parent, child in members
    }


def _read_member(reader: Any, index: int) -> bytes:
    content: bytes = reader[index][0].read()
    return content
