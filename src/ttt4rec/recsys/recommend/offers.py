"""Recommendations written out: to the terminal, as lines of JSON, or as a table in a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TextIO

from ttt4rec.atomic_files import replacing
from ttt4rec.recsys.data import DataError, Id
from ttt4rec.recsys.recommend.recommender import Recommendations

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def table(
    users: Sequence[Id], results: Sequence[Recommendations], titles: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """Recommendations of many users in columns, of which ``pandas.DataFrame`` or ``polars.DataFrame`` makes a frame.

    Args:
        users: for whom, one a result.
        results: what ``Recommender.recommend(users=...)`` returned.
        titles: names of items by the texts of their ids.

    Returns:
        ``user_id``, ``rank`` from 1, ``item_id``, ``score``, ``source``, and with titles ``title``, None where there
        is none.
    """
    rows = [
        (user, rank, item, score, result.source)
        for user, result in zip(users, results, strict=True)
        for rank, (item, score) in enumerate(result.items, start=1)
    ]
    names = ("user_id", "rank", "item_id", "score", "source")
    columns: dict[str, list[Any]] = {name: [row[place] for row in rows] for place, name in enumerate(names)}
    if titles is not None:
        columns["title"] = [titles.get(str(item)) for item in columns["item_id"]]
    return columns


def as_json(result: Recommendations, titles: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A user's recommendations, as JSON has them."""
    items: list[dict[str, Any]] = [{"item": plain(item), "score": score} for item, score in result.items]
    if titles is not None:
        items = [entry | {"title": titles.get(str(entry["item"]))} for entry in items]
    return {"items": items, "unknown": [plain(item) for item in result.unknown], "source": result.source}


def plain(item: Id) -> str | int:
    """An id as JSON and tables have it."""
    return item if isinstance(item, str | int) else str(item)


class Sink(Protocol):
    """Takes the recommendations of some users."""

    def __call__(self, users: Sequence[Id], results: Sequence[Recommendations]) -> None:
        """Write them."""
        ...


class _Lines:
    """Lines of JSON, one a user."""

    def __init__(self, file: TextIO | None, titles: Mapping[str, str] | None, named: bool) -> None:
        self._file, self._titles, self._named = file, titles, named

    def __call__(self, users: Sequence[Id], results: Sequence[Recommendations]) -> None:
        for user, result in zip(users, results, strict=True):
            name = {"user": plain(user)} if self._named else {}
            print(json.dumps(name | as_json(result, self._titles)), file=self._file)


class _Delimited:
    """A row an item, beneath a header."""

    def __init__(self, file: TextIO, titles: Mapping[str, str] | None, separator: str) -> None:
        self._titles = titles
        self._writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        self._writer.writerow(table([], [], titles))

    def __call__(self, users: Sequence[Id], results: Sequence[Recommendations]) -> None:
        self._writer.writerows(zip(*table(users, results, self._titles).values(), strict=True))


class _Parquet:
    """As a table of Parquet, a group of rows a call; its columns have the types of the first call with rows."""

    def __init__(self, path: Path, titles: Mapping[str, str] | None) -> None:
        self._path, self._titles = path, titles
        self._writer: Any = None

    def __call__(self, users: Sequence[Id], results: Sequence[Recommendations]) -> None:
        import pyarrow as arrow
        from pyarrow import parquet

        columns = table([plain(user) for user in users], results, self._titles)
        columns["item_id"] = [plain(item) for item in columns["item_id"]]
        if not columns["rank"]:
            return
        content = arrow.table(columns, schema=None if self._writer is None else self._writer.schema)
        if self._writer is None:
            if self._titles is not None:  # the first ones may have none
                place = content.schema.get_field_index("title")
                content = content.set_column(place, "title", content.column("title").cast(arrow.string()))
            self._writer = parquet.ParquetWriter(self._path, content.schema)
        self._writer.write_table(content)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is None:
            raise DataError("--out must be .csv, .tsv or .jsonl where nobody gets a recommendation; given .parquet")
        self._writer.close()


@contextmanager
def sink(out: Path | None, titles: Mapping[str, str] | None, *, named: bool) -> Iterator[Sink]:
    """Where recommendations go: to a file, which is there when all is written, or as JSON lines to stdout.

    Args:
        out: the file, whose suffix says what it is; None: stdout.
        titles: names of items by the texts of their ids.
        named: whether lines on stdout name the user.

    Raises:
        DataError: the suffix is none that is known, or the folder is missing. OSError: the file cannot be written.
    """
    if out is None:
        yield _Lines(None, titles, named)
        return
    suffix = out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"--out must end in one of {', '.join(_SUFFIXES)}; given {str(out)!r}")
    if not out.parent.is_dir():
        raise DataError(f"--out must be in a folder that is there; given {str(out)!r}")
    with replacing(out) as partial:
        if suffix == ".parquet":
            rows = _Parquet(partial, titles)
            yield rows
            rows.close()
            return
        with partial.open("w", encoding="utf-8", newline="") as file:
            if suffix == ".jsonl":
                yield _Lines(file, titles, True)
            else:
                yield _Delimited(file, titles, "," if suffix == ".csv" else "\t")
