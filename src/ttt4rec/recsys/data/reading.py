"""Interactions read from text files."""

from __future__ import annotations

import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ttt4rec.options import DataOptions
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.layout import SHOWN, Columns, Reader, find_columns, find_separator, read_rows
from ttt4rec.recsys.data.quick import read_quickly
from ttt4rec.recsys.data.rows import Codes, Problems, Rows
from ttt4rec.recsys.data.text import DataError, TextFile, long_fields
from ttt4rec.recsys.data.times import TimeChunk, Times

_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what the error handler surrogateescape makes of bytes
_ROWS_PER_CHUNK = 256  # few enough objects alive that the garbage collector stays out of the way

_Line = tuple[int, list[str] | csv.Error]
"""A row, or what is wrong with it, and the number of its last line."""


def read_interactions(
    path: str | os.PathLike[str],
    *,
    user_field: str = "user_id",
    item_field: str = "item_id",
    time_field: str = "timestamp",
    separator: str | None = None,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
    date_format: str | None = None,
    row_order: bool = False,
    skip_bad_rows: int = 0,
) -> Interactions:
    """Read a delimited text file, a Parquet file, or a folder of Parquet files.

    ``.parquet`` is told by its suffix, in either case. A folder's files are read one after the other, in the order of
    their paths; folders in it that are called ``name=value`` make a column. Text files may be packed, with ``.gz``
    behind their names.
    RecBole's atomic files (``.inter``, header ``name:type``) and ``.tsv`` have tabs between fields, ``.csv`` commas.
    Another of tab, comma, semicolon, ``|`` and ``::`` is taken if by it the first line has the three columns, or as
    many as ``columns``. Fields between commas and other characters may be quoted, fields between tabs or separators
    of several characters not. Blank lines are passed over, other columns ignored.

    Ids of text files are strings, Parquet files' are strings, whole numbers or UUIDs, coded in the order of their
    first appearance. Times are numbers, or moments such as 2010-10-19T23:55:27Z (UTC unless they say otherwise), which
    become seconds since 1970; a file has the one or the other. They are int64 when all of them are whole
    ("874965478.0" is) and float64 otherwise. Rows stay in the order of the file, on which histories fall back where
    times are equal.

    Args:
        path: of the file or folder.
        user_field: column of users' ids.
        item_field: column of items' ids.
        time_field: column of times.
        separator: between the fields of a text file; None: found out.
        columns: names of the columns of a text file without a header line.
        encoding: of a text file, such as latin-1.
        date_format: how times are written that are dates, as ``datetime.strptime`` takes it; None: as in ISO 8601.
        row_order: read no times, but number the rows.
        skip_bad_rows: the most rows to leave out because they cannot be understood; stderr says how many there were.

    Raises:
        DataError: the file or a column is missing, there are no rows, a row has more than 4 MiB, float64 would round a
            whole time that stands among fractions, or rows cannot be understood. The last one names the file, the
            first bad line, how many there are and where.
    """
    options = DataOptions(
        user_field, item_field, time_field, separator, tuple(columns or ()), encoding, date_format, row_order,
        skip_bad_rows,
    )  # fmt: skip
    return read_file(Path(path), options)


def read_file(path: Path, options: DataOptions) -> Interactions:
    """As ``read_interactions``."""
    if path.suffix.lower() == ".parquet" or path.is_dir():
        from ttt4rec.recsys.data.parquet import read_parquet

        return read_parquet(path, options)
    if not path.is_file():
        raise DataError(f"{path} must be a data file; it does not exist")
    try:
        return _read_text(path, options)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} must be a whole gzip file; given one that cannot be unpacked ({error})") from error
    except OSError as error:
        raise DataError(f"{path} must be a readable file; given {str(error.strerror or error)!r}") from error


