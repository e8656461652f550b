"""Files of predictions that are written as the answers come, and continued after the process was killed."""

import contextlib
import csv
import importlib.util
import io
import itertools
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Sequence, Set

from ...errors import UserError, as_user_error, install_hint, one_line
from ...files import atomic_write
from ..claim import locked

__all__ = ['ENDINGS', 'OutputFile', 'check_other_parts', 'check_output', 'part_path', 'record_path']

ENDINGS = ('.csv', '.jsonl', '.parquet')
# rows per group of a Parquet file, which bounds the memory
ROWS = 10_000


def check_output(path: str) -> None:
    """Refuse a name of an output file whose format is unknown, or whose package is missing.

    Args:
        path: Path of the file.

    Raises:
        UserError: The file cannot be written in that format.
    """
    if Path(path).suffix not in ENDINGS:
        raise UserError(f'--output {path!r}: expected a file that ends in {", ".join(ENDINGS)}.')
    if Path(path).is_dir():
        raise UserError(f'--output {path!r}: expected a file, got a folder.')
    if Path(path).suffix == '.parquet' and importlib.util.find_spec('pyarrow') is None:
        raise UserError(f'--output {path!r} needs the package pyarrow; {install_hint("parquet")}.')


def part_path(path: str, rank: int, size: int) -> Path:
    """Path of the file that one of several processes writes.

    Args:
        path: Path as the user named it.
        rank: Rank of the process, from 0.
        size: Number of processes.
    """
    whole = Path(path)
    return whole if size == 1 else whole.with_name(f'{whole.stem}.{rank}-of-{size}{whole.suffix}')


def check_other_parts(path: str, size: int) -> None:
    """Refuse to write beside the parts of another number of processes, whose images would be labelled twice.

    Args:
        path: Path as the user named it.
        size: Number of processes.

    Raises:
        UserError: There are such parts.
    """
    whole = Path(path)
    pattern = re.compile(rf'{re.escape(whole.stem)}\.\d+-of-(\d+){re.escape(whole.suffix)}')
    found = {int(match[1]) for file in whole.parent.glob('*') if (match := pattern.fullmatch(file.name))}
    found |= {1} if whole.is_file() else set()
    if others := found - {size}:
        raise UserError(
            f'--output {path!r} was written by {min(others)} process(es), now there are {size}; start as many, or name '
            f'another file.'
        )


def record_path(path: Path) -> Path:
    """Path of the file beside an output file that tells how it was made."""
    return path.with_name(f'{path.name}.json')


