import dataclasses
import gzip
import hashlib
import io
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt4rec.recsys.data import (
    DataError,
    Histories,
    Interactions,
    build_histories,
    datasets,
    filter_k_core,
    keep_item_codes,
    read_interactions,
)
from ttt4rec.recsys.recommend.titles import read_titles

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ROWS = "u1\ti9\t4\t30\nu2\ti9\t1\t20\nu1\ti3\t5\t10\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.lower().endswith(".gz") else text.encode())
    return path


def message_of(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read_interactions(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def interactions_of(pairs: list[tuple[int, int]], times: list[int] | None = None) -> Interactions:
    users, items = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    clock = np.array(times if times is not None else range(len(pairs)), dtype=np.int64)
    names = [
        tuple(f"{kind}{code}" for code in range(codes.max() + 1))
        for kind, codes in zip("ui", (users, items), strict=True)
    ]
    return Interactions(users, items, clock, *names)


@pytest.mark.parametrize(
    "name", ["a.inter", "a.inter.gz", "a.tsv", "a.csv", "a.csv.gz", "A.CSV", "A.INTER.GZ", "A.Tsv", "a.csv.GZ"]
)
def test_every_format_gives_the_same_interactions(tmp_path: Path, name: str) -> None:
    text = HEADER + ROWS
    if "inter" not in name.lower():
        text = text.replace(":token", "").replace(":float", "")
    if "csv" in name.lower():
        text = text.replace("\t", ",")
    data = read_interactions(write(tmp_path, name, text))
    assert data.user_ids == ("u1", "u2")
    assert data.item_ids == ("i9", "i3")
    assert data.users.tolist() == [0, 1, 0]
    assert data.items.tolist() == [0, 0, 1]
    assert data.times.tolist() == [30, 20, 10]
    assert data.times.dtype == data.users.dtype == data.items.dtype == np.int64
    assert len(data) == 3


def test_columns_and_separator_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "log.txt", "when;who;what\n1;a b;x\n2;c;x\n")
    fields = {"user_field": "who", "item_field": "what", "time_field": "when"}
    data = read_interactions(path, separator=";", **fields)
    assert data.user_ids == ("a b", "c")
    assert "'.txt'" in message_of(path)


def test_text_oddities_are_read_as_meant(tmp_path: Path) -> None:
    text = '\ufeffuser_id,item_id,timestamp\r\nann,"a, ""b""",1\r\n\r\nbob,é,2\r\n'
    data = read_interactions(write(tmp_path, "a.csv", text))
    assert data.user_ids == ("ann", "bob")
    assert data.item_ids == ('a, "b"', "é")
    literal = read_interactions(write(tmp_path, "a.tsv", 'user_id\titem_id\ttimestamp\na\t"x\t1\n'))
    assert literal.item_ids == ('"x',)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["874965478.0", "-3", "1e3"], [874965478, -3, 1000]),
        (["9007199254740993", "9007199254740993.0"], [2**53 + 1, 2**53 + 1]),
        (["1", "2.5"], [1.0, 2.5]),
        ([str(2**63 - 1), str(-(2**63))], [2**63 - 1, -(2**63)]),
        ([str(-(2**63)), str(2**60), "-0.5"], [-(2.0**63), 2.0**60, -0.5]),
    ],
)
def test_times_are_exact(tmp_path: Path, texts: list[str], expected: list[float]) -> None:
    rows = "".join(f"u\ti\t0\t{text}\n" for text in texts)
    times = read_interactions(write(tmp_path, "a.inter", HEADER + rows)).times
    assert times.dtype == (np.float64 if isinstance(expected[0], float) else np.int64)
    assert times.tolist() == expected


def test_one_fractional_time_far_down_makes_all_of_them_float64(tmp_path: Path) -> None:
    rows = "u\ti\t0\t7\n" * 1000 + "u\ti\t0\t7.25\n"
    times = read_interactions(write(tmp_path, "a.inter", HEADER + rows)).times
    assert times.dtype == np.float64
    assert times.tolist() == [7.0] * 1000 + [7.25]


