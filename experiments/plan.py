"""From a table's file and a scale to the runs it takes."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import yaml

from timm_mlcsd.errors import UserError

__all__ = ['HERE', 'ROOT', 'Row', 'Run', 'Table', 'load_datasets', 'load_table', 'table_names']

HERE = Path(__file__).parent
ROOT = HERE.parent

DISTILL_FLAGS = (
    'alpha',
    'beta',
    'temperature',
    'cwem_supervision',
    'distill_method',
    'distill_warmup_epochs',
    'distill_ramp',
)

Flags = Dict[str, Any]


class Run(NamedTuple):
    """One training.

    Attributes:
        dataset: A key of datasets.yaml.
        flags: train.py's, all that this run does not leave to their defaults; where the data lies aside.
        seed: Of weights and batches; the split into training and held-out images is the same for all.
    """

    dataset: str
    flags: Flags
    seed: int

    @property
    def id(self) -> str:
        """A name that two runs share only if they are the same run."""
        text = json.dumps([self.dataset, self.flags, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Row(NamedTuple):
    """One row of a table: a label per axis, and a run per seed."""

    labels: Tuple[str, ...]
    runs: List[Run]


class Table(NamedTuple):
    """A table or figure of the paper.

    Attributes:
        name: Of its file.
        title: What it shows.
        dataset: A key of datasets.yaml.
        axes: What its rows differ in.
        rows: The product of the axes' values; none, where the scale leaves all networks out.
        baselines: Values of the last axis to test the others against.
        show: What a report makes of it: ``accuracy``, ``rescued``, ``cost``, ``weights``; ``anytime`` or ``budgeted``.
        paper: Mean accuracy over the exits in the paper, by labels, where it is known.
        note: What else a reader must know.
    """

    name: str
    title: str
    dataset: str
    axes: List[str]
    rows: List[Row]
    baselines: List[str]
    show: List[str]
    paper: Dict[Tuple[str, ...], float]
    note: str


def table_names(folder: Path = HERE / 'tables') -> List[str]:
    """All there are, in the paper's order."""
    names = [path.stem for path in folder.glob('*.yaml')]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)])


def load_datasets() -> Dict[str, Dict[str, Any]]:
    """What tables can be run on, by name."""
    return yaml.safe_load((HERE / 'datasets.yaml').read_text())


def load_table(name: str, scale: str, seeds: int = 0) -> Table:
    """Read a table's file at a scale.

    A run's flags are the data set's recipe, over it what the scale changes, the scale's part for the network, the
    table's flags and the row's; null takes a flag away.

    Args:
        name: Of a file in ``tables``.
        scale: Of a file in ``scales``.
        seeds: Runs per row, instead of the scale's number.

    Raises:
        UserError: There is no such table or scale.
    """
    spec, scaling = _read('tables', name), _read('scales', scale)
    dataset = spec['dataset']
    about = load_datasets()[dataset]
    recipe = {**yaml.safe_load((ROOT / about['recipe']).read_text()), **about.get('flags', {})}
    common = yaml.safe_load((HERE / 'axes.yaml').read_text())
    axes = {axis: _values(axis, values, common) for axis, values in spec['axes'].items()}
    for axis, kept in scaling.get('keep', {}).items():
        if axis in axes:
            axes[axis] = {label: flags for label, flags in axes[axis].items() if label in kept}
    rows = []
    for labels in itertools.product(*axes.values()):
        own: Flags = dict(spec.get('flags', {}))
        for values, label in zip(axes.values(), labels):
            own.update(values[label])
        model = own.get('model', recipe.get('model'))
        flags = {
            **recipe,
            **scaling.get('flags', {}),
            **scaling.get('datasets', {}).get(dataset, {}),
            **scaling.get('networks', {}).get(model, {}),
            **own,
        }
        idle = DISTILL_FLAGS if flags.get('distill') == 'none' else ()  # or one run would have several ids
        flags = {key: value for key, value in flags.items() if value is not None and key not in idle}
        rows.append(Row(labels, [Run(dataset, flags, seed) for seed in range(seeds or scaling['seeds'])]))
    return Table(
        name,
        spec['title'],
        dataset,
        list(axes),
        rows,
        spec.get('baselines', []),
        spec.get('show', ['accuracy']),
        dict(_leaves(spec.get('paper', {}))),
        spec.get('note', ''),
    )


def _read(kind: str, name: str) -> Dict[str, Any]:
    path = HERE / kind / f'{name}.yaml'
    if not path.exists():
        known = ', '.join(table_names(HERE / kind))
        raise UserError(f'{kind[:-1]} {name!r} is unknown; choose from {known}.')
    return yaml.safe_load(path.read_text())


def _values(axis: str, values: Any, common: Dict[str, Dict[str, Flags]]) -> Dict[str, Flags]:
    """An axis is {label: flags}, a list of values for the flag of its name, or labels of an axis in axes.yaml."""
    if isinstance(values, dict) and 'use' in values:
        used = common[values['use']]
        return {label: used[label] or {} for label in values.get('only', used)}
    if isinstance(values, list):
        return {str(value): {axis: value} for value in values}
    return {str(label): flags or {} for label, flags in values.items()}


def _leaves(tree: Any, path: Tuple[str, ...] = ()) -> List[Tuple[Tuple[str, ...], float]]:
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in _leaves(value, (*path, str(key)))]
