#!/usr/bin/env python3
"""Test timm's architectures as multi-exit networks, family by family, for docs/coverage.md.

For the smallest and one mid-size member of every family: can it be created, does the last exit equal the backbone bit
for bit, do all parameters get finite gradients from one training step, do the stages run one by one give the same
logits bit for bit, and does `forward_exits` compile without a graph break and export? Rows are appended to a JSON lines
file, from which a stopped run resumes.

    python benchmarks/coverage.py --rows docs/coverage.jsonl --table docs/coverage.md
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import time
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Callable, Dict, List

import timm
import torch
import torch.nn as nn

from timm_mlcsd import MLCSDLoss, create_multi_exit
from timm_mlcsd.models import MultiExitBackbone
from timm_mlcsd.report import format_table

LARGE = 384
CHECKS = ('last exit', 'trains', 'stages', 'compiles', 'exports')
ABOUT = """\
`benchmarks/coverage.py` writes this page. It tests two models of every timm family: the smallest one and the one in
the middle by size (encoders without a classifier, `..._enc`, are excluded). Each network is made by
`create_multi_exit(name)` without other settings (most of those for images larger than 384 at 224 or 240). *Last exit*:
in evaluation mode, its logits equal the backbone's bit for bit. *Trains*: one training step of all-for-all gives every
parameter a finite gradient. *Stages*: the stages, run one by one, give every exit's logits bit for bit, as a chain of
modules or as parts of the exported graph (column *How*). *Compiles*: `forward_exits` compiles into one graph
(aot_eager). *Exports*: `torch.export` of `forward_exits`."""


def members(family: str, count: int) -> List[str]:
    """List the smallest and the median member of a family by number of parameters.

    Encoders of vision-language models (``..._enc``), which have no classifier, are excluded.

    Args:
        family: Name of timm's module.
        count: Number of members, 1 or 2.

    Returns:
        Names of the members, the smallest first.
    """
    sizes = {}
    for name in timm.list_models(module=family):
        with torch.device('meta'):
            model = timm.create_model(name)
        if hasattr(model, 'get_classifier'):
            sizes[name] = sum(p.numel() for p in model.parameters())
    names = sorted(sizes, key=lambda name: (sizes[name], name))
    return list(dict.fromkeys([names[0], names[(len(names) - 1) // 2]]))[:count]


def check_in_process(name: str) -> Dict[str, Any]:
    """Run `check` in a new process, so that memory is released and a crash affects only one model."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['timm_mlcsd'])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(check, name).result()
    except BrokenProcessPool:
        return dict(model=name, made='its process was killed; out of memory?')


def make(name: str) -> MultiExitBackbone:
    """Create a network; one for large images is created for smaller ones if possible, to save time and memory."""
    for size in (224, 240) if max(timm.get_pretrained_cfg_value(name, 'input_size')) > LARGE else ():
        try:
            return create_multi_exit(name, num_classes=10, img_size=size)
        except (TypeError, ValueError):
            pass  # no img_size, or not this one
    return create_multi_exit(name, num_classes=10)


def check(name: str) -> Dict[str, Any]:
    """Run all checks on one architecture; the value of a check is True or the reason of the failure."""
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        model = make(name).eval()
    except Exception as e:
        return dict(model=name, made=_reason(e))
    row = dict(model=name, made=True, seconds_to_make=time.perf_counter() - start)
    row['params'] = sum(p.numel() for p in model.backbone.parameters())
    row.update(exits=model.num_exits, how='chain' if model.plan.is_chain else 'graph')
    images = torch.randn(2, *model.probe_size)
    checks = (_last_exit, _trains, _stages, _compiles, _exports)
    for column, run in zip(CHECKS, checks):
        row[column] = _attempt(run, model, images)
    return row


def _attempt(run: Callable, model: MultiExitBackbone, images: torch.Tensor) -> Any:
    try:
        return run(model, images)
    except Exception as e:
        return _reason(e)
    finally:
        model.zero_grad()
        model.eval()


