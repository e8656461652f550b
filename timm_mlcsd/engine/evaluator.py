"""Accuracy and logits of every exit of a network on a data set."""

import itertools
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..adaptive import ExitPolicy
from ..errors import UserError, as_user_error
from ..losses import MLCSDLoss
from ..models import MultiExitModel, MultiExitOutput, eval_mode
from .data_config import DataConfig
from .device import DeviceConfig, compile_forward, make_autocast, resolve_device, to_channels_last
from .loaders import eval_loader

__all__ = ['Evaluation', 'Evaluator', 'ExitMetrics', 'LabelledLogits', 'accumulate', 'finalize']

# number of samples whose metrics are computed at once
CHUNK = 1024
NO_IMAGES = 'there are no images to evaluate on.'


class ExitMetrics(NamedTuple):
    """One exit on one data set.

    Attributes:
        top1: Accuracy in %.
        top5: Share of samples with the label among the five most probable classes, in %.
        loss: Mean cross-entropy.
        overthinking: Share of samples that are right here and wrong at the last exit, in % (paper, Table 1;
            Kaya et al., ICML 2019).
    """

    top1: float
    top5: float
    loss: float
    overthinking: float


class Evaluation(NamedTuple):
    """All exits on one data set.

    Attributes:
        exits: Metrics per exit, first exit first.
        num_samples: Number of samples.
    """

    exits: List[ExitMetrics]
    num_samples: int

    @property
    def mean_top1(self) -> float:
        """Mean accuracy over the exits in %, which chooses the best epoch."""
        return sum(e.top1 for e in self.exits) / len(self.exits)


class LabelledLogits(NamedTuple):
    """The logits of all exits on N samples, with labels, on the CPU.

    Attributes:
        logits: Logits, [K, N, C].
        targets: Class indices, [N].
    """

    logits: torch.Tensor
    targets: torch.Tensor

    def evaluate(self) -> Evaluation:
        """The metrics of every exit."""
        return finalize(accumulate(zip(self.logits.split(CHUNK, dim=1), self.targets.split(CHUNK))))

    def answers(self, policy: ExitPolicy) -> torch.Tensor:
        """What each exit would answer under a policy, [K, N, C]; for an exit that is off, its own logits."""
        history, answers = None, []
        for k, logits in enumerate(self.logits):
            if policy.is_on(k):
                answer, _, history = policy.step(k, logits, history)
            else:
                answer = logits / (policy.temperatures[k] if policy.temperatures else 1.0)
            answers.append(answer)
        return torch.stack(answers)


