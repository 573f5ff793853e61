"""The simulation of loops written by hand, each bound by one thing, whose time can be told without simulating."""

from dataclasses import replace

import pytest

from tests.cycles.listing import instructions
from tools.cycles.machines import MACHINES
from tools.cycles.simulator import Outcome, simulated
from tools.cycles.steps import Place, steps

HOPPER, AMPERE = MACHINES["H200"], MACHINES["A100"]
LATENCIES = HOPPER.latencies


def outcome(listing, *, warps=1, programs=1, repeat=1, place=Place.MEMORY, machine=HOPPER) -> Outcome:
    trip = instructions(listing, repeat=repeat)
    return simulated(steps(trip, machine, len(trip) * [place]), machine, warps, programs)


@pytest.mark.parametrize("programs", [1, 4, 16])
def test_a_chain_of_fixed_latencies_takes_its_pauses(programs):
    """Four cycles an instruction, as long as no more than four warps of a sub-partition take turns."""
    found = outcome("FFMA stall=4", repeat=100, programs=programs)
    assert found.trip == pytest.approx(400, rel=0.02)
    assert found.waits["fixed latencies"] == pytest.approx(300, rel=0.02)


def test_a_sub_partition_issues_one_instruction_a_cycle():
    """Of eight warps on each, in chains of four cycles, half wait for their turn."""
    found = outcome("FFMA stall=4", repeat=100, programs=32)
    assert found.trip == pytest.approx(800, rel=0.02)
    assert found.busy["issue"] == pytest.approx(1, abs=0.02)
    assert found.waits["issue"] > 350


def test_units_of_half_a_warp_take_one_instruction_every_two_cycles():
    integer = outcome("IADD3 stall=1", repeat=100, programs=8)
    assert integer.processor == pytest.approx(100 * 2 / 4, rel=0.02)
    floats = outcome("FFMA stall=1", repeat=100, programs=8)
    assert floats.processor == pytest.approx(100 / 4, rel=0.02)  # there are two such units for floats
    assert outcome("FFMA stall=1", repeat=100, programs=8, machine=AMPERE).processor == pytest.approx(50, rel=0.02)
    special = outcome("MUFU.EX2 stall=1 written=0", repeat=100, programs=8)
    assert special.processor == pytest.approx(100 * 8 / 4, rel=0.02)


def test_tensor_cores_take_a_product_every_so_many_cycles():
    assert outcome("HMMA.16816.F32.BF16 stall=1", repeat=50).trip == pytest.approx(50 * HOPPER.product, rel=0.03)
    assert outcome("HMMA.16816.F32.BF16 stall=1", repeat=50, machine=AMPERE).trip == pytest.approx(400, rel=0.03)


def test_a_counter_is_waited_for():
    listing = "LDG.E stall=1 written=2\nFFMA stall=4 wait=2"
    found = outcome(listing)
    assert LATENCIES.memory < found.trip < LATENCIES.memory + 40
    assert found.waits["loads"] > 0.9 * LATENCIES.memory
    near = outcome(listing, place=Place.NEAR)
    assert LATENCIES.near < near.trip < LATENCIES.near + 20
    assert outcome("LDG.E stall=1 written=2\nFFMA stall=4 wait=3").trip < 50


def test_loads_before_their_wait_overlap():
    together = outcome("LDG.E written=0\nLDG.E written=1\nFFMA wait=0,1 stall=4")
    apart = outcome("LDG.E written=0\nFFMA wait=0 stall=4\nLDG.E written=1\nFFMA wait=1 stall=4")
    assert apart.trip > 1.8 * together.trip


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_a_barrier_costs_its_latency_from_the_last_arrival(warps):
    found = outcome("BAR.SYNC stall=1", repeat=20, warps=warps)
    assert found.trip == pytest.approx(20 * (LATENCIES.barrier + warps), rel=0.1)
    assert found.waits["barriers"] > 0.8 * found.trip


def test_at_a_barrier_the_last_one_is_waited_for():
    """Eight warps take turns at a unit of which each sub-partition has one; the barrier comes after the slowest."""
    listing = "\n".join(["MUFU.EX2 stall=1"] * 10 + ["BAR.SYNC stall=1"])
    apart, together = outcome(listing, warps=1, programs=8), outcome(listing, warps=8)
    assert together.trip >= apart.trip
    assert together.trip == pytest.approx(10 * 8 * 2 + LATENCIES.barrier + 8, rel=0.1)


def test_programs_wait_at_their_own_barrier_only():
    listing = "BAR.SYNC stall=1\nFFMA stall=4"
    assert outcome(listing, warps=4, programs=4).trip < 1.5 * outcome(listing, warps=4).trip


@pytest.mark.parametrize(("opcode", "waves"), [("LDS", 1), ("LDS.64", 2), ("LDS.128", 4), ("LDSM.16.M88.4", 4)])
def test_shared_memory_gives_128_bytes_a_cycle(opcode, waves):
    found = outcome(f"{opcode} stall=1 written=0", repeat=50, warps=8, programs=2)
    assert found.processor == pytest.approx(50 * 8 * waves, rel=0.05)
    assert found.busy["load-store unit"] == pytest.approx(1, abs=0.05)


def test_memory_gives_each_multiprocessor_its_share():
    found = outcome("LDG.E.128 stall=1 written=0\nFFMA wait=0 stall=4", warps=8, programs=8)
    assert found.processor == pytest.approx(8 * 512 / HOPPER.memory_rate, rel=0.05)
    assert found.busy["memory"] == pytest.approx(1, abs=0.05)
    cached = outcome("LDG.E.128 stall=1 written=0\nFFMA wait=0 stall=4", warps=8, programs=8, place=Place.CACHE)
    assert cached.processor == pytest.approx(8 * 512 / HOPPER.cache_bytes, rel=0.05)


def test_a_copy_that_is_one_trip_ahead_is_not_waited_for():
    """As with three stages; two stages have one buffer, and wait for the copy just begun."""
    work = "FFMA stall=4\n" * 200
    copy = "LDGSTS.E.128 stall=1\nLDGDEPBAR written=0 stall=1\n"
    waiting, ahead = (outcome(f"{work}{copy}DEPBAR.LE (SB0, 0x{left})") for left in (0, 1))
    assert waiting.trip - ahead.trip > 0.9 * LATENCIES.memory
    assert ahead.trip == pytest.approx(800, rel=0.05)


def test_products_of_warp_groups_run_while_the_warp_goes_on():
    multiply = "HGMMA.64x128x16.F32.BF16 stall=1\n"
    wait = "WARPGROUP.DEPBAR.LE (gsb0, 0x0) stall=1\n"
    work = "FFMA stall=4\n" * 10
    behind, meanwhile = outcome(multiply + wait + work, warps=4), outcome(multiply + work + wait, warps=4)
    assert behind.trip - meanwhile.trip == pytest.approx(40, abs=5)
    assert behind.trip > 64 + 40  # half a cycle a column


def test_a_queue_takes_stores_until_it_is_full():
    few, many = (outcome("STS stall=1 read=0", repeat=n, warps=4).trip / n for n in (2, 64))
    assert many == pytest.approx(4, rel=0.1)
    assert few <= many


def test_without_limits_warps_issue_at_once():
    trip = instructions("FFMA stall=4", repeat=100)
    found = steps(trip, HOPPER, len(trip) * [Place.NEAR])
    without_units = [replace(step, interval=0) for step in found]
    assert simulated(without_units, HOPPER, 1, 32, unlimited=True).trip == pytest.approx(400, rel=0.02)
