"""The public datasets of the TTT4Rec paper, as their publishers and as RecBole distribute them.

A file in the cache directory is used; otherwise it is fetched, where its publisher offers an address. Checksums are
compared where one is known to the public; of the other files the sha256 is written next to them at first use, and
compared from then on. The numbers of users, items and interactions are told, with the published ones if they differ.
"""

from __future__ import annotations

import http.client
import sys
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ttt4rec.atomic_files import file_digest, replacing
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.reading import read_interactions
from ttt4rec.recsys.data.text import DataError, TextFile


@dataclass(frozen=True)
class PublicDataset:
    """Where a dataset is and what it looks like; what the paper did with it.

    A text file may be there with ``.gz`` behind its name or without.

    Attributes:
        files: names of the publisher's file, which has no header line; what is fetched gets the first.
        source: where it is from.
        url: its address; None: it is to be fetched by hand.
        columns: names of its columns, among them user_id, item_id and timestamp.
        separator: between them.
        md5: of the first of ``files``; None: not known to the public.
        atomics: names of RecBole's file, used if the publisher's is not there.
        atomic_times: what its column of times may be called.
        published: users, items and interactions by the paper, before filtering.
        min_user: the paper's filter: interactions of a user; of an item at least 5.
        max_len: the paper's length of history.
    """

    files: tuple[str, ...]
    source: str
    url: str | None
    columns: tuple[str, ...]
    separator: str
    md5: str | None
    atomics: tuple[str, ...]
    published: tuple[int, int, int]
    min_user: int
    max_len: int
    atomic_times: tuple[str, ...] = ("timestamp",)


PUBLIC = {
    "gowalla": PublicDataset(
        files=("loc-gowalla_totalCheckins.txt.gz",),
        source="https://snap.stanford.edu/data/loc-gowalla.html",
        url="https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz",
        columns=("user_id", "timestamp", "latitude", "longitude", "item_id"),
        separator="\t",
        md5="8ebd5ed2dd376d8982987c49429cb9f9",
        atomics=("gowalla.inter", "gowalla-not-merged.inter", "gowalla-merged.inter"),
        published=(107_092, 1_280_969, 6_442_892),
        min_user=20,
        max_len=100,
    ),
    "twitch-100k": PublicDataset(
        files=("100k_a.csv", "100k.csv"),
        source="https://github.com/JRappaz/liverec",
        url=None,
        columns=("user_id", "item_id", "streamer", "timestamp", "stop"),
        separator=",",
        md5=None,
        atomics=("Twitch-100k.inter", "twitch-100k.inter"),
        published=(100_000, 739_991, 3_051_732),
        min_user=15,
        max_len=70,
        atomic_times=("timestamp", "time_start"),
    ),
    "amazon-video-games": PublicDataset(
        files=("ratings_Video_Games.csv",),
        source="https://snap.stanford.edu/data/amazon/productGraph/",
        url="https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/ratings_Video_Games.csv",
        columns=("user_id", "item_id", "rating", "timestamp"),
        separator=",",
        md5=None,
        atomics=("amazon-video-games.inter", "Amazon_Video_Games.inter"),
        published=(826_767, 50_210, 1_324_753),
        min_user=5,
        max_len=50,
    ),
}


def download(url: str) -> bytes:
    """The bytes behind a URL."""
    with urllib.request.urlopen(url, timeout=60) as response:
        content: bytes = response.read()
    return content


def load_public(name: str, folder: Path, *, get_url: Callable[[str], bytes] = download) -> Interactions:
    """Read a dataset of ``PUBLIC`` from ``folder``, fetching it into it if need be.

    Raises:
        DataError: there is no file and none can be fetched, it is not what it was, or repeats are merged in it.
    """
    dataset = PUBLIC[name]
    path, atomic = _present(folder, dataset.files), _present(folder, dataset.atomics)
    if path is None and atomic is not None:
        with unchanged(atomic):
            interactions = read_interactions(atomic, time_field=_time_of(atomic, dataset))
    else:
        fetched = path is None
        if path is None:
            path = folder / dataset.files[0]
            _fetch(name, path, get_url)
        try:
            with unchanged(path, dataset.md5 if path.name == dataset.files[0] else None):
                interactions = read_interactions(path, columns=dataset.columns, separator=dataset.separator)
        except DataError:
            if fetched:  # what came was something else, such as a page that says so; the next call fetches anew
                path.unlink(missing_ok=True)
            raise
    given = (len(interactions.user_ids), len(interactions.item_ids), len(interactions))
    users, items, rows = (f"{count:,}" for count in given)
    published = "as published"
    if given != dataset.published:
        published = "published are {:,}, {:,} and {:,}".format(*dataset.published)
    print(f"{name}: {users} users, {items} items, {rows} interactions ({published})", file=sys.stderr)
    return interactions


def _present(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of the files that is there, packed or not."""
    paths = (folder / either for name in names for either in (name, f"{name}.gz", name.removesuffix(".gz")))
    return next((path for path in paths if path.is_file()), None)


def _time_of(atomic: Path, dataset: PublicDataset) -> str:
    """The name of the column of times; the usual one if the file cannot be read, which its reading will say better."""
    header: list[str] = []
    with suppress(OSError, EOFError, zlib.error), TextFile(atomic, errors="replace") as text:
        header = [field.partition(":")[0].strip() for field in text.lines.readline().split("\t")]
    if "num_repeat" in header:
        raise DataError(
            f"{atomic} must have every interaction on its own, as the paper's data have; given one with merged "
            "repeats (a column num_repeat); to read it all the same, give its path, not the dataset's name"
        )
    return next((name for name in dataset.atomic_times if name in header), "timestamp")


def _fetch(name: str, path: Path, get_url: Callable[[str], bytes]) -> None:
    dataset = PUBLIC[name]
    files, atomics = (" or ".join(names) for names in (dataset.files, dataset.atomics))
    advice = f"put {files} (from {dataset.source}) or RecBole's {atomics} into {path.parent} by hand"
    if dataset.url is None:
        raise DataError(f"{name} cannot be fetched; {advice}")
    print(f"fetching {name} from {dataset.url} into {path.parent}", file=sys.stderr)
    try:
        content = get_url(dataset.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"cannot fetch {name} ({error}); {advice}") from error


@contextmanager
def unchanged(path: Path, md5: str | None = None) -> Iterator[None]:
    """Compare a file with its md5, or else with the sha256 of its first use, and then read it.

    If there is neither, this is the first use: what was read without an error is recorded, in a folder that can be
    written to.

    Raises:
        DataError: it is another file.
    """
    given = file_digest(path, "sha256" if md5 is None else "md5")
    record = path.with_name(f"{path.name}.sha256")
    recorded = [] if md5 is not None or not record.is_file() else record.read_text(encoding="utf-8").split()
    if md5 is not None and given != md5:
        raise DataError(f"{path} must have the published md5 {md5}; given {given}; delete the file, to have it fetched")
    if recorded and given != recorded[0]:
        raise DataError(
            f"{path} must have the sha256 of its first use, in {record.name}, {recorded[0]}; given {given}; put the "
            "old file there, or delete the record if the new one is meant"
        )
    yield
    if md5 is not None or recorded:
        return
    try:
        with replacing(record) as partial:
            partial.write_text(f"{given}  {path.name}\n", encoding="utf-8")
    except OSError as error:
        print(f"{path}: whether it changes cannot be watched ({record.name}: {error.strerror})", file=sys.stderr)
