"""Recall, precision and F1 of every class at every exit."""

from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch

from ..data import ClassNames, class_label

__all__ = ['ClassCounts']

# logits [M, B, C] and class indices [B]
_Batch = Tuple[torch.Tensor, torch.Tensor]


class ClassCounts:
    """Numbers of right answers, answers and labels per class.

    Args:
        answers: Names of what answers, such as the exits, [M].
        num_classes: Number of classes C.
    """

    def __init__(self, answers: Sequence[str], num_classes: int):
        self.answers = list(answers)
        self.labels = torch.zeros(num_classes, dtype=torch.long)
        self.predicted = torch.zeros(len(self.answers), num_classes, dtype=torch.long)
        self.right = torch.zeros(len(self.answers), num_classes, dtype=torch.long)

    def add(self, predictions: torch.Tensor, targets: torch.Tensor) -> None:
        """Count the answers for some images.

        Args:
            predictions: Class indices per answer, [M, B].
            targets: Class indices, [B].
        """
        predictions, targets = predictions.cpu(), targets.cpu()
        size = len(self.labels)
        self.labels += torch.bincount(targets, minlength=size)
        for k, answer in enumerate(predictions):
            self.predicted[k] += torch.bincount(answer, minlength=size)
            self.right[k] += torch.bincount(targets[answer == targets], minlength=size)

    def counted(
        self, batches: Iterable[Tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """Pass batches on, and count their answers."""
        for logits, targets in batches:
            self.add(logits.argmax(-1), targets)
            yield logits, targets

    def rows(self, names: Optional[ClassNames], indices: Optional[Sequence[int]] = None) -> List[Dict[str, Any]]:
        """Metrics of each class that is in the data or was answered.

        Args:
            names: Class names by index; None if they are unknown.
            indices: Indices of the classes in the network, [C]; default None where they are the same.

        Returns:
            One dict per class: ``index``, ``name``, ``images`` with this label, and per answer ``recall`` (the accuracy
            on these images), ``precision`` and ``f1`` in percent, None where there is nothing to divide by.
        """
        seen = ((self.labels > 0) | (self.predicted > 0).any(0)).nonzero().flatten().tolist()
        return [
            dict(
                index=c if indices is None else indices[c],
                name=class_label(names, c),
                images=int(self.labels[c]),
                **{answer: self._metrics(k, c) for k, answer in enumerate(self.answers)},
            )
            for c in seen
        ]

    def _metrics(self, k: int, c: int) -> Dict[str, Optional[float]]:
        right, labels, predicted = (int(counts[c]) for counts in (self.right[k], self.labels, self.predicted[k]))
        return dict(
            recall=100 * right / labels if labels else None,
            precision=100 * right / predicted if predicted else None,
            f1=100 * 2 * right / (labels + predicted) if labels + predicted else None,
        )
