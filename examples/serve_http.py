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
begins with the histories of the training data, and a snapshot of states, saved now and then and at the end.

It listens to this machine only and asks nobody who they are. To let others in, keep it so and put a gateway before it
(nginx, Envoy, an API gateway) that ends TLS, authenticates, limits rates and slow senders, forwards /events and
/recommendations, and leaves /users, /health and /metrics to those who run the service. What it limits itself is below.
"""

import argparse
import json
import logging
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.events import NOTHING, SQLiteEventLog, events_of
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.recommend import Recommender

MAX_BODY_BYTES, MAX_EVENTS, MAX_USERS, MAX_K, MAX_ID = 1 << 20, 1000, 100, 1000, 200
MAX_CONNECTIONS = 100  # and requests at once; more are answered by 503
SNAPSHOT_SECONDS = 300

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
logger = logging.getLogger("uvicorn.error")


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class EventIn(Strict):
    user_id: Id
    item_id: Id
    event_id: Id | None = None
    time: int | float | None = None


class Events(Strict):
    events: Annotated[list[EventIn], Field(max_length=MAX_EVENTS)]


class Recommending(Strict):
    user_ids: Annotated[list[Id], Field(max_length=MAX_USERS)]
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    exclude_seen: bool = True


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


def make_app(online: OnlineRecommender) -> FastAPI:
    """The service; the states are saved when it ends, and now and then before."""
    metrics, ending = Metrics(online), threading.Event()

    def save_now_and_then() -> None:
        while not ending.wait(SNAPSHOT_SECONDS):
            save()

    def save() -> None:
        try:
            logger.info("snapshot of %d users", online.save_snapshot())
            metrics.saved.set_to_current_time()
        except Exception:  # whatever it is, the next one may succeed
            logger.exception("no snapshot, the old one stays")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        saver = threading.Thread(target=save_now_and_then)
        saver.start()
        yield
        ending.set()
        saver.join()
        save()

    app = FastAPI(title="ttt4rec", lifespan=lifespan)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begin, status = time.perf_counter(), 500
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            route = getattr(request.scope.get("route"), "path", "none")  # not the path, which anybody may make up
            metrics.seconds.labels(route, status).observe(time.perf_counter() - begin)

    @app.exception_handler(DataError)
    async def refuse(_: Request, error: DataError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def refuse_form(_: Request, error: RequestValidationError) -> Response:
        wrong = [{"where": list(e["loc"]), "what": e["msg"]} for e in error.errors()[:10]]  # without what was sent
        return Response(json.dumps({"detail": wrong}), 422, media_type="application/json")

    @app.exception_handler(OSError)
    async def unavailable(_: Request, error: OSError) -> JSONResponse:
        logger.error("the event log: %s", error)
        return JSONResponse({"detail": "the event log is not available"}, 503)

    # Plain functions run in threads, so that none of them keeps the others waiting for the disk.

    @app.post("/events")
    def observe(body: Events) -> dict[str, list[bool]]:
        columns = ([getattr(e, name) for e in body.events] for name in ("user_id", "item_id", "event_id", "time"))
        users, items, names, times = columns
        new = online.observe(users, items, event_ids=names, times=times)
        for is_new in new:
            metrics.events.labels(str(is_new).lower()).inc()
        return {"new": new}

    @app.post("/recommendations")
    def recommend(body: Recommending) -> dict[str, list[list[dict[str, str | float]]]]:
        best = online.recommend(body.user_ids, body.k, exclude_seen=body.exclude_seen)
        metrics.recommended.inc(len(best))
        named = [[{"item_id": item, "score": score} for item, score in items] for items in best]
        return {"recommendations": named}

    @app.delete("/users/{user_id:path}", status_code=204)
    def forget(user_id: Annotated[str, Path(min_length=1, max_length=MAX_ID)]) -> None:
        online.forget([user_id])

    @app.get("/health")
    def health() -> dict[str, str]:
        online.log.read(["nobody"], [NOTHING])
        return {"status": "ok"}

    @app.get("/metrics")
    def show_metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of a recommender; receives the events and the states")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; see above before changing it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pool-bytes", type=int, default=1 << 30, help="memory for the states of users")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # requests come in parallel
    recommender = Recommender.load(args.folder)
    log = SQLiteEventLog(args.folder / "events.db")
    begun = args.folder / "events.begun"
    if not begun.exists():  # at the first start, and not again when all users have been forgotten
        if not log.users():
            log.append(events_of(recommender.histories))
        begun.touch()
    online = OnlineRecommender(
        recommender.model,
        recommender.histories.item_ids,
        log,
        pool_bytes=args.pool_bytes,
        snapshot=args.folder / "states.safetensors",
    )
    try:
        app = make_app(online)
        uvicorn.run(app, host=args.host, port=args.port, limit_concurrency=MAX_CONNECTIONS, access_log=False)
    finally:
        log.close()


if __name__ == "__main__":
    main()
