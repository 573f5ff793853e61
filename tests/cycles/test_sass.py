"""The decoder: instructions and their control bits, from a disassembly that was written by hand."""

import pytest

from tools.sass import code, decoded


def line(address: int, text: str, *, stall=1, written=7, read=7, wait=0) -> str:
    """As the disassembler prints an instruction of which only the control bits count."""
    high = (stall | 1 << 4 | written << 5 | read << 8 | wait << 11) << 41
    return f"        /*{address:04x}*/  {text} ;  /* 0x{address:016x} */\n  /* 0x{high:016x} */\n"


PROGRAM = (
    ".text.kernel:\n"
    + line(0x00, "S2R R0, SR_TID.X", stall=2, written=0)
    + ".L_x_1:\n"
    + '\t//## File "/there/inner.py", line 7 inlined at "/there/outer.py", line 30\n'
    + '\t//## File "/there/outer.py", line 30\n'
    + line(0x10, "@!P0 LDG.E.64 R2, desc[UR4][R0.64+0x10]", written=1, read=3, wait=0b000001)
    + line(0x20, "FFMA R4, R2, R2, R4", stall=4, wait=0b001010)
    + line(0x30, "@P1 BRA `(.L_x_1)", stall=5)
    + line(0x40, "EXIT", stall=5)
    + ".L_x_2:\n"
    + line(0x50, "BRA `(.L_x_2)", stall=0)
)


def test_control_bits_are_decoded():
    first, load, fma, jump, *_ = decoded(PROGRAM)
    assert (first.stall, first.written, first.read, first.wait) == (2, 0, None, ())
    assert (load.stall, load.written, load.read, load.wait) == (1, 1, 3, (0,))
    assert (fma.stall, fma.written, fma.read, fma.wait) == (4, None, None, (1, 3))
    assert jump.stall == 5


def test_an_instruction_has_its_parts():
    load = decoded(PROGRAM)[1]
    assert (load.predicate, load.opcode, load.name) == ("@!P0", "LDG.E.64", "LDG")
    assert load.operands == "R2, desc[UR4][R0.64+0x10]"
    assert str(load) == "@!P0 LDG.E.64 R2, desc[UR4][R0.64+0x10]"


def test_an_instruction_stems_from_the_lines_above_it():
    _, load, fma, *_ = decoded(PROGRAM)
    assert load.source == (("/there/inner.py", 7), ("/there/outer.py", 30))
    assert fma.source == load.source


def test_jumps_lead_to_labels_and_what_ends_is_final():
    program = code(decoded(PROGRAM))
    assert program.jumps == {3: 1, 5: 5}
    assert program.final == {4, 5}


@pytest.mark.parametrize("condition", ["!UP0, ", "UP1, ", "UR4, "])
def test_a_jump_whose_condition_is_an_operand_is_not_final(condition):
    program = code(decoded(PROGRAM.replace("BRA `(.L_x_2)", f"BRA.U {condition}`(.L_x_2)")))
    assert program.jumps == {3: 1, 5: 5}
    assert program.final == {4}


def test_what_is_no_disassembly_is_refused():
    with pytest.raises(ValueError, match="must have instructions of two words"):
        decoded("nothing here")
    with pytest.raises(ValueError, match="must have instructions of two words"):
        decoded(PROGRAM.rsplit("\n", 2)[0])
