"""The exit policy of validate.py --adaptive: named by the flags, or fitted to validation images."""

import argparse
import math
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..adaptive import ExitPolicy, calibrate, fit_temperatures, fit_weights
from ..cost import ExitCost, stage_times
from ..data import is_divided
from ..errors import UserError, blame
from ..models import MultiExitModel
from ..network import Network, policy_place
from .build import autocast_of
from .datasets import check_classes, class_names, load_dataset, same_split
from .held_out import halves_of, held_out, is_data_of, is_same_data, is_trained_on

__all__ = [
    'Logits',
    'backbone_macs',
    'check_flags',
    'load_calibration',
    'policy_of',
    'policy_path',
    'reports_on_half',
]


class Logits(NamedTuple):
    """What the exits say of N images: logits [K, N, C] and labels [N], on the CPU."""

    logits: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> 'Logits':
        """From what `exit_logits` yields."""
        pairs = [(z.cpu(), y.cpu()) for z, y in batches]
        if not pairs:
            raise UserError('there are no images to evaluate on.')
        logits, targets = zip(*pairs)
        logits = torch.cat(logits, dim=1)
        if logits.isnan().any():
            count = int(logits.isnan().any(-1).any(0).sum())
            raise UserError(f'the network answers NaN for {count} images; thresholds cannot be compared with that.')
        return cls(logits, torch.cat(targets))

    def answers(self, policy: ExitPolicy) -> torch.Tensor:
        """What each exit would say under a policy, [K, N, C]; an exit that is off, alone."""
        memory, answers = None, []
        for k, logits in enumerate(self.logits):
            if policy.is_on(k):
                answer, _, memory = policy.answer(k, logits, memory)
            else:
                answer = logits / (policy.temperatures[k] if policy.temperatures else 1.0)
            answers.append(answer)
        return torch.stack(answers)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    goals = [flag for flag in ('budget', 'latency_budget', 'max_drop') if getattr(args, flag) is not None]
    others = [flag for flag in ('policy', 'save_policy', 'report', 'calibration_split') if getattr(args, flag)]
    named = [f'--{flag.replace("_", "-")}' for flag in (*goals, *others)]
    if named and not args.adaptive:
        raise UserError(f'{", ".join(named)}: only with --adaptive.')
    if len(goals) > 1:
        raise UserError(f'{", ".join(named[: len(goals)])}: give one of them.')
    if args.policy and goals:
        raise UserError(f'{named[0]} fits a policy, --policy names one: give one of the two.')
    if not goals and (args.score or args.aggregate or args.method):
        raise UserError(
            '--score, --aggregate and --method are of a policy to fit; give --budget, --latency-budget or --max-drop.'
        )
    if args.save_policy and not goals:
        raise UserError('--save-policy: no policy is fitted; give --budget, --latency-budget or --max-drop.')
    if args.latency_budget is not None and not 0 < args.latency_budget < math.inf:
        raise UserError(f'--latency-budget {args.latency_budget} must be a positive number of milliseconds.')
    if args.max_drop is not None and not math.isfinite(args.max_drop):
        raise UserError(f'--max-drop {args.max_drop} must be a number of points.')
    if args.budget is not None:
        _budget(args.budget, 1.0)


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


def load_calibration(args: argparse.Namespace, checkpoint: Dict[str, Any]) -> Tuple[Any, str]:
    """The images to fit a policy to, and what to call them: never those trained on, never those to report on.

    Raises:
        UserError: There are none, or they are the wrong ones.
    """
    split = args.calibration_split
    if split is None and 'val_indices' in checkpoint:
        dataset, name = held_out(args, checkpoint)
        if reports_on_half(args):
            return halves_of(dataset)[0], f'one half of {name}'
        if args.held_out or is_trained_on(args, checkpoint, args.split):
            flag = '--held-out' if args.held_out else f'--split {args.split}'
            raise UserError(f'{flag}: the policy is fitted to these images; report on others, {_others(args)}.')
        return dataset, name
    split = split or checkpoint.get('val_split')
    if split is None:
        raise UserError('the network does not tell which images chose it: name a --calibration-split.')
    if is_trained_on(args, checkpoint, split):
        instead = (
            'leave --calibration-split out for the images that training held out'
            if 'val_indices' in checkpoint
            else 'name another split'
        )
        raise UserError(
            f'the checkpoint was trained on split {split!r}: thresholds fitted there would promise too much; {instead}.'
        )
    if same_split(split, args.split) and not args.held_out:
        raise UserError(f'the policy would be fitted to split {split!r} and reported on it; name another --split.')
    dataset = load_dataset(args, split, needs_folder=True)
    if is_data_of(dataset, checkpoint):
        raise UserError(
            f'--calibration-split {split}: these are the images that the checkpoint was trained on, in another place: '
            f'thresholds fitted there would promise too much; name another split.'
        )
    return dataset, split


