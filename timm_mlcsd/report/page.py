"""Self-contained HTML page about the early exits of a network."""

import importlib.resources
import json
from pathlib import Path
from typing import Any, Dict, Union

__all__ = ['write_page']


def write_page(path: Union[str, Path], data: Dict[str, Any]) -> None:
    """Write an HTML page with curves, exits, reliability diagrams, example images and a slider for the budget.

    Args:
        path: HTML file to write; it needs no other files and no network connection.
        data: JSON values by name: ``title``; ``about``; ``exits`` (names); ``backbone`` and, per exit, ``anytime``
            (``cost`` in MMACs, ``top1`` in percent, ``low`` and ``high``, its bounds); ``sweep`` (pairs of cost and
            top1); ``policies`` (the same and ``fractions``, ``thresholds``, ``certificate`` or null), sorted by cost;
            ``chosen`` (index of a policy); ``speed`` (rows of name, adaptive, backbone); ``reliability`` (per exit
            ``before`` and ``ece`` in percent, and ``bins``: lower bound, upper bound, accuracy, share); ``pictures``
            (``src``; ``truth``; ``group``, first or last; ``says``, label and probability per exit; ``leaves``, exit
            under each policy); optional ``against`` (networks without early exits: ``name``, ``mmacs``, ``top1``).
    """
    template = importlib.resources.files(__package__).joinpath('page.html').read_text(encoding='utf-8')
    # a `</` in the data would end the script element
    content = json.dumps(data).replace('<', '\\u003c')
    Path(path).write_text(template.replace('"__DATA__"', content), encoding='utf-8')
