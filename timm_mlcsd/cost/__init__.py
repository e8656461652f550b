"""Cost of every exit: multiply-adds, parameters, depth and measured time.

A multiply-add (MAC) is one multiplication with its addition in a convolution or matrix product. Norms, activations
and pools are not counted, as is usual. Counting runs on the meta device, without memory for weights.
"""

import contextlib
import statistics
import time
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ..models import MetaRunner, MultiExitModel, eval_mode

__all__ = ['ExitCost', 'ExitTime', 'exit_costs', 'exit_times', 'stage_times']

_WEIGHTED_LAYERS = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear}


class ExitCost(NamedTuple):
    """Cost of inference up to exit k, for one image.

    Attributes:
        macs: Cumulative MACs of stages 0..k and heads 0..k.
        params: Number of parameters that these stages and heads read.
        stage_macs: MACs of stage k alone.
        head_macs: MACs of head k alone, which an exit that is off saves.
        depth: Number of weighted layers (convolutions and linear layers) on the longest path from the image to the
            logits of exit k.
    """

    macs: int
    params: int
    stage_macs: int
    head_macs: int
    depth: int


class ExitTime(NamedTuple):
    """Time of one stage and its head for a batch.

    Attributes:
        stage_ms: Time of the stage alone, in milliseconds.
        head_ms: Time of the head alone, in milliseconds, which an exit that is off saves.
    """

    stage_ms: float
    head_ms: float


class _DepthCounter(TorchDispatchMode):
    """Record the tensors that operations read, and the largest number of weighted layers before each result.

    Attributes:
        read: ``id`` of every tensor that an operation has read.
        depths: Number of weighted layers on the longest path to a tensor, by tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: Set[int] = set()
        self.depths = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_iter((args, kwargs or {})) if isinstance(t, torch.Tensor)]
        self.read.update(id(t) for t in inputs)
        depth = max((self.depths.get(t, 0) for t in inputs), default=0)
        for t in tree_iter(out):
            if isinstance(t, torch.Tensor):
                self.depths[t] = depth + (func.overloadpacket in _WEIGHTED_LAYERS)
        return out


def _check_resumable(model: MultiExitModel) -> None:
    if not model.resumable:
        raise ValueError(
            f'{type(model).__name__} runs as a whole (resumable=False): its exits have no cost of their own.'
        )


@torch.inference_mode(False)  # in inference mode composite operations reach the counters undecomposed
def exit_costs(model: MultiExitModel, input_size: Sequence[int]) -> List[ExitCost]:
    """Count the cost of each exit.

    Args:
        model: A resumable multi-exit network, on any device.
        input_size: (C, H, W) of one image.

    Returns:
        Cost per exit, K, first exit first.

    Raises:
        ValueError: The images are too small for the network, or it is not resumable.
    """
    _check_resumable(model)
    prepare: Any = getattr(model, 'prepare', None)
    if prepare is not None:
        prepare(input_size)
    on_meta = MetaRunner(model)
    params = {id(on_meta.tensors[name]): p.numel() for name, p in model.named_parameters()}
    path, counter = _DepthCounter(), FlopCounterMode(display=False)
    costs, total = [], 0
    state = torch.empty(1, *input_size, device='meta', dtype=next(model.parameters()).dtype)
    with counter, path:
        for k in range(model.num_exits):
            before = counter.get_total_flops() // 2
            state = on_meta('run_stage', k, state)
            between = counter.get_total_flops() // 2
            logits, _ = on_meta('run_head', k, state)
            stage_macs, head_macs = between - before, counter.get_total_flops() // 2 - between
            total += stage_macs + head_macs
            costs.append(
                ExitCost(
                    macs=total,
                    params=sum(n for i, n in params.items() if i in path.read),
                    stage_macs=stage_macs,
                    head_macs=head_macs,
                    depth=path.depths.get(logits, 0),
                )
            )
    return costs


@torch.inference_mode()
def exit_times(
    model: MultiExitModel,
    input_size: Sequence[int],
    batch_size: int = 1,
    repeats: int = 10,
    device: Optional[torch.device] = None,
) -> List[float]:
    """Measure the time from the start of a batch to the logits of each exit, with all earlier exits computed too.

    Args:
        model: A resumable multi-exit network; it is moved to `device` and put in evaluation mode.
        input_size: (C, H, W) of one image.
        batch_size: Number of images in the batch; default 1.
        repeats: Number of timed runs, after one warm-up run; default 10.
        device: Device of the measurement; default the device of the model.

    Returns:
        Median time per exit in milliseconds, [K], of the network's computation only.

    Raises:
        ValueError: The network is not resumable.
    """
    _check_resumable(model)
    device = torch.device(device or next(model.parameters()).device)
    model.to(device).eval()
    images = torch.randn(batch_size, *input_size, device=device)
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    runs = []
    for _ in range(repeats + 1):
        synchronize()
        start, times = time.perf_counter(), []
        for _ in model.iter_exits(images):
            synchronize()
            times.append(1000 * (time.perf_counter() - start))
        runs.append(times)
    return [statistics.median(times) for times in zip(*runs[1:])]


@torch.inference_mode()
def stage_times(
    model: MultiExitModel, images: torch.Tensor, repeats: int = 10, autocast: Optional[ContextManager[Any]] = None
) -> List[ExitTime]:
    """Measure the time of every stage and every head separately.

    Args:
        model: A resumable multi-exit network; it is timed in evaluation mode, then its mode is restored.
        images: Batch to time, [B, C, H, W], on the device and in the memory format of the model.
        repeats: Number of timed runs, after one warm-up run; default 10.
        autocast: Context of the forward passes; default none.

    Returns:
        Median times per exit, K.

    Raises:
        ValueError: The network is not resumable.
    """
    _check_resumable(model)
    synchronize = torch.cuda.synchronize if images.device.type == 'cuda' else lambda: None
    runs = []
    with eval_mode(model):
        for _ in range(repeats + 1):
            state: Any = images
            marks: List[float] = []
            for k in range(model.num_exits):
                steps: Tuple[Callable[[int, Any], Any], ...] = (model.run_stage, model.run_head)
                for run in steps:
                    synchronize()
                    start = time.perf_counter()
                    with autocast or contextlib.nullcontext():
                        result = run(k, state)
                    synchronize()
                    marks.append(1000 * (time.perf_counter() - start))
                    state = result if run == model.run_stage else state
            runs.append(marks)
    medians = [statistics.median(marks) for marks in zip(*runs[1:])]
    return [ExitTime(*pair) for pair in zip(medians[::2], medians[1::2])]
