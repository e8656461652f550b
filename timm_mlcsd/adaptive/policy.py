"""Exit policies: the score of an exit, one threshold per exit, and how exits are averaged."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from timm.utils import unwrap_model

from ..errors import printable
from ..file_checks import AGGREGATES, MAX_LOGIT_MARGIN, POLICY_FORMAT, SCORES, VERSION, check_policy, read_json
from ..files import atomic_write
from ..hub import POLICY
from ..models import MultiExitModel, weights_digest

__all__ = ['AGGREGATES', 'SCORES', 'ExitPolicy', 'ExitHistory', 'score_of']


class ExitHistory(NamedTuple):
    """State that `ExitPolicy.step` passes from one exit to the next; tensors only, batch first.

    Attributes:
        log_probs: Log-probabilities of every exit so far, [B, C] each; empty unless exits are averaged.
        prediction: Predicted class of the previous exit, [B]; None unless the score is ``patience``.
        streak: Number of consecutive exits with that prediction, [B]; None unless the score is ``patience``.
    """

    log_probs: Tuple[torch.Tensor, ...] = ()
    prediction: Optional[torch.Tensor] = None
    streak: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class ExitPolicy:
    """Rule that decides at which exit each sample leaves.

    A sample leaves at the first exit k whose score is at least ``thresholds[k]``; the last exit answers all remaining
    samples. An exit with the threshold ``inf`` is off: its head does not run, and it does not contribute to the
    answers of later exits.

    Args:
        thresholds: Score thresholds of all exits but the last, [K-1].
        score: Measure of how sure an exit is, higher is surer: ``confidence`` (largest softmax probability, default),
            ``entropy`` (1 - H / log C), ``margin`` (difference of the two largest probabilities), ``logit_margin``
            (difference of the two largest logits, in nats), ``patience`` (number of consecutive exits with the same
            prediction, this one included).
        temperatures: Divisors of the logits, [K]; None (default) for 1.
        aggregate: Answer of an exit: ``last`` (default): its own logits; ``mean``: geometric mean of the probabilities
            of all exits so far; ``fitted``: the same with `weights`.
        weights: Weights of the exits for ``fitted``: K rows, row k with the weights of exits 0..k in the answer of
            exit k.
        exit_names: ``exit_names`` of the network, [K]; with them `check` rejects other networks.
        weights_digest: `timm_mlcsd.models.weights_digest` of the weights that the policy was fitted to; other weights
            are rejected. None (default) for any weights. Set by `for_weights`, like the next two.
        calibration_data: Name of the data set that the policy was fitted to.
        calibration_images: Number of images that the policy was fitted to.
        certificate: What `calibrate` certified about these thresholds: ``risk``, ``limit`` in points, ``confidence``,
            number of ``images``, ``bound``, and a ``digest`` of what the exits compute; None (default) for nothing.
            Set by `certified`.

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
    certificate: Optional[Dict[str, Any]] = field(default=None, hash=False)

    def __post_init__(self) -> None:
        content = {f.name: _to_builtin(getattr(self, f.name)) for f in fields(self)}
        if isinstance(content['thresholds'], list):
            content['thresholds'] = ['off' if t == math.inf else t for t in content['thresholds']]
        content = check_policy({'format': POLICY_FORMAT, 'version': VERSION, **content}, 'ExitPolicy')
        for name, value in content.items():
            if name == 'weights' and value is not None:
                value = map(tuple, value)
            is_list = name in ('thresholds', 'temperatures', 'weights', 'exit_names')
            object.__setattr__(self, name, tuple(value) if is_list and value is not None else value)

        if self.certificate is not None and self.certificate['digest'] != self._digest():
            raise ValueError(
                'certificate: expected the one of these thresholds, score, temperatures and weights, got that of '
                'another policy; use with_thresholds, or remove the certificate.'
            )

    def _digest(self) -> str:
        """Digest of all that decides where a sample leaves and what is answered."""
        content = (self.thresholds, self.score, self.temperatures, self.aggregate, self.weights)
        return f'sha256:{hashlib.sha256(repr(content).encode()).hexdigest()}'

    def certified(self, certificate: Mapping[str, Any]) -> 'ExitPolicy':
        """Copy of the policy with a certificate, without its digest."""
        return replace(self, certificate={**certificate, 'digest': self._digest()})

    @property
    def num_exits(self) -> int:
        """Number of exits K, the last one included."""
        return len(self.thresholds) + 1

    def is_on(self, k: int) -> bool:
        """Whether exit k can answer; false if its threshold is ``inf``."""
        return k == self.num_exits - 1 or self.thresholds[k] != math.inf

    def with_thresholds(self, thresholds: Sequence[float]) -> 'ExitPolicy':
        """Copy of the policy with other thresholds, [K-1], for which a certificate does not hold."""
        return replace(self, thresholds=tuple(thresholds), certificate=None)

    def check(self, num_exits: int, exit_names: Optional[Sequence[str]] = None) -> None:
        """Check that the policy fits a network.

        Args:
            num_exits: Number of exits of the network.
            exit_names: ``exit_names`` of the network; None if they are unknown.

        Raises:
            ValueError: The network has other exits than the policy.
        """
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
        """Copy of the policy that is bound to a network's weights.

        Args:
            model: Network that the policy was fitted to, or its exported stages.
            data: Name of the data set that the policy was fitted to.
            images: Number of images that the policy was fitted to.

        Returns:
            The policy with ``weights_digest``, ``calibration_data`` and ``calibration_images``.
        """
        data = printable(str(data))[:300] if data else None
        digest = _model_digest(model)
        certificate = self.certificate if self.weights_digest in (None, digest) else None
        return replace(
            self,
            weights_digest=digest,
            calibration_data=data,
            calibration_images=images,
            certificate=certificate,
        )

    @classmethod
    def load_for(cls, path: Union[str, Path], model: MultiExitModel) -> 'ExitPolicy':
        """Load a policy and check that it fits a network.

        Args:
            path: Path of the file, or folder that holds ``exit_policy.json``.
            model: Network.

        Returns:
            The policy.

        Raises:
            ValueError: The file is not a policy, or the policy was made for another network or fitted to other weights.
        """
        policy = cls.load(path)
        policy.check(model.num_exits, model.exit_names)
        policy.check_weights(model)
        return policy

    def without_digest(self) -> 'ExitPolicy':
        """Copy of the policy that is accepted with any weights, for which a certificate does not hold."""
        return replace(self, weights_digest=None, certificate=None)

    def check_weights(self, model: Any) -> None:
        """Check that the policy was fitted to the weights of a network; without a digest it fits any weights.

        Args:
            model: Network, or its exported stages.

        Raises:
            ValueError: The policy was fitted to other weights.
        """
        if self.weights_digest is None:
            return
        digest = _model_digest(model)
        if digest == self.weights_digest:
            return
        fitted_on = ''.join(
            f', {what} {value}'
            for what, value in (('data', self.calibration_data), ('images', self.calibration_images))
            if value is not None
        )
        actual = 'unknown, the folder was exported by an earlier release' if digest is None else digest[:15]
        raise ValueError(
            f'the policy was fitted to other weights (digest {self.weights_digest[:15]}{fitted_on}) than the network '
            f'has ({actual}); fit a policy to these weights (validate.py --adaptive --max-drop P --save-policy), load '
            f'the weights that it was fitted to (averaged weights with --use-ema), or use policy.without_digest() (in '
            f'the file: remove "weights_digest") if you know that it fits.'
        )

    def step(
        self, k: int, logits: torch.Tensor, history: Optional[ExitHistory] = None
    ) -> Tuple[torch.Tensor, torch.Tensor, ExitHistory]:
        """Compute answer and score of exit k.

        Args:
            k: Index of the exit, from 0; the exit must be on.
            logits: Logits of the exit, [B, C].
            history: History that `step` returned for the previous exit that is on; None for the first.

        Returns:
            The answer as logits, [B, C], whose softmax gives the class probabilities; the score, [B]; and the history
            for the next exit. All in float32, or float64 if `logits` are. The score is -inf, below every threshold,
            where the largest logit of a sample's answer is not finite; excluded classes may have logits of -inf.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperatures is not None:
            logits = logits / self.temperatures[k]
        history = history or ExitHistory()
        log_probs = history.log_probs
        if self.aggregate != 'last':
            log_probs = (*log_probs, logits.log_softmax(-1))
            weights = self._weights(k)
            logits = sum((w * p for w, p in zip(weights, log_probs)), logits.new_zeros(())).log_softmax(-1)
        is_number = logits.amax(-1).isfinite()
        if self.score != 'patience':
            return logits, score_of(logits, self.score).where(is_number, -math.inf), ExitHistory(log_probs)
        prediction = logits.argmax(-1)
        streak = torch.ones_like(prediction)
        if history.prediction is not None and history.streak is not None:
            streak += torch.where(prediction == history.prediction, history.streak, 0)
        streak = streak * is_number
        score = streak.to(logits.dtype).where(is_number, -math.inf)
        return logits, score, ExitHistory(log_probs, prediction, streak)

    def _weights(self, k: int) -> Sequence[float]:
        """Weights of the exits 0..k that are on, scaled to the sum of all weights of row k."""
        on = [j for j in range(k + 1) if self.is_on(j)]
        if self.aggregate == 'mean':
            return [1 / len(on)] * len(on)
        assert self.weights is not None  # checked with the aggregate
        row = self.weights[k]
        scale = sum(row) / sum(row[j] for j in on)
        return [row[j] * scale for j in on]

    def save(self, path: Union[str, Path]) -> None:
        """Write the policy as JSON, atomically.

        Args:
            path: Path of the file, or an existing folder for ``exit_policy.json`` in it.
        """
        path = Path(path)
        path = path / POLICY if path.is_dir() else path
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + '\n', encoding='utf-8')

    def to_dict(self) -> Dict[str, Any]:
        """Content of the policy file: JSON values, with ``off`` for the threshold ``inf``."""
        thresholds = ['off' if t == math.inf else t for t in self.thresholds]
        content = {'format': POLICY_FORMAT, 'version': VERSION, **asdict(self), 'thresholds': thresholds}
        # left out if None, as in files of earlier releases
        optional = ('weights_digest', 'calibration_data', 'calibration_images', 'certificate')
        return {name: value for name, value in content.items() if value is not None or name not in optional}

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'ExitPolicy':
        """Read a policy that `save` wrote.

        Args:
            path: Path of the file, or folder that holds ``exit_policy.json``.

        Returns:
            The policy.

        Raises:
            ValueError: The file does not exist, or is not a valid policy.
        """
        path = Path(path)
        path = path / POLICY if path.is_dir() else path
        if not path.exists():
            raise ValueError(f'{str(path)!r}: there is no such file; calibrate a policy and save it there.')
        return cls.from_dict(read_json(path), repr(str(path)))

    @classmethod
    def from_dict(cls, content: Dict[str, Any], source: str = 'policy') -> 'ExitPolicy':
        """Create a policy from the result of `to_dict`.

        Args:
            content: Content of a policy file.
            source: Name of the file in error messages.

        Returns:
            The policy.

        Raises:
            ValueError: A field is unknown or invalid; the message names source and field.
        """
        return cls(**check_policy(content, source))


def _to_builtin(value: Any, depth: int = 3) -> Any:
    """Convert tensors, arrays and ordered collections to lists of Python numbers; return other values unchanged."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping, Set)) or not depth:
        return value
    return [_to_builtin(v, depth - 1) for v in value]


