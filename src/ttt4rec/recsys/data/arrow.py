"""Interactions from batches of Arrow (needs the package ``pyarrow``), as Parquet files and data frames give them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.options import PER_SECOND, DataOptions
from ttt4rec.recsys.data.ids import Id
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.layout import check_columns
from ttt4rec.recsys.data.rows import Codes32, Problems, Rows
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.data.times import TimeChunk, Times

ROWS_PER_BATCH = 1 << 17
_ROWS_PER_TABLE, _BYTES_PER_TABLE = 1 << 19, 1 << 26  # of batches that are encoded together

Mask = NDArray[np.bool_]


class ColumnTypeError(DataError):
    """A column has a type that neither ids nor times can have."""


def check_schema(name: str, schema: Any, options: DataOptions) -> None:
    """DataError unless the columns are there, once, and ColumnTypeError unless ids and times can have their types."""
    from pyarrow import types

    counts = [schema.names.count(field) for field in options.fields.values()]
    check_columns(name, schema.names, counts, options)
    for option, field in options.fields.items():
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


def kind(column_type: Any) -> str:
    """What a column is to its reader: one source's columns of a name are of one kind."""
    from pyarrow import types

    plain = column_type.value_type if types.is_dictionary(column_type) else column_type
    if types.is_temporal(plain):
        return "moments"
    if _is_uuid(plain):
        return "UUIDs"
    return "texts" if _is_text(plain) else "numbers"


def read_batches(
    name: str,
    place: str,
    batches: Iterable[Any],
    options: DataOptions,
    *,
    first: int = 1,
    locate: Callable[[int], str] | None = None,
) -> Interactions:
    """Interactions of record batches, whose schema ``check_schema`` has seen.

    Memory is taken for 16 bytes a row, at the end for 8 more, for every id, and for a few batches in pyarrow.

    Args:
        name: of the source, for messages.
        place: what its rows are called there.
        batches: read one after the other.
        options: how.
        first: number of the first row.
        locate: what a row is called in messages, by its number; None: by name, place and number.

    Raises:
        DataError: there are no rows, or some cannot be understood. pyarrow's errors pass through.
    """
    rows, times = Rows(), Times(options.date_format)
    fields = (options.user_field, options.item_field)
    encoders = [_Encoder(), _Encoder()]
    locate = locate or (lambda number: f"{name} {place} {number}")
    problems = Problems(name, place, options.skip_bad_rows, locate)
    begin, read = first, 0
    for table in _tables(batches, lambda: max(len(encoder.ids) for encoder in encoders)):
        coded = []
        for encoder, field in zip(encoders, fields, strict=True):
            try:
                coded.append(encoder.encode(table.column(field)))
            except UnicodeDecodeError as error:
                row = begin + _first_undecodable(table.column(field))
                given = f"in column {field!r}; given byte {error.object[error.start]:#04x}"
                raise DataError(f"{locate(row)} must be UTF-8 text {given}") from error
        found, bad = _read_times(table, (coded[0].codes < 0) | (coded[1].codes < 0), options, times, read)
        problems.add((begin + row, what) for row, what in sorted(bad.items()))
        begin += table.num_rows
        if not len(found):
            continue
        if bad:
            good = _without(table, list(bad))
            coded = [encoder.encode(good.column(field)) for encoder, field in zip(encoders, fields, strict=True)]
        for encoder, column in zip(encoders, coded, strict=True):
            encoder.take(column)
        rows.add(coded[0].codes, coded[1].codes, found)
        read += len(found)
    problems.report(read)
    if not read:
        raise DataError(f"{name} must have rows; given none")
    return rows.interactions(name, *(tuple(encoder.ids) for encoder in encoders))


def _tables(batches: Iterable[Any], known: Callable[[], int]) -> Iterator[Any]:
    """The same rows in tables of a bounded number of rows and bytes, or of as many rows as there are known ids."""
    import pyarrow as arrow

    group: list[Any] = []
    rows = size = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            group.append(batch.slice(start, ROWS_PER_BATCH))
            rows, size = rows + group[-1].num_rows, size + group[-1].nbytes
            if rows >= max(_ROWS_PER_TABLE, known()) or size >= _BYTES_PER_TABLE:
                yield arrow.Table.from_batches(group)
                group, rows, size = [], 0, 0
    if group:
        yield arrow.Table.from_batches(group)


def _without(table: Any, rows: Sequence[int]) -> Any:
    import pyarrow as arrow

    keep = np.ones(table.num_rows, dtype=bool)
    keep[rows] = False
    return table.filter(arrow.array(keep))


