"""The service in this process: what it answers, in which order requests get to work, and whom it cuts off."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import httpx
import pytest
import uvicorn

from tests.support.online_data import ITEMS, MemoryEventLog, make_model, make_online
from ttt4rec.recsys.online import OnlineRecommender, SQLiteEventLog
from ttt4rec.recsys.serving import app, connections, upkeep, waiting
from ttt4rec.recsys.serving.answers import Answer, RefusedError
from ttt4rec.recsys.serving.app import Service
from ttt4rec.recsys.serving.connections import Connection
from ttt4rec.recsys.serving.waiting import Groups, Places

MODEL = make_model()


@pytest.fixture
def online():
    return OnlineRecommender(MODEL, ITEMS, MemoryEventLog(), pool_bytes=200_000)


def ask(online, *requests, demo=None):
    """The answers to (method, path, options) that are sent at the same moment."""

    async def asking():
        transport = httpx.ASGITransport(Service(online, demo=demo))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await asyncio.gather(*(client.request(*words, **options) for *words, options in requests))

    return asyncio.run(asking())


def events(*pairs):
    return "POST", "/events", {"json": {"events": [{"user_id": user, "item_id": item} for user, item in pairs]}}


def test_what_there_is_not(online):
    nowhere, users, method = ask(online, ("GET", "/nowhere", {}), ("DELETE", "/users", {}), ("GET", "/events", {}))
    assert (nowhere.status_code, users.status_code) == (404, 404)
    assert nowhere.json() == {"detail": "the path is unknown; see /openapi.json"}
    assert (method.status_code, method.headers["allow"]) == (405, "POST")


def test_everything_is_described(online):
    (answer,) = ask(online, ("GET", "/openapi.json", {}))
    described = answer.json()
    assert set(described["paths"]) == {"/events", "/recommendations", "/users/{user_id}", "/health", "/metrics"}
    names = set(described["components"]["schemas"])
    used = {part.partition('"')[0] for part in answer.text.split("#/components/schemas/")[1:]}
    assert used <= names
    for route in described["paths"].values():
        for told in route.values():
            assert {"400", "408", "413", "500", "503"} < set(told["responses"])
    form = described["components"]["schemas"]["EventIn"]
    assert form["required"] == ["user_id", "item_id"]
    assert form["properties"]["user_id"]["maxLength"] == 200


def test_a_request_may_say_when_it_comes():
    timed = make_online(make_model(times="query"))
    timed.observe(["u"] * 2, ["i1", "i2"], times=[10, 20])
    forms = [{"user_ids": ["u"], "k": 12} | at for at in ({}, {"at": 20}, {"at": 1e6}, {"at": "now"})]
    *answers, bad = ask(timed, *[("POST", "/recommendations", {"json": form}) for form in forms])
    now, early, late = (answer.json() for answer in answers)
    assert now == early != late
    assert bad.status_code == 422


def test_events_that_come_together_are_observed_together(online):
    """Each request has its own answer: some are no JSON, some name an item that there is not."""
    groups = []
    observe_many = online.observe_many
    online.observe_many = lambda batches: [observe_many(batches), groups.append(len(batches))][0]
    good = [events((f"u{number}", "i1"), ("all", f"i{number}")) for number in range(9)]
    bad = [events(("u0", "no such item")), ("POST", "/events", {"content": b"{", "headers": JSON})]
    answers = ask(online, *good[:5], *bad, *good[5:])
    assert groups == [10]
    assert [answer.status_code for answer in answers] == [200] * 5 + [409, 422] + [200] * 4
    assert "1 unknown: 'no such item'" in answers[5].json()["detail"]
    assert [answer.json() for answer in answers[7:]] == [{"new": [True, True]}] * 4
    assert online.log.read(["all"], [[]])[0].items == [f"i{number}" for number in range(9)]


JSON = {"content-type": "application/json"}


def test_a_log_that_fails_and_a_mistake_of_ours(online, caplog):
    """The client hears that it failed, and the service's log why."""
    online.log.append = fail(OSError("the disk is full"))
    (answer,) = ask(online, events(("u", "i1")))
    assert (answer.status_code, answer.json()) == (503, {"detail": "the event log is not available"})
    assert "the disk is full" in caplog.text
    for name in ("recommend", "observe_many"):
        setattr(online, name, fail(ZeroDivisionError("nobody's business")))
    question = "POST", "/recommendations", {"json": {"user_ids": ["u"]}}
    for answer in ask(online, question, events(("u", "i1")), events(("v", "i1"))):
        assert (answer.status_code, answer.json()) == (500, {"detail": "the service failed; its log says why"})
    assert "nobody's business" in caplog.text


def fail(error):
    def failing(*_, **__):
        raise error

    return failing


def test_too_many_bytes_of_bodies_are_refused(online, monkeypatch):
    monkeypatch.setattr(app, "MAX_BODIES_BYTES", 80)
    answers = ask(online, *[events((f"u{number}", "i1")) for number in range(5)])
    assert [answer.status_code for answer in answers] == [200] + [503] * 4
    assert answers[-1].headers["retry-after"] == "1"
    assert ask(online, events(("v", "i1")))[0].status_code == 200


