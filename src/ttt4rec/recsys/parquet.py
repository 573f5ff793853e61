"""Interactions read from Parquet files, batch by batch (needs the package ``pyarrow``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ttt4rec.recsys.data import Codes, DataError, IntArray, Interactions, TimeArray, join_times, report_problems

_ROWS_PER_BATCH = 1 << 17


def read_parquet(path: Path, user_field: str, item_field: str, time_field: str) -> Interactions:
    """Read three columns of a file; what stays in memory is 24 bytes a row and every id once.

    Ids are strings or integers, times integers, floats, dates or timestamps (in the file's unit).

    Raises:
        DataError: pyarrow is missing, the file is no Parquet file, or its columns or rows cannot be understood.
    """
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'{path}: expected the package pyarrow for Parquet files (pip install "ttt4rec[parquet]")'
        ) from error
    fields = {"user": user_field, "item": item_field, "time": time_field}
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, fields)
            return _read(path, file, fields)
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: expected a readable Parquet file, got: {reason}") from error


def _check_columns(path: Path, schema: Any, fields: dict[str, str]) -> None:
    from pyarrow import types

    for what, field in fields.items():
        if schema.names.count(field) != 1:
            given = ", ".join(schema.names)
            raise DataError(f"{path}: expected one column {field!r}, got {schema.names.count(field)} among {given}")
        kind = schema.field(field).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        text = types.is_string(plain) or types.is_large_string(plain)
        clock = types.is_floating(plain) or types.is_temporal(plain)
        if not (types.is_integer(plain) or (clock if what == "time" else text)):
            wanted = "numbers or timestamps" if what == "time" else "strings or integers"
            raise DataError(f"{path}: expected {wanted} in column {field!r}, got {kind}")


def _read(path: Path, file: Any, fields: dict[str, str]) -> Interactions:
    codes = {"user": Codes(), "item": Codes()}
    parts: dict[str, list[Any]] = {"user": [], "item": [], "time": []}
    problems: list[tuple[int, str]] = []
    row = 1
    for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=list(fields.values())):
        bad = np.zeros(batch.num_rows, dtype=bool)
        for what in codes:
            encoded, wrong = _encode(batch.column(fields[what]), codes[what])
            parts[what].append(encoded)
            bad |= wrong
        times, wrong = _times(batch.column(fields["time"]))
        parts["time"].append(times)
        bad |= wrong
        problems += [(row + i, "expected two ids and a finite time, got a blank") for i in np.flatnonzero(bad).tolist()]
        row += batch.num_rows
    report_problems(path, problems, "row")
    if not sum(map(len, parts["time"])):
        raise DataError(f"{path}: expected rows, got none")
    users, items = (np.concatenate(parts[what]) for what in codes)
    return Interactions(users, items, join_times(parts["time"]), tuple(codes["user"]), tuple(codes["item"]))


def _encode(column: Any, codes: Codes) -> tuple[IntArray, NDArray[np.bool_]]:
    """Codes of a batch's ids, and where an id is missing or blank."""
    from pyarrow import string

    encoded = column.cast(string()).dictionary_encode()
    names = encoded.dictionary.to_pylist()
    lookup = np.append(codes.encode(names), 0)  # the last stands for a missing id
    blank = np.array([not name.strip() for name in names] + [True], dtype=bool)
    places = encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    return lookup[places], blank[places]


def _times(column: Any) -> tuple[TimeArray, NDArray[np.bool_]]:
    from pyarrow import int32, int64, types

    missing = column.is_null().to_numpy(zero_copy_only=False)
    if types.is_floating(column.type):
        floats = column.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64)
        bad = missing | ~((floats >= -(2.0**63)) & (floats < 2.0**63))
        floats[bad] = 0
        whole = bool((floats == np.floor(floats)).all())
        return floats.astype(np.int64) if whole else floats, bad
    if types.is_date32(column.type) or types.is_time32(column.type):
        column = column.cast(int32())
    return column.cast(int64()).fill_null(0).to_numpy(zero_copy_only=False), missing
