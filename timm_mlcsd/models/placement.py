"""Where the exits go: read off the model's own description, never off its name."""

from typing import List, Optional, Sequence, Union

from .chain import Leaf

__all__ = ['place_exits']


def place_exits(
    leaves: Sequence[Leaf],
    group_ends: Sequence[str],
    exits: Union[int, Sequence[str]],
) -> List[int]:
    """Choose the taps.

    With ``exits=8`` two in each of the last four resolution groups, after blocks ceil(n/2)-1 and n-1 of the group's
    n; with ``exits=4`` one at each group's end; for any other number, or where the backbone has no four such groups,
    at the block ends nearest to equal shares of the multiply-adds. The last exit is always the backbone's end.

    Args:
        leaves: The backbone as a chain.
        group_ends: Modules at which the backbone's resolution groups end (``feature_info``), shallow first.
        exits: Number of exits, or the names of the tapped modules for all but the last exit.

    Returns:
        Indices of the taps in `leaves`, increasing.

    Raises:
        ValueError: `exits` asks for what the backbone does not have.
    """
    ends = [i for i in (_end_of(leaves, name) for name in group_ends) if i is not None]
    blocks = [i for i, leaf in enumerate(leaves) if leaf.is_block]
    last = ends[-1] if ends else (blocks[-1] if blocks else len(leaves) - 1)
    # a tap ahead of an in-place module would have its map overwritten
    blocks = [i for i in blocks if i < last and not leaves[i + 1].writes_input]
    if not isinstance(exits, int):
        return _by_name(leaves, exits, last)
    if not 1 <= exits <= len(blocks) + 1:
        raise ValueError(
            f'exits={exits} is impossible: this backbone has {len(blocks) + 1} blocks that an exit can follow; '
            f'choose 1 to {len(blocks) + 1}, or name the taps.'
        )
    by_group = _by_group(blocks + [last], ends, exits)
    return by_group or _by_macs(leaves, blocks, last, exits)


def _end_of(leaves: Sequence[Leaf], module: str) -> Optional[int]:
    """Index of the last leaf in `module`, None where the chain doesn't pass through it."""
    found = [i for i, leaf in enumerate(leaves) if leaf.name == module or leaf.name.startswith(module + '.')]
    return found[-1] if found else None


def _by_group(blocks: Sequence[int], ends: Sequence[int], exits: int) -> Optional[List[int]]:
    """One or two exits in each of the last four resolution groups, None where that doesn't fit."""
    if exits not in (4, 8) or len(ends) < 4:
        return None
    starts = [-1, *ends][-5:-1]
    taps = []
    for start, end in zip(starts, ends[-4:]):
        group = [i for i in blocks if start < i <= end]
        if not group or group[-1] != end or len(group) < exits // 4:
            return None
        if exits == 8:
            taps.append(group[(len(group) + 1) // 2 - 1])
        taps.append(end)
    return taps


def _by_macs(leaves: Sequence[Leaf], blocks: Sequence[int], last: int, exits: int) -> List[int]:
    """The distinct block ends nearest to equal shares of the multiply-adds."""
    taps, first = [], 0
    for k in range(1, exits):
        share = leaves[last].macs * k / exits
        allowed = range(first, len(blocks) - (exits - 1 - k))
        nearest = min(allowed, key=lambda i: abs(leaves[blocks[i]].macs - share))
        taps.append(blocks[nearest])
        first = nearest + 1
    return taps + [last]


def _by_name(leaves: Sequence[Leaf], names: Sequence[str], last: int) -> List[int]:
    """Taps that the user named; the backbone's end is added where it isn't the last of them."""
    taps = []
    for name in names:
        index = _end_of(leaves, name)
        if index is None or index > last:
            known = ', '.join(leaf.name for leaf in leaves[: last + 1])
            raise ValueError(f'exits names {name!r}, which is no place to leave this backbone. Choose among: {known}.')
        if index < last and leaves[index + 1].writes_input:
            raise ValueError(
                f'exits names {name!r}, but the next module ({leaves[index + 1].name}) overwrites that map in place; '
                f'tap {leaves[index + 1].name!r} instead.'
            )
        taps.append(index)
    if taps != sorted(set(taps)):
        raise ValueError(f'exits={list(names)} must be different places in the order in which the backbone runs them.')
    return taps if taps and taps[-1] == last else taps + [last]