class Evaluator:
    """Runs all exits of a network over data sets, in evaluation mode.

    Args:
        model: The network; moved to the device and memory format.
        data_config: Preprocessing.
        data: Batch size, workers and the like.
        device_config: Device, precision and memory format.
        device: Device, instead of the one that `device_config` names.
        forward: Function from images to `MultiExitOutput`, instead of the network's own; the network is not moved then.
        classes: Indices of the classes whose logits are used, [C'], where labels index this list; default: all classes.

    Examples:
        ```python
        network = load_network('output/train/RUN')
        evaluator = Evaluator(network.model, network.data_config)
        evaluation = evaluator.evaluate(load_dataset(DataConfig(dataset='digits'), 'test'))
        ```
    """

    def __init__(
        self,
        model: MultiExitModel,
        data_config: Dict[str, Any],
        data: Optional[DataConfig] = None,
        device_config: Optional[DeviceConfig] = None,
        *,
        device: Optional[torch.device] = None,
        forward: Optional[Callable[[torch.Tensor], MultiExitOutput]] = None,
        classes: Optional[Sequence[int]] = None,
    ):
        config = device_config or DeviceConfig()
        self.model = model
        self.device_config = config
        self.classes = None if classes is None else list(classes)
        self.data_config = data_config
        self.data = data or DataConfig()
        self.device = device or resolve_device(config)
        self.channels_last = config.channels_last
        self.autocast = make_autocast(config, self.device)
        if forward is None:
            model.to(device=self.device)
            if self.channels_last:
                model.to(memory_format=torch.channels_last)
            forward = compile_forward(model.forward_exits, config)
        self.forward = forward

    @property
    def num_classes(self) -> int:
        """Number of classes whose logits are used."""
        return self.model.num_classes if self.classes is None else len(self.classes)

    def with_network(self, model: MultiExitModel, data_config: Dict[str, Any]) -> 'Evaluator':
        """An evaluator of another network with the same settings.

        Args:
            model: The network; moved to the device and memory format.
            data_config: Its preprocessing.
        """
        return Evaluator(model, data_config, self.data, self.device_config, device=self.device)

    def loader(self, dataset: Dataset[Any], has_labels: bool = True) -> Any:
        """A loader of prepared batches of a data set.

        Args:
            dataset: Data set of (image, target).
            has_labels: Whether targets are labels, which are checked; default: True.

        Raises:
            UserError: The data does not fit the settings.
        """
        with as_user_error('the data flags cannot be used'):
            return eval_loader(
                self.data,
                dataset,
                self.data_config,
                self.device,
                num_classes=self.num_classes if has_labels else None,
                channels_last=self.channels_last,
            )

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images on the device, in the memory format of the network."""
        images = images.to(self.device)
        return to_channels_last(images) if self.channels_last else images

    @torch.no_grad()
    def batches(self, data: Union[Dataset[Any], Iterable[Any]]) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over the logits of all exits, [K, B, C] in float32, and class indices [B].

        Args:
            data: Data set, or loader of (images, class indices).
        """
        loader = self.loader(data) if isinstance(data, Dataset) else data
        with eval_mode(self.model):
            for images, target in loader:
                with self.autocast:
                    logits = torch.stack(self.forward(self.prepared(images)).logits).float()
                logits = logits if self.classes is None else logits[..., self.classes]
                yield logits, target.to(self.device)

    def evaluate(self, data: Union[Dataset[Any], Iterable[Any]]) -> Evaluation:
        """The metrics of every exit on a data set or loader.

        Raises:
            UserError: There are no images.
        """
        return finalize(accumulate(self.batches(data)))

    def logits(self, data: Union[Dataset[Any], Iterable[Any]]) -> LabelledLogits:
        """The logits of all exits on a data set or loader.

        Raises:
            UserError: There are no images, or a logit is NaN.
        """
        pairs = [(z.cpu(), y.cpu()) for z, y in self.batches(data)]
        if not pairs:
            raise UserError(NO_IMAGES)
        logits = torch.cat([z for z, _ in pairs], dim=1)
        targets = torch.cat([y for _, y in pairs])
        if logits.isnan().any():
            count = int(logits.isnan().any(-1).any(0).sum())
            raise UserError(f'the network answers NaN for {count} images; thresholds cannot be compared with that.')
        return LabelledLogits(logits, targets)

    @torch.no_grad()
    def mixing_weights(self, criterion: MLCSDLoss, loader: Iterable[Any]) -> Iterator[torch.Tensor]:
        """Iterate over the mixing weights of the teachers, [B, K, K].

        Args:
            criterion: The loss that the network was trained with; it must have teachers.
            loader: Batches of (images, class indices).
        """
        with eval_mode(self.model), eval_mode(criterion):
            for images, target in loader:
                with self.autocast:
                    weights = criterion.mixing_weights(self.forward(self.prepared(images)), target.to(self.device))
                yield weights.float()

    def mean_mixing_weights(
        self, criterion: MLCSDLoss, loader: Iterable[Any], max_batches: Optional[int] = None
    ) -> Optional[torch.Tensor]:
        """Mean mixing weights of the teachers, [K, K] (paper, Table 15); None for a loss without teachers.

        Args:
            criterion: The loss that the network was trained with.
            loader: Batches of (images, class indices).
            max_batches: Number of batches to average over, None for all.

        Raises:
            UserError: There are no images.
        """
        if criterion.mixer is None:
            return None
        total, count = torch.zeros(self.model.num_exits, self.model.num_exits, device=self.device), 0
        for weights in self.mixing_weights(criterion, itertools.islice(loader, max_batches)):
            total, count = total + weights.sum(dim=0), count + len(weights)
        if not count:
            raise UserError(NO_IMAGES)
        return total / count


@torch.no_grad()
def accumulate(batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]) -> Optional[torch.Tensor]:
    """Sums over batches of logits [K, B, C] and targets [B], [5, K] on the CPU; None without batches."""
    totals: Optional[torch.Tensor] = None
    for logits, target in batches:
        ranked = logits.topk(min(5, logits.shape[-1])).indices == target[:, None]
        right = ranked[..., 0]
        losses = torch.stack([F.cross_entropy(z, target, reduction='sum') for z in logits])
        seen = torch.full_like(losses, len(target))
        sums = (right.sum(dim=1), ranked.any(dim=-1).sum(dim=1), losses, (right & ~right[-1]).sum(dim=1), seen)
        precise = torch.float32 if logits.device.type == 'mps' else torch.float64  # mps has no float64
        counts = torch.stack(sums).to(precise)
        totals = counts if totals is None else totals + counts
    return None if totals is None else totals.cpu().double()


def finalize(totals: Optional[torch.Tensor]) -> Evaluation:
    """Metrics from the sums of `accumulate`.

    Raises:
        UserError: They are of no images.
    """
    if totals is None or not totals[-1, 0]:
        raise UserError(NO_IMAGES)
    scale = totals.new_tensor([100.0, 100.0, 1.0, 100.0])[:, None] / totals[-1]
    return Evaluation([ExitMetrics(*column) for column in (totals[:-1] * scale).T.tolist()], int(totals[-1, 0]))
