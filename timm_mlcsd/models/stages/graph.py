"""Cut a backbone that is no chain of modules: its exported graph falls apart where the exits are.

``torch.export`` writes down the whole evaluation-mode forward as one graph of tensor operations. Stage k is what exit
k needs and no earlier exit did; the values that later stages still need cross the cut as the state. The pieces read
the live model's parameters, so training goes on changing what they compute.
"""

import copy
import operator
import warnings
from functools import partial
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.fx as fx
import torch.nn as nn

from ...errors import one_line
from .hooks import count_hooks
from .taps import Taps
from .verify import PartitionError, plainly, verify

__all__ = ['PartitionedGraph', 'copy_sharing_weights', 'export_whole']


class _Piece(NamedTuple):
    """One executable part: reads weights off the live modules that own them, and the values that crossed into it."""

    module: fx.GraphModule
    weights: List[Tuple[str, nn.Module, str]]  # path of the owner, the owner, attribute
    constants: List[torch.Tensor]


class _TappedBackbone(nn.Module):
    """The backbone as export shall see it: images -> (each tap's map, logits)."""

    def __init__(self, backbone: nn.Module, taps: Taps):
        super().__init__()
        self.backbone = backbone
        self.taps = [taps]  # in a list, so that it is no submodule

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """Images [B, C, H, W] to the maps and the logits."""
        logits, maps = self.taps[0].run(self.backbone, images)
        return (*maps, logits)


def copy_sharing_weights(backbone: nn.Module, taps: Taps) -> Tuple[nn.Module, Taps]:
    """Modules and taps to trace in the place of live ones, in evaluation mode, around the same tensors."""
    tensors = (*backbone.parameters(), *backbone.buffers())
    backbone, taps = copy.deepcopy((backbone, taps), {id(t): t for t in tensors})
    # training mode drops what a backbone keeps of its weights for evaluation (LeViT's attention biases)
    return backbone.train().eval(), taps


def export_whole(backbone: nn.Module, taps: Taps, input_size: Sequence[int]) -> torch.export.ExportedProgram:
    """Write down a backbone's forward, the maps at its taps included, for batches of any size.

    Args:
        backbone: A timm model in evaluation mode that nothing else uses meanwhile.
        taps: Its taps.
        input_size: (C, H, W).

    Raises:
        PartitionError: It cannot be exported.
    """
    weight = next(backbone.parameters())
    images = torch.zeros(2, *input_size, device=weight.device, dtype=weight.dtype)
    batch = torch.export.Dim('batch', min=1, max=2**20)
    try:
        with plainly(weight.device), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            program = torch.export.export(
                _TappedBackbone(backbone, taps), (images,), dynamic_shapes=({0: batch},), strict=False
            )
            return program.run_decompositions({})  # in functional form: nothing is written in place
    except Exception as e:  # export fails in as many ways as there are operations
        raise PartitionError(f'torch.export cannot write down its forward: {type(e).__name__}: {one_line(e)}') from e


class PartitionedGraph:
    """A backbone in pieces.

    The state behind stage k is a tuple: the tap's map [B, C, H, W], then whatever later stages still need, batch
    first.

    Args:
        program: What `export_whole` wrote down.
        backbone: The live model, whose weights the pieces read.
        num_taps: K.
        device: Where the pieces run.

    Raises:
        PartitionError: A value without a batch would cross a cut.
    """

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        backbone: nn.Module,
        num_taps: int,
        device: torch.device,
    ):
        self.pieces = _Partitioner(program, backbone, num_taps, device).pieces()
        self.backbone = backbone
        self.modules = list(backbone.modules())
        self.num_hooks = count_hooks(self.modules)

    def is_current(self) -> bool:
        """Whether the modules that own the weights are still in their places, and no hooks have come or gone."""
        if count_hooks(self.modules) != self.num_hooks:
            return False
        weights = {path: owner for piece in self.pieces for path, owner, _ in piece.weights}
        try:
            return all(self.backbone.get_submodule(path) is owner for path, owner in weights.items())
        except AttributeError:
            return False

    def run(self, index: int, state: Tuple[torch.Tensor, ...]) -> Tuple[torch.Tensor, ...]:
        """Run a piece: stage `index` on the state behind the stage before (the images for the first); -1 for the end.

        Returns:
            The state behind that stage; the logits alone at the end.
        """
        piece = self.pieces[index]
        return piece.module(*(getattr(owner, name) for _, owner, name in piece.weights), *piece.constants, *state)

    def verify(self, backbone: nn.Module, input_size: Sequence[int]) -> None:
        """Compare the pieces in a row with the backbone.

        Args:
            backbone: The backbone in evaluation mode, or a copy.
            input_size: (C, H, W).

        Raises:
            PartitionError: They compute something else.
        """
        last = len(self.pieces) - 1
        steps = [partial(self.run, index) for index in range(last)]
        verify([lambda x: steps[0]((x,)), *steps[1:], lambda state: self.run(last, state)[0]], backbone, input_size)


