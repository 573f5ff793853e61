"""What importing costs, which part may import which, and old import paths."""

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ttt4rec
from ttt4rec.operators import backends

PACKAGE = Path(ttt4rec.__file__).parent
CHAIN = (  # each may import those to its left
    "operators", "layers", "models", "options", "settings", "recsys.data", "recsys.recommend", "recsys.training",
    "recsys.online", "recsys.serving", "recsys.commands", "cli", "__main__",
)  # fmt: skip
BACKENDS = ("eager", "kernels", "native", "reference")  # what computes operators; below the chain
CONTRACT = ("arguments", "inner_models", "item_blocks", "precision")  # what operators and backends share
HELPERS = ("atomic_files", "checks", "extras", "fields", "heap", "malloc", "palette")  # of no part, for all
LEAF = "hf"  # which may import models and what they do; nothing imports it
TOPS = ("__init__", "recsys", "recsys.recbole", "recsys.rectools")  # what users import; nothing here does
FILES = sorted(PACKAGE.rglob("*.py"))
OLD_PATHS = {
    "recsys.data": ("build_histories", "filter_k_core", "keep_item_codes", "read_interactions"),
    "recsys.datasets": ("load_interactions",),
    "recsys.evaluate": ("evaluate",),
    "recsys.events": ("SQLiteEventLog", "EventLog", "Event", "events_of"),
    "recsys.online": ("OnlineRecommender",),
    "recsys.parallel": ("processes",),
    "recsys.recommend": ("Recommender",),
    "recsys.split": ("split_by_ratio", "split_by_time", "split_leave_one_out"),
    "recsys.train": ("TrainOptions", "fit"),
    "recsys.windows": ("evaluation_prefixes",),
    "heap": ("keep_freed_memory",),
}


def test_importing_the_package_loads_no_optional_dependency():
    heavy = ("triton", "numpy", "safetensors", "tqdm", "matplotlib", "ttt4rec.recsys", "ttt4rec.kernels")
    code = "import sys, torch; before = set(sys.modules); import ttt4rec; print('\\n'.join(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "ttt4rec.layers.ttt" in loaded
    wrong = [name for name in loaded if any(name == h or name.startswith(f"{h}.") for h in heavy)]
    assert not wrong


@pytest.mark.parametrize("module", OLD_PATHS)
def test_old_paths_give_the_same_objects(module):
    old = importlib.import_module(f"ttt4rec.{module}")
    for name in OLD_PATHS[module]:
        own = getattr(old, name)
        assert own is getattr(importlib.import_module(own.__module__), name)
    package, _, last = f"ttt4rec.{module}".rpartition(".")
    if module != "recsys.evaluate":  # whose name is, in the package, that of the function
        assert getattr(sys.modules[package], last) is old


def test_every_module_belongs_somewhere():
    parts = {part_of(module_of(file)) for file in FILES}
    assert parts == {*CHAIN, *BACKENDS, *CONTRACT, *HELPERS, *TOPS, LEAF}


@pytest.mark.parametrize("folder", BACKENDS)
def test_backends_need_only_torch_the_contract_and_themselves(folder):
    files = files_of(folder)
    assert files
    allowed = {*sys.stdlib_module_names, "torch", *(["triton"] if folder == "kernels" else [])}
    walk = {"eager"} if folder == "kernels" else set()  # that of long mini-batches, with pieces of their own
    for file in files:
        assert parts_imported(file) <= {folder, *CONTRACT, *walk}, file
        assert foreign(file) <= allowed, file


@pytest.mark.parametrize("part", CONTRACT)
def test_the_contract_needs_only_torch(part):
    assert reachable(part) <= set(CONTRACT)
    assert foreign(PACKAGE / f"{part}.py") <= {*sys.stdlib_module_names, "torch"}


@pytest.mark.parametrize("part", HELPERS)
def test_helpers_need_only_each_other(part):
    assert reachable(part) <= set(HELPERS)


@pytest.mark.parametrize("part", [*CHAIN, LEAF])
def test_nothing_above_the_operators_names_a_backend(part):
    """But the reference, which has no operators."""
    named = {name for file in files_of(part) for name in parts_imported(file)}
    assert not named & {*BACKENDS} - {"reference"}


def test_operators_reach_backends_through_the_registry_alone():
    assert not reachable("operators") & set(BACKENDS)
    assert {package.removeprefix("ttt4rec.") for package in backends.PACKAGES.values()} < set(BACKENDS)


