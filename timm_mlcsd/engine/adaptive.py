"""validate.py --adaptive: fit an exit policy to validation images, then run it on the images to report on."""

import argparse
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..adaptive import (
    AdaptiveModel,
    ExitPolicy,
    PolicyResult,
    calibrate,
    expected_calibration_error,
    fit_temperatures,
    fit_weights,
)
from ..cost import ExitCost, stage_times
from ..errors import UserError, blame
from ..models import MultiExitModel
from ..network import policy_place
from ..report import format_table
from .build import autocast_of
from .loaders import held_out, is_trained_on, load_dataset, same_split

__all__ = [
    'Logits',
    'Run',
    'check_flags',
    'fit_policy',
    'load_calibration',
    'load_policy',
    'policy_path',
    'run_adaptive',
    'tables',
]

# images that run one at a time as well
LATENCY_IMAGES = 200


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
                answer, _, _ = policy.answer(k, logits)
            answers.append(answer)
        return torch.stack(answers)


class Run(NamedTuple):
    """What the runtime did, beside the plain backbone on the same images in turn.

    Attributes:
        exit_index: Where each image left, [N].
        top1: Accuracy in %.
        backbone_top1: Of the plain backbone.
        images_per_second: Of both.
        latencies: Milliseconds per image at batch 1: 50th, 90th and 99th percentile, of both.
    """

    exit_index: torch.Tensor
    top1: float
    backbone_top1: float
    images_per_second: Tuple[float, float]
    latencies: List[Tuple[float, float]]


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
        if args.held_out or is_trained_on(args, checkpoint, args.split):
            flag = '--held-out' if args.held_out else f'--split {args.split}'
            raise UserError(f'{flag}: the policy is fitted to these images; report on others, --split test say.')
        return held_out(args, checkpoint)
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
    return load_dataset(args, split, needs_folder=True), split


def fit_policy(
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


def load_policy(path: Optional[Path], model: MultiExitModel) -> ExitPolicy:
    """The policy in a file that the flags, or the weights beside it, name."""
    if path is None:
        raise UserError(
            '--adaptive: there is no policy beside the weights; give --budget B, --latency-budget MS or --max-drop P '
            'to fit one, or --policy FILE.'
        )
    with blame(f'--policy {str(path)!r}'):
        policy = ExitPolicy.load(path)
        policy.check(model.num_exits, model.exit_names)
    return policy


def policy_path(args: argparse.Namespace) -> Path:
    """Where ``--save-policy`` wants the policy."""
    if args.save_policy is not True:
        return Path(args.save_policy)
    path = policy_place(args.checkpoint or args.model)
    if path is None:
        raise UserError(f'--save-policy: {args.model!r} is no place to write to; name a FILE.')
    return path


@torch.inference_mode()
def run_adaptive(
    args: argparse.Namespace,
    model: MultiExitModel,
    policy: ExitPolicy,
    loader: Iterable[Any],
    num_images: int,
    device: torch.device,
    look: Optional[Callable[[int, torch.Tensor], None]] = None,
) -> Run:
    """Run the policy and the plain network over a loader, batch by batch in turn, the clock on the networks alone.

    Args:
        args: The flags.
        model: The network.
        policy: When images leave.
        loader: Batches of (images, class indices).
        num_images: How many these are.
        device: Where the network is.
        look: Called with each batch: how many images were before it, and its images.
    """
    adaptive, autocast = AdaptiveModel(model, policy, range(model.num_exits)), autocast_of(args, device)
    # some at random: data sets are often sorted by class
    alone = set(torch.randperm(num_images, generator=torch.Generator().manual_seed(0))[:LATENCY_IMAGES].tolist())

    def timed(run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Tuple[Any, float]:
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with autocast or nullcontext():
            result = run(images)
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return result, time.perf_counter() - start

    exits, right, plain_right, seconds, latencies, count = [], 0, 0, [], [], 0
    for images, target in loader:
        if look is not None:
            look(count, images)
        images, target = images.to(device), target.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not seconds:  # neither clock pays for what is set up on a first call
            for some in (images, images[:1]):
                timed(lambda x: list(adaptive.iter_exits(x)), some)
                timed(model, some)
        prediction, took = timed(adaptive.predict, images)
        logits, plain_took = timed(model, images)
        seconds.append((took, plain_took))
        for image in (images[i : i + 1] for i in range(len(images)) if count + i in alone):
            latencies.append((timed(adaptive.predict, image)[1], timed(model, image)[1]))
        exits.append(prediction.exit_index.cpu())
        right += (prediction.logits.argmax(-1) == target).sum().item()
        plain_right += (logits.argmax(-1) == target).sum().item()
        count += len(target)
    total, plain_total = (sum(column) for column in zip(*seconds))
    columns = [sorted(1000 * t for t in column) for column in zip(*latencies)]
    return Run(
        torch.cat(exits),
        100 * right / count,
        100 * plain_right / count,
        (count / total, count / plain_total),
        [tuple(column[int(q * (len(column) - 1))] for column in columns) for q in (0.5, 0.9, 0.99)],
    )


def tables(
    policy: ExitPolicy,
    result: PolicyResult,
    run: Run,
    test: Logits,
    costs: Sequence[ExitCost],
    batch_size: int,
) -> Tuple[str, Dict[str, Any]]:
    """What to print, and the same for the results file."""
    right = result.prediction == test.targets
    before = expected_calibration_error(*test)
    after = expected_calibration_error(test.answers(policy), test.targets)
    exits = []
    for k, share in enumerate(result.exit_fractions):
        here = result.exit_index == k
        top1 = 100 * right[here].double().mean().item() if here.any() else None
        threshold = [*policy.thresholds, -math.inf][k]
        exits.append(
            dict(
                threshold='off' if threshold == math.inf else threshold if threshold > -math.inf else 'rest',
                share=100 * share,
                top1=top1,
                temperature=policy.temperatures[k] if policy.temperatures else 1.0,
                ece=before[k],
                ece_of_answers=after[k],
            )
        )
    headers = ('Exit', 'Threshold', 'Leave here %', 'Top-1 of these %', 'Temperature', 'ECE %', 'ECE of the answers %')
    rows = [
        (f'Ex{k}', f'{t:.4f}' if isinstance(t, float) else t, *rest)
        for k, (t, *rest) in enumerate(map(dict.values, exits), 1)
    ]
    plain_macs = backbone_macs(costs)
    beside = [
        ('Top-1 %', run.top1, run.backbone_top1, None),
        ('MMACs', result.cost / 1e6, plain_macs / 1e6, result.cost / plain_macs),
        (
            f'Images/s, batch {min(batch_size, len(right))}',
            *run.images_per_second,
            run.images_per_second[0] / run.images_per_second[1],
        ),
        *(
            (f'ms at batch 1, {name}', *pair, pair[0] / pair[1])
            for name, pair in zip(('median', '90th percentile', '99th percentile'), run.latencies)
        ),
    ]
    moved = int((run.exit_index != result.exit_index).sum())
    text = '\n'.join(
        [
            format_table(headers, rows),
            '',
            format_table(('', 'Adaptive', 'Plain backbone', 'Ratio'), beside),
            f'(the runtime took the exit that the logits call for on all but {moved} of {len(right)} images)',
        ]
    )
    record = dict(
        policy=policy.to_dict(),
        exits=exits,
        adaptive={name: mine for name, mine, _, _ in beside},
        backbone={name: theirs for name, _, theirs, _ in beside},
        other_exit_than_the_logits=moved,
    )
    return text, record
