"""Reports: tables as Markdown and figures as PNG, with the values of the paper where they are known."""

import statistics
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .plan import Row, Table

__all__ = ['figure', 'report']

Records = Dict[str, Dict[str, Any]]
Found = Sequence[Tuple[Row, List[Dict[str, Any]]]]


WEIGHT_STATISTICS = (
    ('rows', 'distance between the mean weights of two exits'),
    ('rows_per_image', 'per image'),
    ('entropy', 'entropy over log K'),
    ('spread', 'deviation over images'),
)


def report(table: Table, results: Records, scale: str) -> str:
    """Write the report of a table as Markdown.

    Args:
        table: Table.
        results: Records of finished runs by id.
        scale: Name of the scale.

    Returns:
        Text of the report.
    """
    found = _found(table, results)
    wanted = sum(len(row.runs) for row in table.rows)
    have = sum(len(records) for _, records in found)
    parts = [f'# {table.name}: {table.title}', _setting(table, scale, have, wanted)]
    if table.note:
        parts.append(table.note)
    if not found:
        return '\n\n'.join([*parts, 'Nothing has been run yet.']) + '\n'
    makers = dict(accuracy=_accuracy, rescued=_overthinking, cost=_cost, weights=_weights)
    parts += [makers[kind](table, found) for kind in table.show if kind in makers]
    return '\n\n'.join(filter(None, parts)) + '\n'


def _found(table: Table, results: Records) -> Found:
    """Rows with at least one finished run, with the records of these runs."""
    found = [(row, [results[run.id] for run in row.runs if run.id in results]) for row in table.rows]
    return [(row, records) for row, records in found if records]


def _setting(table: Table, scale: str, have: int, wanted: int) -> str:
    flags = table.rows[0].runs[0].flags
    shown = ('train_split', 'epochs', 'batch_size', 'lr', 'sched', 'model_kwargs', 'amp_dtype', 'exit_pool')
    same = [
        name
        for name in shown
        if name in flags and all(row.runs[0].flags.get(name) == flags[name] for row in table.rows)
    ]
    settings = ', '.join(f'{name} {flags[name]}' for name in same)
    measured = 'the test split was read once per run'
    if table.test_split != 'test':
        measured = f'accuracies are on {table.test_split}, which no run was trained on, and the test split was not read'
    return (
        f'{table.dataset} at scale `{scale}` ({settings}), {have} of {wanted} runs. `exit_pool` is the pool of all '
        f'exits but the last, which has that of the backbone. The images that training held out chose the epoch; '
        f'{measured}. Means over seeds, ± standard deviation.'
    )


def _accuracy(table: Table, found: Found) -> str:
    """Test accuracy per exit, its mean, p-values against the baselines and the paper's mean, then the comparisons."""
    exits = max(len(records[0]['test']) for _, records in found)
    header = [*table.axes, 'Seeds', *(f'Ex{k + 1}' for k in range(exits)), 'Mean', 'Held-out mean']
    header += [f'p against {name}' for name in table.baselines]
    header += ['Paper'] if table.paper else []
    lines = []
    for row, records in found:
        columns = list(zip(*(r['test'] for r in records)))
        # the plain backbone's only exit is in the column of the last exit; others begin at the first
        empty = [''] * (exits - len(columns))
        exit_cells = [*empty, *map(_mean_std, columns)] if len(columns) == 1 else [*map(_mean_std, columns), *empty]
        cells = [*row.labels, len(records), *exit_cells]
        cells += [_mean_std(_means(records)), _mean_std(_means(records, 'validation'))]
        cells += [_p_value(records, _partner(row, name, found)) for name in table.baselines]
        cells += [f'{table.paper[row.labels]:.2f}' if row.labels in table.paper else ''] if table.paper else []
        lines.append(cells)
    note = ''
    pairs = [(records, _partner(row, name, found)) for row, records in found for name in table.baselines]
    if any(partner and len(records[0]['test']) != len(partner[0]['test']) for records, partner in pairs):
        note = '\n\nBetween networks with different numbers of exits, p is that of their last exits.'
    return _markdown(header, lines) + note + _findings(table, found)


def _findings(table: Table, found: Found) -> str:
    """Compare the sign of each difference from a baseline in a row above with the paper, one sentence each."""
    sentences = []
    order = [row.labels for row, _ in found]
    for row, records in found:
        for name in table.baselines:
            labels = (*row.labels[:-1], name)
            partner = _partner(row, name, found)
            if (
                not partner
                or order.index(labels) >= order.index(row.labels)
                or not {row.labels, labels} <= set(table.paper)
            ):
                continue
            ours = statistics.mean(_means(records)) - statistics.mean(_means(partner))
            paper = table.paper[row.labels] - table.paper[labels]
            verdict = 'as in the paper' if ours * paper > 0 else 'unlike the paper'
            sentences.append(
                f'- {" / ".join(row.labels)} against {name}: {ours:+.2f} here, {paper:+.2f} there: {verdict}.'
            )
    return '\n\n' + '\n'.join(sentences) if sentences else ''


