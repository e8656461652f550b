"""Partition a backbone that is not a chain of modules by cutting its exported graph at the exits.

``torch.export`` records the forward of evaluation mode as one graph of tensor operations. Stage k consists of the
operations that exit k needs and no earlier exit does. The values that later stages need form the state. The pieces
read the parameters of the original modules, so they use the current weights after further training.
"""

import copy
import operator
import warnings
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, TypeVar

import torch
import torch.fx as fx
import torch.nn as nn

from ...errors import one_line
from .taps import Taps
from .verify import PartitionError, default_mode, verify

__all__ = ['PartitionedGraph', 'copy_sharing_weights', 'export_backbone']

ModuleT = TypeVar('ModuleT', bound=nn.Module)
TapsT = TypeVar('TapsT', Taps, None)


class _Piece(NamedTuple):
    """One executable piece of the graph, with the weights that it reads from the original modules.

    Attributes:
        module: Function of weights, constants and incoming state.
        weights: Weights read at every run, as (owner, attribute).
        constants: Constant tensors of the graph.
    """

    module: fx.GraphModule
    weights: List[Tuple[nn.Module, str]]
    constants: List[torch.Tensor]


class _TappedBackbone(nn.Module):
    """Module to export: maps images [B, C, H, W] to the maps at the taps, followed by the logits."""

    def __init__(self, backbone: nn.Module, taps: Taps):
        super().__init__()
        self.backbone = backbone
        self.taps = taps

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Map images [B, C, H, W] to the maps and the logits."""
        logits, maps = self.taps.run(self.backbone, images)
        return (*maps, logits)


def copy_sharing_weights(backbone: ModuleT, taps: TapsT) -> Tuple[ModuleT, TapsT]:
    """Copy a backbone and its taps for tracing, in evaluation mode, without copying parameters and buffers."""
    # pruning and weight normalisation keep what they compute from the parameters as an attribute
    attributes: List[Any] = [value for module in backbone.modules() for value in vars(module).values()]
    computed: List[torch.Tensor] = [value for value in attributes if isinstance(value, torch.Tensor)]
    tensors = (*backbone.parameters(), *backbone.buffers(), *computed)
    backbone, taps = copy.deepcopy((backbone, taps), {id(t): t for t in tensors})
    # training mode clears values that a backbone caches for evaluation (attention biases of LeViT)
    return backbone.train().eval(), taps


def export_backbone(backbone: nn.Module, taps: Taps, input_size: Sequence[int]) -> torch.export.ExportedProgram:
    """Export the forward of a backbone with the maps at its taps, for any batch size.

    Args:
        backbone: A timm model in evaluation mode that no other thread uses during the export.
        taps: Taps of the backbone.
        input_size: (C, H, W) of the images.

    Returns:
        Program that maps images [B, C, H, W] to K maps and the logits.

    Raises:
        PartitionError: The backbone cannot be exported.
    """
    weight = next(backbone.parameters())
    images = torch.zeros(2, *input_size, device=weight.device, dtype=weight.dtype)
    batch = torch.export.Dim('batch', min=1, max=2**20)
    try:
        with default_mode(weight.device), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.export.export(
                _TappedBackbone(backbone, taps), (images,), dynamic_shapes=({0: batch},), strict=False
            )
            # functional form, without in-place operations
            functional: torch.export.ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as e:  # an operation may raise any type of error during export
        raise PartitionError(f'torch.export cannot export its forward: {type(e).__name__}: {one_line(e)}') from e


class PartitionedGraph:
    """Exported graph of a backbone, cut into one piece per stage and one for the end.

    The state of stage k is a tuple of tensors, batch first: the map [B, C, H, W] at the tap, then the values that
    later stages need.

    Args:
        program: Exported program, from `export_backbone`.
        backbone: Original backbone, whose weights the pieces read.
        num_taps: Number of taps K.
        device: Device on which the pieces run.

    Raises:
        PartitionError: A value that later stages need has no batch dimension.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        backbone: nn.Module,
        num_taps: int,
        device: torch.device,
    ):
        self.pieces = _Partitioner(program, backbone, num_taps, device).pieces()

    def run(self, index: int, state: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
        """Run one piece.

        Args:
            index: Stage, from 0; -1 for the end of the backbone.
            state: State of the previous stage; for stage 0 a tuple of the images [B, C, H, W].

        Returns:
            State of the stage; for the end a tuple of the logits [B, C].
        """
        piece = self.pieces[index]
        weights = (getattr(owner, name) for owner, name in piece.weights)
        result: Tuple[torch.Tensor, ...] = piece.module(*weights, *piece.constants, *state)
        return result

    def verify(self, backbone: nn.Module, input_size: Sequence[int]) -> None:
        """Verify that the pieces in sequence compute the same as the backbone.

        Args:
            backbone: Backbone, or a copy of it, in evaluation mode.
            input_size: (C, H, W) of the images.

        Raises:
            PartitionError: The pieces compute something else than the backbone.
        """
        last = len(self.pieces) - 1
        steps = [partial(self.run, index) for index in range(last)]
        verify([lambda x: steps[0]((x,)), *steps[1:], lambda state: self.run(last, state)[0]], backbone, input_size)


class _Partitioner:
    """Assign the nodes of an exported graph to pieces.

    Args:
        program: Exported program, from `export_backbone`.
        backbone: Original backbone, whose weights the pieces read.
        num_taps: Number of taps K.
        device: Device on which the pieces run.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        backbone: nn.Module,
        num_taps: int,
        device: torch.device,
    ):
        self.backbone = backbone
        self.device = device
        self.graph_module = program.graph_module
        self.nodes = list(program.graph.nodes)
        signature = program.graph_signature
        self.weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = {
            name: program.constants[target].to(device)
            for name, target in signature.inputs_to_lifted_tensor_constants.items()
        }
        image_names = set(signature.user_inputs)
        self.image = next(n for n in self.nodes if n.op == 'placeholder' and n.name in image_names)
        outputs = next(n for n in self.nodes if n.op == 'output').args[0]
        # updated buffers come before the outputs of the forward
        outputs = [o for o, spec in zip(outputs, signature.output_specs) if spec.kind.name == 'USER_OUTPUT']
        self.taps, self.logits = outputs[:num_taps], outputs[num_taps]
        self.batch = self.image.meta['val'].shape[0]
        self._find_image_dependent_nodes()

    def _find_image_dependent_nodes(self) -> None:
        """Collect the nodes that depend on the images; all others are recomputed in every piece that needs them."""
        self.dependent: Set[fx.Node] = {self.image}
        for node in self.nodes:
            is_tensor = not isinstance(node.meta.get('val'), (torch.SymInt, int, float, bool))
            if is_tensor and node.op != 'output' and any(n in self.dependent for n in node.all_input_nodes):
                self.dependent.add(node)

    def _needed(self, targets: Sequence[fx.Node], known: Set[fx.Node]) -> Set[fx.Node]:
        """Collect the image-dependent nodes that `targets` are computed from and that are not in `known`."""
        found, queue = set(), list(targets)
        while queue:
            node = queue.pop()
            if node in found or node in known or node not in self.dependent:
                continue
            found.add(node)
            queue.extend(node.all_input_nodes)
            if isinstance(node.meta['val'], (list, tuple)):  # only the parts of a split can be in the state
                found.update(user for user in node.users if user.target is operator.getitem)
        return found

    def pieces(self) -> List[_Piece]:
        """Build K + 1 pieces: one per stage, and the end of the backbone."""
        stages, known = [], {self.image}
        for tap in self.taps:
            stages.append(self._needed([tap], known))
            known |= stages[-1]
        stages.append(self._needed([self.logits], known))

        states = []
        for k in range(len(self.taps)):
            later = set().union(*stages[k + 1 :])
            done = {self.image}.union(*stages[: k + 1])
            crossing = {n for node in later for n in node.all_input_nodes if n in done}
            if self.logits in done:
                crossing.add(self.logits)
            states.append([self.taps[k], *(n for n in self.nodes if n in crossing and n is not self.taps[k])])

        pieces, before = [], [self.image]
        for nodes, after in zip(stages, [*states, [self.logits]]):
            pieces.append(self._piece(before, nodes, after))
            before = after
        return pieces

    def _piece(self, before: Sequence[fx.Node], nodes: Set[fx.Node], after: Sequence[fx.Node]) -> _Piece:
        graph = fx.Graph()
        copies: Dict[fx.Node, Any] = {}
        # image-independent ancestors of the nodes of this piece
        free, queue = set(), [n for node in nodes for n in node.all_input_nodes]
        while queue:
            node = queue.pop()
            if node not in self.dependent and node not in free:
                free.add(node)
                if not self._is_size_of_state(node):
                    queue.extend(node.all_input_nodes)
        weights = [n for n in self.nodes if n in free and n.name in self.weights]
        constants = [n for n in self.nodes if n in free and n.name in self.constants]
        for node in (*weights, *constants):
            copies[node] = graph.placeholder(node.name)
        incoming = {node: graph.placeholder(f'state_{i}') for i, node in enumerate(before)}
        batch = graph.call_function(torch.ops.aten.sym_size.int, (next(iter(incoming.values())), 0))
        for node, value in incoming.items():
            copies[node] = self._restore(graph, node, value, batch)
        for node in self.nodes:
            if node in copies or (node not in nodes and node not in free) or node.op == 'placeholder':
                continue
            if self._is_size_of_state(node):
                copies[node] = self._times_batch(graph, node.meta['val'], batch)
            else:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                # kernels of another device may return another memory layout, which does not support views
                if node.target is torch.ops.aten.view.default:
                    copies[node].target = torch.ops.aten.reshape.default
                if copies[node].kwargs.get('device') is not None:
                    copies[node].update_kwarg('device', self.device)
        graph.output(tuple(self._batch_first(graph, node, copies[node], batch) for node in after))
        graph.eliminate_dead_code()
        return _Piece(
            fx.GraphModule(self.graph_module, graph),
            [self._owner(self.weights[n.name]) for n in weights],
            [self.constants[n.name] for n in constants],
        )

    def _owner(self, target: str) -> Tuple[nn.Module, str]:
        path, _, name = target.removeprefix('backbone.').rpartition('.')
        return self.backbone.get_submodule(path), name

    def _is_size_of_state(self, node: fx.Node) -> bool:
        """Whether a node reads a size of an image-dependent tensor, which is a multiple of the batch size."""
        return node not in self.dependent and any(n in self.dependent for n in node.all_input_nodes)

    def _times_batch(self, graph: fx.Graph, size: Any, batch: fx.Node) -> Any:
        """Express a traced size, a number or a multiple of the batch size, by the batch size of a piece."""
        factor = self._factor(size)
        if factor is None:
            return int(size)
        return batch if factor == 1 else graph.call_function(operator.mul, (batch, factor))

    def _factor(self, size: Any) -> Optional[int]:
        """Divide a size by the batch size; None for a constant size.

        Raises:
            PartitionError: The size is not an integer multiple of the batch size.
        """
        if not isinstance(size, torch.SymInt):
            return None
        if size.node.expr.is_number:
            return None
        ratio = size.node.expr / self.batch.node.expr
        if not ratio.is_integer:
            raise PartitionError(f'a later stage needs a value of size {size}, which is no multiple of the batch size')
        return int(ratio)

    def _batch_first(self, graph: fx.Graph, node: fx.Node, value: fx.Node, batch: fx.Node) -> fx.Node:
        """Move the batch dimension of a value to the front, [B, ...], for the state."""
        dim, factor = self._batch_dim(node)
        if dim:
            value = graph.call_function(torch.ops.aten.movedim.int, (value, dim, 0))
        if factor != 1:
            rest = [s for i, s in enumerate(node.meta['val'].shape) if i != dim]
            value = graph.call_function(torch.ops.aten.reshape.default, (value, [batch, factor, *map(int, rest)]))
        return value

    def _restore(self, graph: fx.Graph, node: fx.Node, value: fx.Node, batch: fx.Node) -> fx.Node:
        """Undo `_batch_first` on a value of the state."""
        if node is self.image:
            return value
        dim, factor = self._batch_dim(node)
        if factor != 1:
            value = graph.call_function(torch.ops.aten.flatten.using_ints, (value, 0, 1))
        if dim:
            value = graph.call_function(torch.ops.aten.movedim.int, (value, 0, dim))
        return value

    def _batch_dim(self, node: fx.Node) -> Tuple[int, int]:
        """Find the dimension of a value that is a multiple of the batch size, and the factor.

        Raises:
            PartitionError: The value has no such dimension.
        """
        for dim, size in enumerate(node.meta['val'].shape):
            factor = self._factor(size)
            if factor is not None:
                return dim, factor
        raise PartitionError(f'a later stage needs the value {node.name}, which has no batch dimension')