def _model_digest(model: Any) -> Optional[str]:
    """Digest of a network's weights, or the digest in the manifest of exported stages."""
    return weights_digest(unwrap_model(model)) if isinstance(model, torch.nn.Module) else model.weights_digest


def score_of(logits: torch.Tensor, score: str) -> torch.Tensor:
    """Compute a score of logits; `_score` in ``adaptive/export/onnx_runner.py`` has the same formulas.

    A score with a state, as ``patience``, is computed in `ExitPolicy.step`; `CachedLogits.key` in
    ``adaptive/evaluate.py`` says which answers it may share.

    Args:
        logits: Logits, [..., C].
        score: ``confidence``, ``entropy``, ``margin`` or ``logit_margin``, as in `ExitPolicy`.

    Returns:
        Scores, [...]: from 0 to 1, of ``logit_margin`` from 0 to `MAX_LOGIT_MARGIN`.

    Raises:
        ValueError: The score is unknown, or depends on other exits.
    """
    if score == 'logit_margin':
        if logits.shape[-1] == 1:
            return torch.full_like(logits[..., 0], MAX_LOGIT_MARGIN)
        largest = logits.topk(2, dim=-1).values
        return (largest[..., 0] - largest[..., 1]).clamp_max(MAX_LOGIT_MARGIN)
    probs = logits.softmax(-1)
    if score == 'entropy':
        entropy: torch.Tensor = -torch.special.xlogy(probs, probs).sum(-1)  # xlogy is 0 where p is 0
        return (1 - entropy / math.log(max(logits.shape[-1], 2))).clamp_min(0)
    if score == 'confidence':
        return probs.amax(-1)
    if score == 'margin':
        if probs.shape[-1] == 1:
            return probs[..., 0]
        best = probs.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
    raise ValueError(f'score: expected a score of logits alone, got {score!r}.')
