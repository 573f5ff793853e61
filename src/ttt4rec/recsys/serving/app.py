"""The service as an ASGI application: requests are read, checked, worked on in turn and answered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from pydantic import ValidationError

from ttt4rec.recsys.online import Batch, OnlineRecommender
from ttt4rec.recsys.online.events import CheckedEventLog
from ttt4rec.recsys.serving.answers import Answer, RefusedError, answer_to, mistaken, refusal, too_much
from ttt4rec.recsys.serving.demo import Demo
from ttt4rec.recsys.serving.description import describe
from ttt4rec.recsys.serving.forms import ID, Events, Recommending
from ttt4rec.recsys.serving.limits import BODY_SECONDS, MAX_BODIES_BYTES, MAX_BODY_BYTES, MAX_WAIT_SECONDS, MAX_WORKING
from ttt4rec.recsys.serving.metrics import Metrics
from ttt4rec.recsys.serving.upkeep import Upkeep
from ttt4rec.recsys.serving.waiting import Groups, Places

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = dict[bytes, bytes]

LOCAL = ("localhost", "127.0.0.1", "[::1]")
_USERS = "/users/"


class Service:
    """An ASGI application for an ``OnlineRecommender``; ``/openapi.json`` describes its routes.

    Events that wait are logged together, in one thread. Other requests get one of few places at work. ``/health`` and
    ``/metrics`` never wait. Bodies come before the wait, and answers go after the work, so those who are slow to send
    or to read take no place.

    A server that speaks ASGI's lifespan has the states saved and the log checked now and then; within another
    application, which gets these messages in its place, ``async with service.running()`` does.

    Args:
        online: what is served.
        hosts: under which requests may come, without port; "*" for any. A browser tells by it whose site it believes
            to be on.
        demo: a page to show at ``/``; None: there is none.
    """

    def __init__(self, online: OnlineRecommender, hosts: Sequence[str] = LOCAL, demo: Demo | None = None) -> None:
        self._online, self._hosts = online, {host.lower() for host in hosts}
        self._metrics = Metrics(online)
        self._upkeep = Upkeep(online, self._metrics.saved)
        self._groups = Groups(self._observe, MAX_WAIT_SECONDS)
        self._places = Places(MAX_WORKING, MAX_WAIT_SECONDS)
        self._workers = ThreadPoolExecutor(MAX_WORKING)
        self._watchers = ThreadPoolExecutor(1)  # so that nobody's health waits for others' work
        self._held = 0  # bytes of bodies
        self._description = json.dumps(describe(demo is not None)).encode()
        self._routes: dict[str, tuple[str, Callable[[Any], Awaitable[Answer]]]] = {
            "/events": ("POST", self._post_events),
            "/recommendations": ("POST", self._at_work(self._recommend)),
            "/users/{user_id}": ("DELETE", self._delete_user),
            "/health": ("GET", self._get_health),
            "/metrics": ("GET", self._get_metrics),
            "/openapi.json": ("GET", self._always(Answer(200, self._description))),
        }
        if demo is not None:
            self._routes |= {path: ("GET", self._always(answer)) for path, answer in demo.page().items()}
            self._routes["/demo/items"] = ("POST", self._at_work(demo.find))
            self._routes["/demo/visitor"] = ("POST", self._at_work(demo.visit))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI 3."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"the scope must be http or lifespan; given {scope['type']}")
        begin, path = time.perf_counter(), scope["path"].removeprefix(scope.get("root_path", ""))
        route = "/users/{user_id}" if path.startswith(_USERS) else path
        try:
            answer = await self._answer(scope, route, path, receive)
        except Exception as error:
            answer = answer_to(error)
        headers = [(b"content-type", answer.kind.encode()), *answer.headers] if answer.body else [*answer.headers]
        if answer.status != 204:
            headers.append((b"content-length", b"%d" % len(answer.body)))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})
        known = route if route in self._routes else "none"
        self._metrics.answered(known, answer.status, time.perf_counter() - begin)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Save states and check the log now and then, and save states at the end."""
        self._upkeep.begin()
        try:
            yield
        finally:
            await asyncio.to_thread(self._upkeep.end)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.running():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, scope: Scope, route: str, path: str, receive: Receive) -> Answer:
        headers = dict(scope["headers"])
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        if route not in self._routes:
            return refusal(404, "the path is unknown; see /openapi.json")
        method, handle = self._routes[route]
        if scope["method"] != method:
            return refusal(405, f"the method must be {method}", (b"allow", method.encode()))
        body = bytearray()
        try:
            await self._read(headers.get(b"content-length", b"0"), receive, body)
            if method != "POST":
                return await handle(path)
            kind = headers.get(b"content-type", b"none").decode("latin-1")
            if kind.partition(";")[0].strip().lower() != "application/json":
                return mistaken((["header", "content-type"], f"must be application/json; given {kind[:50]}"))
            return await handle(bytes(body))
        finally:
            self._held -= len(body)

    def _check_host(self, host: str) -> None:
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        if "*" not in self._hosts and name not in self._hosts:
            raise RefusedError(
                400, f"Host must be one of {sorted(self._hosts)}, to which --allowed-host adds; given {host!r}"
            )

    async def _read(self, announced: bytes, receive: Receive, body: bytearray) -> None:
        """The whole body, which must come in time."""
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            raise RefusedError(413, f"a body must have at most {MAX_BODY_BYTES} bytes; given {announced[:20].decode()}")
        late, task = False, asyncio.current_task()
        assert task is not None

        def give_up() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(BODY_SECONDS, give_up)
        try:
            more = True
            while more:
                message = await receive()
                part, more = message.get("body", b""), message.get("more_body", False)
                if len(body) + len(part) > MAX_BODY_BYTES:
                    raise RefusedError(413, f"a body must have at most {MAX_BODY_BYTES} bytes; given more")
                body += part
                self._held += len(part)
                if self._held > MAX_BODIES_BYTES:
                    raise too_much("large requests")
        except asyncio.CancelledError:
            if not late:
                raise
            if hasattr(task, "uncancel"):  # of Python 3.11 and newer, which count
                task.uncancel()
            raise RefusedError(408, f"a body must come within {BODY_SECONDS:g} seconds") from None
        finally:
            timer.cancel()

    async def _post_events(self, body: bytes) -> Answer:
        return await self._groups.answer(body)

    def _at_work(self, function: Callable[[bytes], Answer]) -> Callable[[bytes], Awaitable[Answer]]:
        return lambda body: self._work(lambda: function(body))

    def _always(self, answer: Answer) -> Callable[[object], Awaitable[Answer]]:
        async def get(_: object) -> Answer:
            return answer

        return get

    async def _delete_user(self, path: str) -> Answer:
        try:
            user_id = ID.validate_python(path.removeprefix(_USERS))
        except ValidationError as error:
            return answer_to(error, ("path", "user_id"))
        return await self._work(lambda: self._forget(user_id))

    async def _get_health(self, _: object) -> Answer:
        return await self._watch(self._health)

    async def _get_metrics(self, _: object) -> Answer:
        return await self._watch(self._metrics.shown)

    async def _work(self, function: Callable[[], Answer]) -> Answer:
        await self._places.take()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, function)
        finally:
            self._places.give_back()

    async def _watch(self, function: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._watchers, function)

    # What follows runs in threads.

    def _observe(self, bodies: Sequence[bytes]) -> list[Answer]:
        answers: list[Answer] = []
        batches: dict[int, Batch] = {}
        for place, body in enumerate(bodies):
            try:
                batches[place] = Events.model_validate_json(body).batch()
                answers.append(Answer(200))
            except Exception as error:
                answers.append(answer_to(error))
        for place, outcome in zip(batches, self._online.observe_many(list(batches.values())), strict=True):
            if isinstance(outcome, Exception):
                answers[place] = answer_to(outcome)
            else:
                self._metrics.observed(outcome)
                answers[place] = Answer(200, json.dumps({"new": outcome}).encode())
        return answers

    def _recommend(self, body: bytes) -> Answer:
        form = Recommending.model_validate_json(body)
        best = self._online.recommend(form.user_ids, form.k, exclude_seen=form.exclude_seen, at=form.at)
        self._metrics.recommended(len(best))
        named = [[{"item_id": item, "score": score} for item, score in items] for items in best]
        return Answer(200, json.dumps({"recommendations": named}).encode())

    def _forget(self, user_id: str) -> Answer:
        self._online.forget([user_id])
        return Answer(204)

    def _health(self) -> Answer:
        log = self._online.log
        if isinstance(log, CheckedEventLog) and log.damage is not None:
            return refusal(503, f"the event log is damaged: {log.damage}")
        log.read(["nobody"], [[]])
        return Answer(200, json.dumps({"status": "ok"}).encode())
