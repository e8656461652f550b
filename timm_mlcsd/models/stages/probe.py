"""Trace one forward pass of a backbone: the modules it calls, their inputs and outputs, and the layout of the maps."""

import contextlib
from collections import Counter
from functools import cached_property
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .feature_layout import MapLayout, find_map
from .meta import MetaRunner, eval_mode

__all__ = ['ModuleCall', 'TracedModule', 'find_step', 'list_tappable_blocks', 'probe']

# methods that count as modules, because backbones run them between modules: a ViT adds its position embedding there
TRACED_METHODS = ('_pos_embed',)
# the two methods that make up the forward of a timm model
FORWARD_METHODS = ('forward_features', 'forward_head')

BATCH = 2  # with one image the batch could not be distinguished from other dimensions of size 1


class TracedModule(NamedTuple):
    """Facts about one module of a traced backbone.

    Attributes:
        name: Path in the backbone, or a name of `TRACED_METHODS`.
        layout: Layout of the map in the module's output; None if the output has no map.
        macs: Cumulative MACs of one image from the input of the backbone to the output of this module.
        is_block: Whether the module is a block, which an exit may follow.
        writes_input: Whether the module modifies its input in place, as an in-place ReLU does; default False.
    """

    name: str
    layout: Optional[MapLayout]
    macs: int
    is_block: bool
    writes_input: bool = False

    @property
    def map_layout(self) -> MapLayout:
        """Layout of the map, for a module that has one."""
        assert self.layout is not None  # exits tap modules with a map only
        return self.layout


