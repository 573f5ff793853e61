"""What is known of items, read from a file or from a table in memory: an id and named columns a row."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import math
import numbers
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data.ids import Id
from ttt4rec.recsys.data.layout import SEPARATORS, own_separator, read_rows
from ttt4rec.recsys.data.text import DataError, TextFile, long_fields

Dense: TypeAlias = NDArray[np.float64]
"""Numbers or vectors ``[n, d]``; a row of NaN where one is missing."""
Categories: TypeAlias = list[tuple[str, ...]]
"""Values of each row, none where they are missing."""

_ROWS_AT_ONCE = 4096
_SEVERAL = "|"  # between the values of one field of a text file
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """Features of items.

    Attributes:
        name: of the source, for messages.
        ids: of the items, all different.
        columns: by name.
    """

    name: str
    ids: tuple[Id, ...]
    columns: Mapping[str, Dense | Categories]


def read_item_features(
    source: object, *, item_field: str = "item_id", columns: Sequence[str] | None = None, encoding: str = "utf-8"
) -> FeatureTable:
    """Read features of items.

    A column of numbers is one number an item; of lists of numbers, all of one length, a vector; of texts, a category;
    of lists of texts, a category with several values. A missing or blank value is allowed. In a text file a column
    whose fields are all numbers is one of numbers. A field in brackets is a list as JSON has it, and ``a|b`` has the
    values a and b. RecBole's header ``name:type`` says the type.

    Args:
        source: the path of a ``.csv``, ``.tsv``, ``.item``, ``.jsonl`` (also ``.gz``) or ``.parquet`` file; or a data
            frame, an Arrow table, a mapping of columns, or an iterable of mappings.
        item_field: column of items' ids.
        columns: read these; None: all.
        encoding: of a text file.

    Raises:
        DataError: the file or a column is missing, an item or a column's name occurs twice, or a value cannot be
            understood; it names item and column.
        ValueError: Python does not know the encoding.
    """
    if isinstance(columns, str):
        raise DataError(f"columns must be several names; given the text {columns!r}")
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        encoding = DataOptions(encoding=encoding).encoding
        found = _read_file(Path(source), item_field, columns, encoding)
    else:
        name = type(source).__name__
        found = _columns_of(name, source)
    wanted = [item_field, *(columns or (field for field in found if field != item_field))]
    for field in wanted:
        if field not in found:
            given = printable(", ".join(map(str, found)), 200)
            advice = "; name the column of items' ids by item_field (--item-field)" if field == item_field else ""
            raise DataError(f"{name} must have a column {field!r}; given {given}{advice}")
    lengths = {field: len(found[field]) for field in wanted}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name} must have columns of one length; given {lengths}")
    ids = _ids(name, item_field, found[item_field])
    if not ids:
        raise DataError(f"{name} must have rows; given none")
    return FeatureTable(name, ids, {field: _column(name, field, found[field], ids) for field in wanted[1:]})


def _ids(name: str, field: str, values: Sequence[Any]) -> tuple[Id, ...]:
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    seen: dict[Id, int] = {}
    for row, value in enumerate(plain):
        kind = next(
            (kind for kind in (str, int, UUID) if isinstance(value, kind) and not isinstance(value, bool)), None
        )
        if kind is None or (kind is str and not value.strip()):
            raise DataError(
                f"{name} row {row} must have an id in {field!r}, a text, whole number or UUID; given {value!r}"
            )
        if value in seen:
            raise DataError(f"{name} must have one row for each item; given {value!r} in rows {seen[value]} and {row}")
        seen[value] = row
    if len({type(value) for value in plain}) > 1:
        raise DataError(
            f"{name} must have ids of one type in {field!r}; given {sorted({type(x).__name__ for x in plain})}"
        )
    return tuple(plain)


def _column(name: str, field: str, values: Any, ids: Sequence[Id]) -> Dense | Categories:
    """A column as numbers or categories."""
    values = _stacked(values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf" and values.ndim in (1, 2):
        dense: Dense = values.astype(np.float64).reshape(len(ids), -1)
    else:
        plain = [_value(x) for x in values]
        there = [x for x in plain if x is not None]
        texts = [
            all(isinstance(x, str) for x in row) if isinstance(row, list) else isinstance(row, str) for row in there
        ]
        if there and all(texts):
            return [() if x is None else tuple(dict.fromkeys(x if isinstance(x, list) else [x])) for x in plain]
        width = max((len(x) if isinstance(x, list) else 1 for x in there), default=1)
        dense = np.full((len(ids), width), np.nan)
        for row, (item, value) in enumerate(zip(ids, plain, strict=True)):
            numbers_of = value if isinstance(value, list) else [value]
            if value is None:
                continue
            if not all(isinstance(x, float) for x in numbers_of):
                shown = printable(repr(values[row]), 80)
                raise DataError(
                    f"{name}: {field!r} of item {item!r} must be a number, a text, or a list of the one or the other, "
                    f"as in other rows; given {shown}"
                )
            if len(numbers_of) != width:
                raise DataError(
                    f"{name}: {field!r} of item {item!r} must have {width} numbers; given {len(numbers_of)}"
                )
            dense[row] = numbers_of
    lost = np.isnan(dense).any(1)
    wrong = np.flatnonzero(np.isinf(dense).any(1) | (lost & ~np.isnan(dense).all(1)))
    if len(wrong):
        raise DataError(
            f"{name}: {field!r} of item {ids[wrong[0]]!r} must be finite; given {dense[wrong[0]][:5].tolist()}"
        )
    return dense


def _stacked(values: Any) -> Any:
    """Vectors of one length as a matrix, without an object for each of their numbers; other values as they are."""
    if not len(values) or not all(isinstance(x, list | tuple | np.ndarray) for x in values):
        return values
    try:
        matrix = np.array(list(values))
    except ValueError:  # of several lengths
        return values
    return matrix if matrix.dtype.kind in "biuf" and matrix.ndim == 2 and matrix.shape[1] else values


def _value(x: Any) -> Any:
    """A value as float, text or list of them; None for a missing one, and anything else as it is."""
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, str):
        return x.strip() or None
    if isinstance(x, numbers.Number) and not isinstance(x, complex):
        try:
            number = float(x)  # type: ignore[arg-type]
        except OverflowError:  # of a whole number, which has no bound
            number = math.inf
        return None if math.isnan(number) else number
    if isinstance(x, np.ndarray):
        x = x.tolist()
    elif hasattr(x, "to_list"):
        x = x.to_list()
    if isinstance(x, list | tuple | set | frozenset):
        parts = [_value(part) for part in (sorted(x, key=str) if isinstance(x, set | frozenset) else x)]
        there = [part for part in parts if part is not None]
        return (there if any(isinstance(part, str) for part in there) else parts) if there else None
    return None if x is None or type(x).__name__ in ("NAType", "NaTType") else x


def _columns_of(name: str, source: Any) -> dict[str, Any]:
    if hasattr(source, "collect") and hasattr(source, "collect_schema"):
        raise DataError(f"features must be in a frame that is computed; given {name}; give its .collect()")
    if isinstance(source, Mapping):
        for field, column in source.items():
            single = isinstance(column, np.ndarray) and column.ndim == 0
            if single or isinstance(column, str | bytes) or not isinstance(column, Iterable):
                raise DataError(f"{name} must have values of items in {field!r}; given {printable(repr(column), 80)}")
        return {
            str(field): column if isinstance(column, list | tuple | np.ndarray) else _listed(column)
            for field, column in source.items()
        }
    fields = getattr(source, "column_names", getattr(source, "columns", ()))
    twice = (
        [str(field) for field, count in Counter(fields).items() if count > 1] if isinstance(fields, Iterable) else []
    )
    if twice:
        raise DataError(f"{name} must name columns, each once; given {printable(', '.join(twice), 200)} several times")
    if hasattr(source, "column_names") and hasattr(source, "schema"):  # Arrow's tables, Hugging Face's datasets
        return _arrow_columns(source if hasattr(source, "column") else source.with_format("arrow")[:])
    if hasattr(source, "to_arrow"):  # polars, which without pyarrow goes by its columns
        with contextlib.suppress(ImportError):
            return _arrow_columns(source.to_arrow())
    if hasattr(source, "columns") and hasattr(source, "__getitem__"):
        return {str(field): _listed(source[field]) for field in source.columns}
    if isinstance(source, Iterable):
        return _by_name(name, "row", enumerate(source))
    raise DataError(f"features must be a path, a data frame, columns or rows by name; given {name}")


def _listed(column: Any) -> Any:
    array = np.asarray(column)
    return array if array.dtype.kind in "biuf" else list(column)


def _arrow_columns(table: Any) -> dict[str, Any]:
    """Columns of an Arrow table; vectors without making objects of their numbers."""
    from pyarrow import compute, types

    found: dict[str, Any] = {}
    for field in table.column_names:
        column = table.column(field).combine_chunks()
        kind = column.type
        nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
        numbers_of = kind.value_type if nested else kind
        plain = types.is_floating(numbers_of) or types.is_integer(numbers_of) or types.is_boolean(numbers_of)
        lengths = compute.list_value_length(column).unique().to_pylist() if nested else []
        if plain and not column.null_count and len(lengths) <= 1 and lengths != [0]:
            flat = (column.flatten() if nested else column).to_numpy(zero_copy_only=False)
            found[field] = flat.reshape(-1, *lengths)
        else:
            found[field] = column.to_pylist()
    return found


def _read_file(path: Path, item_field: str, columns: Sequence[str] | None, encoding: str) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(
            f"{path} must be a file of items' features; given {'a directory' if path.is_dir() else 'nothing'}"
        )
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    try:
        with TextFile(path, encoding=encoding) as text, long_fields:
            bare = path.with_suffix("") if path.suffix.lower() == ".gz" else path
            if bare.suffix.lower() in _LINES:
                return _read_lines(path, text)
            return _read_delimited(path, text, item_field, columns)
    except UnicodeError as error:
        raise DataError(f"{path} must be {encoding} text; name its encoding (--encoding), such as latin-1") from error
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} must be a whole text file with columns; given one with this fault: {error}") from error


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f'{path}: the package pyarrow must be installed for Parquet files (pip install "ttt4rec[parquet]")'
        ) from error
    try:
        return _arrow_columns(parquet.read_table(path))
    except (arrow.ArrowException, OSError) as error:
        reason = printable(str(error).splitlines()[0], 200) if str(error) else type(error).__name__
        raise DataError(f"{path} must be a readable Parquet file; given one with this fault: {reason}") from error


def _read_lines(path: Path, text: TextFile) -> dict[str, Any]:
    def rows() -> Iterator[tuple[int, Any]]:
        number = 0
        while lines := list(text.some(text.lines, _ROWS_AT_ONCE)):
            for line in lines:
                number += 1
                try:
                    if line.strip():
                        yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path} line {number} must be a JSON object; given {printable(line.strip(), 80)!r}"
                    ) from error

    return _by_name(str(path), "line", rows())


def _by_name(name: str, what: str, rows: Iterable[tuple[int, Any]]) -> dict[str, Any]:
    """Rows, mappings by name, as columns; a name that a row lacks is missing there."""
    read: list[Mapping[str, Any]] = []
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(
                f"{name} {what} {number} must be an item's features by name; given {printable(repr(row), 80)}"
            )
        read.append(row)
    names = dict.fromkeys(str(field) for row in read for field in row)
    return {field: [row.get(field) for row in read] for field in names}


def _read_delimited(path: Path, text: TextFile, item_field: str, wanted: Sequence[str] | None) -> dict[str, Any]:
    first = text.lines.readline()
    own = own_separator(path) or ("\t" if ".item" in path.suffixes else None)
    separator = next((x for x in (own, *SEPARATORS) if x is not None and x != _SEVERAL and x in first), own or ",")
    rows = read_rows(chain([first] if first else [], text.lines), separator)
    header = next(rows, [])
    names, kinds = [x.split(":")[0] for x in header], [x.partition(":")[2] for x in header]
    if not header or len(set(names)) < len(names):
        raise DataError(f"{path} line 1 must name columns, each once; given {printable(first.strip(), 80)!r}")
    columns: list[list[str]] = [[] for _ in header]
    numbered = ((rows.line_num, row) for row in rows if row)
    while chunk := list(text.some(numbered, _ROWS_AT_ONCE)):
        for line, row in chunk:
            if len(row) != len(header):
                raise DataError(f"{path} line {line}: a row must have {len(header)} fields; given {len(row)}")
            for column, value in zip(columns, row, strict=True):
                column.append(value.strip())
    return {
        name: column if name == item_field or name not in (wanted or names) else _typed(path, name, kind, column)
        for name, kind, column in zip(names, kinds, columns, strict=True)
    }


def _typed(path: Path, name: str, kind: str, texts: list[str]) -> list[Any]:
    """The fields of a text file's column as values, by the type in the header or by what all of them are."""
    if kind == "token":
        return list(texts)
    if kind.endswith("_seq"):
        return [[_as_number(part) if kind == "float_seq" else part for part in text.split()] for text in texts]
    there = [text for text in texts if text]
    if there and all(text.startswith("[") for text in there):
        return [_as_list(path, name, text) if text else None for text in texts]
    values = [_as_number(text) for text in texts]
    odd = [value for value in values if isinstance(value, str) and value]
    if kind == "float" or len(odd) * 2 < len(there):
        if odd:
            raise DataError(
                f"{path}: {name!r} must be a number, as in most rows; given {printable(odd[0], 80)!r}; leave blank "
                f"what is not known, or call the column {name}:token if its numbers are names"
            )
        return values
    return [text.split(_SEVERAL) for text in texts]


def _as_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _as_list(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: {name!r} must have lists as JSON has them, or values as in a|b; given {printable(text, 80)!r}"
        ) from error
