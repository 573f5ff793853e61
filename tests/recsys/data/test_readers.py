"""The file readers: Parquet, and whatever bytes a file may hold."""

import csv
import gc
import gzip
import io
import sys

import numpy as np
import pyarrow as arrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tests.support.recsys_data import rows_of
from ttt4rec.options import DataOptions
from ttt4rec.recsys.data import DataError, Interactions, quick, read_interactions, text
from ttt4rec.recsys.data import arrow as reader
from ttt4rec.recsys.data.layout import Columns


def write(path, users, items, times, **types):
    columns = {"user_id": users, "item_id": items, "timestamp": times}
    parquet.write_table(arrow.table({k: arrow.array(v, type=types.get(k)) for k, v in columns.items()}), path)
    return path


def test_parquet_reads_as_text_does(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_PER_BATCH", 7)
    monkeypatch.setattr(reader, "_ROWS_PER_TABLE", 7)
    rows = [(f"u{i * 7 % 5}", f"i{i % 9}", 10**15 - i) for i in range(40)]
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(f"{u},{i},{t}" for u, i, t in rows))
    text = read_interactions(tmp_path / "a.csv")
    data = read_interactions(write(tmp_path / "a.parquet", *zip(*rows, strict=True)))
    assert rows_of(data) == rows_of(text) == rows
    assert (data.user_ids, data.item_ids) == (text.user_ids, text.item_ids)
    assert data.users.dtype == data.items.dtype == data.times.dtype == np.int64