def _fit(
    args: argparse.Namespace,
    model: MultiExitModel,
    val: Logits,
    costs: Sequence[ExitCost],
    example: torch.Tensor,
) -> ExitPolicy:
    """The policy that the flags ask for.

    Args:
        args: The flags.
        model: The network on its device.
        val: Of the images to fit it to.
        costs: Of the exits.
        example: One image [1, C, H, W] on the model's device, to time the stages with.
    """
    fitted: Dict[str, Any] = dict(score=args.score or 'confidence', aggregate=args.aggregate or 'last')
    with blame('the validation images do not fit the network'):
        fitted['temperatures'] = fit_temperatures(*val)
        if args.aggregate == 'fitted':
            fitted['weights'] = fit_weights(*val, fitted['temperatures'])
    fitted['exit_names'] = model.exit_names
    goal: Dict[str, float] = dict(max_drop=args.max_drop)
    flag = '--max-drop'
    if args.budget is not None:
        flag, goal = '--budget', dict(budget=_budget(args.budget, backbone_macs(costs)))
    elif args.latency_budget is not None:
        flag, goal = '--latency-budget', dict(budget=args.latency_budget)
        costs = stage_times(model, example, repeats=20, autocast=autocast_of(args, example.device))
    with blame(flag):
        return calibrate(*val, costs, method=args.method or 'optimal', **goal, **fitted)


def backbone_macs(costs: Sequence[ExitCost]) -> int:
    """Multiply-adds of the plain backbone: all stages and its own end."""
    return sum(cost.stage_macs for cost in costs) + costs[-1].head_macs


def _load(path: Optional[Path], model: MultiExitModel) -> ExitPolicy:
    """The policy in a file that the flags, or the weights beside it, name."""
    if path is None:
        raise UserError(
            '--adaptive: there is no policy beside the weights; give --budget B, --latency-budget MS or --max-drop P '
            'to fit one, or --policy FILE.'
        )
    with blame(f'--policy {str(path)!r}'):
        policy = ExitPolicy.load(path)
        policy.check(model.num_exits, model.exit_names)
        policy.check_weights(model)
    return policy


def policy_path(args: argparse.Namespace) -> Path:
    """Where ``--save-policy`` wants the policy."""
    if args.save_policy is not True:
        return Path(args.save_policy)
    path = policy_place(args.checkpoint or args.model)
    if path is None:
        raise UserError(f'--save-policy: {args.model!r} is no place to write to; name a FILE.')
    return path


def reports_on_half(args: argparse.Namespace) -> bool:
    """Whether one half of the held-out images is reported on and the other fitted to: where there is no other split."""
    alone = not args.dataset and not is_divided(args.data_dir)
    return args.held_out and alone and _fits_a_policy(args) and not args.calibration_split


def _others(args: argparse.Namespace) -> str:
    """Images to report on, for an error."""
    if args.dataset or is_divided(args.data_dir):
        return '--split test say'
    return '--held-out for the half of the held-out images that it is not fitted to'


def _fits_a_policy(args: argparse.Namespace) -> bool:
    """Whether the flags fit policies: to a goal, or for the page."""
    goals = (args.budget, args.latency_budget, args.max_drop)
    return args.adaptive and (any(goal is not None for goal in goals) or bool(args.report))


def _check_not_fitted_to(policy: ExitPolicy, path: Path, args: argparse.Namespace, checkpoint: Dict[str, Any]) -> None:
    """Refuse to report on the images that a policy was fitted to."""
    name = policy.calibration_data
    if name is None or not is_same_data(args, checkpoint):
        return
    held = f'the held-out part of {checkpoint.get("train_split")}'
    reported = name in (held, f'one half of {held}') if args.held_out else same_split(name, args.split)
    if reported:
        raise UserError(
            f'{path} was fitted to {name}, so a report on these images would promise too much; report on others, or '
            f'fit a policy with --budget, --latency-budget or --max-drop.'
        )


def policy_of(
    args: argparse.Namespace,
    network: Network,
    names: Optional[List[str]],
    costs: Sequence[ExitCost],
    loader_of: Callable[[Any], Any],
    batches_of: Callable[[Any], Iterator[Tuple[torch.Tensor, torch.Tensor]]],
) -> Tuple[ExitPolicy, Optional[Logits], str]:
    """The policy that the flags fit or name, what it was or could be fitted to, and what to call where it comes from.

    Args:
        args: The flags.
        network: The network.
        names: Classes of the images to report on.
        costs: Of the exits.
        loader_of: Makes a loader for a data set.
        batches_of: Yields logits and labels of a loader.
    """
    goals = {flag: getattr(args, flag) for flag in ('budget', 'latency_budget', 'max_drop')}
    goal = ', '.join(f'{flag.replace("_", " ")} {value}' for flag, value in goals.items() if value is not None)
    if not goal:
        path = Path(args.policy) if args.policy else network.policy_file
        policy = _load(path, network.model)
        _check_not_fitted_to(policy, path, args, network.checkpoint)
        if not args.report:
            return policy, None, f'policy {path}'
    dataset, split = load_calibration(args, network.checkpoint)
    check_classes(class_names(dataset), network.class_names or names, split)
    loader = loader_of(dataset)
    val = Logits.of(batches_of(loader))
    if not goal:
        return policy, val, f'policy {path}'
    example = next(iter(loader))[0][:1].to(next(network.model.parameters()).device)
    if args.channels_last:
        example = example.contiguous(memory_format=torch.channels_last)
    policy = _fit(args, network.model, val, costs, example)
    policy = policy.for_weights(network.model, data=split, images=len(val.targets))
    return policy, val, f'fitted to {len(val.targets)} images of {split}, {goal}'
