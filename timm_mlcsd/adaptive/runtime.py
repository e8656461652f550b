"""Early-exit inference: run a multi-exit network so that each sample stops at the first exit that is sure of it."""

import math
import time
from functools import partial
from numbers import Real
from pathlib import Path
from types import FunctionType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch

from ..cost import exit_costs
from ..models import MultiExitModel, find_hooked
from ..network import load_network
from .active import ActiveBatch, Answers, CostTable, Prediction, check_images
from .evaluate import Costs, cumulative_costs
from .exported import MANIFEST, ExportedModel
from .graphs import GraphedStage
from .policy import ExitPolicy
from .stream import Stream
from .trees import map_tensors

__all__ = ['AdaptiveModel', 'Prediction']

_RunExit = Callable[[Any], Tuple[Any, Optional[torch.Tensor]]]


class AdaptiveModel:
    """A multi-exit network in which each sample of a batch leaves at the first exit that is sure of it.

    After every exit the batch shrinks to the remaining samples, so later stages take less time. The object is not a
    module: it runs `model` unchanged, on its device, under the caller's autocast. Between calls it keeps only the run
    times of the stages, so threads may share it.

    Args:
        model: Resumable multi-exit network, which is set to evaluation mode and must stay in it; or exported stages.
        policy: Exit policy. Samples whose logits at an exit are not finite do not leave there (`ExitPolicy.step`).
        costs: Cumulative cost of answering at each exit, [K] (milliseconds, say); or `ExitCost` or `ExitTime` per
            exit. Default: multiply-adds at the image size of the network.

    Raises:
        ValueError: The network has no resumable stages, or the policy belongs to another network or was fitted to
            other weights.

    Examples:
        ```python
        adaptive = AdaptiveModel(model, ExitPolicy([0.9] * (model.num_exits - 1)))
        logits, exit_index, cost = adaptive.predict(images)
        ```
    """

    def __init__(self, model: Union[MultiExitModel, ExportedModel], policy: ExitPolicy, costs: Optional[Costs] = None):
        policy.check(model.num_exits, model.exit_names)
        if not model.num_classes:
            raise ValueError('the network has no classes (num_classes=0); exits need class probabilities.')
        if isinstance(model, ExportedModel):
            costs = model.costs if costs is None else costs
        elif not model.resumable:
            raise ValueError(
                f'{type(model).__name__} cannot stop at an exit: {getattr(model, "why_not_resumable", "no stages")}.'
            )
        else:
            model.eval()
            costs = exit_costs(model, model.probe_size) if costs is None else costs
        policy.check_weights(model)
        self.model = model
        self.policy = policy
        self.costs = cumulative_costs(costs, policy).tolist()
        self._cost_table = CostTable(self.costs)
        self._run_exit: List[_RunExit] = [
            partial(model.run_exit, k, answers=policy.is_on(k)) for k in range(model.num_exits)
        ]
        # seconds of the last three runs of a stage, without its first run
        self._seconds: Dict[Tuple[Any, ...], List[float]] = {}

    @classmethod
    def from_pretrained(
        cls, source: Union[str, Path], policy: Optional[ExitPolicy] = None, **kwargs: Any
    ) -> 'AdaptiveModel':
        """Load a network and the exit policy that is stored with its weights.

        Args:
            source: ``hf-hub:REPO``, a folder of `save_pretrained`, a checkpoint or run folder of train.py, or a
                folder of exported programs.
            policy: Exit policy; default: the stored one.
            **kwargs: Arguments of `ExportedModel` for a folder of exported programs: ``device``, ``trusted``.

        Returns:
            The network with its policy.

        Raises:
            ValueError: The network cannot be loaded, or there is no policy.
        """
        if (Path(source) / MANIFEST).is_file():
            model = ExportedModel(source, **kwargs)
            return cls(model, policy or model.policy)
        if kwargs:
            raise ValueError(
                f'{", ".join(kwargs)}: expected only for a folder of exported programs, got {str(source)!r}.'
            )
        network = load_network(source)
        if policy is None:
            if network.policy_file is None:
                raise ValueError(
                    f'{str(source)!r} has no exit policy beside its weights; pass one, or calibrate and save one with '
                    f'validate.py --adaptive --save-policy.'
                )
            policy = ExitPolicy.load(network.policy_file)
        costs = exit_costs(network.model, network.data_config['input_size']) if network.model.resumable else None
        return cls(network.model, policy, costs)

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> Prediction:
        """Classify each image at the first exit whose score reaches its threshold.

        Args:
            x: Images, [B, C, H, W], B at least 1.

        Returns:
            Logits, exit indices and costs of the batch.

        Raises:
            ValueError: The images are not a floating point tensor of that shape, or the batch is empty.
            RuntimeError: The network, or a part of it, is in training mode.
        """
        return self._run(x)

    @torch.no_grad()
    def predict_anytime(self, x: torch.Tensor, deadline_s: float) -> Prediction:
        """Classify each image as `predict` does, but return the deepest answers so far when the time is over.

        The first exit that is on always answers. Further stages start only if their estimated time fits the time left.
        The estimate of a stage is the shortest of its last three runs on a batch of that size, without the very first
        run. It decreases by one percent whenever a stage is skipped, so that a temporary slowdown does not last.

        Args:
            x: Images, [B, C, H, W], B at least 1.
            deadline_s: Time limit, in seconds from now.

        Returns:
            Logits, exit indices and costs of the batch.

        Raises:
            ValueError: The deadline is not a number, the images are not a floating point tensor of that shape, or the
                batch is empty.
            RuntimeError: The network, or a part of it, is in training mode.
        """
        if not isinstance(deadline_s, Real) or math.isnan(deadline_s):
            raise ValueError(f'deadline_s={deadline_s!r}: expected a number of seconds.')
        return self._run(x, time.perf_counter() + deadline_s)

    def predict_stream(
        self, batches: Iterable[torch.Tensor], *, batch_size: Optional[int] = None, max_waiting: Optional[int] = None
    ) -> Iterator[Prediction]:
        """Classify batch after batch, and run the remaining images of several batches together.

        Images that do not leave at an exit wait there. As soon as `batch_size` images wait in front of a stage, it runs
        on all of them, so that late stages, too, run on full batches (dynamic rebatching: DREX, arXiv:2512.15705).
        With `max_waiting` = 0 nothing waits, as in `predict`. Images of another size, dtype or device than the batch
        before, or under another autocast, do not run together: the stages first answer all images that wait.

        Answers, exits and costs are those of `predict` on the same batch, except for rounding: a stage runs on other
        numbers of images, so logits may differ in their last digits, and an exit where a score lies within rounding of
        its threshold. A batch is answered at the latest when 16 x `max_waiting` images have come after it.

        Args:
            batches: Batches of images, [B, C, H, W] each, B at least 1; sizes may differ.
            batch_size: Number of waiting images with which a stage runs; default: the size of the first batch. Give it
                if the batches are small, such as single images.
            max_waiting: Number of images that may wait in front of all stages together, which bounds the memory; beyond
                it the stage with the most of them runs. Default: 4 x `batch_size`.

        Returns:
            Generator of one `Prediction` per batch, in the order of the batches, each before the generator takes
            another batch than those that the answer needs. An item is computed under the autocast of the caller at
            that time. An error of `batches` passes through; batches that are not answered by then are lost.

        Raises:
            ValueError: `batch_size` or `max_waiting` is not a number of images. When its item is requested: a batch is
                not a floating point tensor of that shape, or is empty.
            RuntimeError: The network, or a part of it, is in training mode, now or when an item is requested.

        Examples:
            ```python
            for images, (logits, exit_index, cost) in zip(batches, adaptive.predict_stream(batches)):
                ...  # batches: a list, or anything else that can be iterated twice in the same order
            ```
        """
        self._check_mode()  # checked here, because a generator would check at the first item
        stream = Stream(self._stages(), self.policy, self._cost_table, self._check_mode, batch_size, max_waiting)
        return stream.predictions(batches)

    def iter_exits(self, x: torch.Tensor) -> Iterator[Tuple[int, torch.Tensor]]:
        """Iterate over the answers of all exits that are on, without using the thresholds.

        Args:
            x: Images, [B, C, H, W].

        Returns:
            Iterator of (exit index, logits [B, C]); an exit runs when its item is requested.

        Raises:
            RuntimeError: The network, or a part of it, is in training mode.
        """
        self._check_mode()  # checked here, because a generator would check at the first item
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
        """Compile every stage with its head for batches of any size.

        Args:
            **kwargs: Arguments of ``torch.compile``.

        Returns:
            The object itself.
        """
        self._run_exit = [
            torch.compile(_with_separate_code(run, k), dynamic=True, **kwargs) for k, run in enumerate(self._run_exit)
        ]
        return self

    def use_cuda_graphs(self) -> 'AdaptiveModel':
        """Run every stage with its head as CUDA graphs, one per power of two up to the number of images.

        On a GPU, small batches are limited by the start of their kernels, which a graph starts all at once. A graph is
        recorded when a stage sees a number of images for the first time, and keeps its memory. Weights that are
        replaced afterwards (not changed in place) are not seen.

        Returns:
            The object itself.

        Raises:
            ValueError: The network is not on a CUDA device, or consists of exported programs.
        """
        if isinstance(self.model, ExportedModel):
            raise ValueError('CUDA graphs need a network, not exported programs; load its weights.')
        device = next((p.device for p in self.model.parameters()), torch.device('cpu'))
        if device.type != 'cuda':
            raise ValueError(
                f'CUDA graphs need a network on a CUDA device, not on {device}; move it with model.cuda().'
            )
        self._run_exit = [GraphedStage(run) for run in self._run_exit]
        return self

    def _stages(self) -> List[_RunExit]:
        """The stages; with copies of what they return where a hook may keep it, because rows are overwritten."""
        if isinstance(self.model, ExportedModel) or find_hooked(self.model) is None:
            return self._run_exit
        return [partial(_run_and_copy, run) for run in self._run_exit]

    def _check_mode(self) -> None:
        """Raise a RuntimeError in training mode, in which dropout and batch statistics change the answers."""
        if isinstance(self.model, ExportedModel):
            return
        if any(module.training for module in self.model.modules()):
            name = next(name for name, module in self.model.named_modules() if module.training)
            what = f'its module {name!r}' if name else 'the network'
            raise RuntimeError(f'{what} is in training mode; call model.eval() before inference.')

    def _run(self, x: torch.Tensor, deadline: Optional[float] = None) -> Prediction:
        self._check_mode()
        check_images(x)
        batch, answers, stages = ActiveBatch.of(x), Answers(), self._stages()
        for k in range(self.policy.num_exits):
            key = self._timing_key(k, len(batch), x)
            if deadline is not None and batch.exit_index is not None and not self._fits_deadline(k, key, deadline):
                answers.add(batch.exit_index, batch.leave_all())
                break
            start = time.perf_counter()
            has_answered = batch.run(k, stages[k], self.policy)
            if deadline is not None:
                if x.device.type == 'cuda':
                    torch.cuda.synchronize(x.device)
                known = self._seconds.get(key)
                self._seconds[key] = [] if known is None else [*known[-2:], time.perf_counter() - start]
            if has_answered:
                answers.add(k, batch.leave(self.policy))
                if not len(batch):
                    break
        return answers.prediction(self._cost_table)

    def _timing_key(self, k: int, count: int, x: torch.Tensor) -> Tuple[Any, ...]:
        """Key of the run times of stage k on `count` images like `x`."""
        return (k, count, tuple(x.shape[1:]), x.device)

    def _fits_deadline(self, k: int, key: Tuple[Any, ...], deadline: float) -> bool:
        """Whether the stages from k to the next exit that is on fit the time left."""
        next_exit = next(j for j in range(k, self.policy.num_exits) if self.policy.is_on(j))
        keys = [(j, *key[1:]) for j in range(k, next_exit + 1)]
        needed = sum(min(self._seconds.get(key) or [0.0]) for key in keys)
        left = deadline - time.perf_counter()
        if needed > left > 0:
            self._seconds.update((key, [0.99 * s for s in self._seconds.get(key, [])]) for key in keys)
        return 0 < left >= needed


def _run_and_copy(run: _RunExit, state: Any) -> Tuple[Any, Optional[torch.Tensor]]:
    after, logits = map_tensors(run(state), torch.clone)
    return after, logits


def _with_separate_code(run: Callable[[Any], Any], k: int) -> Callable[[Any], Any]:
    """Wrap `run` in a function with its own code object, because torch.compile limits recompiles per code object."""

    def step(state: Any) -> Any:
        return run(state)

    return FunctionType(step.__code__.replace(co_name=f'exit_{k}'), step.__globals__, closure=step.__closure__)
