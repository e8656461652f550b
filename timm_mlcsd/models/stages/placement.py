"""Where the exits go: read off the model's own description, never off its name."""

from typing import Any, Dict, List, Optional, Sequence, Union

from .probe import TracedModule

__all__ = ['place_exits']

DEFAULT_EXITS = 8


def place_exits(
    places: Sequence[TracedModule],
    feature_info: Sequence[Dict[str, Any]],
    exits: Union[int, Sequence[str], None] = None,
) -> List[int]:
    """Choose the taps.

    With 8 exits two in each of the last four resolution groups, after blocks ceil(n/2)-1 and n-1 of the group's n;
    with 4 one at each group's end; for any other number, or where the backbone has no four such groups, at the block
    ends nearest to equal shares of the multiply-adds. The last exit is always the backbone's end.

    Args:
        places: What the backbone runs, in order.
        feature_info: Its description: at which modules its resolution groups end.
        exits: Number of exits, or the names of the tapped modules for all but the last exit; None for 8, or as many
            as there are blocks for.

    Returns:
        Indices of the taps in `places`, increasing.

    Raises:
        ValueError: `exits` asks for what the backbone does not have.
    """
    ends = _group_ends(places, feature_info)
    last = _last(places, ends)
    blocks = _block_ends(places, last)
    if exits is None:
        exits = min(DEFAULT_EXITS, len(blocks) + 1)
    exits = [exits] if isinstance(exits, str) else exits
    names = isinstance(exits, (list, tuple)) and exits and all(isinstance(name, str) for name in exits)
    if not names and (isinstance(exits, bool) or not isinstance(exits, int)):
        raise ValueError(f'exits={exits!r} is neither a number of exits nor a list of names of modules to tap.')
    if not isinstance(exits, int):
        return _by_name(places, exits, last)
    if not 1 <= exits <= len(blocks) + 1:
        raise ValueError(
            f'exits={exits} is impossible: this backbone has {len(blocks) + 1} blocks that an exit can follow; '
            f'choose 1 to {len(blocks) + 1}, or name the taps.'
        )
    by_group = _by_group(blocks + [last], ends, exits)
    return by_group or _by_macs(places, blocks, last, exits)


def _group_ends(places: Sequence[TracedModule], feature_info: Sequence[Dict[str, Any]]) -> List[int]:
    """Where the backbone's resolution groups end; blocks of one resolution (an isotropic ViT) are one group."""
    modules = {info['reduction']: info['module'] for info in feature_info}  # the last of each resolution
    ends = [_end_of(places, module) for module in modules.values()]
    if not ends or ends[-1] is None:
        return []  # it describes modules that don't run under these names
    return sorted({end for end in ends if end is not None and places[end].layout is not None})


def _last(places: Sequence[TracedModule], ends: Sequence[int]) -> int:
    """The place whose map is the last exit's feature."""
    if ends:
        return ends[-1]
    with_map = [i for i, place in enumerate(places) if place.layout is not None]
    blocks = [i for i in with_map if places[i].is_block]
    return (blocks or with_map)[-1]


def _block_ends(places: Sequence[TracedModule], last: int) -> List[int]:
    """Where blocks end before `last`; the norm and activation that follow a block belong to it."""
    found = []
    for i in (i for i, place in enumerate(places) if place.is_block and place.layout is not None and i < last):
        while i + 1 < last and _continues(places[i], places[i + 1]):
            i += 1
        # a tap ahead of an in-place module would have its map overwritten
        if i < last and not (i + 1 < len(places) and places[i + 1].writes_input):
            found.append(i)
    # a block that leaves much fewer channels than its group (a DenseNet's layer) isn't all that the group knows
    wide = [i for i in found if 2 * places[i].layout.channels >= _channels_after(places, found + [last], i)]
    return sorted(set(wide))


def _continues(place: TracedModule, following: TracedModule) -> bool:
    same = following.layout is not None and following.layout._replace(path=()) == place.layout._replace(path=())
    return same and following.macs == place.macs and not following.is_block


def _channels_after(places: Sequence[TracedModule], ends: Sequence[int], index: int) -> int:
    """Channels where the map of `index` last has its resolution."""
    layout = places[index].layout
    return [places[i].layout.channels for i in ends if places[i].layout.width == layout.width and i >= index][-1]


def _end_of(places: Sequence[TracedModule], module: str) -> Optional[int]:
    """Index of the last place in `module`, None where the backbone doesn't pass through it."""
    found = [i for i, place in enumerate(places) if place.name == module or place.name.startswith(module + '.')]
    return found[-1] if found else None


def _by_group(blocks: Sequence[int], ends: Sequence[int], exits: int) -> Optional[List[int]]:
    """One or two exits in each of the last four resolution groups, None where that doesn't fit."""
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


def _by_macs(places: Sequence[TracedModule], blocks: Sequence[int], last: int, exits: int) -> List[int]:
    """The distinct block ends nearest to equal shares of the multiply-adds."""
    taps, first = [], 0
    for k in range(1, exits):
        share = places[last].macs * k / exits
        allowed = range(first, len(blocks) - (exits - 1 - k))
        nearest = min(allowed, key=lambda i: abs(places[blocks[i]].macs - share))
        taps.append(blocks[nearest])
        first = nearest + 1
    return taps + [last]


def _by_name(places: Sequence[TracedModule], names: Sequence[str], last: int) -> List[int]:
    """Taps that the user named; the backbone's end is added where it isn't the last of them."""
    taps = []
    for name in names:
        index = _end_of(places, name)
        if index is None or index > last or places[index].layout is None:
            known = ', '.join(place.name for place in places[: last + 1] if place.layout is not None)
            raise ValueError(f'exits names {name!r}, which is no place to leave this backbone. Choose among: {known}.')
        if index < last and places[index + 1].writes_input:
            raise ValueError(
                f'exits names {name!r}, but the next module ({places[index + 1].name}) overwrites that map in place; '
                f'tap {places[index + 1].name!r} instead.'
            )
        taps.append(index)
    if taps != sorted(set(taps)):
        raise ValueError(f'exits={list(names)} must be different places in the order in which the backbone runs them.')
    if taps == [last]:
        raise ValueError(
            f'exits={list(names)} names the end of this backbone alone, where the last exit is in any case: two exits '
            f'are needed; name an earlier module too, or take exits=1 for the plain backbone.'
        )
    return taps if taps[-1] == last else taps + [last]
