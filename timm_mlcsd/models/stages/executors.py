"""The two ways to run a backbone in stages."""

import threading
from functools import partial
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.models import checkpoint_seq

from ...errors import one_line
from .graph import PartitionedGraph, copy_sharing_weights, export_whole
from .hooks import what_hangs_on
from .plan import Plan
from .probe import TRACED_METHODS, find_step
from .taps import Taps
from .verify import PartitionError, verify

__all__ = ['ChainExecutor', 'GraphExecutor']


class StagedModel(Protocol):
    """What an executor reads from the model that owns it.

    Attributes:
        backbone: The timm model.
        training: Whether the model is in training mode.
        num_exits: K.
        probe_size: (C, H, W) of the probe images.
    """

    backbone: nn.Module
    training: bool
    num_exits: int
    probe_size: Sequence[int]


class ChainExecutor:
    """A chain of modules: stages are runs of modules, in training and in evaluation mode.

    The state is what the module before the cut returned; behind one that returns tokens (the map, the tokens). Where
    the backbone's own call does more than these modules and ``forward_head``, the stages in a row are not the whole:
    the network runs as a whole then, the exits reading the tapped modules' outputs.

    Args:
        backbone: A timm model.
        plan: How it is cut.
    """

    def __init__(self, backbone: nn.Module, plan: Plan):
        names = [place.name for place in plan.places]
        starts = [0] + [tap + 1 for tap in plan.taps[:-1]]
        self.stages = [names[i : tap + 1] for i, tap in zip(starts, plan.taps)]
        self.tail = names[plan.taps[-1] + 1 :]
        self.blocks = {place.name for place in plan.places if place.is_block}
        self.tapped = plan.tapped
        self.layouts = [place.layout for place in plan.tapped]
        self.is_whole = plan.is_whole
        self.has_methods = any(name in TRACED_METHODS for name in names)
        self.taps: Optional[Taps] = None
        # the modules that hold those of the chain and are not called themselves, with what they held
        parts = [name.split('.')[:-1] for name in names]
        opened = {'.'.join(path[:i]) for path in parts for i in range(1, len(path) + 1)}
        self.opened = {name: list(backbone.get_submodule(name)._modules) for name in sorted(opened)}
        self.grad_checkpointing = False
        self.invalidate()

    def invalidate(self) -> None:
        """Compare anew when next asked: the backbone has changed. Modules are looked up by name whenever they run."""
        self.difference: Dict[Tuple, Optional[str]] = {}

    def release(self, backbone: nn.Module) -> None:
        """Leave nothing of this on the backbone."""
        if self.taps is not None:
            self.taps.remove(backbone)

    def unsupported_reason(self, model: StagedModel) -> Optional[str]:
        return self._obstacle(model.backbone) or self._difference(model)

    def runs_in_stages(self, model: StagedModel, images: Optional[torch.Tensor] = None) -> bool:
        """Whether all exits' answers to `images` are computed stage by stage."""
        # a tracer knows timm's leaf functions inside a call of the backbone only
        if self.has_methods and isinstance(images, torch.fx.Proxy):
            return False
        return self._obstacle(model.backbone) is None and not any(self.difference.values())

    def prepare(self, model: StagedModel, input_size: Sequence[int]) -> None:
        """There is nothing to prepare."""

    def _obstacle(self, backbone: nn.Module) -> Optional[str]:
        """What the backbone's own call does beside the modules of the chain."""
        if not self.is_whole:
            return "the backbone's forward does more than its forward_features and then its forward_head"
        hanging = what_hangs_on(backbone)
        if hanging:
            return f'the backbone has {hanging}, which its stages would leave out'
        for name, held in self.opened.items():
            module = backbone.get_submodule(name)
            hanging = what_hangs_on(module)
            if hanging:
                return f'{name!r} has {hanging}, which the stages would leave out'
            if list(module._modules) != held:
                return f'{name!r} has other modules than when its exits were placed; wrap a new backbone'
        return None

    def _difference(self, model: StagedModel) -> Optional[str]:
        """How the stages in a row differ from the whole, found out once."""
        weight = next(model.backbone.parameters())
        key = (weight.dtype, weight.device)
        if weight.device.type == 'meta':
            return None
        if key not in self.difference:
            backbone = copy_sharing_weights(model.backbone, None)[0]
            steps = [partial(self._run_stage, backbone, k) for k in range(len(self.stages))]
            try:
                verify([*steps, partial(self._run_end, backbone)], backbone, model.probe_size)
                self.difference[key] = None
            except PartitionError as e:
                self.difference[key] = str(e)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.difference[key] = f'its stages do not run in a row: {one_line(e)}'
        return self.difference[key]

    def set_grad_checkpointing(self, model: StagedModel, enable: bool) -> None:
        self.grad_checkpointing = enable
        if not self.runs_in_stages(model):
            model.backbone.set_grad_checkpointing(enable)

    def run_whole(self, model: StagedModel, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        if self.taps is None:
            self.taps = Taps(model.backbone, self.tapped)
        return self.taps.run(model.backbone, images)

    def run_stage(self, model: StagedModel, k: int, state: Any) -> Any:
        if k == 0 and not self.runs_in_stages(model):
            raise PartitionError(f'stages cannot run one by one: {self.unsupported_reason(model)}; use forward_exits.')
        return self._run_stage(model.backbone, k, state, self.grad_checkpointing and model.training)

    def _run_stage(self, backbone: nn.Module, k: int, state: Any, checkpointing: bool = False) -> Any:
        size = (self.read_tap(k - 1, state) if k else state).shape[-2:]
        state = self._output(state)
        for name in self.stages[k]:
            module = find_step(backbone, name)
            # blocks only, as timm does: a stem's in-place activations must not run twice on one input
            if checkpointing and name in self.blocks:
                state = checkpoint_seq([module], state)
            else:
                state = module(state)
        # tokens alone don't tell the height from the width
        return (self.layouts[k].read(state, size), state) if self.layouts[k].kind == 'NLC' else state

    def read_tap(self, k: int, state: Any) -> torch.Tensor:
        return state[0] if isinstance(state, tuple) else self.layouts[k].read(state)

    def _output(self, state: Any) -> torch.Tensor:
        """What the module before the cut returned."""
        return state[1] if isinstance(state, tuple) else state

    def run_end(self, model: StagedModel, state: Any) -> torch.Tensor:
        return self._run_end(model.backbone, state)

    def _run_end(self, backbone: nn.Module, state: Any) -> torch.Tensor:
        state = self._output(state)
        for name in self.tail:
            state = find_step(backbone, name)(state)
        return backbone.forward_head(state)


class GraphExecutor:
    """Any other backbone: it trains as a whole, and its exported graph is cut for evaluation.

    Args:
        backbone: A timm model.
        plan: How it is cut.
    """

    def __init__(self, backbone: nn.Module, plan: Plan):
        self.taps = Taps(backbone, plan.tapped)
        self.invalidate()

    def invalidate(self) -> None:
        """Cut anew when next asked: the backbone's modules have changed."""
        self.exports: Dict[Tuple, Union[torch.export.ExportedProgram, PartitionError]] = {}
        self.cuts: Dict[Tuple, PartitionedGraph] = {}
        self.sizes: Dict[Tuple, Sequence[int]] = {}
        self.lock = threading.RLock()

    def release(self, backbone: nn.Module) -> None:
        """Leave nothing of this on the backbone."""
        self.taps.remove(backbone)

    def runs_in_stages(self, model: StagedModel, images: Optional[torch.Tensor] = None) -> bool:
        """Never in training; in evaluation mode ``forward_exits`` runs the whole too."""
        return False

    def prepare(self, model: StagedModel, input_size: Sequence[int]) -> None:
        """Cut for images of this (C, H, W) now."""
        self.cut(model, input_size)

    def __getstate__(self) -> Dict[str, Any]:
        return {'taps': self.taps}  # a copy of the model cuts its own backbone

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.invalidate()

    def unsupported_reason(self, model: StagedModel) -> Optional[str]:
        try:
            self.cut(model, model.probe_size)
        except PartitionError as e:
            return str(e)
        return None

    def set_grad_checkpointing(self, model: StagedModel, enable: bool) -> None:
        model.backbone.set_grad_checkpointing(enable)

    def run_whole(self, model: StagedModel, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        return self.taps.run(model.backbone, images)

    def cut(self, model: StagedModel, input_size: Sequence[int]) -> PartitionedGraph:
        """The pieces for images of `input_size` on the model's device; made once.

        Raises:
            PartitionError: The backbone cannot be cut.
        """
        weight = next(model.backbone.parameters())
        key = (*input_size, weight.dtype, weight.device)
        with self.lock:
            if key not in self.cuts:
                self.cuts[key] = self._make(model, key)
            return self.cuts[key]

    def _make(self, model: StagedModel, key: Tuple) -> PartitionedGraph:
        *input_size, dtype, device = key
        exported = (*input_size, dtype)
        if exported not in self.exports:
            try:
                # a copy, because other threads may be running the live modules
                self.exports[exported] = export_whole(*copy_sharing_weights(model.backbone, self.taps), input_size)
            except PartitionError as e:
                self.exports[exported] = e
        if isinstance(self.exports[exported], PartitionError):
            raise self.exports[exported]
        try:
            cut = PartitionedGraph(self.exports[exported], model.backbone, len(self.taps), device)
        except (KeyError, AttributeError) as e:  # weights that belong to no module, of a function on the instance
            raise PartitionError(f'its graph reads what no module of the backbone owns: {one_line(e)}') from e
        if device.type != 'meta':
            try:
                # another copy: the first may have kept tensors of the trace
                cut.verify(copy_sharing_weights(model.backbone, self.taps)[0], input_size)
            except (RuntimeError, AssertionError) as e:
                raise PartitionError(
                    f'it does not run on images of {"x".join(map(str, input_size))}: {one_line(e)}'
                ) from e
        return cut

    def run_stage(self, model: StagedModel, k: int, state: Any) -> Tuple[torch.Tensor, ...]:
        if model.training:
            raise RuntimeError(
                f'{type(model.backbone).__name__} is no chain of modules: in training mode it runs as a whole '
                f'(forward_exits), in stages only in evaluation mode; call model.eval().'
            )
        if k == 0:
            state, size = (state,), tuple(state.shape[1:])
            if not self.cut(model, size).is_current():
                self.invalidate()
        else:
            size = self._size_of(model, k - 1, state)
        state = self.cut(model, size).run(k, state)
        self.sizes[_signature(k, state)] = size
        return state

    def read_tap(self, k: int, state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        return state[0]

    def run_end(self, model: StagedModel, state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        size = self._size_of(model, model.num_exits - 1, state)
        return self.cut(model, size).run(-1, state)[0]

    def _size_of(self, model: StagedModel, k: int, state: Tuple[torch.Tensor, ...]) -> Sequence[int]:
        """(C, H, W) of the images behind a state; one of another process is taken to be of the usual size."""
        return self.sizes.get(_signature(k, state), model.probe_size)


def _signature(k: int, state: Tuple[torch.Tensor, ...]) -> Tuple:
    """What tells states of differently sized images apart."""
    return (k, *(tuple(t.shape[1:]) for t in state))