def _overthinking(table: Table, found: Found) -> str:
    """Percentage of images that are right at an exit and wrong at the last one (Table 1)."""
    found = [(row, records) for row, records in found if len(records[0]['rescued']) > 1]
    if not found:
        return ''
    exits = max(len(records[0]['rescued']) for _, records in found)
    header = [*table.axes, *(f'Ex{k + 1}' for k in range(exits - 1))]
    lines = [
        [*row.labels, *(f'{statistics.mean(c):.2f}' for c in list(zip(*(r['rescued'] for r in records)))[:-1])]
        for row, records in found
    ]
    return 'Overthinking: right at the exit and wrong at the last one, % of the test images:\n\n' + _markdown(
        header, lines
    )


def _cost(table: Table, found: Found) -> str:
    """Multiply-adds and parameters of the whole network, and mean depth of the exits (Table 7)."""
    lines = []
    for row, (record, *_) in found:
        depth = statistics.mean(record['depth'])
        lines.append(
            [*row.labels, f'{record["macs"][-1] / 1e6:.1f}', f'{record["params"][-1] / 1e6:.2f}', f'{depth:.1f}']
        )
    return _markdown([*table.axes, 'MMACs', 'Params M', 'Mean depth'], lines)


def _weights(table: Table, found: Found) -> str:
    """Mixing weights of the CWEM, averaged over the test split and the seeds (Table 15)."""
    parts = []
    for row, records in found:
        matrices = [r['weights'] for r in records if 'weights' in r]
        if not matrices:
            continue
        size = len(matrices[0])
        lines = [
            [f'Teacher-Ex{i + 1}', *(f'{statistics.mean(m[i][k] for m in matrices):.3f}' for k in range(size))]
            for i in range(size)
        ]
        title = ' / '.join(row.labels)
        about = _weight_statistics([r['weight_statistics'] for r in records if 'weight_statistics' in r])
        parts.append(f'{title}{about}\n\n' + _markdown(['', *(f'Ex{k + 1}' for k in range(size))], lines))
    return '\n\n'.join(parts)


def _weight_statistics(found: Sequence[Dict[str, float]]) -> str:
    if not found:  # records of runs before they were measured
        return ''
    return ': ' + ', '.join(f'{name} {statistics.mean(s[key] for s in found):.3f}' for key, name in WEIGHT_STATISTICS)


def figure(table: Table, results: Records, path: Path) -> bool:
    """Plot accuracy against cost, one panel per first label.

    The points are the exits, or with ``budgeted`` in the table's `show` the 39 policies of the budgeted curve.

    Args:
        table: Table.
        results: Records of finished runs by id.
        path: PNG file to write.

    Returns:
        Whether there were finished runs to plot.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    found = _found(table, results)
    if not found:
        return False
    panels = list(dict.fromkeys(row.labels[0] for row, _ in found))
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for name, ax in zip(panels, axes[0]):
        for row, records in found:
            if row.labels[0] == name:
                xs, ys = _curve(records, 'budgeted' in table.show)
                ax.plot(xs, ys, marker='.', label=' / '.join(row.labels[1:]))
        ax.set(title=name, xlabel='MMACs per image', ylabel='test top-1 %')
        ax.grid(alpha=0.3)
        ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True


def _curve(records: List[Dict[str, Any]], budgeted: bool) -> Tuple[List[float], List[float]]:
    """Means over the seeds: multiply-adds in millions, and accuracy in percent."""
    if budgeted:
        curves = [r['curve'] for r in records if 'curve' in r]
        pairs = [[statistics.mean(v) for v in zip(*points)] for points in zip(*curves)]
    else:
        pairs = [(m, statistics.mean(t)) for m, t in zip(records[0]['macs'], zip(*(r['test'] for r in records)))]
    return [cost / 1e6 for cost, _ in pairs], [accuracy for _, accuracy in pairs]


def _means(records: List[Dict[str, Any]], split: str = 'test') -> List[float]:
    """Mean accuracy over the exits, one number per seed."""
    return [statistics.mean(r[split]) for r in records]


def _partner(row: Row, name: str, found: Found) -> List[Dict[str, Any]]:
    """Records of the row that differs only in its last label, which is `name`."""
    return next((records for other, records in found if other.labels == (*row.labels[:-1], name)), [])


def _p_value(records: List[Dict[str, Any]], partner: List[Dict[str, Any]]) -> str:
    """Two-tailed Welch t-test of the mean over the exits, as in the paper; of the last exits if the numbers differ."""
    if min(len(records), len(partner)) < 2 or records == partner:
        return ''
    from scipy.stats import ttest_ind

    alike = len(records[0]['test']) == len(partner[0]['test'])
    values = [_means(some) if alike else [r['test'][-1] for r in some] for some in (records, partner)]
    return f'{ttest_ind(*values, equal_var=False).pvalue:.2g}'


def _mean_std(values: Sequence[float]) -> str:
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def _markdown(header: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    rows: List[Optional[Sequence[Any]]] = [header, ['---'] * len(header), *lines]
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)
