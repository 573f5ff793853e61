"""What an online recommender takes on this machine: python -m benchmarks.online FILE.json

One request is an event of each of some users and recommendations to the same: ``observe``, then ``recommend`` of 10
unseen items among 100,000, with an SQLite log that is flushed at every request. Users come at random, each with a
history of 50 at first. Latencies are what a clock shows, on a busy machine more than on an idle one; ``cpu_ms`` is the
processor time of a request, which is less shaken.
"""

import argparse
import gc
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.environment import environment, load_average
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.online import OnlineRecommender
from ttt4rec.recsys.online.events import Event, SQLiteEventLog

from .measure import timed

NUM_ITEMS, HISTORY = 100_000, 50
USERS = {1: [1.0], 10_000: [1.0], 100_000: [1.0, 0.2]}
"""Users, and of how many of them the states fit into the pool."""
USERS_PER_APPEND = 500


def make_model(inner: str, num_items: int = NUM_ITEMS) -> TTT4Rec:
    """The published shape."""
    torch.manual_seed(0)
    return TTT4Rec(TTT4RecConfig(num_items=num_items, inner=inner))


def make_online(log: Path, inner: str, slots: int, num_items: int) -> OnlineRecommender:
    """With room for the states of so many users."""
    model, ids = make_model(inner, num_items), [f"i{item}" for item in range(num_items)]
    per_user = sum(pool.nbytes for pool in model.make_pools(1)) + model.embedding.weight[0].nbytes
    return OnlineRecommender(model, ids, SQLiteEventLog(log), pool_bytes=slots * per_user)


def write_histories(path: Path, users: int, num_items: int = NUM_ITEMS) -> float:
    """A log of random histories; events a second that it took."""
    log, generator = SQLiteEventLog(path), torch.Generator().manual_seed(1)
    seconds = 0.0
    for first in range(0, users, USERS_PER_APPEND):
        number = min(USERS_PER_APPEND, users - first)
        items = torch.randint(num_items, (number, HISTORY), generator=generator).tolist()
        events = [Event(f"u{first + n}", f"i{item}") for n, history in enumerate(items) for item in history]
        seconds += timed(lambda events=events: log.append(events), "cpu")
    log.close()
    return users * HISTORY / seconds