class _Partitioner:
    """Distributes the nodes of an exported graph over the pieces."""

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
        # buffers that the forward would update come first
        outputs = [o for o, spec in zip(outputs, signature.output_specs) if spec.kind.name == 'USER_OUTPUT']
        self.taps, self.logits = outputs[:num_taps], outputs[num_taps]
        self.batch = self.image.meta['val'].shape[0]
        self._find_what_depends_on_the_images()

    def _find_what_depends_on_the_images(self) -> None:
        """The rest (sizes, position embeddings, masks) is computed anew wherever it is needed."""
        self.dependent: Set[fx.Node] = {self.image}
        for node in self.nodes:
            is_tensor = not isinstance(node.meta.get('val'), (torch.SymInt, int, float, bool))
            if is_tensor and node.op != 'output' and any(n in self.dependent for n in node.all_input_nodes):
                self.dependent.add(node)

    def _needed(self, targets: Sequence[fx.Node], known: Set[fx.Node]) -> Set[fx.Node]:
        """All image-dependent nodes behind `targets` that are not `known`."""
        found, queue = set(), list(targets)
        while queue:
            node = queue.pop()
            if node in found or node in known or node not in self.dependent:
                continue
            found.add(node)
            queue.extend(node.all_input_nodes)
            if isinstance(node.meta['val'], (list, tuple)):  # a split: its parts can cross a cut, it itself cannot
                found.update(user for user in node.users if user.target is operator.getitem)
        return found

    def pieces(self) -> List[_Piece]:
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
        # what needs no images: every ancestor of this piece's nodes
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
                # another device's kernels may leave another layout, of which no view can be taken
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

    def _owner(self, target: str) -> Tuple[str, nn.Module, str]:
        path, _, name = target.removeprefix('backbone.').rpartition('.')
        return path, self.backbone.get_submodule(path), name

    def _is_size_of_state(self, node: fx.Node) -> bool:
        """Whether it reads a size off a tensor that depends on the images: the batch, or a multiple of it."""
        return node not in self.dependent and any(n in self.dependent for n in node.all_input_nodes)

    def _times_batch(self, graph: fx.Graph, size: Any, batch: fx.Node) -> Any:
        """A size as the trace knows it, a number times the batch, in a piece that has another batch."""
        factor = self._factor(size)
        if factor is None:
            return int(size)
        return batch if factor == 1 else graph.call_function(operator.mul, (batch, factor))

    def _factor(self, size: Any) -> Optional[int]:
        """How many times the batch a size is; None for a plain number.

        Raises:
            PartitionError: It is something else.
        """
        if not isinstance(size, torch.SymInt):
            return None
        if size.node.expr.is_number:
            return None
        ratio = size.node.expr / self.batch.node.expr
        if not ratio.is_integer:
            raise PartitionError(f'a value of size {size} would cross a cut, which is no multiple of the batch')
        return int(ratio)

    def _batch_first(self, graph: fx.Graph, node: fx.Node, value: fx.Node, batch: fx.Node) -> fx.Node:
        """A value as it crosses a cut: [B, ...]."""
        dim, factor = self._batch_dim(node)
        if dim:
            value = graph.call_function(torch.ops.aten.movedim.int, (value, dim, 0))
        if factor != 1:
            rest = [s for i, s in enumerate(node.meta['val'].shape) if i != dim]
            value = graph.call_function(torch.ops.aten.reshape.default, (value, [batch, factor, *map(int, rest)]))
        return value

    def _restore(self, graph: fx.Graph, node: fx.Node, value: fx.Node, batch: fx.Node) -> fx.Node:
        """The value as the nodes behind the cut expect it."""
        if node is self.image:
            return value
        dim, factor = self._batch_dim(node)
        if factor != 1:
            value = graph.call_function(torch.ops.aten.flatten.using_ints, (value, 0, 1))
        if dim:
            value = graph.call_function(torch.ops.aten.movedim.int, (value, 0, dim))
        return value

    def _batch_dim(self, node: fx.Node) -> Tuple[int, int]:
        """Which dimension of a value counts the images, and how often."""
        for dim, size in enumerate(node.meta['val'].shape):
            factor = self._factor(size)
            if factor is not None:
                return dim, factor
        raise PartitionError(f'the value {node.name} would cross a cut without a batch dimension')