def _reason(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


@torch.no_grad()
def _last_exit(model: MultiExitBackbone, images: torch.Tensor) -> Any:
    expected = model.backbone(images)
    same = torch.equal(model(images), expected) and torch.equal(model.forward_exits(images).logits[-1], expected)
    return same or 'other logits'


def _trains(model: MultiExitBackbone, images: torch.Tensor) -> Any:
    model.train()
    criterion = MLCSDLoss(model.num_exits, model.exit_feature_dim)
    criterion(model(images), torch.tensor([1, 2])).backward()
    named = (*model.named_parameters(), *criterion.named_parameters())
    bad = [n for n, p in named if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    return not bad or f'no finite gradient: {", ".join(bad[:3])}'


@torch.no_grad()
def _stages(model: MultiExitBackbone, images: torch.Tensor) -> Any:
    if not model.resumable:
        return model.why_not_resumable
    expected = model.forward_exits(images)
    stages = [z for _, z in model.iter_exits(images)]
    same = len(stages) == model.num_exits and all(torch.equal(z, y) for z, y in zip(stages, expected.logits))
    return same or 'other logits'


@torch.no_grad()
def _compiles(model: MultiExitBackbone, images: torch.Tensor) -> Any:
    torch.compiler.reset()
    output = torch.compile(model.forward_exits, backend='aot_eager', fullgraph=True)(images)
    for z, y in zip(output.logits, model.forward_exits(images).logits):
        torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-3)
    return True


@torch.no_grad()
def _exports(model: MultiExitBackbone, images: torch.Tensor) -> Any:
    output = torch.export.export(_Exits(model), (images,), strict=False).module()(images)
    for z, y in zip(output, model.forward_exits(images).logits):
        torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-3)
    return True


class _Exits(nn.Module):
    """Module for torch.export whose forward returns the logits of all exits."""

    def __init__(self, model: MultiExitBackbone):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Any:
        """Compute the logits of all exits."""
        return self.model.forward_exits(images).logits


def table(rows: List[Dict[str, Any]], families_known: List[str]) -> str:
    """Write the page with the results.

    Args:
        rows: Results of `check` with the family.
        families_known: Names of all families.

    Returns:
        The page as Markdown.
    """
    cells = [
        (
            row['family'],
            row['model'],
            f'{row.get("params", 0) / 1e6:.1f}',
            row.get('exits', ''),
            row.get('how', ''),
            *('yes' if row.get(c) is True else 'no' for c in ('made', *CHECKS)),
        )
        for row in rows
    ]
    header = ('Family', 'Model', 'M params', 'Exits', 'How', 'Made', *(c.capitalize() for c in CHECKS))
    lines = [f'| {" | ".join(map(str, r))} |' for r in (header, ['---'] * len(header), *cells)]
    exceptions = [
        f'- {row["model"]}, {c}: {row[c]}' for row in rows for c in ('made', *CHECKS) if c in row and row[c] is not True
    ]
    missing = [family for family in families_known if family not in {row['family'] for row in rows}]
    families = defaultdict(list)
    for row in rows:
        families[row['family']].append(row)
    counts = [
        (c, sum(all(r.get(c) is True for r in family) for family in families.values()), len(families))
        for c in ('made', *CHECKS)
    ]
    return '\n'.join(
        [
            '# Coverage',
            '',
            ABOUT,
            '',
            f'{datetime.date.today()}, timm {timm.__version__}, torch {torch.__version__}, Python '
            f'{platform.python_version()}, CPU.',
            '',
            format_table(('Check', 'Families', 'of'), counts).replace('\n', '\n    ').join(['    ', '']),
            '',
            *lines,
            '',
            '## Failures',
            '',
            *(exceptions or ['No exceptions.']),
            *(['', f'Not tried yet: {", ".join(missing)}.'] if missing else []),
            '',
        ]
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('families', nargs='*', help='families to test (default: all)')
    parser.add_argument('--members', type=int, default=2, choices=(1, 2), help='models per family')
    parser.add_argument(
        '--rows', type=Path, default=Path('output/coverage.jsonl'), help='file of results; existing rows are kept'
    )
    parser.add_argument('--table', type=Path, help='page to write')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    ours = {'registry', 'shufflenetv2'}  # modules of this package that register models
    known = sorted(set(timm.list_modules()) - ours)
    for family in args.families or known:
        done = {row['model'] for row in rows if row['family'] == family}
        if len(done) >= args.members:
            continue
        for name in members(family, args.members):
            if name in done:
                continue
            row = dict(family=family, **check_in_process(name))
            rows.append(row)
            with args.rows.open('a') as f:
                f.write(json.dumps(row) + '\n')
            problems = {c: row[c] for c in ('made', *CHECKS) if row.get(c, True) is not True}
            print(family, name, problems or 'all', flush=True)
    if args.table:
        args.table.write_text(table(sorted(rows, key=lambda row: (row['family'], row.get('params', 0))), known))


if __name__ == '__main__':
    main()
