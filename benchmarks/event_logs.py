"""An event log in SQLite beside one in PostgreSQL, whose server is started for it on this machine.

    python -m benchmarks.event_logs

prints seconds of this process's CPU for 200,000 events in batches of 25,000, and the least time of single calls, in
turns.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path

from tests.support import postgres
from tests.support.online_data import run_threads
from ttt4rec.recsys.online.events import Event, EventLog, Known, SQLiteEventLog
from ttt4rec.recsys.online.postgres import PostgresEventLog

USERS, BATCH, BATCHES, TURNS, CALLS, THREADS = 20_000, 25_000, 8, 5, 10, 8


def fill(log: EventLog) -> float:
    """Seconds of CPU for all batches."""
    begin = time.process_time()
    for batch in range(BATCHES):
        numbers = range(batch * BATCH, (batch + 1) * BATCH)
        log.append([Event(f"u{n * 7919 % USERS}", f"i{n % 1000}", f"e{n}") for n in numbers])
    return time.process_time() - begin


def calls(log: EventLog, users: list[str]) -> dict[str, float]:
    """Seconds of an append, of reading histories and of finding nothing new in them."""
    times = [time.perf_counter()]
    log.append([Event(user, "x") for user in users])
    times.append(time.perf_counter())
    tails = log.read(users, [[] for _ in users])
    times.append(time.perf_counter())
    log.read(users, [[Known(tail.length, tail.marks[-1])] for tail in tails])
    times.append(time.perf_counter())
    names = "append", "read", "read nothing new"
    return {
        f"{name}, {len(users)} users": end - begin for name, begin, end in zip(names, times, times[1:], strict=True)
    }


def together(log: EventLog) -> dict[str, float]:
    """Seconds an event, of threads that append one at a time."""

    def work(number: int) -> None:
        for _ in range(CALLS):
            log.append([Event(f"u{number}", "x")])

    begin = time.perf_counter()
    run_threads(work, THREADS)
    return {f"append, {THREADS} threads, an event": (time.perf_counter() - begin) / (THREADS * CALLS)}


def main() -> None:
    """Print the times."""
    with (
        postgres.server() as server,
        tempfile.TemporaryDirectory() as place,
        closing(SQLiteEventLog(Path(place) / "log.db")) as own,
        closing(PostgresEventLog(server.conninfo())) as other,
    ):
        logs: dict[str, EventLog] = {"SQLite": own, "PostgreSQL": other}
        least: dict[str, dict[str, float]] = {name: {} for name in logs}
        for name, log in logs.items():
            print(f"{name}: {fill(log):.1f} s of CPU for {BATCH * BATCHES:,} events", flush=True)
        for _ in range(TURNS):
            for name, log in logs.items():
                found = [calls(log, [f"u{31 * n}" for n in range(count)]) for count in (1, 64) for _ in range(CALLS)]
                for case, seconds in [item for one in (*found, together(log)) for item in one.items()]:
                    least[name][case] = min(seconds, least[name].get(case, seconds))
    for case in least["SQLite"]:
        print(f"| {case} | " + " | ".join(f"{1e3 * least[name][case]:.2f} ms" for name in logs) + " |")


if __name__ == "__main__":
    main()
