"""The two ways to run a backbone in stages."""

import threading
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.models import checkpoint_seq

from ..errors import shortened
from .graph import CutError, CutGraph, copy_sharing_weights, export_whole
from .plan import Plan
from .probe import find_step
from .taps import Taps

if TYPE_CHECKING:
    from .backbone import MultiExitBackbone

__all__ = ['ChainProgram', 'GraphProgram']


class ChainProgram:
    """A chain of modules: stages are runs of modules, in training and in evaluation mode.

    The state is what the module before the cut returned; behind one that returns tokens (the map, the tokens).

    Args:
        backbone: A timm model.
        plan: How it is cut.
    """

    stages_train = True

    def __init__(self, backbone: nn.Module, plan: Plan):
        names = [place.name for place in plan.places]
        starts = [0] + [tap + 1 for tap in plan.taps[:-1]]
        self.stages = [names[i : tap + 1] for i, tap in zip(starts, plan.taps)]
        self.tail = names[plan.taps[-1] + 1 :]
        self.blocks = {place.name for place in plan.places if place.is_block}
        self.layouts = [place.layout for place in plan.tapped]
        self.grad_checkpointing = False

    def why_not(self, model: 'MultiExitBackbone') -> Optional[str]:
        return None

    def set_grad_checkpointing(self, model: 'MultiExitBackbone', enable: bool) -> None:
        self.grad_checkpointing = enable

    def forget(self) -> None:
        """Modules are looked up by name whenever they run: there is nothing to forget."""

    def run_stage(self, model: 'MultiExitBackbone', k: int, state: Any) -> Any:
        size = (self.read_tap(k - 1, state) if k else state).shape[-2:]
        state = self._output(state)
        for name in self.stages[k]:
            module = find_step(model.backbone, name)
            # blocks only, as timm does: a stem's in-place activations must not run twice on one input
            if self.grad_checkpointing and model.training and name in self.blocks:
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

    def run_end(self, model: 'MultiExitBackbone', state: Any) -> torch.Tensor:
        state = self._output(state)
        for name in self.tail:
            state = find_step(model.backbone, name)(state)
        return model.backbone.forward_head(state)


class GraphProgram:
    """Any other backbone: it trains as a whole, and its exported graph is cut for evaluation.

    Args:
        backbone: A timm model.
        plan: How it is cut.
    """

    stages_train = False

    def __init__(self, backbone: nn.Module, plan: Plan):
        self.taps = Taps(backbone, plan.tapped)
        self.forget()

    def forget(self) -> None:
        """Cut anew when next asked: the backbone's modules have changed."""
        self.exports: Dict[Tuple, Union[torch.export.ExportedProgram, CutError]] = {}
        self.cuts: Dict[Tuple, CutGraph] = {}
        self.sizes: Dict[Tuple, Sequence[int]] = {}
        self.lock = threading.RLock()

    def __getstate__(self) -> Dict[str, Any]:
        return {'taps': self.taps}  # a copy of the model cuts its own backbone

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def why_not(self, model: 'MultiExitBackbone') -> Optional[str]:
        try:
            self.cut(model, model.probe_size)
        except CutError as e:
            return str(e)
        return None

    def set_grad_checkpointing(self, model: 'MultiExitBackbone', enable: bool) -> None:
        model.backbone.set_grad_checkpointing(enable)

    def run_whole(self, model: 'MultiExitBackbone', images: torch.Tensor) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        return self.taps.run(model.backbone, images)

    def cut(self, model: 'MultiExitBackbone', input_size: Sequence[int]) -> CutGraph:
        """The pieces for images of `input_size` on the model's device; made once.

        Raises:
            CutError: The backbone cannot be cut.
        """
        weight = next(model.backbone.parameters())
        key = (*input_size, weight.dtype, weight.device)
        with self.lock:
            if key not in self.cuts:
                self.cuts[key] = self._make(model, key)
            return self.cuts[key]

    def _make(self, model: 'MultiExitBackbone', key: Tuple) -> CutGraph:
        *input_size, dtype, device = key
        exported = (*input_size, dtype)
        if exported not in self.exports:
            try:
                # a copy, because other threads may be running the live modules
                self.exports[exported] = export_whole(*copy_sharing_weights(model.backbone, self.taps), input_size)
            except CutError as e:
                self.exports[exported] = e
        if isinstance(self.exports[exported], CutError):
            raise self.exports[exported]
        cut = CutGraph(self.exports[exported], model.backbone, len(self.taps), device)
        if device.type != 'meta':
            try:
                # another copy: the first may have kept tensors of the trace
                cut.prove(copy_sharing_weights(model.backbone, self.taps)[0], input_size)
            except (RuntimeError, AssertionError) as e:
                raise CutError(f'it does not run on images of {"x".join(map(str, input_size))}: {shortened(e)}') from e
        return cut

    def run_stage(self, model: 'MultiExitBackbone', k: int, state: Any) -> Tuple[torch.Tensor, ...]:
        if model.training:
            raise RuntimeError(
                f'{type(model.backbone).__name__} is no chain of modules: in training mode it runs as a whole '
                f'(forward_exits), in stages only in evaluation mode; call model.eval().'
            )
        if k == 0:
            state, size = (state,), tuple(state.shape[1:])
            if not self.cut(model, size).is_current():
                self.forget()
        else:
            size = self._size_of(model, k - 1, state)
        state = self.cut(model, size).run(k, state)
        self.sizes[_signature(k, state)] = size
        return state

    def read_tap(self, k: int, state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        return state[0]

    def run_end(self, model: 'MultiExitBackbone', state: Tuple[torch.Tensor, ...]) -> torch.Tensor:
        size = self._size_of(model, model.num_exits - 1, state)
        return self.cut(model, size).run(-1, state)[0]

    def _size_of(self, model: 'MultiExitBackbone', k: int, state: Tuple[torch.Tensor, ...]) -> Sequence[int]:
        """(C, H, W) of the images behind a state; one of another process is taken to be of the usual size."""
        return self.sizes.get(_signature(k, state), model.probe_size)


def _signature(k: int, state: Tuple[torch.Tensor, ...]) -> Tuple:
    """What tells states of differently sized images apart."""
    return (k, *(tuple(t.shape[1:]) for t in state))
