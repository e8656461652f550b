"""Start a training from the weights of another one, with other classes and held-out images or the same."""

import logging
import os
from typing import Any, Dict, List, Optional

import torch
from torch.utils.data import Dataset

from ..data import ClassNames, list_classes, same_names
from ..errors import UserError, as_user_error
from ..models import MultiExitModel, load_backbone, read_weights
from ..network import load_checkpoint, stored_names
from .build import ModelConfig
from .data_config import TrainDataConfig
from .datasets import same_split
from .held_out import is_same_data
from .image_files import files_of, share_among
from .seen_images import SEEN, trained_files, trainings

__all__ = ['load_initial_checkpoint']

_logger = logging.getLogger(__name__)


def load_initial_checkpoint(
    model: MultiExitModel,
    config: ModelConfig,
    names: Optional[ClassNames],
    data: TrainDataConfig,
    record: Dict[str, Any],
    held: Dataset[Any],
) -> List[Dict[str, Any]]:
    """Load weights of a multi-exit network like this one, or of its plain backbone.

    Args:
        model: Network that receives the weights.
        config: Its configuration, with the file.
        names: Class names of this training.
        data: Data of this training.
        record: The record that `train_and_val_datasets` returned.
        held: Images that are held out now.

    Returns:
        Records of the trainings that the weights have seen.

    Raises:
        UserError: The file does not fit the network, or its classifier of other classes would stay as it is.
    """
    path = config.initial_checkpoint
    _load(model, path)
    try:
        checkpoint = load_checkpoint(path)
    except UserError:
        return []  # a file of weights has no record
    with as_user_error(f'--initial-checkpoint {path!r}'):
        before, seen = stored_names(checkpoint), trainings(checkpoint)
    if before is not None and names is not None and not same_names(before, names):
        _check_classes(config, before, names)
    else:
        text = next(filter(None, (_seen_images(training, data, record, held) for training in seen)), '')
        if text:
            _logger.warning(
                f'--initial-checkpoint {path} was trained on {text} that are held out now, so accuracy on them '
                f'promises too much: hold out the images that it held out (its --val-split, or --val-fraction and '
                f'--val-seed).'
            )
    return seen


def _load(model: MultiExitModel, path: str) -> None:
    """Load weights of a multi-exit network like this one, or of its plain backbone."""
    if not os.path.isfile(path):
        raise UserError(f'--initial-checkpoint {path!r}: there is no such file.')
    with as_user_error(f'--initial-checkpoint {path!r} cannot be read'):
        state_dict = read_weights(path)
    with as_user_error(f'--initial-checkpoint {path!r} does not fit the model'):
        if model.num_exits > 1 and any(name.startswith('heads.') for name in state_dict):
            model.load_state_dict(state_dict)
        else:
            load_backbone(model, state_dict)
    _logger.info(f'Starting from {path}')


def _check_classes(config: ModelConfig, before: ClassNames, names: ClassNames) -> None:
    """Refuse to freeze a classifier whose classes have other indices, and warn of a classifier of other classes."""
    if len(before) != len(names):
        return  # a new classifier
    text = (
        f'--initial-checkpoint {config.initial_checkpoint!r} was trained on the classes {list_classes(before)}, the '
        f'data has {list_classes(names)}'
    )
    has_moved = any(name is not None and name in before and before[i] != name for i, name in enumerate(names))
    if config.heads_only is True and has_moved:
        raise UserError(
            f'--heads-only: {text}: the last exit would keep its answers; --class-map FILE gives classes their '
            f'indices, or train all of the network.'
        )
    end = 'the last exit keeps them' if config.heads_only is True else 'the classifier starts with weights of those'
    _logger.warning(f'{text}: {end}.')


def _seen_images(training: Dict[str, Any], config: TrainDataConfig, record: Dict[str, Any], held: Dataset[Any]) -> str:
    """Say how many of the images that are held out now were trained on before.

    Args:
        training: Record of the earlier training.
        config: Data of this training.
        record: The record that `train_and_val_datasets` returned.
        held: Images that are held out now.

    Returns:
        The number or the share of the images; empty for none.
    """
    if 'train_split' not in training:
        return ''
    keys, split = record.get('val_keys'), training['train_split']
    is_same = same_split(split, config.train_split) and is_same_data(config, training)
    is_whole = split == config.train_split or not any('[' in name for name in (split, config.train_split))
    if keys is not None and is_same and is_whole and ('val_keys' in training or 'val_indices' not in training):
        seen = int((~torch.isin(keys, training.get('val_keys', keys[:0]))).sum())
        return f'{seen} of the {len(keys)} images' if seen else ''
    if not is_same or training.get('val_split') != config.val_split:
        share = share_among(files_of(held), trained_files(config, training))
        return f'about {share:.0%} of the images' if share >= SEEN else ''
    return ''
