"""An event and recommendations, by number of users who come at random: pytest benchmarks/test_online.py -s

``python -m benchmarks.online FILE.json`` measures more and writes it down.
"""

import pytest

from .online import USERS, late, measure, write_histories


@pytest.mark.parametrize("users", list(USERS)[:2])
def test_requests(benchmark, tmp_path, users):
    """pytest-benchmark's time is that of the whole; the table is in ``extra_info``."""
    write_histories(tmp_path / "log.db", users)
    results = []
    benchmark.pedantic(lambda: results.append(measure(tmp_path / "log.db", "mlp", users, 1.0)), rounds=1)
    benchmark.extra_info |= results[0]
    print(f"\n{results[0]}")
    assert results[0]["share_rebuilt"] == 0


def test_late_events(benchmark, tmp_path):
    results = []
    benchmark.pedantic(lambda: results.append(late(tmp_path / "log.db", "mlp", length=5000, num_items=1000)), rounds=1)
    benchmark.extra_info |= results[0]
    print(f"\n{results[0]}")
    assert results[0]["after_one_of_the_future_cpu_ms"] < 10 * results[0]["in_order_cpu_ms"]
