"""Read a backbone as a chain of modules, by watching it run.

In a chain each module's input *is* the previous module's output: the same tensor object, not written to in between.
A network that runs like that can be stopped after any of its modules and resumed there, and it computes exactly what
its own ``forward_features`` computes, because nothing happens between the modules.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

from .meta import OnMeta

__all__ = ['Leaf', 'trace_chain']


class Leaf(NamedTuple):
    """One module of a chain.

    Attributes:
        name: Its path in the backbone.
        shape: Its output's shape for the probe, batch of one.
        macs: Multiply-adds from the image up to and with this module.
        is_block: Whether it is a composite member of a list of modules: what people call a block.
        writes_input: Whether it changes its input in place (an in-place ReLU, say).
    """

    name: str
    shape: Tuple[int, ...]
    macs: int
    is_block: bool
    writes_input: bool


class _CallRecord:
    """One call of a module during the probe, with what it took, gave and called."""

    def __init__(self, name: str, module: nn.Module):
        self.name = name
        self.module = module
        self.children: List[_CallRecord] = []
        self.input: Optional[torch.Tensor] = None
        self.output: Optional[torch.Tensor] = None
        self.input_version = self.input_version_after = self.output_version = 0
        self.macs = 0


@torch.inference_mode(False)  # tensors made in inference mode have no version to compare
def trace_chain(backbone: nn.Module, input_size: Sequence[int]) -> Optional[List[Leaf]]:
    """Watch ``backbone.forward_features`` once, on the meta device, and read off its chain of modules.

    Args:
        backbone: A timm model.
        input_size: (C, H, W) of the probe image.

    Returns:
        The modules in call order, or None where the backbone is no plain chain.
    """
    root = _CallRecord('', backbone)
    stack = [root]
    names = {module: name for name, module in backbone.named_modules()}
    in_list = {
        child
        for module in backbone.modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList))
        for child in module.children()
    }
    counter = FlopCounterMode(display=False)

    def enter(module, args, kwargs):
        record = _CallRecord(names[module], module)
        stack[-1].children.append(record)
        stack.append(record)
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            record.input, record.input_version = args[0], args[0]._version

    def leave(module, args, kwargs, output):
        record = stack.pop()
        record.macs = counter.get_total_flops() // 2
        if record.input is not None and isinstance(output, torch.Tensor):
            record.output, record.output_version = output, output._version
            record.input_version_after = record.input._version

    handles = []
    for module in backbone.modules():
        if module is not backbone:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
    image = torch.empty(1, *input_size, device='meta')
    try:
        with counter:
            root.output = OnMeta(backbone)('forward_features', image)
    finally:
        for handle in handles:
            handle.remove()
    root.input, root.input_version = image, image._version
    if not isinstance(root.output, torch.Tensor):
        return None
    root.output_version = root.output._version
    if not _runs_its_children_as_chain(root):
        return None
    leaves = [
        Leaf(
            name=record.name,
            shape=tuple(record.output.shape),
            macs=record.macs,
            is_block=record.module in in_list and any(True for _ in record.module.children()),
            writes_input=record.input_version_after != record.input_version,
        )
        for record in _flatten(root)
    ]
    # a module that runs twice has no single place in the network
    return leaves if len({leaf.name for leaf in leaves}) == len(leaves) else None


def _flatten(record: _CallRecord) -> List[_CallRecord]:
    """Open a module that is, or holds, a list of modules and is itself a chain; keep any other whole."""
    holds_list = any(isinstance(m, (nn.Sequential, nn.ModuleList)) for m in record.module.modules())
    if not holds_list or not _runs_its_children_as_chain(record):
        return [record]
    return [leaf for child in record.children for leaf in _flatten(child)]


def _runs_its_children_as_chain(record: _CallRecord) -> bool:
    """Whether the record's children pass one untouched tensor from its input to its output, and nothing else runs."""
    if not record.children:
        return False
    tensor, version = record.input, record.input_version
    for child in record.children:
        if child.output is None or child.input is not tensor or child.input_version != version:
            return False
        tensor, version = child.output, child.output_version
    return record.output is tensor and record.output_version == version
