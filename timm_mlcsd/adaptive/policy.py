"""When a sample leaves: a score, one threshold per exit, and what an exit answers."""

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ..files import replacing
from ..hub import POLICY
from ..models import weights_digest

__all__ = ['AGGREGATES', 'SCORES', 'ExitPolicy', 'Memory', 'score_of']

SCORES = ('confidence', 'entropy', 'margin', 'patience')
AGGREGATES = ('last', 'mean', 'fitted')
VERSION = 1


class Memory(NamedTuple):
    """What exits that a sample has passed leave for those to come; tensors only, batch first.

    Attributes:
        log_probs: Of every exit that answered, [B, C]; empty where the aggregate is ``last``.
        prediction: Of the exit before, [B]; None where the score isn't ``patience``.
        agreeing: How many exits in a row made that prediction, [B].
    """

    log_probs: Tuple[torch.Tensor, ...] = ()
    prediction: Optional[torch.Tensor] = None
    agreeing: Optional[torch.Tensor] = None


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
        weights_digest: Of the weights that the policy was fitted to, as `timm_mlcsd.models.weights_digest` gives it.
        calibration_data: Name of the data that it was fitted to.
        calibration_images: Number of its images.

    Raises:
        ValueError: The arguments contradict each other.

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
        def numbers(name: str, values: Any) -> Tuple[float, ...]:
            try:
                return tuple(float(v) for v in values)
            except (TypeError, ValueError):
                raise ValueError(f'{name}={values!r} must be a list of numbers.') from None

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put('thresholds', numbers('thresholds', self.thresholds))
        if any(math.isnan(t) or t == -math.inf for t in self.thresholds):
            raise ValueError(f'thresholds={list(self.thresholds)}: each must be a number, or inf to turn the exit off.')
        for name, known in (('score', SCORES), ('aggregate', AGGREGATES)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is unknown; choose one of {", ".join(known)}.')
        if self.temperatures is not None:
            put('temperatures', numbers('temperatures', self.temperatures))
            if len(self.temperatures) != self.num_exits or not all(0 < t < math.inf for t in self.temperatures):
                raise ValueError(
                    f'temperatures={list(self.temperatures)} must be {self.num_exits} positive numbers, one per exit.'
                )
        if (self.aggregate == 'fitted') != (self.weights is not None):
            raise ValueError(
                f'weights go with aggregate=\'fitted\', not with {self.aggregate!r}; fit_weights fits them.'
            )
        if self.weights is not None:
            put('weights', tuple(numbers('weights', row) for row in self.weights))
            if [len(row) for row in self.weights] != list(range(1, self.num_exits + 1)) or any(
                not 0 < w < math.inf for row in self.weights for w in row
            ):
                raise ValueError(f'weights must be {self.num_exits} rows of 1 to {self.num_exits} positive numbers.')
        if self.exit_names is not None:
            put('exit_names', tuple(self.exit_names))
            if len(self.exit_names) != self.num_exits:
                raise ValueError(f'exit_names has {len(self.exit_names)} names for {self.num_exits} exits.')

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

    def for_weights(
        self, model: torch.nn.Module, data: Optional[str] = None, images: Optional[int] = None
    ) -> 'ExitPolicy':
        """The same policy, bound to the weights of `model`."""
        data = self.calibration_data if data is None else data
        images = self.calibration_images if images is None else images
        return replace(self, weights_digest=weights_digest(model), calibration_data=data, calibration_images=images)

    def without_digest(self) -> 'ExitPolicy':
        """The same policy for any weights."""
        return replace(self, weights_digest=None)

    def check_weights(self, model: torch.nn.Module) -> None:
        """Raise a ValueError where the policy was fitted to other weights."""
        if self.weights_digest is not None and self.weights_digest != weights_digest(model):
            raise ValueError(
                'the policy was fitted to other weights; calibrate again, or use policy.without_digest() if it fits.'
            )

    def answer(
        self, k: int, logits: torch.Tensor, memory: Optional[Memory] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, Memory]:
        """What exit k says, given what the exits before it that are on have said.

        Args:
            k: Exit, from 0; one that is on.
            logits: Its logits [B, C].
            memory: What `answer` returned for the exit before it that is on; None for the first.

        Returns:
            The answer as logits [B, C] (its softmax is what the policy believes), the score [B], and the memory for
            the next exit. float32 at least.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperatures is not None:
            logits = logits / self.temperatures[k]
        memory = memory or Memory()
        log_probs = memory.log_probs
        if self.aggregate != 'last':
            log_probs = (*log_probs, logits.log_softmax(-1))
            weights = self._weights(k)
            logits = sum(w * p for w, p in zip(weights, log_probs)).log_softmax(-1)
        if self.score != 'patience':
            return logits, score_of(logits, self.score), Memory(log_probs)
        prediction = logits.argmax(-1)
        agreeing = torch.ones_like(prediction)
        if memory.prediction is not None:
            agreeing += torch.where(prediction == memory.prediction, memory.agreeing, 0)
        return logits, agreeing.to(logits.dtype), Memory(log_probs, prediction, agreeing)

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
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + '\n', encoding='utf-8')

    def to_dict(self) -> Dict[str, Any]:
        """What `save` writes: plain values, ``off`` for the threshold ``inf``."""
        thresholds = ['off' if t == math.inf else t for t in self.thresholds]
        return {'format': 'timm_mlcsd exit policy', 'version': VERSION, **asdict(self), 'thresholds': thresholds}

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitPolicy':
        """Read a policy that `save` wrote, from a file or its folder.

        Raises:
            ValueError: There is none, or it isn't one.
        """
        path = Path(path)
        path = path / POLICY if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except FileNotFoundError:
            raise ValueError(f'{str(path)!r}: there is no such file; calibrate a policy and save it there.') from None
        except (OSError, ValueError) as e:
            raise ValueError(f'{str(path)!r} cannot be read as JSON: {e}') from None
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: Dict[str, Any], source: str = 'policy') -> 'ExitPolicy':
        """The policy in what `to_dict` gives.

        Raises:
            ValueError: It isn't one.
        """
        if not isinstance(content, dict) or not isinstance(content.get('thresholds'), list):
            raise ValueError(f'{source} is no exit policy: it has no list of thresholds.')
        if content.get('version') != VERSION:
            raise ValueError(f'{source} has version {content.get("version")!r}; this release reads version {VERSION}.')
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(content) - known - {'format', 'version'})
        if unknown:
            raise ValueError(f'{source} has unknown entries: {", ".join(unknown)}.')
        arguments = {name: value for name, value in content.items() if name in known}
        try:
            arguments['thresholds'] = [math.inf if t == 'off' else t for t in arguments['thresholds']]
            return cls(**arguments)
        except (TypeError, ValueError) as e:
            raise ValueError(f'{source}: {e}') from None


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