class OutputFile:
    """Rows of predictions in a file, one per image.

    Rows are appended as lines of text, so that a killed process leaves at most one torn line, which is removed when the
    file is continued. Parquet files, whose end holds their index, are collected as lines beside the final path and
    converted at the end. Use it as a context manager: the file is locked for this process inside.

    Args:
        path: Path of the file, which ends in one of `ENDINGS`.
        kinds: Type per column, str, int or float; the first column, str, identifies the image, and ``exit`` is the
            number of an exit.
        settings: How the rows are made, as plain values; a file of other settings is not continued.
        resume: Whether an existing file is continued; a missing one is created.

    Attributes:
        done: First column of the rows in the file.
        exits: Number of rows per exit.

    Raises:
        UserError: On entry: the file exists and is not to be continued, was made by other settings, is in use, or
            cannot be written.
    """

    def __init__(self, path: Path, kinds: Dict[str, type], settings: Dict[str, Any], resume: bool):
        self.path = path
        self.kinds = kinds
        self.settings = json.loads(json.dumps(settings))
        self.resume = resume
        self.is_csv = path.suffix == '.csv'
        self.is_parquet = path.suffix == '.parquet'
        self.lines = path.with_name(f'.{path.name}.partial.jsonl') if self.is_parquet else path
        self.done: Set[str] = set()
        self.exits: Counter[int] = Counter()
        self._exit_column = list(kinds).index('exit')

    def __enter__(self) -> 'OutputFile':
        with contextlib.ExitStack() as stack:
            with as_user_error(f'--output {str(self.path)!r} cannot be written'):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.path.with_name(f'.{self.path.name}.lock'), self.path, '--output'))
            found = [str(path) for path in (self.path, self.lines, record_path(self.path)) if path.exists()]
            if found and not self.resume:
                raise UserError(
                    f'--output {str(self.path)!r}: {found[0]!r} exists; go on with --resume, or name another file.'
                )
            with as_user_error(f'--output {str(self.path)!r} cannot be continued'):
                if found:
                    self._check_record()
                    if self.path.exists() and self.is_parquet and not self.lines.exists():
                        with atomic_write(self.lines) as new:
                            _to_lines(self.path, new)
            with self._explained():
                if not found:
                    self.write_record(finished=False)
                self._file = os.open(self.lines, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                stack.callback(os.close, self._file)
                self._continue()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _check_record(self) -> None:
        """Refuse a file that was made by other settings, or by no mlcsd-predict."""
        record = record_path(self.path)
        try:
            found = json.loads(record.read_text(encoding='utf-8'))['settings']
            differing = [key for key in {**self.settings, **found} if found.get(key) != self.settings.get(key)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ValueError(
                f'{str(record)!r}, which tells how it was made, cannot be read ({one_line(e, 100)}); name another file.'
            ) from None
        if differing:
            key = differing[0]
            # a policy is too long to show
            values = [found.get(key), self.settings.get(key)]
            texts = ['another one' if isinstance(v, dict) else _short(v) for v in values]
            raise ValueError(
                f'it was made with {key} {texts[0]}, this would be {texts[1]}; use the same, or name another file.'
            )

    def _continue(self) -> None:
        """Read the first column of complete lines, and remove what follows them."""
        end, columns = 0, list(self.kinds)
        with open(self.lines, 'rb') as f:
            for number, line in enumerate(self._rows(f)):
                row = self._parsed(line)
                is_header = self.is_csv and number == 0
                if row is None and not f.read(1):
                    break  # torn by a kill
                if row is None or (is_header and row != columns):
                    raise UserError(
                        f'--output {str(self.path)!r} cannot be continued: its row {number + 1} is not one of these '
                        f'columns; name another file.'
                    )
                if not is_header:
                    self._count(row)
                end += len(line)
        os.truncate(self._file, end)
        if not end and self.is_csv:
            self._append([columns])

    def _rows(self, file: BinaryIO) -> Iterator[bytes]:
        """The rows of a file of lines; in CSV a quoted cell may have line breaks."""
        row = b''
        for line in file:
            row += line
            if not self.is_csv or row.count(b'"') % 2 == 0:
                yield row
                row = b''
        if row:
            yield row

    def _parsed(self, line: bytes) -> Optional[List[Any]]:
        """The cells of a row, [columns]; None if it is torn or not a row of these columns."""
        if not line.endswith(b'\n'):
            return None
        try:
            text = line.decode()
            if self.is_csv:
                cells: List[Any] = next(csv.reader(io.StringIO(text, newline=''), strict=True))
                return cells if len(cells) == len(self.kinds) else None
            row = json.loads(text)
            is_row = list(row) == list(self.kinds) and isinstance(next(iter(row.values())), str)
            return list(row.values()) if is_row else None
        except (ValueError, csv.Error, AttributeError, TypeError, StopIteration, RecursionError):
            return None

    def _count(self, row: Sequence[Any]) -> None:
        self.done.add(row[0])
        exit = row[self._exit_column]
        self.exits[int(exit) if str(exit).isdecimal() else exit] += 1

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        """Append rows.

        Args:
            rows: Values of the columns per image, [B][columns]; None for an unknown one.

        Raises:
            UserError: The file cannot be written.
        """
        self._append(rows)
        for row in rows:
            self._count(row)

    def _append(self, rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        if self.is_csv:
            text.writelines(map(_csv_line, rows))
        else:
            text.writelines(_json_line(dict(zip(self.kinds, row))) for row in rows)
        data = text.getvalue().encode()
        with self._explained():
            while data:
                data = data[os.write(self._file, data) :]

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f'--output {str(self.path)!r} cannot be written: {e.strerror}; nothing before is lost, go on with '
                f'--resume when there is room.'
            ) from None

    def write_record(self, finished: bool, **about: Any) -> None:
        """Write the record beside the file.

        Args:
            finished: Whether all images are answered.
            **about: Further entries, as plain values.

        Raises:
            UserError: It cannot be written.
        """
        text = json.dumps(dict(settings=self.settings, finished=finished, **about), indent=2, ensure_ascii=False)
        with self._explained(), atomic_write(record_path(self.path)) as new:
            new.write_text(text + '\n', encoding='utf-8')

    def finish(self, **about: Any) -> None:
        """Complete the file, and write its record.

        Args:
            **about: Further entries of the record, as plain values.

        Raises:
            UserError: It cannot be written.
        """
        if self.is_parquet:
            with self._explained(), atomic_write(self.path) as new:
                _to_parquet(self.lines, new, self.kinds)
        self.write_record(finished=True, **about)
        if self.is_parquet:
            self.lines.unlink()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f'{text[:100]} ...'


def _to_lines(path: Path, target: Path) -> None:
    """Write the rows of a Parquet file as lines."""
    import pyarrow.parquet

    with open(target, 'w', encoding='utf-8') as f, pyarrow.parquet.ParquetFile(path) as table:
        for batch in table.iter_batches(ROWS):
            f.writelines(_json_line(row) for row in batch.to_pylist())


def _csv_line(row: Sequence[Any]) -> str:
    text = io.StringIO()
    # earlier versions of Python quote a carriage return only if it is in the line terminator
    csv.writer(text, lineterminator='\r\n').writerow(row)
    return text.getvalue()[:-2] + '\n'


def _json_line(row: Dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + '\n'


def _to_parquet(lines: Path, target: Path, kinds: Dict[str, type]) -> None:
    """Write a Parquet file of the rows in a file of lines."""
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in kinds.items()])
    with open(lines, encoding='utf-8') as f, pyarrow.parquet.ParquetWriter(target, schema) as writer:
        for rows in iter(lambda: list(map(json.loads, itertools.islice(f, ROWS))), []):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
