"""The exit policy of a validation: read from a file, or fitted to calibration images."""

import logging
import math
import os
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from torch.utils.data import Dataset

from ..adaptive import Calibration, ExitPolicy, run_calibration
from ..adaptive.evaluate import Costs
from ..cost import ExitCost, stage_times
from ..data import IMAGE_MODE, has_split_folders, num_images
from ..errors import UserError, as_user_error, printable
from ..network import Network, policy_path
from .calibration_data import check_calibration_split, check_not_fitted_to, check_unlabelled
from .datasets import check_classes, class_names, load_dataset, same_split
from .evaluator import Evaluator, LabelledLogits
from .flat_config import as_lists
from .held_out import halves_of, held_out, held_out_names, is_data_of, is_trained_on
from .prediction.images import NumberedImages, load_images
from .validate_config import ValidateConfig

__all__ = [
    'RISK_NAMES',
    'backbone_macs',
    'check_policy_flags',
    'describe_certificate',
    'load_calibration',
    'fit_or_load_policy',
    'saved_policy_path',
    'reports_on_half',
]

_logger = logging.getLogger(__name__)

# kinds of risk in sentences
RISK_NAMES = {'drop': 'drop', 'selective': 'share of wrong early answers', 'disagreement': 'disagreement'}


def check_policy_flags(config: ValidateConfig) -> None:
    """Refuse policy flags that contradict each other."""
    goals = [flag for flag in ('budget', 'latency_budget', 'max_drop') if getattr(config, flag) is not None]
    with_policy = (
        'policy',
        'save_policy',
        'report',
        'calibration_split',
        'calibration_images',
        'against',
        'corruptions',
    )
    others = [flag for flag in with_policy if getattr(config, flag)]
    named = [f'--{flag.replace("_", "-")}' for flag in (*goals, *others)]
    if named and not config.adaptive:
        raise UserError(f'{", ".join(named)}: only with --adaptive.')
    if config.severity != ValidateConfig.severity and not config.corruptions:
        raise UserError(f'--severity {config.severity}: expected --corruptions, whose severity it is.')
    if len(goals) > 1:
        raise UserError(f'{", ".join(named[: len(goals)])}: give one of them.')
    if config.policy and goals:
        raise UserError(f'{named[0]} fits a policy, --policy names one: give one of the two.')
    _check_goals(config, goals)
    if config.calibration_images:
        _check_unlabelled(config)


def _check_goals(config: ValidateConfig, goals: Sequence[str]) -> None:
    """Refuse settings of a fit without a policy to fit, and goals that are no numbers."""
    if not goals and (config.score or config.aggregate or config.method):
        raise UserError(
            '--score, --aggregate and --method are of a policy to fit; give --budget, --latency-budget or --max-drop.'
        )
    if config.save_policy and not goals:
        raise UserError('--save-policy: no policy is fitted; give --budget, --latency-budget or --max-drop.')
    if config.latency_budget is not None and not 0 < config.latency_budget < math.inf:
        raise UserError(f'--latency-budget {config.latency_budget} must be a positive number of milliseconds.')
    if config.risk != 'drop' and config.max_drop is None:
        raise UserError(f'--risk {config.risk}: expected --max-drop P, the limit of the risk.')
    if config.confidence != ValidateConfig.confidence and config.max_drop is None:
        raise UserError('--confidence: expected --max-drop P, the limit that it is for.')
    if config.calibration_split and not goals:
        raise UserError(
            '--calibration-split: no policy is fitted to it; give --budget, --latency-budget or --max-drop.'
        )
    if config.max_drop is not None and not math.isfinite(config.max_drop):
        raise UserError(f'--max-drop {config.max_drop} must be a number of points.')
    if config.budget is not None:
        _budget(config.budget, 1.0)


