"""Which way a trip takes through a loop, and which loops a mini-batch goes through."""

from dataclasses import replace

import pytest

from tests.cycles.listing import instructions
from tools.cycles.walk import longest_loop, mini_batch_loops, one_trip


def program(listing):
    """A listing in which ``@label:`` stands before an instruction, and ``->label`` behind one that jumps."""
    lines = [line.strip() for line in listing.strip().splitlines()]
    labels, bare = {}, []
    for line in lines:
        if line.startswith("@"):
            labels[line[1:].split(":")[0]] = len(bare)
            line = line.split(":", 1)[1].strip()
        bare.append(line)
    found = instructions("\n".join(line.split("->")[0] for line in bare))
    for i, line in enumerate(bare):
        if "->" in line:
            condition = "@P0" if "?" in line else ""
            found[i] = replace(found[i], jump=labels[line.split("->")[1]], predicate=condition)
    return found


def names(trip):
    return " ".join(x.name for x in trip)


def test_a_trip_goes_once_around():
    assert names(longest_loop(program("MOV\n@a: FADD\nFMUL\nBRA ? ->a\nEXIT"))) == "FADD FMUL BRA"


def test_without_a_loop_a_trip_is_the_program():
    assert names(longest_loop(program("MOV\nFADD\nEXIT"))) == "MOV FADD EXIT"


def test_what_a_condition_may_skip_is_executed():
    assert (
        names(longest_loop(program("@a: FADD\nBRA ? ->b\nFMUL\n@b: MOV\nBRA ? ->a\nEXIT"))) == "FADD BRA FMUL MOV BRA"
    )


def test_a_jump_without_a_condition_is_followed():
    listing = "@a: FADD\nBRA ->c\n@b: FMUL\nBRA ? ->a\nEXIT\n@c: MOV\nBRA ->b"
    assert names(longest_loop(program(listing))) == "FADD BRA MOV BRA FMUL BRA"


SEGMENTS = """
@segment: MOV
@replay: FADD
HMMA
BRA ? ->replay
@walk: FMUL
@chunk: FFMA
HMMA
BRA ? ->chunk
BRA ? ->walk
BRA ? ->segment
EXIT
"""


def test_a_mini_batch_goes_through_the_loops_of_a_segment():
    replay, walk = mini_batch_loops(program(SEGMENTS), 1, replays=False)
    assert (names(replay.trip), replay.times) == ("FADD HMMA BRA", 1)
    assert (names(walk.trip), walk.times) == ("FMUL FFMA HMMA BRA BRA", 1)


def test_loops_over_chunks_are_gone_through_so_often():
    _, walk = mini_batch_loops(program(SEGMENTS), 3, replays=False)
    assert names(walk.trip) == "FMUL " + 3 * "FFMA HMMA BRA " + "BRA"


def test_a_replay_goes_over_mini_batches_inside_its_chunks():
    listing = "@segment: MOV\n@chunk: MOV\n@replay: FADD\nHMMA\nBRA ? ->replay\nBRA ? ->chunk\n@walk: FMUL\nHMMA\n"
    listing += "BRA ? ->walk\nBRA ? ->segment\nEXIT"
    replay, walk = mini_batch_loops(program(listing), 4, replays=True)
    assert (names(replay.trip), replay.times) == ("FADD HMMA BRA", 4)
    assert (names(walk.trip), walk.times) == ("FMUL HMMA BRA", 1)


def test_a_kernel_without_products_is_refused():
    with pytest.raises(ValueError, match="must have a loop with matrix products"):
        mini_batch_loops(program("@a: FADD\nBRA ? ->a\nEXIT"), 1, replays=False)


def test_a_loop_over_mini_batches_alone_has_chunks_inside():
    listing = "MOV\n@walk: FMUL\n@chunk: FFMA\nHMMA\nBRA ? ->chunk\nBRA ? ->walk\nEXIT"
    assert names(one_trip(program(listing), 2, whole=False)) == "FMUL " + 2 * "FFMA HMMA BRA " + "BRA"


def test_a_program_for_a_mini_batch_goes_from_beginning_to_end():
    listing = "MOV\n@chunk: FFMA\nHMMA\nBRA ? ->chunk\nFADD\nEXIT"
    assert names(one_trip(program(listing), 2, whole=True)) == "MOV " + 2 * "FFMA HMMA BRA " + "FADD EXIT"
    assert names(one_trip(program("MOV\nHMMA\nEXIT"), 1, whole=True)) == "MOV HMMA EXIT"