def _read_text(path: Path, options: DataOptions) -> Interactions:
    with TextFile(path, encoding=options.encoding) as text, long_fields:
        try:
            first = text.lines.readline()
            separator = find_separator(path, first, options)
            reader = read_rows(chain([first] if first else [], text.lines), separator)
            header = list(options.columns)
            if not header:
                if not first.strip("\r\n"):
                    raise DataError(
                        f"{path} line 1 must be a header line; given an empty {'line' if first else 'file'}"
                    )
                header = next(reader)
            columns = find_columns(path, header, options)
            found = read_quickly(path, separator, columns, options)
            return _read_rows(path, text, reader, columns, options) if found is None else found
        except UnicodeError as error:
            raise _undecodable(path, options.encoding, error) from error
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} {_fault(error)}") from error


def _undecodable(path: Path, encoding: str, error: UnicodeError) -> DataError:
    """What to say of bytes that are no text of an encoding."""
    place, given = "", f"given {error}"
    if isinstance(error, UnicodeDecodeError):
        given = f"given byte {error.object[error.start]:#04x}"
        if encoding == "utf-8":
            place = f" line {_line_of_undecodable(path)}"
    name = encoding.upper() if encoding == "utf-8" else encoding
    return DataError(f"{path}{place} must be {name} text; {given}; name its encoding (--encoding), such as latin-1")


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


def _lines(reader: Reader) -> Iterator[_Line]:
    """Rows, with the numbers of their lines; the reader goes on behind a line that it cannot take."""
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, error
        else:
            if row:
                yield reader.line_num, row


class _TextRows(Rows):
    def __init__(self) -> None:
        super().__init__()
        self.user_codes, self.item_codes = Codes(), Codes()


def _read_rows(path: Path, text: TextFile, reader: Reader, columns: Columns, options: DataOptions) -> Interactions:
    rows, times = _TextRows(), Times(options.date_format)
    problems = Problems(path, "line", options.skip_bad_rows)
    lines = _lines(reader)
    read = 0
    while chunk := list(text.some(lines, _ROWS_PER_CHUNK)):
        good = [row for _, row in chunk if isinstance(row, list)]
        try:
            if len(good) < len(chunk):
                raise ValueError("a line that is no row")
            _add(rows, times, good, columns, read)
        except ValueError:
            good = []
            for line, row in chunk:
                what = _problem(row, columns, times)
                if what is None and isinstance(row, list):
                    good.append(row)
                else:
                    problems.add([(line, what or "")])
            if good and options.skip_bad_rows:
                _add(rows, times, good, columns, read)
        read += len(good)
    problems.report(read)
    if not read:
        raise DataError(f"{path} must have rows{'' if options.columns else ' after the header'}; given none")
    return rows.interactions(str(path), tuple(rows.user_codes), tuple(rows.item_codes))


def _add(rows: _TextRows, times: Times, chunk: list[list[str]], columns: Columns, read: int) -> None:
    """Add rows behind those that were read; ValueError when any of them is malformed."""
    by_column = list(zip(*chunk, strict=True))
    if len(by_column) != columns.width:
        raise ValueError("wrong number of fields")
    users, items = by_column[columns.user], by_column[columns.item]
    if not all(map(str.strip, users)) or not all(map(str.strip, items)):
        raise ValueError("empty id")
    if columns.time is None:
        found: TimeChunk = times.integers(np.arange(read, read + len(chunk)))
    else:
        found = times.texts(by_column[columns.time])
    rows.add(rows.user_codes.encode(users), rows.item_codes.encode(items), found)


def _problem(row: list[str] | csv.Error, columns: Columns, times: Times) -> str | None:
    """What is wrong with a row, or None."""
    if isinstance(row, csv.Error):
        return _fault(row)
    if len(row) != columns.width:
        return f"a row must have {columns.width} fields; given {len(row)}"
    for position, what in ((columns.user, "a user"), (columns.item, "an item")):
        if not row[position].strip():
            return f"field {position + 1} must be {what} id; given {row[position][:SHOWN]!r}"
    if columns.time is not None and (wanted := times.problem(row[columns.time])) is not None:
        return f"field {columns.time + 1} must be {wanted}; given {row[columns.time][:SHOWN]!r}"
    return None


def _fault(error: csv.Error) -> str:
    return f"must be delimited text; given a line with this fault: {error}"
