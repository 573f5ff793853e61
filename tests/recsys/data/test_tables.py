"""Data that is in memory: Arrow, columns and rows of Python, and frames; Hugging Face's where that is installed."""

import datetime
import decimal
import importlib
import sys
import uuid
from importlib.util import find_spec

import numpy as np
import pandas
import polars
import pyarrow as arrow
import pytest

from tests.support.recsys_data import rows_of
from ttt4rec.recsys import build_histories, filter_k_core, load_interactions
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.data import arrow as batches

UUIDS = [uuid.UUID(int=number + (7 << 100)) for number in range(4)]
IDS = {
    "text": ["b", "a", "b", "é"],
    "whole": [2**62, -3, 2**62, 0],
    "uuid": [UUIDS[2], UUIDS[0], UUIDS[2], UUIDS[1]],
}
SECONDS = [1_700_000_000, 1_600_000_000, 1_800_000_000, 5]
MOMENTS = [datetime.datetime.fromtimestamp(second, datetime.timezone.utc).replace(tzinfo=None) for second in SECONDS]


def expected(kind, times=tuple(SECONDS)):
    return list(zip(IDS[kind], IDS["text"], times, strict=True))


def columns(kind, times=SECONDS):
    return {"user_id": IDS[kind], "item_id": IDS["text"], "timestamp": times}


