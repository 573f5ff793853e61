"""Text files, packed or not, read with bounded memory, however long a line or large an unpacked file may be."""

from __future__ import annotations

import csv
import gzip
import io
import threading
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO, TypeVar

LONGEST_ROW = 1 << 22
"""Bytes of a line, or of a row that goes over several. Some more are let through, since files are read in blocks."""
_FULL = 1 << 20  # bytes read for one chunk of rows; whoever got them takes no more rows into it
_MOST = _FULL + LONGEST_ROW + (1 << 16)  # bytes read for one chunk, a row of the longest and blocks read ahead included
_BLOCK = 1 << 16

T = TypeVar("T")


class DataError(ValueError):
    """A mistake in the user's data or its location, told in one line."""


class TextFile:
    """A text file, unpacked if it is packed.

    Args:
        path: the file; one that ends in ``.gz`` is packed.
        errors: what becomes of bytes that are no text, as for ``open``.
        encoding: of the text; UTF-8 may begin with a mark of its byte order.

    Attributes:
        lines: the open file. Reading raises DataError when a row is longer than ``LONGEST_ROW``.
    """

    def __init__(self, path: Path, errors: str = "strict", encoding: str = "utf-8") -> None:
        self._bytes = _Metered(path, open_bytes(path))
        self.lines: TextIO = io.TextIOWrapper(
            self._bytes,  # type: ignore[type-var]
            encoding="utf-8-sig" if encoding == "utf-8" else encoding,
            errors=errors,
            newline="",
        )

    def __enter__(self) -> TextFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()

    def some(self, rows: Iterable[T], most: int) -> Iterator[T]:
        """The next rows of what is made of the lines: at most so many, and fewer if they are long."""
        source = self._bytes
        source.since = 0
        for row in islice(rows, most):
            yield row
            if source.since > _FULL:
                return


class _Metered(io.BufferedIOBase):
    """A file's bytes, of which no more than ``_MOST`` are read while ``since`` is not put to zero."""

    def __init__(self, path: Path, file: gzip.GzipFile | io.BufferedReader) -> None:
        self._path, self._file = path, file
        self._total = self.since = 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1, /) -> bytes:
        block = self._file.read1(size)
        self.since += len(block)
        self._total += len(block)
        if self.since > _MOST:
            raise DataError(
                f"{self._path} line {_line_at(self._path, self._total)}: a row must have at most {LONGEST_ROW:,} "
                "bytes; given a longer one (a line without an end, or a quote that is never closed)"
            )
        return block

    def close(self) -> None:
        self._file.close()
        super().close()


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is packed."""
    return path.suffix.lower() == ".gz"


def open_bytes(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """A file's bytes, unpacked."""
    return gzip.open(path, "rb") if is_packed(path) else path.open("rb")


def _line_at(path: Path, position: int) -> int:
    """Number of the line in which a byte stands; read again for it, since nobody else needs to count lines."""
    number, left, last = 1, position, b""
    with open_bytes(path) as file:
        while left and (block := file.read(min(left, _BLOCK))):
            left -= len(block)
            number += block.count(b"\n") + block.count(b"\r") - (last + block).count(b"\r\n")
            last = block[-1:]
    return number


class _LongFields:
    """While anybody is inside, ``csv`` takes fields of any length that a row may have.

    Its own limit, 131,072 characters, is one for the whole process, and counts for fields that nobody asked for too.
    """

    def __init__(self) -> None:
        self._lock, self._readers, self._before = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._readers:
                self._before = csv.field_size_limit()
                csv.field_size_limit(max(self._before, 2 * _MOST))
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                csv.field_size_limit(self._before)


long_fields = _LongFields()
