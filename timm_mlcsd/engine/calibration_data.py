"""Checks of the images that a policy is fitted to: not those that it is reported on, nor those of training."""

import logging
import os
import re
from pathlib import Path
from typing import Any, Dict

from torch.utils.data import Dataset

from ..adaptive import ExitPolicy
from ..errors import UserError, printable
from ..network import Network
from .data_config import DataConfig
from .datasets import same_split
from .held_out import halves_of, held_out, held_out_names, is_same_data, load_if_there
from .image_files import ImageFiles, files_among, files_of, share_among
from .seen_images import SEEN, share_of_moved, trained_files, training_data
from .validate_config import ValidateConfig

__all__ = ['check_calibration_split', 'check_not_fitted_to', 'check_unlabelled']

_logger = logging.getLogger(__name__)

# share of the calibration images that may not be others' images; from `SEEN` on there is a warning
TOO_MANY = 0.5


def check_unlabelled(
    images: Dataset[Any], config: DataConfig, checkpoint: Dict[str, Any], reported: Dataset[Any], split: str
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
    calibration, reported_files = files_of(images), files_of(reported)
    if not reported_files:
        _logger.warning(
            f'--calibration-images: {split} has no files, so whether the images are among those that the policy is '
            f'reported on, or the network was trained on, cannot be checked.'
        )
    groups = {
        f'is one of the images of {split} that the policy is reported on': reported_files,
        'was trained on': trained_files(config, checkpoint),
    }
    for what, files in groups.items():
        if both := files_among(calibration, files):
            raise UserError(
                f'--calibration-images: {printable(min(both))} {what}, so the policy would promise too much; name '
                f'others.'
            )


def check_calibration_split(
    images: Dataset[Any], name: str, config: DataConfig, checkpoint: Dict[str, Any], reported: Dataset[Any], split: str
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
        UserError: Half of a sample of the images or more are among them.
    """
    files, reported_files = files_of(images), files_of(reported)
    trained = share_among(files, trained_files(config, checkpoint)) if files else 0.0
    shares = {
        f'are images of {split}, which the policy is reported on': share_among(files, reported_files),
        'were trained on': max(trained, share_of_moved(images, config, checkpoint)),
    }
    for what, share in shares.items():
        text = f'calibration: about {share:.0%} of the images of {name} {what}, so the policy would promise too much'
        if share >= TOO_MANY:
            raise UserError(f'{text}; name another split with --calibration-split.')
        if share >= SEEN:
            _logger.warning(f'{text}.')


def check_not_fitted_to(
    policy: ExitPolicy,
    path: Path,
    config: ValidateConfig,
    network: Network,
    reported: Dataset[Any],
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
        is_known = any(file == place or file.startswith(place + os.sep) for file in files_of(reported))
        is_unknown = first != name or not os.path.exists(place)
    else:
        is_known = is_unknown = False
    if is_known or share_among(files_of(reported), _fitted_files(name, config.data, checkpoint)) >= TOO_MANY:
        raise UserError(
            f'{path} was fitted to {name}, so a report on these images would promise too much; report on others, or '
            f'fit a policy with --budget, --latency-budget or --max-drop.'
        )
    if is_unknown:
        _logger.warning(
            f'{path} was fitted to {policy.calibration_images} images of {name}; whether they are reported on cannot '
            f'be checked. If they are, the report promises too much.'
        )


def _fitted_files(name: str, config: DataConfig, checkpoint: Dict[str, Any]) -> ImageFiles:
    """The files of the images that a policy was fitted to, if they are still there."""
    files: ImageFiles = {}
    for data in training_data(config, checkpoint):
        if name in held_out_names(checkpoint):
            try:
                images, whole = held_out(data, checkpoint)
            except (UserError, KeyError):
                continue
            files.update(files_of(images if name == whole else halves_of(images)[0]))
        elif re.fullmatch(r'[\w-]+', name):  # a name from a policy's file must not lead out of the data
            split = load_if_there(data, name, needs_folder=True)
            files.update(files_of(split) if split is not None else {})
    return files
