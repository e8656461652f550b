"""An exit policy that was fitted to clean images, on corrupted ones: does its risk stay under its limit?"""

import logging
import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch.utils.data import Dataset, IterableDataset

from ..adaptive import ExitPolicy, evaluate_policy
from ..cost import ExitCost
from ..data import CorruptedImages, check_corruptions
from ..errors import UserError
from ..report import format_table
from ..report.intervals import Z
from .evaluator import Evaluator, LabelledLogits
from .fit_policy import RISK_NAMES, backbone_macs
from .static_networks import StaticNetwork

__all__ = [
    'RiskLimit',
    'check_corruptible',
    'corruption_rows',
    'corruption_table',
    'describe_corruptions',
    'risk_limit',
]

_logger = logging.getLogger('validate')


class RiskLimit(NamedTuple):
    """What a policy promises on clean images.

    Attributes:
        risk: Kind of risk, one of `timm_mlcsd.adaptive.RISKS`.
        limit: Largest risk in points; None for a policy without a limit.
    """

    risk: str = 'drop'
    limit: Optional[float] = None


def risk_limit(policy: ExitPolicy, max_drop: Optional[float], risk: str) -> RiskLimit:
    """The limit that a policy was certified for, or fitted to.

    Args:
        policy: The policy.
        max_drop: Limit that it was fitted to; None if it was fitted to something else.
        risk: Kind of risk of `max_drop`.
    """
    if policy.certificate is not None:
        return RiskLimit(policy.certificate['risk'], policy.certificate['limit'])
    return RiskLimit(risk, max_drop)


def check_corruptible(evaluator: Evaluator, static: Sequence[StaticNetwork], dataset: Dataset[Any]) -> None:
    """Check that the images of all networks can be corrupted.

    Raises:
        UserError: They cannot.
    """
    for data_config in (evaluator.data_config, *(network.evaluator.data_config for network in static)):
        check_corruptions(data_config['input_size'])
    if isinstance(dataset, IterableDataset):
        raise UserError('--corruptions: expected a data set of known length, got a stream.')


def corruption_rows(
    evaluator: Evaluator,
    dataset: Dataset[Any],
    clean: LabelledLogits,
    policy: ExitPolicy,
    costs: Sequence[ExitCost],
    static: Sequence[StaticNetwork],
    risk: str,
    names: Sequence[str],
    severity: int,
) -> List[Dict[str, Any]]:
    """Evaluate a policy on a data set and on corrupted copies of it.

    Args:
        evaluator: Evaluator of the network.
        dataset: Images.
        clean: Logits of the network on them.
        policy: Exit policy.
        costs: Costs of the exits.
        static: Networks without early exits to compare with.
        risk: Kind of risk to measure.
        names: Names of the corruptions.
        severity: Severity of the corruptions, 1 to 5.

    Returns:
        One dict per corruption, after one for the images as they are; ``against`` has the accuracies of `static`.
    """
    rows = []
    for name in (None, *names):
        _logger.info(f'Corruption: {name or "none"}')
        data = dataset if name is None else CorruptedImages(dataset, name, severity)
        test = clean if name is None else evaluator.logits(data)
        against = [network.evaluator.evaluate(data).exits[-1].top1 for network in static]
        rows.append(dict(corruption=name or 'none', **_row(test, policy, costs, risk), against=against))
    return rows


def _row(test: LabelledLogits, policy: ExitPolicy, costs: Sequence[ExitCost], risk: str) -> Dict[str, Any]:
    """Accuracy in %, risk in points with the half-width of its 95% interval, and cost as a share of the backbone's."""
    result = evaluate_policy(*test, costs, policy)
    last = test.logits[-1].argmax(dim=-1)
    losses = _losses(result.prediction, result.exit_index, last, test, risk).double()
    deviation = losses.std(correction=0).item() if len(losses) else 0.0
    return dict(
        last_top1=100 * (last == test.targets).double().mean().item(),
        top1=result.accuracy,
        risk=100 * losses.mean().item() if len(losses) else 0.0,
        half_width=100 * Z * deviation / math.sqrt(len(losses)) if len(losses) else 0.0,
        macs_percent=100 * result.cost / backbone_macs(costs),
    )


def _losses(
    prediction: torch.Tensor, exit_index: torch.Tensor, last: torch.Tensor, test: LabelledLogits, risk: str
) -> torch.Tensor:
    """Loss per image, whose mean is the risk; for ``selective`` only of images that leave early."""
    if risk == 'disagreement':
        return prediction != last
    right = prediction == test.targets
    if risk == 'selective':
        return ~right[exit_index < len(test.logits) - 1]
    return (last == test.targets).int() - right.int()


def corruption_table(rows: Sequence[Dict[str, Any]], risk: str, static: Sequence[str]) -> str:
    """The rows of `corruption_rows` as a table, with their mean over the corruptions.

    Args:
        rows: The rows.
        risk: Kind of risk.
        static: Names of the networks without early exits.
    """
    values = [[*list(row.values())[:-1], *row['against']] for row in rows]
    mean = ['mean of the corruptions', *(sum(column) / len(column) for column in list(zip(*values[1:]))[1:])]
    mean[4] = None  # the interval of a mean over corruptions of the same images is another one
    headers = ['Corruption', 'Last exit %', 'Adaptive %', f'{RISK_NAMES[risk].capitalize()}, points', '+/-', 'MACs %']
    return format_table([*headers, *(f'{name} %' for name in static)], [*values, mean])


def describe_corruptions(rows: Sequence[Dict[str, Any]], limit: RiskLimit) -> str:
    """One sentence: whether the risk stays under its limit on corrupted images."""
    what = RISK_NAMES[limit.risk]
    corrupted = rows[1:]
    if limit.limit is None:
        worst = max(corrupted, key=lambda row: row['risk'])
        return f'The policy has no limit; the largest {what} is {worst["risk"]:.2f} points ({worst["corruption"]}).'
    above = [row for row in corrupted if row['risk'] > limit.limit]
    kept = f'{len(corrupted) - len(above)} of {len(corrupted)}'
    text = f'The {what} is at most {limit.limit:g} points on {kept} corruptions'
    if above:
        text += ', above it on ' + ', '.join(f'{row["corruption"]} ({row["risk"]:.2f})' for row in above)
        text += '; a limit holds for images like those of the calibration'
    return f'{text}.'
