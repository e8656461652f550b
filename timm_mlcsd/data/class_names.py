"""Names of classes by index; a class without a name is shown by its index."""

import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Union

from .._timm import class_map
from ..errors import UserError, first_few, one_line

__all__ = [
    'ClassNames',
    'check_look_alikes',
    'class_label',
    'list_classes',
    'load_class_map',
    'names_by_index',
    'pad_names',
    'same_names',
]

ClassNames = List[Optional[str]]

# larger than any data set, because every index needs a row of the classifier
MAX_CLASSES = 1_000_000
_BOM = '\ufeff'


def names_by_index(class_to_idx: Mapping[Any, int]) -> ClassNames:
    """List the class names by index; names with the same index are joined by a slash.

    Args:
        class_to_idx: Index of every class name.

    Returns:
        Name per index, None for an index without a name, [largest index + 1].
    """
    names = defaultdict(list)
    for name, index in class_to_idx.items():
        names[index].append(str(name))
    return [' / '.join(sorted(names[index])) or None for index in range(max(names, default=-1) + 1)]


def class_label(names: Optional[Sequence[Optional[str]]], index: int) -> str:
    """Return the name of a class, or its index as text if it has no name."""
    name = names[index] if names is not None and index < len(names) else None
    return str(index) if name is None else name


def list_classes(names: ClassNames) -> str:
    """List the labels of the first five classes for a message."""
    return first_few([class_label(names, index) for index in range(len(names))])


def pad_names(names: Optional[ClassNames], num_classes: int) -> Optional[ClassNames]:
    """Append None to `names` for the classes that a network has in addition to those of the data.

    Args:
        names: Name per index; None if the names are unknown.
        num_classes: Number of classes C of the network.

    Returns:
        Name per index, [C]; None if the names are unknown.
    """
    return None if names is None else [*names, *[None] * (num_classes - len(names))]


def same_names(names: Sequence[Optional[str]], others: Sequence[Optional[str]]) -> bool:
    """Whether two lists have equal names for all indices, apart from classes without a name at their end.

    Names are compared in a normal form of Unicode, because archives of macOS store another one.
    """
    length = max(len(names), len(others))
    ours, theirs = (
        [None if name is None else unicodedata.normalize('NFC', name) for name in pad_names(list(some), length) or []]
        for some in (names, others)
    )
    return ours == theirs


def check_look_alikes(names: Iterable[str], what: str) -> None:
    """Refuse names of different classes that differ only in Unicode form, outer spaces or invisible characters.

    Args:
        names: Names of classes.
        what: Source of the names, for the error message.

    Raises:
        UserError: Two names look the same, or a name has no visible characters.
    """
    seen: Dict[str, str] = {}
    for name in names:
        form = _visible(name)
        if not form:
            raise UserError(f'{what}: expected names of classes, got an empty one; give every class a name.')
        if form in seen and seen[form] != name:
            raise UserError(
                f'{what}: {seen[form]!r} and {name!r} look the same and would be two classes; rename one of them, or '
                f'merge them.'
            )
        seen[form] = name


def _visible(name: str) -> str:
    """Normalise a name and remove byte-order marks, zero-width characters and outer spaces."""
    text = ''.join(c for c in unicodedata.normalize('NFC', name) if unicodedata.category(c) != 'Cf')
    return text.strip()


def load_class_map(path: Union[str, Path], root: Union[str, Path, None] = None) -> Dict[Any, int]:
    """Read a class map in timm's format: a text file with one name per line, or a pickled dict of plain values.

    Args:
        path: File with the extension ``.txt`` or ``.pkl``.
        root: Folder in which a relative path is searched too; default None for the working folder only.

    Returns:
        Index of every class name.

    Raises:
        UserError: The file does not exist, cannot be read, or does not assign one index to every class.
    """
    flag = f'--class-map {str(path)!r}'
    file = next((p for p in (Path(path), Path(root or '') / path) if p.is_file()), None)
    if file is None:
        raise UserError(f'{flag}: expected a file, got nothing there; give the path of a .txt or .pkl file.')
    kind = file.suffix.lower()
    if kind not in ('.txt', '.pkl'):
        raise UserError(f'{flag}: expected a .txt or .pkl file, got {kind or "no ending"}; write one name per line.')
    try:
        mapping = _from_text(file, flag) if kind == '.txt' else _from_pickle(file, flag)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f'{flag} cannot be read: {e}') from e
    if not mapping:
        raise UserError(f'{flag}: expected names of classes, got an empty file; write one name per line.')
    check_look_alikes((name for name in mapping if isinstance(name, str)), flag)
    return mapping


def _from_text(path: Path, flag: str) -> Dict[str, int]:
    lines = [line.strip() for line in path.read_text(encoding='utf-8').split('\n')]
    while lines and not lines[-1]:
        lines.pop()
    mapping: Dict[str, int] = {}
    for number, name in enumerate(lines, 1):
        if not name:
            raise UserError(f'{flag}: line {number} is empty, and its index would have no name; remove the line.')
        if _BOM in name:
            raise UserError(f'{flag}: line {number} has a byte-order mark; save the file as UTF-8 without one.')
        if name in mapping:
            raise UserError(
                f'{flag}: {name!r} is on the lines {mapping[name] + 1} and {number}; a class has one index, remove one.'
            )
        mapping[name] = number - 1
    return mapping


def _from_pickle(path: Path, flag: str) -> Dict[Any, int]:
    try:
        mapping: Dict[Any, int] = class_map.load_class_map(str(path))  # timm's unpickler runs no code
    except Exception as e:  # damaged pickles raise errors of any type
        raise UserError(f'{flag} cannot be read: {one_line(e)}') from e
    is_valid = isinstance(mapping, dict) and all(
        isinstance(name, (str, int)) and type(index) is int and 0 <= index < MAX_CLASSES
        for name, index in mapping.items()
    )
    if not is_valid:
        raise UserError(f'{flag}: expected a dict from names to indices below {MAX_CLASSES}, got something else.')
    if any(isinstance(name, str) and _BOM in name for name in mapping):
        raise UserError(f'{flag}: a name has a byte-order mark; remove it.')
    return mapping
