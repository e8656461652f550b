"""The network that labels images, its exit policy, and the names of its classes."""

import logging
from typing import Iterable, Iterator, List, Optional

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from ...adaptive import AdaptiveModel, ExitPolicy, Prediction
from ...adaptive.evaluate import cumulative_costs
from ...cost import exit_costs
from ...data import ClassNames, class_label
from ...errors import UserError, as_user_error
from ...network import Network, load_network
from .config import PredictConfig

__all__ = ['choose_policy', 'label_type', 'labels', 'load', 'predictions']

_logger = logging.getLogger('predict')


def load(config: PredictConfig) -> Network:
    """Load the network of a configuration.

    Raises:
        UserError: It cannot be loaded, or has no classes.
    """
    network = load_network(config.network, config.use_ema)
    if not network.model.num_classes:
        raise UserError(f'{config.network!r} has no classes to tell apart (num_classes=0).')
    return network


def choose_policy(config: PredictConfig, network: Network) -> Optional[ExitPolicy]:
    """Choose when images leave: as `threshold` says, else as the policy beside the weights does.

    Args:
        config: The prediction.
        network: The network.

    Returns:
        Exit policy; None if the last exit answers every image.

    Raises:
        UserError: The policy or the threshold does not fit the network.
    """
    model = network.model
    if config.threshold is not None and config.no_policy:
        raise UserError('--threshold lets images leave early, --no-policy does not: give one of the two.')
    if config.threshold is None and (network.policy_file is None or config.no_policy):
        return None
    if not model.resumable:
        if config.threshold is None:
            _logger.warning(f'The exit policy is not used: the network runs as a whole: {model.why_not_resumable}.')
            return None
        raise UserError(f'--threshold: the network answers at its last exit only: {model.why_not_resumable}.')
    if config.threshold is not None:
        return ExitPolicy((config.threshold,) * (model.num_exits - 1))
    assert network.policy_file is not None  # without it and a threshold there is no policy
    with as_user_error('the exit policy cannot be used, --no-policy does without it'):
        policy = ExitPolicy.load_for(network.policy_file, model)
    return policy.without_digest()  # checked once, not with every image


def label_type(network: Network, asked: Optional[str] = None) -> str:
    """Kind of labels of a network.

    Args:
        network: The network.
        asked: One of `LABEL_TYPES`, or None.

    Returns:
        `asked`; if that is None, ``description`` for a network without names whose number of classes is that of
        ImageNet-1k or of one of its larger sets, as timm guesses, and else ``name``.
    """
    is_imagenet = network.class_names is None and infer_imagenet_subset(network.model) is not None
    return asked or ('description' if is_imagenet else 'name')


def labels(network: Network, asked: Optional[str] = None) -> Optional[List[str]]:
    """Labels of the classes of a network.

    Args:
        network: The network.
        asked: One of `LABEL_TYPES`: ``name`` as stored with the network, or an index without one; ``description`` or
            ``detailed`` for ImageNet's classes in words; ``none``. Default: as `label_type` says.

    Returns:
        Labels, [C]; None for ``none``.

    Raises:
        UserError: Descriptions are asked for, and the classes are not those of ImageNet.
    """
    kind = label_type(network, asked)
    if kind == 'none':
        return None
    if kind == 'name':
        names = [class_label(network.class_names, index) for index in range(network.model.num_classes)]
        # a folder's name may have bytes that are no text, as those of image files
        return [name.encode('utf-8', 'backslashreplace').decode() for name in names]
    return _descriptions(network.class_names, infer_imagenet_subset(network.model), kind)


def _descriptions(names: Optional[ClassNames], subset: Optional[str], kind: str) -> List[str]:
    """ImageNet's classes in words, [C], by their WordNet IDs, or by their indices in a subset if there are no names."""
    info = ImageNetInfo(subset or 'imagenet-22k')
    synsets = names if names is not None else info.label_names() if subset else None
    try:
        if synsets is None:
            raise KeyError('0, which has no name')
        is_detailed = kind == 'detailed'
        return [info.label_name_to_description(str(synset), detailed=is_detailed) for synset in synsets]
    except KeyError as e:
        raise UserError(
            f'--label-type {kind}: expected a network whose classes are WordNet IDs such as n01440764, got class '
            f'{e.args[0]}; leave the flag out.'
        ) from None


def predictions(
    network: Network, policy: Optional[ExitPolicy], batches: Iterable[torch.Tensor]
) -> Iterator[Prediction]:
    """Answer batch after batch, by a stream if images may leave early.

    Args:
        network: The network, in evaluation mode.
        policy: Exit policy; None for the last exit.
        batches: Batches of images, [B, C, H, W], on the device of the network.

    Yields:
        Answers per batch, in order. Costs are multiply-adds, or NaN if those of the exits are unknown.
    """
    model = network.model
    size = network.data_config['input_size']
    if policy is not None:
        yield from AdaptiveModel(model, policy, exit_costs(model, size)).predict_stream(batches)
        return
    last = model.num_exits - 1
    off = ExitPolicy((float('inf'),) * last)
    cost = float(cumulative_costs(exit_costs(model, size), off)[-1]) if model.resumable else float('nan')
    for images in batches:
        with torch.no_grad():
            logits = model(images)
        count = len(logits)
        yield Prediction(logits, torch.full((count,), last), torch.full((count,), cost, dtype=torch.float64))
