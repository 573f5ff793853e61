"""Events in, recommendations out, over HTTP: an OnlineRecommender behind FastAPI.

    pip install ".[serve]"
    ttt4rec train ml-100k --out runs/ml-100k
    python examples/serve_http.py runs/ml-100k

    curl localhost:8000/events --json '{"events": [{"user_id": "196", "item_id": "50", "event_id": "a1"}]}'
    curl localhost:8000/recommendations --json '{"user_ids": ["196"], "k": 5}'
    curl -X DELETE localhost:8000/users/196
    curl localhost:8000/health
    curl localhost:8000/metrics

The folder is one that Recommender.save or `ttt4rec train` wrote. Beside the model it receives the event log, which
begins with the histories of the training data, and a snapshot of states, saved now and then and at the end. One
service at a time works in a folder. Times of events are seconds since 1970, unless --time-unit says otherwise, and at
most a day ahead.

It listens to this machine only, answers only to the names under which a request may come (--allowed-host), and asks
nobody who they are. To let others in, keep it so and put a gateway before it (nginx, Envoy, an API gateway) that ends
TLS, authenticates, limits rates and slow senders, forwards /events and /recommendations, and leaves /users, /health and
/metrics to those who run the service. What it limits itself is below.
"""

import argparse
import asyncio
import json
import logging
import pathlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, ClassVar, TypeVar

import anyio
import torch
import uvicorn
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ttt4rec.atomic_files import locked
from ttt4rec.recsys import DataError, OnlineRecommender, Recommender, SQLiteEventLog

MAX_BODY_BYTES, MAX_EVENTS, MAX_USERS, MAX_K, MAX_ID = 1 << 20, 1000, 100, 1000, 200
MAX_HEADER_BYTES = 1 << 16
MAX_WORKING = 2  # requests; more wait, since they would only take time from each other
MAX_WAIT_SECONDS = 0.6  # then a request is answered by 503
MAX_BODIES_BYTES = 64 << 20  # of all requests that wait; more are answered by 503
MAX_CONNECTIONS = 800  # less than the 1,024 files that a process may often open
PATIENCE_SECONDS = BODY_SECONDS = 5  # with a client that sends no header or does not read; and for a body
SNAPSHOT_SECONDS, CHECK_SECONDS = 300, 3600
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
COMPONENT = "#/components/schemas/{model}"  # of openapi.json
WATCHED = {"/health", "/metrics"}  # which never wait

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
logger = logging.getLogger("uvicorn.error")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class EventIn(Strict):
    user_id: Id
    item_id: Id
    event_id: Id | None = None
    time: Annotated[int, Field(ge=-(2**63), lt=2**63)] | Annotated[float, Field(allow_inf_nan=False)] | None = None


class Events(Strict):
    events: Annotated[list[EventIn], Field(max_length=MAX_EVENTS)]


