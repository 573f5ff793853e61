"""Folders of Parquet files: read as one file of all their rows, in the memory that the rows' codes take."""

import resource

import numpy as np
import pyarrow as arrow
import pytest
from pyarrow import dataset, parquet

from tests.support.crash import fork, wait
from ttt4rec.recsys.data import DataError, read_interactions
from ttt4rec.recsys.data.datasets import load_interactions


def rows_of(data):
    columns = (data.users.tolist(), data.items.tolist(), data.times.tolist())
    return [(data.user_ids[user], data.item_ids[item], time) for user, item, time in zip(*columns, strict=True)]


def write(path, users, items, times, **types):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"user_id": users, "item_id": items, "timestamp": times}
    parquet.write_table(arrow.table({k: arrow.array(v, type=types.get(k)) for k, v in columns.items()}), path)


def test_files_in_the_order_of_their_paths(tmp_path):
    write(tmp_path / "b.parquet", ["u"], ["x"], [1])
    write(tmp_path / "a" / "1.snappy.PARQUET", ["v", "u"], ["y", "x"], [3, 2])
    write(tmp_path / "_temporary" / "1.parquet", ["w"], ["z"], [9])
    (tmp_path / ".hidden.parquet").write_text("no file of this kind")
    (tmp_path / "_SUCCESS").touch()
    assert rows_of(load_interactions(tmp_path)) == [("v", "y", 3), ("u", "x", 2), ("u", "x", 1)]


def test_a_partitioned_folder(tmp_path):
    """As pyarrow and Spark write it: what folders are named after is a column, here of users and of times."""
    days = ["2024-05-02", "2024-05-01", "2024-05-02", "2024-05-01"]
    table = arrow.table({"user_id": ["ü/a", "v", "v", "ü/a"], "item_id": [7, 8, 9, 7], "day": days})
    names = dataset.partitioning(arrow.schema([("day", arrow.string()), ("user_id", arrow.string())]), flavor="hive")
    dataset.write_dataset(table, tmp_path / "data", format="parquet", partitioning=names)
    data = read_interactions(tmp_path / "data", time_field="day")
    second = 1714521600
    expected = {("ü/a", 7, second + 86400), ("v", 8, second), ("v", 9, second + 86400), ("ü/a", 7, second)}
    assert set(rows_of(data)) == expected


def test_whole_numbers_of_several_widths(tmp_path):
    write(tmp_path / "a.parquet", [1], [5], [1], user_id=arrow.int32())
    write(tmp_path / "b.parquet", [2**40, 1], [5, 6], [2, 3], item_id=arrow.uint8())
    assert rows_of(read_interactions(tmp_path)) == [(1, 5, 1), (2**40, 5, 2), (1, 6, 3)]


def test_bad_rows_are_named_by_their_file(tmp_path):
    write(tmp_path / "a.parquet", ["u"] * 3, ["x"] * 3, [1, 2, 3])
    write(tmp_path / "b.parquet", ["u", None, "u"], ["x"] * 3, [1, 2, 3])
    with pytest.raises(DataError, match=r"b\.parquet row 2: a row must have two ids"):
        read_interactions(tmp_path)
    assert len(read_interactions(tmp_path, skip_bad_rows=1)) == 5


def test_files_that_do_not_belong_together(tmp_path):
    write(tmp_path / "a.parquet", ["u"], ["x"], [1])
    write(tmp_path / "b.parquet", ["u"], [5], [1])
    like = r"b\.parquet must have columns like .*a\.parquet, which are texts, texts, numbers; given texts, num"
    with pytest.raises(DataError, match=like):
        read_interactions(tmp_path)
    parquet.write_table(arrow.table({"user_id": ["u"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet must have one column 'item_id'"):
        read_interactions(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"b\.parquet must be a readable Parquet file"):
        read_interactions(tmp_path)


def test_a_folder_is_not_in_memory_as_a_whole(tmp_path):
    """The files hold 64 MB, of which 4 are ids and times; reading may take 40."""
    rng, rows = np.random.default_rng(0), 16_000
    for number in range(8):
        columns = {name: rng.integers(0, 500, rows) for name in ("user_id", "item_id", "timestamp")}
        table = arrow.table(columns | {"wide": [b"wide" * 125] * rows})
        parquet.write_table(table, tmp_path / f"{number}.parquet", compression="none", use_dictionary=False)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) > 64_000_000

    def child():
        read_interactions(tmp_path / "0.parquet")  # what is imported, and pyarrow's threads
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(read_interactions(tmp_path)) == 8 * rows
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000

    assert wait(fork(child)) == 0
