"""Interactions read from Parquet files, batch by batch (needs the package ``pyarrow``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ttt4rec.checks import printable
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data import arrow as reading
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.text import DataError

_BYTES_PER_BATCH = 1 << 26


def read_parquet(path: Path, options: DataOptions) -> Interactions:
    """Read three columns of a file, batch by batch.

    Ids are strings, integers or UUIDs; times integers, floats, dates, timestamps, or strings as in a text file. Ids
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
    try:
        with parquet.ParquetFile(path) as file:
            reading.check_schema(str(path), file.schema_arrow, options)
            size = _rows_per_batch(file.metadata)
        with parquet.ParquetFile(path, read_dictionary=[options.user_field, options.item_field]) as file:
            return reading.read_batches(str(path), "row", _batches(path, file, options, size), options)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # whatever damaged bytes lead to
        reason = printable(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
        raise DataError(f"{path} must be a readable Parquet file; given one with this fault: {reason}") from error


def _rows_per_batch(metadata: Any) -> int:
    """Rows of a batch, so few that it has a bounded number of bytes before what repeats is packed.

    It goes by the sizes of all columns: asked for one column's, pyarrow ends the process if the file is damaged.
    """
    most = reading.ROWS_PER_BATCH
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        most = min(most, _BYTES_PER_BATCH * group.num_rows // max(1, group.total_byte_size))
    return max(1, most)


def _batches(path: Path, file: Any, options: DataOptions, size: int) -> Iterator[Any]:
    """Batches of the file, which must have as many rows as it says: a damaged end loses none."""
    read, rows = 0, file.metadata.num_rows
    for batch in file.iter_batches(batch_size=size, columns=list(options.fields.values())):
        read += batch.num_rows
        yield batch
    if read != rows:
        raise DataError(f"{path} must have {rows} rows, as its metadata says; given {read}")
