"""Text files as people have them: other separators, encodings, dates, no header, no times, some bad rows."""

import csv
import gzip
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.recsys_data import rows_of
from ttt4rec.recsys.data import DataError, quick, read_interactions, reading

ROWS = [("u1", "i é", 30), ("u2", "i é", 20), ("u1", "j", 10)]


def write(path, separator=",", header="user_id{}item_id{}rating{}timestamp", encoding="utf-8", rows=ROWS):
    lines = [header.replace("{}", separator)] if header else []
    lines += [separator.join((user, item, "5", str(time))) for user, item, time in rows]
    content = ("\n".join(lines) + "\n").encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refusal(path, **options):
    with pytest.raises(DataError) as error:
        read_interactions(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.inter", "a.csv.gz", "ratings.dat", "a.txt", "a"])
@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", "::"])
def test_the_first_line_tells_the_separator(tmp_path, name, separator):
    assert rows_of(read_interactions(write(tmp_path / name, separator))) == ROWS


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|", "::"])
def test_files_without_a_header(tmp_path, separator):
    path = write(tmp_path / "ratings.dat", separator, header="")
    names = ["user_id", "item_id", "rating", "timestamp"]
    assert rows_of(read_interactions(path, columns=names)) == ROWS
    path = write(tmp_path / "a.csv", separator, header="")
    assert rows_of(read_interactions(path, columns=names)) == ROWS
    message = refusal(path, separator=separator)
    assert "given u1, i é, 5, 30; give the names" in message
    assert message.endswith("of a file without a header line by columns (--columns)")
    assert "must have 5 fields; given 4" in refusal(path, columns=[*names, "more"], separator=separator)


def test_separators_that_nobody_would_guess(tmp_path):
    for separator in ("~", " ", "<->"):
        path = write(tmp_path / "a.csv", separator, rows=[("u", "i", 1)])
        assert rows_of(read_interactions(path, separator=separator)) == [("u", "i", 1)]
    assert "its separator be named (--separator), or its first line have the columns user_id, item_id, timestamp" in (
        refusal(write(tmp_path / "a.log", "~"))
    )
    for separator in ("", "\n", '"'):
        with pytest.raises(ValueError, match="separator must be"):
            read_interactions(path, separator=separator)


def test_quotes_stay_where_separators_have_several_characters(tmp_path):
    path = write(tmp_path / "a.dat", "::", rows=[('"u', "i:j", 1), ("v", '"k"', 2)])
    assert rows_of(read_interactions(path)) == [('"u', "i:j", 1), ("v", '"k"', 2)]
    with path.open("a") as file:
        file.write("\nu::i::5\n\nv::i::5::x\n")
    assert "line 5: a row must have 4 fields; given 3 (the first of 2 bad lines: 5, 7)" in refusal(path)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8-sig"])
def test_encodings(tmp_path, encoding):
    path = write(tmp_path / "a.csv", encoding=encoding)
    assert rows_of(read_interactions(path, encoding=encoding)) == ROWS
    if encoding != "utf-8-sig":
        assert "must be UTF-8 text; given byte" in (message := refusal(path))
        assert "name its encoding (--encoding), such as latin-1" in message
    path = write(tmp_path / "b.csv")
    assert "must be ascii text; given byte 0xc3" in refusal(path, encoding="ascii")
    assert "must be utf-16 text; given" in refusal(path, encoding="utf-16")
    for name in ("klingon", "base64"):
        with pytest.raises(ValueError, match="encoding must be one that Python knows"):
            read_interactions(path, encoding=name)


def test_rows_without_times_keep_their_order(tmp_path):
    rows = [(f"u{number % 3}", f"i{number}", "") for number in range(600)]
    path = write(tmp_path / "a.csv", rows=rows)
    data = read_interactions(path, row_order=True)
    assert rows_of(data) == [(user, item, place) for place, (user, item, _) in enumerate(rows)]
    assert data.times.dtype == np.int64
    (tmp_path / "b.csv").write_text("user_id,item_id\na,b\nc,d\n")
    assert rows_of(read_interactions(tmp_path / "b.csv", row_order=True)) == [("a", "b", 0), ("c", "d", 1)]
    assert "name another one by time_field (--time-field), or take rows in their order by row_order (--row-order)" in (
        refusal(tmp_path / "b.csv")
    )
    assert refusal(tmp_path / "b.csv", user_field="who").endswith(
        "must have one column 'who' and one column 'timestamp'; given user_id, item_id; name others by "
        "user_field (--user-field), time_field (--time-field), or take rows in their order by row_order (--row-order)"
    )


def test_dates_by_their_format(tmp_path):
    rows = [("u", "i", "12/31/2024 23:59"), ("u", "j", "01/02/2025 00:00")]
    path = write(tmp_path / "a.csv", rows=rows)
    american = read_interactions(path, date_format="%m/%d/%Y %H:%M")
    assert american.times.tolist() == [1_735_689_540, 1_735_776_000]
    message = refusal(path)
    assert "line 2: field 4 must be a time" in message
    assert "dates written otherwise need a date_format, --date-format" in message
    message = refusal(path, date_format="%d/%m/%Y %H:%M")
    assert "line 2: field 4 must be a date of the format '%d/%m/%Y %H:%M' (--date-format)" in message
    rows = [("u", "i", "2024-12-31 23:59 +0100")]
    zoned = read_interactions(write(tmp_path / "b.csv", rows=rows), date_format="%Y-%m-%d %H:%M %z")
    assert zoned.times.tolist() == [1_735_685_940]


@pytest.mark.parametrize("between", [0, 1000])  # 1000: in another of the chunks that are parsed together
@pytest.mark.parametrize("dates_first", [True, False])
def test_numbers_and_dates_are_not_mixed(tmp_path, between, dates_first):
    times = ["2024-12-31", "1735603200"][:: 1 if dates_first else -1]
    rows = [("u", "i", times[0])] * (1 + between) + [("u", "j", times[1])]
    message = refusal(write(tmp_path / "a.csv", rows=rows))
    kind = "date" if dates_first else "number"
    assert f"line {3 + between}: field 4 must be a {kind}, as the times before it are; given '{times[1]}'" in message


BAD = ["u1,i1,5", ",i,5,1", "u,i,5,soon", 'u,"i"x,5,1', "u,i,5,2024-01-01"]


@pytest.mark.parametrize("apart", [1, 300])
def test_bad_rows_are_left_out_if_asked(tmp_path, capsys, apart):
    good = [f"u{number},i{number},5,{number}" for number in range(apart * len(BAD))]
    lines = [line for place, bad in enumerate(BAD) for line in (*good[place * apart : (place + 1) * apart], bad)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["user_id,item_id,rating,timestamp", *lines, ""]))
    data = read_interactions(path, skip_bad_rows=5)
    assert rows_of(data) == [(f"u{number}", f"i{number}", number) for number in range(apart * len(BAD))]
    assert len(data.user_ids) == len(data.item_ids) == len(good)
    places = ", ".join(str((apart + 1) * (place + 1) + 1) for place in range(5))
    said = capsys.readouterr().err
    assert said.startswith(f"left out 5 of the rows: {path} line {apart + 2}: a row must have 4 fields; given 3 ")
    assert f"(the first of 5 bad lines: {places})" in said
    message = refusal(path, skip_bad_rows=4)
    assert f"(the first of 5 bad lines: {places}); at most 4 may be left out" in message
    assert refusal(path).endswith("; to leave them out: skip_bad_rows=5 (--skip-bad-rows)")
    with pytest.raises(ValueError, match="skip_bad_rows must be an integer of at least 0; given -1"):
        read_interactions(path, skip_bad_rows=-1)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_rows_left_out_are_named_by_their_lines_and_once(tmp_path, capsys, name):
    path, mark = tmp_path / name, "," if name == "a.csv" else "\t"
    lines = ["user_id,item_id,timestamp", "u,i,1", "", "u,i,soon", "u,j,2", ",j,3"]
    path.write_text("".join(f"{line.replace(',', mark)}\n" for line in lines))
    assert rows_of(read_interactions(path, skip_bad_rows=2)) == [("u", "i", 1), ("u", "j", 2)]
    said = capsys.readouterr().err
    assert said.startswith(f"left out 2 of the rows: {path} line 4: field 3 must be a time ")
    assert said.endswith("(the first of 2 bad lines: 4, 6)\n")
    assert said.count("left out") == 1


