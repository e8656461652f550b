"""Run a multi-exit network so that every sample stops at its own exit."""

import time
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ..cost import exit_costs
from ..models import MultiExitModel
from ..network import load_network
from .evaluate import Costs, cumulative_costs
from .exported import MANIFEST, ExportedModel
from .policy import ExitHistory, ExitPolicy

__all__ = ['AdaptiveModel', 'Prediction']


class Prediction(NamedTuple):
    """What a batch of B images is taken for, in the order in which they came.

    Attributes:
        logits: The answers [B, C]; their softmax is what the policy believes.
        exit_index: The exit that answered each, from 0, [B].
        cost: What was spent on each, in the unit of the costs, [B], float64.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor
    cost: torch.Tensor


class AdaptiveModel:
    """A multi-exit network in which each sample of a batch leaves when it is sure.

    Behind every exit the batch shrinks to the samples that are still there, so time is saved, not only counted. It is
    no module: it runs `model` as it is, on its device, under the caller's autocast, and keeps nothing between calls
    but how long the stages took, so that threads may share it.

    Args:
        model: A resumable multi-exit network, which is put in evaluation mode and must stay in it, or exported stages.
        policy: When samples leave. Samples whose logits are not finite at an exit do not leave there
            (`ExitPolicy.answer`).
        costs: What leaving at each exit costs: `ExitCost`, or K cumulative numbers (measured milliseconds, say);
            default: multiply-adds at the image size that the network was made for.

    Raises:
        ValueError: The network cannot stop on the way, or the policy is another network's or was fitted to other
            weights.

    Examples:
        ```python
        adaptive = AdaptiveModel(model, ExitPolicy([0.9] * (model.num_exits - 1)))
        logits, exit_index, cost = adaptive.predict(images)
        ```
    """

    def __init__(self, model: Union[MultiExitModel, ExportedModel], policy: ExitPolicy, costs: Optional[Costs] = None):
        policy.check(model.num_exits, model.exit_names)
        if not model.num_classes:
            raise ValueError('the network has no classes (num_classes=0), so no exit can be sure of one.')
        if isinstance(model, ExportedModel):
            costs = model.costs if costs is None else costs
        elif not model.resumable:
            raise ValueError(
                f'{type(model).__name__} cannot stop on the way: {getattr(model, "why_not_resumable", "no stages")}.'
            )
        else:
            model.eval()
            costs = exit_costs(model, model.probe_size) if costs is None else costs
        policy.check_weights(model)
        self.model = model
        self.policy = policy
        self._modules = [] if isinstance(model, ExportedModel) else list(model.modules())
        self.costs = cumulative_costs(costs, policy).tolist()
        self._run_exit: List[Callable[[Any], Tuple[Any, Optional[torch.Tensor]]]] = [
            partial(model.run_exit, k, answers=policy.is_on(k)) for k in range(model.num_exits)
        ]
        self._seconds: Dict[Tuple, List[float]] = {}  # of the last runs of a stage, but for its very first

    @classmethod
    def from_pretrained(
        cls, source: Union[str, Path], policy: Optional[ExitPolicy] = None, **kwargs: Any
    ) -> 'AdaptiveModel':
        """Load a network together with the exit policy that lies beside its weights.

        Args:
            source: ``hf-hub:REPO``, a folder of `save_pretrained`, a checkpoint or run folder of train.py, or a
                folder of exported programs.
            policy: Use this one instead.
            **kwargs: For `ExportedModel`: ``device``, ``trusted``.

        Raises:
            ValueError: There is no such network, or no policy.
        """
        if (Path(source) / MANIFEST).is_file():
            model = ExportedModel(source, **kwargs)
            return cls(model, policy or model.policy)
        if kwargs:
            raise ValueError(f'{", ".join(kwargs)}: only for a folder of exported programs; {str(source)!r} is none.')
        network = load_network(source)
        if policy is None and network.policy_file is None:
            raise ValueError(
                f'{str(source)!r} has no exit policy beside its weights; pass one, or calibrate and save one with '
                f'validate.py --adaptive --save-policy.'
            )
        costs = exit_costs(network.model, network.data_config['input_size']) if network.model.resumable else None
        return cls(network.model, policy or ExitPolicy.load(network.policy_file), costs)

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> Prediction:
        """Answer for every image at the first exit that is sure of it.

        Args:
            x: Images [B, C, H, W], B at least 1.

        Raises:
            ValueError: The batch is empty.
            RuntimeError: The network, or a part of it, is in training mode.
        """
        return self._run(x)

    @torch.no_grad()
    def predict_anytime(self, x: torch.Tensor, deadline_s: float) -> Prediction:
        """Answer when sure, or with the deepest exit that fits the time; the first exit that is on always answers.

        A stage is not begun where the same one, on a batch of that size, took longer than what is left: the shortest
        of its last three runs counts, the very first does not, and one percent less whenever a stage is skipped, so
        that a slow spell is forgotten.

        Args:
            x: Images [B, C, H, W].
            deadline_s: Seconds from now.

        Raises:
            ValueError: The deadline is not a number, or the batch is empty.
            RuntimeError: The network, or a part of it, is in training mode.
        """
        if deadline_s != deadline_s:
            raise ValueError(f'deadline_s={deadline_s} is not a number of seconds.')
        return self._run(x, time.perf_counter() + deadline_s)

    def iter_exits(self, x: torch.Tensor) -> Iterator[Tuple[int, torch.Tensor]]:
        """Yield (k, answers [B, C]) exit by exit, without exits that are off, whatever the thresholds say.

        Raises:
            RuntimeError: The network, or a part of it, is in training mode.
        """
        self._check_mode()  # here: a generator would begin with it at the first exit
        return self._iter_exits(x)

    @torch.no_grad()
    def _iter_exits(self, x: torch.Tensor) -> Iterator[Tuple[int, torch.Tensor]]:
        state, history = x, None
        for k, run in enumerate(self._run_exit):
            self._check_mode()
            state, logits = run(state)
            if logits is not None:
                answer, _, history = self.policy.step(k, logits, history)
                yield k, answer

    def compile(self, **kwargs: Any) -> 'AdaptiveModel':
        """Compile every stage with its head for batches of any size; `kwargs` go to ``torch.compile``. Returns
        itself."""
        self._run_exit = [
            torch.compile(_with_own_code(run, k), dynamic=True, **kwargs) for k, run in enumerate(self._run_exit)
        ]
        return self

    def _check_mode(self) -> None:
        """Raise a RuntimeError in training mode: dropout and the batch's statistics would change the answers, and the
        batch would change the network."""
        if any(module.training for module in self._modules):
            name = next((name for name, module in self.model.named_modules() if module.training), '')
            what = f'its module {name!r}' if name else 'the network'
            raise RuntimeError(f'{what} is in training mode; call model.eval() before the adaptive model answers.')

    def _run(self, x: torch.Tensor, deadline: Optional[float] = None) -> Prediction:
        self._check_mode()
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f'images are {kind}; expected a floating point tensor [B, C, H, W], normalised.')
        if x.ndim != 4 or not len(x):
            raise ValueError(f'images have shape {tuple(x.shape)}; expected [B, C, H, W], B at least 1.')
        batch = _ActiveBatch(len(x))
        state, history, answered = x, None, None
        for k in range(self.policy.num_exits):
            clock = None if deadline is None else self._clock(k, len(batch.rows), x)
            if clock is not None and answered is not None and not self._fits(k, clock, deadline):
                break
            start = time.perf_counter()
            state, logits = self._run_exit[k](state)
            if logits is not None:
                answer, score, history = self.policy.step(k, logits, history)
                answered = k, answer
            if clock is not None:
                if x.device.type == 'cuda':
                    torch.cuda.synchronize(x.device)
                known = self._seconds.get(clock)
                self._seconds[clock] = [] if known is None else [*known[-2:], time.perf_counter() - start]
            if k == self.policy.num_exits - 1:
                break
            if logits is not None:
                moves = batch.leave(k, answer, (score >= self.policy.thresholds[k]).tolist())
                if not batch.rows:
                    break
                if moves is not None:
                    close_up = partial(_compact, count=len(batch.rows), moves=moves, images=x)
                    state, answer = _each(state, close_up), close_up(answer)
                    history = ExitHistory(*_each(history, close_up))
                    answered = k, answer
        if batch.rows:
            batch.finish(*answered)
        return batch.prediction(self.costs)

    def _clock(self, k: int, count: int, x: torch.Tensor) -> Tuple:
        """Under which name the seconds of stage k on so many of these images are kept."""
        return (k, count, tuple(x.shape[1:]), x.device)

    def _fits(self, k: int, clock: Tuple, deadline: float) -> bool:
        """Whether there is time for the stages from k to the next exit that is on."""
        ends = next(j for j in range(k, self.policy.num_exits) if self.policy.is_on(j))
        clocks = [(j, *clock[1:]) for j in range(k, ends + 1)]
        ahead = sum(min(self._seconds.get(name) or [0.0]) for name in clocks)
        left = deadline - time.perf_counter()
        if ahead > left > 0:
            self._seconds.update((name, [0.99 * s for s in self._seconds.get(name, [])]) for name in clocks)
        return 0 < left >= ahead


class _ActiveBatch:
    """Who of a batch has left with which answer, and who is still there."""

    def __init__(self, size: int):
        self.rows = list(range(size))  # of those that are still there, in the state's order
        self.left: List[int] = []  # rows of the others, in the order in which they left
        self.exits: List[int] = []  # where they did
        self.answers: List[torch.Tensor] = []  # with what, together [len(left), C]

    def leave(self, k: int, answer: torch.Tensor, leaves: List[bool]) -> Optional[List[Tuple[int, int]]]:
        """Let those leave at exit k that want to.

        Returns:
            How the state's rows close up, (from, to) each: the last ones fill the gaps. None where nobody leaves.
        """
        gone = [i for i, leaving in enumerate(leaves) if leaving]
        if not gone:
            return None
        if len(gone) == len(leaves):
            self.finish(k, answer)
            return None
        self.left += [self.rows[i] for i in gone]
        self.exits += [k] * len(gone)
        self.answers.append(answer[gone])
        count = len(leaves) - len(gone)
        moves = list(zip((i for i in range(count, len(leaves)) if not leaves[i]), gone))
        for source, gap in moves:
            self.rows[gap] = self.rows[source]
        del self.rows[count:]
        return moves

    def finish(self, k: int, answer: torch.Tensor) -> None:
        """All that are still there leave."""
        self.left += self.rows
        self.exits += [k] * len(self.rows)
        self.answers.append(answer)
        self.rows = []

    def prediction(self, costs: Sequence[float]) -> Prediction:
        """What all were taken for, in the order in which they came."""
        device = self.answers[0].device
        order = sorted(range(len(self.left)), key=self.left.__getitem__)
        logits = self.answers[0] if len(self.answers) == 1 else torch.cat(self.answers)[order]
        exits = [self.exits[i] for i in order]
        dtype = torch.float32 if device.type == 'mps' else torch.float64
        return Prediction(
            logits,
            torch.tensor(exits, device=device),
            torch.tensor([costs[k] for k in exits], dtype=dtype, device=device),
        )


def _each(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tensor, or all tensors in nested tuples, changed; a tenth of the time of PyTorch's own pytrees."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    return tree if tree is None else tuple(_each(t, change) for t in tree)


def _compact(t: torch.Tensor, count: int, moves: Sequence[Tuple[int, int]], images: torch.Tensor) -> torch.Tensor:
    """The first `count` rows after `moves`: on a CPU within the tensor, which is much faster than a copy of all rows;
    elsewhere in one kernel. The caller's images stay as they are."""
    dense = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
    if t.device.type == 'cpu' and dense and t.untyped_storage().data_ptr() != images.untyped_storage().data_ptr():
        for source, gap in moves:
            t[gap] = t[source]
        return t[:count]
    order = list(range(count))
    for source, gap in moves:
        order[gap] = source
    return t[order]


def _with_own_code(run: Callable[[Any], Any], k: int) -> Callable[[Any], Any]:
    """A function around `run` that shares its code with no other exit: torch.compile counts recompiles per code."""

    def step(state: Any) -> Any:
        return run(state)

    return FunctionType(step.__code__.replace(co_name=f'exit_{k}'), step.__globals__, closure=step.__closure__)
