"""Watch a backbone run once, on shapes alone: which modules it calls, what they take and give, where maps lie."""

import contextlib
from collections import Counter
from functools import cached_property
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .feature_layout import MapLayout, find_map
from .meta import MetaRunner, eval_mode

__all__ = ['ModuleCall', 'TracedModule', 'find_step', 'list_places', 'probe']

# what backbones do between modules, in a method of this name: a ViT adds its class token and position embedding
TRACED_METHODS = ('_pos_embed',)
# what a timm model's forward is made of
ENDS = ('forward_features', 'forward_head')

BATCH = 2  # of one image nobody could tell the batch from other dimensions of size 1


class TracedModule(NamedTuple):
    """What a module leaves behind where it ends.

    Attributes:
        name: Its path in the backbone; one of `TRACED_METHODS` counts as a module.
        layout: Where the map lies in its output; None where there is none.
        macs: Multiply-adds of one image from its pixels up to and with this module.
        is_block: Whether an exit may follow it.
        writes_input: Whether it changes its input in place (an in-place ReLU, say).
    """

    name: str
    layout: Optional[MapLayout]
    macs: int
    is_block: bool
    writes_input: bool = False


class ModuleCall:
    """One call of a module, or of one of `TRACED_METHODS`, during the probe.

    Attributes:
        name: Its path, empty for the backbone itself.
        module: The module; the backbone itself for a method.
        children: The calls inside this one, in order.
        input: Its input, where that is one tensor and nothing else.
        output: What it returned.
        macs: Multiply-adds of one image until it returned.
        layout: Where the map lies in its output.
        is_whole: Of ``forward_features``: whether forward is it, then ``forward_head``, and nothing else.
    """

    is_whole = False

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

    def ended(self) -> Iterator['ModuleCall']:
        """All calls below this one, in the order in which they returned."""
        for child in self.children:
            yield from child.ended()
            yield child

    @cached_property
    def layout(self) -> Optional[MapLayout]:
        return find_map(self.output, BATCH, self.image_size, self.channels_last)

    def record_input(self, args: Tuple, kwargs: dict) -> None:
        options = (*args[1:], *kwargs.values())
        if self.name in ENDS:  # a ViT's forward passes its own defaults on
            options = [option for option in options if option is not None and option is not False]
        if args and isinstance(args[0], torch.Tensor) and not options:
            self.input, self.input_version = args[0], args[0]._version

    def record_output(self, output: Any, flops: int) -> None:
        self.output = output
        self.macs = flops // (2 * BATCH)
        if isinstance(output, torch.Tensor):
            self.output_version = output._version
        self.map_version = self.layout.of(output)._version if self.layout else 0
        if self.input is not None:
            self.input_version_after = self.input._version


def find_step(backbone: nn.Module, name: str) -> Callable[[torch.Tensor], Any]:
    """The module, or the method, that a `TracedModule` names."""
    return getattr(backbone, name) if name in TRACED_METHODS else backbone.get_submodule(name)


@torch.inference_mode(False)  # tensors made in inference mode have no version to compare
def probe(backbone: nn.Module, input_size: Sequence[int]) -> ModuleCall:
    """Run a backbone in evaluation mode and record every call in its ``forward_features``.

    It runs on the meta device; for real where the backbone has tensors that cannot follow it there.

    Args:
        backbone: A timm model.
        input_size: (C, H, W) of the probe images.

    Returns:
        The call of ``forward_features``, with all others below it.
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
        whole = _trace(backbone, 'forward', images, run)
        features = next(call for call in whole.children if call.name == 'forward_features')
    except Exception as e:  # whatever an overridden forward may raise: the features alone tell where exits can be
        if isinstance(e, RuntimeError) and device.type == 'meta' and 'meta' in str(e):
            raise
        return _trace(backbone, 'forward_features', images, run)
    features.is_whole = _is_features_then_head(whole)
    return features


def _is_features_then_head(forward: ModuleCall) -> bool:
    """Whether one untouched tensor goes from the images through ``forward_features`` and ``forward_head``."""
    tensor, version = forward.input, forward.input_version
    for call in forward.children:
        if call.input is not tensor or call.input_version != version or not isinstance(call.output, torch.Tensor):
            return False
        tensor, version = call.output, call.output_version
    names = tuple(call.name for call in forward.children)
    return names == ENDS and forward.output is tensor and forward.output_version == version


def _trace(
    backbone: nn.Module, method: str, images: torch.Tensor, run: Callable[[str, torch.Tensor], Any]
) -> ModuleCall:
    channels_last = getattr(backbone, 'output_fmt', None) == 'NHWC'
    image_size = images.shape[-2:]
    root = ModuleCall('', backbone, image_size, channels_last)
    stack = [root]
    names = {module: name for name, module in backbone.named_modules()}
    counter = FlopCounterMode(display=False)

    def enter(name, module, args, kwargs):
        call = ModuleCall(name, module, image_size, channels_last)
        stack[-1].children.append(call)
        stack.append(call)
        call.record_input(args, kwargs)

    def leave(output):
        stack.pop().record_output(output, counter.get_total_flops())

    def watched(name, method):
        def run_method(*args, **kwargs):
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
        for name in (*TRACED_METHODS, *ENDS):
            if name != method and hasattr(backbone, name):
                undo.callback(_put_back, backbone, name, vars(backbone).get(name))
                setattr(backbone, name, watched(name, getattr(backbone, name)))
        root.record_input((images,), {})
        output = run(method, images)
    root.record_output(output, counter.get_total_flops())
    return root


def _put_back(backbone: nn.Module, name: str, own: Optional[Callable]) -> None:
    delattr(backbone, name)
    if own is not None:
        setattr(backbone, name, own)


def list_places(root: ModuleCall, blocks: Set[str], group_ends: Set[str]) -> List[TracedModule]:
    """The blocks whose map an exit can read while the backbone runs as a whole, in the order in which they end.

    Of blocks that end at the same multiply-add (a stage and its last block) the end of a resolution group stands for
    all, or else the first. A block that runs twice has no single place; a map that is written to later isn't what the
    block returned.

    Args:
        root: What `probe` recorded.
        blocks: Names of the blocks.
        group_ends: Names of the modules at which resolution groups end.
    """
    runs = Counter(call.name for call in root.ended())
    places = []
    for call in root.ended():
        if call.name not in blocks or runs[call.name] > 1 or call.layout is None:
            continue
        if call.layout.of(call.output)._version != call.map_version:
            continue
        place = TracedModule(call.name, call.layout, call.macs, is_block=True)
        if not places or places[-1].macs < call.macs:
            places.append(place)
        elif call.name in group_ends:
            places[-1] = place
    return places
