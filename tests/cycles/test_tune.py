"""How cuts are compared."""

import pytest

from tools.tune import Cut, candidates, read, worse_of, written
from ttt4rec.kernels import launch, segments
from ttt4rec.kernels.launch import Blocks

NAME = "linear_backward:sm_90:16:8:bf16"


def cut(triton, blocks, few, full, registers=200, spills=0.0):
    return Cut(NAME, triton, Blocks(*blocks), few, full, 4, registers, spills)


def test_the_worse_of_two_tritons_counts():
    cuts = [
        cut("3.6.0", (1, 1), 1, 9),
        cut("3.9.0", (1, 1), 1, 1),
        cut("3.6.0", (2, 1), 2, 2),
        cut("3.9.0", (2, 1), 1, 1),
    ]
    best, other = worse_of(cuts)
    assert (best.blocks.num_warps, best.full) == (2, 2)
    assert (other.blocks.num_warps, other.full) == (1, 9)


def test_a_cut_must_compile_under_all_tritons():
    cuts = [cut("3.6.0", (1, 1), 1, 1), cut("3.6.0", (2, 1), 2, 2), cut("3.9.0", (2, 1), 2, 2)]
    assert [x.blocks.num_warps for x in worse_of(cuts)] == [2]


def test_few_and_many_programs_count_alike():
    assert worse_of([cut("", (1, 1), 4, 1), cut("", (2, 1), 1, 3.9)])[0].blocks.num_warps == 2


@pytest.mark.parametrize(("registers", "spills", "kept"), [(32, 1, 0), (64, 1, 0), (64, 0, 1), (65, 1000, 1)])
def test_where_the_assembler_gave_up_is_no_cut(registers, spills, kept):
    assert len(worse_of([cut("", (1, 1), 1, 1, registers, spills)])) == kept


def test_a_line_is_read_as_it_was_written():
    known = cut("3.9.0", (1, 2, 2, 1), 1.5, 2.5, spills=3.5)
    assert read(written(known)) == known


def test_candidates_have_room_for_their_state():
    """And three stages, as two do not load ahead."""
    assert Blocks(1, 2, heads=2) in candidates("linear_backward", 16, 8)
    assert Blocks(1, 3, heads=2) in candidates("linear_forward", 16, 8)
    assert {x.num_warps for x in candidates("mlp_backward", 64, 16) if x.chunks == 1} == {8}
    assert {x.heads for x in candidates("linear_forward", 64, 16)} == {1}
    assert {x.chunks for x in candidates("linear_forward", 128, 16)} == {1}
    assert Blocks(1, 3, heads=2) in candidates("mlp_backward", 16, 8)
    assert Blocks(1, 3, heads=2) not in candidates("mlp_forgetting_backward", 16, 8)


@pytest.mark.parametrize("op", segments.OPS)
def test_candidates_of_a_backward_by_segments(op):
    """What the launch tables have is among them, and no program of two heads, which these kernels cannot be."""
    for table in (launch.HALF, *launch.HALF_BY_ARCHITECTURE.values()):
        for (name, head_dim), cuts in table.items():
            if name == op:
                assert set(cuts.values()) <= set(candidates(op, head_dim, 16))
    assert {x.heads for x in candidates(op, 16, 8)} == {1}
