"""What an online recommender tells of its users' states: how far they have moved, and what surprised them."""

import pytest
import torch

from tests.recsys.online.test_online import ITEMS, make_online
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys.data import DataError
from ttt4rec.recsys.online.events import Event


def make_model(**options):
    config = TTT4RecConfig(len(ITEMS), 16, 2, num_heads=2, mini_batch_size=4, forget="token", **options)
    model = TTT4Rec(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.embedding.weight[0] = 0
    return model


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_surprise_is_the_models_over_the_whole_history(inner):
    model = make_model(inner=inner)
    online = make_online(model)
    items = [ITEMS[i] for i in (3, 1, 4, 1, 5, 2, 6, 5, 3)]
    online.observe(["ada"] * 9, items)
    online.log.append([Event("ada", "unheard of")])
    found = online.surprise("ada")
    assert [item for item, _ in found] == items
    ids = torch.tensor([[ITEMS.index(item) + 1 for item in items]])
    assert [number for _, number in found] == pytest.approx(model.surprise(ids)[0].tolist(), rel=1e-6)
    assert online.surprise("nobody") == []


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_how_far_users_have_moved(inner):
    model = make_model(inner=inner)
    online = make_online(model, slots=2)
    online.observe(["ada"] * 9 + ["bob"] * 3 + ["cy"] * 6, [ITEMS[i % 5] for i in range(18)])
    far = online.moved(["cy", "nobody", "ada", "bob", "ada"])
    assert far[1] == far[3] == 0  # a stranger, and one whose first mini-batch is not complete
    assert far[0] > 0
    assert far[2] == far[4] > 0
    ids = torch.tensor([[i % 5 + 1 for i in range(9)]])
    _, states = model(ids, return_states=True)
    expected = [b.mixer.moved(s.mixer).mean() for b, s in zip(model.blocks, states, strict=True)]
    assert far[2] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)


def test_bad_users_are_refused():
    online = make_online()
    with pytest.raises(DataError):
        online.moved("ada")
    with pytest.raises(DataError):
        online.surprise("")


def test_states_that_forget_survive_a_snapshot(tmp_path):
    model, path = make_model(), tmp_path / "snapshot"
    online = make_online(model, snapshot=path)
    online.observe(["ada"] * 6, ITEMS[:6])
    before = online.recommend(["ada"], k=3)
    assert online.save_snapshot() == 1
    again = make_online(model, log=online.log, snapshot=path)
    assert again.stats()["users"] == 1
    assert [item for item, _ in again.recommend(["ada"], k=3)[0]] == [item for item, _ in before[0]]
    online.observe(["ada"] * 3, ITEMS[1:4])
    assert again.moved(["ada"]) == pytest.approx(online.moved(["ada"]), rel=1e-5)
