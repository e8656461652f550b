"""Find the blocks of a backbone from its module lists, its layer groups and its feature info."""

import re
from typing import Any, Dict, Iterator, List, Tuple

import torch.nn as nn

from ..module_types import TimmModel

__all__ = ['block_names']


def block_names(backbone: TimmModel) -> List[str]:
    """Name the blocks of a backbone, which are the modules that an exit may follow.

    Blocks are the composite members of the backbone's module lists (``layer1``, ``stages.0.blocks``), the modules that
    its ``group_matcher`` numbers (``s1.b2`` in a RegNet) and the modules of its ``feature_info``. A member that itself
    contains exactly one such list is a resolution stage, and the members of that list are blocks too.

    Args:
        backbone: A timm model.

    Returns:
        Block names, in the order of ``named_modules``.
    """
    numbered, stem = _layer_groups(backbone)
    names = {*_listed(backbone, '', numbered), *numbered}
    if not names:  # neither module lists nor layer groups: use the composite children
        names = {name for name, child in backbone.named_children() if _is_composite(child)}
    order = [name for name, _ in backbone.named_modules() if name]
    first = min((order.index(name) for name in names), default=0)
    names |= {info['module'] for info in backbone.feature_info} & set(order[first:])  # the stem is not a block
    return [name for name in order if name in names and not any(p.match(name) for p in stem)]


def _members(module: nn.Module) -> List[nn.Module]:
    """Return the members of a module list, empty for any other module."""
    return list(module) if isinstance(module, (nn.Sequential, nn.ModuleList)) else []


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList))


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _is_stage(module: nn.Module) -> bool:
    """Whether a module has exactly one list of composite modules; several are the parallel branches of a block."""
    lists = [_members(child) for child in module.children()]
    return sum(all(_is_composite(member) for member in members) for members in lists if members) == 1


def _listed(module: nn.Module, prefix: str, numbered: Dict[str, int], in_list: bool = False) -> Iterator[str]:
    """Yield the composite members of module lists, outer before inner, without the modules inside a block."""
    for name, child in module.named_children():
        path = f'{prefix}{name}'
        if _is_list(child):
            yield from _listed(child, f'{path}.', numbered, in_list=True)
        elif in_list or path in numbered:
            if _is_composite(child):
                yield path
            if numbered.get(path, 0) < 2 and _is_stage(child):
                for inner_name, inner in child.named_children():
                    if _is_list(inner):
                        yield from _listed(inner, f'{path}.{inner_name}.', numbered, in_list=True)
        else:
            yield from _listed(child, f'{path}.', numbered)


def _layer_groups(backbone: TimmModel) -> Tuple[Dict[str, int], List[re.Pattern[str]]]:
    """Read the numbered modules and the stem from ``group_matcher``.

    Returns:
        Number of indices in the name of every module that ``group_matcher`` numbers, by name, and the patterns that
        match the stem.
    """
    matcher = backbone.group_matcher(coarse=False) if hasattr(backbone, 'group_matcher') else None
    if not isinstance(matcher, dict):
        return {}, []
    patterns = {}
    for group, spec in matcher.items():
        entries = [entry if isinstance(entry, (list, tuple)) else (entry, None) for entry in _as_list(spec)]
        # a fixed ordinal marks layers before or after the blocks
        patterns[group] = [re.compile(pattern) for pattern, ordinal in entries if ordinal is None]
    modules = {name for name, _ in backbone.named_modules()}
    numbered = {}
    for parameter, _ in backbone.named_parameters():
        match = next((m for ps in patterns.values() for m in (p.match(parameter) for p in ps) if m), None)
        if match and match.groups():
            name = parameter[: match.end()].rstrip('.')
            while name not in modules:
                name = name.rpartition('.')[0]
            if name:
                numbered[name] = sum(group is not None for group in match.groups())
    return numbered, patterns.get('stem', [])


def _as_list(spec: Any) -> List[Any]:
    return list(spec) if isinstance(spec, (list, tuple)) else [spec]