@pytest.mark.parametrize(
    ("times", "kind", "expected"),
    [
        ([1.0, 2.0], arrow.float32(), [1, 2]),
        ([1.0, 2.5], arrow.float64(), [1.0, 2.5]),
        ([3, 4], arrow.uint64(), [3, 4]),
        ([5000, 6000], arrow.timestamp("ms"), [5, 6]),
        ([5001, 6000], arrow.timestamp("ms", "Asia/Tokyo"), [5.001, 6.0]),
        ([5_000_001, 6], arrow.timestamp("us"), [5.000001, 0.000006]),
        ([5_000_001_000, 6_000], arrow.timestamp("ns"), [5.000001, 0.000006]),
        ([7, 8], arrow.date32(), [7 * 86400, 8 * 86400]),
        ([86400_000, 0], arrow.date64(), [86400, 0]),
        (["1e3", "5.0"], arrow.string(), [1000, 5]),
        (["1970-01-02", "1970-01-01T00:00:01Z"], arrow.large_string(), [86400, 1]),
    ],
)
def test_parquet_types(tmp_path, times, kind, expected):
    path = write(tmp_path / "a.parquet", [10, 11], ["x", "x"], times, timestamp=kind)
    data = read_interactions(path)
    assert rows_of(data) == [(10, "x", expected[0]), (11, "x", expected[1])]
    assert data.times.dtype == (np.float64 if isinstance(expected[0], float) else np.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": ["a", None, "b"]}, r"row 2: .*the only bad row"),
        ({"items": ["a", " ", None]}, r"row 2: .*the first of 2 bad rows: 2, 3"),
        ({"times": [1.0, float("nan"), float("inf")]}, "the first of 2 bad rows"),
        ({"times": [1, None, 3]}, "row 2: "),
        ({"times": [b"1", b"2", b"3"]}, "must have numbers, dates or timestamps in column 'timestamp'; given binary"),
        ({"times": ["1", "soon", "3"]}, "row 2: 'timestamp' must be a time .*; given 'soon'"),
        (
            {"times": ["1", "1970-01-01", "3"]},
            "row 2: 'timestamp' must be a number, as the times before it are; given '1970",
        ),
        ({"times": arrow.array([0, 1, 1000], arrow.timestamp("ns"))}, "row 2: a time must be to microseconds"),
        ({"users": [1.5, 2.0, 3.0]}, "must have strings, integers or UUIDs in column 'user_id'; given double"),
        ({"times": np.array([2**63, 1, 1], dtype=np.uint64)}, "must be a readable Parquet file"),
        ({"users": [], "items": [], "times": []}, r"must have (rows; given none|strings, integers)"),
    ],
)
def test_bad_parquet_rows(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(reader, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr(reader, "_ROWS_PER_TABLE", 2)
    columns = {"users": ["a", "b", "c"], "items": ["x", "y", "z"], "times": [1, 2, 3]} | change
    with pytest.raises(DataError, match=message) as error:
        read_interactions(write(tmp_path / "a.parquet", *columns.values()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "large_dictionary"])
def test_parquet_strings_of_every_type(tmp_path, kind):
    large = arrow.large_string() if "large" in kind else arrow.string()
    names = arrow.array(["b", "a", "b", "é"], type=arrow.string_view() if "view" in kind else large)
    if "dictionary" in kind:
        names = names.dictionary_encode()
    parquet.write_table(
        arrow.table({"user_id": names, "item_id": names, "timestamp": [1, 2, 3, 4]}), tmp_path / "a.PARQUET"
    )
    data = read_interactions(tmp_path / "a.PARQUET")
    assert data.user_ids == data.item_ids == ("b", "a", "é")
    assert data.users.tolist() == data.items.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("kind", [arrow.string(), arrow.large_string()], ids=str)
def test_parquet_strings_that_are_not_utf8(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(reader, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(reader, "_ROWS_PER_TABLE", 3)
    raw = [b"a", b"b", b"a", b"b", b"\xff\xfe", b"\xfd"]
    binary = arrow.large_binary() if kind == arrow.large_string() else arrow.binary()
    items = arrow.array(raw, type=binary).view(kind)
    parquet.write_table(
        arrow.table({"user_id": [1] * 6, "item_id": items, "timestamp": [1] * 6}), tmp_path / "a.parquet"
    )
    message = "row 5 must be UTF-8 text in column 'item_id'; given byte 0xff"
    with pytest.raises(DataError, match=message):
        read_interactions(tmp_path / "a.parquet")


def test_parquet_times_keep_what_the_column_holds(tmp_path, monkeypatch):
    """A column of floats was rounded by whoever wrote it; beside fractions, its whole times lose nothing more."""
    monkeypatch.setattr(reader, "ROWS_PER_BATCH", 2)
    monkeypatch.setattr(reader, "_ROWS_PER_TABLE", 2)
    large = [float(1_700_000_000_123_456_789), 2.0**62]
    for times in (large, [*large, 0.5]):
        data = read_interactions(write(tmp_path / "a.parquet", *[["a"] * len(times)] * 2, times))
        assert data.times.tolist() == times
        assert data.times.dtype == (np.int64 if times == large else np.float64)
    nanoseconds = [1_700_000_000_123_456_789, 1_700_000_000_123_456_790]
    data = read_interactions(write(tmp_path / "a.parquet", ["a"] * 2, ["b"] * 2, nanoseconds))
    assert data.times.tolist() == nanoseconds


def test_a_parquet_file_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    seen = []

    class Watched(reader._Encoder):
        def encode(self, column):
            seen.append(arrow.total_allocated_bytes() - before)
            return super().encode(column)

    monkeypatch.setattr(reader, "ROWS_PER_BATCH", 1000)
    monkeypatch.setattr(reader, "_ROWS_PER_TABLE", 1000)
    monkeypatch.setattr(reader, "_Encoder", Watched)
    ids = [f"{i % 100:0100}" for i in range(50_000)]  # long and few, so that codes are small beside the columns
    path = write(tmp_path / "a.parquet", ids, ids, list(range(50_000)))
    whole = 2 * len(ids) * 100  # read to be measured, the table would be freed by pyarrow's threads some time later
    before = arrow.total_allocated_bytes()
    assert len(read_interactions(path)) == 50_000
    assert len(seen) == 2 * 50
    assert 0 < max(seen) < whole / 4  # pyarrow keeps some pages


def test_unusable_parquet_files(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", ["a"], ["b"], [1])
    with pytest.raises(DataError, match="one column 'who'; given user_id, item_id, timestamp"):
        read_interactions(path, user_field="who")
    whole = path.read_bytes()
    for content in (b"", b"PAR1", whole[: len(whole) // 2], b"user_id,item_id\n", whole[:40] + b"x" * 40 + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet must be a readable Parquet file"):
            read_interactions(path)
    for place in (tmp_path / "absent.parquet", tmp_path):
        with pytest.raises(DataError, match=r"must (be|have a suffix)"):
            read_interactions(place)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"ttt4rec\[parquet\]"):
        read_interactions(path)


def read_or_refuse(path):
    """Whatever a file holds, it is read or refused in one line; returns what was read, else None."""
    refusal = ""
    try:
        data = read_interactions(path)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert path.name in refusal
        return None
    assert isinstance(data, Interactions)
    assert len(data.users) == len(data.items) == len(data.times) > 0
    assert data.users.max() < len(data.user_ids)
    assert data.items.max() < len(data.item_ids)
    assert np.isfinite(data.times).all()
    return data


HEADER = b"user_id,item_id,timestamp\n"


@settings(max_examples=300)
@given(st.binary(max_size=80), st.booleans(), st.sampled_from([".csv", ".tsv", ".inter", ".csv.gz", ".parquet"]))
def test_any_bytes(tmp_path, content, header, suffix):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes((HEADER.replace(b",", b"," if "csv" in suffix else b"\t") if header else b"") + content)
    read_or_refuse(path)


@settings(max_examples=300)
@given(st.text(max_size=60), st.booleans())
def test_any_text_behind_a_header(tmp_path, text, packed):
    content = HEADER + text.encode("utf-8", "surrogatepass")
    path = tmp_path / ("fuzz.csv.gz" if packed else "fuzz.csv")
    path.write_bytes(gzip.compress(content) if packed else content)
    read_or_refuse(path)


@settings(max_examples=300)
@given(st.data())
def test_damaged_files(tmp_path, data):
    table = write(tmp_path / "whole.parquet", ["a", "b"] * 20, ["x", "y", "z", "w"] * 10, list(range(40)))
    packed = gzip.compress(HEADER + b"a,b,1\n" * 40)
    suffix, content = data.draw(st.sampled_from([(".parquet", table.read_bytes()), (".csv.gz", packed)]))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refuse(path)


def test_a_damaged_end_of_a_parquet_file_loses_no_rows(tmp_path):
    path = write(tmp_path / "fuzz.parquet", ["a", "b"] * 20, ["x", "y", "z", "w"] * 10, list(range(40)))
    content = path.read_bytes()
    for place in range(len(content) - 8 - int.from_bytes(content[-8:-4], "little"), len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 2]) + content[place + 1 :])
        data = read_or_refuse(path)
        assert data is None or len(data) == 40


IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=200)
@given(st.lists(st.tuples(IDS, IDS, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=20))
def test_what_was_written_is_read(tmp_path, rows):
    buffer = io.StringIO(newline="")
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([("user_id", "item_id", "timestamp"), *rows])
    (tmp_path / "a.csv").write_bytes(buffer.getvalue().encode())
    assert rows_of(read_interactions(tmp_path / "a.csv")) == rows
    assert rows_of(read_interactions(write(tmp_path / "a.parquet", *zip(*rows, strict=True)))) == rows


def test_of_a_file_that_is_not_there_nothing_is_closed(tmp_path, monkeypatch):
    """Python 3.13 shows on stderr what fails when a half-made file is closed as it goes."""
    closed, path = [], tmp_path / "none.csv"
    for kind in (text._Metered, quick._Blocks):
        monkeypatch.setattr(kind, "close", lambda file: closed.append(type(file)))
    with pytest.raises(FileNotFoundError):
        text.TextFile(path)
    assert quick.read_quickly(path, ",", Columns(3, 0, 1, 2), DataOptions()) is None
    gc.collect()
    assert not closed