def refusal(source, **options):
    with pytest.raises(DataError) as error:
        load_interactions(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class Streamed:
    """Something that speaks Arrow and nothing else."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


class Dataset:
    """What is taken of a Hugging Face dataset."""

    def __init__(self, table, kind=None):
        self._table, self._kind = table, kind

    def with_format(self, kind):
        return Dataset(self._table, kind)

    def iter(self, batch_size):
        assert self._kind == "arrow"
        for start in range(0, len(self._table), batch_size):
            yield self._table.slice(start, batch_size)


FORMS = {
    "columns": dict,
    "tuples": lambda x: list(zip(*x.values(), strict=True)),
    "lists": lambda x: [list(row) for row in zip(*x.values(), strict=True)],
    "dictionaries": lambda x: [dict(zip(x, row, strict=True)) for row in zip(*x.values(), strict=True)],
    "a generator": lambda x: (row for row in zip(*x.values(), strict=True)),
    "arrow": arrow.table,
    "batch": lambda x: arrow.record_batch(x),
    "reader": lambda x: arrow.table(x).to_reader(2),
    "stream": lambda x: Streamed(arrow.table(x)),
    "dataset": lambda x: Dataset(arrow.table(x)),
    "arrays": lambda x: {name: np.array(column) for name, column in x.items()},
    "pandas": pandas.DataFrame,
    "polars": polars.DataFrame,
}
if find_spec("datasets"):  # a large package, which our tests do not ask for; Dataset above stands for it
    FORMS["datasets"] = lambda x: importlib.import_module("datasets").Dataset.from_dict(x)
    FORMS["streamed datasets"] = lambda x: FORMS["datasets"](x).to_iterable_dataset()
HOLDING = [(form, kind) for form in FORMS for kind in IDS if kind != "uuid" or not form.endswith("datasets")]
"""What can hold ids of a kind."""


@pytest.fixture(params=[True, False], ids=["pyarrow", "no pyarrow"])
def with_arrow(request, monkeypatch):
    """Frames are read with and without pyarrow; what is Arrow needs it."""
    if not request.param:
        for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
            monkeypatch.setitem(sys.modules, name, None)
    return request.param


@pytest.mark.parametrize(("form", "kind"), HOLDING)
def test_ids_come_back_as_they_came(monkeypatch, form, kind):
    monkeypatch.setattr(batches, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(batches, "_ROWS_PER_TABLE", 3)
    data = load_interactions(FORMS[form](columns(kind)))
    assert rows_of(data) == expected(kind)
    assert [type(x) for x in data.user_ids] == [type(IDS[kind][0])] * 3
    assert [type(x) for x in data.item_ids] == [str] * 3
    assert data.users.dtype == data.items.dtype == data.times.dtype == np.int64
    histories = build_histories(filter_k_core(data, min_user=1, min_item=1))
    assert histories.user_ids == data.user_ids
    assert [histories.user_code(str(x)) for x in data.user_ids] == [0, 1, 2]


@pytest.mark.parametrize("form", ["columns", "arrays", "pandas", "polars"])
@pytest.mark.parametrize("kind", ["text", "whole"])
def test_frames_need_no_pyarrow(with_arrow, form, kind):
    assert rows_of(load_interactions(FORMS[form](columns(kind)))) == expected(kind)
    assert rows_of(load_interactions(FORMS[form](columns(kind, MOMENTS)))) == expected(kind)


@pytest.mark.parametrize("form", FORMS)
def test_times_of_every_type(form):
    """One rule: numbers stay, everything else is a moment and becomes seconds since 1970."""
    fractions = [time + 0.25 for time in SECONDS]
    for times, found in [
        (SECONDS, SECONDS),
        ([float(time) for time in SECONDS], SECONDS),
        (fractions, fractions),
        (MOMENTS, SECONDS),
        ([moment + datetime.timedelta(microseconds=250_000) for moment in MOMENTS], fractions),
        ([moment.date() for moment in MOMENTS], [time - time % 86400 for time in SECONDS]),
        ([str(time) for time in SECONDS], SECONDS),
        ([f"{moment.isoformat()}Z" for moment in MOMENTS], SECONDS),
    ]:
        data = load_interactions(FORMS[form](columns("text", times)))
        assert data.times.tolist() == found
        assert data.times.dtype == (np.int64 if isinstance(found[0], int) else np.float64)
    american = [moment.strftime("%m/%d/%Y %H.%M.%S") for moment in MOMENTS]
    data = load_interactions(FORMS[form](columns("text", american)), date_format="%m/%d/%Y %H.%M.%S")
    assert data.times.tolist() == SECONDS
    data = load_interactions(FORMS[form](columns("text")), row_order=True)
    assert data.times.tolist() == [0, 1, 2, 3]


def test_times_with_a_zone_decimals_and_numbers_of_numpy():
    zone = datetime.timezone(datetime.timedelta(hours=9))
    zoned = [moment.replace(tzinfo=datetime.timezone.utc).astimezone(zone) for moment in MOMENTS]
    numbers = np.array(SECONDS)
    for times in (zoned, [decimal.Decimal(x) for x in SECONDS], list(numbers), numbers, numbers.astype(np.float64)):
        assert load_interactions(columns("text", times)).times.tolist() == SECONDS
    for unit in ("s", "ms", "us", "ns"):
        moments = np.array(SECONDS, dtype="datetime64[s]").astype(f"datetime64[{unit}]")
        assert load_interactions(columns("text", moments)).times.tolist() == SECONDS
    exact = [2**63 - 1, -(2**63), 2**53 + 1, 0]
    assert load_interactions(columns("text", exact)).times.tolist() == exact
    assert "times must be such as float64 holds exactly" in refusal(columns("text", [2**53 + 1, 0.5, 0, 0]))


BAD = [
    ({"user_id": ["a", None, "b", "c"]}, "position 1: "),
    ({"user_id": ["a", " ", "b", ""]}, "the first of 2 bad positions: 1, 3"),
    ({"user_id": [1, 2, "3", 4]}, "position 2: 'user_id' must be int, as the ids before it are; given '3'"),
    ({"user_id": [1.0, 2.0, 3.0, 4.0]}, "user_id"),
    ({"user_id": [True, False, True, True]}, "user_id"),
    ({"timestamp": [1.0, float("nan"), 3.0, float("inf")]}, "the first of 2 bad positions: 1, 3"),
    ({"timestamp": [1, None, 3, 4]}, "position 1: "),
    ({"timestamp": ["1", "2024-01-01", "3", "4"]}, "must be a number, as the times before it are; given '2024"),
    ({"timestamp": [True, True, True, True]}, "timestamp"),
    ({"timestamp": [2**63, 1, 2, 3]}, "position 0: 'timestamp' must be a time"),
]
MIXED = "user_id' must be int, as"


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (form, change, message)
        for form in ("columns", "tuples", "dictionaries", "arrow", "pandas", "polars")
        for change, message in BAD
        if MIXED not in message or form not in ("arrow", "polars")  # where a column has one type
    ],
)
def test_bad_rows(form, change, message):
    content = columns("text") | change
    big = 2**63 in change.get("timestamp", ())
    if form == "arrow" and big:
        content["timestamp"] = np.array(content["timestamp"], dtype=np.uint64)
    source = FORMS[form](content)
    if form == "pandas" and None in change.get("timestamp", ()):
        message = "must have rows|position 1"
    with pytest.raises(DataError, match=message) as error:
        load_interactions(source)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["columns", "tuples", "arrow", "pandas", "polars"])
def test_bad_rows_are_left_out_if_asked(form, capsys):
    source = FORMS[form](columns("text") | {"user_id": ["a", None, "c", "d"], "timestamp": ["1", "2", "soon", "4"]})
    data = load_interactions(source, skip_bad_rows=2)
    assert rows_of(data) == [("a", "b", 1), ("d", "é", 4)]
    assert "left out 2 of the rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "data must be a path, a name, a data frame, columns or rows; given int"),
        (b"ml-100k", "given bytes"),
        (["ml-100k"], "position 0 must be a tuple (user, item, time) or a mapping of user_id, item_id, timestamp"),
        ([("a", "b")], "rows without a time are read by row_order=True"),
        ([], "list must have rows; given none"),
        ({"user_id": []}, "must have one column 'item_id' and one column 'timestamp'; given user_id"),
        ({"user_id": ["a"], "item_id": [], "timestamp": []}, "must have columns of one length"),
        ({"user_id": [], "item_id": [], "timestamp": []}, "dict must have rows; given none"),
        (
            arrow.table({"user_id": ["a"]}),
            "one column 'item_id' and one column 'timestamp'; given user_id",
        ),
        (arrow.table({"user_id": [], "item_id": [], "timestamp": []}), "must have rows; given none"),
    ],
    ids=str,
)
def test_what_is_no_data(source, message):
    assert message in refusal(source)


def test_columns_by_other_names_and_rows_without_times():
    rows = [{"who": 1, "what": "x"}, {"who": 2, "what": "y"}]
    data = load_interactions(rows, user_field="who", item_field="what", row_order=True)
    assert rows_of(data) == [(1, "x", 0), (2, "y", 1)]
    assert rows_of(load_interactions([(1, "x"), (2, "y")], row_order=True)) == [(1, "x", 0), (2, "y", 1)]


def test_only_the_columns_asked_for_are_read():
    odd = arrow.array([{"a": 1}, {"a": 2}, None, None])
    assert rows_of(load_interactions(arrow.table({**columns("text"), "odd": odd}))) == expected("text")
    frame = pandas.DataFrame({**columns("text"), "odd": [1, "a", None, object()]})
    assert rows_of(load_interactions(frame)) == expected("text")


def test_frames_of_pandas_as_people_have_them():
    frame = pandas.DataFrame(columns("whole"))
    assert rows_of(load_interactions(frame.astype({"user_id": "Int64", "item_id": "category"}))) == expected("whole")
    assert rows_of(load_interactions(frame.set_index([[7, 7, 5, 1]]).iloc[1:])) == expected("whole")[1:]
    zoned = frame.assign(timestamp=pandas.to_datetime(frame.timestamp, unit="s", utc=True).dt.tz_convert("Asia/Tokyo"))
    assert rows_of(load_interactions(zoned)) == expected("whole")
    mixed = frame.assign(timestamp=[pandas.Timestamp("2024-01-01"), 5, 6, 7])
    assert "position 1: 'timestamp' must be a date, as the times before it are; given 5" in refusal(mixed)
    twice = pandas.concat([frame, frame.user_id], axis=1)
    assert "must have one column 'user_id'; given 2 among" in refusal(twice)
    assert refusal(frame.user_id).startswith("Series ")  # which pandas gives pyarrow from version 3 on
    floats = frame.assign(user_id=[1.0, 2.0, None, 3.0])
    assert "position 0: 'user_id' must be an id (a text, a whole number or a UUID); given 1.0" in refusal(floats)


def test_frames_of_polars_as_people_have_them():
    frame = polars.concat([polars.DataFrame(columns("whole"))] * 2)
    assert rows_of(load_interactions(frame)) == expected("whole") * 2
    assert rows_of(load_interactions(frame.with_columns(polars.col("item_id").cast(polars.Categorical)))) == (
        expected("whole") * 2
    )
    assert "given LazyFrame; give its .collect()" in refusal(frame.lazy())


if find_spec("datasets"):

    def test_datasets_that_were_shuffled():
        dataset = FORMS["datasets"](columns("whole")).select([3, 0])
        assert rows_of(load_interactions(dataset)) == [expected("whole")[3], expected("whole")[0]]
