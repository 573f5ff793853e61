"""One job in this process, timed: python timing.py JOB.py INTERACTIONS.inter.gz '{"epochs": 5}' prints a line of JSON.

It runs in the environment of the job's library, in an empty folder, and imports nothing of this repository.
"""

import contextlib
import json
import platform
import resource
import runpy
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

METRICS = {"HR@10": ("HR@10", "hit@10"), "NDCG@10": ("NDCG@10", "ndcg@10")}
PACKAGES = ("ttt4rec", "rectools", "recbole", "torch", "pytorch-lightning", "numpy", "pandas")


def read(path: Path) -> pd.DataFrame:
    """Interactions in the order of each user's, which their times are: no two of them are equal."""
    frame = pd.read_csv(path, sep="\t").rename(columns=lambda name: name.partition(":")[0])
    frame = frame[["user_id", "item_id", "timestamp"]].sort_values(["user_id", "timestamp"], kind="stable")
    return frame.reset_index(drop=True).assign(timestamp=lambda ordered: ordered.index)


class Clock:
    """Seconds of this process on its cores, by part of the job."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.seconds[name] = round(time.process_time() - begin, 2)


def peak_mib() -> int:
    """The most memory that this process has held."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def versions() -> dict[str, str]:
    """Of what is installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def run(job_path: Path, interactions: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each part, memory, metrics and how much was recommended."""
    frame, clock = read(interactions), Clock()
    with clock.part("import"):
        job = SimpleNamespace(**runpy.run_path(str(job_path)))
    with clock.part("load"):
        data = job.load(frame)
    with clock.part("train"):
        model = job.train(data, **options)
    with clock.part("evaluate"):
        metrics = job.evaluate(data, model)
    with clock.part("recommend"):
        recommended = job.recommend(data, model)
    found = {name: next(metrics[key] for key in keys if key in metrics) for name, keys in METRICS.items()}
    return {
        "cpu_seconds": clock.seconds,
        "peak_mib": peak_mib(),
        "metrics": {name: round(float(value), 4) for name, value in found.items()},
        "recommended": {"users": int(recommended["user_id"].nunique()), "rows": len(recommended)},
        "versions": versions(),
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))))