class _Coded(NamedTuple):
    """A column of ids as codes, -1 where one is missing or blank.

    Attributes:
        codes: of the rows.
        names: Arrow's array of the ids of all codes.
        new: the ones among them, as Python's objects, that were not there before.
    """

    codes: Codes32
    names: Any
    new: list[Any]


class _Encoder:
    """Codes 0, 1, 2, ... for the ids of a column, in the order of their first appearance.

    pyarrow gives them out: what it encodes is the ids that are known, and behind them a table's.
    """

    def __init__(self) -> None:
        self.ids: list[Id] = []
        self._names: Any = None

    def encode(self, column: Any) -> _Coded:
        """Codes of a table's column; UnicodeDecodeError if an id that is new is not UTF-8."""
        import pyarrow as arrow
        from pyarrow import types

        if not types.is_dictionary(column.type):
            return self._encode([_plain(chunk) for chunk in column.chunks])
        column = column.unify_dictionaries()
        dictionary = column.chunk(0).dictionary
        indices = arrow.chunked_array([chunk.indices for chunk in column.chunks])
        used = indices.drop_null().unique()
        names = self._encode([_plain(dictionary.take(used))])
        codes = np.full(len(dictionary) + 1, -1, dtype=np.int32)
        codes[used.to_numpy(zero_copy_only=False)] = names.codes
        return names._replace(codes=codes[indices.fill_null(len(dictionary)).to_numpy().astype(np.int64)])

    def take(self, coded: _Coded) -> None:
        """Know the ids of a column from now on."""
        self.ids += coded.new
        self._names = coded.names

    def _encode(self, chunks: list[Any]) -> _Coded:
        import pyarrow as arrow

        known = [] if self._names is None else [self._names]
        encoded = arrow.chunked_array(known + chunks).dictionary_encode()
        names = encoded.chunk(0).dictionary if encoded.num_chunks else chunks[0]
        new = _listed(names.slice(len(self.ids)))
        codes = [chunk.indices for chunk in encoded.chunks[len(known) :]]
        plain = [(x.fill_null(-1) if x.null_count else x).to_numpy() for x in codes]
        found: Codes32 = plain[0] if len(plain) == 1 else np.concatenate([np.empty(0, dtype=np.int32), *plain])
        texts = new and isinstance(new[0], str)
        blank = [len(self.ids) + place for place, x in enumerate(new) if not x.strip()] if texts else []
        if blank:
            found = np.where(np.isin(found, blank), np.int32(-1), found)
        return _Coded(found, names, new)


def _plain(column: Any) -> Any:
    """An array of a type that pyarrow can encode as a dictionary."""
    from pyarrow import string

    if _is_uuid(column.type):
        return column.storage
    return column.cast(string()) if _is_text(column.type) else column


def _listed(names: Any) -> list[Any]:
    from pyarrow import types

    if types.is_fixed_size_binary(names.type):
        return [UUID(bytes=value) for value in names.to_pylist()]
    listed: list[Any] = names.to_pylist()
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
    table: Any, blank: Mask, options: DataOptions, times: Times, read: int
) -> tuple[TimeChunk, dict[int, str]]:
    """Times of the rows that are good in every respect, and what is wrong with the others."""
    from pyarrow import types

    if options.row_order:
        bad = {int(row): _BLANK for row in np.flatnonzero(blank)}
        return times.integers(np.arange(read, read + table.num_rows - len(bad))), bad
    column = table.column(options.time_field)
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.combine_chunks()
    blank = blank | column.is_null().to_numpy(zero_copy_only=False)
    if _is_text(column.type):
        whole = _whole(column)
        if whole is None:
            return _texts(column.to_pylist(), blank, times, options.time_field)
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


def _texts(texts: list[str | None], blank: Mask, times: Times, field: str) -> tuple[TimeChunk, dict[int, str]]:
    good = [(row, text) for row, text in enumerate(texts) if text is not None and not blank[row]]
    bad = {int(row): _BLANK for row in np.flatnonzero(blank)}
    try:
        return times.texts([text for _, text in good]), bad
    except ValueError:
        wrong = {row: what for row, text in good if (what := times.problem(text)) is not None}
    kept = [text for row, text in good if row not in wrong]
    bad |= {row: f"{field!r} must be {what}; given {printable(repr(texts[row]), 200)}" for row, what in wrong.items()}
    return times.texts(kept), bad
