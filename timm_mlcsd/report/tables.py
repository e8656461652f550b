"""Tables for the terminal."""

from typing import Any, Sequence

from ..errors import printable

__all__ = ['format_table']


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table with aligned columns: text to the left, other values to the right, floats with two decimals.

    Args:
        headers: Titles of the columns.
        rows: Values, one row per line; None for an empty cell. Control characters in text are escaped.

    Returns:
        The table as lines of text.
    """
    cells = [[_text(v) for v in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    left = [all(isinstance(row[i], (str, type(None))) for row in rows) for i in range(len(headers))]
    lines = [
        '  '.join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(line, widths, left)).rstrip()
        for line in [list(headers), ['-' * w for w in widths], *cells]
    ]
    return '\n'.join(lines)


def _text(value: Any) -> str:
    if value is None:
        return ''
    return f'{value:.2f}' if isinstance(value, float) else printable(str(value))
