"""``ttt4rec serve`` as a process of its own, asked by a real client."""

import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.support.recsys_data import make_model, make_split
from ttt4rec.cli import main
from ttt4rec.recsys.online.events import SQLiteEventLog
from ttt4rec.recsys.recommend import Recommender

COMMAND = [sys.executable, "-m", "ttt4rec.cli", "serve"]


@contextmanager
def served(folder, *options):
    """A client of a new process, and the process."""
    command = [*COMMAND, folder, "--port", "0", "--pool-bytes", "200000", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(
                found[1] for line in lines if (found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line))
            )
            described = httpx.get(f"{address}/openapi.json").json()
            hooks = {"response": [lambda answer: check_described(described, answer)]}
            with httpx.Client(base_url=address, timeout=30, event_hooks=hooks) as client:
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


def copied(folder, place):
    """A folder that was never served."""
    for name in ("config.json", "model.safetensors", "ids.json", "histories.safetensors"):
        (place / name).write_bytes((folder / name).read_bytes())
    return place


@pytest.fixture
def client(service):
    return service[0]


@pytest.fixture(scope="module")
def other_folder(folder, tmp_path_factory):
    return copied(folder, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def other(other_folder):
    """A client of a service with options."""
    options = "--allowed-host", "shop.example", "--time-unit", "ms", "--max-ahead", "100"
    with served(other_folder, *options) as (client, _):
        yield client


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
    items = Recommender.load(folder).recommend(history=["i3", "i4"], k=24, exclude_seen=False).items
    assert recommended(client, "anna", k=24, exclude_seen=False) == [[item for item, _ in items]]
    assert recommended(client, "anna", "nobody", k=3) == [[i for i, _ in items if i not in ("i3", "i4")][:3], []]


def test_it_begins_with_the_histories_of_the_training_data(client, folder):
    recommender = Recommender.load(folder)
    best = recommender.recommend("u7", k=5).items
    assert recommended(client, "u7", k=5) == [[item for item, _ in best]]


def test_a_user_is_forgotten(client):
    for name in ("carl/ä ö", "carl\n\r/?#\x00", "\n"):
        observe(client, (name, "i1"))
        assert recommended(client, name, k=1) != [[]]
        assert client.delete(f"/users/{quote(name, safe='')}").status_code == 204
        assert recommended(client, name) == [[]]
    answer = client.delete(f"/users/{'u' * 201}")
    assert (answer.status_code, answer.json()["detail"][0]["where"]) == (422, ["path", "user_id"])


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
    "no json": ("/events", {"content": b"{", "headers": JSON}, "Invalid JSON"),
    "no events": ("/events", {"json": {}}, "Field required"),
    "no text": ("/events", {"json": {"events": [{"user_id": 5, "item_id": "i1"}]}}, "valid string"),
    "empty id": ("/events", {"json": {"events": [{"user_id": "", "item_id": "i1"}]}}, "at least 1 character"),
    "long id": ("/events", {"json": {"events": [{"user_id": "u" * 201, "item_id": "i1"}]}}, "at most 200 characters"),
    "another field": ("/events", {"json": {"events": [], "user": "u"}}, "Extra inputs"),
    "time": ("/events", {"json": {"events": [{"user_id": "u", "item_id": "i1", "time": True}]}}, "valid number"),
    "huge time": (
        "/events",
        {"json": {"events": [{"user_id": "u", "item_id": "i1", "time": 2**70}]}},
        "must be at most",
    ),
    "nan": (
        "/events",
        {"content": b'{"events": [{"user_id": "u", "item_id": "i1", "time": NaN}]}', "headers": JSON},
        "finite number",
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
    "text": ("/recommendations", {"json": {"user_ids": "u"}}, "valid array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_change_nothing(client, case):
    path, body, message = BAD[case]
    answer = client.post(path, **body)
    assert answer.status_code == (409 if case in ("item", "huge time") else 422), answer.text
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


def test_headers_are_limited(client):
    """Also one that never ends."""
    with asked(client, "GET /health HTTP/1.1\r\nHost: localhost\r\nX-Much: ") as connection:
        connection.settimeout(3)
        try:
            for _ in range(200):
                connection.sendall(b"x" * 4096)
                time.sleep(0.001)
        except OSError:
            pass
        answer = received(connection)  # until it is closed
    assert not answer or b"400 Bad Request" in answer


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


def check_described(described, answer):
    """An answer is one of those that openapi.json promises."""
    answer.read()
    path = re.sub("(?s)^/users/.*", "/users/{user_id}", answer.request.url.path)
    if path == "/made/up":
        return
    promised = described["paths"][path][answer.request.method.lower()]["responses"][str(answer.status_code)]
    kind = answer.headers.get("content-type", "").partition(";")[0]
    assert kind in (promised.get("content") or {""}), (path, answer.status_code, kind)
    if kind == "application/json":
        assert fits(answer.json(), promised["content"][kind]["schema"], described), (path, answer.text)


def fits(value, schema, described):
    """Of JSON Schema what the service uses."""
    if "$ref" in schema:
        return fits(value, described["components"]["schemas"][schema["$ref"].rpartition("/")[2]], described)
    if "anyOf" in schema:
        return any(fits(value, one, described) for one in schema["anyOf"])
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    kinds["null"] = type(None)
    if not isinstance(value, kinds[schema["type"]]):
        return False
    if schema["type"] == "array":
        return all(fits(x, schema["items"], described) for x in value)
    if schema["type"] == "object":
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            fits(x, known.get(name, others), described) for name, x in value.items()
        )
    return True


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=10)


def asked(client, text):
    """A connection on which bytes were sent."""
    connection = connect(client)
    connection.sendall(text.encode())
    return connection


def received(connection):
    """All that comes until the service closes the connection."""
    parts = []
    try:
        while part := connection.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


POST = "POST /recommendations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "


@pytest.mark.slow
def test_those_who_say_nothing_stop_nobody(client):
    """Silent, or in the midst of a header or a body, more of them than connections are kept."""
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(client)) for _ in range(300)]
        silent += [stack.enter_context(asked(client, "GET /health HT")) for _ in range(300)]
        slow = [stack.enter_context(asked(client, POST + '900\r\n\r\n{"user_ids":')) for _ in range(250)]
        assert client.get("/health").json() == {"status": "ok"}
        assert recommended(client, "nobody", k=3) == [[]]
        silent[0].settimeout(4)
        assert received(silent[0]) == b""  # it was idle the longest of too many
        assert received(silent[-1]) == b""
        assert b"408 Request Timeout" in slow[-1].recv(1000)
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.slow
def test_those_who_do_not_read_stop_nobody(service):
    """Though their answers fill what the system keeps for them, and there are more of them than places."""
    client, process = service
    observe(client, ("heinz", "i1"))
    open_files = Path(f"/proc/{process.pid}/fd")
    before_all = len(list(open_files.iterdir()))
    body = json.dumps({"user_ids": ["heinz"] * 100, "k": 1000, "exclude_seen": False})
    with ExitStack() as stack:
        for _ in range(5):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((client.base_url.host, client.base_url.port))
            connection.sendall(f"{POST}{len(body)}\r\n\r\n{body}".encode() * 80)
        answered, before = metrics(client), {}
        while answered["ttt4rec_recommendations_total"] != before.get("ttt4rec_recommendations_total"):
            time.sleep(0.7)
            answered, before = metrics(client), answered
        assert recommended(client, "nobody", k=3) == [[]]
        end = time.monotonic() + 10
        while len(list(open_files.iterdir())) > before_all and time.monotonic() < end:
            time.sleep(0.1)
        assert len(list(open_files.iterdir())) <= before_all  # they were cut off


