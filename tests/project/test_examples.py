"""Every example runs, at a tiny size, and does what it says."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from starlette.testclient import TestClient

from tests.support.recsys_data import make_model, make_split, write_events
from tools.documents import ROOT
from tools.site.notebooks import sources
from ttt4rec import TTT4Rec
from ttt4rec.recsys import Recommender

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mixer", ["ttt", "attention"])
def test_language_model_learns_a_pattern(mixer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 50)
    sizes = ["--steps", "40", "--batch", "4", "--length", "16", "--width", "16", "--sample", "5"]
    load("language_model").main(["--mixer", mixer, "--text", str(text), *sizes])
    *steps, sample = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[3]) for line in steps]
    assert len(losses) == 10
    assert losses[-1] < 0.5 * losses[0]
    assert len(sample) == 5
    assert set(sample) <= set("abcd")


def test_language_model_names_a_text_that_is_too_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcd")
    with pytest.raises(SystemExit):
        load("language_model").main(["--text", str(text)])
    assert "it has 4 characters" in capsys.readouterr().err


def test_streamed_scores_equal_the_batch_call(capsys: pytest.CaptureFixture[str]) -> None:
    difference = load("stream_events").main(["--events", "11"])
    assert difference < 1e-5  # scores are of size 1; float32 carries seven digits
    assert "bytes of state a user" in capsys.readouterr().out


def test_a_shift_of_interests_surprises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved, surprise = load("interest_shift").main(["--users", "100", "--out", str(tmp_path / "shift.png")])
    assert len(moved) == len(surprise) == 64
    assert moved[:3] == [0, 0, 0]  # the first mini-batch is not complete
    assert min(moved[3:]) > 0
    assert min(surprise[32:36]) > max(surprise[24:32])
    assert max(surprise[56:]) < min(surprise[32:36])  # the second interest has become the usual one
    assert (tmp_path / "shift.png").read_bytes().startswith(b"\x89PNG")
    assert "after the shift: surprise" in capsys.readouterr().out


def test_train_and_recommend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "events.csv"
    rows = [f"u{user},i{(user + step) % 7},{step}" for user in range(12) for step in range(10)]
    source.write_text("\n".join(["user_id,item_id,timestamp", *rows, ""]))
    run = tmp_path / "run"
    sizes = ["--epochs", "1", "--width", "16", "--max-len", "5"]
    load("train_and_recommend").main([str(source), "--out", str(run), *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "12 users, 7 items, 120 interactions"
    assert lines[1].startswith("epoch 0  loss ")
    assert "HR@10" in lines[2]
    assert (run / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_search_prunes_and_finds_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_events(tmp_path / "ring.inter", users=20)
    sizes = ["--trials", "5", "--epochs", "3", "--width", "16"]
    study = load("search_with_optuna").main([str(source), "--out", str(tmp_path / "run"), *sizes])
    states = [trial.state.name for trial in study.trials]
    assert "PRUNED" in states
    assert "COMPLETE" in states
    for trial in study.trials:
        rows = (tmp_path / "run" / f"trial-{trial.number}" / "metrics.csv").read_text().splitlines()
        assert len(rows) - 1 == len(trial.intermediate_values)
        assert (len(rows) - 1 < 3) <= (trial.state.name == "PRUNED")
    assert f"{states.count('PRUNED')} of them pruned" in capsys.readouterr().out


def test_a_mounted_service_asks_for_a_token(tmp_path: Path) -> None:
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path)
    app = load("serve_http").make_app(tmp_path, "secret")
    with TestClient(app, base_url="http://localhost") as client:
        asking = {"json": {"user_ids": ["u7"], "k": 3}}
        assert client.get("/").status_code == 200
        assert client.post("/recommender/recommendations", **asking).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        answer = client.post("/recommender/recommendations", **asking)
        assert [len(items) for items in answer.json()["recommendations"]] == [3]
        assert client.delete("/recommender/users/u7").status_code == 204
        assert client.post("/recommender/recommendations", **asking).json() == {"recommendations": [[]]}
        assert client.get("/recommender/nowhere").status_code == 404
    assert (tmp_path / "states.safetensors").is_file()


def test_lightning_trains_and_loads_its_checkpoint(tmp_path: Path) -> None:
    sizes = ["--users", "64", "--length", "17", "--out", str(tmp_path)]
    first = load("train_with_lightning").main(["--epochs", "1", *sizes])
    last = load("train_with_lightning").main(["--epochs", "12", *sizes])
    assert last < first - 0.5
    assert list(tmp_path.glob("*.ckpt"))


def test_accelerate_trains(tmp_path: Path) -> None:
    sizes = ["--users", "128", "--length", "17", "--epochs", "6", "--out", str(tmp_path)]
    losses = load("train_with_accelerate").main(sizes)
    assert losses[-1] < losses[0] - 0.5
    assert TTT4Rec.load(tmp_path).config.num_items == 20


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((EXAMPLES / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run_and_were_saved_with_what_they_show(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text()
    names: dict[str, object] = {"__name__": path.stem}
    for i, source in enumerate(sources(text)):
        exec(compile(source, f"{path.name}, cell {i}", "exec"), names)
    assert capsys.readouterr().out.count("\n") >= 2
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "saved after another order"
    assert cells[-1]["outputs"]
