"""Loaders of the paper's datasets, on small files in the formats of the real ones."""

import dataclasses
import gzip
import hashlib
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.recsys_data import rows_of
from ttt4rec.recsys.data import DataError, public, read_interactions
from ttt4rec.recsys.data.datasets import load_interactions
from ttt4rec.recsys.data.public import PUBLIC, load_public

GOWALLA = gzip.compress(
    b"0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847\n"
    b"0\t2010-10-18T22:17:43Z\t30.2691029532\t-97.7493953705\t420315\n"
    b"7\t2010-10-17T23:42:03Z\t30.2557309927\t-97.7633857727\t22847\n",
    mtime=0,
)
TWITCH = b"1,33842865744,mithrain,154,156\n1,33846768288,alptv,166,169\n2,33842865744,mithrain,155,156\n"
AMAZON = b"AB9S9279OZ3QO,0078764343,5.0,1373155200\nA24SSUT5CSW8BH,0078764343,5.0,1377302400\n"
CONTENTS = {"gowalla": GOWALLA, "twitch-100k": TWITCH, "amazon-video-games": AMAZON}
EXPECTED = {
    "gowalla": [("0", "22847", 1287532527), ("0", "420315", 1287440263), ("7", "22847", 1287358923)],
    "twitch-100k": [("1", "33842865744", 154), ("1", "33846768288", 166), ("2", "33842865744", 155)],
    "amazon-video-games": [("AB9S9279OZ3QO", "0078764343", 1373155200), ("A24SSUT5CSW8BH", "0078764343", 1377302400)],
}


def refuse(url):
    raise OSError("unreachable")


@pytest.fixture
def small(monkeypatch):
    """The datasets with the md5 and the counts of the small files."""
    for name, content in CONTENTS.items():
        rows = EXPECTED[name]
        counts = (len({row[0] for row in rows}), len({row[1] for row in rows}), len(rows))
        md5 = PUBLIC[name].md5 and hashlib.md5(content, usedforsecurity=False).hexdigest()
        monkeypatch.setitem(public.PUBLIC, name, dataclasses.replace(PUBLIC[name], md5=md5, published=counts))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", CONTENTS)
def test_the_publishers_file(tmp_path, monkeypatch, capsys, name):
    (tmp_path / PUBLIC[name].files[0]).write_bytes(CONTENTS[name])
    monkeypatch.setenv("TTT4REC_DATA", str(tmp_path))
    data = load_interactions(Path(name))
    assert rows_of(data) == EXPECTED[name]
    assert data.times.dtype == np.int64
    assert f"{name}: 2 users" in capsys.readouterr().err
    record = tmp_path / f"{PUBLIC[name].files[0]}.sha256"
    assert record.is_file() == (PUBLIC[name].md5 is None)
    if record.is_file():
        assert record.read_text() == f"{hashlib.sha256(CONTENTS[name]).hexdigest()}  {PUBLIC[name].files[0]}\n"
    assert rows_of(load_interactions(name)) == EXPECTED[name]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_changed_is_refused(tmp_path, name):
    path = tmp_path / PUBLIC[name].files[0]
    path.write_bytes(CONTENTS[name])
    load_public(name, tmp_path, get_url=refuse)
    path.write_bytes(gzip.compress(b"1\t2010-10-19T23:55:27Z\t0\t0\t5\n") if name == "gowalla" else b"1,2,3,4,5\n")
    with pytest.raises(DataError, match=r"must have the (published md5|sha256 of its first use, in .*,) \w{32}"):
        load_public(name, tmp_path, get_url=refuse)


RECBOLES = [
    ("gowalla", "gowalla.inter", "timestamp"),
    ("gowalla", "gowalla-not-merged.inter", "timestamp"),
    ("gowalla", "gowalla-merged.inter.gz", "timestamp"),
    ("twitch-100k", "Twitch-100k.inter", "timestamp"),
    ("twitch-100k", "twitch-100k.inter", "time_start"),
    ("amazon-video-games", "amazon-video-games.inter.gz", "timestamp"),
    ("amazon-video-games", "Amazon_Video_Games.inter", "timestamp"),
]


def recboles(path, name, time="timestamp", more=""):
    """Write a dataset as RecBole's file, packed if its name says so."""
    rows = "".join(f"{user}\t{item}\t{float(time)}{more and chr(9) + '1.0'}\n" for user, item, time in EXPECTED[name])
    content = f"user_id:token\titem_id:token\t{time}:float{more and chr(9) + more}\n{rows}".encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "file", "time"), RECBOLES)
def test_recboles_version(tmp_path, name, file, time):
    path = tmp_path / file
    recboles(path, name, time)
    assert rows_of(load_public(name, tmp_path, get_url=refuse)) == EXPECTED[name]
    assert path.with_name(f"{file}.sha256").is_file()


def test_repeats_that_are_merged_are_not_the_papers_data(tmp_path):
    path = tmp_path / "gowalla.inter"
    recboles(path, "gowalla", more="num_repeat:float")
    with pytest.raises(DataError, match=r"must have every interaction on its own.*num_repeat.*give its path"):
        load_public("gowalla", tmp_path, get_url=refuse)
    assert rows_of(load_interactions(path)) == EXPECTED["gowalla"]


