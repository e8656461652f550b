"""Whether images that are held out of a training were trained on before, by it or by those that it started from."""

import logging
import os
from dataclasses import replace
from typing import Any, Dict, Iterator, List

import torch
from torch.utils.data import Dataset, IterableDataset

from ..data import sample_keys
from ..errors import UserError
from .data_config import DataConfig, TrainDataConfig
from .datasets import num_images, same_split
from .held_out import check_record, is_data_of, is_same_data, is_same_place, load_if_there
from .image_files import ImageFiles, files_of, share_among

__all__ = [
    'SEEN',
    'check_not_moved',
    'share_of_moved',
    'trained_files',
    'training_data',
    'trainings',
    'warn_of_copies',
]

_logger = logging.getLogger(__name__)

# smallest share of seen images that is reported: most collections have a few images twice
SEEN = 0.1
# of the remembered images, too few to estimate a share: an image that many collections have, such as a placeholder
_FEW = 3
# what is kept of a training that another one started from, with its types
_RECORD: Dict[str, Any] = dict(
    train_split=str,
    val_split=(str, type(None)),
    train_size=int,
    train_probe=torch.Tensor,
    val_indices=torch.Tensor,
    val_keys=torch.Tensor,
    val_probe=torch.Tensor,
)
_DATA_ARGS = ('dataset', 'data_dir', 'class_map')


def trainings(checkpoint: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The trainings that a network has seen, as records of their data: the last one first, then what it started from.

    Args:
        checkpoint: Checkpoint of the last one.

    Returns:
        Records, whose keys are those of a checkpoint.

    Raises:
        UserError: The checkpoint's list of earlier trainings is not one.
    """
    own = {name: checkpoint[name] for name in _RECORD if name in checkpoint}
    own['args'] = {name: checkpoint.get('args', {}).get(name) for name in _DATA_ARGS}
    earlier = checkpoint.get('started_from', [])
    if not isinstance(earlier, list) or not all(_is_record(record) for record in earlier):
        raise UserError('the checkpoint has no valid list of the trainings that it started from; train it again.')
    return [own, *earlier]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get('args'), dict):
        return False
    are_texts = all(isinstance(record['args'].get(name), (str, type(None))) for name in _DATA_ARGS)
    return are_texts and all(isinstance(record[name], kind) for name, kind in _RECORD.items() if name in record)


def training_data(config: DataConfig, checkpoint: Dict[str, Any]) -> Iterator[DataConfig]:
    """The places in which the data of a training may be: its own, and that of a configuration.

    Args:
        config: A configuration of data.
        checkpoint: Checkpoint of the training.

    Yields:
        Configurations of the data of the training; none for data without files.
    """
    trained = checkpoint.get('args', {})
    if 'train_split' not in checkpoint or (trained.get('dataset') or 'torch/').partition('/')[0] != 'torch':
        return
    places = {os.path.realpath(place): place for place in (config.data_dir, trained.get('data_dir')) if place}
    for data_dir in places.values():
        data = replace(config, dataset=trained.get('dataset') or '', data_dir=data_dir)
        data.class_map = trained.get('class_map') or ''
        yield data


def trained_files(config: DataConfig, checkpoint: Dict[str, Any]) -> ImageFiles:
    """The files that the trainings of a checkpoint saw, if they are still there, or copies of them are."""
    files: ImageFiles = {}
    for record in trainings(checkpoint):
        for data in training_data(config, record):
            if is_same_data(data, record):
                files.update(_files_of_training(data, record))
    return files


def _files_of_training(data: DataConfig, record: Dict[str, Any]) -> ImageFiles:
    whole = load_if_there(data, record['train_split'])
    if whole is None:
        return {}
    is_unchanged = num_images(whole) == record.get('train_size')  # else the indices are of other files
    held: List[int] = []
    if is_unchanged and 'val_indices' in record:
        check_record(record)
        held = record['val_indices'].tolist()
    held_files = files_of(whole, held)
    return {name: file for name, file in files_of(whole).items() if name not in held_files}


def share_of_moved(images: Dataset[Any], config: DataConfig, checkpoint: Dict[str, Any]) -> float:
    """Estimate how many images of a data set were trained on, where the training data has changed in its place.

    Args:
        images: Images that should not have been trained on.
        config: Their configuration.
        checkpoint: Checkpoint of the training, with the keys of up to 64 of its images.

    Returns:
        Share of the images, from 0 to 1.
    """
    if isinstance(images, IterableDataset):
        return 0.0
    return max(_share_of_moved(images, config, record) for record in trainings(checkpoint))


def _share_of_moved(images: Dataset[Any], config: DataConfig, record: Dict[str, Any]) -> float:
    probe = record.get('train_probe')
    if not isinstance(probe, torch.Tensor) or not len(probe):
        return 0.0
    whole = load_if_there(config, record['train_split']) if is_same_place(config, record) else None
    if whole is None or is_data_of(whole, record):
        return 0.0
    count = num_images(images)
    found = int(torch.isin(sample_keys(images, range(count), of_content=True), probe).sum())
    forgotten = (record.get('train_size') or len(probe)) / len(probe)
    if forgotten > 1 and found < _FEW:
        return 0.0
    return min(1.0, found * forgotten / max(count, 1))


def warn_of_copies(held: Dataset[Any], train: Dataset[Any], config: TrainDataConfig) -> None:
    """Warn where images that choose the best epoch are trained on, themselves or as copies.

    Args:
        held: Validation images.
        train: Training images.
        config: Their configuration.
    """
    if config.val_split and same_split(config.val_split, config.train_split):
        return  # said when they are loaded
    share = share_among(files_of(held), files_of(train))
    if share >= SEEN:
        _logger.warning(
            f'About {share:.0%} of the images that choose the best epoch are among the training images, themselves or '
            f'as copies, so accuracy on them promises too much: remove the copies, or name another --val-split.'
        )


def check_not_moved(images: Dataset[Any], config: TrainDataConfig, checkpoint: Dict[str, Any]) -> None:
    """Refuse to resume with validation images that the run was trained on before.

    Args:
        images: Images of the validation split.
        config: Their configuration.
        checkpoint: Checkpoint of the run.

    Raises:
        UserError: A tenth of the images or more were trained on.
    """
    if not config.val_split or same_split(config.val_split, config.train_split):
        return  # held out of the train split, and compared one by one; or trained on anyway
    share = share_of_moved(images, config, checkpoint)
    if share >= SEEN:
        raise UserError(
            f'--resume: about {share:.0%} of the images that would choose the best epoch were trained on before: files '
            f'of the data were moved; put the data back as it was, or train anew.'
        )
