"""Without the packages that extras bring: layers and models run, and whatever needs a package names the extra."""

import json
import subprocess
import sys

import pytest

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.cli import main
from ttt4rec.extras import MissingPackageError, missing, require

PROGRAM = """
import json, sys
from importlib.machinery import PathFinder

hidden, find = sys.argv[1].split(","), PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in hidden else find(name, path, target)

PathFinder.find_spec = find_spec
import importlib
import torch
from ttt4rec import TTT4Rec, TTT4RecConfig, TTTLayer, TTTState
from ttt4rec.cli import main

layer, x = TTTLayer(16, num_heads=2), torch.randn(2, 5, 16)
y, state = layer(x, return_state=True)
y.sum().backward()
pool = layer.make_pool(3)
layer.step(x[:, 0], pool, torch.tensor([0, 2]))
model, ids = TTT4Rec(TTT4RecConfig(num_items=9)), torch.tensor([[1, 2, 3]])
h = model(ids)
model.nll(h[0], ids[0], "sum").backward()
model.top_k(h[0], 3)

def attempt(function):
    try:
        return function()
    except ImportError as error:
        return str(error)

folder = sys.argv[2]
found = {
    "save a state": attempt(lambda: state.save(f"{folder}/state")),
    "load a state": attempt(lambda: TTTState.load(f"{folder}/old")),
    "save a model": attempt(lambda: model.save(f"{folder}/model")),
    "load a model": attempt(lambda: TTT4Rec.load(f"{folder}/oldmodel")),
}
for name in ("recsys", "recsys.train", "recsys.recbole", "recsys.rectools", "recsys.commands"):
    found[name] = attempt(lambda: importlib.import_module(f"ttt4rec.{name}"))
for command in ("train x --out y", "evaluate x", "recommend x --user 1", "report x --out y", "serve x"):
    assert main(command.split()) == 2
print(json.dumps(found))
"""


def in_core_install(tmp_path, *hidden):
    """What fails and how, without some packages: by attempts in a process of its own, and what commands print."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, ",".join(hidden), str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr.splitlines()


@pytest.mark.parametrize(
    "hidden",
    [("numpy", "safetensors", "tqdm", "pyarrow", "matplotlib"), pytest.param(("safetensors",), marks=pytest.mark.slow)],
)
def test_a_core_install_names_the_extra(tmp_path, hidden):
    TTT4Rec(TTT4RecConfig(num_items=9)).save(tmp_path / "oldmodel")
    found, commands = in_core_install(tmp_path, *hidden)
    wanted = f'needs the package {hidden[0]}, which is not installed: pip install "ttt4rec[recsys]"'
    for name, message in found.items():
        assert message.endswith(wanted), name
    assert commands == [f"ttt4rec: error: ttt4rec.recsys {wanted}"] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["oldmodel"]


@pytest.mark.parametrize(
    ("package", "extra"),
    [
        ("matplotlib.figure", "plot"),
        ("recbole", "recbole"),
        ("rectools.models", "rectools"),
        ("tqdm", "recsys"),
        ("transformers.cache_utils", "hf"),
        ("huggingface_hub", "hf"),
        *((package, "serve") for package in ("httptools", "prometheus_client", "pydantic", "uvicorn.config")),
    ],
)
def test_every_extra_is_named(package, extra):
    error = missing("it", ModuleNotFoundError(f"No module named {package!r}", name=package))
    assert isinstance(error, MissingPackageError)
    assert (
        str(error)
        == f'it needs the package {package.split(".")[0]}, which is not installed: pip install "ttt4rec[{extra}]"'
    )


@pytest.mark.parametrize(("name", "package"), [("TTTForCausalLM", "transformers"), ("push_to_hub", "huggingface_hub")])
def test_a_name_of_the_hub_without_its_package_names_the_extra(monkeypatch, name, package):
    from ttt4rec import hf

    for module in [x for x in sys.modules if x.startswith("ttt4rec.hf.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        MissingPackageError, match=rf'ttt4rec\.hf\.{name} needs the package {package}, .*"ttt4rec\[hf\]"'
    ):
        getattr(hf, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = hf.nothing


@pytest.mark.parametrize("package", ["httptools", "prometheus_client", "pydantic", "uvicorn"])
def test_serving_without_a_package_names_the_extra(monkeypatch, capsys, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["serve", str(tmp_path)]) == 2
    wanted = f'ttt4rec serve needs the package {package}, which is not installed: pip install "ttt4rec[serve]"'
    assert capsys.readouterr().err == f"ttt4rec: error: {wanted}\n"
    assert not list(tmp_path.iterdir())


def test_other_packages_are_not_taken_for_those_of_an_extra(monkeypatch):
    error = ModuleNotFoundError("No module named 'ttt4rec.nothing'", name="ttt4rec.nothing")
    assert missing("it", error) is error
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        require("it", "no_such_package")

    def broken(*_):
        raise error

    monkeypatch.setattr("ttt4rec.cli.make_parser", broken)
    with pytest.raises(ModuleNotFoundError):  # a mistake of ours is no mistake of the user's
        main([])
