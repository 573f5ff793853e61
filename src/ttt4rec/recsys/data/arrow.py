"""Interactions from batches of Arrow (needs the package ``pyarrow``), as Parquet files and data frames give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.options import PER_SECOND, DataOptions
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.layout import advice_on_names
from ttt4rec.recsys.data.rows import Codes, Codes32, Problems, Rows
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.data.times import TimeChunk, Times

ROWS_PER_BATCH = 1 << 17

Mask = NDArray[np.bool_]


class ColumnTypeError(DataError):
    """A column has a type that neither ids nor times can have."""


def check_schema(name: str, schema: Any, options: DataOptions) -> None:
    """DataError unless the columns are there, once, and ColumnTypeError unless ids and times can have their types."""
    from pyarrow import types

    for option, field in options.fields.items():
        if schema.names.count(field) != 1:
            given = printable(", ".join(schema.names), 200)
            raise DataError(
                f"{name} must have one column {field!r}; given {schema.names.count(field)} among {given}; "
                f"{advice_on_names(option)}"
            )
        kind = schema.field(field).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        known = types.is_integer(plain) or _is_text(plain)
        if option == "time_field":
            clock = types.is_floating(plain) or types.is_timestamp(plain) or types.is_date(plain)
            wanted, known = "numbers, dates or timestamps", known or clock
        else:
            wanted, known = "strings, integers or UUIDs", known or _is_uuid(plain)
        if not known:
            raise ColumnTypeError(f"{name} must have {wanted} in column {field!r}; given {kind}")


def read_batches(
    name: str, place: str, batches: Iterable[Any], options: DataOptions, *, first: int = 1
) -> Interactions:
    """Interactions of record batches, whose schema ``check_schema`` has seen.

    Memory is taken for 16 bytes a row, at the end for 8 more, for every id, and for a few batches in pyarrow.

    Args:
        name: of the source, for messages.
        place: what its rows are called there.
        batches: read one after the other.
        options: how.
        first: number of the first row.

    Raises:
        DataError: there are no rows, or some cannot be understood. pyarrow's errors pass through.
    """
    rows, times = Rows(), Times(options.date_format)
    problems = Problems(name, place, options.skip_bad_rows)
    begin, read = first, 0
    for batch in _short(batches):
        users, items = (_named(name, place, begin, batch, field) for field in (options.user_field, options.item_field))
        found, bad = _read_times(batch, users.blank | items.blank, options, times, read)
        problems.add((begin + row, what) for row, what in sorted(bad.items()))
        if bad:
            good = _without(batch, list(bad))
            users, items = (_Ids(good.column(field)) for field in (options.user_field, options.item_field))
        rows.add(users.encode(rows.users), items.encode(rows.items), found)
        begin += batch.num_rows
        read += len(found)
    problems.report()
    if not read:
        raise DataError(f"{name} must have rows; given none")
    return rows.interactions(name)


def _short(batches: Iterable[Any]) -> Iterator[Any]:
    """The same rows in batches of a bounded number."""
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            yield batch.slice(start, ROWS_PER_BATCH)


def _without(batch: Any, rows: Sequence[int]) -> Any:
    import pyarrow as arrow

    keep = np.ones(batch.num_rows, dtype=bool)
    keep[rows] = False
    return batch.filter(arrow.array(keep))


class _Ids:
    """A column of ids: those that occur, in the order of their first appearance, and which each row has.

    Attributes:
        blank: rows whose id is missing or blank.
    """

    def __init__(self, column: Any) -> None:
        """UnicodeDecodeError if an id is not UTF-8."""
        from pyarrow import types

        if not types.is_dictionary(column.type):
            column = _plain(column).dictionary_encode()
        used = column.indices.drop_null().unique()
        self._names = _listed(column.dictionary.take(used))
        lookup = np.full(len(column.dictionary) + 1, len(self._names))  # the last stands for a missing id
        lookup[used.to_numpy(zero_copy_only=False)] = np.arange(len(self._names))
        indices = column.indices.fill_null(len(column.dictionary))
        self._places = lookup[indices.to_numpy(zero_copy_only=False).astype(np.int64)]
        empty = [name is None or (isinstance(name, str) and not name.strip()) for name in self._names]
        self.blank: Mask = np.array([*empty, True])[self._places]

    def encode(self, codes: Codes) -> Codes32:
        """Codes of all rows, none of which is blank."""
        found: Codes32 = codes.encode(self._names)[self._places]
        return found


def _named(name: str, place: str, begin: int, batch: Any, field: str) -> _Ids:
    column = batch.column(field)
    try:
        return _Ids(column)
    except UnicodeDecodeError as error:
        row, given = begin + _first_undecodable(column), f"byte {error.object[error.start]:#04x}"
        raise DataError(f"{name} {place} {row} must be UTF-8 text in column {field!r}; given {given}") from error


def _plain(column: Any) -> Any:
    """A column of a type that pyarrow can encode as a dictionary."""
    from pyarrow import string

    if _is_uuid(column.type):
        return column.storage
    return column.cast(string()) if _is_text(column.type) else column


def _listed(names: Any) -> list[Any]:
    from pyarrow import string, types

    if types.is_fixed_size_binary(names.type) or _is_uuid(names.type):
        raw = names.storage if _is_uuid(names.type) else names
        return [UUID(bytes=value) for value in raw.to_pylist()]
    listed: list[Any] = (names.cast(string()) if _is_text(names.type) else names).to_pylist()
    return listed


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")  # the last has no test in pyarrow 15


def _is_uuid(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.uuid"


def _first_undecodable(column: Any) -> int:
    """Place of the first string of a column that is not UTF-8, which pyarrow finds only when Python asks for it."""
    for place, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return place
    raise AssertionError("every string is UTF-8")


_BLANK = "a row must have two ids and a finite time; given a blank"


def _read_times(
    batch: Any, blank: Mask, options: DataOptions, times: Times, read: int
) -> tuple[TimeChunk, dict[int, str]]:
    """Times of the rows that are good in every respect, and what is wrong with the others."""
    from pyarrow import types

    if options.row_order:
        bad = {int(row): _BLANK for row in np.flatnonzero(blank)}
        return times.integers(np.arange(read, read + batch.num_rows - len(bad))), bad
    column = batch.column(options.time_field)
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    blank = blank | column.is_null().to_numpy(zero_copy_only=False)
    if _is_text(column.type):
        whole = _whole(column)
        if whole is None:
            return _texts(column.to_pylist(), blank, times)
        column = whole
    values, per_second = _numbers(column)
    if per_second is None and values.dtype == np.float64:
        blank |= ~((values >= -(2.0**63)) & (values < 2.0**63))
    bad = {int(row): _BLANK for row in np.flatnonzero(blank)}
    if per_second is not None and per_second > 10**6:
        fine = ~blank & (values % (per_second // 10**6) != 0)
        what = "a time must be to microseconds, or a number; given a date with nanoseconds"
        bad |= {int(row): what for row in np.flatnonzero(fine)}
        blank |= fine
    good = values[~blank]
    if per_second is not None:
        return times.moments(good.astype(np.int64), per_second), bad
    return (times.floats(good) if good.dtype == np.float64 else times.integers(good)), bad


def _numbers(column: Any) -> tuple[NDArray[Any], int | None]:
    """A column as int64 or float64, and how many of it make a second if they are moments."""
    from pyarrow import int32, int64, types

    kind = column.type
    if types.is_floating(kind):
        return column.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64), None
    per_second = None
    if types.is_temporal(kind):
        per_second = PER_SECOND["ms" if types.is_date64(kind) else "s" if types.is_date32(kind) else kind.unit]
    if types.is_date32(kind):
        return column.cast(int32()).cast(int64()).fill_null(0).to_numpy(zero_copy_only=False) * 86400, per_second
    return column.cast(int64()).fill_null(0).to_numpy(zero_copy_only=False), per_second


def _whole(column: Any) -> Any | None:
    """A column of texts as int64; None if one is no whole number, or if Python would not take it for one."""
    import pyarrow as arrow

    plain = column.cast(arrow.string())
    content = plain.buffers()[2]
    if content is not None and b"x" in content.to_pybytes().lower():  # 0x10 is sixteen in Arrow alone
        return None
    try:
        return plain.cast(arrow.int64())
    except arrow.ArrowInvalid:
        return None


def _texts(texts: list[str | None], blank: Mask, times: Times) -> tuple[TimeChunk, dict[int, str]]:
    good = [(row, text) for row, text in enumerate(texts) if text is not None and not blank[row]]
    bad = {int(row): _BLANK for row in np.flatnonzero(blank)}
    try:
        return times.texts([text for _, text in good]), bad
    except ValueError:
        wrong = {row: what for row, text in good if (what := times.problem(text)) is not None}
    kept = [text for row, text in good if row not in wrong]
    bad |= {row: f"a time must be {what}; given {printable(repr(texts[row]), 200)}" for row, what in wrong.items()}
    return times.texts(kept), bad