def _check_unlabelled(config: ValidateConfig) -> None:
    """Refuse settings that need labels of the calibration images."""
    if config.risk != 'disagreement' or config.max_drop is None:
        raise UserError('--calibration-images: expected --max-drop P --risk disagreement, which needs no labels.')
    for flag in ('calibration_split', 'report'):
        if getattr(config, flag):
            raise UserError(f'--calibration-images: expected no --{flag.replace("_", "-")}, which needs labels.')
    if config.aggregate == 'fitted':
        raise UserError('--calibration-images: expected another --aggregate than fitted, which needs labels.')


def _budget(text: str, backbone: float) -> float:
    """The budget in MACs."""
    try:
        number = float(text.rstrip('%'))
        if not 0 < number < math.inf:
            raise ValueError
    except ValueError:
        raise UserError(
            f'--budget {text!r} must be a positive number of MMACs, or a percentage of the plain backbone such as 60%.'
        ) from None
    return number / 100 * backbone if text.endswith('%') else number * 1e6


def load_calibration(config: ValidateConfig, checkpoint: Dict[str, Any]) -> Tuple[Any, str]:
    """Load the calibration images, and a name for them: never training images, never those reported on.

    Raises:
        UserError: There are none, or they are the wrong ones.
    """
    split = config.calibration_split
    if split is None and 'val_indices' in checkpoint:
        images, name = held_out(config.data, checkpoint)
        if reports_on_half(config):
            return halves_of(images)[0], held_out_names(checkpoint)[1]
        if config.held_out or is_trained_on(config.data, checkpoint, config.split):
            flag = '--held-out' if config.held_out else f'--split {config.split}'
            raise UserError(f'{flag}: the policy is fitted to these images; report on others, {_others(config)}.')
        return images, name
    split = split or checkpoint.get('val_split')
    if split is None:
        raise UserError('the network does not tell which images chose it: name a --calibration-split.')
    if is_trained_on(config.data, checkpoint, split):
        instead = (
            'leave --calibration-split out for the images that training held out'
            if 'val_indices' in checkpoint
            else 'name another split'
        )
        raise UserError(
            f'the checkpoint was trained on split {split!r}: thresholds fitted there would promise too much; {instead}.'
        )
    if same_split(split, config.split) and not config.held_out:
        raise UserError(f'the policy would be fitted to split {split!r} and reported on it; name another --split.')
    if 'train_split' not in checkpoint and same_split(split, 'train'):
        _logger.warning(
            f'--calibration-split {split}: the weights have no record of what they were trained on. If it was these '
            f'images, the policy promises too much.'
        )
    dataset = load_dataset(config.data, split, needs_folder=True)
    if is_data_of(dataset, checkpoint):
        raise UserError(
            f'--calibration-split {split}: these are the images that the checkpoint was trained on, in another place: '
            f'thresholds fitted there would promise too much; name another split.'
        )
    return dataset, split


def _fit(
    config: ValidateConfig,
    evaluator: Evaluator,
    val: LabelledLogits,
    costs: Sequence[ExitCost],
    loader: Iterable[Any],
) -> Calibration:
    """Fit the policy that the configuration asks for.

    Args:
        config: Goal and kind of the policy.
        evaluator: Evaluator of the network.
        val: Logits on the calibration images; their targets are not used for `calibration_images`.
        costs: Costs of the exits.
        loader: Loader of the calibration images, the first of which the stages are timed with.
    """
    budget, flag = None, '--max-drop'
    cost_or_time: Costs = costs
    if config.budget is not None:
        budget, flag = _budget(config.budget, backbone_macs(costs)), '--budget'
    elif config.latency_budget is not None:
        budget, flag = config.latency_budget, '--latency-budget'
        example = evaluator.prepared(next(iter(loader))[0][:1])
        cost_or_time = stage_times(evaluator.model, example, repeats=20, autocast=evaluator.autocast)
    with as_user_error(flag):
        return run_calibration(
            val.logits,
            None if config.calibration_images else val.targets,
            cost_or_time,
            budget=budget,
            max_drop=config.max_drop,
            confidence=config.confidence,
            risk=config.risk,
            method=config.method or 'auto',
            temperatures='fit',
            weights='fit' if config.aggregate == 'fitted' else None,
            score=config.score or 'confidence',
            aggregate=config.aggregate or 'last',
            exit_names=evaluator.model.exit_names,
        )


