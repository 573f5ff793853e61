"""Interactions by the name of a public dataset or by path; ``public`` has the datasets of the paper.

MovieLens-100K is fetched once and kept in a cache directory. It comes from GroupLens Research at the
University of Minnesota. Its terms allow research use, ask for an acknowledgement in publications, and forbid
redistribution as well as commercial use without permission. So the file is never part of this package. To be
cited as: F. Maxwell Harper and Joseph A. Konstan, "The MovieLens Datasets: History and Context", ACM
Transactions on Interactive Intelligent Systems 5(4), 2015.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ttt4rec.atomic_files import replacing
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data.interactions import Interactions
from ttt4rec.recsys.data.public import PUBLIC, download, load_public
from ttt4rec.recsys.data.reading import read_file, read_interactions
from ttt4rec.recsys.data.tables import read_table
from ttt4rec.recsys.data.text import DataError

ML_100K_SHA256 = "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
ML_100K_TITLES_SHA256 = "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
RECBOLE_WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
RECBOLE_REQUIREMENT = "recbole==1.2.1"
GROUPLENS_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"

_WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"
_LARGEST_MEMBER = 1 << 24  # of ml-100k's 2 MB; the checksum can be compared only when it is unpacked
_ZIP_MEMBER = "ml-100k/u.data"
_HEADER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
_FAILURES = (
    OSError,
    DataError,
    KeyError,
    subprocess.SubprocessError,
    zipfile.BadZipFile,
    http.client.HTTPException,
)


def load_interactions(source: object, **options: Any) -> Interactions:
    """Read a dataset by name, a file by path, or a table that is in memory.

    A named dataset (``"ml-100k"``, or one of ``PUBLIC``) is taken from the cache directory (environment variable
    ``TTT4REC_DATA``, otherwise ``~/.cache/ttt4rec``) or fetched into it. A file is read as by ``read_interactions``.

    A table is a data frame of pandas or polars, an Arrow table or stream, a Hugging Face dataset, a mapping of columns,
    or rows: tuples (user, item, time) or mappings. Its ids are texts, whole numbers or UUIDs, of one type in a column,
    and come back so. Its times are numbers, or dates and datetimes or texts of them, which become seconds since 1970.

    Args:
        source: the name, the path or the table.
        options: for a file or a table, as ``read_interactions`` takes them.

    Raises:
        DataError: the name is unknown, no source can be reached, or the file or table cannot be read.
    """
    settings = DataOptions(**options)
    if not isinstance(source, str | os.PathLike):
        return read_table(source, settings)
    name, path = os.fspath(source), Path(source)
    if name in _DATASETS:
        return read_interactions(_DATASETS[name](cache_directory()))
    if name in PUBLIC:
        return load_public(name, cache_directory())
    if path.suffix or path.exists() or len(path.parts) > 1:
        return read_file(path, settings)
    known = ", ".join(map(repr, NAMED))
    raise DataError(f"the data must be one of {known}, the path of a file, or a table; given {name!r}")


def cache_directory() -> Path:
    """Where fetched datasets are kept; DataError where nothing says so and nobody knows the user's home folder."""
    configured = os.environ.get("TTT4REC_DATA")
    try:
        return Path(configured) if configured else Path.home() / ".cache" / "ttt4rec"
    except RuntimeError as error:
        raise DataError(
            "$TTT4REC_DATA must be a folder for data sets, as $HOME is not set and the system knows no home folder"
        ) from error


def download_wheel(folder: Path) -> bytes:
    """The recbole wheel, fetched by pip into ``folder``."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        RECBOLE_REQUIREMENT,
        "--no-deps",
        "--only-binary",
        ":all:",
    ]
    done = subprocess.run([*pip, "-d", str(folder)], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise DataError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return next(folder.glob("*.whl")).read_bytes()


def fetch_ml_100k(
    folder: Path,
    *,
    get_wheel: Callable[[Path], bytes] = download_wheel,
    get_url: Callable[[str], bytes] = download,
) -> Path:
    """Path of ``ml-100k.inter`` in ``folder``, fetched there unless it is there already.

    The sources are, in this order, the example data of the recbole wheel on the package index and GroupLens's
    own archive, whose ``u.data`` under a header line is byte for byte the same file. Whatever its origin, the
    file must have the sha256 ``ML_100K_SHA256``; it is put in place in one step.

    Raises:
        DataError: no source gave the right file, or ``folder`` cannot be written.
    """
    sources: dict[str, Callable[[], bytes]] = {
        f"{RECBOLE_REQUIREMENT} by pip": lambda: _from_wheel(get_wheel, "ml-100k.inter"),
        GROUPLENS_URL: lambda: _from_archive(get_url(GROUPLENS_URL)),
    }
    return _fetched(folder / "ml-100k.inter", ML_100K_SHA256, sources)


def fetch_ml_100k_titles(folder: Path, *, get_wheel: Callable[[Path], bytes] = download_wheel) -> Path:
    """Path of ``ml-100k.item``, which has the films' titles; as ``fetch_ml_100k``, from the wheel alone."""
    sources = {f"{RECBOLE_REQUIREMENT} by pip": lambda: _from_wheel(get_wheel, "ml-100k.item")}
    return _fetched(folder / "ml-100k.item", ML_100K_TITLES_SHA256, sources)


def _fetched(path: Path, sha256: str, sources: dict[str, Callable[[], bytes]]) -> Path:
    if path.is_file():
        if _sha256(path.read_bytes()) == sha256:
            return path
        print(f"{path} does not have the expected checksum; fetching it again", file=sys.stderr)
    reasons = []
    for name, source in sources.items():
        print(f"fetching {path.name} from {name} into {path.parent} (GroupLens terms: research use)", file=sys.stderr)
        try:
            content = source()
            _expect(content, sha256, path.name)
        except _FAILURES as error:
            reasons.append(f"{name}: {error}")
            continue
        _keep(path, content)
        return path
    raise DataError(
        f"cannot fetch {path.name} ({'; '.join(reasons)}); "
        f"put {_WHEEL_FOLDER}{path.name} of the recbole 1.2.1 wheel (sha256 {sha256}) at {path} by hand"
    )


_DATASETS: dict[str, Callable[[Path], Path]] = {"ml-100k": fetch_ml_100k}
NAMED = (*_DATASETS, *PUBLIC)
"""Data sets that have names."""
TITLES: dict[str, Callable[[Path], Path]] = {"ml-100k": fetch_ml_100k_titles}
"""Files with the titles of the items of data sets by name, fetched into a folder."""


def _from_wheel(get_wheel: Callable[[Path], bytes], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        wheel = get_wheel(Path(folder))
    _expect(wheel, RECBOLE_WHEEL_SHA256, "the wheel")
    return _member(wheel, f"{_WHEEL_FOLDER}{name}")


def _from_archive(archive: bytes) -> bytes:
    return _HEADER + _member(archive, _ZIP_MEMBER)


def _member(archive: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as unpacked:
        size = unpacked.getinfo(name).file_size  # no more is unpacked than an archive says
        if size > _LARGEST_MEMBER:
            raise DataError(f"{name} must have at most {_LARGEST_MEMBER:,} bytes; given {size:,}")
        return unpacked.read(name)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _expect(content: bytes, sha256: str, what: str) -> None:
    given = _sha256(content)
    if given != sha256:
        raise DataError(f"{what} must have the sha256 {sha256}; given {given}")


def _keep(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise DataError(f"the cache directory {path.parent} must be writable; given {error.strerror!r}") from error
