"""What every exit costs: multiply-adds, parameters, depth and measured time, counted from the modules themselves.

``python -m timm_mlcsd.cost mlcsd_resnet50 --exits 4 --input-size 3 224 224`` compares all heads before anyone trains.

A multiply-add (MAC) is one multiplication with its addition in a convolution or matrix product; norms, activations
and pools are not counted, as is usual. Counting needs no weights: it runs on the meta device.
"""

import statistics
import time
from typing import List, NamedTuple, Optional, Sequence

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from .models import MultiExitModel, OnMeta

__all__ = ['ExitCost', 'exit_costs', 'exit_times']

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


def exit_costs(model: MultiExitModel, input_size: Sequence[int]) -> List[ExitCost]:
    """Count what each exit costs.

    Args:
        model: A resumable multi-exit network, on any device.
        input_size: (C, H, W) of one image.

    Returns:
        One `ExitCost` per exit, first exit first.

    Raises:
        ValueError: The images are too small for the network.
    """
    if hasattr(model, 'check_input_size'):
        model.check_input_size(*input_size[1:])
    on_meta = OnMeta(model)
    params = {id(on_meta.tensors[name]): p.numel() for name, p in model.named_parameters()}
    path, counter = _PathMode(), FlopCounterMode(display=False)
    costs, total = [], 0
    state = torch.empty(1, *input_size, device='meta')
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
        repeats: Timed runs, after two that don't count.
        device: Default: where the model is.

    Returns:
        Median milliseconds per exit, the network's computation alone in the clock.
    """
    device = device or next(model.parameters()).device
    model.to(device).eval()
    images = torch.randn(batch_size, *input_size, device=device)
    synchronize = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    runs = []
    for _ in range(repeats + 2):
        synchronize()
        start, times = time.perf_counter(), []
        for _ in model.iter_exits(images):
            synchronize()
            times.append(1000 * (time.perf_counter() - start))
        runs.append(times)
    return [statistics.median(times) for times in zip(*runs[2:])]


if __name__ == '__main__':
    from .engine.plan import main

    main()
