"""Speed and accuracy of an exit policy, measured beside the plain backbone."""

import math
import time
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from ..adaptive import AdaptiveModel, ExitPolicy, PolicyResult, expected_calibration_error
from ..cost import ExitCost
from ..report import format_table
from .evaluator import Evaluator, LabelledLogits
from .fit_policy import backbone_macs

__all__ = ['PolicyBenchmark', 'benchmark_policy', 'images_alone', 'tables', 'timed']

# images that run one at a time as well
LATENCY_IMAGES = 200


class PolicyBenchmark(NamedTuple):
    """Measurements of a policy and of the plain backbone on the same images.

    Attributes:
        exit_index: Exit of each image, [N].
        top1: Accuracy of the policy in %.
        backbone_top1: Accuracy of the plain backbone in %.
        images_per_second: Throughput of policy and backbone.
        latencies: Milliseconds per image at batch 1 of policy and backbone: 50th, 90th and 99th percentile.
    """

    exit_index: torch.Tensor
    top1: float
    backbone_top1: float
    images_per_second: Tuple[float, float]
    latencies: List[Tuple[float, float]]


def timed(evaluator: Evaluator, run: Callable[[torch.Tensor], Any], images: torch.Tensor) -> Tuple[Any, float]:
    """Run a function on images under the autocast of an evaluator; returns its result and the seconds it took."""
    synchronize = torch.cuda.synchronize if evaluator.device.type == 'cuda' else lambda _: None
    synchronize(evaluator.device)
    start = time.perf_counter()
    with evaluator.autocast:
        result = run(images)
    synchronize(evaluator.device)
    return result, time.perf_counter() - start


def images_alone(num_images: int) -> Set[int]:
    """Indices of the images that run one at a time as well, at random, because data sets are often sorted by class."""
    return set(torch.randperm(num_images, generator=torch.Generator().manual_seed(0))[:LATENCY_IMAGES].tolist())


@torch.inference_mode()
def benchmark_policy(
    evaluator: Evaluator,
    policy: ExitPolicy,
    loader: Iterable[Any],
    num_images: int,
    collect: Optional[Callable[[int, torch.Tensor], None]] = None,
) -> PolicyBenchmark:
    """Run the policy and the plain network alternately on each batch of a loader; only the networks are timed.

    Args:
        evaluator: Evaluator of the network.
        policy: When images leave.
        loader: Batches of (images, class indices).
        num_images: Number of images.
        collect: Function called with each batch: the number of images before it, and its images.
    """
    model, device = evaluator.model, evaluator.device
    adaptive = AdaptiveModel(model, policy, range(model.num_exits))
    alone = images_alone(num_images)
    exits: List[torch.Tensor] = []
    seconds: List[Tuple[float, float]] = []
    latencies: List[Tuple[float, float]] = []
    right, plain_right, count = 0, 0, 0
    for images, target in loader:
        if collect is not None:
            collect(count, images)
        images, target = evaluator.prepared(images), target.to(device)
        if not seconds:  # first calls include set-up, which is not timed
            for some in (images, images[:1]):
                timed(evaluator, lambda x: list(adaptive.iter_exits(x)), some)
                timed(evaluator, model, some)
        prediction, took = timed(evaluator, adaptive.predict, images)
        logits, plain_took = timed(evaluator, model, images)
        seconds.append((took, plain_took))
        for image in (images[i : i + 1] for i in range(len(images)) if count + i in alone):
            latencies.append((timed(evaluator, adaptive.predict, image)[1], timed(evaluator, model, image)[1]))
        exits.append(prediction.exit_index.cpu())
        right += (prediction.logits.argmax(-1) == target).sum().item()
        plain_right += (logits.argmax(-1) == target).sum().item()
        count += len(target)
    total, plain_total = (sum(column) for column in zip(*seconds))
    quantiles = 1000 * torch.tensor(latencies).quantile(torch.tensor([0.5, 0.9, 0.99]), dim=0)
    return PolicyBenchmark(
        torch.cat(exits),
        100 * right / count,
        100 * plain_right / count,
        (count / total, count / plain_total),
        [(adaptive_ms, plain_ms) for adaptive_ms, plain_ms in quantiles.tolist()],
    )


def tables(
    policy: ExitPolicy,
    result: PolicyResult,
    run: PolicyBenchmark,
    test: LabelledLogits,
    costs: Sequence[ExitCost],
    batch_size: int,
) -> Tuple[str, Dict[str, Any]]:
    """The tables to print, and the same values for the results file."""
    exits = _per_exit(policy, result, test)
    rows = [
        (f'Ex{k}', f'{t:.4f}' if isinstance(t, float) else t, *rest)
        for k, (t, *rest) in enumerate(map(dict.values, exits), 1)
    ]
    beside = _beside_backbone(result, run, backbone_macs(costs), min(batch_size, len(test.targets)))
    moved = int((run.exit_index != result.exit_index).sum())
    headers = ('Exit', 'Threshold', 'Leave here %', 'Top-1 of these %', 'Temperature', 'ECE %', 'ECE of the answers %')
    text = '\n'.join(
        [
            format_table(headers, rows),
            '',
            format_table(('', 'Adaptive', 'Plain backbone', 'Ratio'), beside),
            f'(the runtime took the exit that the logits call for on all but {moved} of {len(test.targets)} images)',
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


def _per_exit(policy: ExitPolicy, result: PolicyResult, test: LabelledLogits) -> List[Dict[str, Any]]:
    """Threshold, share of images, accuracy in % and calibration error of every exit."""
    right = result.prediction == test.targets
    before = expected_calibration_error(*test)
    after = expected_calibration_error(test.answers(policy), test.targets)
    exits = []
    for k, share in enumerate(result.exit_fractions):
        here = result.exit_index == k
        threshold = [*policy.thresholds, -math.inf][k]
        exits.append(
            dict(
                threshold='off' if threshold == math.inf else threshold if threshold > -math.inf else 'rest',
                share=100 * share,
                top1=100 * right[here].double().mean().item() if here.any() else None,
                temperature=policy.temperatures[k] if policy.temperatures else 1.0,
                ece=before[k],
                ece_of_answers=after[k],
            )
        )
    return exits


def _beside_backbone(
    result: PolicyResult, run: PolicyBenchmark, plain_macs: float, batch_size: int
) -> List[Tuple[str, float, float, Optional[float]]]:
    """Rows of a quantity's name, the adaptive network's value, the plain backbone's, and their ratio."""
    speeds = run.images_per_second
    return [
        ('Top-1 %', run.top1, run.backbone_top1, None),
        ('MMACs', result.cost / 1e6, plain_macs / 1e6, result.cost / plain_macs),
        (f'Images/s, batch {batch_size}', *speeds, speeds[0] / speeds[1]),
        *(
            (f'ms at batch 1, {name}', *pair, pair[0] / pair[1])
            for name, pair in zip(('median', '90th percentile', '99th percentile'), run.latencies)
        ),
    ]