def whole(number: Any) -> Any:
    """To JSON, 5.0 is an integer."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


class Recommending(Strict):
    user_ids: Annotated[list[Id], Field(max_length=MAX_USERS)]
    k: Annotated[int, Field(ge=1, le=MAX_K), BeforeValidator(whole)] = 10
    exclude_seen: bool = True


class Observed(BaseModel):
    new: list[bool]


class Item(BaseModel):
    item_id: str
    score: float


class Recommended(BaseModel):
    recommendations: list[list[Item]]


Form = TypeVar("Form", bound=Strict)
Answer = Callable[[Form], bytes]  # in JSON


class AnyText(PathConvertor):
    """A part of a path with slashes and, unlike "path", line breaks."""

    regex = "(?s:.*)"


register_url_convertor("text", AnyText())


class Refusal(BaseModel):
    detail: str


class Mistake(BaseModel):
    where: list[str | int]
    what: str


class Mistakes(BaseModel):
    detail: list[Mistake]


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For openapi.json: what else a route may answer."""
    why = {"application/json": {"schema": Refusal.model_json_schema()}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    every: dict[int, dict[str, Any]] = {
        400: {"content": why | text, "description": "No HTTP, no text, or another site's Host"},
        408: {"content": why, "description": "The body did not come in time"},
        409: {"content": why, "description": "An item or a time that this service does not take; nothing took effect"},
        413: {"content": why, "description": f"A body of more than {MAX_BODY_BYTES} bytes"},
        422: {"model": Mistakes, "description": "What is wrong with the form; nothing took effect"},
        503: {"content": why, "description": "Too much to do, or the event log is damaged or not available"},
    }
    return {status: every[status] for status in statuses}


def takes(form: type[Strict]) -> dict[str, Any]:
    """For openapi.json: the body of a route."""
    schema = {"$ref": COMPONENT.format(model=form.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def mistaken(*wrong: tuple[list[str | int], str]) -> Response:
    """Where and what, without what was sent."""
    detail = [{"where": where, "what": what} for where, what in wrong[:10]]
    return Response(json.dumps({"detail": detail}), 422, media_type="application/json")


class Metrics:
    """What Prometheus may know."""

    def __init__(self, online: OnlineRecommender) -> None:
        self.registry = CollectorRegistry()
        self.events = Counter("ttt4rec_events", "Events taken", ["new"], registry=self.registry)
        self.recommended = Counter("ttt4rec_recommendations", "Users recommended to", registry=self.registry)
        self.seconds = Histogram("ttt4rec_request_seconds", "By route", ["route", "status"], registry=self.registry)
        self.saved = Gauge("ttt4rec_snapshot_timestamp_seconds", "Of the last one", registry=self.registry)
        for name in online.stats():
            gauge = Gauge(f"ttt4rec_{name}", "See OnlineRecommender.stats", registry=self.registry)
            gauge.set_function(lambda name=name: online.stats()[name])


class Connection(HttpToolsProtocol):
    """uvicorn's, which is cut off if the client keeps it waiting, or has done so for the longest of too many.

    A client does so until a whole header has come, and while it does not read its answer.
    """

    idle: ClassVar[dict["Connection", asyncio.TimerHandle]] = {}
    header_bytes = 0  # that have come of a header that is not whole

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.begin_to_wait()
        if len(self.connections) > MAX_CONNECTIONS:
            longest = next(iter(self.idle))
            longest.end_to_wait()  # at once: of several that come together, each has another one cut off
            longest.transport.abort()

    def begin_to_wait(self) -> None:
        self.end_to_wait()
        self.idle[self] = self.loop.call_later(PATIENCE_SECONDS, self.transport.abort)

    def end_to_wait(self) -> None:
        if self in self.idle:
            self.idle.pop(self).cancel()

    def end_if_at_work(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete and not self.flow.write_paused:
            self.end_to_wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.header_bytes:
            self.header_bytes += len(data)
            if self.header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response(f"A header must have at most {MAX_HEADER_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.header_bytes = 1

    def on_headers_complete(self) -> None:
        self.header_bytes = 0
        super().on_headers_complete()
        self.end_if_at_work()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.begin_to_wait()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.end_if_at_work()

    def on_response_complete(self) -> None:
        if not self.transport.is_closing():
            self.begin_to_wait()
        super().on_response_complete()
        self.end_if_at_work()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end_to_wait()
        super().connection_lost(exc)


class RefusedError(Exception):
    """A request is answered before it gets to work."""

    def __init__(self, status: int, why: str, **headers: str) -> None:
        self.answer = JSONResponse({"detail": why}, status, headers)


class Places:
    """For so many at work; who comes while all are taken waits in turn, so long and no longer.

    That nobody is let in costs little, so that those who are turned away take no time from those who are served.
    """

    def __init__(self, free: int, seconds: float) -> None:
        self.free, self.seconds = free, seconds
        self.waiting: deque[tuple[float, asyncio.Future[bool]]] = deque()  # with the time when each has waited enough
        self.timer: asyncio.TimerHandle | None = None  # for the first of them

    async def take(self) -> bool:
        """Whether there was one."""
        if self.free:
            self.free -= 1
            return True
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        self.waiting.append((loop.time() + self.seconds, turn))
        self.timer = self.timer or loop.call_later(self.seconds, self.turn_away)
        return await turn

    def give_back(self) -> None:
        """To the one who came first."""
        while self.waiting:
            _, turn = self.waiting.popleft()
            if not turn.done():  # else he is gone
                turn.set_result(True)
                return
        self.free += 1

    def turn_away(self) -> None:
        """All who have waited enough."""
        loop, self.timer = asyncio.get_running_loop(), None
        while self.waiting:
            end, turn = self.waiting[0]
            if end > loop.time() and not turn.done():
                self.timer = loop.call_at(end, self.turn_away)
                return
            self.waiting.popleft()
            if not turn.done():
                turn.set_result(False)


class Gate:
    """Lets in requests that have come as a whole, so many at once, the others in turn or not at all.

    Whoever sends slowly, or does not read the answer, so takes no place from others.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, hosts: Sequence[str]) -> None:
        self.app, self.metrics, self.hosts = app, metrics, {host.lower() for host in hosts}
        self.places = Places(MAX_WORKING, MAX_WAIT_SECONDS)
        self.held = 0  # bytes of bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status, place, body = time.perf_counter(), 500, False, bytearray()

        def leave() -> None:
            nonlocal place
            if place:
                place = False
                self.places.give_back()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                leave()
            await send(message)

        async def receive_body() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        unread = True
        try:
            headers = dict(scope["headers"])
            self.check_host(headers.get(b"host", b"").decode("latin-1"))
            await self.read(headers.get(b"content-length", b"0"), receive, body)
            if scope["path"] not in WATCHED:
                place = await self.places.take()
                if not place:
                    raise RefusedError(503, "too many requests wait; send it again later", **{"retry-after": "1"})
            await self.app(scope, receive_body, answer)
        except RefusedError as refused:
            await refused.answer(scope, receive, answer)
        finally:
            leave()
            self.held -= len(body)
            route = getattr(scope.get("route"), "path", "none")  # not the path, which anybody may make up
            self.metrics.seconds.labels(route, status).observe(time.perf_counter() - begin)

    def check_host(self, host: str) -> None:
        """A browser tells by it whose site it believes to be on."""
        name = host.lower() if host.endswith("]") else host.lower().rpartition(":")[0] or host.lower()
        if "*" not in self.hosts and name not in self.hosts:
            raise RefusedError(
                400, f"Host must be one of {sorted(self.hosts)}, to which --allowed-host adds; given {host!r}"
            )

    async def read(self, announced: bytes, receive: Receive, body: bytearray) -> None:
        """The whole body."""
        if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
            raise RefusedError(413, f"a body must have at most {MAX_BODY_BYTES} bytes; given {announced[:20].decode()}")
        with anyio.move_on_after(BODY_SECONDS):
            while True:
                message = await receive()
                part = message.get("body", b"")
                if len(body) + len(part) > MAX_BODY_BYTES:
                    raise RefusedError(413, f"a body must have at most {MAX_BODY_BYTES} bytes; given more")
                body += part
                self.held += len(part)
                if self.held > MAX_BODIES_BYTES:
                    raise RefusedError(503, "too many large requests wait; send it again later", **{"retry-after": "1"})
                if not message.get("more_body", False):
                    return
        raise RefusedError(408, f"a body must come within {BODY_SECONDS} seconds")


def make_app(online: OnlineRecommender, hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]")) -> ASGIApp:
    """The service; the states are saved and the log is checked now and then, the states also when it ends.

    Args:
        online: whose log is a ``SQLiteEventLog``.
        hosts: under which requests may come, without port; "*" for any.
    """
    metrics, ending = Metrics(online), threading.Event()

    def save_now_and_then() -> None:
        while not ending.wait(SNAPSHOT_SECONDS):
            save()

    def check_now_and_then() -> None:
        while not ending.wait(CHECK_SECONDS):
            try:
                online.log.check(ending.is_set)
            except OSError as error:  # /health tells it from now on
                logger.error("%s", error)

    def save() -> None:
        try:
            logger.info("snapshot of %d users", online.save_snapshot())
            metrics.saved.set_to_current_time()
        except Exception:  # whatever it is, the next one may succeed
            logger.exception("no snapshot, the old one stays")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        threads = [threading.Thread(target=work) for work in (save_now_and_then, check_now_and_then)]
        for thread in threads:
            thread.start()
        yield
        ending.set()
        for thread in threads:
            thread.join()
        save()

    app = FastAPI(title="ttt4rec", lifespan=lifespan, responses=described(400, 408, 413, 503))

    @app.exception_handler(DataError)
    async def refuse(_: Request, error: DataError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 409)

    @app.exception_handler(RequestValidationError)
    async def refuse_path(_: Request, error: RequestValidationError) -> Response:
        return mistaken(*((list(e["loc"]), e["msg"]) for e in error.errors()))

    @app.exception_handler(ValidationError)
    async def refuse_form(_: Request, error: ValidationError) -> Response:
        return mistaken(*((["body", *e["loc"]], e["msg"]) for e in error.errors()))

    @app.exception_handler(OSError)
    async def unavailable(_: Request, error: OSError) -> JSONResponse:
        logger.error("the event log: %s", error)
        return JSONResponse({"detail": "the event log is not available"}, 503)

    workers = ThreadPoolExecutor(MAX_WORKING)  # so that no request keeps the others waiting for the disk

    async def work(function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(workers, function)

    def post(path: str, form: type[Form], answer: type[BaseModel], *refusals: int) -> Callable[[Answer[Form]], None]:
        """A function from the form to JSON becomes a route: FastAPI's own way costs more than the work of an event."""

        def add(function: Answer[Form]) -> None:
            async def endpoint(request: Request) -> Response:
                given = request.headers.get("content-type", "none")
                if given.partition(";")[0].strip().lower() != "application/json":
                    return mistaken((["header", "content-type"], f"must be application/json; given {given[:50]}"))
                text = await request.body()
                done = await work(lambda: function(form.model_validate_json(text)))
                return Response(done, media_type="application/json")

            app.post(path, response_model=answer, responses=described(*refusals), openapi_extra=takes(form))(endpoint)

        return add

    @post("/events", Events, Observed, 409, 422)
    def observe(body: Events) -> bytes:
        columns = ([getattr(e, name) for e in body.events] for name in ("user_id", "item_id", "event_id", "time"))
        users, items, names, times = columns
        new = online.observe(users, items, event_ids=names, times=times)
        for is_new in (True, False):
            metrics.events.labels(str(is_new).lower()).inc(new.count(is_new))
        return json.dumps({"new": new}).encode()

    @post("/recommendations", Recommending, Recommended, 422)
    def recommend(body: Recommending) -> bytes:
        best = online.recommend(body.user_ids, body.k, exclude_seen=body.exclude_seen)
        metrics.recommended.inc(len(best))
        named = [[{"item_id": item, "score": score} for item, score in items] for items in best]
        return json.dumps({"recommendations": named}).encode()

    @app.delete("/users/{user_id:text}", status_code=204, response_class=Response, responses=described(422))
    async def forget(user_id: Annotated[str, Path(min_length=1, max_length=MAX_ID)]) -> None:
        await work(lambda: online.forget([user_id]))

    @app.get("/health", response_model=dict[str, str])
    def health() -> Any:
        if online.log.damage is not None:
            return JSONResponse({"detail": f"the event log is damaged: {online.log.damage}"}, 503)
        online.log.read(["nobody"], [[]])
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    forms = models_json_schema([(Events, "validation"), (Recommending, "validation")], ref_template=COMPONENT)
    openapi = app.openapi()  # is kept, and shown
    openapi["components"]["schemas"] |= forms[1]["$defs"]
    return Gate(app, metrics, hosts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of a recommender; receives the events and the states")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; see above before changing it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--allowed-host", action="append", default=["localhost", "127.0.0.1", "[::1]"],
                        help="a name, without port, under which requests may come too; * for any")  # fmt: skip
    parser.add_argument("--pool-bytes", type=int, default=1 << 30, help="memory for the states of users")
    parser.add_argument("--time-unit", choices=PER_SECOND, default="s", help="of times, which count from 1970")
    parser.add_argument("--max-ahead", type=float, default=86400, help="seconds; a later time is refused; inf: none is")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # requests come in parallel
    lock = args.folder / "service.lock"
    try:
        lock.touch(0o600)
        with locked(lock) as free:
            if not free:
                parser.exit(
                    2, f"{parser.prog}: error: another service works in {args.folder}; end it, or take a copy\n"
                )
            serve(args)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def serve(args: argparse.Namespace) -> None:
    """Until the process is told to end."""

    def horizon() -> float:
        return (time.time() + args.max_ahead) * PER_SECOND[args.time_unit]

    recommender = Recommender.load(args.folder)
    latest = recommender.histories.times.max(initial=0)
    if latest > horizon():
        raise ValueError(
            f"times must be at most {horizon():.0f}; the data's latest is {latest}: give their --time-unit"
        )
    log = SQLiteEventLog(args.folder / "events.db")
    try:
        log.begin(recommender.histories)
        online = OnlineRecommender(
            recommender.model,
            recommender.histories.item_ids,
            log,
            pool_bytes=args.pool_bytes,
            snapshot=args.folder / "states.safetensors",
            horizon=horizon,
        )
        app = make_app(online, args.allowed_host)
        uvicorn.run(app, host=args.host, port=args.port, http=Connection, access_log=False, proxy_headers=False)
    finally:
        log.close()


if __name__ == "__main__":
    main()
