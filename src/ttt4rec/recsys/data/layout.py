"""How a text file is laid out: what separates its fields, and where the three that matter stand."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from ttt4rec.checks import printable
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data.text import DataError, is_packed

SHOWN = 200
"""Characters of what a file holds, in an error message."""

_OF_SUFFIX = {".inter": "\t", ".tsv": "\t", ".csv": ","}
SEPARATORS = ("\t", ",", ";", "|", "::")
"""What is tried where a file's first line does not have the fields by the separator of its suffix."""


class Reader(Protocol):
    """What ``csv.reader`` returns."""

    @property
    def line_num(self) -> int:
        """Lines read so far."""
        ...

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


class _Parts:
    """Lines cut at a separator of several characters, without quotes."""

    def __init__(self, lines: Iterable[str], separator: str) -> None:
        self._lines, self._separator = iter(lines), separator
        self.line_num = 0

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        line = next(self._lines).rstrip("\r\n")
        self.line_num += 1
        return line.split(self._separator) if line else []


def read_rows(lines: Iterable[str], separator: str) -> Reader:
    """The rows of lines. Fields may be quoted, except between tabs or separators of several characters."""
    if len(separator) > 1:
        return _Parts(lines, separator)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    return csv.reader(lines, delimiter=separator, quoting=quoting, strict=True)


@dataclass(frozen=True)
class Columns:
    """Where the three fields stand in a row of ``width`` fields; time is None if the rows have none."""

    width: int
    user: int
    item: int
    time: int | None


def find_separator(path: Path, line: str, options: DataOptions) -> str:
    """The separator that is given or by which a file's first line has the fields asked for; else its suffix's.

    Raises:
        DataError: the suffix has none either.
    """
    if options.separator is not None:
        return options.separator
    own = own_separator(path)
    for separator in SEPARATORS if own is None else (own, *SEPARATORS):
        try:
            row = next(read_rows([line], separator), [])
        except csv.Error:
            continue
        if len(row) == len(options.columns) if options.columns else not _missing(row, options):
            return separator
    if own is None:
        known, names = ", ".join(_OF_SUFFIX), ", ".join(options.fields.values())
        raise DataError(
            f"{path} must have a suffix out of {known}, or its separator be named (--separator), or its first line "
            f"have the columns {names}; given {_suffix(path)!r} and {printable(line.strip(), 80)!r}"
        )
    return own


def own_separator(path: Path) -> str | None:
    """The separator that a file's suffix stands for, if it does for any."""
    return _OF_SUFFIX.get(_suffix(path).lower())


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if is_packed(path) else path).suffix


def find_columns(path: Path, header: Sequence[str], options: DataOptions) -> Columns:
    """Where the fields stand by the names of the columns; DataError if one is not there, or twice."""
    places = _places(header, options)
    is_row = any(name.strip().replace(".", "", 1).isdecimal() for name in header)
    advice = "give the names of a file without a header line by columns (--columns)" if is_row else None
    check_columns(f"{path} line 1", header, [len(found) for found in places], options, advice)
    user, item, *time = (found[0] for found in places)
    return Columns(len(header), user, item, time[0] if time else None)


def check_columns(
    name: str, header: Sequence[str], counts: Sequence[int], options: DataOptions, advice: str | None = None
) -> None:
    """DataError, which names all that are not, unless each of the columns to read is there once.

    Args:
        name: of the source.
        header: names of its columns.
        counts: how often each of the columns to read is among them.
        options: which these are.
        advice: what to do; None: name other columns.
    """
    wrong = [(*of, count) for of, count in zip(options.fields.items(), counts, strict=True) if count != 1]
    if not wrong:
        return
    wanted = " and ".join(f"one column {field!r}" for _, field, _ in wrong)
    given = printable(", ".join(header), SHOWN)
    if any(count for *_, count in wrong):
        given = f"{' and '.join(str(count) for *_, count in wrong)} among {given}"
    raise DataError(f"{name} must have {wanted}; given {given}; {advice or _advice([option for option, *_ in wrong])}")


def _advice(options: Sequence[str]) -> str:
    """What to do if columns are not there."""
    names = ", ".join(f"{option} (--{option.replace('_', '-')})" for option in options)
    text = f"name {'another one' if len(options) == 1 else 'others'} by {names}"
    rows = ", or take rows in their order by row_order (--row-order)"
    return text + (rows if "time_field" in options else "")


def _missing(header: Sequence[str], options: DataOptions) -> bool:
    return any(len(found) != 1 for found in _places(header, options))


def _places(header: Sequence[str], options: DataOptions) -> list[list[int]]:
    """Of each field all columns of its name, or else of its name before a colon, as RecBole writes them."""
    bare = [name.split(":")[0] for name in header]
    return [
        [place for place, name in enumerate(header if field in header else bare) if name == field]
        for field in options.fields.values()
    ]
