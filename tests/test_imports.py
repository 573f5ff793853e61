"""What importing costs, and which part may import which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ttt4rec
from ttt4rec.operators import backends

PACKAGE = Path(ttt4rec.__file__).parent
CHAIN = ("operators", "functional", "layer", "model", "recsys")  # each may import those to its left
BACKENDS = ("eager", "kernels", "native", "reference")  # what computes operators; below the chain
CONTRACT = ("arguments", "inner_models")  # what operators and backends share
FILES = sorted(PACKAGE.rglob("*.py"))


def test_importing_the_package_loads_no_optional_dependency():
    heavy = ("triton", "numpy", "safetensors", "tqdm", "matplotlib", "ttt4rec.recsys", "ttt4rec.kernels")
    code = "import sys, torch; before = set(sys.modules); import ttt4rec; print('\\n'.join(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "ttt4rec.layer" in loaded
    wrong = [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in heavy)]
    assert not wrong


@pytest.mark.parametrize("folder", BACKENDS)
def test_backends_need_only_torch_the_contract_and_themselves(folder):
    files = [f for f in FILES if within(f, folder)]
    assert files
    allowed = {*sys.stdlib_module_names, "torch", *(["triton"] if folder == "kernels" else [])}
    for file in files:
        for name in imports(file):
            own = name.startswith("ttt4rec.") and name.split(".")[1] in (folder, *CONTRACT)
            assert own or name.split(".")[0] in allowed, f"{file.name} imports {name}"


@pytest.mark.parametrize("part", CONTRACT)
def test_the_contract_needs_only_torch(part):
    assert not reachable(part)
    assert roots(PACKAGE / f"{part}.py") <= {*sys.stdlib_module_names, "torch"}


def test_operators_reach_backends_through_the_registry_alone():
    assert not reachable("operators") & set(BACKENDS)
    assert {package.removeprefix("ttt4rec.") for package in backends.PACKAGES.values()} < set(BACKENDS)


def test_only_kernels_import_triton():
    wrong = [f.name for f in FILES if not within(f, "kernels") and "triton" in roots(f)]
    assert not wrong


def test_the_layer_half_needs_only_torch_and_einops_at_import():
    allowed = {*sys.stdlib_module_names, "torch", "einops", "ttt4rec"}
    for file in FILES:
        if not within(file, "kernels") and not within(file, "recsys") and file.stem not in ("cli", "__main__"):
            wrong = {name.split(".")[0] for name in imports(file, top_level_only=True)} - allowed
            assert not wrong, f"{file.name} imports {wrong}"


@pytest.mark.parametrize("toolkit", ["recbole", "rectools"])
def test_nothing_imports_an_adapter(toolkit):
    adapter = PACKAGE / "recsys" / f"{toolkit}.py"
    assert toolkit in roots(adapter)
    wrong = [f.name for f in FILES if f != adapter and any(toolkit in name for name in imports(f))]
    assert not wrong


@pytest.mark.parametrize("part", [*BACKENDS, *CHAIN])
def test_import_arrows(part):
    reached = reachable(part)
    above = CHAIN[CHAIN.index(part) + 1 :] if part in CHAIN else CHAIN
    assert not reached & set(above), f"{part} imports {reached & set(above)}, which stand above it"
    if part in ("model", "layer", "functional"):
        assert "operators" in reached  # the walk along the arrows does follow them


def within(file, folder):
    return folder in file.relative_to(PACKAGE).parts[:-1]


def roots(file):
    return {name.split(".")[0] for name in imports(file)}


def imports(file, top_level_only=False):
    """Absolute dotted names of all modules that a file imports; for ``from m import a`` both m and m.a."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = ["ttt4rec", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module != "ttt4rec":
                names.append(module)
            names += [f"{module}.{alias.name}" for alias in node.names if module.startswith("ttt4rec")]
    return names


def reachable(part):
    """The package's parts that a part imports, directly or through others."""
    found, waiting = set(), [part]
    while waiting:
        current = waiting.pop()
        files = [f for f in FILES if within(f, current) or f == PACKAGE / f"{current}.py"]
        for name in (name for f in files for name in imports(f)):
            pieces = name.split(".")
            if pieces[0] == "ttt4rec" and len(pieces) > 1 and pieces[1] not in found | {current}:
                found.add(pieces[1])
                waiting.append(pieces[1])
    return found
