"""A bit that flipped in a file we wrote is noticed when the file is read, whatever the file."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from studies.runner import keep, read_results
from tests.support.checks import assert_states_identical, make_layer
from tests.support.recsys_data import SMALL, make_model, make_split
from ttt4rec import TTT4Rec, TTTState, atomic_files
from ttt4rec.cli import main
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.checkpoint import load_checkpoint, save_checkpoint


def flips(path, step=1):
    """A file with one bit flipped, again and again; whole again in the end."""
    whole = path.read_bytes()
    try:
        for place in range(0, len(whole), step):
            for bit in range(8) if step == 1 else [place // step % 8]:
                path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
                yield f"bit {bit} of byte {place} of {len(whole)}: {whole[max(0, place - 20) : place + 20]}"
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    split = make_split(folder)
    Recommender(make_model(split), split.histories).save(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "ids.json", "histories.safetensors"])
def test_a_model_folder(name, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    size = (folder / name).stat().st_size
    for place in flips(folder / name, step=size // 60):
        with pytest.raises(ValueError, match=r"damaged|do not belong together|does not hold|header"):
            Recommender.load(folder), pytest.fail(place)
    assert Recommender.load(folder).histories.num_users == 60


def test_the_header_of_the_weights(saved, tmp_path):
    """It holds names, types, shapes, the others' digests and the checksum itself."""
    path = Path(shutil.copy(saved / "model.safetensors", tmp_path))
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for some, count in ((flips(path), 8 * 40), (flips(path, step=11), end // 11)):
        for place in itertools.islice(some, count):
            with pytest.raises(ValueError, match="damaged"):
                atomic_files.read_sealed(path), pytest.fail(place)
        some.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state(dtype, tmp_path):
    layer = make_layer("linear", "mamba").to(dtype)
    state = layer(torch.randn(2, 5, 8, dtype=dtype), return_state=True)[1].detach()
    path = tmp_path / "state"
    state.save(path)
    for place in flips(path, step=7):
        with pytest.raises(ValueError, match="damaged"):
            TTTState.load(path), pytest.fail(place)
    assert_states_identical(TTTState.load(path), state)


def test_a_checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    save_checkpoint(path, {"x": torch.arange(9.0)}, {"epoch": 3})
    for place in flips(path, step=3):
        with pytest.raises(ValueError, match=r"damaged|is not a training checkpoint"):
            load_checkpoint(path), pytest.fail(place)
    assert load_checkpoint(path)[1] == {"epoch": 3}


@pytest.fixture(scope="module")
def run(saved):
    folder = saved.parent / "run"
    assert main(["train", str(saved.parent / "ring.inter"), "--out", str(folder), "--epochs", "1", *SMALL]) == 0
    return folder


@pytest.mark.parametrize("name", ["run.json", "metrics.csv"])
def test_what_a_report_reads(name, run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    for place in flips(folder / name, step=(folder / name).stat().st_size // 60):
        assert main(["report", str(folder), "--out", str(tmp_path / "report")]) == 2, place
        error = capsys.readouterr().err
        assert error.startswith("ttt4rec: error: ")
        assert "damaged" in error
        assert error.count("\n") == 1
        if name == "run.json":
            assert main(["evaluate", str(folder)]) == 2
            assert "run.json is damaged" in capsys.readouterr().err
    assert main(["report", str(folder), "--out", str(tmp_path / "report")]) == 0


def test_results_of_studies(tmp_path):
    path = tmp_path / "results.jsonl"
    results = [{"dataset": "a", "seed": seed, "test": {"HR@10": 0.1 + seed}} for seed in range(2)]
    for result in results:
        keep(path, result)
    noticed = 0
    for place in flips(path, step=3):
        try:
            found = read_results(path)
        except ValueError as error:
            noticed += f"{path} line " in str(error)
        else:  # the checksum's name was lost, or a line without its end is none: no result is another
            assert [kept | one for kept, one in zip(found, results, strict=False)] == found, place
    assert noticed > 0.9 * path.stat().st_size / 3
    path.write_text(json.dumps(results[0]) + "\n")  # of an older version
    assert read_results(path) == results[:1]


def without_seal(path):
    """A safetensors file as an older version wrote it."""
    with safe_open(path, "pt") as file:
        marks = file.metadata()
    digests = json.loads(marks["seal"])["digests"]
    save_file(load_file(path), path, {"saved_with": json.dumps(digests)} if digests else None)


def test_older_files_are_read_with_a_warning(saved, run, tmp_path, caplog):
    folder = shutil.copytree(saved, tmp_path / "model")
    without_seal(folder / "model.safetensors")
    with caplog.at_level(logging.WARNING, "ttt4rec"):
        loaded = Recommender.load(folder)
    (record,) = caplog.records
    assert record.message == (
        f"{folder / 'model.safetensors'} has no checksum: damage to it cannot be noticed until it is saved again"
    )
    for name, x in Recommender.load(saved).model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], x)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="do not belong together"):  # the digests of an older version count too
        TTT4Rec.load(folder)

    state = make_layer("mlp", "transformer")(torch.randn(2, 5, 8, dtype=torch.float64), return_state=True)[1].detach()
    state.save(tmp_path / "state")
    without_seal(tmp_path / "state")
    caplog.clear()
    assert_states_identical(TTTState.load(tmp_path / "state"), state)
    assert [record.levelname for record in caplog.records] == ["WARNING"]

    old = shutil.copytree(run, tmp_path / "run")
    about = json.loads((old / "run.json").read_text())
    del about["digests"], about["checksum"]
    (old / "run.json").write_text(json.dumps(about))
    caplog.clear()
    assert main(["evaluate", str(old)]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_state_is_replaced_in_one_step(tmp_path, monkeypatch):
    state = make_layer("linear", "transformer")(torch.randn(1, 3, 8).double(), return_state=True)[1].detach()
    state.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()

    def fails(*_):
        raise OSError("no space left")

    monkeypatch.setattr(atomic_files, "_flush", fails)
    with pytest.raises(OSError, match="no space left"):
        state.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
