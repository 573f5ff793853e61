"""Interactions read from Parquet files and folders of them, batch by batch (needs the package ``pyarrow``)."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ttt4rec.checks import printable
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data import arrow as reading
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.text import DataError

_BYTES_PER_BATCH = 1 << 26


def read_parquet(path: Path, options: DataOptions) -> Interactions:
    """Read three columns of a file, or of all the files of a folder, batch by batch.

    Ids are strings, integers or UUIDs; times integers, floats, dates, timestamps, or strings as in a text file. Ids
    that repeat are unpacked once, so that a small file with long ids stays small.

    The files of a folder are those that end in ``.parquet``, at any depth, in the order of their paths; what begins
    with a dot or an underscore is passed over. Folders that are called ``name=value`` are columns, as Hive, Spark and
    pyarrow write them.

    Raises:
        DataError: pyarrow is missing, there is no Parquet file, or its columns or rows cannot be understood.
    """
    try:
        import pyarrow as arrow
    except ImportError as error:
        raise DataError(
            f'{path}: the package pyarrow must be installed for Parquet files (pip install "ttt4rec[parquet]")'
        ) from error
    files = _Files(path, options)
    try:
        return reading.read_batches(str(path), "row", files.batches(), options, locate=files.locate)
    except (arrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:  # whatever damaged bytes lead to
        reason = printable(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
        raise DataError(
            f"{files.current} must be a readable Parquet file; given one with this fault: {reason}"
        ) from error


class _Files:
    """The rows of several files, one after the other.

    Attributes:
        current: the file that is being read.
    """

    def __init__(self, path: Path, options: DataOptions) -> None:
        self._root, self._options = path, options
        self._paths = _parquet_files(path) if path.is_dir() else [path]
        if not self._paths:
            raise DataError(f"{path} must be a data file, or a folder of Parquet files; given a folder without one")
        self.current = self._paths[0]
        self._ends: list[int] = []  # numbers of the last rows of the files that were begun, from 1 on
        self._kinds: tuple[str, ...] | None = None

    def batches(self) -> Iterator[Any]:
        """Of all files; DataError if one has columns unlike the first one's. pyarrow's errors pass through."""
        from pyarrow import parquet

        options = self._options
        for path in self._paths:
            self.current = path
            parts = _parts(path.relative_to(self._root).parent) if path != self._root else {}
            with parquet.ParquetFile(path) as file:
                schema = _with_parts(file.schema_arrow, parts)
                reading.check_schema(str(path), schema, options)
                self._check_kinds(schema)
                size, rows = _rows_per_batch(file.metadata), file.metadata.num_rows
                packed = [name for name in (options.user_field, options.item_field) if name in file.schema_arrow.names]
            self._ends.append((self._ends[-1] if self._ends else 0) + rows)
            with parquet.ParquetFile(path, read_dictionary=packed) as file:
                for batch in _batches(path, file, options, size, parts):
                    yield batch if len(self._paths) == 1 else _with_wide_ids(batch, options)

    def locate(self, row: int) -> str:
        """The file and the number there of one of all rows."""
        place = bisect.bisect_left(self._ends, row)
        return f"{self._paths[place]} row {row - (self._ends[place - 1] if place else 0)}"

    def _check_kinds(self, schema: Any) -> None:
        """Whole numbers are not texts, nor moments numbers; who mixed them wants to know."""
        found = tuple(reading.kind(schema.field(name).type) for name in self._options.fields.values())
        if self._kinds is not None and found != self._kinds:
            raise DataError(
                f"{self.current} must have columns like {self._paths[0]}, which are {', '.join(self._kinds)}; "
                f"given {', '.join(found)}"
            )
        self._kinds = found


def _parquet_files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() == ".parquet" and path.is_file())
    return sorted(path for path in found if not any(x[0] in "._" for x in path.relative_to(folder).parts))


def _parts(folder: Path) -> dict[str, str]:
    """Columns that the names of folders are."""
    return {unquote(name): unquote(value) for part in folder.parts for name, is_, value in [part.partition("=")] if is_}


def _with_parts(schema: Any, parts: dict[str, str]) -> Any:
    import pyarrow as arrow

    for name in parts.keys() - set(schema.names):
        schema = schema.append(arrow.field(name, arrow.string()))
    return schema


def _with_wide_ids(batch: Any, options: DataOptions) -> Any:
    """With whole numbers of one type, which they need not have in all files."""
    import pyarrow as arrow

    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        narrow = name != options.time_field and arrow.types.is_integer(column.type)
        columns[name] = column.cast(arrow.int64()) if narrow else column
    return arrow.RecordBatch.from_pydict(columns)


def _rows_per_batch(metadata: Any) -> int:
    """Rows of a batch, so few that it has a bounded number of bytes before what repeats is packed.

    It goes by the sizes of all columns: asked for one column's, pyarrow ends the process if the file is damaged.
    """
    most = reading.ROWS_PER_BATCH
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        most = min(most, _BYTES_PER_BATCH * group.num_rows // max(1, group.total_byte_size))
    return max(1, most)


def _batches(path: Path, file: Any, options: DataOptions, size: int, parts: dict[str, str]) -> Iterator[Any]:
    """Batches of the file, which must have as many rows as it says: a damaged end loses none."""
    import pyarrow as arrow

    fields = list(options.fields.values())
    read, rows = 0, file.metadata.num_rows
    columns = [name for name in fields if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=size, columns=columns):
        read += batch.num_rows
        named = dict(zip(batch.schema.names, batch.columns, strict=True))
        for name in set(fields) - set(columns):
            named[name] = arrow.repeat(arrow.scalar(parts[name]), batch.num_rows)
        yield arrow.RecordBatch.from_pydict({name: named[name] for name in fields})
    if read != rows:
        raise DataError(f"{path} must have {rows} rows, as its metadata says; given {read}")
