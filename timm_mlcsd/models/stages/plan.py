"""Plan the stages of a backbone: cut it as a chain of modules if it is one, else cut its exported graph."""

from contextlib import ExitStack
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch.nn as nn

from ...errors import one_line
from ..module_types import TimmModel
from .blocks import block_names
from .chain import read_chain
from .placement import place_exits
from .probe import ModuleCall, TracedModule, list_tappable_blocks, probe
from .small_input import remove_first_downsamplings

__all__ = ['Plan', 'plan_stages']


class Plan(NamedTuple):
    """Modules of a backbone and taps of its exits.

    Attributes:
        modules: Traced modules in execution order: all modules of a chain, otherwise the blocks.
        taps: Indices of the tapped modules in `modules`, K, increasing.
        is_chain: Whether the backbone is a chain of modules.
        is_features_then_head: Whether the forward of the backbone is ``forward_features``, then ``forward_head``, and
            nothing else; default True.
    """

    modules: List[TracedModule]
    taps: List[int]
    is_chain: bool
    is_features_then_head: bool = True

    @property
    def tapped(self) -> List[TracedModule]:
        """Tapped modules, one per exit; the last is the end of the backbone."""
        return [self.modules[tap] for tap in self.taps]


def plan_stages(
    backbone: TimmModel,
    input_size: Sequence[int],
    exits: Union[int, Sequence[str], None] = None,
    small_input: bool = False,
    undo: Optional[ExitStack] = None,
) -> Plan:
    """Trace a backbone and place its exits.

    Args:
        backbone: A timm model; `small_input` changes it in place.
        input_size: (C, H, W) of the images.
        exits: Number of exits or names of the tapped modules, as in `place_exits`.
        small_input: Whether to remove the first two downsamplings; default False.
        undo: Stack that receives callbacks which restore the backbone; default None for none.

    Returns:
        Plan of the stages.

    Raises:
        ValueError: The backbone does not run on such images, or does not support `exits` or `small_input`.
    """
    root = _probe(backbone, input_size)
    if small_input:
        before = _last_width(backbone, root)
        remove_first_downsamplings(backbone, root, ExitStack() if undo is None else undo)
        try:
            root = _probe(backbone, input_size)
            after = _last_width(backbone, root)
            # 4 with tolerance for odd sizes and unpadded convs
            fits = before is not None and after is not None and 3 < after / before < 6
        except ValueError:  # the sizes of parallel branches no longer match
            fits = False
        if not fits:
            raise ValueError(
                'small_input=True: the first two downsamplings of this backbone cannot be removed; use '
                'small_input=False.'
            )
    chain, blocks = _read(backbone, root)
    if not chain and not blocks:
        raise ValueError(f'{type(backbone).__name__} has no block that returns a map for an exit to read.')
    plans, errors, info = [], [], backbone.feature_info
    for modules, is_chain in ((chain, True), (blocks, False)):
        try:
            if modules:
                plans.append(Plan(modules, place_exits(modules, info, exits), is_chain, root.is_features_then_head))
        except ValueError as e:
            errors.append(e)
    if not plans:
        # the error for blocks states the largest number of exits, that for a chain lists the most names
        raise errors[-1 if isinstance(exits, int) else 0]
    # a chain may not be flattened down to all blocks; with equally many exits it comes first, as it trains in stages
    return max(plans, key=lambda plan: len(plan.taps))


def _read(backbone: TimmModel, root: ModuleCall) -> Tuple[Optional[List[TracedModule]], List[TracedModule]]:
    names = set(block_names(backbone))
    chain = read_chain(root, names)
    if chain is not None and all(module.layout is None for module in chain):
        chain = None
    return chain, list_tappable_blocks(root, names, {info['module'] for info in backbone.feature_info})


def _last_width(backbone: nn.Module, root: ModuleCall) -> Optional[int]:
    if root.layout is not None:
        return root.layout.width
    return next((call.layout.width for call in reversed(list(root.in_return_order())) if call.layout is not None), None)


def _probe(backbone: nn.Module, input_size: Sequence[int]) -> ModuleCall:
    try:
        return probe(backbone, input_size)
    except (RuntimeError, AssertionError, IndexError, TypeError) as e:
        size = 'x'.join(map(str, input_size))
        raise ValueError(
            f'{type(backbone).__name__} does not run on images of {size}: {one_line(e)}; if it was made for another '
            f'size, pass that size as img_size.'
        ) from e
