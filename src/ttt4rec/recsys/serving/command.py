"""What ``ttt4rec serve`` does: one service in a model folder."""

from __future__ import annotations

import logging
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import uvicorn
from uvicorn.config import LOGGING_CONFIG

from ttt4rec.atomic_files import locked
from ttt4rec.extras import require
from ttt4rec.models.ttt4rec import CONFIG_FILE
from ttt4rec.options import PER_SECOND, ServeOptions
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.online import OnlineRecommender, SQLiteEventLog
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.recommend.titles import titles_for
from ttt4rec.recsys.serving.app import LOCAL, Service
from ttt4rec.recsys.serving.connections import Connection
from ttt4rec.recsys.serving.demo import Demo

if TYPE_CHECKING:
    from ttt4rec.recsys.online.postgres import PostgresEventLog


def _loggers() -> dict[str, Any]:
    """uvicorn's, and what is said here goes where its own goes, as much as ``--log-level`` asked for."""
    level = logging.getLogger("ttt4rec").level or logging.INFO
    return {**LOGGING_CONFIG["loggers"], "ttt4rec": {"handlers": ["default"], "level": level, "propagate": False}}


def serve(folder: Path, options: ServeOptions) -> None:
    """Serve a recommender until the process is told to end.

    The folder receives the event log, unless that is elsewhere, and a snapshot of states. The log begins with the
    histories of the training data.

    Raises:
        DataError: another service works in the folder, the data's times are beyond what events may have, or the titles
            cannot be read.
        FileNotFoundError: the folder holds no recommender. ValueError: its files are damaged, or other ones.
        OSError: the event log cannot be opened or made.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} holds no saved model: {CONFIG_FILE} is missing")
    lock = folder / "service.lock"
    lock.touch(0o600)
    with locked(lock) as free:
        if not free:
            raise DataError(f"another service works in {folder}; end it, or take a copy")
        _serve(folder, options)


def _serve(folder: Path, options: ServeOptions) -> None:
    def clock(ahead: float = 0.0) -> float:
        return (time.time() + ahead) * PER_SECOND[options.time_unit]

    def horizon() -> float:
        return clock(options.max_ahead)

    torch.set_num_threads(1)  # requests come in parallel
    recommender = Recommender.load(folder)
    titles = None
    if options.titles is not None:
        titles = titles_for(Path(options.titles), recommender.histories.item_ids, options.encoding)
    latest = recommender.histories.times.max(initial=0)
    if latest > horizon():
        raise DataError(f"times must be at most {horizon():.0f}; the data's latest is {latest}: give their --time-unit")
    with closing(_open_log(folder, options)) as log:
        log.begin(recommender.histories)
        online = OnlineRecommender(
            recommender.model,
            recommender.histories.item_ids,
            log,
            pool_bytes=options.pool_bytes,
            snapshot=folder / "states.safetensors",
            horizon=horizon,
            clock=clock,
        )
        per_second = PER_SECOND[options.time_unit]
        demo = Demo(online, recommender.histories, titles, per_second) if options.demo else None
        service = Service(online, [*LOCAL, *options.allowed_host], demo)
        uvicorn.run(
            service,
            host=options.host,
            port=options.port,
            http=Connection,
            log_config={**LOGGING_CONFIG, "loggers": _loggers()},
            access_log=False,
            proxy_headers=False,
        )


def _open_log(folder: Path, options: ServeOptions) -> SQLiteEventLog | PostgresEventLog:
    if options.log is None:
        return SQLiteEventLog(folder / "events.db", flush=not options.no_flush)
    require("an event log in PostgreSQL", "psycopg")
    from ttt4rec.recsys.online.postgres import PostgresEventLog

    return PostgresEventLog(options.log, flush=not options.no_flush)
