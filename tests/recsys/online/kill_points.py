"""An event log whose process dies at each point of its writing in turn, while several threads append.

    python -m tests.recsys.online.kill_points --every 1

The points are before a write, half way through it, before a flush and after it. Two kinds of death are looked at: the
process is killed, and what it wrote stays; and the power fails, which also takes what was not flushed, or half of it.
One of the threads sends a batch that the log refuses, in the same group as others' good ones.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from tests.support.crash import fork, wait
from tests.support.online_data import history
from ttt4rec.native.build import compiler
from ttt4rec.recsys.online.events import DamagedLogError, Event, SQLiteEventLog

WRITERS, STEPS = 4, 3
SOURCE = Path(__file__).with_suffix(".cpp")


def run(every):
    """Counts of what happened, with flushes and without, from a process with the points before its C library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kill_points.so"
        subprocess.run([*compiler(), "-shared", "-fPIC", "-O1", SOURCE, "-o", library, "-ldl"], check=True)
        command = [sys.executable, "-m", "tests.recsys.online.kill_points", "--every", str(every), "--within", folder]
        environment = os.environ | {"LD_PRELOAD": str(library)}
        told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return [Counter(counts) for counts in json.loads(told.stdout)]


def write(path, point, flush, pipe, flushed):
    """All threads' batches, told when they are acknowledged; dies at the point, or notes how large groups were."""
    log = SQLiteEventLog(path, flush=flush)
    together, failures, groups = threading.Barrier(WRITERS + 1), [], []
    append = log._commits._append
    log._commits._append = lambda events: [append(events), groups.append(len(events) // 2)][0]

    def work(number):
        together.wait()
        for step in range(STEPS):
            if log.append([Event(f"u{number}", f"{step}", f"{step}"), Event("all", f"{number} {step}")]) != [True] * 2:
                failures.append((number, step))
            os.write(pipe, bytes([number]))

    def misbehave():
        together.wait()
        try:
            log.append([Event("fine", "a"), Event("damaged", "a")])
            failures.append("a damaged history took an event")
        except DamagedLogError:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
    threads.append(threading.Thread(target=misbehave))
    with log._locks[0]:  # so that the first group is one of several
        ctypes.CDLL(None).arm(ctypes.c_long(point), flushed)
        for thread in threads:
            thread.start()
        while len(log._commits._waiting) < WRITERS:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert not failures, failures
    path.with_name("groups").write_text(json.dumps(groups))


def check(path, acknowledged):
    """Of every thread all that was acknowledged is there, each batch as a whole, and the refused ones are not."""
    with closing(SQLiteEventLog(path)) as log:
        together = history(log, "all")
        for number in range(WRITERS):
            items = history(log, f"u{number}")
            assert items == [str(step) for step in range(len(items))]
            assert [x for x in together if x.startswith(f"{number} ")] == [f"{number} {step}" for step in items]
            assert acknowledged[number] <= len(items), f"{acknowledged} were acknowledged, {together} are there"
        assert history(log, "fine") == []
    return len(together)


def power_fails(path, place, kept):
    """A copy of the log as a disk would hold it that had taken so many bytes of the write-ahead log."""
    shutil.copy(path, place)
    wal = path.with_name(f"{path.name}-wal")
    if wal.exists():
        place.with_name(f"{place.name}-wal").write_bytes(wal.read_bytes()[:kept])
    return place


def die_everywhere(folder, every, flush):
    """Until a process gets to its end."""
    counts, point = Counter(), 0
    while True:
        place = folder / str(point)
        place.mkdir(parents=True)
        path = place / "log.db"
        with closing(SQLiteEventLog(path)) as log:
            log.append([Event("damaged", "a")])
        with closing(sqlite3.connect(path)) as database:
            database.execute("UPDATE users SET length = 5")
            database.commit()
        reading, writing = os.pipe()
        flushed = os.open(place / "flushed", os.O_RDWR | os.O_CREAT)
        code = wait(fork(lambda at=(path, point), to=(writing, flushed): write(*at, flush, *to)))
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            acknowledged = Counter(pipe.read())
        kept = struct.unpack("l", os.pread(flushed, 8, 0).ljust(8, b"\0"))[0]
        os.close(flushed)
        wal = path.with_name("log.db-wal")
        written = wal.stat().st_size if wal.exists() else 0
        promised = acknowledged if flush else Counter()
        for name, size in (("none", kept), ("half", kept + (written - kept) // 2)):
            there = check(power_fails(path, place / f"{name}.db", size), promised)
            counts["batches lost with the power"] += max(0, acknowledged.total() - there)
        counts["batches logged without a word"] += check(path, acknowledged) - acknowledged.total()
        counts["batches acknowledged"] += acknowledged.total()
        counts["unflushed bytes"] += written - kept
        if code == 0:
            counts["batches of the largest group"] = max(json.loads((place / "groups").read_text()))
            return counts
        assert code == -signal.SIGKILL, code
        counts["deaths"] += 1
        point += every
        shutil.rmtree(place)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1, help="die at every so many points")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.within is None:
        for flush, counts in zip(("flushed", "not flushed"), run(args.every), strict=True):
            print(f"{flush}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}")
    else:
        print(json.dumps([die_everywhere(args.within / f"{flush}", args.every, flush) for flush in (True, False)]))
