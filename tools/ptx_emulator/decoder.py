"""Parsed PTX to what the core executes: numbers of operations, and places of registers in a warp's memory.

Every register has a place of 32 lanes. Constants, parameters and special registers have places too, which are filled
before a warp begins, so that an operand always is the number of a place.
"""

import re
from collections.abc import Callable, Iterable

import numpy as np

from .build import operations
from .parser import Address, Instruction, Operand, UnknownPtxError, parse
from .program import SHARED_BASE, SPECIALS, Parameter, Program, fill

ZEROS = ("%tid.y", "%tid.z", "%cluster_ctarank", "%clusterid.x", "%cluster_ctaid.x")
KINDS = {"bf16": 0, "f16": 1, "tf32": 2}
_FRESH = 0x7FC5A5A5  # a NaN, in registers that nothing was written to
_CACHING = {
    "nc",
    "ca",
    "cg",
    "cs",
    "lu",
    "cv",
    "wb",
    "wt",
    "volatile",
    "relaxed",
    "acquire",
    "release",
    "cta",
    "gpu",
    "sys",
}


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
        self.smallest = {"shared": 16, "global": 16}
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
            if size:
                fill(image, place, size, value)
            else:
                image[place] = -value & 0xFFFFFFFF
        sizes = [len(each) for each in self.code]
        return Program(
            self.kernel.name,
            self.kernel.threads,
            list(self.kernel.parameters.values()),
            self.origin,
            np.array([x for each in self.code for x in each], np.int32),
            np.cumsum([0, *sizes[:-1]]).astype(np.int32),
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

    def several(self, operand: Operand) -> tuple[str, ...]:
        if isinstance(operand, Address):
            raise UnknownPtxError(f"operand {operand} instead of registers")
        return operand if isinstance(operand, tuple) else (operand,)

    def address(self, operand: Operand, space: str) -> list[int]:
        if not isinstance(operand, Address):
            raise UnknownPtxError(f"operand {operand} instead of an address")
        return [self.source(operand.base, 8 if space == "global" else 4), operand.offset]

    # instructions

    def emit(self, operation: str, *arguments: int, always: bool = False) -> None:
        """Append an operation; ``always`` leaves the guard of the instruction out."""
        guard = None if always else self.current.guard
        place = -1 if guard is None else self.place[guard]
        self.code.append([operations()[operation].number, place, int(self.current.negated), *arguments])
        self.origin.append(self.current)

    def instruction(self, instruction: Instruction) -> None:
        self.current = instruction
        base, *modifiers = instruction.name.split(".")
        handler: Callable[[list[str], tuple[Operand, ...]], None] | None = getattr(self, f"do_{base}", None)
        if handler is not None:
            handler(modifiers, instruction.operands)
        else:
            self.plain(instruction.name, instruction.operands)

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

    def do_mov(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        result, source = operands
        (kind,) = modifiers
        if isinstance(result, tuple):
            half = int(kind[1:]) // 16
            whole = self.source(source, 2 * half)
            for part, name in zip(result, ("low", "high"), strict=True):
                if part != "_":
                    self.emit(f"{name}.b{16 * half}", self.target(part, half), whole)
        elif isinstance(source, tuple):
            self.plain(f"pack.{kind}", (result, *source))
        else:
            self.plain(f"mov.{kind}", operands)

    def do_bra(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        self.emit("bra", -1)

    def do_ret(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        self.emit("ret")

    do_exit = do_ret

    def do_trap(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        self.emit("trap")

    def do_bar(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        kind = [part for part in modifiers if part != "aligned"]
        if kind == ["warp", "sync"] and number(str(operands[0])) & 0xFFFFFFFF == 0xFFFFFFFF:
            self.emit("bar.warp.sync")
        elif kind in (["sync"], ["cta", "sync"]) and operands in (("0",), ("0", str(self.kernel.threads))):
            self.emit("bar.sync")
        else:
            raise UnknownPtxError("barrier other than that of all threads, or of a warp's")

    do_barrier = do_bar

    def do_fence(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        self.emit("fence.proxy.async" if modifiers[:2] == ["proxy", "async"] else "nop")

    do_membar = do_griddepcontrol = do_fence

    def do_shfl(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        mode = ["bfly", "idx", "up", "down"].index(modifiers[1])
        result, predicate = (*self.several(operands[0]), "_")[:2]
        value, by, clamp = (self.source(operand, 4) for operand in operands[1:4])
        self.emit("shfl.sync", mode, self.target(result, 4), self.target(predicate, 0), value, by, clamp)

    def do_elect(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        leader, predicate = self.several(operands[0])
        self.emit("elect.sync", self.target(leader, 4), self.target(predicate, 0))

    def access(self, space: str, size: int) -> None:
        self.smallest[space] = min(self.smallest[space], size)

    def do_ld(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        space, count, kind = self.memory(modifiers)
        element, signed = int(kind[1:]) // 8, kind[0] == "s"
        result, address = self.several(operands[0]), operands[1]
        if space == "param":
            if not isinstance(address, Address) or address.offset:
                raise UnknownPtxError("part of a parameter")
            width = self.size(result[0])
            index = list(self.kernel.parameters).index(address.base)
            self.places.append(Parameter(self.new(width), index, element, width, signed))
            self.emit(f"mov.b{8 * width}", self.target(result[0], width), self.places[-1].place)
            return
        width = next((self.size(name) for name in result if name != "_"), max(element, 2))
        if len(result) != count or width < element or (signed and width > element):
            raise UnknownPtxError("load into other registers than its type's")
        self.access(space, element * count)
        where = self.address(address, space)
        self.emit(f"ld.{space}", element, count, width, *where, *(self.target(name, width) for name in result))

    def do_st(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        space, count, kind = self.memory(modifiers)
        element, values = int(kind[1:]) // 8, self.several(operands[1])
        width = max((self.size(name) for name in values if name in self.place), default=max(element, 2))
        if len(values) != count or width < element:
            raise UnknownPtxError("store from other registers than its type's")
        self.access(space, element * count)
        where = self.address(operands[0], space)
        self.emit(f"st.{space}", element, count, width, *where, *(self.source(value, width) for value in values))

    def memory(self, modifiers: list[str]) -> tuple[str, int, str]:
        """Space, elements and type of a load or store; what is only for caches is left out."""
        own = [part for part in modifiers if part not in _CACHING and not part.startswith(("L1::", "L2::"))]
        space, *vector, kind = (part.split("::")[0] for part in own)
        if space not in ("global", "shared", "param") or vector not in ([], ["v2"], ["v4"], ["v8"]):
            raise UnknownPtxError("unknown kind of memory access")
        return space, int(vector[0][1:]) if vector else 1, kind

    def do_cp(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        if modifiers == ["async", "commit_group"]:
            self.emit("cp.async.commit_group")
        elif modifiers == ["async", "wait_all"]:
            self.emit("cp.async.wait_all")
        elif modifiers == ["async", "wait_group"]:
            self.emit("cp.async.wait_group", number(str(operands[0])))
        elif modifiers[:2] in (["async", "ca"], ["async", "cg"]) and modifiers[2].startswith("shared"):
            size = number(str(operands[2]))
            live = self.source(operands[3], 4) if len(operands) > 3 else -1
            self.access("shared", size)
            self.access("global", size)
            where = [*self.address(operands[0], "shared"), *self.address(operands[1], "global")]
            self.emit("cp.async", *where, size, live)
        else:
            raise UnknownPtxError("unknown instruction")

    # matrices

    def do_ldmatrix(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        if "m8n8" not in modifiers or modifiers[-1] != "b16":
            raise UnknownPtxError("unknown shape of matrices")
        self.access("shared", 2)
        load = self.current.name.startswith("ldmatrix")
        names, address = (operands[0], operands[1]) if load else (operands[1], operands[0])
        places = [(self.target if load else self.source)(name, 4) for name in self.several(names)]
        if len(places) != int(next(part[1:] for part in modifiers if part in ("x1", "x2", "x4"))):
            raise UnknownPtxError("other registers than its matrices")
        where = self.address(address, "shared")
        self.emit("ldmatrix" if load else "stmatrix", len(places), int("trans" in modifiers), *where, *places)

    do_stmatrix = do_ldmatrix

    def do_mma(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        found = re.fullmatch(
            r"sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32", ".".join(modifiers)
        )
        if found is None:
            raise UnknownPtxError("unknown kind of matrix product")
        result = [self.target(name, 4) for name in self.several(operands[0])]
        left, right, start = ([self.source(name, 4) for name in self.several(part)] for part in operands[1:4])
        self.emit("mma", KINDS[found[2]], int(found[1]), len(left), len(right), *result, *left, *right, *start)

    def do_wgmma(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        if modifiers[0] == "fence":
            self.emit("nop")
        elif modifiers[0] == "commit_group":
            self.emit("wgmma.commit_group")
        elif modifiers[0] == "wait_group":
            self.emit("wgmma.wait_group", number(str(operands[0])))
        else:
            self.wgmma(".".join(modifiers), operands)

    def wgmma(self, modifiers: str, operands: tuple[Operand, ...]) -> None:
        found = re.fullmatch(r"mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.\3", modifiers)
        if found is None:
            raise UnknownPtxError("unknown kind of matrix product")
        self.access("shared", 2)
        columns, depth = int(found[1]), int(found[2])
        result = [self.target(name, 4) for name in self.several(operands[0])]
        in_registers = isinstance(operands[1], tuple)
        left = [self.source(name, 4 if in_registers else 8) for name in self.several(operands[1])]
        left += [-1] * (4 - len(left))
        negated_a, negated_b, *transposed = (number(str(operand)) for operand in operands[4:])
        transposed = [0] * (2 - len(transposed)) + transposed  # one: that of B
        keep = str(operands[3])
        accumulate = self.place[keep] if keep in self.place else -1 if number(keep) else -2
        self.emit(
            "wgmma.mma_async", KINDS[found[3]], columns, depth, int(in_registers), *transposed,
            int(negated_a < 0), int(negated_b < 0), accumulate, self.source(operands[2], 8), *left, *result,
        )  # fmt: skip

    # tensor memory and barriers in memory

    def do_mbarrier(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        kind = ".".join(part for part in modifiers if not part.startswith("shared") and part != "b64")
        if kind == "init":
            self.emit("mbarrier.init", *self.address(operands[0], "shared"), self.source(operands[1], 4))
        elif kind == "inval":
            self.emit("mbarrier.inval", *self.address(operands[0], "shared"))
        elif kind == "try_wait.parity":
            where = self.address(operands[1], "shared")
            self.emit("mbarrier.try_wait.parity", *where, self.target(operands[0], 0), self.source(operands[2], 4))
        else:
            raise UnknownPtxError("unknown instruction")

    def do_tcgen05(self, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        kind = modifiers[0]
        if kind.startswith("fence") or kind == "relinquish_alloc_permit":
            self.emit("nop")
        elif kind in ("wait::ld", "wait::st"):
            self.emit(f"tcgen05.{kind}")
        elif kind in ("ld", "st"):
            self.tensor_access(kind, modifiers, operands)
        elif modifiers[1] != "cta_group::1":
            raise UnknownPtxError("more than one program to a product")
        elif kind == "alloc":
            self.access("shared", 4)
            self.emit("tcgen05.alloc", *self.address(operands[0], "shared"), number(str(operands[1])))
        elif kind == "dealloc":
            self.emit("tcgen05.dealloc", self.source(operands[0], 4), number(str(operands[1])))
        elif kind == "commit" and modifiers[2] == "mbarrier::arrive::one":
            self.emit("tcgen05.commit", *self.address(operands[0], "shared"))
        elif kind == "mma" and modifiers[2:] == ["kind::f16"] and len(operands) == 5:
            self.access("shared", 2)
            result, left, right, how, keep = operands
            inside = isinstance(left, Address)
            where = self.address(left, "tensor") if inside else [self.source(left, 8), 0]
            self.emit(
                "tcgen05.mma", int(inside), *self.address(result, "tensor"), *where, self.source(right, 8),
                self.source(how, 4), self.source(keep, 0),
            )  # fmt: skip
        else:
            raise UnknownPtxError("unknown instruction")

    def tensor_access(self, kind: str, modifiers: list[str], operands: tuple[Operand, ...]) -> None:
        load = kind == "ld"
        halves = {"16x32bx2": 2, "32x32b": 1}.get(modifiers[3])
        if halves is None or modifiers[-1] != "b32" or len(modifiers) != 6:
            raise UnknownPtxError("unknown shape of tensor memory")
        address, values = (operands[1], operands[0]) if load else (operands[0], operands[-1])
        split = number(str(operands[2 if load else 1])) if halves == 2 else 0
        places = [(self.target if load else self.source)(name, 4) for name in self.several(values)]
        if len(places) != int(modifiers[4][1:]):
            raise UnknownPtxError("other registers than its shape's")
        self.emit(f"tcgen05.{kind}", halves, len(places), split, *self.address(address, "tensor"), *places)


def number(text: str) -> int:
    """The bits of a constant: ``-1``, ``0x10``, ``0f3F800000``, ``0d3FF0000000000000``."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        raise UnknownPtxError(f"unknown name {text}") from None
