"""Label many images: batches in a stream, rows written as the answers come."""

import hashlib
import json
import logging
import time
from collections import deque
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from ...adaptive import Prediction
from ...data import checked_images
from ...distributed import DistributedContext
from ...errors import UserError
from ...models import weights_digest
from ...network import Network
from ..device import resolve_device
from ..evaluator import Evaluator
from .config import PredictConfig
from .images import Images, NumberedImages, NumberedStream, load_images
from .network import choose_policy, label_type, labels, load, predictions
from .output import OutputFile, check_other_parts, check_output, part_path, record_path

__all__ = ['predict_to_file']

_logger = logging.getLogger('predict')

# names of unreadable images that the record lists
MOST_LISTED = 10_000


def predict_to_file(config: PredictConfig, dist_context: DistributedContext) -> Path:
    """Label images, and write a row per image to a file.

    Of several processes each labels its share, and writes a file of its own.

    Args:
        config: The prediction.
        dist_context: Processes that share the work.

    Returns:
        Path of the file of this process.

    Raises:
        UserError: Something does not fit, or more images cannot be read or have no finite logits, in all processes
            together, than `max_bad_samples` allows; the others are labelled first.
    """
    if config.output is None:
        raise ValueError('output: expected the path of a file.')
    check_output(config.output)
    device = resolve_device(config.device)
    network = load(config)
    policy = choose_policy(config, network)
    table = _Table.of(config, network)
    images = load_images(config.data, config.images, config.split, network.data_config)
    path = part_path(config.output, dist_context.rank, dist_context.size)
    check_other_parts(config.output, dist_context.size)
    settings = _settings(config, network, policy, dist_context)
    with OutputFile(path, table.kinds, settings, config.resume) as output:
        dataset = _remaining(images, output, dist_context)
        data = replace(config.data, workers=min(config.data.workers, 1)) if images.names is None else config.data
        evaluator = Evaluator(network.model, network.data_config, data, config.device, device=device)
        progress = _Progress(network.model.num_exits, _count(dataset), quiet=not dist_context.is_primary)
        before = len(output.done)
        not_finite: List[str] = []
        for numbers, prediction in _answers(evaluator, network, policy, dataset):
            names = [str(n) if images.names is None else images.names[n] for n in numbers]
            names, prediction = table.finite(names, prediction, not_finite)
            output.write(table.rows(names, prediction))
            progress.add(prediction)
        unreadable = _unreadable(dataset) + not_finite
        output.finish(
            answered=len(output.done),
            unreadable=len(unreadable),
            unreadable_images=unreadable[:MOST_LISTED],
            exits=[output.exits[k] for k in range(1, network.model.num_exits + 1)],
        )
    print(f'{path}: {progress.summary(before, len(unreadable))}')
    # together, because torchrun stops all processes as soon as one ends with an error
    found = [name for part in dist_context.all_gather(unreadable) for name in part]
    if len(found) > config.data.max_bad_samples:
        raise UserError(
            f'{len(found)} image{"s" * (len(found) > 1)} cannot be labelled, {found[0]} first; all others are. '
            f'{record_path(path)} lists them; --max-bad-samples N accepts so many.'
        )
    return path


def _settings(config: PredictConfig, network: Network, policy: Any, dist_context: DistributedContext) -> Dict[str, Any]:
    """What decides on the rows of a file, as plain values: only a file of the same settings can be continued."""
    data = config.data
    # the names of files tell whether they are the same, their numbers in a data set do not
    source: Dict[str, Any] = dict(dataset='' if config.images else data.dataset)
    if not config.images:
        source.update(data_dir=data.data_dir, split=config.split, input_key=data.input_key)
    names = labels(network, config.label_type)
    return dict(
        weights=weights_digest(network.model),
        # entry by entry, so that an error names the one that differs
        **network.data_config,
        policy=None if policy is None else policy.to_dict(),
        **source,
        rank=dist_context.rank,
        processes=dist_context.size,
        topk=config.topk or 1,
        label_type=label_type(network, config.label_type),
        # up to 22 thousand
        class_names=None if names is None else f'sha256:{hashlib.sha256(json.dumps(names).encode()).hexdigest()}',
        filename_col=config.filename_col,
        include_index=config.include_index,
        output_type=config.output_type,
    )


