"""The images that a training held out, and whether data is the training data of a checkpoint."""

import logging
import os
from typing import Any, Dict, Optional, Tuple

import torch
from torch.utils.data import Dataset, IterableDataset

from ..data import TransformSubset, hold_out, image_name, probe_keys, sample_keys
from ..errors import UserError, printable
from .data_config import DataConfig
from .datasets import load_dataset, num_images, same_split

__all__ = [
    'check_held_out',
    'check_record',
    'halves_of',
    'held_out',
    'held_out_names',
    'is_data_of',
    'is_same_data',
    'is_same_place',
    'is_trained_on',
    'load_if_there',
]

_logger = logging.getLogger(__name__)


def held_out(config: DataConfig, checkpoint: Dict[str, Any]) -> Tuple[TransformSubset, str]:
    """Load the images that training held out of its train split; also returns a name for them.

    Raises:
        UserError: The split isn't the one of training.
    """
    split = checkpoint['train_split']
    dataset = load_dataset(config, split)
    check_held_out(dataset, checkpoint, f'split {split!r}')
    return TransformSubset(dataset, checkpoint['val_indices'].tolist()), held_out_names(checkpoint)[0]


def held_out_names(checkpoint: Dict[str, Any]) -> Tuple[str, str]:
    """Names of the images that training held out, and of one half of them."""
    name = f'the held-out part of {checkpoint.get("train_split")}'
    return name, f'one half of {name}'


def check_held_out(dataset: Dataset[Any], checkpoint: Dict[str, Any], what: str) -> None:
    """Refuse data whose images at the held-out indices are not those of training: they may have been trained on.

    Args:
        dataset: The whole train split, without a transform.
        checkpoint: Checkpoint of the training.
        what: Name of the data in messages.

    Raises:
        UserError: It has another number of images, or others at the places of the held-out ones.
    """
    check_record(checkpoint)
    advice = 'put the files back as they were, or train anew'
    size, indices = checkpoint['train_size'], checkpoint['val_indices'].tolist()
    count = num_images(dataset)
    if count != size:
        raise UserError(
            f'the held-out images: {what} has {count} images, not the {size} of training, so others would be '
            f'taken for held out; {advice}.'
        )
    if 'val_keys' not in checkpoint:
        _logger.warning(
            f'The checkpoint is older than the record of which images were held out: whether {what} is as it was then '
            f'cannot be checked.'
        )
        return
    others = (sample_keys(dataset, indices) != checkpoint['val_keys']).nonzero().flatten().tolist()
    if others:
        first = printable(image_name(dataset, indices[others[0]]))
        raise UserError(
            f'the held-out images: {len(others)} of {len(indices)} are not those that training held out, {first} for '
            f'one, so images that were trained on would be taken for held out: files of {what} were added, removed, '
            f'renamed or moved; {advice}.'
        )
    # files can exchange their names
    if 'val_probe' in checkpoint and not _equal(probe_keys(dataset, indices), checkpoint['val_probe']):
        raise UserError(
            f'the held-out images: their files have the names of those that training held out and other contents, so '
            f'images that were trained on could be taken for held out; {advice}.'
        )


def check_record(checkpoint: Dict[str, Any]) -> None:
    """Refuse an invalid record of held-out images."""
    size, indices, keys = (checkpoint.get(name) for name in ('train_size', 'val_indices', 'val_keys'))
    right = (
        isinstance(size, int)
        and isinstance(indices, torch.Tensor)
        and indices.ndim == 1
        and len(indices) > 0
        and indices.dtype == torch.int64
        and bool(((indices >= 0) & (indices < size)).all())
        and (keys is None or (isinstance(keys, torch.Tensor) and keys.shape == indices.shape))
    )
    if not right:
        raise UserError('the checkpoint has no record of held-out images that can be used; name other images.')


def halves_of(dataset: TransformSubset) -> Tuple[TransformSubset, TransformSubset]:
    """Divide held-out images into two fixed halves: one to fit a policy to, one to report on.

    Raises:
        UserError: There are fewer than two.
    """
    if len(dataset) < 2:
        raise UserError(f'--held-out: expected two images at least, to fit to one half, got {len(dataset)}.')
    halves = hold_out(len(dataset), 0.5, seed=0)
    fit, report = (TransformSubset(dataset.dataset, [dataset.indices[i] for i in half]) for half in halves)
    return fit, report


def load_if_there(config: DataConfig, split: str, needs_folder: bool = False) -> Optional[Dataset[Any]]:
    """Load a split of a data set; None where there is none."""
    try:
        return load_dataset(config, split, needs_folder=needs_folder)
    except UserError:
        return None


def is_data_of(dataset: Dataset[Any], checkpoint: Dict[str, Any]) -> bool:
    """Whether a data set is the training data of a checkpoint, in whatever place."""
    if 'train_probe' not in checkpoint or isinstance(dataset, IterableDataset):
        return False
    if num_images(dataset) != checkpoint.get('train_size'):
        return False
    return _equal(probe_keys(dataset), checkpoint['train_probe'])


def _equal(keys: torch.Tensor, recorded: Any) -> bool:
    return isinstance(recorded, torch.Tensor) and torch.equal(keys, recorded)


def is_trained_on(config: DataConfig, checkpoint: Dict[str, Any], split: str) -> bool:
    """Whether a split is the one that a checkpoint was trained on."""
    if 'train_split' not in checkpoint or not same_split(split, checkpoint['train_split']):
        return False
    return is_same_data(config, checkpoint)


def is_same_data(config: DataConfig, checkpoint: Dict[str, Any]) -> bool:
    """Whether the data, of any split, is the data that a checkpoint was trained on: by its name, or as a copy of it."""
    if is_same_place(config, checkpoint):
        return True
    if not _is_same_set(config, checkpoint) or not config.data_dir or 'train_probe' not in checkpoint:
        return False
    copy = load_if_there(config, checkpoint['train_split'])
    return copy is not None and is_data_of(copy, checkpoint)


def is_same_place(config: DataConfig, checkpoint: Dict[str, Any]) -> bool:
    """Whether the data, of any split, is by its name and folder the data that a checkpoint was trained on."""
    trained = checkpoint.get('args', {}).get('data_dir')
    return _is_same_set(config, checkpoint) and os.path.realpath(config.data_dir or '') == os.path.realpath(
        trained or ''
    )


def _is_same_set(config: DataConfig, checkpoint: Dict[str, Any]) -> bool:
    return config.dataset.lower() == (checkpoint.get('args', {}).get('dataset') or '').lower()
