"""PTX text of one kernel to instructions, each with the line of source it was compiled from."""

import re
from dataclasses import dataclass, field

REGISTER_BYTES = {"pred": 0, "8": 2, "16": 2, "32": 4, "64": 8, "x2": 4}  # by how a type ends; a byte takes two


class UnknownPtxError(ValueError):
    """Something in a program that the emulator does not know."""


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address
Place = tuple[str, int]  # file and line


@dataclass(frozen=True)
class Instruction:
    """One statement; names of registers are those of the kernel's table."""

    name: str
    operands: tuple[Operand, ...]
    guard: str | None  # predicate
    negated: bool
    text: str
    source: tuple[Place, ...]  # innermost first: where it stands, then what it was inlined into


@dataclass
class Kernel:
    """A parsed ``.entry``."""

    name: str
    threads: int
    parameters: dict[str, int] = field(default_factory=dict)  # bytes by name
    registers: dict[str, int] = field(default_factory=dict)  # bytes by name, 0 for predicates
    instructions: list[Instruction] = field(default_factory=list)
    targets: dict[int, int] = field(default_factory=dict)  # of jumps: numbers of instructions


def parse(text: str) -> Kernel:
    """Read the only kernel of a module.

    Raises:
        UnknownPtxError: a directive or a form of it that the emulator does not know.
    """
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", re.sub(r"//[^\n]*", "", text))
    start = re.search(r"\.entry\s", text)
    if head is None or start is None:
        raise UnknownPtxError("a module without a kernel: there is no .entry with parameters")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise UnknownPtxError(f"kernel {head[1]} without .reqntid or .maxntid: how many threads it has is not known")
    kernel = Kernel(head[1], int(threads[1]))
    for parameter in filter(None, (part.split() for part in head[2].split(","))):
        size = REGISTER_BYTES.get(re.sub(r"^\.[a-z]+", "", parameter[1]))
        if size is None:
            raise UnknownPtxError(f"parameter {' '.join(parameter)}")
        kernel.parameters[parameter[-1]] = size
    files = {int(number): path for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', text)}
    _Body(kernel, files).read(text[text.index("{", start.start()) :])
    return kernel


class _Body:
    """Reads statements; names are scoped by braces, and a name that is declared again gets a number."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel, self.files = kernel, files
        self.scopes: list[dict[str, str]] = []
        self.names: dict[str, str] = {}  # of all open scopes
        self.labels: dict[str, int] = {}  # number of the instruction that follows
        self.jumps: list[tuple[int, str, list[dict[str, str]]]] = []  # labels may stand behind what jumps to them
        self.callers: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.source: tuple[Place, ...] = ()

    def read(self, text: str) -> None:
        rest, assembly = "", False
        for line in text.splitlines():
            code, _, comment = (part.strip() for part in line.partition("//"))
            if comment.endswith("inline asm"):  # within it LLVM counts the lines of the assembly on from the source's
                assembly = comment.startswith("begin")
            if code.startswith(".loc"):
                if not assembly:
                    self.locate(code)
                continue
            if code:
                rest = self.statements(f"{rest} {code}".strip())
            if not self.scopes and not rest:
                break
        for number, name, scopes in self.jumps:
            known = [scope[name] for scope in reversed(scopes) if name in scope]
            if not known or self.labels[known[0]] == len(self.kernel.instructions):
                raise UnknownPtxError(f"jump to {name}, where there is no instruction")
            self.kernel.targets[number] = self.labels[known[0]]

    def locate(self, code: str) -> None:
        """``.loc file line column[, function_name name, inlined_at file line column]``."""
        numbers = re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)\s+(\d+)", code)
        if len(numbers) > 1:
            self.callers[numbers[0]] = numbers[1]
        chain: list[Place] = []
        at = numbers[0] if numbers else None
        while at is not None and len(chain) < 8:
            chain.append((self.files.get(int(at[0]), at[0]), int(at[1])))
            at = self.callers.get(at)
        self.source = tuple(chain)

    def statements(self, text: str) -> str:
        """Read as many as there are; what is left is the beginning of one."""
        while text:
            if text[0] == "{":
                self.scopes.append({})
                text = text[1:].lstrip()
            elif text[0] == "}":
                self.scopes.pop()
                self.names = {name: own for scope in self.scopes for name, own in scope.items()}
                text = text[1:].lstrip()
                if not self.scopes:
                    return ""
            elif label := re.match(r"([$\w]+):", text):
                self.labels[self.declare(label[1])] = len(self.kernel.instructions)
                text = text[label.end() :].lstrip()
            elif ";" in text:
                statement, text = text.split(";", 1)
                self.statement(" ".join(statement.split()))
                text = text.lstrip()
            else:
                return text
        return ""

    def declare(self, name: str) -> str:
        known = self.kernel.registers.keys() | self.labels.keys() if len(self.scopes) > 1 else ()
        own = f"{name}@{len(self.kernel.instructions)}" if name in known else name
        self.scopes[-1][name] = self.names[name] = own
        return own

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            size = REGISTER_BYTES.get(kind[1:] if kind == ".pred" else re.sub(r"^\.[a-z]+", "", kind))
            if size is None:
                raise UnknownPtxError(f"registers of type {kind}")
            for name in (part.strip() for part in names.split(",")):
                several = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                each = [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
                for one in each:
                    self.kernel.registers[self.declare(one)] = size
        elif not text.startswith(".pragma"):
            if text.startswith("."):
                raise UnknownPtxError(f"directive {text}")
            self.instruction(text)

    def instruction(self, text: str) -> None:
        found = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
        if found is None:
            raise UnknownPtxError(f"statement {text}")
        negated, guard, name, operands = found.groups()
        if name.startswith("bra"):
            self.jumps.append((len(self.kernel.instructions), operands, list(self.scopes)))
        self.kernel.instructions.append(
            Instruction(
                name,
                tuple(self.operand(part) for part in _split(operands)),
                None if guard is None else self.names.get(guard, guard),
                negated == "!",
                text,
                self.source,
            )
        )

    def operand(self, text: str) -> Operand:
        if text[0] == "{":
            return tuple(self.names.get(part, part) for part in _split(text[1:-1]))
        if text[0] == "[":
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            return Address(self.names.get(base, base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self.names.get(part, part) for part in text.split("|"))
        return self.names.get(text, text)


def _split(text: str) -> list[str]:
    """At the commas outside braces and brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]
