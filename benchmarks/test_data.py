"""Ten million interactions, as text and as Parquet: seconds to read and to index, and peak memory beyond the imports.

pytest benchmarks/test_data.py -s
"""

import json
import subprocess
import sys

import numpy as np
import pytest

ROWS = 10_000_000

PROGRAM = """
import json, sys, time
from benchmarks.measure import resident
from ttt4rec.recsys.data import build_histories, filter_k_core, read_interactions
import ttt4rec.recsys

before, begin = resident("VmHWM"), time.perf_counter()
interactions = read_interactions(sys.argv[1])
middle = time.perf_counter()
histories = build_histories(filter_k_core(interactions, min_user=5, min_item=5))
end = time.perf_counter()
peak = (resident("VmHWM") - before) / 2**30
print(json.dumps({"rows": len(interactions), "read": middle - begin, "index": end - middle, "GiB": peak}))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write("user_id,item_id,timestamp\n")
        for _ in range(10):
            users = rng.zipf(1.3, ROWS // 10) % 500_000
            items = (rng.pareto(1.0, ROWS // 10) * 50).astype(np.int64) % 200_000
            times = 1_500_000_000 + rng.integers(0, 10**8, ROWS // 10)
            rows = zip(users.tolist(), items.tolist(), times.tolist(), strict=True)
            file.write("".join(f"{u},{i},{t}\n" for u, i, t in rows))
    yield path
    path.unlink()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_ten_million_rows(benchmark, text, kind):
    path = text
    if kind == "parquet":
        from pyarrow import csv, parquet

        path = text.with_suffix(".parquet")
        parquet.write_table(csv.read_csv(text), path)
    results = []

    def load():
        command = [sys.executable, "-c", PROGRAM, str(path)]
        results.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))

    benchmark.pedantic(load, rounds=1)
    benchmark.extra_info |= results[0]
    print(f"\n{kind}: {results[0]}")
    assert results[0]["rows"] == ROWS
    assert 0.1 < results[0]["GiB"] < 1.5