@pytest.mark.parametrize("rows_between", [0, 1000])  # 1000: in another of the chunks that are parsed together
@pytest.mark.parametrize("exact_first", [True, False])
def test_whole_times_that_float64_would_round_beside_fractions(
    tmp_path: Path, rows_between: int, exact_first: bool
) -> None:
    nanoseconds = 1_700_000_000_123_456_789
    outer = [f"u\ti\t0\t{nanoseconds}\n", "u\ti\t0\t7.25\n"]
    first, last = outer if exact_first else outer[::-1]
    message = message_of(write(tmp_path, "a.inter", HEADER + first + "u\ti\t0\t7\n" * rows_between + last))
    assert f"times must be such as float64 holds exactly, as some are fractions (7.25); given {nanoseconds}" in message


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("u\ti\t3", "a row must have 4 fields; given 3"),
        ("u\ti\t3\t4\t5", "a row must have 4 fields; given 5"),
        ("\ti\t3\t4", "field 1 must be a user id; given ''"),
        ("u\t \t3\t4", "field 2 must be an item id; given ' '"),
        *[
            (f"u\ti\t3\t{time}", f"given '{time}'")
            for time in ("nan", "inf", "", "soon", "1_000", "1e400", str(2**63), "1e999999999", f"{2**52}.5")
        ],
    ],
)
def test_bad_rows_are_counted_and_the_first_one_is_named(tmp_path: Path, row: str, expected: str) -> None:
    path = write(tmp_path, "a.inter", HEADER + ROWS * 200 + row + "\n" + ROWS * 200 + row + "\n")
    message = message_of(path)
    assert "line 602: " in message
    assert expected in message
    assert "the first of 2 bad lines" in message
    assert "the only bad line" in message_of(write(tmp_path, "b.inter", HEADER + row + "\n"))


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.inter", "", "given an empty file"),
        ("a.inter", "\n" + ROWS, "given an empty line"),
        ("a.inter", HEADER, "must have rows after the header; given none"),
        ("a.inter", HEADER + "\n\n", "must have rows after the header; given none"),
        ("a.inter", "user_id\titem_id\n1\t2\n", "must have one column 'timestamp'; given user_id, item_id"),
        ("a.csv", "user_id,user_id,item_id,timestamp\n1,2,3,4\n", "must have one column 'user_id'; given 2"),
        ("a.csv", 'user_id,item_id,timestamp\n"a"b,2,3\n', "line 2: must be delimited text"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert expected in message_of(write(tmp_path, name, text))


def test_unreadable_files(tmp_path: Path) -> None:
    assert "it does not exist" in message_of(tmp_path / "absent.inter")
    assert "given a folder without one" in message_of(tmp_path, separator="\t")
    binary = tmp_path / "a.inter"
    binary.write_bytes(b"user_id\xff")
    assert f"{binary} line 1 must be UTF-8 text; given byte 0xff" in message_of(binary)
    packed = write(tmp_path, "a.inter.gz", HEADER + ROWS)
    packed.write_bytes(packed.read_bytes()[:-12])
    assert "cannot be unpacked" in message_of(packed)
    packed.write_bytes(HEADER.encode())
    assert "cannot be unpacked" in message_of(packed)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("name", ["a.inter", "a.inter.gz"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\xed\xa0\x80"], ids=repr)
@pytest.mark.parametrize("line", [2, 100_000])  # the second is some hundred of the text layer's blocks further on
def test_bytes_that_are_not_utf8_are_named_by_their_line(
    tmp_path: Path, name: str, line: int, bad: bytes, end: str
) -> None:
    good = f"u\té\t5\t7{end}".encode()
    content = HEADER.replace("\n", end).encode() + good * (line - 2) + b"u\ti" + bad + good[1:] + good * 1000
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    assert f"line {line} must be UTF-8 text; given byte {bad[0]:#04x}" in message_of(path)


def test_undecodable_text_in_a_damaged_gzip_file(tmp_path: Path) -> None:
    long_line = b"u\t\xff" + random.Random(0).randbytes(50_000).translate(None, b"\r\n")
    (tmp_path / "a.inter.gz").write_bytes(gzip.compress(HEADER.encode() + long_line)[:-5000])
    assert "cannot be unpacked" in message_of(tmp_path / "a.inter.gz")


def plain_k_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[int]:
    """Positions left, by removing one offending interaction at a time."""
    left = list(range(len(pairs)))
    while True:
        users, items = ([pairs[index][side] for index in left] for side in (0, 1))
        bad = [i for i in left if users.count(pairs[i][0]) < min_user or items.count(pairs[i][1]) < min_item]
        if not bad:
            return left
        left.remove(bad[0])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(0, 4),
    st.integers(0, 4),
)
def test_k_core_is_what_plain_removal_leaves(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> None:
    data = interactions_of(pairs)
    left = plain_k_core(pairs, min_user, min_item)
    if not left:
        with pytest.raises(DataError, match="given none of"):
            filter_k_core(data, min_user=min_user, min_item=min_item)
        return
    core = filter_k_core(data, min_user=min_user, min_item=min_item)
    assert core.times.tolist() == left
    assert [core.user_ids[code] for code in core.users] == [f"u{pairs[index][0]}" for index in left]
    assert [core.item_ids[code] for code in core.items] == [f"i{pairs[index][1]}" for index in left]
    assert set(core.users.tolist()) == set(range(len(core.user_ids)))
    assert set(core.items.tolist()) == set(range(len(core.item_ids)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40))
def test_histories_are_stable_in_time(rows: list[tuple[int, int, int]]) -> None:
    data = interactions_of([row[:2] for row in rows], [row[2] for row in rows])
    histories = build_histories(data)
    assert histories.offsets[0] == 0
    assert histories.offsets[-1] == len(rows)
    for code in range(histories.num_users):
        own = sorted((row for row in rows if row[0] == code), key=lambda row: row[2])
        assert histories.history(code).tolist() == [row[1] + 1 for row in own]
        window = slice(histories.offsets[code], histories.offsets[code + 1])
        assert histories.times[window].tolist() == [row[2] for row in own]


def test_large_times_are_not_rounded_when_sorting() -> None:
    start = 2**53
    histories = build_histories(interactions_of([(0, 0), (0, 1), (0, 2)], [start + 2, start + 1, start]))
    assert histories.history(0).tolist() == [3, 2, 1]


def test_codes_of_ids() -> None:
    histories: Histories = build_histories(interactions_of([(0, 0), (1, 1), (1, 2)]))
    assert (histories.num_users, histories.num_items) == (2, 3)
    assert histories.user_code("u1") == 1
    codes, unknown = histories.item_codes(["i2", "what", "i0", "i2"])
    assert codes.tolist() == [3, 1, 3]
    assert codes.dtype == np.int64
    assert unknown == ("what",)
    assert histories.item_codes([])[0].shape == (0,)
    with pytest.raises(DataError, match="user_id must be one of the data's 2 users; given 'u7'"):
        histories.user_code("u7")
    for code in (-1, 2):
        with pytest.raises(IndexError, match="user_code must be from 0 to 1"):
            histories.history(code)


CONTENT = (HEADER + ROWS).encode()


def zipped(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


WHEEL = zipped("recbole/dataset_example/ml-100k/ml-100k.inter", CONTENT)
ARCHIVE = zipped("ml-100k/u.data", ROWS.encode())


def no_wheel(folder: Path) -> bytes:
    raise DataError("No matching distribution")


def no_url(url: str) -> bytes:
    raise OSError("unreachable")


@pytest.fixture
def checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "ML_100K_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(datasets, "RECBOLE_WHEEL_SHA256", hashlib.sha256(WHEEL).hexdigest())


@pytest.mark.usefixtures("checksums")
def test_dataset_comes_from_the_wheel_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "cache"
    path = datasets.fetch_ml_100k(folder, get_wheel=lambda _: WHEEL, get_url=no_url)
    assert path.read_bytes() == CONTENT
    assert list(folder.iterdir()) == [path]
    assert "fetching ml-100k.inter from recbole==1.2.1" in capsys.readouterr().err
    assert datasets.fetch_ml_100k(folder, get_wheel=no_wheel, get_url=no_url) == path
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("checksums")
@pytest.mark.parametrize("get_wheel", [no_wheel, lambda _: WHEEL + b"tampered", lambda _: ARCHIVE])
def test_dataset_comes_from_grouplens_otherwise(tmp_path: Path, get_wheel) -> None:
    path = datasets.fetch_ml_100k(tmp_path, get_wheel=get_wheel, get_url=lambda _: ARCHIVE)
    assert path.read_bytes() == CONTENT


@pytest.mark.usefixtures("checksums")
def test_a_damaged_cached_file_is_fetched_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ml-100k.inter"
    path.write_bytes(CONTENT[:-1])
    datasets.fetch_ml_100k(tmp_path, get_wheel=lambda _: WHEEL, get_url=no_url)
    assert path.read_bytes() == CONTENT
    assert "does not have the expected checksum" in capsys.readouterr().err


@pytest.mark.usefixtures("checksums")
@pytest.mark.parametrize("get_url", [no_url, lambda _: b"<html>", lambda _: zipped("ml-100k/u.data", b"1\t2\n")])
def test_without_a_source_the_error_says_what_to_put_where(tmp_path: Path, get_url) -> None:
    with pytest.raises(DataError) as caught:
        datasets.fetch_ml_100k(tmp_path, get_wheel=no_wheel, get_url=get_url)
    message = str(caught.value)
    assert "No matching distribution" in message
    assert datasets.GROUPLENS_URL in message
    assert str(tmp_path / "ml-100k.inter") in message
    assert datasets.ML_100K_SHA256 in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("checksums")
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"the cache directory .* must be writable"):
        datasets.fetch_ml_100k(tmp_path / "file" / "cache", get_wheel=lambda _: WHEEL, get_url=no_url)


def test_titles_come_from_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"item_id:token\tmovie_title:token_seq\trelease_year:token\n1\tToy Story\t1995\n2\tGoldenEye\t1995\n"
    wheel = zipped("recbole/dataset_example/ml-100k/ml-100k.item", content)
    monkeypatch.setattr(datasets, "RECBOLE_WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setenv("TTT4REC_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"ml-100k\.item must have the sha256"):
        datasets.fetch_ml_100k_titles(tmp_path, get_wheel=lambda _: wheel)
    monkeypatch.setattr(datasets, "ML_100K_TITLES_SHA256", hashlib.sha256(content).hexdigest())
    path = datasets.fetch_ml_100k_titles(tmp_path, get_wheel=lambda _: wheel)
    assert (path, path.read_bytes()) == (tmp_path / "ml-100k.item", content)
    assert read_titles(Path("ml-100k")) == {"1": "Toy Story", "2": "GoldenEye"}
    monkeypatch.chdir(tmp_path)
    Path("ml-100k").write_text("item_id\ttitle\n1\tthe reader's own\n")
    assert read_titles(Path("ml-100k")) == {"1": "the reader's own"}


def test_pip_is_asked_for_one_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if len(commands) == 1:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: one\nERROR: no network\n")
        (tmp_path / "recbole-1.2.1-py3-none-any.whl").write_bytes(WHEEL)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match=r"^ERROR: no network$"):
        datasets.download_wheel(tmp_path)
    assert datasets.download_wheel(tmp_path) == WHEEL
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"recbole==1.2.1", "--no-deps", str(tmp_path)} <= set(commands[0])


def test_items_of_a_warm_start_may_have_ids_of_another_type() -> None:
    histories = build_histories(interactions_of([(0, 0), (0, 1), (1, 2)]))
    whole = dataclasses.replace(histories, item_ids=(7, 5, 8))
    kept = keep_item_codes(whole, ("5", "6"))
    assert kept.item_ids == ("5", "6", "7", "8")
    assert kept.items.tolist() == [3, 1, 4]
    assert keep_item_codes(dataclasses.replace(histories, item_ids=("7", "5", "8")), (5, 6)).item_ids == (5, 6, 7, 8)
    with pytest.raises(DataError, match="ids must be int, as those they are to go with; given 'i0'"):
        keep_item_codes(histories, (5, 6))


def test_items_of_a_warm_start_may_be_texts_of_numpys() -> None:
    histories = build_histories(interactions_of([(0, 0), (0, 1), (1, 2)]))
    kept = keep_item_codes(histories, list(np.array(["i1", "i9"])))
    assert kept.item_ids == ("i1", "i9", "i0", "i2")
    assert kept.items.tolist() == [3, 1, 4]
    with pytest.raises(DataError, match=r"ids must be texts, whole numbers of Python's or UUIDs; given .*5"):
        keep_item_codes(histories, list(np.array([5, 6])))


@pytest.mark.usefixtures("checksums")
def test_loading_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTT4REC_DATA", str(tmp_path))
    path = write(tmp_path, "ml-100k.inter", HEADER + ROWS)
    assert datasets.load_interactions("ml-100k").user_ids == ("u1", "u2")
    assert datasets.load_interactions(path).user_ids == ("u1", "u2")
    assert datasets.load_interactions(str(path)).user_ids == ("u1", "u2")
    with pytest.raises(DataError, match=r"the data must be one of 'ml-100k', .* the path .*; given 'ml-100'"):
        datasets.load_interactions("ml-100")
    with pytest.raises(DataError, match="it does not exist"):
        datasets.load_interactions("absent.inter")


def test_the_cache_directory_is_in_the_home_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TTT4REC_DATA", raising=False)
    assert datasets.cache_directory() == Path.home() / ".cache" / "ttt4rec"


def test_without_a_home_the_cache_directory_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("TTT4REC_DATA", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(DataError, match=r"\$TTT4REC_DATA"):
        datasets.load_interactions("ml-100k")