def requests(users: int, at_once: int, num_items: int, seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """Users, all different, and items of one request after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randperm(users, generator=generator)[:at_once].tolist()
        items = torch.randint(num_items, (len(chosen),), generator=generator).tolist()
        yield [f"u{user}" for user in chosen], [f"i{item}" for item in items]


def request(online: OnlineRecommender, users: Sequence[str], items: Sequence[str]) -> tuple[float, float]:
    """Seconds of ``observe`` and ``recommend``."""
    observing = timed(lambda: online.observe(users, items), "cpu")
    return observing, timed(lambda: online.recommend(users), "cpu")


def summary(seconds: Sequence[tuple[float, float]], at_once: int) -> dict[str, Any]:
    """Percentiles in milliseconds, and events a second."""
    parts = {
        "observe": [o for o, _ in seconds],
        "recommend": [r for _, r in seconds],
        "both": [sum(s) for s in seconds],
    }
    result: dict[str, Any] = {"users_per_request": at_once, "requests": len(seconds)}
    for name, times in parts.items():
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        result[name] = {"p50_ms": round(1e3 * cuts[49], 2), "p99_ms": round(1e3 * cuts[98], 2)}
    return result | {"events_per_second": round(at_once * len(seconds) / sum(parts["both"]))}


def measure(
    log: Path, inner: str, users: int, share: float, *, num_items: int = NUM_ITEMS, rounds: int = 300
) -> dict[str, Any]:
    """Requests of one and of 64 users, after the pool was filled."""
    online = make_online(log, inner, int(users * share), num_items)
    everyone = [f"u{user}" for user in range(users)][-online.stats()["slots"] :]
    filling = timed(
        lambda: [online._states.advance(everyone[i : i + 512]) for i in range(0, len(everyone), 512)], "cpu"
    )
    gc.collect()
    result: dict[str, Any] = {"inner": inner, "users": users, "slots": online.stats()["slots"]}
    result["histories_read_per_second"] = round(len(everyone) / filling)
    before = online.stats()
    for at_once in sorted({1, min(64, users)}):
        number = rounds if at_once == 1 else max(2, rounds // 5)
        coming = requests(users, at_once, num_items, at_once)
        seconds = [request(online, *next(coming)) for _ in range(2)]  # to warm up
        begin = time.process_time()
        seconds = [request(online, *next(coming)) for _ in range(number)]
        cpu = {"cpu_ms": round(1e3 * (time.process_time() - begin) / number, 2)}
        result[f"requests_of_{at_once}"] = summary(seconds, at_once) | cpu
    after = online.stats()
    result["share_rebuilt"] = round(
        (after["prefills"] - before["prefills"]) / sum(after[x] - before[x] for x in ("prefills", "steps")), 3
    )
    online.log.close()
    return result


def compare(
    log: Path, inner: str, users: int, at_once: int, *, num_items: int = NUM_ITEMS, rounds: int = 60
) -> dict[str, Any]:
    """Requests of users whose states are there, and of users whose histories are read again; the two in turn."""
    online = make_online(log, inner, users, num_items)
    online._states.advance([f"u{user}" for user in range(users)])
    coming, sides = requests(users, at_once, num_items, 3), {"with state": [], "read again": []}
    for number in range(rounds + 2):
        for side in sorted(sides, reverse=bool(number % 2)):
            chosen, items = next(coming)
            if side == "read again":
                online._states.drop(chosen)
            sides[side].append(request(online, chosen, items))
    online.log.close()
    kept, again = sides["with state"][2:], sides["read again"][2:]
    result: dict[str, Any] = {"inner": inner, "users_per_request": at_once, "rounds": rounds}
    for name, part in {"observe": lambda s: s[0], "both": sum}.items():
        result[name] = {
            "with_state_ms": round(1e3 * statistics.median(map(part, kept)), 2),
            "read_again_ms": round(1e3 * statistics.median(map(part, again)), 2),
            "ratio": round(statistics.median(part(a) / part(k) for a, k in zip(again, kept, strict=True)), 2),
        }
    return result


def late(
    log: Path, inner: str, *, length: int = 50_000, num_items: int = NUM_ITEMS, rounds: int = 50
) -> dict[str, Any]:
    """CPU time of an event of a user with a long history, before and after one of the far future came."""
    online = make_online(log, inner, 1000, num_items)
    items = torch.randint(num_items, (length,), generator=torch.Generator().manual_seed(4)).tolist()
    online.log.append([Event("u", f"i{item}", time=time) for time, item in enumerate(items)])
    online.recommend(["u"])
    result: dict[str, Any] = {"inner": inner, "history": length, "rounds": rounds}
    clock = length
    for name in ("in_order", "after_one_of_the_future"):
        milliseconds = []
        for _ in range(rounds):
            begin = time.process_time()
            online.observe(["u"], [f"i{clock % num_items}"], times=[clock])
            milliseconds.append(1e3 * (time.process_time() - begin))
            clock += 1
        result[f"{name}_cpu_ms"] = round(statistics.median(milliseconds), 2)
        online.observe(["u"], ["i0"], times=[10**12])
    online.log.close()
    return result


def appends(path: Path, threads: int, *, flush: bool = True, rounds: int = 2000) -> dict[str, Any]:
    """Events that so many threads append at once, each one by one."""
    log, left = SQLiteEventLog(path, flush=flush), iter(range(rounds))
    write, writes = log._write, []
    log._commits._append = lambda events: [write(events), writes.append(len(events))][0]

    def work(number: int) -> None:
        while (place := next(left, None)) is not None:
            log.append([Event(f"u{number}", f"i{place}")])

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    begin, cpu = time.perf_counter(), time.process_time()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took, cpu = time.perf_counter() - begin, time.process_time() - cpu
    log.close()
    result: dict[str, Any] = {"threads": threads, "flush": flush, "events_per_second": round(rounds / took)}
    return result | {"cpu_ms": round(1e3 * cpu / rounds, 3), "events_per_write": round(rounds / len(writes), 1)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--users", type=int, nargs="*", default=list(USERS), choices=list(USERS))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"environment": environment("cpu"), "items": NUM_ITEMS, "history": HISTORY}
    found["load_average"] = [load_average()]
    requested, against = [], []
    with tempfile.TemporaryDirectory() as folder:
        for users in args.users:
            log = Path(folder) / f"{users}.db"
            found[f"events_logged_per_second_for_{users}_users"] = round(write_histories(log, users))
            for inner in ("mlp", "linear"):
                for share in USERS[users]:
                    requested.append(measure(log, inner, users, share))
                    print(json.dumps(requested[-1]), flush=True)
                if users == 10_000:
                    against += [compare(log, inner, users, at_once) for at_once in (1, 64)]
                    print(json.dumps(against[-2:]), flush=True)
            log.unlink()
        found["late_events"] = [late(Path(folder) / f"late-{inner}.db", inner) for inner in ("mlp", "linear")]
        print(json.dumps(found["late_events"]), flush=True)
        found["appends"] = [
            appends(Path(folder) / f"{threads}-{flush}.db", threads, flush=flush)
            for flush in (True, False)
            for threads in (1, 8, 32)
        ]
        print(json.dumps(found["appends"]), flush=True)
    found["load_average"].append(load_average())
    args.file.write_text(json.dumps(found | {"requests": requested, "against_reading_again": against}, indent=1) + "\n")


if __name__ == "__main__":
    main()
