"""Stages of early-exit inference as CUDA graphs, for a few numbers of images each."""

import threading
from functools import partial
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch

from .trees import map_tensors, tensors_of

__all__ = ['GraphedStage']

# runs before a capture: libraries choose their kernels in them
WARMUP = 3


class _Recorded(NamedTuple):
    """A graph with the memory that it reads and writes."""

    replay: Callable[[], None]
    inputs: Any
    outputs: Any


class GraphedStage:
    """A stage with its exit that runs as CUDA graphs, which start all kernels at once.

    There is one graph per power of two; fewer images are filled up with what the rows held before, whose results are
    not used. Every result is copied out, so that threads may share the stage and later calls change no result.

    Args:
        run: Function from the state before the stage to the state after it, and logits or None; rows are independent.
    """

    def __init__(self, run: Callable[[Any], Tuple[Any, Optional[torch.Tensor]]]):
        self.run = run
        self.graphs: Dict[Tuple[Any, ...], _Recorded] = {}
        self._lock = threading.Lock()

    def __call__(self, state: Any) -> Tuple[Any, Optional[torch.Tensor]]:
        """Run the stage on a state with N rows."""
        tensors = tensors_of(state)
        count = len(tensors[0])
        size = 1 << (count - 1).bit_length()
        device = tensors[0].device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        key = (size, *((t.shape[1:], t.dtype, t.device, _is_channels_last(t)) for t in tensors), *autocast)
        with self._lock:
            graph = self.graphs.get(key)
            if graph is None:
                graph = self.graphs[key] = _record(self.run, map_tensors(state, partial(_resized, size=size)))
            for place, t in zip(tensors_of(graph.inputs), tensors):
                place[:count].copy_(t)
            graph.replay()
            result: Tuple[Any, Optional[torch.Tensor]] = map_tensors(graph.outputs, lambda t: t[:count].clone())
            return result


def _is_channels_last(t: torch.Tensor) -> bool:
    return t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _resized(t: torch.Tensor, size: int) -> torch.Tensor:
    """Memory for `size` rows like those of a tensor, [N, ...], in its memory format; filled with its first row."""
    return (
        t[:1]
        .expand(size, *t.shape[1:])
        .clone(memory_format=torch.channels_last if _is_channels_last(t) else torch.contiguous_format)
    )


def _record(run: Callable[[Any], Any], inputs: Any) -> _Recorded:
    """Capture a run on the inputs' device; autocast must not keep weights that it has cast, which graphs overwrite."""
    graph = torch.cuda.CUDAGraph()
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                run(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            outputs = run(inputs)
    finally:
        torch.set_autocast_cache_enabled(cached)
    return _Recorded(graph.replay, inputs, outputs)