def test_a_damaged_packed_file_is_told_as_everywhere(tmp_path):
    (tmp_path / "gowalla.inter.gz").write_bytes(gzip.compress(b"user_id:token\titem_id:token\t" * 99)[:-9])
    with pytest.raises(DataError, match="must be a whole gzip file"):
        load_public("gowalla", tmp_path, get_url=refuse)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("gowalla", "loc-gowalla_totalCheckins.txt", gzip.decompress(GOWALLA)),
        ("twitch-100k", "100k.csv", TWITCH),
        ("twitch-100k", "100k_a.csv.gz", gzip.compress(TWITCH)),
        ("amazon-video-games", "ratings_Video_Games.csv.gz", gzip.compress(AMAZON)),
    ],
    ids=["gowalla", "twitch", "twitch packed", "amazon packed"],  # a packed file has the time in it
)
def test_the_publishers_file_packed_or_not(tmp_path, name, file, content):
    (tmp_path / file).write_bytes(content)
    assert rows_of(load_public(name, tmp_path, get_url=refuse)) == EXPECTED[name]


@pytest.mark.usefixtures("small")
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "100k_a.csv").write_bytes(TWITCH)

    def refuse_to_write(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(public, "replacing", refuse_to_write)
    assert rows_of(load_public("twitch-100k", tmp_path)) == EXPECTED["twitch-100k"]
    assert "100k_a.csv.sha256: Permission denied" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_fetching(tmp_path, capsys):
    asked = []

    def get_url(url):
        asked.append(url)
        return GOWALLA

    folder = tmp_path / "new"
    for _ in range(2):
        assert rows_of(load_public("gowalla", folder, get_url=get_url)) == EXPECTED["gowalla"]
    assert asked == ["https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz"]
    assert [path.name for path in folder.iterdir()] == ["loc-gowalla_totalCheckins.txt.gz"]
    assert "(as published)" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["gowalla", "amazon-video-games"])
def test_what_is_fetched_and_is_something_else_is_not_kept(tmp_path, name):
    with pytest.raises(DataError, match=r"must have (the published md5|4 fields)"):
        load_public(name, tmp_path, get_url=lambda url: b"<html>Moved,\nfor a while</html>")
    assert list(tmp_path.iterdir()) == []
    assert rows_of(load_public(name, tmp_path, get_url=lambda url: CONTENTS[name])) == EXPECTED[name]


@pytest.mark.usefixtures("small")
def test_a_record_that_is_empty_is_none(tmp_path):
    (tmp_path / "100k_a.csv").write_bytes(TWITCH)
    record = tmp_path / "100k_a.csv.sha256"
    record.touch()
    assert rows_of(load_public("twitch-100k", tmp_path)) == EXPECTED["twitch-100k"]
    assert record.read_text() == f"{hashlib.sha256(TWITCH).hexdigest()}  100k_a.csv\n"


@pytest.mark.parametrize("name", CONTENTS)
def test_what_cannot_be_fetched_says_what_to_put_where(tmp_path, name):
    with pytest.raises(DataError, match="cannot") as error:
        load_public(name, tmp_path, get_url=refuse)
    message = str(error.value)
    assert "\n" not in message
    for part in (*PUBLIC[name].files, *PUBLIC[name].atomics, PUBLIC[name].source, str(tmp_path), "by hand"):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_other_counts_than_the_published_ones_are_told(tmp_path, capsys):
    (tmp_path / "100k_a.csv").write_bytes(TWITCH)
    load_public("twitch-100k", tmp_path)
    told = "2 users, 2 items, 3 interactions (published are 100,000, 739,991 and 3,051,732)"
    assert told in capsys.readouterr().err


def test_the_published_protocol():
    assert {name: (d.min_user, d.max_len) for name, d in PUBLIC.items()} == {
        "gowalla": (20, 100),
        "twitch-100k": (15, 70),
        "amazon-video-games": (5, 50),
    }


@pytest.fixture(params=["UTC", "Asia/Tokyo"])
def zone(request, monkeypatch):
    """Where the machine stands; a time without a zone is UTC's all the same."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1970-01-02", 86400),
        ("1970-01-01T00:00:00+01:00", -3600),
        (" 1970-01-01 00:00:01.500 ", 1.5),
        ("1970-01-01T00:00:01.5Z", 1.5),
        ("1970-01-01T00:30:01.25+0030", 1.25),
        ("1970-01-01 01:00:00-01", 7200),
        ("1970-13-01", None),
        ("1970-01-01T00:00:00+01000", None),
        ("1970-01-01T99", None),
        ("1970-01-01T00:00:01.123456000Z", 1.123456),
        ("1970-01-01T00:00:01.1234561Z", None),
    ],
)
@pytest.mark.usefixtures("zone")
def test_moments(tmp_path, text, expected):
    path = tmp_path / "a.csv"
    path.write_text(f"user_id,item_id,timestamp\nu,i,{text}\n")
    if expected is None:
        with pytest.raises(DataError, match="must be a time"):
            read_interactions(path)
    else:
        assert read_interactions(path).times.tolist() == [expected]
