"""Reading takes bounded memory, whatever a small packed file unpacks to, and what nobody asked for may be long."""

import csv
import gzip
import io
import json
import re
import resource
import threading
import tracemalloc
import zipfile

import pyarrow as arrow
import pyarrow.csv  # whose import takes memory, once
import pytest
from pyarrow import parquet

from tests.support.crash import fork, wait
from tests.support.recsys_data import make_model, make_split, rows_of
from ttt4rec.cli import main
from ttt4rec.recsys.data import DataError, datasets, read_interactions, text
from ttt4rec.recsys.data import arrow as arrow_reading
from ttt4rec.recsys.data import parquet as parquet_reading
from ttt4rec.recsys.data.public import load_public
from ttt4rec.recsys.recommend import Recommender

MIB = 1 << 20
NAMES = ("a.csv", "a.tsv", "a.inter", "a.csv.gz", "a.tsv.gz", "a.inter.gz")


def header(name):
    return b"user_id,item_id,timestamp,note\n".replace(b",", b"," if "csv" in name else b"\t")


def row(name, *fields):
    return (b"," if "csv" in name else b"\t").join(fields) + b"\n"


def write(path, content):
    """Write a file, or what it unpacks to; content may come in pieces."""
    with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
    return path


def peak(function):
    """Bytes that Python took at most while a function ran, beyond those before."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path):
    with pytest.raises(DataError, match="a row must have at most 4,194,304 bytes; given a longer one") as error:
        read_interactions(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def endless(piece, megabytes=64):
    return [piece * (MIB // len(piece))] * megabytes


@pytest.mark.parametrize("name", NAMES)
def test_a_line_without_an_end(name, tmp_path):
    content = [header(name), row(name, b"u", b"i", b"1", b""), *endless(b"x")]
    path, messages = write(tmp_path / name, content), []
    assert peak(lambda: messages.append(refused(path))) < 48 * MIB
    assert messages[0].startswith(f"{path} line 3: ")


def test_of_many_bad_rows_a_few_are_kept(tmp_path):
    path = write(tmp_path / "a.csv.gz", [header("a.csv"), *[b"x\n" * 1000] * 100])
    message = f"{path} line 2: a row must have 4 fields; given 1 (the first of 100000 bad lines: 2, 3, 4, 5, 6, ...)"
    message += "; no row can be understood"

    def refused():
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
            read_interactions(path)

    assert peak(refused) < 5 * MIB  # of which two are a block of the file


ENDLESS = {
    "header": ([b""], b"x", 1),
    "a quote that is never closed": ([header("csv"), b'u,i,1,"'], b"xxxxxxx\n", None),
    "fields without end": ([header("csv"), b'u,i,1,"'], b'x","\nyyz', None),
    "separators": ([header("csv")], b",,,,,,,,", 2),
    "bytes that are no text": ([header("csv")], b"\xff", 2),
    "behind carriage returns": ([header("csv"), b"u,i,1,\r\nu,i,1,\ru,i,1,\n"], b"x", 5),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_rows_without_an_end(case, tmp_path):
    begin, piece, line = ENDLESS[case]
    path, messages = write(tmp_path / "a.csv.gz", [*begin, *endless(piece)]), []
    assert peak(lambda: messages.append(refused(path))) < 100 * MIB  # csv has four bytes a character, and doubles
    assert f"{path} line {line or ''}" in messages[0]


def test_three_megabytes_that_unpack_to_three_gigabytes(tmp_path):
    """In a process that may take little more memory than it has."""
    piece = gzip.compress(b"x" * (64 * MIB), 9)  # members of a gzip file unpack to one text
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(header("csv")) + piece * 48)
    assert path.stat().st_size < 3.5e6

    def child():
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 200 * MIB, now + 200 * MIB))
        refused(path)

    assert wait(fork(child)) == 0


@pytest.mark.parametrize("length", [131_073, text.LONGEST_ROW - 100])
@pytest.mark.parametrize("name", NAMES)
def test_long_fields_that_nobody_asked_for(name, length, tmp_path):
    long = b"y" * length
    rows = [row(name, b"u%d" % (k % 3), b"i%d" % k, b"%d" % k, long if k in (0, 5) else b"") for k in range(600)]
    data = read_interactions(write(tmp_path / name, [header(name), *rows]))
    assert rows_of(data) == [(f"u{k % 3}", f"i{k}", k) for k in range(600)]


def test_a_long_field_over_many_lines(tmp_path):
    note = b'"' + b"a line of a long text\n" * 20_000 + b'"'
    content = header("csv") + b"u,i,1," + note + b"\nu,j,2,\nu,,3,\n"
    with pytest.raises(DataError, match=r"a\.csv line 20004: field 2 must be an item id"):
        read_interactions(write(tmp_path / "a.csv", content))
    data = read_interactions(write(tmp_path / "a.csv", content.replace(b"u,,3,\n", b"")))
    assert rows_of(data) == [("u", "i", 1), ("u", "j", 2)]


def test_many_long_rows_are_not_in_memory_together(tmp_path):
    path = write(tmp_path / "a.csv.gz", [header("csv"), *(b"u,i,1," + b"z" * MIB + b"\n" for _ in range(64))])
    assert peak(lambda: read_interactions(path)) < 48 * MIB  # of 64; pyarrow reads some blocks of two ahead


def test_the_limit_of_the_csv_module_is_as_before(tmp_path):
    path = write(tmp_path / "a.csv", header("csv") + b"u,i,1," + b"y" * 200_000 + b"\n")
    before = csv.field_size_limit()
    threads = [threading.Thread(target=read_interactions, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(DataError):
        read_interactions(write(tmp_path / "a.csv", b"nothing"))
    assert csv.field_size_limit() == before
    with text.long_fields, text.long_fields:
        assert csv.field_size_limit() > text.LONGEST_ROW
    assert csv.field_size_limit() == before


def test_a_bad_byte_is_found_behind_long_rows(tmp_path):
    content = header("csv") + b"".join(b"u,i,1," + b"z" * MIB + b"\n" for _ in range(8)) + b"u,\xff,1,\n"
    path = write(tmp_path / "a.csv.gz", content)
    with pytest.raises(DataError, match="line 10 must be UTF-8 text; given byte 0xff"):
        read_interactions(path)


def test_the_header_of_a_public_data_set(tmp_path):
    path = write(tmp_path / "gowalla.inter.gz", endless(b"x"))
    with pytest.raises(DataError, match=r"gowalla\.inter\.gz line 1: a row must have at most"):
        load_public("gowalla", tmp_path)
    assert path.exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bounds")
    split = make_split(folder)
    Recommender(make_model(split), split.histories).save(folder / "model")
    return folder / "model"


def test_histories(model, tmp_path, capsys):
    long = " ".join(["i3"] * 300_000).encode()
    path = write(tmp_path / "histories.gz", [b"i1 i2\n", long + b"\n", b"i4\n"])
    assert main(["recommend", str(model), "--histories", str(path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["items"]) for line in lines] == [10, 10, 10]
    write(path, [b"i1 i2\n", *endless(b"i1 ", 8)])
    assert main(["recommend", str(model), "--histories", str(path)]) == 2
    assert f"{path} line 2: a row must have at most" in capsys.readouterr().err


def test_a_history_of_brackets(model, tmp_path, capsys):
    path = write(tmp_path / "histories", b"[" * 100_000 + b"\ni1\n")
    assert main(["recommend", str(model), "--histories", str(path)]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["items"], len(second["items"])) == ([], 10)


def test_a_parquet_file_of_one_long_id(tmp_path):
    ids = arrow.DictionaryArray.from_arrays(arrow.array([0] * 3000, arrow.int32()), arrow.array(["x" * MIB]))
    columns = {"user_id": ids, "item_id": ["b", "a"] * 1500, "timestamp": list(range(3000))}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    before, found = arrow.total_allocated_bytes(), []
    assert peak(lambda: found.append(read_interactions(tmp_path / "a.parquet"))) < 32 * MIB
    assert arrow.total_allocated_bytes() == before
    assert (len(found[0]), len(found[0].user_ids), found[0].item_ids) == (3000, 1, ("b", "a"))


def test_parquet_batches_of_long_ids_are_short(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_reading, "_BYTES_PER_BATCH", 10_000)
    monkeypatch.setattr(arrow_reading, "_BYTES_PER_TABLE", 10_000)
    seen, encode = [], arrow_reading._Encoder.encode
    monkeypatch.setattr(
        arrow_reading._Encoder, "encode", lambda self, column: (seen.append(len(column)), encode(self, column))[1]
    )
    ids = [f"{number:01000}" for number in range(100)]
    table = arrow.table({"user_id": ids, "item_id": ids, "timestamp": list(range(100))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(read_interactions(tmp_path / "a.parquet").user_ids) == ids
    assert max(seen) <= 5


def test_parquet_dictionaries_with_more_than_is_used(tmp_path):
    names = arrow.array(["never", "b", "a", "b"])
    indices = arrow.array([2, 1, 3, 2, None], arrow.int32())
    table = arrow.table(
        {"user_id": arrow.DictionaryArray.from_arrays(indices, names), "item_id": ["x"] * 5, "timestamp": [1] * 5}
    )
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"row 5: .*the only bad row"):
        read_interactions(tmp_path / "a.parquet")
    parquet.write_table(table.slice(0, 4), tmp_path / "a.parquet")
    assert read_interactions(tmp_path / "a.parquet").user_ids == ("a", "b")
    column = arrow.DictionaryArray.from_arrays(arrow.array([1, 0, None]), arrow.array(["a", None]))
    assert arrow_reading._Encoder().encode(arrow.chunked_array([column])).codes.tolist() == [-1, 0, -1]


def test_an_archive_that_unpacks_to_too_much():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-100k/u.data", bytes(1 << 25))
    with pytest.raises(DataError, match=r"ml-100k/u\.data must have at most 16,777,216 bytes; given 33,554,432"):
        datasets._from_archive(buffer.getvalue())
