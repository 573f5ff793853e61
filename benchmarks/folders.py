"""Peak memory of each step from a folder of Parquet files to training windows, in bytes an event.

    python -m benchmarks.folders FOLDER --rows 20000000 --files 40

makes the folder if it is not there: made-up users, items and times, and a column of text that nobody
reads. The steps run in one process, whose memory ``--limit`` bounds (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import os
import resource
import threading
import time
from pathlib import Path

import numpy as np

from ttt4rec.recsys.data import build_histories
from ttt4rec.recsys.data.datasets import load_interactions
from ttt4rec.recsys.data.interactions import filter_k_core
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import evaluation_prefixes, training_windows

EVENTS_PER_USER = 50
TEXT_BYTES = 100


def write(folder: Path, rows: int, files: int, seed: int = 0) -> None:
    """A folder of so many files, partitioned by day; events come in no order of users."""
    import pyarrow as arrow
    from pyarrow import parquet

    rng = np.random.default_rng(seed)
    users, items = max(1, rows // EVENTS_PER_USER), max(2, rows // 200)
    for number in range(files):
        count = rows // files
        columns = {
            "user_id": rng.integers(0, users, count),
            "item_id": (items * rng.random(count) ** 3).astype(np.int64),
            "timestamp": 1_700_000_000 + number * 86400 + np.sort(rng.integers(0, 86400, count)),
        }
        pieces = rng.integers(0, 256, count + TEXT_BYTES, dtype=np.uint8)  # each row's text overlaps the next one's
        text = [pieces[place : place + TEXT_BYTES].tobytes() for place in range(count)]
        place = folder / f"day={number:03}"
        place.mkdir(parents=True)
        table = arrow.table(columns | {"text": text})
        parquet.write_table(table, place / "part-0.parquet", row_group_size=1 << 18, compression="none")


def steps(folder: Path, core: int, max_len: int):
    """The steps of a training run, each handing on what the next one needs."""
    interactions = load_interactions(folder)
    yield "read", len(interactions)
    if core:
        interactions = filter_k_core(interactions, min_user=core, min_item=core)
        yield f"{core}-core", len(interactions)
    histories = build_histories(interactions)
    del interactions
    yield "histories", len(histories.items)
    split = split_by_ratio(histories)
    split.train_counts()
    yield "split, counts", len(histories.items)
    windows = training_windows(split, max_len=max_len)
    yield "training windows", len(windows.items)
    prefixes = evaluation_prefixes(split, "valid", max_len=max_len)
    yield "validation windows", len(prefixes.items)


class Peak:
    """The most memory of its own (VmData would count what is only reserved) that a process had since the last call."""

    def __init__(self) -> None:
        self.most, self._ending = _resident(), threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._ending.wait(0.002):
            self.most = max(self.most, _resident())

    def take(self) -> int:
        """It, and begin anew."""
        most, self.most = self.most, _resident()
        return most


def _resident() -> int:
    """Bytes without those of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise OSError("the system does not say how much memory a process has")


def measure(folder: Path, core: int, max_len: int) -> None:
    """Print the peaks."""
    peak = Peak()
    before, begin = peak.take(), time.process_time()
    print(f"{before / 1e6:,.0f} MB before")
    for name, events in steps(folder, core, max_len):
        most, now = peak.take() - before, _resident() - before
        seconds, begin = time.process_time() - begin, time.process_time()
        print(f"| {name} | {events:,} | {most / 1e6:,.0f} | {most / events:.1f} | {now / events:.1f} | {seconds:.1f} |")
    print(f"peak of all {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


def main() -> None:
    """Make the folder and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--core", type=int, default=5)
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--limit", type=int, help="bytes that the process may take")
    given = parser.parse_args()
    if not given.folder.exists():
        write(given.folder, given.rows, given.files)
    size = sum(path.stat().st_size for path in given.folder.rglob("*.parquet"))
    print(
        f"{size / 1e6:,.0f} MB in files; events, peak MB, peak and rest in bytes an event, seconds of CPU", flush=True
    )
    if given.limit:
        resource.setrlimit(resource.RLIMIT_DATA, (given.limit, given.limit))
    measure(given.folder, given.core, given.max_len)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
