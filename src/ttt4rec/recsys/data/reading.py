"""Interactions read from text files."""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ttt4rec.checks import printable
from ttt4rec.recsys.data.interactions import IntArray, Interactions, TimeArray
from ttt4rec.recsys.data.rows import Codes, Problems
from ttt4rec.recsys.data.text import DataError, TextFile, is_packed, long_fields

_SEPARATORS = {".inter": "\t", ".tsv": "\t", ".csv": ","}
_DATE = re.compile(r"\s*\d{4}-\d\d-\d\d")
_FINER_THAN_MICROSECONDS = re.compile(r"\.\d{6}0*[1-9]")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what the error handler surrogateescape makes of bytes
_SHOWN = 200  # characters of what a file holds, in an error message
_ROWS_PER_CHUNK = 256  # few enough objects alive that the garbage collector stays out of the way


@dataclass(frozen=True)
class _Columns:
    """Where the three fields stand in a row of ``width`` fields."""

    width: int
    user: int
    item: int
    time: int


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    separator: str | None = None,
    columns: Sequence[str] | None = None,
) -> Interactions:
    """Read a delimited text file, or a Parquet file.

    RecBole atomic files (``.inter``, header ``name:type``), ``.tsv`` and ``.csv``, each also with ``.gz`` behind it,
    and ``.parquet`` are told apart by their suffix, in either case; another one needs ``separator``. Commas and other
    separators allow quoted fields, tabs do not. Blank lines are passed over, other columns ignored. The first line
    names the columns; of a text file that begins with its rows, ``columns`` does.

    Ids are strings, coded in the order of their first appearance. Times are numbers, or moments such as
    2010-10-19T23:55:27Z (UTC unless they say otherwise), which become seconds since 1970. They are int64 when all of
    them are whole ("874965478.0" is) and float64 otherwise. Rows stay in the order of the file, on which histories fall
    back where times are equal.

    Raises:
        DataError: no such file, no such column, no rows, rows that cannot be understood (it names the file, the first
            bad line, how many there are and where), a row of more than 4 MiB, or a whole time that float64, beside
            fractions, would round.
    """
    path = Path(path)
    if path.suffix.lower() == ".parquet":
        from ttt4rec.recsys.data.parquet import read_parquet

        return read_parquet(path, user_field, item_field, time_field)
    separator = _separator_of(path) if separator is None else separator
    if len(separator) != 1:
        raise DataError(f"separator must be one character; given {separator!r}")
    if not path.is_file():
        raise DataError(f"{path} must be a data file; given {'a directory' if path.is_dir() else 'nothing'}")
    try:
        return _read_text(path, separator, columns, (user_field, item_field, time_field))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} must be a whole gzip file; given one that cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"{path} must be a readable file; given {str(error.strerror or error)!r}") from error


def _read_text(path: Path, separator: str, columns: Sequence[str] | None, fields: tuple[str, str, str]) -> Interactions:
    with TextFile(path) as text, long_fields:
        quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
        reader = csv.reader(text.lines, delimiter=separator, quoting=quoting, strict=True)
        try:
            header = next(reader, None) if columns is None else list(columns)
            if not header:
                given = "an empty file" if header is None else "an empty line"
                raise DataError(f"{path} line 1 must be a header line; given {given}")
            return _read_rows(path, text, reader, _find_columns(path, header, *fields))
        except UnicodeDecodeError as error:
            place, given = f"line {_line_of_undecodable(path)}", f"byte {error.object[error.start]:#04x}"
            raise DataError(f"{path} {place} must be UTF-8 text; given {given}") from error
        except csv.Error as error:
            raise DataError(
                f"{path} line {reader.line_num} must be delimited text; given a line with this fault: {error}"
            ) from error


def _separator_of(path: Path) -> str:
    plain = path.with_suffix("") if is_packed(path) else path
    if plain.suffix.lower() not in _SEPARATORS:
        known = ", ".join(_SEPARATORS)
        raise DataError(f"{path} must have a suffix out of {known}, or its separator be named; given {plain.suffix!r}")
    return _SEPARATORS[plain.suffix.lower()]


def _line_of_undecodable(path: Path) -> int:
    """Number of the first line that is not UTF-8, in a file that has one.

    Read again for it: the text layer decodes whole blocks, so that when it fails, the lines before are not yet counted.
    """
    number = 0
    with TextFile(path, errors="surrogateescape") as text:
        while lines := list(text.some(text.lines, _ROWS_PER_CHUNK)):
            bad = [place for place, line in enumerate(lines, start=1) if _ESCAPED_BYTE.search(line)]
            if bad:
                return number + bad[0]
            number += len(lines)
    raise AssertionError("a line is not UTF-8")


def _find_columns(path: Path, header: list[str], user_field: str, item_field: str, time_field: str) -> _Columns:
    bare = [name.split(":")[0] for name in header]

    def find(field: str) -> int:
        names = header if field in header else bare
        if names.count(field) != 1:
            given = printable(", ".join(header), _SHOWN)
            raise DataError(f"{path} line 1 must have one column {field!r}; given {names.count(field)} among {given}")
        return names.index(field)

    return _Columns(len(header), find(user_field), find(item_field), find(time_field))


