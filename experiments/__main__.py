"""Run the experiments of the paper's tables, and write reports.

    python -m experiments list
    python -m experiments run table2 --scale cpu --data PATH
    python -m experiments report --scale cpu

``run`` starts the missing runs and resumes stopped ones. A run that several tables share is done once.
"""

import argparse
import os
import time
from pathlib import Path
from typing import List

import torch

from timm_mlcsd.cli.arguments import ScriptParser, positive_float, positive_int
from timm_mlcsd.errors import UserError, run_script

from .plan import HERE, Table, load_table, table_names
from .report import figure, report
from .runner import Runner, load_results

RESULTS = HERE / 'results'
FIGURES = {'anytime', 'budgeted'}


def run(args: argparse.Namespace, tables: List[Table]) -> None:
    """Run the missing runs of the tables."""
    for table in tables:
        if not table.rows:
            raise UserError(
                f'{table.name} has no rows at scale {args.scale!r}, which excludes its networks; choose another scale.'
            )
    # seed by seed, so that partial results can be compared
    runs = [run for table in tables for row in table.rows for run in row.runs]
    runs.sort(key=lambda run: run.seed)
    args.results.mkdir(parents=True, exist_ok=True)
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    results = args.results / f'{args.scale}.jsonl'
    runner = Runner(results, args.work, args.data, args.scale, args.device, deadline, tables[0].test_split)
    errors = runner.run(runs, args.jobs)
    missing = {run.id for run in runs} - set(load_results(results))
    print(f'{len(missing)} runs missing' if missing else 'all done')
    if errors:
        raise UserError(' '.join(errors))


def list_tables(args: argparse.Namespace, tables: List[Table]) -> None:
    """Print the number of finished runs of each table."""
    done = load_results(args.results / f'{args.scale}.jsonl')
    for table in tables:
        ids = {run.id for row in table.rows for run in row.runs}
        print(f'{table.name:13} {table.dataset:14} {len(ids & set(done)):3} of {len(ids):3} runs  {table.title}')


def write_reports(args: argparse.Namespace, tables: List[Table]) -> None:
    """Write a report of each table that has finished runs."""
    results = load_results(args.results / f'{args.scale}.jsonl')
    folder = args.results / args.scale
    for table in tables:
        if not any(run.id in results for row in table.rows for run in row.runs):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        page = folder / f'{table.name}.md'
        text = report(table, results, args.scale)
        if FIGURES & set(table.show) and figure(table, results, page.with_suffix('.png')):
            text += f'\n![{table.title}]({page.stem}.png)\n'
        page.write_text(text)
        print(page)


def main() -> None:
    """Run the command line."""
    parser = ScriptParser(prog='experiments', description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True, parser_class=ScriptParser)
    for name, action in dict(run=run, list=list_tables, report=write_reports).items():
        command = commands.add_parser(name)
        known = table_names()
        command.add_argument(
            'tables', nargs='+' if name == 'run' else '*', metavar='TABLE', help=f'tables: {", ".join(known)}'
        )
        command.add_argument('--scale', default='cpu', help=f'scale: {", ".join(table_names(HERE / "scales"))}')
        command.add_argument(
            '--results', type=Path, default=RESULTS, metavar='DIR', help='folder of results and reports'
        )
        command.add_argument(
            '--seeds', type=positive_int, metavar='N', help='runs per row (default: as the scale says)'
        )
        command.set_defaults(action=action)
        if name == 'run':
            command.add_argument('--data', metavar='PATH', help='data set')
            command.add_argument('--work', type=Path, default=Path('output/experiments'), metavar='DIR')
            cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
            command.add_argument(
                '--jobs', type=positive_int, default=cores, metavar='N', help='number of parallel runs'
            )
            command.add_argument(
                '--minutes', type=positive_float, metavar='M', help='time limit; the next call resumes'
            )
            command.add_argument('--device', help='device, as for train.py')

    def run_command() -> None:
        args = parser.parse_args()
        tables = [load_table(name, args.scale, args.seeds or 0) for name in args.tables or table_names()]
        args.action(args, tables)

    run_script('experiments', run_command)


if __name__ == '__main__':
    main()
