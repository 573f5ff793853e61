"""Names of items, from a file of them."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from ttt4rec.options import DataOptions
from ttt4rec.recsys.data import Id
from ttt4rec.recsys.data.datasets import TITLES, cache_directory
from ttt4rec.recsys.data.layout import own_separator, read_rows
from ttt4rec.recsys.data.text import DataError, TextFile, long_fields

_SEPARATORS = ("::", "\t", "|", ";", ",")  # titles have commas
_IDS = ("item_id", "id", "movie_id", "movieid", "item", "product_id", "product", "sku", "asin", "parent_asin")
_TITLES = ("title", "name", "movie_title", "item_title", "product_title", "item_name")


def read_titles(path: Path, encoding: str = "utf-8") -> dict[str, str]:
    """Titles by the texts of items' ids.

    A text file, also with ``.gz``, as ``read_interactions`` takes it. If its first line names a column such as
    ``title``, that is read, with the ids of a column such as ``item_id`` or else of the first one. Otherwise the first
    two columns of all lines are. ``name:type``, as RecBole writes it, is ``name``.

    Raises:
        DataError: the file is not there, is no text of that encoding, or has fewer than two columns.
    """
    if str(path) in TITLES and not path.exists():
        path = TITLES[str(path)](cache_directory())
    titles: dict[str, str] = {}
    encoding = DataOptions(encoding=encoding).encoding
    try:
        with TextFile(path, encoding=encoding) as text, long_fields:
            first = text.lines.readline()
            separator = _separator(path, first)
            rows = read_rows(chain([first] if first else [], text.lines), separator)
            header = next(rows, [])
            places = _places(header)
            here = chain([header], rows) if places is None else rows
            item, title = places or (0, 1)
            while chunk := list(text.some(here, 4096)):
                titles |= {row[item].strip(): row[title].strip() for row in chunk if len(row) > max(item, title)}
    except UnicodeError as error:
        raise DataError(f"{path} must be {encoding} text; name its encoding (--encoding), such as latin-1") from error
    except (csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} must be a whole text file with columns; given one with this fault: {error}") from error
    if not titles:
        raise DataError(
            f"{path} must have a column of items' ids and one of titles; given the first line {first[:80]!r}"
        )
    return titles


def titles_for(path: Path, items: Iterable[Id], encoding: str = "utf-8") -> dict[str, str]:
    """``read_titles`` of a file that must have one for some of a model's items.

    Raises:
        DataError: as for ``read_titles``, or all titles are of other items.
    """
    titles, own = read_titles(path, encoding), [*map(str, items)]
    if titles.keys().isdisjoint(own):
        theirs, ours = (", ".join(repr(item[:40]) for item in [*ids][:3]) for ids in (titles, own))
        raise DataError(f"{path} must have titles of the model's items, such as {ours}; given titles of {theirs}")
    return titles


def _separator(path: Path, line: str) -> str:
    own = own_separator(path)
    for separator in _SEPARATORS if own is None else (own, *_SEPARATORS):
        if separator in line:
            return separator
    return own or ","


def _places(header: Sequence[str]) -> tuple[int, int] | None:
    """Where ids and titles stand by a header's names; None if it is none."""
    names = [name.split(":")[0].strip().lower() for name in header]
    found = [next((names.index(name) for name in known if name in names), None) for known in (_IDS, _TITLES)]
    item, title = found
    if title is None:
        return None
    return (0 if title else 1) if item is None else item, title
