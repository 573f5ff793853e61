"""A million items: loss and ranks in blocks against the matrix of all scores and PyTorch's own chunked loss.

    pytest benchmarks/test_catalogue.py -s

Every case runs in a process of its own, which reports its peak memory beyond what it held before (``extra MiB``). The
matrix of all scores with 4,096 targets needs 3 × 15.3 GiB, so the dense side runs where it fits, with 256 targets.
"""

import json
import subprocess
import sys

import pytest
import torch

PROGRAM = """
import json, sys, threading, time
import torch, torch.nn.functional as F
from ttt4rec import catalogue

what, way, N, V, C = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
torch.manual_seed(0)
h, table = torch.randn(N, C).requires_grad_(), (torch.randn(V + 1, C) * 0.3).requires_grad_()
items = torch.randint(1, V + 1, (N,))
if way == "exact":
    h, table = (x.detach().double().requires_grad_() for x in (h, table))
if what == "ranks":  # whole numbers, whose products are exact, with thousands of ties
    h, table = h.detach().mul(8).round(), table.detach().mul(8).round()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def loss():
    if way in ("dense", "exact"):
        return F.cross_entropy(h @ table[1:].T, items - 1)
    if way == "blocks":
        return catalogue.nll(h, table, items).mean()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64)  # the fastest of 8, 32, 64, 128 at 512 targets
    return F.linear_cross_entropy(h, table[1:], items - 1, options=options)

def ranks():
    if way == "blocks":
        return catalogue.ranks(h, table, items)
    with torch.no_grad():
        scores = h @ table[1:].T
        own = scores.gather(1, items[:, None] - 1)
        return 1 + (scores > own).sum(1).double() + ((scores == own).sum(1) - 1) / 2

peak, running, before = 0, True, resident()

def watch():
    global peak
    while running:
        peak = max(peak, resident())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
begin = time.perf_counter()
value = loss() if what == "loss" else ranks()
if what == "loss":
    value.backward()
seconds = time.perf_counter() - begin
running = False
watcher.join()
check = value.tolist() if what == "ranks" else [value.item()]
for grad in (h.grad, table.grad) if what == "loss" else ():  # its size, and its shadow in a direction drawn at random
    grad = grad.double()
    check += [grad.norm().item(), 1 + (grad * torch.randn(grad.shape)).sum().item() / grad.norm().item()]
print(json.dumps({"seconds": seconds, "extra": (peak - before) / 2**20, "check": check}))
"""

LIBRARY = ("library",) if hasattr(torch.nn, "LinearCrossEntropyOptions") else ()
WAYS = {"loss": ("dense", *LIBRARY, "blocks"), "ranks": ("dense", "blocks")}
CASES = [
    (what, way, targets)
    for what, ways in WAYS.items()
    for way in ways
    for targets in (256, 4096)
    if (way, targets) != ("dense", 4096)
]


def run(what, way, targets, items=1_000_000, width=64):
    command = [sys.executable, "-c", PROGRAM, what, way, *map(str, (targets, items, width))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(("what", "way", "targets"), CASES)
def test_a_million_items(benchmark, what, way, targets):
    benchmark.group = f"{what}, {targets} targets, 1,000,000 items, width 64"
    results = []
    benchmark.pedantic(lambda: results.append(run(what, way, targets)), rounds=1)
    seconds, extra = results[0]["seconds"], results[0]["extra"]
    benchmark.extra_info |= {"seconds": seconds, "extra MiB": extra, "torch": torch.__version__}
    print(f"\n{what} {way} {targets}: {seconds:.1f} s, {extra:.0f} MiB beyond the inputs")
    if way == "blocks":
        assert extra < 1024


def test_ranks_are_the_same():
    dense, blocks = (run("ranks", way, 64)["check"] for way in WAYS["ranks"])
    assert blocks == dense


def test_losses_are_as_exact_as_that_of_all_scores():
    exact, *checks = (run("loss", way, 64)["check"] for way in ("exact", *WAYS["loss"]))
    dense, *others = (max(abs(a / b - 1) for a, b in zip(check, exact, strict=True)) for check in checks)
    assert max(others) <= 2 * dense
