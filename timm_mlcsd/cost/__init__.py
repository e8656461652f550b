"""What every exit costs: multiply-adds, parameters, depth and measured time, counted from the modules themselves.

A multiply-add (MAC) is one multiplication with its addition in a convolution or matrix product; norms, activations
and pools are not counted, as is usual. Counting needs no weights: it runs on the meta device.
"""

import contextlib
import statistics
import time
from typing import ContextManager, List, NamedTuple, Optional, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from ..models import MetaRunner, MultiExitModel

__all__ = ['ExitCost', 'ExitTime', 'exit_costs', 'exit_times', 'stage_times']

_WEIGHTED_LAYERS = {torch.ops.aten.convolution, torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear}


class ExitCost(NamedTuple):
    """What it costs to answer at one exit, for a batch of one.

    Attributes:
        macs: Multiply-adds of all that has run: stages 0..k and the heads evaluated on the way.
        params: Parameters of the same.
        stage_macs: Multiply-adds of this stage alone.
        head_macs: Multiply-adds of this head alone; an exit that is off saves them.
        depth: Weighted layers (convolutions and linear layers) on the longest path from the image to these logits.
    """

    macs: int
    params: int
    stage_macs: int
    head_macs: int
    depth: int


class ExitTime(NamedTuple):
    """What one exit adds to the time of a batch, in milliseconds.

    Attributes:
        stage_ms: Its stage alone.
        head_ms: Its head alone; an exit that is off saves it.
    """

    stage_ms: float
    head_ms: float


class _PathMode(TorchDispatchMode):
    """Notes which tensors the operations read, and how many weighted layers each result has behind it."""

    def __init__(self):
        super().__init__()
        self.read = set()
        self.depths = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


@torch.inference_mode(False)  # in inference mode operations reach the counters undivided
def exit_costs(model: MultiExitModel, input_size: Sequence[int]) -> List[ExitCost]:
    """Count what each exit costs.

    Args:
        model: A resumable multi-exit network, on any device.
        input_size: (C, H, W) of one image.

    Returns:
        One `ExitCost` per exit, first exit first.

    Raises:
        ValueError: The images are too small for the network, or it is not resumable.
    """
    _check_resumable(model)
    if hasattr(model, 'prepare'):
        model.prepare(input_size)
    on_meta = MetaRunner(model)
    params = {id(on_meta.tensors[name]): p.numel() for name, p in model.named_parameters()}
    path, counter = _PathMode(), FlopCounterMode(display=False)
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
    """Measure how long a batch takes until each exit has answered, all exits before it evaluated too.

    Args:
        model: A resumable multi-exit network; it is moved to `device` and put in evaluation mode.
        input_size: (C, H, W) of one image.
        batch_size: Images in the batch.
        repeats: Timed runs, after one that doesn't count.
        device: Default: where the model is.

    Returns:
        Median milliseconds per exit, the network's computation alone in the clock.
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
    model: MultiExitModel, images: torch.Tensor, repeats: int = 10, autocast: Optional[ContextManager] = None
) -> List[ExitTime]:
    """Measure every stage and every head on its own.

    Args:
        model: A resumable multi-exit network; timed in evaluation mode, its own mode is restored.
        images: The batch to time, [B, C, H, W], on the model's device and in its memory layout.
        repeats: Timed runs, after one that doesn't count.
        autocast: Context of the forward passes.

    Returns:
        Medians, per exit.
    """
    _check_resumable(model)
    was_training = model.training
    model.eval()
    synchronize = torch.cuda.synchronize if images.device.type == 'cuda' else lambda: None
    runs = []
    for _ in range(repeats + 1):
        state, marks = images, []
        for k in range(model.num_exits):
            for run in (model.run_stage, model.run_head):
                synchronize()
                start = time.perf_counter()
                with autocast or contextlib.nullcontext():
                    result = run(k, state)
                synchronize()
                marks.append(1000 * (time.perf_counter() - start))
                state = result if run == model.run_stage else state
        runs.append(marks)
    model.train(was_training)
    medians = [statistics.median(marks) for marks in zip(*runs[1:])]
    return [ExitTime(*pair) for pair in zip(medians[::2], medians[1::2])]
