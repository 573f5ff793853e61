"""Parsed PTX to what the core executes: numbers of operations, and places of registers in a warp's memory.

Every register has a place of 32 lanes. Constants, parameters and special registers have places too, which are filled
before a warp begins, so that an operand always is the number of a place.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .build import operations
from .parser import Address, Instruction, Operand, UnknownPtxError, parse
from .program import SHARED_BASE, SPECIALS, Parameter, Program, fill

ZEROS = ("%tid.y", "%tid.z", "%cluster_ctarank", "%clusterid.x", "%cluster_ctaid.x")
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}
_FRESH = 0x7FC5A5A5  # a NaN, in registers that nothing was written to
_CACHES = r"(?:\.(?:nc|c[agsv]|lu|w[bt]|volatile|relaxed|acquire|release|cta|gpu|sys|L[12]::[\w:]+))*"
_ACCESS = rf"(ld|st){_CACHES}\.(global|shared|param)(?:::\w+)?{_CACHES}(?:\.v([248]))?\.([bsuf])(\d+)"
_FORMS = {  # by the name: the core's operation and what the operands are, as `argument` reads it
    r"ret|exit": "ret",
    r"trap": "trap",
    r"fence\.proxy\.async.*": "fence.proxy.async",
    r"(fence|membar|griddepcontrol|wgmma\.fence|tcgen05\.fence|tcgen05\.relinquish_alloc_permit)\b.*": "nop",
    r"bar\.warp\.sync": "bar.warp.sync w",
    r"elect\.sync": "elect.sync r4 r0 w",
    r"cp\.async\.(commit_group|wait_all)": r"cp.async.\1",
    r"cp\.async\.wait_group": "cp.async.wait_group n",
    r"wgmma\.commit_group\..*": "wgmma.commit_group",
    r"wgmma\.wait_group\..*": "wgmma.wait_group n",
    r"mbarrier\.init\.shared.*": "mbarrier.init S8 s4",
    r"mbarrier\.inval\.shared.*": "mbarrier.inval S8",
    r"mbarrier\.try_wait\.parity\.shared.*": "mbarrier.try_wait.parity r0 S8 s4",
    r"tcgen05\.wait::(ld|st)\..*": r"tcgen05.wait::\1",
    r"tcgen05\.alloc\.cta_group::1\..*": "tcgen05.alloc S4 n",
    r"tcgen05\.dealloc\.cta_group::1\..*": "tcgen05.dealloc s4 n",
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(\.shared::cluster)?\.b64": "tcgen05.commit S8",
    r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)": r"tcgen05.mma.\1 T4 D2 s8 s4 s0",
}
_Operands = tuple[Operand, ...]


def decode(text: str) -> Program:
    """Read a module with one kernel.

    Raises:
        UnknownPtxError: an instruction, named, or another part of it that the emulator does not know.
    """
    return _Decoder(text).program()


class _Decoder:
    def __init__(self, text: str) -> None:
        self.kernel = parse(text)
        self.words = 0
        self.place = {name: self.new(size) for name, size in self.kernel.registers.items()}
        self.constants: dict[tuple[int, int], int] = {}
        self.specials: dict[str, int] = {}
        self.places: list[Parameter] = []
        self.code: list[list[int]] = []
        self.origin: list[Instruction] = []
        self.smallest = {"shared": 16, "global": 16, "tensor": 16}
        self.starts: list[int] = []

    def new(self, size: int) -> int:
        """A place for 32 values; predicates take one word but keep the alignment."""
        self.words += 8 * (size or 2)
        return self.words - 8 * (size or 2)

    def program(self) -> Program:
        for instruction in self.kernel.instructions:
            self.starts.append(len(self.code))
            try:
                self.instruction(instruction)
            except (UnknownPtxError, LookupError, ValueError) as error:
                raise UnknownPtxError(f"{instruction.name}: {error}, in: {instruction.text}") from error
        for at, target in self.kernel.targets.items():
            self.code[self.starts[at]][3] = self.starts[target]
        image = np.full(self.words, _FRESH, np.uint32)
        for (value, size), place in self.constants.items():
            fill(image, place, size, value)
        return Program(
            self.kernel.name,
            self.kernel.threads,
            list(self.kernel.parameters.values()),
            self.origin,
            np.array([*itertools.chain(*self.code)], np.int32),
            np.cumsum([0, *map(len, self.code[:-1])]).astype(np.int32),
            image,
            self.places,
            [self.specials.get(name, -1) for name in SPECIALS],
            (self.smallest["shared"].bit_length() - 1, self.smallest["global"].bit_length() - 1),
        )

    # operands

    def size(self, name: str) -> int:
        """Bytes of a register."""
        return self.kernel.registers[name]

    def constant(self, value: int, size: int) -> int:
        value = value & ((1 << 8 * size) - 1) if size else int(value != 0)
        if (value, size) not in self.constants:
            self.constants[value, size] = self.new(size)
        return self.constants[value, size]

    def source(self, operand: Operand, size: int) -> int:
        """The place of an operand of so many bytes; of a wider register its low bits."""
        if not isinstance(operand, str):
            raise UnknownPtxError(f"operand {operand} instead of a register")
        if operand in self.place:
            own = self.size(operand)
            if own == size:
                return self.place[operand]
            if size and own > size:
                narrow = self.new(size)
                self.emit(f"cvt.u{8 * size}.u{8 * own}", narrow, self.place[operand], always=True)
                return narrow
            raise UnknownPtxError(f"register {operand} has {own} bytes, not {size}")
        if operand in SPECIALS:
            if operand not in self.specials:
                self.specials[operand] = self.new(4)
            if size == 4:
                return self.specials[operand]
        if operand in ZEROS:
            return self.constant(0, size)
        if operand == "global_smem":
            return self.constant(SHARED_BASE, size)
        return self.constant(number(operand), size)

    def target(self, operand: Operand, size: int) -> int:
        """The place of a result; ``_`` is one that nobody reads."""
        if operand == "_":
            return self.new(size)
        if not isinstance(operand, str) or self.size(operand) != size:
            raise UnknownPtxError(f"result {operand} instead of a register of {size} bytes")
        return self.place[operand]

    def parts(self, operand: Operand) -> tuple[Operand, ...]:
        return operand if isinstance(operand, tuple) else (operand,)

    def sources(self, operand: Operand, size: int) -> list[int]:
        return [self.source(name, size) for name in self.parts(operand)]

    def targets(self, operand: Operand, size: int) -> list[int]:
        return [self.target(name, size) for name in self.parts(operand)]

    def address(self, operand: Operand, space: str) -> list[int]:
        if not isinstance(operand, Address):
            raise UnknownPtxError(f"operand {operand} instead of an address")
        return [self.source(operand.base, 8 if space == "global" else 4), operand.offset]

    def argument(self, kind: str, operand: Operand) -> list[int]:
        """``r4``: a result of 4 bytes; ``s4``: a source; ``n``: a number; ``w``: the mask of a whole warp.

        ``S4``, ``G4``, ``T4``: where 4 bytes are accessed in shared, global or tensor memory. ``D2``: a matrix of
        2 bytes an element, by a descriptor or in tensor memory.
        """
        what, size = kind[0], int(kind[1:] or 0)
        if what == "w" and number(operand) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise UnknownPtxError("other lanes than a whole warp's")
        if what in "nw":
            return [number(operand)] if what == "n" else []
        if what in "rs":
            return [self.target(operand, size) if what == "r" else self.source(operand, size)]
        space = {"S": "shared", "D": "shared", "G": "global", "T": "tensor"}[what]
        self.smallest[space] = min(self.smallest[space], size)
        if what != "D":
            return self.address(operand, space)
        inside = isinstance(operand, Address)
        return [int(inside), *(self.address(operand, "tensor") if inside else (self.source(operand, 8), 0))]

    # instructions

    def emit(self, operation: str, *arguments: int, always: bool = False) -> None:
        """Append an operation; ``always`` leaves the guard of the instruction out."""
        guard = None if always else self.current.guard
        place = -1 if guard is None else self.place[guard]
        self.code.append([operations()[operation].number, place, int(self.current.negated), *arguments])
        self.origin.append(self.current)

    def instruction(self, instruction: Instruction) -> None:
        self.current = instruction
        handler: Callable[[_Operands], None] | None = getattr(self, f"do_{instruction.name.split('.')[0]}", None)
        if (form := _form(instruction.name)) is not None:
            operands = [name for operand in instruction.operands for name in self.parts(operand)]
            places = [self.argument(*each) for each in zip(form[1:], operands, strict=True)]
            self.emit(form[0], *itertools.chain(*places))
        elif handler is not None:
            handler(instruction.operands)
        else:
            self.plain(instruction.name, instruction.operands)

    def shape(self, pattern: str) -> tuple[Any, ...]:
        """The groups of a pattern that the whole name of the instruction has to match."""
        if (found := re.fullmatch(pattern, self.current.name)) is None:
            raise UnknownPtxError("unknown form of this instruction")
        return found.groups()

    def plain(self, name: str, operands: Iterable[Operand]) -> None:
        """On registers alone, as the core's table has it."""
        known = operations().get(name)
        if known is None or not known.sizes:
            raise UnknownPtxError("unknown instruction")
        result, *sources = operands
        if len(sources) != len(known.sizes) - 1:
            raise UnknownPtxError(f"{len(sources)} operands instead of {len(known.sizes) - 1}")
        places = [self.source(operand, size) for operand, size in zip(sources, known.sizes[1:], strict=True)]
        size, wanted = known.sizes[0], self.size(str(result)) if result != "_" else known.sizes[0]
        if wanted > size > 0:
            own = self.new(size)
            self.emit(name, own, *places)
            kind = "s" if re.search(r"\.s\d+\b", name) else "u"
            self.emit(f"cvt.{kind}{8 * wanted}.{kind}{8 * size}", self.target(result, wanted), own)
        else:
            self.emit(name, self.target(result, size), *places)

    def do_mov(self, operands: _Operands) -> None:
        result, source = operands
        (kind,) = self.shape(r"mov\.(\w+)")
        if isinstance(result, tuple):
            for part, name in zip(result, ("low", "high"), strict=True):
                if part != "_":
                    self.plain(f"{name}.{kind}", (part, source))
        elif isinstance(source, tuple):
            self.plain(f"pack.{kind}", (result, *source))
        else:
            self.plain(f"mov.{kind}", operands)

    def do_bra(self, operands: _Operands) -> None:
        self.emit("bra", -1)

    def do_bar(self, operands: _Operands) -> None:
        self.shape(r"bar(?:rier)?(?:\.cta)?\.sync(?:\.aligned)?")
        if operands not in (("0",), ("0", str(self.kernel.threads))):
            raise UnknownPtxError("barrier of other than all threads")
        self.emit("bar.sync")

    do_barrier = do_bar

    def do_shfl(self, operands: _Operands) -> None:
        (mode,) = self.shape(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
        result, predicate = (*self.parts(operands[0]), "_")[:2]
        value, by, clamp = (self.source(operand, 4) for operand in operands[1:4])
        results = self.target(result, 4), self.target(predicate, 0)
        self.emit("shfl.sync", ("bfly", "idx", "up", "down").index(mode), *results, value, by, clamp)

    def do_ld(self, operands: _Operands) -> None:
        kind, space, count, sign, bits = self.shape(_ACCESS)
        load, count, element, signed = kind == "ld", int(count or 1), int(bits) // 8, sign == "s"
        values, address = operands if load else operands[::-1]
        names = self.parts(values)
        width = max((self.size(str(name)) for name in names if name in self.place), default=max(element, 2))
        if space == "param":
            return self.parameter(str(names[0]), address, element, width, signed)
        if len(names) != count or width < element or (load and signed and width > element):
            raise UnknownPtxError("other registers than its type's")
        where = self.argument(f"{space[0].upper()}{element * count}", address)
        places = (self.targets if load else self.sources)(values, width)
        self.emit(f"{kind}.{space}", element, count, width, *where, *places)
        return None

    do_st = do_ld

    def parameter(self, result: str, address: Operand, element: int, width: int, signed: bool) -> None:
        if not isinstance(address, Address) or address.offset:
            raise UnknownPtxError("part of a parameter")
        index = list(self.kernel.parameters).index(address.base)
        self.places.append(Parameter(self.new(width), index, element, width, signed))
        self.emit(f"mov.b{8 * width}", self.target(result, width), self.places[-1].place)

    def do_cp(self, operands: _Operands) -> None:
        self.shape(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)?")
        size = number(operands[2])
        live = self.source(operands[3], 4) if len(operands) > 3 else -1
        to, source = self.argument(f"S{size}", operands[0]), self.argument(f"G{size}", operands[1])
        self.emit("cp.async", *to, *source, size, live)

    # matrices

    def do_ldmatrix(self, operands: _Operands) -> None:
        form = self.shape(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared.*\.b16")
        load, count, transposed = form[0] == "ld", int(form[1]), int(form[2] is not None)
        values, address = operands if load else operands[::-1]
        places = (self.targets if load else self.sources)(values, 4)
        if len(places) != count:
            raise UnknownPtxError("other registers than its matrices")
        self.emit(f"{form[0]}matrix", count, transposed, *self.argument("S2", address), *places)

    do_stmatrix = do_ldmatrix

    def do_mma(self, operands: _Operands) -> None:
        depth, kind = self.shape(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32")
        result = self.targets(operands[0], 4)
        left, right, start = (self.sources(part, 4) for part in operands[1:4])
        self.emit("mma", KINDS[kind], int(depth), len(left), len(right), *result, *left, *right, *start)

    def do_wgmma(self, operands: _Operands) -> None:
        shape = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3"
        columns, depth, kind = self.shape(shape)
        result, left, right, keep, *signs = operands
        negated_a, negated_b, *transposed = map(number, signs)
        transposed = [0] * (2 - len(transposed)) + transposed  # one: that of B
        in_registers = isinstance(left, tuple)
        rows = self.sources(left, 4) if in_registers else self.argument("D2", left)[1:2]
        accumulate = self.place[str(keep)] if keep in self.place else -1 if number(keep) else -2
        form = KINDS[kind], int(columns), int(depth), int(in_registers), *transposed, int(negated_a != negated_b)
        places = self.argument("D2", right)[1], *rows, *[-1] * (4 - len(rows)), *self.targets(result, 4)
        self.emit("wgmma.mma_async", *form, accumulate, *places)

    # tensor memory

    def do_tcgen05(self, operands: _Operands) -> None:
        kind, halves, count = self.shape(r"tcgen05\.(ld|st)\.sync\.aligned\.(16x32bx2|32x32b)\.x(\d+)\.b32")
        values, address, *split = operands if kind == "ld" else (operands[-1], *operands[:-1])
        places = (self.targets if kind == "ld" else self.sources)(values, 4)
        if len(places) != int(count) or len(split) != (halves == "16x32bx2"):
            raise UnknownPtxError("other registers than its shape's")
        form = 1 + len(split), len(places), sum(map(number, split))
        self.emit(f"tcgen05.{kind}", *form, *self.address(address, "tensor"), *places)


@functools.cache
def _form(name: str) -> list[str] | None:
    found = ((re.fullmatch(pattern, name), form) for pattern, form in _FORMS.items())
    return next((match.expand(form).split() for match, form in found if match is not None), None)


def number(text: Operand) -> int:
    """The bits of a constant: ``-1``, ``0x10``, ``0f3F800000``, ``0d3FF0000000000000``."""
    if not isinstance(text, str):
        raise UnknownPtxError(f"operand {text} instead of a number")
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise UnknownPtxError(f"unknown name {text}") from None
