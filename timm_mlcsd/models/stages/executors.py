"""Run a backbone in stages: as a chain of modules, or as pieces of its exported graph."""

import logging
import threading
from functools import partial
from typing import Any, Dict, List, Optional, Protocol, Sequence, Tuple, Union

import torch
import torch.fx
import torch.nn as nn
from timm.models import checkpoint_seq

from ...errors import one_line
from ..module_types import TimmModel
from .graph import PartitionedGraph, copy_sharing_weights, export_backbone
from .hooks import ModuleState, find_call_override, find_training
from .plan import Plan
from .probe import TRACED_METHODS, find_step
from .taps import Taps, find_hooked
from .verify import PartitionError, verify

__all__ = ['ChainExecutor', 'GraphExecutor']

_logger = logging.getLogger(__name__)


class StagedModel(Protocol):
    """Attributes that an executor reads from the model that owns it.

    Attributes:
        backbone: A timm model.
        training: Whether the model is in training mode.
        num_exits: Number of exits K.
        probe_size: (C, H, W) of the probe images.
    """

    backbone: TimmModel
    training: bool
    num_exits: int
    probe_size: Tuple[int, ...]


class ChainExecutor:
    """Run a chain of modules in stages, in training and in evaluation mode; each stage is a section of the chain.

    The state is the output of the last module of the stage, or (map, tokens) if that module returns tokens. If the
    forward of the backbone does more than these modules and ``forward_head``, the stages in sequence do not equal the
    backbone. The backbone then runs in one forward pass, in which the exits read the outputs of the tapped modules.

    Args:
        backbone: A timm model.
        plan: Modules of the chain and taps of the exits.
    """

    def __init__(self, backbone: nn.Module, plan: Plan):
        names = [module.name for module in plan.modules]
        starts = [0] + [tap + 1 for tap in plan.taps[:-1]]
        self.stages = [names[i : tap + 1] for i, tap in zip(starts, plan.taps)]
        self.tail = names[plan.taps[-1] + 1 :]
        self.blocks = {module.name for module in plan.modules if module.is_block}
        self.tapped = plan.tapped
        self.layouts = [module.map_layout for module in plan.tapped]
        self.is_features_then_head = plan.is_features_then_head
        self.has_methods = any(name in TRACED_METHODS for name in names)
        self.taps: Optional[Taps] = None
        # modules that contain those of the chain and are never called, with the names of their children
        parts = [name.split('.')[:-1] for name in names]
        parents = {'.'.join(path[:i]) for path in parts for i in range(1, len(path) + 1)}
        self.parents = {name: list(backbone.get_submodule(name)._modules) for name in sorted(parents)}
        self.grad_checkpointing = False
        self.invalidate()

    def invalidate(self) -> None:
        """Forget the comparison with the backbone after a change of it; modules are looked up by name at each run."""
        self.difference: Dict[Tuple[Any, ...], Optional[str]] = {}
        self.states: List[ModuleState] = []

    def _compare_again_if_changed(self, model: StagedModel) -> None:
        """Forget the comparison if a module that the stages replace is no longer as it was; repeat one that failed."""
        if all(state.is_current() for state in self.states):
            return
        failed = [key[:3] for key, found in self.difference.items() if found]
        self.invalidate()
        for input_size in failed:
            self._difference(model, input_size)

    def release(self, backbone: nn.Module) -> None:
        """Remove the hooks of this executor from the backbone."""
        if self.taps is not None:
            self.taps.remove(backbone)

    def unsupported_reason(self, model: StagedModel) -> Optional[str]:
        """Explain why the stages cannot run one by one; None if they can."""
        self._compare_again_if_changed(model)
        found = self._obstacle(model.backbone) or self._difference(model, model.probe_size)
        return found or next(filter(None, self.difference.values()), None)

    def runs_in_stages(self, model: StagedModel, images: Optional[torch.Tensor] = None) -> bool:
        """Whether ``forward_exits(images)`` runs stage by stage."""
        # a tracer recognises timm's leaf functions only inside a call of the backbone
        if self.has_methods and isinstance(images, torch.fx.Proxy):
            return False
        is_traced = isinstance(images, torch.fx.Proxy) or torch.compiler.is_compiling()
        if not is_traced:
            self._compare_again_if_changed(model)
        if self._obstacle(model.backbone) is not None or any(self.difference.values()):
            return False
        # timm's backbones do the same at any size and in both modes, other code may not
        if self._is_timm(model.backbone):
            return True
        if model.training:
            return False
        if images is None or is_traced:
            return True
        return self._difference(model, images.shape[1:]) is None

    def _is_timm(self, backbone: TimmModel) -> bool:
        """Whether the code that the stages replace is that of timm and torch."""
        forwards = [type(backbone).forward_features, *(type(backbone.get_submodule(p)).forward for p in self.parents)]
        return all(f.__module__.partition('.')[0] in ('timm', 'timm_mlcsd', 'torch') for f in forwards)

    def prepare(self, model: StagedModel, input_size: Sequence[int]) -> None:
        """Do nothing: a chain needs no preparation for an input size."""

    def _obstacle(self, backbone: nn.Module) -> Optional[str]:
        """Describe what a call of the backbone runs beyond the modules of the chain; None for nothing."""
        if not self.is_features_then_head:
            return "the backbone's forward does more than its forward_features and then its forward_head"
        override = find_call_override(backbone)
        if override:
            return f'the backbone has {override}, which its stages would skip'
        for name, children in self.parents.items():
            module = backbone.get_submodule(name)
            override = find_call_override(module)
            if override:
                return f'{name!r} has {override}, which the stages would skip'
            if list(module._modules) != children:
                return f'{name!r} has other modules than when the exits were placed; wrap a new backbone'
        return None

    def _difference(self, model: StagedModel, input_size: Sequence[int]) -> Optional[str]:
        """Describe how the stages in sequence differ from the backbone, computed once per size, dtype and device."""
        weight = next(model.backbone.parameters())
        key = (*input_size, weight.dtype, weight.device)
        if weight.device.type == 'meta':
            return None
        if key not in self.difference:
            self.states = [ModuleState(model.backbone.get_submodule(name)) for name in ('', *self.parents)]
            backbone = copy_sharing_weights(model.backbone, None)[0]
            steps = [partial(self._run_stage, backbone, k) for k in range(len(self.stages))]
            try:
                verify([*steps, partial(self._run_end, backbone)], backbone, input_size)
                self.difference[key] = None
            except PartitionError as e:
                self.difference[key] = str(e)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.difference[key] = f'its stages do not run in sequence: {one_line(e)}'
        return self.difference[key]

    def set_grad_checkpointing(self, model: StagedModel, enable: bool) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable
        in_stages = self._is_timm(model.backbone) and self.runs_in_stages(model)
        if not in_stages and (enable or hasattr(model.backbone, 'set_grad_checkpointing')):
            model.backbone.set_grad_checkpointing(enable)

    def run_whole(self, model: StagedModel, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the backbone in one forward pass; returns its output and the K maps at the taps."""
        if self.taps is None:
            self.taps = Taps(model.backbone, self.tapped)
        return self.taps.run(model.backbone, images)

    def run_stage(self, model: StagedModel, k: int, state: Any) -> Any:
        """Run stage k on the state of stage k-1, or on images [B, C, H, W] for stage 0.

        Raises:
            RuntimeError: The model is in training mode, in which code that is not timm's runs as a whole.
            PartitionError: The stages cannot run one by one.
        """
        if k == 0 and not self.runs_in_stages(model, state):
            if model.training and not self._is_timm(model.backbone):
                raise _needs_evaluation(model, 'may do something else in training mode')
            raise PartitionError(f'stages cannot run one by one: {self.unsupported_reason(model)}; use forward_exits.')
        return self._run_stage(model.backbone, k, state, self.grad_checkpointing and model.training)

    def _run_stage(self, backbone: nn.Module, k: int, state: Any, checkpointing: bool = False) -> Any:
        size = (self.read_tap(k - 1, state) if k else state).shape[-2:]
        state = self._output(state)
        for name in self.stages[k]:
            module = find_step(backbone, name)
            # blocks only, as in timm: in-place activations of a stem must not run twice on one input
            if checkpointing and name in self.blocks:
                state = checkpoint_seq([module], state)
            else:
                state = module(state)
        # height and width of the map cannot be recovered from tokens alone
        return (self.layouts[k].read(state, size), state) if self.layouts[k].kind == 'NLC' else state

    def read_tap(self, k: int, state: Any) -> torch.Tensor:
        """Read the map [B, C, H, W] of exit k from the state of stage k."""
        feature_map: torch.Tensor = state[0] if isinstance(state, tuple) else self.layouts[k].read(state)
        return feature_map

    def _output(self, state: Any) -> torch.Tensor:
        """Read the output of the last module of the stage from its state."""
        output: torch.Tensor = state[1] if isinstance(state, tuple) else state
        return output

    def run_end(self, model: StagedModel, state: Any) -> torch.Tensor:
        """Compute the logits [B, C] of the backbone from the state of the last stage."""
        return self._run_end(model.backbone, state)

    def _run_end(self, backbone: TimmModel, state: Any) -> torch.Tensor:
        state = self._output(state)
        for name in self.tail:
            state = find_step(backbone, name)(state)
        return backbone.forward_head(state)


class GraphExecutor:
    """Run any other backbone: in one forward pass in training, as pieces of its exported graph in evaluation.

    Args:
        backbone: A timm model.
        plan: Taps of the exits.
    """

    def __init__(self, backbone: nn.Module, plan: Plan):
        self.__setstate__({'taps': Taps(backbone, plan.tapped)})

    def invalidate(self) -> None:
        """Forget the exported graphs and their pieces after a change of the backbone."""
        self.exports: Dict[Tuple[Any, ...], Union[torch.export.ExportedProgram, PartitionError]] = {}
        self.states: List[ModuleState] = []
        self.cuts: Dict[Tuple[Any, ...], PartitionedGraph] = {}
        self.sizes: Dict[Tuple[Any, ...], Sequence[int]] = {}

    def release(self, backbone: nn.Module) -> None:
        """Remove the hooks of this executor from the backbone."""
        self.taps.remove(backbone)

    def runs_in_stages(self, model: StagedModel, images: Optional[torch.Tensor] = None) -> bool:
        """Return False: ``forward_exits`` runs the backbone in one forward pass, in either mode."""
        return False

    def prepare(self, model: StagedModel, input_size: Sequence[int]) -> None:
        """Export and cut the graph for images of (C, H, W) now instead of at the first use."""
        self.cut(model, input_size)

    def __getstate__(self) -> Dict[str, Any]:
        return {'taps': self.taps}  # a copy of the model exports and cuts its own backbone

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.taps: Taps = state['taps']
        self.lock = threading.RLock()
        self.invalidate()

    def unsupported_reason(self, model: StagedModel) -> Optional[str]:
        """Explain why the stages cannot run one by one; None if they can."""
        try:
            self.cut(model, model.probe_size)
        except PartitionError as e:
            return str(e)
        return None

    def set_grad_checkpointing(self, model: StagedModel, enable: bool) -> None:
        """Recompute the blocks in the backward pass instead of storing their activations."""
        model.backbone.set_grad_checkpointing(enable)

    def run_whole(self, model: StagedModel, images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run the backbone in one forward pass; returns its output and the K maps at the taps."""
        return self.taps.run(model.backbone, images)

    def cut(self, model: StagedModel, input_size: Sequence[int]) -> PartitionedGraph:
        """Return the partitioned graph for one input size, made at the first use and after a change of a module.

        Args:
            model: Model that owns this executor.
            input_size: (C, H, W) of the images.

        Returns:
            Graph of the backbone in pieces, for the dtype and device of the model.

        Raises:
            PartitionError: The backbone cannot be cut.
        """
        with self.lock:
            if not all(state.is_current() for state in self.states):
                self.invalidate()
            return self._cut(model, input_size)

    def _cut(self, model: StagedModel, input_size: Sequence[int]) -> PartitionedGraph:
        weight = next(model.backbone.parameters())
        key = (*input_size, weight.dtype, weight.device)
        with self.lock:
            if key not in self.cuts:
                self.cuts[key] = self._make(model, key)
            return self.cuts[key]

    def _make(self, model: StagedModel, key: Tuple[Any, ...]) -> PartitionedGraph:
        *input_size, dtype, device = key
        exported = (*input_size, dtype)
        if exported not in self.exports:
            hooked = find_hooked(model.backbone)
            if hooked is not None:
                _logger.warning(
                    f'{hooked!r} of the backbone has forward hooks: what they change is part of its exported graph, '
                    f'but the stages of the graph do not call them; forward_exits does.'
                )
            self.states = self.states or [ModuleState(module) for module in model.backbone.modules()]
            try:
                # export a copy, because other threads may be running the backbone itself
                self.exports[exported] = export_backbone(*copy_sharing_weights(model.backbone, self.taps), input_size)
            except PartitionError as e:
                self.exports[exported] = e
        program = self.exports[exported]
        if isinstance(program, PartitionError):
            raise program
        try:
            cut = PartitionedGraph(program, model.backbone, len(self.taps), device)
        except (KeyError, AttributeError) as e:  # such as weights read by a function set on the instance
            raise PartitionError(f'its graph reads weights that no module of the backbone owns: {one_line(e)}') from e
        if device.type != 'meta':
            try:
                # a second copy, because the first may hold tensors of the trace
                cut.verify(copy_sharing_weights(model.backbone, self.taps)[0], input_size)
            except (RuntimeError, AssertionError) as e:
                raise PartitionError(
                    f'it does not run on images of {"x".join(map(str, input_size))}: {one_line(e)}'
                ) from e
        return cut

    def run_stage(self, model: StagedModel, k: int, state: Any) -> Tuple[torch.Tensor, ...]:
        """Run stage k on the state of stage k-1, or on images [B, C, H, W] for stage 0.

        Raises:
            RuntimeError: The model is in training mode, or dropout or a BatchNorm of its backbone is.
            PartitionError: The backbone cannot be cut.
        """
        if model.training:
            raise _needs_evaluation(model, 'is not a chain of modules')
        size: Sequence[int]
        if k == 0:
            trains = find_training(model.backbone)
            if trains is not None:
                raise RuntimeError(
                    f'{trains!r} is in training mode, which the exported graph leaves out; call '
                    f'model.eval(), or use forward_exits.'
                )
            state, size = (state,), tuple(state.shape[1:])
            graph = self.cut(model, size)
        else:
            size = self._size_of(model, k - 1, state)
            graph = self._cut(model, size)
        after = graph.run(k, state)
        self.sizes[_signature(k, after)] = size
        return after

    def read_tap(self, k: int, state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Read the map [B, C, H, W] of exit k from the state of stage k."""
        return state[0]

    def run_end(self, model: StagedModel, state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the logits [B, C] of the backbone from the state of the last stage."""
        size = self._size_of(model, model.num_exits - 1, state)
        return self._cut(model, size).run(-1, state)[0]

    def _size_of(self, model: StagedModel, k: int, state: Tuple[torch.Tensor, ...]) -> Sequence[int]:
        """Look up the (C, H, W) of the images that led to a state; the probe size for a state of another process."""
        return self.sizes.get(_signature(k, state), model.probe_size)


def _needs_evaluation(model: StagedModel, reason: str) -> RuntimeError:
    return RuntimeError(
        f'{type(model.backbone).__name__} {reason}, so its stages run one by one only in evaluation mode; call '
        f'model.eval(), or forward_exits in training mode.'
    )


def _signature(k: int, state: Tuple[torch.Tensor, ...]) -> Tuple[Any, ...]:
    """Return a key that differs between states of differently sized images."""
    return (k, *(tuple(t.shape[1:]) for t in state))