class ModuleCall:
    """One recorded call of a module, or of a method in `TRACED_METHODS`.

    Args:
        name: Path in the backbone, a method's name, or empty for the backbone itself.
        module: Called module; the backbone for a method.
        image_size: (height, width) of the probe images in pixels.
        channels_last: Whether the backbone declares its maps as NHWC.

    Attributes:
        children: Calls inside this one, in order.
        input: Input of the call if that is a single tensor, else None.
        output: Output of the call.
        macs: Cumulative MACs of one image when the call returned.
        is_features_then_head: For the call of ``forward_features``: whether the forward of the backbone is
            ``forward_features``, then ``forward_head``, and nothing else.
    """

    is_features_then_head = False

    def __init__(self, name: str, module: nn.Module, image_size: Sequence[int], channels_last: bool):
        self.name = name
        self.module = module
        self.image_size = image_size
        self.channels_last = channels_last
        self.children: List[ModuleCall] = []
        self.input: Optional[torch.Tensor] = None
        self.output: Any = None
        self.input_version = self.input_version_after = self.output_version = self.map_version = 0
        self.macs = 0

    def in_return_order(self) -> Iterator['ModuleCall']:
        """Yield all calls below this one, in the order in which they returned."""
        for child in self.children:
            yield from child.in_return_order()
            yield child

    @cached_property
    def layout(self) -> Optional[MapLayout]:
        """Layout of the map in the output; None if the output has no map."""
        return find_map(self.output, BATCH, self.image_size, self.channels_last)

    def record_input(self, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        """Record the arguments of the call, if they are a single tensor."""
        options: Sequence[Any] = (*args[1:], *kwargs.values())
        if self.name in FORWARD_METHODS:  # the forward of a ViT passes its own defaults
            options = [option for option in options if option is not None and option is not False]
        if args and isinstance(args[0], torch.Tensor) and not options:
            self.input, self.input_version = args[0], args[0]._version

    def record_output(self, output: Any, flops: int) -> None:
        """Record the output of the call and the FLOPs of the batch when it returned."""
        self.output = output
        self.macs = flops // (2 * BATCH)
        if isinstance(output, torch.Tensor):
            self.output_version = output._version
        self.map_version = self.layout.of(output)._version if self.layout else 0
        if self.input is not None:
            self.input_version_after = self.input._version


def find_step(backbone: nn.Module, name: str) -> Callable[[torch.Tensor], Any]:
    """Look up the module or method that a `TracedModule` names."""
    return getattr(backbone, name) if name in TRACED_METHODS else backbone.get_submodule(name)


@torch.inference_mode(False)  # tensors of inference mode have no version counter
def probe(backbone: nn.Module, input_size: Sequence[int]) -> ModuleCall:
    """Run a backbone in evaluation mode and record every call in its ``forward_features``.

    The backbone runs on the meta device, or on its own device if it has tensors that cannot be moved to meta.

    Args:
        backbone: A timm model.
        input_size: (C, H, W) of the probe images.

    Returns:
        Call of ``forward_features``, which contains all other calls.
    """
    try:
        return _probe_on(backbone, input_size, torch.device('meta'), MetaRunner(backbone))
    except RuntimeError as e:
        if 'meta' not in str(e):
            raise

    def run(method: str, images: torch.Tensor) -> Any:
        with torch.no_grad(), eval_mode(backbone):
            return getattr(backbone, method)(images)

    return _probe_on(backbone, input_size, next(backbone.parameters()).device, run)


def _probe_on(
    backbone: nn.Module, input_size: Sequence[int], device: torch.device, run: Callable[[str, torch.Tensor], Any]
) -> ModuleCall:
    images = torch.zeros(BATCH, *input_size, device=device, dtype=next(backbone.parameters()).dtype)
    try:
        forward = _trace(backbone, 'forward', images, run)
        features = next(call for call in forward.children if call.name == 'forward_features')
    except Exception as e:  # an overridden forward may raise any error; forward_features is enough to place exits
        if isinstance(e, RuntimeError) and device.type == 'meta' and 'meta' in str(e):
            raise
        return _trace(backbone, 'forward_features', images, run)
    features.is_features_then_head = _is_features_then_head(forward)
    return features


def _is_features_then_head(forward: ModuleCall) -> bool:
    """Whether a forward passes the images unmodified to ``forward_features`` and its output to ``forward_head``."""
    tensor, version = forward.input, forward.input_version
    for call in forward.children:
        if call.input is not tensor or call.input_version != version or not isinstance(call.output, torch.Tensor):
            return False
        tensor, version = call.output, call.output_version
    names = tuple(call.name for call in forward.children)
    return names == FORWARD_METHODS and forward.output is tensor and forward.output_version == version


def _trace(
    backbone: nn.Module, method: str, images: torch.Tensor, run: Callable[[str, torch.Tensor], Any]
) -> ModuleCall:
    """Run a method of the backbone and record the calls inside it.

    Args:
        backbone: A timm model.
        method: Method to run.
        images: Probe images [B, C, H, W].
        run: Function that runs a method of the backbone on images.

    Returns:
        Call of `method`, which contains all other calls.
    """
    channels_last = getattr(backbone, 'output_fmt', None) == 'NHWC'
    image_size = images.shape[-2:]
    root = ModuleCall('', backbone, image_size, channels_last)
    stack = [root]
    names = {module: name for name, module in backbone.named_modules()}
    counter = FlopCounterMode(display=False)

    def enter(name: str, module: nn.Module, args: Tuple[Any, ...], kwargs: Dict[str, Any]) -> None:
        call = ModuleCall(name, module, image_size, channels_last)
        stack[-1].children.append(call)
        stack.append(call)
        call.record_input(args, kwargs)

    def leave(output: Any) -> None:
        stack.pop().record_output(output, counter.get_total_flops())

    def recorded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run_method(*args: Any, **kwargs: Any) -> Any:
            enter(name, backbone, args, kwargs)
            output = method(*args, **kwargs)
            leave(output)
            return output

        return run_method

    with contextlib.ExitStack() as undo, counter:
        for module in backbone.modules():
            if module is not backbone:
                pre = module.register_forward_pre_hook(lambda m, *inputs: enter(names[m], m, *inputs), with_kwargs=True)
                post = module.register_forward_hook(lambda m, args, output: leave(output))
                undo.callback(pre.remove)
                undo.callback(post.remove)
        for name in (*TRACED_METHODS, *FORWARD_METHODS):
            if name != method and hasattr(backbone, name):
                undo.callback(_restore_method, backbone, name, vars(backbone).get(name))
                setattr(backbone, name, recorded(name, getattr(backbone, name)))
        root.record_input((images,), {})
        output = run(method, images)
    root.record_output(output, counter.get_total_flops())
    return root


def _restore_method(backbone: nn.Module, name: str, own: Optional[Callable[..., Any]]) -> None:
    """Remove a replaced method from the instance, and set the instance's own method, if it had one."""
    delattr(backbone, name)
    if own is not None:
        setattr(backbone, name, own)


def list_tappable_blocks(root: ModuleCall, blocks: Set[str], group_ends: Set[str]) -> List[TracedModule]:
    """List the blocks whose map an exit can read during a full forward pass, in the order in which they return.

    Of blocks with equal cumulative MACs (a resolution stage and its last block), only the end of a resolution group is
    listed, or else the first block. Blocks that run more than once and blocks whose map is modified later are left
    out.

    Args:
        root: Recorded call of ``forward_features``, from `probe`.
        blocks: Names of the blocks.
        group_ends: Names of the modules at which resolution groups end.

    Returns:
        Tappable blocks, by increasing cumulative MACs.
    """
    runs = Counter(call.name for call in root.in_return_order())
    tappable: List[TracedModule] = []
    for call in root.in_return_order():
        if call.name not in blocks or runs[call.name] > 1 or call.layout is None:
            continue
        if call.layout.of(call.output)._version != call.map_version:
            continue
        block = TracedModule(call.name, call.layout, call.macs, is_block=True)
        if not tappable or tappable[-1].macs < call.macs:
            tappable.append(block)
        elif call.name in group_ends:
            tappable[-1] = block
    return tappable
