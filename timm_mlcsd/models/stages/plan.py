"""Decide how a backbone is cut: as a chain of modules where it is one, else out of its exported graph."""

from contextlib import ExitStack
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch.nn as nn

from ...errors import one_line
from .blocks import block_names
from .chain import read_chain
from .placement import place_exits
from .probe import ModuleCall, TracedModule, list_places, probe
from .small_input import remove_first_downsamplings

__all__ = ['Plan', 'plan_stages']


class Plan(NamedTuple):
    """How a backbone is cut.

    Attributes:
        places: What it runs, in order: every module of a chain, else its blocks.
        taps: Indices of the tapped ones.
        is_chain: Whether it is a chain.
        is_whole: Whether the backbone's forward is its forward_features, then its forward_head, and nothing else.
    """

    places: List[TracedModule]
    taps: List[int]
    is_chain: bool
    is_whole: bool = True

    @property
    def tapped(self) -> List[TracedModule]:
        """The places that the exits read, the backbone's end last."""
        return [self.places[tap] for tap in self.taps]


def plan_stages(
    backbone: nn.Module,
    input_size: Sequence[int],
    exits: Union[int, Sequence[str], None] = None,
    small_input: bool = False,
    undo: Optional[ExitStack] = None,
) -> Plan:
    """Watch a backbone run and place its exits.

    Args:
        backbone: A timm model; with `small_input` it is changed in place.
        input_size: (C, H, W) of its images.
        exits: As in `place_exits`.
        small_input: Take the first two downsamplings out.
        undo: With `small_input`, gets what puts the backbone back as it was.

    Raises:
        ValueError: The arguments ask for what the backbone doesn't have.
    """
    root = _probe(backbone, input_size)
    if small_input:
        before = _last_width(backbone, root)
        remove_first_downsamplings(backbone, root, undo)
        try:
            root = _probe(backbone, input_size)
            fits = 3 < _last_width(backbone, root) / before < 6  # four, but for odd sizes and unpadded convs
        except ValueError:  # branches that no longer have one size
            fits = False
        if not fits:
            raise ValueError('small_input=True: the first two downsamplings of this backbone cannot be taken out.')
    chain, blocks = _read(backbone, root)
    if not chain and not blocks:
        raise ValueError(f'{type(backbone).__name__} has no blocks with a map that an exit could read.')
    plans, errors, info = [], [], backbone.feature_info
    for places, is_chain in ((chain, True), (blocks, False)):
        try:
            plans += [Plan(places, place_exits(places, info, exits), is_chain, root.is_whole)] if places else []
        except ValueError as e:
            errors.append(e)
    if not plans:
        # the blocks know the largest number of exits, the chain the most names
        raise errors[-1 if isinstance(exits, int) else 0]
    # a chain trains stage by stage, but may not be opened as far as its blocks; of equals it comes first
    return max(plans, key=lambda plan: len(plan.taps))


def _read(backbone: nn.Module, root: ModuleCall) -> Tuple[Optional[List[TracedModule]], List[TracedModule]]:
    names = set(block_names(backbone))
    chain = read_chain(root, names)
    if chain is not None and all(place.layout is None for place in chain):
        chain = None
    return chain, list_places(root, names, {info['module'] for info in backbone.feature_info})


def _last_width(backbone: nn.Module, root: ModuleCall) -> Optional[int]:
    if root.layout is not None:
        return root.layout.width
    return next((call.layout.width for call in reversed(list(root.ended())) if call.layout is not None), None)


def _probe(backbone: nn.Module, input_size: Sequence[int]) -> ModuleCall:
    try:
        return probe(backbone, input_size)
    except (RuntimeError, AssertionError, IndexError, TypeError) as e:
        size = 'x'.join(map(str, input_size))
        raise ValueError(
            f'{type(backbone).__name__} does not run on images of {size}: {one_line(e)}. If it was made for another '
            f'size, pass that as img_size.'
        ) from e
