"""One self-contained page about a network that leaves early."""

import importlib.resources
import json
from pathlib import Path
from typing import Any, Dict, Union

__all__ = ['write_page']


def write_page(path: Union[str, Path], data: Dict[str, Any]) -> None:
    """Write a page to look at in a browser: curves, exits, reliability, pictures, and a slider for the budget.

    Args:
        path: HTML file to write; it needs nothing else, no network either.
        data: Plain values: ``title``, ``about``, ``exits`` (names), ``backbone`` (cost, top1), ``anytime`` and
            ``sweep`` (pairs of cost and top1), ``policies`` (cost, top1, fractions), ``chosen`` (which of them),
            ``speed`` (rows of name, adaptive, backbone), ``reliability`` (per exit ``before`` and ``ece`` in percent,
            and ``bins``: begin, end, accuracy, share), ``pictures`` (``src``, ``truth``, ``group``: first or last,
            ``says``: label and probability per exit, ``leaves``: exit under each policy).
    """
    template = importlib.resources.files(__package__).joinpath('page.html').read_text(encoding='utf-8')
    # inside a script element only `</` could end it early
    content = json.dumps(data).replace('<', '\\u003c')
    Path(path).write_text(template.replace('"__DATA__"', content), encoding='utf-8')
