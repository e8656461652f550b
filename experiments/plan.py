"""Run plans: read the file of a table and a scale, and list the runs that they need."""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

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
    """One training run.

    Attributes:
        dataset: Key of datasets.yaml.
        flags: Flags of train.py by name, without those that locate the data; the others keep their defaults.
        seed: Seed of weights and batches; the split into training and held-out images does not depend on it.
    """

    dataset: str
    flags: Flags
    seed: int

    @property
    def id(self) -> str:
        """Identifier of the run: 12 hexadecimal digits of a hash of its attributes."""
        text = json.dumps([self.dataset, self.flags, self.seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        labels: Labels of the row, one per axis.
        runs: Runs of the row, one per seed.
    """

    labels: Tuple[str, ...]
    runs: List[Run]


class Table(NamedTuple):
    """A table or figure of the paper.

    Attributes:
        name: Name of the table's file.
        title: Title of the table.
        dataset: Key of datasets.yaml.
        axes: Names of the axes in which rows differ.
        rows: Rows for the product of the axes' values; empty if the scale excludes all networks, or the table excludes
            the scale.
        baselines: Labels of the last axis that the other rows are compared with.
        show: Parts of the report: ``accuracy``, ``rescued``, ``cost``, ``weights``, ``anytime`` or ``budgeted``.
        paper: Mean accuracy over the exits in the paper, by labels, where it is known.
        note: Remark in the report.
        test_split: Split that finished runs are measured on.
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
    test_split: str


def table_names(folder: Path = HERE / 'tables') -> List[str]:
    """List the names of the files in a folder.

    Args:
        folder: Folder of YAML files; default: the folder of tables.

    Returns:
        Names without the suffix, with numbers in numeric order.
    """
    names = [path.stem for path in folder.glob('*.yaml')]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)])


def load_datasets() -> Dict[str, Dict[str, Any]]:
    """Load the data sets of datasets.yaml by name."""
    return yaml.safe_load((HERE / 'datasets.yaml').read_text())


def load_table(name: str, scale: str, seeds: int = 0) -> Table:
    """Read a table's file at a scale.

    The flags of a run are merged from the recipe of the data set, the scale (general, for the data set, for the
    network), the table, the row, and the scale for the seed, and later ones override earlier ones. The value null
    removes a flag.

    Args:
        name: Name of a file in ``tables``.
        scale: Name of a file in ``scales``.
        seeds: Runs per row, with the first seeds of the scale; 0 (default) for all of them.

    Returns:
        The table with its rows.

    Raises:
        UserError: The table or the scale does not exist.
    """
    spec, scaling = _read('tables', name), _load_scale(scale)
    dataset = spec['dataset']
    entry = load_datasets()[dataset]
    recipe = {**yaml.safe_load((ROOT / entry['recipe']).read_text()), **entry.get('flags', {})}
    common = yaml.safe_load((HERE / 'axes.yaml').read_text())
    axes = {axis: _values(axis, values, common) for axis, values in spec['axes'].items()}
    for axis, kept in scaling.get('keep', {}).items():
        if axis in axes:
            axes[axis] = {label: flags for label, flags in axes[axis].items() if label in kept}
    rows = []
    runs_here = scale in spec.get('scales', [scale])
    by_seed = _seeds(scaling['seeds'], seeds)
    for labels in itertools.product(*axes.values()) if runs_here else ():
        own: Flags = dict(spec.get('flags', {}))
        for values, label in zip(axes.values(), labels):
            own.update(values[label])
        model = own.get('model', recipe.get('model'))
        flags = {**recipe, **_flags_of_scale(scaling, dataset, model), **own}
        # without distillation these flags have no effect, and equal runs would get different ids
        unused = DISTILL_FLAGS if flags.get('distill') == 'none' else ()
        runs = []
        for seed, more in by_seed.items():
            merged = {**flags, **more}
            given = {key: value for key, value in merged.items() if value is not None and key not in unused}
            runs.append(Run(dataset, given, seed))
        rows.append(Row(labels, runs))
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
        scaling.get('test_split', 'test'),
    )


def _flags_of_scale(scaling: Dict[str, Any], dataset: str, model: Optional[str]) -> Flags:
    parts = scaling.get('flags'), scaling.get('datasets', {}).get(dataset), scaling.get('networks', {}).get(model)
    return {key: value for part in parts for key, value in (part or {}).items()}


def _seeds(of_scale: Union[int, Dict[int, Flags]], wanted: int) -> Dict[int, Flags]:
    """Seeds with their own flags: 0, 1, ... without any, or those that the scale lists."""
    if isinstance(of_scale, int):
        return {seed: {} for seed in range(wanted or of_scale)}
    if wanted > len(of_scale):
        raise UserError(f'--seeds {wanted}: expected at most {len(of_scale)}, which the scale lists.')
    return dict(itertools.islice(of_scale.items(), wanted or None))


def _load_scale(name: str) -> Dict[str, Any]:
    """Read a scale's file.

    Args:
        name: Name of a file in ``scales``; it may name another as ``base``, whose entries it replaces.

    Returns:
        ``seeds``, ``flags``, ``datasets``, ``networks``, ``keep`` and ``test_split``, those of them that it sets.

    Raises:
        UserError: The scale does not exist.
    """
    scaling = _read('scales', name)
    return {**_load_scale(scaling.pop('base')), **scaling} if 'base' in scaling else scaling


def _read(kind: str, name: str) -> Dict[str, Any]:
    path = HERE / kind / f'{name}.yaml'
    if not path.exists():
        known = ', '.join(table_names(HERE / kind))
        raise UserError(f'{kind[:-1]} {name!r} is unknown; choose from {known}.')
    return yaml.safe_load(path.read_text())


def _values(axis: str, values: Any, common: Dict[str, Dict[str, Flags]]) -> Dict[str, Flags]:
    """Flags by label of an axis, from {label: flags}, values of the flag `axis`, or a reference to axes.yaml."""
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
