"""The data of the HTML report: curves, exits, and example images."""

import base64
import io
import math
from dataclasses import fields
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image

from ..adaptive import (
    ExitPolicy,
    PolicyResult,
    budgeted_curve,
    calibrate,
    confidence_bins,
    evaluate_policy,
    expected_calibration_error,
)
from ..cost import ExitCost
from ..data import class_label
from ..report import accuracy_interval
from .benchmark import PolicyBenchmark
from .evaluator import LabelledLogits
from .fit_policy import backbone_macs, describe_certificate

__all__ = ['ExampleGallery', 'page_data']

PICTURES = 12
SIDE = 96
BUDGETS = 16


class ExampleGallery:
    """Pictures of the images that the policy loses, that leave first, and that reach the last exit.

    Args:
        result: Exits of the images under the policy.
        test: Logits of the images.
        policy: The policy.
        data_config: Preprocessing, which is undone for the pictures.
    """

    def __init__(self, result: PolicyResult, test: LabelledLogits, policy: ExitPolicy, data_config: Dict[str, Any]):
        self.answers = test.answers(policy)
        sure = torch.stack([z.softmax(-1).amax(-1) for z in self.answers]).gather(0, result.exit_index[None])[0]
        last = len(self.answers) - 1
        early = (result.exit_index + (1 - sure)).argsort().tolist()
        late = ((last - result.exit_index) + sure).argsort().tolist()
        labels = test.targets.tolist()
        lost = (result.prediction != test.targets) & (self.answers[-1].argmax(-1) == test.targets)
        self.groups = dict(
            lost=[i for i in early if lost[i]][:PICTURES],
            first=_varied([i for i in early if result.exit_index[i] < last], labels),
            last=_varied([i for i in late if result.exit_index[i] == last], labels),
        )
        self.images: Dict[int, str] = {i: '' for group in self.groups.values() for i in group}
        self.mean, self.std = (torch.tensor(data_config[key])[:, None, None] for key in ('mean', 'std'))

    def collect(self, before: int, images: torch.Tensor) -> None:
        """Keep the pictures of a batch that are shown.

        Args:
            before: Number of images before the batch.
            images: Prepared images, [B, C, H, W].
        """
        for i in self.images:
            if before <= i < before + len(images):
                pixels = images[i - before].float().cpu() * self.std + self.mean
                pixels = pixels[: 3 if len(pixels) >= 3 else 1].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
                picture = Image.fromarray(pixels.squeeze(-1).numpy())
                picture.thumbnail((SIDE, SIDE))
                file = io.BytesIO()
                picture.save(file, 'PNG')
                self.images[i] = 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def _varied(ranked: Sequence[int], labels: Sequence[int]) -> List[int]:
    """The first of some ranked images, of as many classes as there are: one of each class, then another, and so on."""
    seen: Dict[int, int] = {}
    rounds: List[Tuple[int, int]] = []
    for rank, i in enumerate(ranked):
        seen[labels[i]] = seen.get(labels[i], 0) + 1
        rounds.append((seen[labels[i]], rank))
    chosen = sorted(rank for _, rank in sorted(rounds)[:PICTURES])
    return [ranked[rank] for rank in chosen]


def _settings(policy: ExitPolicy) -> Dict[str, Any]:
    """All fields of a policy except its thresholds and what was certified about them."""
    left_out = ('thresholds', 'certificate')
    return {field.name: getattr(policy, field.name) for field in fields(policy) if field.name not in left_out}


def _policies(policy: ExitPolicy, val: LabelledLogits, costs: Sequence[ExitCost]) -> List[ExitPolicy]:
    """The given policy, and those fitted to other budgets."""
    low, high = costs[0].stage_macs + costs[0].head_macs, backbone_macs(costs)
    budgets = [low + (high - low) * i / (BUDGETS - 1) for i in range(BUDGETS)] if len(costs) > 1 else []
    return [policy, *(calibrate(*val, costs, budget=budget, **_settings(policy)) for budget in budgets)]


def _distinct(results: Sequence[Tuple[ExitPolicy, PolicyResult]]) -> List[Tuple[ExitPolicy, PolicyResult]]:
    """The first policy, and those of the others whose costs visibly differ; sorted by cost."""
    found = [results[0]]
    gap = (max(r.cost for _, r in results) - min(r.cost for _, r in results)) / (2 * BUDGETS)
    for policy, result in results[1:]:
        if all(abs(result.cost - known.cost) > gap for _, known in found):
            found.append((policy, result))
    return sorted(found, key=lambda pair: pair[1].cost)


