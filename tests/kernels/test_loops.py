"""Loops of machine code: which instructions the counts of a kernel's costs are of."""

from tools.loops import Code, loops


def program(count: int, jumps: dict[int, int], *final: int) -> Code:
    return Code([f"i{n}" for n in range(count)], jumps, {count - 1, *final})


def test_a_program_without_a_way_back_has_no_loop() -> None:
    assert loops(program(4, {1: 3})) == []


def test_a_loop_inside_another_is_part_of_both() -> None:
    assert loops(program(8, {2: 7, 4: 3, 6: 1}, 6)) == [{1, 2, 3, 4, 5, 6}, {3, 4}]


def test_two_ways_back_to_one_beginning_are_one_loop() -> None:
    assert loops(program(6, {2: 1, 4: 1})) == [{1, 2, 3, 4}]


def test_a_path_behind_the_end_that_jumps_back_is_no_loop() -> None:
    """As of a wait that did not succeed at once: instruction 2 leaves for 7 and 8, which repeat, then 9 comes back."""
    assert loops(program(10, {2: 7, 5: 1, 8: 7, 9: 3}, 6)) == [{1, 2, 3, 4, 5, 7, 8, 9}, {7, 8}]
    assert loops(program(8, {2: 6, 7: 3}, 5)) == []


def test_a_loop_may_begin_behind_its_end() -> None:
    assert loops(program(6, {0: 3, 3: 5, 4: 1}, 0, 4)) == [{1, 2, 3, 4}]


def test_what_nothing_leads_to_is_in_no_loop() -> None:
    assert loops(program(5, {3: 3}, 1, 3)) == []