def backbone_macs(costs: Sequence[ExitCost]) -> int:
    """Multiply-adds of the plain backbone: all stages and its own end."""
    return sum(cost.stage_macs for cost in costs) + costs[-1].head_macs


def _policy_file(config: ValidateConfig, network: Network) -> Path:
    """Path of the policy that ``--policy`` names, or of the one beside the weights."""
    path = Path(config.policy) if config.policy else network.policy_file
    if path is None:
        raise UserError(
            '--adaptive: there is no policy beside the weights; give --budget B, --latency-budget MS or --max-drop P '
            'to fit one, or --policy FILE.'
        )
    return path


def saved_policy_path(config: ValidateConfig) -> Path:
    """Path of the file that ``--save-policy`` names."""
    if isinstance(config.save_policy, str):
        return Path(config.save_policy)
    path = policy_path(config.source)
    if path is None:
        raise UserError(f'--save-policy: {config.model!r} is no place to write to; name a FILE.')
    return path


def reports_on_half(config: ValidateConfig) -> bool:
    """Whether one half of the held-out images is for calibration and one for the report, as there is no other split."""
    return config.held_out and not _has_splits(config) and _fits_a_policy(config) and not config.calibration_split


def _has_splits(config: ValidateConfig) -> bool:
    """Whether the data may have other splits; a folder of images without folders for splits has none."""
    data_dir = config.data.data_dir
    return bool(config.data.dataset) or (data_dir is not None and has_split_folders(data_dir))


def _others(config: ValidateConfig) -> str:
    """Advice in errors: other images to report on."""
    if _has_splits(config):
        return '--split test say'
    return '--held-out for the half of the held-out images that it is not fitted to'


def _fits_a_policy(config: ValidateConfig) -> bool:
    """Whether a policy is fitted: to a goal, or for the HTML report."""
    goals = (config.budget, config.latency_budget, config.max_drop)
    return config.adaptive and (any(goal is not None for goal in goals) or bool(config.report))


