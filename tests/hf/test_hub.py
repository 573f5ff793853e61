"""Recommenders on the Hub, without one: files, cards, and what would be uploaded and downloaded."""

from types import SimpleNamespace

import pytest
import torch

from tests.project.test_readme import python_blocks
from tests.support.checks import assert_close
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.hf import from_pretrained, hub, model_card, push_to_hub, save_pretrained
from ttt4rec.models.item_features import FeatureColumn, ItemFeatures


def small_features(num_items):
    column = FeatureColumn("price", "dense", (1.0,), (2.0,))
    none = torch.zeros(0, dtype=torch.int64)
    offsets, known = torch.zeros(num_items + 2, dtype=torch.int64), torch.ones(num_items + 1, dtype=torch.bool)
    return ItemFeatures((column,), torch.rand(num_items + 1, 1), none, torch.zeros(0), offsets, known)


@pytest.fixture(scope="module", params=["ids", "features"])
def model(request):
    features = small_features(20) if request.param == "features" else None
    return TTT4Rec(TTT4RecConfig(20, 16, inner="linear"), features=features)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Api:
    """What is asked of the Hub."""

    def __init__(self, calls, **options):
        self.calls = calls
        calls.append(("api", options))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, folder_path, **options):
        files = {path.name: path.read_bytes() for path in folder_path.iterdir()}
        self.calls.append(("upload_folder", files, options))
        return SimpleNamespace(commit_url="https://hub/commit")


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "HfApi", lambda **options: Api(calls, **options))
    return calls


def test_a_folder_is_that_of_save_with_a_card(model, tmp_path):
    save_pretrained(model, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    for loaded in (from_pretrained(tmp_path / "model"), TTT4Rec.load(tmp_path / "model")):
        assert same(loaded, model)
        assert not loaded.training


def test_what_is_uploaded_can_be_loaded(model, calls, tmp_path, monkeypatch):
    address = push_to_hub(model, "shop", token="secret", private=True, branch="next", card="a card of one's own")
    assert address == "https://hub/commit"
    api, create, branch, upload = calls
    assert api[1]["token"] == "secret"
    assert create[1:] == ("shop", {"private": True, "exist_ok": True})
    assert branch[1:] == ("me/shop", {"branch": "next", "exist_ok": True})
    _, files, options = upload
    assert (options["repo_id"], options["revision"]) == ("me/shop", "next")
    assert files["README.md"] == b"a card of one's own"
    assert files.keys() <= set(options["allow_patterns"])

    def download(repo_id, **given):
        assert (repo_id, given["revision"], given["local_files_only"]) == ("me/shop", "next", True)
        for name in files.keys() & set(given["allow_patterns"]):
            (tmp_path / name).write_bytes(files[name])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert same(from_pretrained("me/shop", revision="next", local_files_only=True), model)


def test_the_card_tells_how_to_load_it_and_what_it_achieved(model):
    card = model_card(model, dataset="ml-1m", metrics={"NDCG@10": 0.17456}, license="mit", tags=["films"])
    data = card.data.to_dict()
    assert data["library_name"] == "ttt4rec"
    assert data["license"] == "mit"
    assert {"ttt4rec", "sequential-recommendation", "films"} <= set(data["tags"])
    metric = data["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["type"], metric["value"]) == ("NDCG@10", 0.17456)
    assert "| NDCG@10 | 0.1746 |" in card.text
    assert '| inner | "linear" |' in card.text
    assert "from ttt4rec.hf import from_pretrained" in card.text
    assert "Results" not in model_card(model).text


def run_card(model, folder):
    """What the program on the card says it finds."""
    save_pretrained(model, folder)
    (_, program), *others = python_blocks((folder / "README.md").read_text())
    assert not others
    names = {}
    exec(program.replace("this repository's name", str(folder)), names)
    return names


def test_the_program_on_the_card_runs(model, tmp_path):
    assert run_card(model, tmp_path)["items"].shape == (1, 10)


@pytest.mark.parametrize("times", ["gap", "query"])
def test_the_program_on_the_card_of_a_model_with_times(times, tmp_path):
    model = TTT4Rec(TTT4RecConfig(20, 16, inner="linear", times=times)).eval()
    for parameter in model.event_times.parameters():
        torch.nn.init.normal_(parameter)
    found = run_card(model, tmp_path)
    h = model(found["history"], gaps=torch.tensor([[torch.inf, 60, 3540]]))[:, -1]
    expected, _ = model.top_k(model.at_request(h, torch.tensor([60])), 10)
    assert_close(found["scores"], expected, 1e-6)


def test_the_program_on_the_card_of_a_model_that_hides_items(tmp_path):
    model = TTT4Rec(TTT4RecConfig(20, 16, mixer="bidirectional")).eval()
    found = run_card(model, tmp_path)
    h, _ = model.predict(found["history"][:, :3], torch.tensor([0, 0, 1]), torch.tensor([0, 3]))
    assert_close(found["scores"], model.top_k(h, 10)[0], 1e-6)


def test_metrics_need_their_data_set(model):
    with pytest.raises(ValueError, match=r"dataset must be named that the metrics NDCG@10 were taken on"):
        model_card(model, metrics={"NDCG@10": 0.2})


def test_only_recommenders_are_saved(tmp_path):
    with pytest.raises(TypeError, match="model must be a TTT4Rec; given Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "model")
    assert not (tmp_path / "model").exists()