def test_too_many_clients_are_served_or_told_so(folder, client):
    """Within a second and a bit: this is a busy machine. Those who only look whether it is well do not wait."""
    body = '{"events": [' + ", ".join(['{"user_id": "ida", "item_id": "i1"}'] * 300) + "]}"
    text = POST.replace("recommendations", "events") + f"{len(body)}\r\nConnection: close\r\n\r\n{body}"
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(client)) for _ in range(400)]
        begin = time.monotonic()
        for connection in connections:
            connection.sendall(text.encode())
        assert client.get("/health").json() == {"status": "ok"}
        waited = time.monotonic() - begin
        answers = [received(connection) for connection in connections]
        took = time.monotonic() - begin
    statuses = Counter(answer[9:12] for answer in answers)
    assert set(statuses) == {b"200", b"503"}
    assert statuses[b"200"] > 5
    assert all(b"retry-after: 1" in answer for answer in answers if answer[9:12] == b"503")
    assert waited < took < 5


def test_a_request_under_another_name_is_refused(client, other):
    """As a browser sends it for a site whose name was made to point here."""
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.2", "", "[::2]"):
        answer = client.get("/metrics", headers={"Host": host})
        assert answer.status_code == 400
        assert f"to which --allowed-host adds; given {host!r}" in answer.json()["detail"]
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000", "[::1]"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    for host, status in {"shop.example:80": 200, "localhost": 200, "example": 400}.items():
        assert other.get("/health", headers={"Host": host}).status_code == status