def _other_preprocessing(network: Network, evaluator: Evaluator) -> str:
    """Names of the settings in which the preprocessing is not that of the network; empty if there are none."""
    own = network.checkpoint.get('data_config') or network.data_config
    keys = [key for key in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode') if key in own]
    before, now = as_lists(own), as_lists(evaluator.data_config)
    return ', '.join(key for key in (*keys, IMAGE_MODE) if before.get(key) != now.get(key))


def describe_certificate(certificate: Dict[str, Any]) -> str:
    """Sentence about what is certified of a policy."""
    return (
        f'certified: {RISK_NAMES[certificate["risk"]]} on new images of at most {certificate["limit"]:g} points, with '
        f'confidence {certificate["confidence"]:g}, from {certificate["images"]} images ({certificate["bound"]})'
    )


class ChosenPolicy(NamedTuple):
    """The policy of a validation.

    Attributes:
        policy: The policy.
        val: Logits on the calibration images; None where they were not needed or have no labels.
        origin: Where the policy comes from.
        calibration: How it was fitted; None for a policy from a file.
    """

    policy: ExitPolicy
    val: Optional[LabelledLogits]
    origin: str
    calibration: Optional[Calibration] = None

    def describe(self) -> List[str]:
        """Lines about what was fitted and certified."""
        certificate = self.policy.certificate
        return [*self.describe_fit(), *([] if certificate is None else [describe_certificate(certificate)])]

    def describe_fit(self) -> List[str]:
        """Lines about what was fitted."""
        if self.calibration is not None:
            fitted = self.calibration
            what = 'agreement with the last exit' if self.val is None else 'top-1'
            line = f'method {fitted.method}: {what} {fitted.accuracy:.2f} on the calibration images'
            if fitted.cross_validated is not None:
                line += f', {fitted.cross_validated[0]:.2f} in cross-validation'
            return [line]
        return []

    def record(self) -> Dict[str, Any]:
        """The same for the results file."""
        record: Dict[str, Any] = dict(fitted_to=self.origin)
        if self.calibration is not None:
            values = self.calibration._asdict()
            record['calibration'] = {name: value for name, value in values.items() if name != 'policy'}
        return record


def fit_or_load_policy(
    config: ValidateConfig,
    network: Network,
    evaluator: Evaluator,
    reported: Dataset[Any],
    split: str,
    costs: Sequence[ExitCost],
) -> ChosenPolicy:
    """Fit the policy, or load it.

    Args:
        config: Goal, kind or file of the policy.
        network: The network.
        evaluator: Evaluator of the network.
        reported: Images to report on.
        split: Their name.
        costs: Costs of the exits.

    Raises:
        UserError: The policy does not fit the network, or none can be fitted.
    """
    goals = {flag: getattr(config, flag) for flag in ('budget', 'latency_budget', 'max_drop')}
    goal = ', '.join(f'{flag.replace("_", " ")} {value}' for flag, value in goals.items() if value is not None)
    if not goal:
        path = _policy_file(config, network)
        with as_user_error(f'--policy {str(path)!r}'):
            policy = ExitPolicy.load_for(path, network.model)
        check_not_fitted_to(policy, path, config, network, reported)
        if others := _other_preprocessing(network, evaluator):
            raise UserError(
                f'--policy {str(path)!r}: expected images with the preprocessing of the network, which the policy was '
                f'fitted to, got another {others}; leave its flag out, or fit a policy with --budget, '
                f'--latency-budget or --max-drop.'
            )
        if not config.report:
            return ChosenPolicy(policy, None, f'policy {path}')
    if config.save_policy and (others := _other_preprocessing(network, evaluator)):
        raise UserError(
            f'--save-policy: expected images with the preprocessing of the network, with which the policy will be '
            f'used, got another {others}; leave its flag out, or do not save the policy.'
        )
    if config.calibration_images:
        dataset, data = _unlabelled(config, network, evaluator, reported, split)
    else:
        dataset, data = load_calibration(config, network.checkpoint)
        check_classes(class_names(dataset), network.class_names or class_names(reported), data)
        check_calibration_split(dataset, data, config.data, network.checkpoint, reported, split)
    loader = evaluator.loader(dataset, has_labels=not config.calibration_images)
    val = evaluator.logits(loader)
    if not goal:
        return ChosenPolicy(policy, val, f'policy {path}')
    calibration = _fit(config, evaluator, val, costs, loader)
    policy = calibration.policy.for_weights(network.model, data=data, images=len(val.targets))
    origin = f'fitted to {len(val.targets)} images of {data}, {goal}'
    return ChosenPolicy(policy, None if config.calibration_images else val, origin, calibration)


def _unlabelled(
    config: ValidateConfig, network: Network, evaluator: Evaluator, reported: Dataset[Any], split: str
) -> Tuple[Dataset[Any], str]:
    """The calibration images without labels, with their numbers as targets, and a name for them."""
    first, *others = config.calibration_images
    images = load_images(config.data, [first, *others], '', evaluator.data_config, config.data.max_bad_samples).dataset
    check_unlabelled(images, config.data, network.checkpoint, reported, split)
    # a separator tells a path from the name of a split
    place = first if os.sep in first else os.path.join(os.curdir, first)
    name = printable(place)[-200:] + (f' and {len(others)} more' if others else '')
    return NumberedImages(images, range(num_images(images))), name