def _accuracy(top1: float, count: int) -> Dict[str, float]:
    low, high = accuracy_interval(top1, count)
    return dict(top1=top1, low=low, high=high)


def _pictures(
    gallery: ExampleGallery,
    test: LabelledLogits,
    class_names: Optional[Sequence[Optional[str]]],
    results: Sequence[PolicyResult],
) -> List[Dict[str, Any]]:
    """Example images with their labels, the answers of all exits, and where they leave under each policy."""
    pictures = []
    for group, members in gallery.groups.items():
        for i in members:
            best = gallery.answers[:, i].softmax(-1).max(-1)
            says = zip(best.indices.tolist(), best.values.tolist())
            pictures.append(
                dict(
                    group=group,
                    src=gallery.images[i],
                    truth=class_label(class_names, int(test.targets[i])),
                    says=[[class_label(class_names, answer), p] for answer, p in says],
                    leaves=[result.exit_index[i].item() for result in results],
                )
            )
    return pictures


def _policy_rows(results: Sequence[Tuple[ExitPolicy, PolicyResult]], count: int) -> List[Dict[str, Any]]:
    """Cost, accuracy, exits, thresholds and certificate of each policy, measured on a number of images."""
    return [
        dict(
            cost=r.cost / 1e6,
            **_accuracy(r.accuracy, count),
            fractions=r.exit_fractions,
            thresholds=[f'{t:.4g}' if t < math.inf else 'off' for t in p.thresholds] + ['rest'],
            certificate=None if p.certificate is None else describe_certificate(p.certificate),
        )
        for p, r in results
    ]


def page_data(
    title: str,
    about: str,
    policy: ExitPolicy,
    val: LabelledLogits,
    test: LabelledLogits,
    costs: Sequence[ExitCost],
    run: PolicyBenchmark,
    gallery: ExampleGallery,
    class_names: Optional[Sequence[Optional[str]]],
    batch_size: int,
) -> Dict[str, Any]:
    """The data of `timm_mlcsd.report.write_page`.

    Args:
        title: Title of the page.
        about: Origin of the policy.
        policy: The policy.
        val: Logits that policies for other budgets are fitted to.
        test: Logits that are reported on.
        costs: Costs of the exits.
        run: Measurements of the policy.
        gallery: Example images.
        class_names: Class names by index, None for an index without a name.
        batch_size: Number of images in a batch of the measurements.
    """
    results = _distinct([(p, evaluate_policy(*test, costs, p)) for p in _policies(policy, val, costs)])
    count = len(test.targets)
    exits = [f'Ex{k}' for k in range(1, len(costs) + 1)]
    right = gallery.answers.argmax(-1) == test.targets
    sweep = budgeted_curve(val, test, costs, **_settings(policy)) if len(costs) > 1 else []
    before = expected_calibration_error(*test)
    after = expected_calibration_error(gallery.answers, test.targets)
    names = ('images/s', 'ms at batch 1, median', 'ms at batch 1, 90th percentile', 'ms at batch 1, 99th percentile')
    return dict(
        title=title,
        about=f'Policy {about}; score {policy.score}, aggregate {policy.aggregate}; {count} images.',
        exits=exits,
        backbone=dict(cost=backbone_macs(costs) / 1e6, **_accuracy(run.backbone_top1, count)),
        anytime=[
            dict(cost=c.macs / 1e6, **_accuracy(100 * r.double().mean().item(), count)) for c, r in zip(costs, right)
        ],
        sweep=[[point.test.cost / 1e6, point.test.accuracy] for point in sweep],
        policies=_policy_rows(results, count),
        chosen=next(i for i, (p, _) in enumerate(results) if p is policy),
        batch_size=min(batch_size, count),
        speed=[['top-1 %', run.top1, run.backbone_top1]]
        + [[name, *pair] for name, pair in zip(names, [run.images_per_second, *run.latencies])],
        reliability=[
            dict(before=b, ece=a, bins=bins)
            for b, a, bins in zip(before, after, confidence_bins(gallery.answers, test.targets))
        ],
        pictures=_pictures(gallery, test, class_names, [result for _, result in results]),
    )