@dataclass
class _Table:
    """Columns of a file of predictions.

    Attributes:
        filename_col: Name of the first column.
        labels: Label per class, [C]; None for indices alone.
        topk: Number of classes per image.
        with_index: Whether indices are in the file.
        output_type: ``prob`` or ``logit``.
    """

    filename_col: str
    labels: Optional[Sequence[str]]
    topk: int
    with_index: bool
    output_type: str

    @classmethod
    def of(cls, config: PredictConfig, network: Network) -> '_Table':
        """The columns that a configuration asks for."""
        names = labels(network, config.label_type)
        topk = min(config.topk or 1, network.model.num_classes)
        table = cls(config.filename_col, names, topk, config.include_index or names is None, config.output_type)
        if config.filename_col in replace(table, filename_col='').kinds:
            raise UserError(f'--filename-col {config.filename_col}: there is another column of this name.')
        return table

    @property
    def kinds(self) -> Dict[str, type]:
        """Type of the values by name of the column."""
        kinds: Dict[str, type] = {self.filename_col: str}
        for rank in range(self.topk):
            suffix = f'_{rank}' if self.topk > 1 else ''
            kinds.update({f'index{suffix}': int} if self.with_index else {})
            kinds.update({f'label{suffix}': str} if self.labels is not None else {})
            kinds[f'{self.output_type}{suffix}'] = float
        return {**kinds, 'exit': int, 'macs': int}

    def _top(self, logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The values that are written, [B, topk], and their classes."""
        values = logits.float()
        top = (values.softmax(-1) if self.output_type == 'prob' else values).topk(self.topk)
        return top.values, top.indices

    def finite(self, names: Sequence[str], prediction: Prediction, others: List[str]) -> Tuple[List[str], Prediction]:
        """The images of a batch whose values are numbers; the others are no answers, and are reported.

        Args:
            names: Name per image, [B].
            prediction: Answers for the images.
            others: List to which the other images are added.

        Returns:
            Names and answers of the images that have one.
        """
        keep = self._top(prediction.logits)[0].isfinite().all(-1).cpu()
        for name in compress(names, (~keep).tolist()):
            others.append(f'{name} (the logits of the network are not finite)')
            _logger.warning(f'Left out: {others[-1]}')
        return list(compress(names, keep.tolist())), Prediction(*(part.cpu()[keep] for part in prediction))

    def rows(self, names: Sequence[str], prediction: Prediction) -> List[List[Any]]:
        """Rows of a batch.

        Args:
            names: Name per image, [B].
            prediction: Answers for the images.

        Returns:
            Values of the columns, [B][columns]; exits are numbered from 1.
        """
        values, classes = self._top(prediction.logits)
        rows = []
        for name, scores, indices, exit_index, cost in zip(
            names, values.tolist(), classes.tolist(), prediction.exit_index.tolist(), prediction.cost.tolist()
        ):
            row: List[Any] = [name]
            for score, index in zip(scores, indices):
                row += [index] if self.with_index else []
                row += [self.labels[index]] if self.labels is not None else []
                row.append(float(f'{score:.6g}'))  # what float32 resolves
            rows.append([*row, exit_index + 1, round(cost) if cost == cost else None])
        return rows


def _remaining(images: Images, output: OutputFile, dist_context: DistributedContext) -> Dataset[Any]:
    """The images of this process that its file does not have yet."""
    rank, size = dist_context.rank, dist_context.size
    if images.names is None:
        wrong = next((name for name in output.done if not name.isdecimal() or len(name) > 18), None)
        if wrong is not None:
            raise UserError(
                f'--output {str(output.path)!r} cannot be continued: {wrong!r} is not the number of an image.'
            )
        done = {int(name) for name in output.done}
        assert isinstance(images.dataset, IterableDataset)  # all others have names
        return NumberedStream(images.dataset, done, rank, size)
    own = range(rank, len(images.names), size)
    known = {images.names[n] for n in own}
    if unknown := next(iter(output.done - known), None):
        raise UserError(
            f'--output {str(output.path)!r} cannot be continued: it has {unknown!r}, which is no image to label now; '
            f'label the same images, or name another file.'
        )
    return NumberedImages(images.dataset, [n for n in own if images.names[n] not in output.done])


def _count(dataset: Dataset[Any]) -> Optional[int]:
    return len(dataset) if isinstance(dataset, NumberedImages) else None


def _answers(
    evaluator: Evaluator, network: Network, policy: Any, dataset: Dataset[Any]
) -> Iterator[Tuple[List[int], Prediction]]:
    """Numbers and answers of the images, batch by batch."""
    if _count(dataset) == 0:
        return
    waiting: Deque[List[int]] = deque()

    def batches() -> Iterator[torch.Tensor]:
        for images, numbers in evaluator.loader(dataset, has_labels=False):
            waiting.append(numbers.tolist())
            yield evaluator.prepared(images)

    with evaluator.autocast:
        for prediction in predictions(network, policy, batches()):
            yield waiting.popleft(), prediction


def _unreadable(dataset: Dataset[Any]) -> List[str]:
    """Images that cannot be read, each with the reason."""
    checked = checked_images(dataset)
    return [] if checked is None else [checked.describe(broken) for broken in checked.found]


class _Progress:
    """A progress bar with the share of images that left at each exit.

    Args:
        num_exits: Number of exits K.
        total: Number of images; None if it is unknown.
        quiet: Whether there is no bar.
    """

    def __init__(self, num_exits: int, total: Optional[int], quiet: bool):
        self.exits = torch.zeros(num_exits, dtype=torch.long)
        self.macs = 0.0
        self.start = time.perf_counter()
        # none if the output is no terminal
        self.bar = tqdm(total=total, unit=' images', disable=True if quiet else None, leave=False)

    def add(self, prediction: Prediction) -> None:
        """Count the answers of a batch."""
        self.exits += torch.bincount(prediction.exit_index.cpu(), minlength=len(self.exits))
        self.macs += float(prediction.cost.sum())
        self.bar.set_postfix_str(self._shares(), refresh=False)
        self.bar.update(len(prediction.exit_index))

    def _shares(self) -> str:
        total = max(int(self.exits.sum()), 1)
        return ' '.join(f'Ex{k} {100 * n / total:.0f}%' for k, n in enumerate(self.exits.tolist(), 1) if n)

    def summary(self, before: int, unreadable: int) -> str:
        """Describe what was done in one line.

        Args:
            before: Number of images that the file had before.
            unreadable: Number of images that cannot be read or have no finite logits.
        """
        self.bar.close()
        count = int(self.exits.sum())
        parts = [f'{count} images labelled' + (f', {before} before' if before else '')]
        if unreadable:
            parts.append(f'{unreadable} that cannot be labelled')
        if count:
            parts.append(f'{count / (time.perf_counter() - self.start):.0f} images/s')
            parts.append(f'left at {self._shares()}')
            parts += [f'{self.macs / count / 1e6:.2f} MMACs per image'] if self.macs == self.macs else []
        return '; '.join(parts)