def test_row_order_counts_what_is_left(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id\na,b\nbad\nc,d\n")
    assert rows_of(read_interactions(path, row_order=True, skip_bad_rows=1)) == [("a", "b", 0), ("c", "d", 1)]
    path.write_text("user_id,item_id\nbad\n")
    assert "must have rows after the header; given none" in refusal(path, row_order=True, skip_bad_rows=1)


def outcome(path, **options):
    try:
        data = read_interactions(path, **options)
    except DataError as error:
        return str(error)
    return rows_of(data), data.times.dtype, data.user_ids, data.item_ids


PIECES = st.sampled_from(
    ["a", " ", "é", "5", "-7", "0x1f", "1e3", "+4", "007", "2.5", '"', '""', ",", ",", ",", "\n", "\n", "\r\n", "\r",
     "\ufeff", "\x85", "\u2028", "2024-01-01", "nan", str(2**63), str(-(2**63)), "\ud800"]
    + (["\0"] if sys.version_info >= (3, 11) else [])  # before, Python's reader refuses it
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.just("u,i,1\n"),
            st.tuples(PIECES, PIECES, PIECES).map(lambda row: ",".join(row) + "\n"),
            st.lists(PIECES, max_size=6).map("".join),
        ),
        max_size=8,
    ).map("".join),
    st.sampled_from([".csv", ".tsv", ".csv.gz"]),
    st.integers(0, 2),
)
def test_both_parsers_read_alike(tmp_path, text, suffix, skip):
    path = tmp_path / f"a{suffix}"
    content = ("user_id,item_id,timestamp\n" + text).replace(",", "," if "csv" in suffix else "\t")
    raw = content.encode("utf-8", "surrogatepass")
    path.write_bytes(gzip.compress(raw) if suffix.endswith("gz") else raw)
    quick = outcome(path, skip_bad_rows=skip)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "read_quickly", lambda *_: None)
        assert outcome(path, skip_bad_rows=skip) == quick


