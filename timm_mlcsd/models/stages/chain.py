"""Read a backbone as a chain of modules.

In a chain each module's input *is* the previous module's output: the same tensor object, not written to in between.
A network that runs like that can be stopped after any of its modules and resumed there, and it computes exactly what
its own ``forward_features`` computes, because nothing happens between the modules.
"""

from typing import List, Optional, Set

import torch

from .probe import ModuleCall, TracedModule

__all__ = ['read_chain']


def read_chain(root: ModuleCall, blocks: Set[str]) -> Optional[List[TracedModule]]:
    """Read a probed backbone as its chain of modules, opened down to its blocks.

    Args:
        root: What `probe` recorded.
        blocks: Names of the blocks.

    Returns:
        The modules in call order, or None where the backbone is no plain chain.
    """
    if not isinstance(root.output, torch.Tensor) or not _runs_its_children_as_chain(root):
        return None
    calls = [call for child in root.children for call in _flatten(child, blocks)]
    # a module that runs twice has no single place in the network
    if len({call.name for call in calls}) < len(calls):
        return None
    return [
        TracedModule(
            name=call.name,
            layout=call.layout,
            macs=call.macs,
            is_block=call.name in blocks,
            writes_input=call.input_version_after != call.input_version,
        )
        for call in calls
    ]


def _flatten(call: ModuleCall, blocks: Set[str]) -> List[ModuleCall]:
    """Open a chain that holds blocks; keep any other module whole."""
    holds_blocks = any(name.startswith(f'{call.name}.') for name in blocks)
    if not holds_blocks or not _runs_its_children_as_chain(call):
        return [call]
    return [inner for child in call.children for inner in _flatten(child, blocks)]


def _runs_its_children_as_chain(call: ModuleCall) -> bool:
    """Whether the call's children pass one untouched tensor from its input to its output, and nothing else runs."""
    if not call.children or not isinstance(call.output, torch.Tensor):
        return False
    tensor, version = call.input, call.input_version
    for child in call.children:
        if not isinstance(child.output, torch.Tensor) or child.input is not tensor or child.input_version != version:
            return False
        tensor, version = child.output, child.output_version
    return call.output is tensor and call.output_version == version
