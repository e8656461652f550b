"""When a sample leaves: a score, one threshold per exit, and what an exit answers."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from timm.utils import unwrap_model

from ..errors import printable
from ..file_checks import AGGREGATES, POLICY_FORMAT, SCORES, VERSION, check_policy, read_json
from ..files import atomic_write
from ..hub import POLICY
from ..models import MultiExitModel, weights_digest

__all__ = ['AGGREGATES', 'SCORES', 'ExitPolicy', 'ExitHistory', 'score_of']


class ExitHistory(NamedTuple):
    """What exits that a sample has passed leave for those to come; tensors only, batch first.

    Attributes:
        log_probs: Of every exit that answered, [B, C]; empty where the aggregate is ``last``.
        prediction: Of the exit before, [B]; None where the score isn't ``patience``.
        streak: How many exits in a row made that prediction, [B].
    """

    log_probs: Tuple[torch.Tensor, ...] = ()
    prediction: Optional[torch.Tensor] = None
    streak: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class ExitPolicy:
    """All that early exit needs beyond the weights.

    A sample leaves at the first exit k whose score is at least ``thresholds[k]``; the last exit answers whatever is
    left. An exit with the threshold ``inf`` is off: its head doesn't run, and it has no part in later answers.

    Args:
        thresholds: K-1 numbers.
        score: How sure an exit is, higher is surer: ``confidence`` (max softmax), ``entropy`` (1 - H / log C),
            ``margin`` (the best probability less the second), ``patience`` (exits in a row that agree, this one
            included).
        temperatures: K numbers that the logits are divided by; None for 1.
        aggregate: What an exit answers: its own logits (``last``), or a geometric mean of the probabilities of all
            exits so far (``mean``; ``fitted`` with weights of its own).
        weights: For ``fitted``: row k has the weights of exits 0..k in the answer of exit k.
        exit_names: The network's ``exit_names``, so that the policy of another network is noticed.
        weights_digest: `timm_mlcsd.models.weights_digest` of the weights that the policy was fitted to; with others it
            is refused. None for a policy that was not fitted. `for_weights` sets it and the next two.
        calibration_data: Name of the data that it was fitted to.
        calibration_images: Number of images in it.

    Raises:
        ValueError: An argument is out of its range, or the arguments contradict each other.

    Examples:
        ```python
        policy = ExitPolicy([0.9, 0.8, float('inf')])  # four exits, the third is off
        ```
    """

    thresholds: Tuple[float, ...]
    score: str = 'confidence'
    temperatures: Optional[Tuple[float, ...]] = None
    aggregate: str = 'last'
    weights: Optional[Tuple[Tuple[float, ...], ...]] = None
    exit_names: Optional[Tuple[str, ...]] = None
    weights_digest: Optional[str] = None
    calibration_data: Optional[str] = None
    calibration_images: Optional[int] = None

    def __post_init__(self):
        content = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        if isinstance(content['thresholds'], list):
            content['thresholds'] = ['off' if t == math.inf else t for t in content['thresholds']]
        content = check_policy({'format': POLICY_FORMAT, 'version': VERSION, **content}, 'ExitPolicy')
        for name, value in content.items():
            if name == 'weights' and value is not None:
                value = map(tuple, value)
            is_list = name in ('thresholds', 'temperatures', 'weights', 'exit_names')
            object.__setattr__(self, name, tuple(value) if is_list and value is not None else value)

    @property
    def num_exits(self) -> int:
        return len(self.thresholds) + 1

    def is_on(self, k: int) -> bool:
        """Whether exit k ever answers."""
        return k == self.num_exits - 1 or self.thresholds[k] != math.inf

    def with_thresholds(self, thresholds: Sequence[float]) -> 'ExitPolicy':
        """The same policy with other thresholds."""
        return replace(self, thresholds=tuple(thresholds))

    def check(self, num_exits: int, exit_names: Optional[Sequence[str]] = None) -> None:
        """Raise a ValueError where the policy is another network's."""
        if num_exits != self.num_exits:
            raise ValueError(
                f'the policy has {len(self.thresholds)} thresholds, for {self.num_exits} exits; the network has '
                f'{num_exits} exits.'
            )
        if self.exit_names and exit_names and tuple(exit_names) != self.exit_names:
            raise ValueError(
                f'the policy is for exits at {", ".join(self.exit_names)}; the network has them at '
                f'{", ".join(exit_names)}.'
            )

    def for_weights(self, model: Any, data: Optional[str] = None, images: Optional[int] = None) -> 'ExitPolicy':
        """The same policy bound to a network's weights.

        Args:
            model: The network that it was fitted to, or exported stages of it.
            data: Name of the data that it was fitted to.
            images: Number of images in it.
        """
        data = printable(str(data))[:300] if data else None
        return replace(self, weights_digest=_digest_of(model), calibration_data=data, calibration_images=images)

    @classmethod
    def load_for(cls, path: Union[str, Path], model: MultiExitModel) -> 'ExitPolicy':
        """Load a policy that is meant for a network.

        Args:
            path: File, or folder that holds ``exit_policy.json``.
            model: The network.

        Raises:
            ValueError: It is not a policy, or it was made for another network or fitted to other weights.
        """
        policy = cls.load(path)
        policy.check(model.num_exits, model.exit_names)
        policy.check_weights(model)
        return policy

    def without_digest(self) -> 'ExitPolicy':
        """The same policy for any weights."""
        return replace(self, weights_digest=None)

    def check_weights(self, model: Any) -> None:
        """Raise a ValueError where the policy was fitted to other weights than a network's.

        A policy without a digest is accepted.

        Args:
            model: The network, or exported stages of it.
        """
        if self.weights_digest is None:
            return
        digest = _digest_of(model)
        if digest == self.weights_digest:
            return
        fitted_on = ''.join(
            f', {what} {value}'
            for what, value in (('data', self.calibration_data), ('images', self.calibration_images))
            if value is not None
        )
        theirs = 'not known, the folder was exported by an earlier release' if digest is None else digest[:15]
        raise ValueError(
            f'the policy was fitted to other weights (digest {self.weights_digest[:15]}{fitted_on}) than the network '
            f'has ({theirs}): fit one to these (validate.py --adaptive --max-drop P --save-policy), load the weights '
            f'that it was fitted to (averaged ones with --use-ema), or use policy.without_digest() (in the file: '
            f'remove "weights_digest") if you know that it fits.'
        )

    def step(
        self, k: int, logits: torch.Tensor, history: Optional[ExitHistory] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, ExitHistory]:
        """What exit k says, given what the exits before it that are on have said.

        Args:
            k: Exit, from 0; one that is on.
            logits: Its logits [B, C].
            history: What `step` returned for the exit before it that is on; None for the first.

        Returns:
            The answer as logits [B, C] (its softmax is what the policy believes), the score [B], and the history for
            the next exit. float32 at least. The score is -inf, so that no threshold is reached, where the largest of
            a sample's answers is not a finite number; -inf alone is a class that cannot be.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperatures is not None:
            logits = logits / self.temperatures[k]
        history = history or ExitHistory()
        log_probs = history.log_probs
        if self.aggregate != 'last':
            log_probs = (*log_probs, logits.log_softmax(-1))
            weights = self._weights(k)
            logits = sum(w * p for w, p in zip(weights, log_probs)).log_softmax(-1)
        is_number = logits.amax(-1).isfinite()
        if self.score != 'patience':
            return logits, score_of(logits, self.score).where(is_number, -math.inf), ExitHistory(log_probs)
        prediction = logits.argmax(-1)
        streak = torch.ones_like(prediction)
        if history.prediction is not None:
            streak += torch.where(prediction == history.prediction, history.streak, 0)
        streak = streak * is_number
        score = streak.to(logits.dtype).where(is_number, -math.inf)
        return logits, score, ExitHistory(log_probs, prediction, streak)

    def _weights(self, k: int) -> Sequence[float]:
        """Weights of the exits up to k that are on; what the others would have had is shared among them."""
        on = [j for j in range(k + 1) if self.is_on(j)]
        if self.aggregate == 'mean':
            return [1 / len(on)] * len(on)
        row = self.weights[k]
        scale = sum(row) / sum(row[j] for j in on)
        return [row[j] * scale for j in on]

    def save(self, path: Union[str, Path]) -> None:
        """Write the policy as JSON; a folder gets ``exit_policy.json``. Nothing is left half written."""
        path = Path(path)
        path = path / POLICY if path.is_dir() else path
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + '\n', encoding='utf-8')

    def to_dict(self) -> Dict[str, Any]:
        """What `save` writes: plain values, ``off`` for the threshold ``inf``."""
        thresholds = ['off' if t == math.inf else t for t in self.thresholds]
        content = {'format': POLICY_FORMAT, 'version': VERSION, **asdict(self), 'thresholds': thresholds}
        late = ('weights_digest', 'calibration_data', 'calibration_images')  # files without them stay as they were
        return {name: value for name, value in content.items() if value is not None or name not in late}

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitPolicy':
        """Read a policy that `save` wrote, from a file or its folder.

        Raises:
            ValueError: There is none, or it isn't one.
        """
        path = Path(path)
        path = path / POLICY if path.is_dir() else path
        if not path.exists():
            raise ValueError(f'{str(path)!r}: there is no such file; calibrate a policy and save it there.')
        return cls.from_dict(read_json(path), repr(str(path)))

    @classmethod
    def from_dict(cls, content: Dict[str, Any], source: str = 'policy') -> 'ExitPolicy':
        """The policy in what `to_dict` gives.

        Args:
            content: It.
            source: Where it comes from, for messages.

        Raises:
            ValueError: It isn't one; the message names the source and the field.
        """
        return cls(**check_policy(content, source))


def _plain(value: Any, depth: int = 3) -> Any:
    """Tensors, arrays and other ordered collections as lists of Python's own values; anything else as it is."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)) or not depth:
        return value
    return [_plain(v, depth - 1) for v in value]


def _digest_of(model: Any) -> Optional[str]:
    """Of a network's weights, or as the manifest of exported stages has it."""
    return weights_digest(unwrap_model(model)) if isinstance(model, torch.nn.Module) else model.weights_digest


def score_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    """How sure logits [..., C] are, between 0 and 1: ``confidence``, ``entropy`` or ``margin``."""
    probs = logits.softmax(-1)
    if score == 'entropy':
        entropy = -torch.special.xlogy(probs, probs).sum(-1)  # p log p is 0 where p is
        return (1 - entropy / math.log(max(logits.shape[-1], 2))).clamp_min(0)
    if score == 'confidence':
        return probs.amax(-1)
    if probs.shape[-1] == 1:
        return probs[..., 0]
    best = probs.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]