def test_a_store_of_ones_own_is_served(online):
    assert ask(online, ("GET", "/health", {}))[0].json() == {"status": "ok"}
    online.log.read = fail(OSError("gone"))
    assert ask(online, ("GET", "/health", {}))[0].status_code == 503


def test_states_are_saved_and_the_log_is_checked_now_and_then(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(upkeep, "SNAPSHOT_SECONDS", 0.01)
    monkeypatch.setattr(upkeep, "CHECK_SECONDS", 0.01)
    log = SQLiteEventLog(tmp_path / "log.db")
    online = OnlineRecommender(MODEL, ITEMS, log, pool_bytes=200_000, snapshot=tmp_path / "states")
    online.observe(["u"], ["i1"])
    checked, failed = threading.Event(), threading.Event()
    log.check = lambda stop: checked.set()

    async def live():
        async with Service(online).running():
            while not (checked.is_set() and (tmp_path / "states").exists()):
                await asyncio.sleep(0.01)
            (tmp_path / "states").unlink()
            monkeypatch.setattr(online, "save_snapshot", lambda: [failed.set(), fail(OSError("no room"))()])
            while not failed.is_set():
                await asyncio.sleep(0.01)
            monkeypatch.undo()

    asyncio.run(live())
    assert "no snapshot, the old one stays" in caplog.text
    assert (tmp_path / "states").exists()  # saved at the end
    log.close()


def test_places_go_to_those_who_came_first():
    async def run():
        places, order = Places(1, 60), []

        async def work(number):
            await places.take()
            await asyncio.sleep(0.01)
            order.append(number)
            places.give_back()

        tasks = [asyncio.create_task(work(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # the client is gone
        await asyncio.gather(*tasks, return_exceptions=True)
        await work(4)
        return order

    assert asyncio.run(run()) == [0, 2, 3, 4]


def test_who_waits_too_long_for_a_place_is_refused():
    async def run():
        places = Places(1, 0.05)
        await places.take()
        for answer in await asyncio.gather(*(places.take() for _ in range(3)), return_exceptions=True):
            assert str(answer) == "too many requests wait; send it again later"
        places.give_back()
        await places.take()

    asyncio.run(run())


def test_a_group_takes_what_waits_but_not_too_much(monkeypatch):
    monkeypatch.setattr(waiting, "GROUP_BYTES", 10)
    taken, go = [], threading.Event()

    def answer(bodies):
        taken.append([body.decode() for body in bodies])
        go.wait(5)
        return [Answer(200, body.upper()) for body in bodies]

    async def run():
        groups = Groups(answer, 5)
        first = asyncio.create_task(groups.answer(b"first"))
        while not taken:
            await asyncio.sleep(0.001)
        others = [
            asyncio.create_task(groups.answer(body)) for body in (b"large" * 3, b"a", b"gone", b"b" * 7, b"c" * 4)
        ]
        await asyncio.sleep(0.01)
        others[2].cancel()
        go.set()
        return [await first, *[await other for other in others if other is not others[2]]]

    answers = asyncio.run(run())
    assert [answer.body for answer in answers] == [b"FIRST", b"LARGE" * 3, b"A", b"B" * 7, b"C" * 4]
    assert taken == [["first"], ["large" * 3], ["a", "b" * 7], ["c" * 4]]


def test_who_waits_too_long_for_a_group_is_refused():
    """But not once it has begun."""
    go = threading.Event()

    def answer(bodies):
        go.wait(5)
        return [Answer(200) for _ in bodies]

    async def run():
        groups = Groups(answer, 0.05)
        first = asyncio.create_task(groups.answer(b"first"))
        await asyncio.sleep(0.01)
        with pytest.raises(RefusedError, match="too many requests wait"):
            await groups.answer(b"second")
        go.set()
        return await first, await groups.answer(b"third")

    assert [answer.status for answer in asyncio.run(run())] == [200, 200]


@contextlib.contextmanager
def connected(application):
    """Two connections to a server in a thread."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, http=Connection, lifespan="off", log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address, 5) as one, socket.create_connection(address, 5) as other:
            yield one, other
    finally:
        server.should_exit = True
        thread.join()


def test_who_is_idle_is_cut_off_but_not_for_a_sleep_of_the_machines(monkeypatch):
    """After a sleep, of the service's here, those who had no chance to say anything get one."""
    monkeypatch.setattr(connections, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(connections, "SECOND_LOOK_SECONDS", 1)

    async def application(scope, receive, send):
        if scope["path"] == "/sleep":
            time.sleep(0.6)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with connected(application) as (one, other):
        one.sendall(b"GET /sleep HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert one.recv(1000).startswith(b"HTTP/1.1 204")
        time.sleep(0.1)
        other.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(1000).startswith(b"HTTP/1.1 204")
        with contextlib.suppress(ConnectionResetError):
            assert other.recv(1000) == b""


def test_only_http_is_spoken(online):
    with pytest.raises(ValueError, match="the scope must be http or lifespan; given websocket"):
        asyncio.run(Service(online)({"type": "websocket"}, None, None))
    assert json.loads(Service(online)._description)["info"]["title"] == "ttt4rec"
