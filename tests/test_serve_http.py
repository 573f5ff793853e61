"""The HTTP example as a process of its own, asked by a real client."""

import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from recsys_data import make_model, make_split
from ttt4rec.recsys.events import SQLiteEventLog
from ttt4rec.recsys.recommend import Recommender

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_http.py"


@contextmanager
def served(folder):
    """A client of a new process, and the process."""
    command = [sys.executable, EXAMPLE, folder, "--port", "0", "--pool-bytes", "200000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(
                found[1] for line in lines if (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line))
            )
            with httpx.Client(base_url=address, timeout=30) as client:
                yield client, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("service")
    split = make_split(place)
    Recommender(make_model(split, max_len=100), split.histories).save(place)
    return place


@pytest.fixture(scope="module")
def service(folder):
    with served(folder) as running:
        yield running


@pytest.fixture
def client(service):
    return service[0]


def observe(client, *events):
    names = ("user_id", "item_id", "event_id", "time")
    body = {"events": [dict(zip(names, event, strict=False)) for event in events]}
    return client.post("/events", json=body)


def recommended(client, *users, **options):
    answer = client.post("/recommendations", json={"user_ids": users, **options})
    assert answer.status_code == 200, answer.text
    return [[item["item_id"] for item in items] for items in answer.json()["recommendations"]]


def test_events_in_recommendations_out(client, folder):
    answer = observe(client, ("anna", "i3", "1"), ("anna", "i4"), ("ben", "i9", None, 5.5), ("anna", "i4", "1"))
    assert answer.json() == {"new": [True, True, True, False]}
    items = Recommender.load(folder).recommend(history=["i3", "i4"], k=24).items
    assert recommended(client, "anna", k=24, exclude_seen=False) == [[item for item, _ in items]]
    assert recommended(client, "anna", "nobody", k=3) == [[i for i, _ in items if i not in ("i3", "i4")][:3], []]


def test_it_begins_with_the_histories_of_the_training_data(client, folder):
    recommender = Recommender.load(folder)
    best = recommender.recommend("u7", k=5, exclude_seen=True).items
    assert recommended(client, "u7", k=5) == [[item for item, _ in best]]


def test_a_user_is_forgotten(client):
    observe(client, ("carl/ä ö", "i1"))
    assert recommended(client, "carl/ä ö", k=1) != [[]]
    assert client.delete("/users/carl%2F%C3%A4%20%C3%B6").status_code == 204
    assert recommended(client, "carl/ä ö") == [[]]


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok"}
    before = metrics(client)
    observe(client, ("dora", "i1", "x"), ("dora", "i1", "x"))
    recommended(client, "dora", "emil")
    client.get("/made/up")
    after = metrics(client)
    for name, grown in {
        'ttt4rec_events_total{new="true"}': 1,
        'ttt4rec_events_total{new="false"}': 1,
        "ttt4rec_recommendations_total": 2,
        'ttt4rec_request_seconds_count{route="/events",status="200"}': 1,
        'ttt4rec_request_seconds_count{route="none",status="404"}': 1,
    }.items():
        assert after[name] - before.get(name, 0) == grown, name
    assert 0 < after["ttt4rec_users"] <= after["ttt4rec_slots"]


def metrics(client):
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


JSON = {"content-type": "application/json"}
BAD = {
    "no json": ("/events", {"content": b"{", "headers": JSON}, "JSON decode error"),
    "no events": ("/events", {"json": {}}, "Field required"),
    "no text": ("/events", {"json": {"events": [{"user_id": 5, "item_id": "i1"}]}}, "valid string"),
    "empty id": ("/events", {"json": {"events": [{"user_id": "", "item_id": "i1"}]}}, "at least 1 character"),
    "long id": ("/events", {"json": {"events": [{"user_id": "u" * 201, "item_id": "i1"}]}}, "at most 200 characters"),
    "another field": ("/events", {"json": {"events": [], "user": "u"}}, "Extra inputs"),
    "time": ("/events", {"json": {"events": [{"user_id": "u", "item_id": "i1", "time": True}]}}, "valid number"),
    "huge time": ("/events", {"json": {"events": [{"user_id": "u", "item_id": "i1", "time": 2**70}]}}, "64 bits"),
    "nan": (
        "/events",
        {"content": b'{"events": [{"user_id": "u", "item_id": "i1", "time": NaN}]}', "headers": JSON},
        "64 bits",
    ),
    "many": ("/events", {"json": {"events": [{"user_id": "u", "item_id": "i1"}] * 1001}}, "at most 1000 items"),
    "item": ("/events", {"json": {"events": [{"user_id": "u", "item_id": n} for n in ("i1", "no")]}}, "unknown: 'no'"),
    "surrogate": (
        "/events",
        {"content": b'{"events": [{"user_id": "\\ud800", "item_id": "i1"}]}', "headers": JSON},
        "detail",
    ),
    "k": ("/recommendations", {"json": {"user_ids": ["u"], "k": 0}}, "greater than or equal to 1"),
    "large k": ("/recommendations", {"json": {"user_ids": ["u"], "k": 1001}}, "less than or equal to 1000"),
    "users": ("/recommendations", {"json": {"user_ids": ["u"] * 101}}, "at most 100 items"),
    "text": ("/recommendations", {"json": {"user_ids": "u"}}, "valid list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_change_nothing(client, case):
    path, body, message = BAD[case]
    answer = client.post(path, **body)
    assert answer.status_code == 422, answer.text
    assert message in answer.text
    assert recommended(client, "u") == [[]]


def test_bodies_are_limited(client):
    """By their announced length, and by what comes where none is announced."""
    body = b'{"events": [' + b" " * (1 << 20) + b"]}"
    assert client.post("/events", content=body).status_code == 413
    chunks = (body[start : start + 5000] for start in range(0, len(body), 5000))
    try:
        status = client.post("/events", content=chunks).status_code
    except httpx.TransportError:  # the connection was closed while the client was still sending
        status = 413
    assert status == 413
    assert observe(client, ("fritz", "i1")).status_code == 200


def test_many_clients_at_once(client):
    """Every user's events arrive in order, whoever else is there."""

    def visit(number):
        for step in range(5):
            assert observe(client, (f"guest{number}", f"i{(number + step) % 24}")).status_code == 200
        return recommended(client, f"guest{number}", k=24)[0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(visit, range(8)))
    for number, items in enumerate(answers):
        assert len(items) == 19
        assert not {f"i{(number + step) % 24}" for step in range(5)} & set(items)
        assert recommended(client, f"guest{number}", k=24) == [items]


def test_killed_and_ended(folder, tmp_path):
    """What was acknowledged is there after a kill; a service that is ended saves its states."""
    for name in ("config.json", "model.safetensors", "ids.json", "histories.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with served(tmp_path) as (client, process):
        observe(client, ("anna", "i3", "1"), ("anna", "i4"))
        before = recommended(client, "anna", k=24)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with served(tmp_path) as (client, process):
        assert observe(client, ("anna", "i3", "1")).json() == {"new": [False]}
        assert recommended(client, "anna", k=24) == before
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    assert (tmp_path / "states.safetensors").is_file()
    log = SQLiteEventLog(tmp_path / "events.db")
    assert len(log.users()) == 61
    log.forget(log.users())
    with served(tmp_path) as (client, process):  # all are gone, and do not come back from the training data
        assert recommended(client, "anna", k=24) == [[]]
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert log.users() == []
