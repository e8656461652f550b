"""Place the exits of a backbone from its traced modules and feature info, independent of its name."""

from typing import Any, Dict, List, Optional, Sequence, Union

from .probe import TracedModule

__all__ = ['place_exits']

DEFAULT_EXITS = 8


def place_exits(
    modules: Sequence[TracedModule],
    feature_info: Sequence[Dict[str, Any]],
    exits: Union[int, Sequence[str], None] = None,
) -> List[int]:
    """Choose the tapped modules.

    8 exits are placed two in each of the last four resolution groups, after blocks ceil(n/2)-1 and n-1 of the n blocks
    of a group. 4 exits are placed one at the end of each group. Any other number, or exits of a backbone without four
    such groups, are placed at the block ends nearest to equal shares of the MACs. The last exit is always the end of
    the backbone.

    Args:
        modules: Traced modules of the backbone, in execution order.
        feature_info: Feature info of the backbone, which names the modules at which resolution groups end.
        exits: Number of exits, or names of the tapped modules for all exits but the last; default None for 8 exits, or
            fewer if the backbone has fewer blocks.

    Returns:
        Indices of the taps in `modules`, increasing.

    Raises:
        ValueError: The backbone does not support this number of exits or these taps.
    """
    ends = _group_ends(modules, feature_info)
    last = _last(modules, ends)
    blocks = _block_ends(modules, last)
    if exits is None:
        exits = min(DEFAULT_EXITS, len(blocks) + 1)
    exits = [exits] if isinstance(exits, str) else exits
    names = isinstance(exits, (list, tuple)) and exits and all(isinstance(name, str) for name in exits)
    if not names and (isinstance(exits, bool) or not isinstance(exits, int)):
        raise ValueError(f'exits={exits!r}: expected a number of exits or a list of names of modules to tap.')
    if not isinstance(exits, int):
        return _by_name(modules, exits, last)
    if not 1 <= exits <= len(blocks) + 1:
        raise ValueError(
            f'exits={exits} is impossible: this backbone has {len(blocks) + 1} blocks that an exit can follow; '
            f'choose 1 to {len(blocks) + 1}, or name the taps.'
        )
    by_group = _by_group(blocks + [last], ends, exits)
    return by_group or _by_macs(modules, blocks, last, exits)


def _group_ends(modules: Sequence[TracedModule], feature_info: Sequence[Dict[str, Any]]) -> List[int]:
    """Find the ends of the resolution groups; blocks of one resolution (an isotropic ViT) form one group."""
    names = {info['reduction']: info['module'] for info in feature_info}  # the last module of each resolution
    ends = [_end_of(modules, name) for name in names.values()]
    if not ends or ends[-1] is None:
        return []  # the feature info names modules that do not run under these names
    return sorted({end for end in ends if end is not None and modules[end].layout is not None})


def _last(modules: Sequence[TracedModule], ends: Sequence[int]) -> int:
    """Find the module whose map is the feature of the last exit."""
    if ends:
        return ends[-1]
    with_map = [i for i, module in enumerate(modules) if module.layout is not None]
    blocks = [i for i in with_map if modules[i].is_block]
    return (blocks or with_map)[-1]


def _block_ends(modules: Sequence[TracedModule], last: int) -> List[int]:
    """Find the ends of the blocks before `last`; a norm or activation that follows a block belongs to it."""
    found = []
    for i in (i for i, module in enumerate(modules) if module.is_block and module.layout is not None and i < last):
        while i + 1 < last and _continues(modules[i], modules[i + 1]):
            i += 1
        # an in-place module would overwrite the map of a tap before it
        if i < last and not (i + 1 < len(modules) and modules[i + 1].writes_input):
            found.append(i)
    # leave out blocks with far fewer channels than the end of their group (a layer of a DenseNet)
    wide = [i for i in found if 2 * modules[i].map_layout.channels >= _channels_after(modules, found + [last], i)]
    return sorted(set(wide))


def _continues(module: TracedModule, following: TracedModule) -> bool:
    """Whether a module belongs to the block before it: same map layout, no further MACs, not a block itself."""
    same = following.layout is not None and following.layout._replace(path=()) == module.map_layout._replace(path=())
    return same and following.macs == module.macs and not following.is_block


def _channels_after(modules: Sequence[TracedModule], ends: Sequence[int], index: int) -> int:
    """Return the channels at the last of `ends` that has the resolution of the map at `index`."""
    width = modules[index].map_layout.width
    layouts = [modules[i].map_layout for i in ends if i >= index]
    return [layout.channels for layout in layouts if layout.width == width][-1]


def _end_of(modules: Sequence[TracedModule], name: str) -> Optional[int]:
    """Return the index of the last traced module at or below `name`, None if there is none."""
    found = [i for i, module in enumerate(modules) if module.name == name or module.name.startswith(name + '.')]
    return found[-1] if found else None


def _by_group(blocks: Sequence[int], ends: Sequence[int], exits: int) -> Optional[List[int]]:
    """Place one or two exits in each of the last four resolution groups; None if the backbone does not allow it."""
    if exits not in (4, 8) or len(ends) < 4:
        return None
    starts = [-1, *ends][-5:-1]
    taps = []
    for start, end in zip(starts, ends[-4:]):
        group = [i for i in blocks if start < i <= end]
        if not group or len(group) < exits // 4:
            return None
        if exits == 8:
            taps.append(group[(len(group) + 1) // 2 - 1])
        taps.append(group[-1])
    return taps if taps[-1] == blocks[-1] else None


def _by_macs(modules: Sequence[TracedModule], blocks: Sequence[int], last: int, exits: int) -> List[int]:
    """Place the exits at the distinct block ends nearest to equal shares of the MACs."""
    taps, first = [], 0
    for k in range(1, exits):
        share = modules[last].macs * k / exits
        allowed = range(first, len(blocks) - (exits - 1 - k))
        nearest = min(allowed, key=lambda i: abs(modules[blocks[i]].macs - share))
        taps.append(blocks[nearest])
        first = nearest + 1
    return taps + [last]


def _by_name(modules: Sequence[TracedModule], names: Sequence[str], last: int) -> List[int]:
    """Place the exits at the named modules, and at the end of the backbone if it is not the last of them."""
    taps = []
    for name in names:
        index = _end_of(modules, name)
        if index is None or index > last or modules[index].layout is None:
            known = ', '.join(module.name for module in modules[: last + 1] if module.layout is not None)
            raise ValueError(f'exits names {name!r}, which an exit of this backbone cannot tap; choose among {known}.')
        if index < last and modules[index + 1].writes_input:
            raise ValueError(
                f'exits names {name!r}, but the next module ({modules[index + 1].name}) overwrites that map in place; '
                f'tap {modules[index + 1].name!r} instead.'
            )
        taps.append(index)
    if taps != sorted(set(taps)):
        raise ValueError(
            f'exits={list(names)}: expected different modules in the order in which the backbone runs them.'
        )
    if taps == [last]:
        raise ValueError(
            f'exits={list(names)}: expected a module before the end of the backbone, which is always the last exit; '
            f'name an earlier module too, or use exits=1 for the plain backbone.'
        )
    return taps if taps[-1] == last else taps + [last]