def test_a_form_of_another_site_is_no_request(client):
    """A browser sends text without asking; as JSON only what the site is allowed."""
    body = b'{"events": [{"user_id": "u", "item_id": "i1"}]}'
    answer = client.post("/events", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 422
    assert recommended(client, "u") == [[]]


def test_times_of_the_far_future_are_refused(client, other):
    now = time.time()
    assert observe(client, ("jan", "i1", None, now + 3600)).status_code == 200
    answer = observe(client, ("jan", "i2", None, now + 10 * 86400))
    assert answer.status_code == 409
    assert "time must be at most" in answer.json()["detail"]
    assert observe(other, ("jan", "i1", None, int(1000 * now) + 50_000)).status_code == 200
    assert observe(other, ("jan", "i1", None, int(1000 * now) + 200_000)).status_code == 409


@pytest.mark.slow
def test_two_services_begun_at_once_are_one(folder, tmp_path):
    """The other says why it ends; the data are logged once, and are nobody else's to read."""
    copied(folder, tmp_path)
    command = [*COMMAND, tmp_path, "--port", "0"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    end = time.monotonic() + 60
    while all(process.poll() is None for process in both) and time.monotonic() < end:
        time.sleep(0.05)
    ended, other = sorted(both, key=lambda process: process.poll() is None)
    assert (ended.poll(), other.poll()) == (2, None)
    said = ended.stderr.read()
    assert said == f"ttt4rec: error: another service works in {tmp_path}; end it, or take a copy\n"
    for line in iter(other.stderr.readline, ""):
        if "running on" in line:
            break
    other.terminate()
    _, said = other.communicate(timeout=30)
    assert re.search(r"^INFO: +snapshot of 0 users$", said, flags=re.MULTILINE)
    with closing(SQLiteEventLog(tmp_path / "events.db")) as log:
        histories = Recommender.load(tmp_path).histories
        assert len(log.users()) == 60
        lengths = [tail.length for tail in log.read(log.users(), [[]] * 60)]
        assert sum(lengths) == len(histories.items)
    copies = {path.name for path in folder.glob("*.json")} | {"model.safetensors", "histories.safetensors"}
    written = [folder / name for name in copies] + [path for path in tmp_path.iterdir() if path.name not in copies]
    assert {"ids.json", "events.db", "states.safetensors"} <= {path.name for path in written}
    assert {path.name: path.stat().st_mode & 0o777 for path in written} == dict.fromkeys(
        (path.name for path in written), 0o600
    )


def test_a_mistake_is_one_line(folder, tmp_path, capsys):
    (copied(folder, tmp_path) / "events.db").write_text("no log" * 999)
    (tmp_path / "empty").mkdir()
    for place, options, message in (
        (tmp_path / "nowhere", [], "nowhere holds no saved model: config.json is missing"),
        (tmp_path / "empty", [], "empty holds no saved model: config.json is missing"),
        (tmp_path, [], "is not an event log"),
        (tmp_path, ["--max-ahead=-1e9"], "the data's latest is 10000000"),
    ):
        assert main(["serve", str(place), *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not list((tmp_path / "empty").iterdir())


def test_health_tells_of_a_damaged_event(other, other_folder):
    with closing(sqlite3.connect(other_folder / "events.db")) as database:
        database.execute("UPDATE events SET item = 'i5' WHERE user = (SELECT id FROM users WHERE name = 'u9')")
        database.commit()
    assert other.get("/health").status_code == 200
    answer = other.post("/recommendations", json={"user_ids": ["u9"]})
    assert (answer.status_code, answer.json()) == (503, {"detail": "the event log is not available"})
    answer = other.get("/health")
    assert answer.status_code == 503
    assert re.search("the checksum of event . of user 'u9' is wrong", answer.json()["detail"])


@pytest.mark.slow
def test_killed_and_ended(folder, tmp_path):
    """What was acknowledged is there after a kill; a service that is ended saves its states."""
    copied(folder, tmp_path)
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
