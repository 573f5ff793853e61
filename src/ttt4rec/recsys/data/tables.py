"""Interactions from what is in memory: data frames, Arrow tables, Hugging Face datasets, columns or rows of Python.

No library of data frames is imported. What speaks Arrow is read through pyarrow where it is installed, a batch at a
time; anything else, column by column or row by row, as objects of Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from uuid import UUID

import numpy as np

from ttt4rec.checks import printable
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data.ids import Id, name_of
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.layout import check_columns
from ttt4rec.recsys.data.rows import Codes, Codes32, Problems, Rows
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.data.times import TimeChunk, Times

_ROWS_AT_ONCE = 1 << 16

_Columns = list[Sequence[Any]]
"""Users, items and, unless rows stand in their order, times of some rows."""


def read_table(source: object, options: DataOptions) -> Interactions:
    """Interactions of a table or of rows that are in memory.

    Raises:
        DataError: it is nothing of the kind, lacks a column, has no rows, or some cannot be understood; the first row's
            position is 0.
    """
    name = type(source).__name__
    speaks = hasattr(source, "__arrow_c_stream__") or _is_dataset(source)
    if speaks and (found := _by_arrow(name, source, options)) is not None:
        return found
    if hasattr(source, "collect") and hasattr(source, "collect_schema"):
        raise DataError(f"data must be a frame that is computed; given {name}; give its .collect()")
    if isinstance(source, Mapping) or _has_columns(source):
        return _read(name, _sliced(name, source, options), options)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return _read(name, _transposed(name, iter(source), options), options)
    raise DataError(f"data must be a path, a name, a data frame, columns or rows; given {name}")


def _has_columns(source: object) -> bool:
    return hasattr(source, "columns") and hasattr(source, "__getitem__")


def _is_dataset(source: object) -> bool:
    """Whether something is a Hugging Face dataset, streamed or not."""
    return hasattr(source, "with_format") and hasattr(source, "iter")


def _by_arrow(name: str, source: Any, options: DataOptions) -> Interactions | None:
    """None if pyarrow is not there, or cannot take the values: as objects they are read, or refused with a reason."""
    try:
        import pyarrow as arrow
    except ImportError:
        return None
    from ttt4rec.recsys.data import arrow as reading

    fields = list(options.fields.values())
    if hasattr(source, "loc") and _has_columns(source):
        if any(list(source.columns).count(field) != 1 for field in fields):
            return None
        source = source.loc[:, fields]  # pandas would convert all columns
        if any(source[field].dtype == object for field in fields[2:]):
            return None  # of dates and numbers pyarrow would make dates
    try:
        if _is_dataset(source):
            tables = source.with_format("arrow").iter(reading.ROWS_PER_BATCH)
            batches = (batch for table in tables for batch in table.to_batches())
        else:
            batches = iter(arrow.RecordBatchReader.from_stream(source))
        first = next(batches, None)
        if first is None:
            raise DataError(f"{name} must have rows; given none")
        reading.check_schema(name, first.schema, options)
        return reading.read_batches(name, "position", _all(first, batches), options, first=0)
    except (arrow.ArrowException, reading.ColumnTypeError) as error:
        if _has_columns(source):
            return None
        raise (
            error
            if isinstance(error, DataError)
            else DataError(f"{name} must be a table that pyarrow can read; given one with this fault: {_shown(error)}")
        ) from error


def _all(first: Any, others: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from others


def _sliced(name: str, table: Any, options: DataOptions) -> Iterator[_Columns]:
    """The columns of a table, piece by piece."""
    names = list(table if isinstance(table, Mapping) else getattr(table, "column_names", table.columns))
    check_columns(name, [str(x) for x in names], [names.count(field) for field in options.fields.values()], options)
    columns = [table[field] for field in options.fields.values()]
    whole = [column if isinstance(column, list | tuple) else np.asarray(column) for column in columns]
    lengths = {field: len(column) for field, column in zip(options.fields.values(), whole, strict=True)}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name} must have columns of one length; given {lengths}")
    for start in range(0, len(whole[0]), _ROWS_AT_ONCE):
        yield [_objects(column[start : start + _ROWS_AT_ONCE]) for column in whole]


def _objects(column: Any) -> Sequence[Any]:
    if isinstance(column, np.ndarray) and column.dtype.kind != "M":
        listed: list[Any] = column.tolist()
        return listed
    return list(column)  # moments stay NumPy's: as Python's own, nanoseconds would be bare numbers


def _transposed(name: str, rows: Iterator[Any], options: DataOptions) -> Iterator[_Columns]:
    """Rows, tuples by position or mappings by name, as columns, piece by piece."""
    position, fields = 0, list(options.fields.values())
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        if all(isinstance(row, tuple | list) and len(row) >= len(fields) for row in chunk):
            position += len(chunk)
            yield list(zip(*(row[: len(fields)] for row in chunk), strict=True))
            continue
        columns: list[list[Any]] = [[] for _ in fields]
        for row in chunk:
            if isinstance(row, Mapping):
                values = [row.get(field) for field in fields]
            elif isinstance(row, Sequence) and not isinstance(row, str | bytes) and len(row) >= len(fields):
                values = list(row[: len(fields)])
            else:
                raise DataError(
                    f"{name} position {position} must be a tuple (user, item{'' if options.row_order else ', time'}) "
                    f"or a mapping of {', '.join(fields)}; given {_shown(row)}; rows without a time are read by "
                    "row_order=True"
                )
            position += 1
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        yield list(columns)


def _read(name: str, chunks: Iterable[_Columns], options: DataOptions) -> Interactions:
    rows, times = Rows(), Times(options.date_format)
    users, items = _Ids(options.user_field), _Ids(options.item_field)
    problems = Problems(name, "position", options.skip_bad_rows)
    begin = read = 0
    for columns in chunks:
        length = len(columns[0])
        bad = users.problems(columns[0]) | items.problems(columns[1])
        good = [row for row in range(length) if row not in bad] if bad else range(length)
        if options.row_order:
            found: TimeChunk = times.integers(np.arange(read, read + len(good)))
        else:
            found, wrong = _times([columns[2][row] for row in good] if bad else columns[2], times, options.time_field)
            bad |= {good[place]: what for place, what in wrong.items()}
            good = [row for row in good if row not in bad] if wrong else good
        problems.add((begin + row, bad[row]) for row in sorted(bad))
        taken = [[column[row] for row in good] if bad else column for column in columns[:2]]
        rows.add(users.encode(taken[0]), items.encode(taken[1]), found)
        begin += length
        read += len(found)
    problems.report(read)
    if not read:
        raise DataError(f"{name} must have rows; given none")
    return rows.interactions(name, *(tuple(column.codes) for column in (users, items)))


class _Ids:
    """The ids of a column, all of the type of the first.

    Attributes:
        codes: of the ids.
    """

    def __init__(self, field: str) -> None:
        self.codes = Codes()
        self._field = field
        self._kind: type[Id] | None = None

    def problems(self, column: Sequence[Any]) -> dict[int, str]:
        """Where something else stands."""
        types = set(map(type, column))
        if self._kind is not None and types == {self._kind} and (self._kind is not str or all(map(str.strip, column))):
            return {}
        return {row: what for row, value in enumerate(column) if (what := self._problem(value)) is not None}

    def encode(self, column: Sequence[Any]) -> Codes32:
        """Codes of ids."""
        kind = self._kind
        if kind is None or kind is UUID or set(map(type, column)) == {kind}:
            return self.codes.encode(column)
        return self.codes.encode([kind(value) for value in column])  # NumPy's numbers and texts

    def _problem(self, value: Any) -> str | None:
        kind = _kind(value)
        if kind is None or (kind is str and not value.strip()):
            return f"{self._field!r} must be an id (a text, a whole number or a UUID); given {_shown(value)}"
        if self._kind is None:
            self._kind = kind
        if kind is not self._kind:
            return f"{self._field!r} must be {name_of(self._kind)}, as the ids before it are; given {_shown(value)}"
        return None


def _kind(value: Any) -> type[Id] | None:
    if isinstance(value, str):
        return str
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int
    return UUID if isinstance(value, UUID) else None


def _times(column: Sequence[Any], times: Times, field: str) -> tuple[TimeChunk, dict[int, str]]:
    """Times of the rows that have one, and what is wrong with the others."""
    try:
        return times.objects(column), {}
    except ValueError:
        wrong = {row: what for row, value in enumerate(column) if (what := times.problem(value)) is not None}
    kept = [value for row, value in enumerate(column) if row not in wrong]
    return times.objects(kept), {
        row: f"{field!r} must be {what}; given {_shown(column[row])}" for row, what in wrong.items()
    }


def _shown(value: object) -> str:
    return printable(repr(value), 80)