def test_only_kernels_import_triton():
    wrong = [file for file in FILES if part_of(module_of(file)) != "kernels" and "triton" in foreign(file)]
    assert not wrong


def test_what_is_not_of_the_recommender_needs_only_torch_and_einops_at_import():
    allowed = {*sys.stdlib_module_names, "torch", "einops"}
    for file in FILES:
        part = part_of(module_of(file))
        if part not in ("kernels", "cli", LEAF) and not part.startswith("recsys"):
            assert foreign(file, top_level_only=True) <= allowed, file


def test_what_serves_is_imported_only_when_asked_for():
    web = {"httptools", "prometheus_client", "pydantic", "uvicorn", "starlette", "fastapi"}
    for file in FILES:
        part = part_of(module_of(file))
        assert part == "recsys.serving" or not web & foreign(file), file
        assert part == "recsys.serving" or "recsys.serving" not in parts_imported_at_once(file), file


def test_the_leaf_needs_models_and_nothing_needs_it():
    assert not [file for file in FILES if part_of(module_of(file)) != LEAF and LEAF in parts_imported(file)]
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "huggingface_hub"}
    for file in files_of(LEAF):
        assert parts_imported(file) <= {LEAF, *CHAIN[:3], *CONTRACT, *HELPERS}, file
        assert foreign(file) <= allowed, file
        assert file.name != "__init__.py" or foreign(file) <= set(sys.stdlib_module_names)  # names are looked up later


@pytest.mark.parametrize("toolkit", ["recbole", "rectools"])
def test_nothing_imports_an_adapter(toolkit):
    adapter = PACKAGE / "recsys" / f"{toolkit}.py"
    assert toolkit in foreign(adapter)
    others = [file for file in FILES if file != adapter]
    assert not [file for file in others if toolkit in foreign(file) or f"recsys.{toolkit}" in parts_imported(file)]


@pytest.mark.parametrize("part", [*BACKENDS, *CHAIN])
def test_import_arrows(part):
    reached = reachable(part)
    above = {*CHAIN[CHAIN.index(part) + 1 :], *TOPS} if part in CHAIN else {*CHAIN, *TOPS}
    assert not reached & above, f"{part} imports {reached & above}, which stand above it"
    if part in CHAIN[1:]:
        assert "operators" in reached or part == "recsys.data"  # the walk along the arrows does follow them


def test_no_module_imports_itself_in_a_circle():
    graph = {module_of(file): imported(file) - {module_of(file)} for file in FILES}
    assert set().union(*graph.values()) <= MODULES.keys()
    assert list(TopologicalSorter(graph).static_order())  # CycleError names the circle


def module_of(file):
    """Its dotted name within the package; "" for the package itself."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def part_of(module):
    """The part that a module belongs to: what stands in the package, or in ``recsys``."""
    pieces = module.split(".")
    return ".".join(pieces[: 2 if pieces[0] == "recsys" else 1]) or "__init__"


def files_of(part):
    return [file for file in FILES if part_of(module_of(file)) == part]


def statements(file, top_level_only=False):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = tree.body if top_level_only else ast.walk(tree)
    return [node for node in found if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute(file, node):
    """The module that a ``from`` names."""
    package = ["ttt4rec", *file.relative_to(PACKAGE).parts[:-1]]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(file, top_level_only=False):
    """The package's own modules that a file imports."""
    names = []
    for node in statements(file, top_level_only):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
            continue
        module = absolute(file, node)
        inner = [f"{module}.{alias.name}" for alias in node.names]
        names += [name if name.removeprefix("ttt4rec.") in MODULES else module for name in inner]
    return {name[len("ttt4rec.") :] for name in names if f"{name}.".startswith("ttt4rec.")}


def foreign(file, top_level_only=False):
    """The packages but ours that a file imports."""
    names = []
    for node in statements(file, top_level_only):
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else [absolute(file, node)]
    return {name.split(".")[0] for name in names} - {"ttt4rec"}


def parts_imported(file):
    return {part_of(module) for module in imported(file)}


def parts_imported_at_once(file):
    """When the file is imported itself."""
    return {part_of(module) for module in imported(file, top_level_only=True)}


def reachable(part):
    """The package's parts that a part imports, directly or through others."""
    found, waiting = set(), [part]
    while waiting:
        for name in {name for file in files_of(waiting.pop()) for name in parts_imported(file)}:
            if name not in found | {part}:
                found.add(name)
                waiting.append(name)
    return found
