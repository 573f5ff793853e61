"""Times of interactions: numbers as they are, or moments, as seconds since 1970; a table has the one or the other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime, time, timezone
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from ttt4rec.recsys.data.interactions import IntArray, TimeArray
from ttt4rec.recsys.data.text import DataError

TimeChunk: TypeAlias = TimeArray | NDArray[np.object_]
"""Times of some rows: int64, float64, or Python's numbers where neither would hold them exactly."""

_DATE = re.compile(r"\s*\d{4}-\d\d-\d\d")
_FINER_THAN_MICROSECONDS = re.compile(r"\.\d{6}0*[1-9]")
_FRACTION = re.compile(r"\.(\d+)")
_OFFSET = re.compile(r"([T ][\d:.]+[+-]\d\d):?(\d\d)?$")
_KINDS = {False: "number", True: "date"}
_EXACT = 2**53  # float64 holds all whole numbers up to here


class Times:
    """Reads times chunk by chunk. What the first of them is, a number or a moment, all must be.

    Args:
        date_format: how texts are written that are moments, as ``datetime.strptime`` takes it; None: as in ISO 8601.
    """

    def __init__(self, date_format: str | None = None) -> None:
        self._format = date_format
        self._dates: bool | None = None  # whether they are moments; None before the first one

    def texts(self, column: Sequence[str]) -> TimeChunk:
        """Times of texts; ValueError when one is malformed, or not of the kind of those before."""
        if self._format is None and not any("_" in text for text in column):  # int() would take 1_000 for a number
            try:
                found = np.array(list(map(int, column)), dtype=np.int64)
            except (ValueError, OverflowError):
                pass
            else:
                return self.integers(found)
        return self._numbers([self._text(text) for text in column])

    def objects(self, column: Sequence[object]) -> TimeChunk:
        """Times of Python's numbers, dates, datetimes and texts; ValueError as for ``texts``."""
        types = set(map(type, column))
        if types == {int}:
            with suppress(OverflowError):
                return self.integers(np.array(column, dtype=np.int64))
        if types == {str}:
            return self.texts(cast(Sequence[str], column))
        return self._numbers([self._object(value) for value in column])

    def integers(self, column: IntArray) -> IntArray:
        """Whole numbers, int64."""
        self._expect(False)
        return column

    def floats(self, column: NDArray[np.float64]) -> TimeArray:
        """Numbers within int64's range, as int64 if all of them are whole."""
        self._expect(False)
        return column.astype(np.int64) if bool((column == np.floor(column)).all()) else column

    def moments(self, column: IntArray, per_second: int) -> TimeArray:
        """Moments that were counted in parts of a second since 1970."""
        self._expect(True)
        if not (column % per_second).any():
            return column // per_second
        return (column // max(1, per_second // 10**6)) / min(per_second, 10**6)

    def problem(self, value: object) -> str | None:
        """What a time must be, if a value is none; otherwise it counts as read."""
        try:
            self.objects([value])
        except ValueError:
            pass
        else:
            return None
        if self._format is not None and isinstance(value, str):
            return f"a date of the format {self._format!r} (--date-format)"
        try:
            Times(self._format).objects([value])
        except ValueError:
            return (
                "a time (a 64-bit number, below 2**52 if it has a fraction, or a date such as 2024-12-31T23:59:59, "
                "to microseconds; dates written otherwise need a date_format, --date-format)"
            )
        return f"a {_KINDS[bool(self._dates)]}, as the times before it are"

    def _expect(self, dates: bool) -> None:
        if self._dates is None:
            self._dates = dates
        if self._dates != dates:
            raise ValueError("numbers and dates")

    def _numbers(self, found: Sequence[tuple[int | float, bool]]) -> TimeChunk:
        kinds = {dates for _, dates in found}
        if len(kinds) > 1:
            raise ValueError("numbers and dates")
        for dates in kinds:
            self._expect(dates)
        numbers = [number for number, _ in found]
        if all(isinstance(number, int) for number in numbers):
            return np.array(numbers, dtype=np.int64)
        floats = np.array(numbers, dtype=np.float64)
        return floats if floats.tolist() == numbers else np.array(numbers, dtype=object)

    def _text(self, text: str) -> tuple[int | float, bool]:
        if self._format is not None:
            return _formatted(text.strip(), self._format), True
        if _DATE.match(text):
            if _FINER_THAN_MICROSECONDS.search(text):
                raise ValueError("a fraction that datetime cuts off")
            return _seconds(_moment(text.strip().replace("Z", "+00:00"))), True
        try:
            return _number(Decimal("" if "_" in text else text.strip())), False
        except InvalidOperation as error:
            raise ValueError("not a number") from error

    def _object(self, value: object) -> tuple[int | float, bool]:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, np.datetime64):
            whole = value.astype("datetime64[us]")
            value = whole if whole == value else None
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, datetime):
            if value != value or getattr(value, "nanosecond", False):  # what pandas has for a missing or a finer one
                raise ValueError("missing, or finer than microseconds")
            return _seconds(value), True
        if isinstance(value, date):
            return _seconds(datetime.combine(value, time())), True
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            raise ValueError("not a number")
        return (_number(Decimal(value)) if not isinstance(value, float) else _float(value)), False


def join_times(name: str, chunks: Sequence[TimeChunk]) -> TimeArray:
    """One array of float64; DataError for a whole time among fractions that float64 would round."""
    times: NDArray[np.float64] = np.concatenate(chunks, dtype=np.float64, casting="unsafe")
    for chunk in chunks:
        if chunk.dtype == np.int64 and bool((np.abs(chunk.astype(np.float64)) <= _EXACT).all()):
            continue
        for number in chunk.tolist() if chunk.dtype != np.float64 else ():
            if number != float(number):  # Python compares exactly; rounded times would tie with their neighbours
                fraction = times[times % 1 != 0][0]
                raise DataError(
                    f"{name}: times must be such as float64 holds exactly, as some are fractions "
                    f"({fraction}); given {number}"
                )
    return times


def _moment(text: str) -> datetime:
    """Of ISO 8601, in forms too that Python 3.10 does not take: any number of digits, offsets without a colon."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        text = _FRACTION.sub(lambda digits: f".{digits[1][:6]:0<6}", text)
        return datetime.fromisoformat(_OFFSET.sub(lambda parts: f"{parts[1]}:{parts[2] or '00'}", text))


def _number(number: Decimal) -> int | float:
    if not number.is_finite() or not -(2**63) <= number < 2**63:
        raise ValueError("not a finite number of 64 bits")
    if number == number.to_integral_value():
        return int(number)
    if abs(number) >= 2**52:
        raise ValueError("a fraction that float64 rounds away")
    return float(number)


def _float(number: float) -> int | float:
    if not -(2.0**63) <= number < 2.0**63:
        raise ValueError("not a finite number of 64 bits")
    return int(number) if number.is_integer() else number


def _seconds(moment: datetime) -> int | float:
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return int(seconds) if seconds.is_integer() else seconds


@lru_cache(1 << 16)  # strptime takes microseconds, and dates without a time of day are few
def _formatted(text: str, date_format: str) -> int | float:
    return _seconds(datetime.strptime(text, date_format))