def test_plain_files_are_read_quickly(tmp_path, monkeypatch):
    """Not by Python's reader, in batches smaller than the file."""
    rows = [(f"u{number % 700}", f"i {number % 900}", number) for number in range(5000)]
    monkeypatch.setattr(reading, "_read_rows", None)
    for name, size in (("a.csv", 1 << 21), ("a.tsv", 4096), ("a.csv.gz", 4096)):
        monkeypatch.setattr(quick, "_BLOCK", size)
        assert rows_of(read_interactions(write(tmp_path / name, "\t" if "tsv" in name else ",", rows=rows))) == rows
    no_header = write(tmp_path / "b.csv", header="", rows=rows)
    names = ["user_id", "item_id", "more", "timestamp"]
    assert rows_of(read_interactions(no_header, columns=names)) == rows
    dates = [(user, item, f"2024-01-{1 + number % 28:02}") for user, item, number in rows]
    assert read_interactions(write(tmp_path / "c.csv", rows=dates)).times[1] == 1_704_153_600


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(CELLS, CELLS, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=9), st.sampled_from(",;|")
)
def test_what_was_written_with_quotes_is_read(tmp_path, rows, separator):
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([("user_id", "item_id", "timestamp"), *rows])
    assert rows_of(read_interactions(tmp_path / "a.csv")) == rows