class _Reader(Protocol):
    """What ``csv.reader`` returns."""

    @property
    def line_num(self) -> int: ...

    def __iter__(self) -> Iterator[list[str]]: ...


def _read_rows(path: Path, text: TextFile, reader: _Reader, columns: _Columns) -> Interactions:
    user_codes, item_codes = Codes(), Codes()
    users: list[IntArray] = []
    items: list[IntArray] = []
    times: list[TimeArray | NDArray[np.object_]] = []
    problems = Problems(path, "line")
    while chunk := [(reader.line_num, row) for row in text.some(reader, _ROWS_PER_CHUNK)]:
        rows = [row for _, row in chunk if row]
        if not rows:
            continue
        try:
            user_column, item_column, time_column = _parse_chunk(rows, columns)
        except ValueError:
            problems.add((line, what) for line, row in chunk if row and (what := _problem(row, columns)))
            continue
        users.append(user_codes.encode(user_column))
        items.append(item_codes.encode(item_column))
        times.append(time_column)
    problems.report()
    if not users:
        raise DataError(f"{path} must have rows after the header; given none")
    return Interactions(
        np.concatenate(users),
        np.concatenate(items),
        _join_times(path, times),
        tuple(user_codes),
        tuple(item_codes),
    )


def _join_times(path: Path, chunks: Sequence[TimeArray | NDArray[np.object_]]) -> TimeArray:
    """One array, int64 if all chunks are; DataError for a whole time that float64, beside fractions, would round."""
    if all(chunk.dtype == np.int64 for chunk in chunks):
        return np.concatenate(chunks, dtype=np.int64)
    times: NDArray[np.float64] = np.concatenate(chunks, dtype=np.float64, casting="unsafe")
    for chunk in chunks:
        for time in chunk.tolist() if chunk.dtype != np.float64 else ():
            if time != float(time):  # Python compares the two exactly; rounded times would tie with their neighbours
                fraction = times[times % 1 != 0][0]
                raise DataError(
                    f"{path}: times must be such as float64 holds exactly, as some are fractions "
                    f"({fraction}); given {time}"
                )
    return times


def _parse_chunk(
    rows: list[list[str]], columns: _Columns
) -> tuple[tuple[str, ...], tuple[str, ...], TimeArray | NDArray[np.object_]]:
    """The user ids, item ids and times of some rows; ValueError when any of them is malformed."""
    by_column = list(zip(*rows, strict=True))
    if len(by_column) != columns.width:
        raise ValueError("wrong number of fields")
    users, items, times = (by_column[position] for position in (columns.user, columns.item, columns.time))
    if not all(map(str.strip, users)) or not all(map(str.strip, items)):
        raise ValueError("empty id")
    return users, items, _parse_times(times)


def _parse_times(column: Sequence[str]) -> TimeArray | NDArray[np.object_]:
    """Times as int64 or float64, or as Python's numbers where neither would hold them exactly."""
    if not any("_" in text for text in column):  # int() would take 1_000 for a number
        try:
            return np.array(list(map(int, column)), dtype=np.int64)
        except (ValueError, OverflowError):
            pass
    numbers = [_parse_time(text) for text in column]
    if all(isinstance(number, int) for number in numbers):
        return np.array(numbers, dtype=np.int64)
    floats = np.array(numbers, dtype=np.float64)
    return floats if floats.tolist() == numbers else np.array(numbers, dtype=object)


def _parse_time(text: str) -> int | float:
    if _DATE.match(text):
        if _FINER_THAN_MICROSECONDS.search(text):
            raise ValueError("a fraction that datetime cuts off")
        moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        return int(seconds) if seconds.is_integer() else seconds
    try:
        number = Decimal("" if "_" in text else text.strip())
    except InvalidOperation as error:
        raise ValueError("not a number") from error
    if not number.is_finite() or not -(2**63) <= number < 2**63:
        raise ValueError("not a finite number of 64 bits")
    if number == number.to_integral_value():
        return int(number)
    if abs(number) >= 2**52:
        raise ValueError("a fraction that float64 rounds away")
    return float(number)


def _problem(row: list[str], columns: _Columns) -> str | None:
    """What is wrong with a row, or None."""
    if len(row) != columns.width:
        return f"a row must have {columns.width} fields; given {len(row)}"
    for position, what in ((columns.user, "a user"), (columns.item, "an item")):
        if not row[position].strip():
            return f"field {position + 1} must be {what} id; given {row[position][:_SHOWN]!r}"
    try:
        _parse_time(row[columns.time])
    except ValueError:
        wanted = "a time (a 64-bit number, below 2**52 if it has a fraction, or a date, to microseconds)"
        return f"field {columns.time + 1} must be {wanted}; given {row[columns.time][:_SHOWN]!r}"
    return None
