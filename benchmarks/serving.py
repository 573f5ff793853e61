"""What the service costs: python -m benchmarks.serving FILE.json --clients 1 50 --recommendations 0 0.5

Every request is an event of one of 2,000 users or, for a share of the requests, asks for ten unseen items of 100,000
for one of them. Each client sends its next request when the answer has come. The service has one core for itself, the
clients have the others, and the log is flushed before an event is answered. ``cpu_ms`` is the service's processor time
by the number of requests.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tools.environment import environment, load_average
from ttt4rec.recsys.data import Histories
from ttt4rec.recsys.recommend import Recommender

from .online import HISTORY, NUM_ITEMS, make_model

NUM_USERS = 2000
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def write_folder(folder: Path, users: int = NUM_USERS, num_items: int = NUM_ITEMS) -> None:
    """An untrained recommender of the published shape with random histories, as ``ttt4rec train`` writes one."""
    items = np.random.default_rng(0).integers(1, num_items + 1, users * HISTORY)
    times = np.tile(np.arange(HISTORY, dtype=np.int64), users)
    ids = tuple(f"u{user}" for user in range(users)), tuple(f"i{item}" for item in range(num_items))
    histories = Histories(items, np.arange(users + 1) * HISTORY, times, *ids)
    Recommender(make_model("mlp", num_items), histories).save(folder)


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[int, int]]:
    """Process id and port of a service on the first core."""
    command = [sys.executable, "-m", "ttt4rec.cli", "serve", str(folder), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            if CORES:
                os.sched_setaffinity(process.pid, CORES[:1])
            lines = iter(process.stderr.readline, "")
            port = next(found[1] for line in lines if (found := re.search(r"running on http://.*:(\d+)", line)))
            yield process.pid, int(port)
        finally:
            process.terminate()


class Client(asyncio.Protocol):
    """Sends one request after the other over one connection."""

    def __init__(self, requests: Iterator[bytes], answers: list[tuple[str, float]], done: "asyncio.Future[None]"):
        self.requests, self.answers, self.done = requests, answers, done
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.send()

    def send(self) -> None:
        request = next(self.requests, None)
        if request is None:
            self.transport.close()
            self.done.set_result(None)
            return
        self.begin = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if end and length and len(body) >= int(length[1]):
            self.answers.append((head[9:12].decode(), time.perf_counter() - self.begin))
            self.received = b""
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the service closed the connection"))


def post(path: str, form: dict[str, Any]) -> bytes:
    """A request."""
    body = json.dumps(form)
    head = f"POST /{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def make_requests(number: int, recommendations: float, users: int, num_items: int, seed: int) -> list[bytes]:
    """Events, each with an id, and questions, of users at random."""
    rng, requests = random.Random(seed), []
    for place in range(number):
        user = f"u{rng.randrange(users)}"
        if rng.random() < recommendations:
            requests.append(post("recommendations", {"user_ids": [user]}))
        else:
            event = {"user_id": user, "item_id": f"i{rng.randrange(num_items)}", "event_id": f"{seed}-{place}"}
            requests.append(post("events", {"events": [event]}))
    return requests


async def ask(port: int, clients: int, requests: Sequence[bytes]) -> list[tuple[str, float]]:
    """Status and seconds of every answer."""
    loop, coming = asyncio.get_running_loop(), iter(requests)
    answers: list[tuple[str, float]] = []
    ends = [loop.create_future() for _ in range(clients)]
    for end in ends:
        await loop.create_connection(lambda end=end: Client(coming, answers, end), "127.0.0.1", port)
    await asyncio.gather(*ends)
    return answers


def cpu_seconds(process: int) -> float:
    """Of all threads of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    folder: Path, clients: int, *, recommendations: float = 0.0, events: int = 3000, options: Sequence[str] = ()
) -> dict[str, Any]:
    """Requests of so many clients at once."""
    ids = json.loads((folder / "ids.json").read_text())
    users, sizes = ids["users"], (recommendations, len(ids["users"]), len(ids["items"]))
    parts = [users[start : start + 100] for start in range(0, len(users), 100)]
    with served(folder, *options) as (process, port):
        asyncio.run(
            ask(port, 1, [post("recommendations", {"user_ids": part, "k": 1}) for part in parts])
        )  # makes states
        asyncio.run(ask(port, clients, make_requests(events // 4, *sizes, seed=time.time_ns())))
        requests = make_requests(events, *sizes, seed=time.time_ns())
        before, begin = cpu_seconds(process), time.perf_counter()
        answers = asyncio.run(ask(port, clients, requests))
        took, cpu = time.perf_counter() - begin, cpu_seconds(process) - before
    cuts = statistics.quantiles([1e3 * seconds for _, seconds in answers], n=100, method="inclusive")
    return {
        "clients": clients,
        "recommendations": recommendations,
        "options": list(options),
        "answers": dict(Counter(status for status, _ in answers)),
        "per_second": round(len(answers) / took),
        "cpu_ms": round(1e3 * cpu / len(answers), 3),
        "p50_ms": round(cuts[49], 2),
        "p99_ms": round(cuts[98], 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 50])
    parser.add_argument("--recommendations", type=float, nargs="+", default=[0.0], metavar="SHARE")
    parser.add_argument("--events", type=int, default=15000, help="requests at each number of clients")
    args = parser.parse_args(argv)
    if len(CORES) > 1:
        os.sched_setaffinity(0, CORES[1:])
    found: dict[str, Any] = {"environment": environment("cpu"), "users": NUM_USERS, "items": NUM_ITEMS}
    found |= {"load_average": [load_average()], "requests": []}
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        for share in args.recommendations:
            for clients in args.clients:
                found["requests"].append(measure(Path(folder), clients, recommendations=share, events=args.events))
                print(json.dumps(found["requests"][-1]), flush=True)
    found["load_average"].append(load_average())
    args.file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
