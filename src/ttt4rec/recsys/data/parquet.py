"""Interactions read from Parquet files, batch by batch (needs the package ``pyarrow``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.recsys.data.interactions import IntArray, Interactions, TimeArray
from ttt4rec.recsys.data.rows import Codes, Problems
from ttt4rec.recsys.data.text import DataError

_ROWS_PER_BATCH, _BYTES_PER_BATCH = 1 << 17, 1 << 26


def read_parquet(path: Path, user_field: str, item_field: str, time_field: str) -> Interactions:
    """Read three columns of a file, batch by batch.

    Ids are strings or integers, times integers, floats, dates or timestamps (in the file's unit). Memory is taken
    for 24 bytes a row (at the end 9 more where times are floats), for every id, and for a few batches in pyarrow. Ids
    that repeat are unpacked once, so that a small file with long ids stays small.

    Raises:
        DataError: pyarrow is missing, the file is no Parquet file, or its columns or rows cannot be understood.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'{path}: the package pyarrow must be installed for Parquet files (pip install "ttt4rec[parquet]")'
        ) from error
    fields = {"user": user_field, "item": item_field, "time": time_field}
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, fields)
            size = _rows_per_batch(file.metadata)
        with parquet.ParquetFile(path, read_dictionary=[user_field, item_field]) as file:
            return _read(path, file, fields, size)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # whatever damaged bytes lead to
        reason = printable(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
        raise DataError(f"{path} must be a readable Parquet file; given one with this fault: {reason}") from error


def _check_columns(path: Path, schema: Any, fields: dict[str, str]) -> None:
    from pyarrow import types

    for what, field in fields.items():
        if schema.names.count(field) != 1:
            given = printable(", ".join(schema.names), 200)
            raise DataError(f"{path} must have one column {field!r}; given {schema.names.count(field)} among {given}")
        kind = schema.field(field).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        text = str(plain) in ("string", "large_string", "string_view")  # the last has no test in pyarrow 15
        clock = types.is_floating(plain) or types.is_temporal(plain)
        if not (types.is_integer(plain) or (clock if what == "time" else text)):
            wanted = "numbers or timestamps" if what == "time" else "strings or integers"
            raise DataError(f"{path} must have {wanted} in column {field!r}; given {kind}")


def _rows_per_batch(metadata: Any) -> int:
    """So many rows that a batch of them, before what repeats is packed, has a bounded number of bytes.

    It goes by the sizes of all columns: asked for one column's, pyarrow ends the process if the file is damaged.
    """
    most = _ROWS_PER_BATCH
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        most = min(most, _BYTES_PER_BATCH * group.num_rows // max(1, group.total_byte_size))
    return max(1, most)


def _read(path: Path, file: Any, fields: dict[str, str], size: int) -> Interactions:
    from pyarrow import types

    rows = file.metadata.num_rows
    if rows < 1:
        raise DataError(f"{path} must have rows; given none")
    codes = {"user": Codes(), "item": Codes()}
    encoded = {what: np.empty(rows, dtype=np.int64) for what in codes}
    floating = types.is_floating(file.schema_arrow.field(fields["time"]).type)
    times: TimeArray = np.empty(rows, dtype=np.float64 if floating else np.int64)
    problems = Problems(path, "row")
    start = 0
    for batch in file.iter_batches(batch_size=size, columns=list(fields.values())):
        here = slice(start, start + batch.num_rows)
        if here.stop > rows:
            raise DataError(f"{path} must have {rows} rows, as its metadata says; given more")
        bad = np.zeros(batch.num_rows, dtype=bool)
        for what in codes:
            column = batch.column(fields[what])
            try:
                encoded[what][here], wrong = _encode(column, codes[what])
            except UnicodeDecodeError as error:
                place, given = start + 1 + _first_undecodable(column), f"byte {error.object[error.start]:#04x}"
                raise DataError(
                    f"{path} row {place} must be UTF-8 text in column {fields[what]!r}; given {given}"
                ) from error
            bad |= wrong
        times[here], wrong = _times(batch.column(fields["time"]))
        bad |= wrong
        places = (start + 1 + np.flatnonzero(bad)).tolist()
        problems.add((place, "a row must have two ids and a finite time; given a blank") for place in places)
        start = here.stop
    problems.report()
    if start < rows:
        raise DataError(f"{path} must have {rows} rows, as its metadata says; given {start}")
    if floating and bool((times == np.floor(times)).all()):
        times = times.astype(np.int64)
    return Interactions(encoded["user"], encoded["item"], times, tuple(codes["user"]), tuple(codes["item"]))


def _encode(column: Any, codes: Codes) -> tuple[IntArray, NDArray[np.bool_]]:
    """Codes of a batch's ids, and where an id is missing or blank; UnicodeDecodeError if one is not UTF-8."""
    from pyarrow import string, types

    if not types.is_dictionary(column.type):
        column = column.cast(string()).dictionary_encode()
    used = column.indices.drop_null().unique()  # in the order of their first appearance
    names = [name or "" for name in column.dictionary.take(used).cast(string()).to_pylist()]
    numbers = used.to_numpy(zero_copy_only=False)
    lookup = np.zeros(len(column.dictionary) + 1, dtype=np.int64)  # the last stands for a missing id
    lookup[numbers] = codes.encode(names)
    blank = np.ones(len(lookup), dtype=bool)
    blank[numbers] = [not name.strip() for name in names]
    places = column.indices.fill_null(len(column.dictionary)).to_numpy(zero_copy_only=False).astype(np.int64)
    return lookup[places], blank[places]


def _first_undecodable(column: Any) -> int:
    """Place of the first string of a column that is not UTF-8, which pyarrow finds only when Python asks for it."""
    for place, value in enumerate(column):
        try:
            value.as_py()
        except UnicodeDecodeError:
            return place
    raise AssertionError("every string is UTF-8")


def _times(column: Any) -> tuple[TimeArray, NDArray[np.bool_]]:
    from pyarrow import int32, int64, types

    missing = column.is_null().to_numpy(zero_copy_only=False)
    if types.is_floating(column.type):
        floats = column.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64)
        bad = missing | ~((floats >= -(2.0**63)) & (floats < 2.0**63))
        return floats, bad
    if types.is_date32(column.type) or types.is_time32(column.type):
        column = column.cast(int32())
    return column.cast(int64()).fill_null(0).to_numpy(zero_copy_only=False), missing
