"""Recognise a backbone that is a chain of modules.

In a chain the input of each module *is* the output of the previous one: the same tensor object, not modified in
between. Such a network can be stopped after any of its modules and resumed there. The result equals that of its
``forward_features``, because no operation runs between the modules.
"""

from typing import List, Optional, Set

import torch

from .probe import ModuleCall, TracedModule

__all__ = ['read_chain']


def read_chain(root: ModuleCall, blocks: Set[str]) -> Optional[List[TracedModule]]:
    """Flatten a probed backbone into its chain of modules, down to the level of its blocks.

    Args:
        root: Recorded call of ``forward_features``, from `probe`.
        blocks: Names of the blocks.

    Returns:
        Modules in call order; None if the backbone is not a chain.
    """
    if not isinstance(root.output, torch.Tensor) or not _runs_its_children_as_chain(root):
        return None
    calls = [call for child in root.children for call in _flatten(child, blocks)]
    # a module that runs twice has no single position in the network
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
    """Replace a module by its children if it contains blocks and is itself a chain; keep any other module."""
    contains_blocks = any(name.startswith(f'{call.name}.') for name in blocks)
    if not contains_blocks or not _runs_its_children_as_chain(call):
        return [call]
    return [inner for child in call.children for inner in _flatten(child, blocks)]


def _runs_its_children_as_chain(call: ModuleCall) -> bool:
    """Whether the call passes one tensor from child to child, unmodified in between, and runs nothing else."""
    if not call.children or not isinstance(call.output, torch.Tensor):
        return False
    tensor, version = call.input, call.input_version
    for child in call.children:
        if not isinstance(child.output, torch.Tensor) or child.input is not tensor or child.input_version != version:
            return False
        tensor, version = child.output, child.output_version
    return call.output is tensor and call.output_version == version
