"""Smaller networks without early exits beside an adaptive one: is it worth it?"""

import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch
from torch.utils.data import Dataset

from ..adaptive import AdaptiveModel, ExitPolicy
from ..cost import exit_costs
from ..data import ClassNames
from ..errors import UserError, as_user_error
from ..hub import URI_SCHEMES
from ..models import MultiExitModel, create_model
from ..network import load_network
from ..report import format_table
from .benchmark import images_alone, timed
from .datasets import check_classes
from .energy import EnergyMeter
from .evaluator import Evaluator
from .fit_policy import backbone_macs

__all__ = ['StaticNetwork', 'benchmark_static', 'load_static', 'static_table']


# windows of this length, in turn between the networks
ENERGY_SECONDS = 2.0
ENERGY_ROUNDS = 3


class StaticNetwork(NamedTuple):
    """A network of which every image runs through all layers.

    Attributes:
        name: Name in tables.
        evaluator: Evaluator with its preprocessing.
        macs: Multiply-adds per image; None if they cannot be counted.
    """

    name: str
    evaluator: Evaluator
    macs: Optional[float]


def load_static(name: str, beside: Evaluator, names: Optional[ClassNames]) -> StaticNetwork:
    """Load a network to compare with.

    Args:
        name: Checkpoint of train.py, folder of a run, saved folder or ``hf-hub:REPO``, whose last exit answers; or an
            architecture of timm, with its pretrained weights.
        beside: Evaluator of the adaptive network, whose data, device and precision are used.
        names: Class names of the data; None if they are unknown.

    Returns:
        The network.

    Raises:
        UserError: It cannot be loaded, or has other classes.
    """
    with as_user_error(f'--against {name!r} cannot be loaded'):
        is_saved = name.startswith(URI_SCHEMES) or Path(name).exists()
        if not is_saved and not timm.is_model(name):
            raise UserError(
                f'--against {name!r}: expected a checkpoint, a folder, hf-hub:REPO, or the name of a network of timm.'
            )
        if is_saved:
            network = load_network(name)
            model, config = network.model, network.data_config
            check_classes(network.class_names, names, f'--against {name!r}')
        else:
            architecture = name if name.startswith('mlcsd_') else f'mlcsd_{name}'
            model = create_model(architecture, exits=1, pretrained=True).eval()
            config = timm.data.resolve_data_config({}, model=model)
    if model.num_classes != beside.model.num_classes:
        raise UserError(
            f'--against {name!r}: expected a network of {beside.model.num_classes} classes, got {model.num_classes}.'
        )
    evaluator = beside.with_network(model, config)
    return StaticNetwork(name, evaluator, _macs(model, config))


def _macs(model: MultiExitModel, data_config: Dict[str, Any]) -> Optional[float]:
    return float(backbone_macs(exit_costs(model, data_config['input_size']))) if model.resumable else None


class _Meter:
    """Accuracy, throughput, latency and energy of one network.

    Args:
        evaluator: Evaluator of the network.
        run: Function from images to logits.
        energy: Meter of the energy; None where the platform does not tell.
    """

    def __init__(
        self, evaluator: Evaluator, run: Callable[[torch.Tensor], torch.Tensor], energy: Optional[EnergyMeter]
    ):
        self.evaluator = evaluator
        self.run = run
        self.energy = energy
        self.kept: List[torch.Tensor] = []  # images whose energy is measured
        self.joules: List[float] = []
        self.right = self.count = 0
        self.seconds = 0.0
        self.latencies: List[float] = []

    def add(self, images: torch.Tensor, target: torch.Tensor, alone: Sequence[int]) -> None:
        """Run a batch, and some of its images alone; only the network is timed."""
        images = self.evaluator.prepared(images)
        if not self.count:  # first calls include set-up
            for some in (images, images[:1]):
                timed(self.evaluator, self.run, some)
        logits, seconds = timed(self.evaluator, self.run, images)
        self.seconds += seconds
        self.right += int((logits.argmax(-1).cpu() == target.cpu()).sum())
        self.count += len(target)
        self.latencies += [1000 * timed(self.evaluator, self.run, images[i : i + 1])[1] for i in alone]
        if self.energy is not None:
            self.kept += [images[i].clone() for i in alone]  # a view would keep the batch

    def measure_energy(self) -> None:
        """Run the images that ran alone again, in batches, and measure the joules per image."""
        assert self.energy is not None
        batches = torch.stack(self.kept).split(self.evaluator.data.batch_size)
        prepared = [self.evaluator.prepared(batch) for batch in batches]

        def run() -> None:
            for batch in prepared:
                timed(self.evaluator, self.run, batch)

        self.joules.append(self.energy.joules(run, ENERGY_SECONDS) / len(self.kept))

    def row(self, name: str, macs: Optional[float]) -> Dict[str, Any]:
        """Accuracy in %, MMACs, images/s, percentiles of the milliseconds at batch 1, and joules per image."""
        median, p90, p99 = torch.tensor(self.latencies).quantile(torch.tensor([0.5, 0.9, 0.99])).tolist()
        return dict(
            name=name,
            top1=100 * self.right / self.count,
            mmacs=None if macs is None else macs / 1e6,
            images_per_second=self.count / self.seconds,
            ms_median=median,
            ms_90=p90,
            ms_99=p99,
            joules=statistics.median(self.joules) if self.joules else None,
        )


@torch.inference_mode()
def benchmark_static(
    evaluator: Evaluator,
    policy: ExitPolicy,
    cost: float,
    networks: Sequence[StaticNetwork],
    dataset: Dataset[Any],
    count: int,
) -> List[Dict[str, Any]]:
    """Run an adaptive network, its plain backbone and static networks in turn on the batches of a data set.

    Args:
        evaluator: Evaluator of the adaptive network.
        policy: Exit policy.
        cost: Mean multiply-adds per image under the policy.
        networks: Static networks.
        dataset: Images.
        count: Number of images.

    Returns:
        One dict per network, the adaptive one and its backbone first.
    """
    model = evaluator.model
    adaptive = AdaptiveModel(model, policy, range(model.num_exits))
    energy = EnergyMeter.find(evaluator.device)
    meters = [
        _Meter(evaluator, lambda images: adaptive.predict(images).logits, energy),
        _Meter(evaluator, model, energy),
        *(_Meter(network.evaluator, network.evaluator.model, energy) for network in networks),
    ]
    names = ['adaptive', 'plain backbone', *(network.name for network in networks)]
    macs = [cost, _macs(model, evaluator.data_config), *(network.macs for network in networks)]
    chosen = images_alone(count)
    loaders = [network.evaluator.loader(dataset) for network in networks]
    before = 0
    for own, *others in zip(evaluator.loader(dataset), *loaders):
        alone = [i for i in range(len(own[1])) if before + i in chosen]
        for meter, (images, target) in zip(meters, [own, own, *others]):
            meter.add(images, target, alone)
        before += len(own[1])
    for meter in meters * ENERGY_ROUNDS if energy is not None else []:
        meter.measure_energy()
    return [meter.row(*about) for meter, about in zip(meters, zip(names, macs))]


def static_table(rows: Sequence[Dict[str, Any]]) -> str:
    """The rows of `benchmark_static` as a table."""
    headers = ['Network', 'Top-1 %', 'MMACs', 'Images/s', 'ms, median', 'ms, 90th', 'ms, 99th', 'mJ per image']
    values = [[*row.values()] for row in rows]
    for row in values:
        row[-1] = None if row[-1] is None else 1000 * row[-1]
    width = len(headers) - (values[0][-1] is None)
    return format_table(headers[:width], [row[:width] for row in values])
