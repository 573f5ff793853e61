"""Rows of items from ids and features: numbers, gradients, and that all of a model takes them for its table."""

import copy
import dataclasses
import json

import pytest
import torch

from tests.support.checks import ROUNDING, assert_close
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.models import ttt4rec
from ttt4rec.models.item_features import FeatureColumn, FeaturedItems, ItemFeatures
from ttt4rec.models.losses import LOSSES, Loss
from ttt4rec.models.mixers import MIXERS

ITEMS = 6
COLUMNS = (
    FeatureColumn("size", "dense", (0.0, 0.0), (1.0, 1.0)),
    FeatureColumn("kind", "categories", values=("a", "b", "c")),
)


def make_features(columns=COLUMNS, **changes):
    torch.manual_seed(1)
    dense = torch.cat((torch.zeros(1, 2), torch.randn(ITEMS, 2)))
    given = ItemFeatures(
        columns,
        dense if columns[0].kind == "dense" else dense[:, :0],
        categories=torch.tensor([0, 1, 2, 2] if columns[-1].values else [], dtype=torch.int64),
        weights=torch.tensor([0.5, 0.5, 1.0, 1.0] if columns[-1].values else []),
        offsets=torch.tensor([0, 0, 2, 3, 3, 4, 4, 4] if columns[-1].values else [0] * (ITEMS + 2)),
        known=torch.tensor([False, True, True, True, False, True, True]),
        id_dropout=0.0,
    )
    return dataclasses.replace(given, **changes)


def make_model(features=None, dtype=torch.float64, **options):
    shape = {"width": 32, "num_heads": 2, "ffn_width": 64, "mini_batch_size": 3, "max_len": 5, "dropout": 0.0}
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(ITEMS, **(shape | options)), dtype=dtype, features=features)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.embedding.weight[0] = 0
    return model


def folded(model):
    """The model that has the rows for embeddings, and no features."""
    plain = copy.deepcopy(model)
    plain.features = None
    with torch.no_grad():
        plain.embedding.weight.copy_(model.item_table())
    return plain


IDS, TARGETS, BOUNDS = torch.tensor([[3, 1, 4, 2, 6, 4]]), torch.tensor([1, 4, 5, 6, 4, 2]), torch.tensor([0, 3, 6])


@pytest.mark.parametrize("columns", [COLUMNS, COLUMNS[:1], COLUMNS[1:]], ids=["both", "dense", "categories"])
def test_rows_are_sums_of_what_is_known(columns):
    model = make_model(make_features(columns))
    features, given = model.features, make_features(columns)
    for item in range(ITEMS + 1):
        row = model.embedding.weight[item] * given.known[item]
        if columns[0].kind == "dense":
            row = row + features.projection.weight @ given.dense[item].double()
        for place in range(int(given.offsets[item]), int(given.offsets[item + 1])):
            row = row + given.weights[place] * features.values.weight[given.categories[place]]
        assert_close(model.item_table()[item], row, ROUNDING)
    assert not model.item_table()[0].any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_and_loss_takes_the_rows_for_embeddings(mixer):
    model = make_model(make_features(), mixer=mixer)
    plain = folded(model)
    for name in LOSSES if mixer == "ttt" else ["softmax"]:
        given = Loss.make(name, torch.arange(ITEMS), num_negatives=4, popularity=0.5, calibration=0.5)
        losses = []
        for one in (model, plain):
            one.zero_grad()
            torch.manual_seed(2)
            with one.one_item_table():
                losses.append(given(one, *one.predict(IDS, TARGETS, BOUNDS)))
                losses[-1].backward()
        assert losses[0].item() == losses[1].item()
        of_rows, features = plain.embedding.weight.grad, make_features()
        known = features.known.unsqueeze(1)
        assert_close(model.embedding.weight.grad[1:], (of_rows * known)[1:], ROUNDING)
        assert_close(model.features.projection.weight.grad, of_rows.T @ features.dense.double(), ROUNDING)
        spread = torch.zeros(3, 32).double()
        spread.index_add_(0, features.categories, of_rows[features.owners()] * features.weights.double().unsqueeze(1))
        assert_close(model.features.values.weight.grad, spread, ROUNDING)
    model.eval(), plain.eval()
    hidden, items = plain.predict(IDS, TARGETS, BOUNDS)
    assert torch.equal(model.predict(IDS, TARGETS, BOUNDS)[0], hidden)
    assert torch.equal(model.scores(hidden), plain.scores(hidden))
    assert torch.equal(model.ranks(hidden, items), plain.ranks(hidden, items))
    assert all(map(torch.equal, model.top_k(hidden, 3), plain.top_k(hidden, 3)))


def test_features_that_add_nothing_change_no_bit():
    """Nor do the initial weights depend on whether there are features."""
    features = make_features(known=torch.arange(ITEMS + 1) > 0)
    torch.manual_seed(0)
    plain = TTT4Rec(TTT4RecConfig(ITEMS, width=32, num_heads=2))
    torch.manual_seed(0)
    model = TTT4Rec(plain.config, features=features)
    own = plain.state_dict()
    for name, x in model.state_dict().items():
        assert name.startswith("features.") or torch.equal(x, own[name]), name
    assert not any("features" in name for name in own)
    for p in model.features.parameters():
        torch.nn.init.zeros_(p)
    losses = []
    for one in (plain, model):
        torch.manual_seed(3)  # of the dropout
        losses.append(one.nll(*one.predict(IDS, TARGETS, BOUNDS), "sum"))
        losses[-1].backward()
    assert losses[0].item() == losses[1].item()
    assert torch.equal(plain.norm.weight.grad, model.norm.weight.grad)


def test_ids_are_left_out_in_training_alone():
    model = make_model(make_features(id_dropout=0.5))
    only_features = model.served_items() - model.embedding.weight * make_features().known.unsqueeze(1)
    dropped = torch.stack([model.item_table() for _ in range(40)]).sub(only_features).abs().amax(2) < 1e-12
    share = dropped[:, make_features().known].double().mean()
    assert 0.3 < share < 0.7
    model.eval()
    assert_close(model.item_table(), make_model(make_features()).item_table(), 0)
    model.train()
    assert torch.equal(model.served_items(), model.served_items())


def test_rows_are_kept_until_something_changes():
    model = make_model(make_features()).eval()
    kept = model.served_items()
    assert model.served_items() is kept
    with torch.inference_mode():
        assert model.served_items() is kept
    changes = [
        lambda: model.features.projection.weight.grad is None or None,
        lambda: model.load_state_dict(make_model(make_features(), ffn="swiglu").state_dict()),
        lambda: model.features.learn(torch.ones(ITEMS)),
        lambda: model.features.replace(make_features(dense=torch.ones(ITEMS + 1, 2))),
        lambda: model.float(),
    ]
    for number, change in enumerate(changes):
        change()
        assert (model.served_items() is kept) == (number == 0)
        kept = model.served_items()
        assert_close(kept, model.item_table(), 0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model.nll(*model.predict(IDS, TARGETS, BOUNDS), "sum").backward()
    optimizer.step()
    assert_close(model.served_items(), model.item_table(), 0)
    assert not torch.equal(model.served_items(), kept)


def test_a_copy_keeps_nothing_of_the_others():
    model = make_model(make_features()).eval()
    kept = model.served_items()
    other = copy.deepcopy(model)
    assert other.features._kept is None
    assert torch.equal(other.served_items(), kept)


def test_one_table_for_reading_and_scoring(monkeypatch):
    calls = []
    rows = FeaturedItems._rows
    monkeypatch.setattr(FeaturedItems, "_rows", lambda *given: calls.append(1) or rows(*given))
    model = make_model(make_features())
    gradients = []
    for inside in (True, False):
        model.zero_grad()
        calls.clear()
        if inside:
            with model.one_item_table():
                model.nll(*model.predict(IDS, TARGETS, BOUNDS), "sum").backward()
        else:
            model.nll(*model.predict(IDS, TARGETS, BOUNDS), "sum").backward()
        assert len(calls) == (1 if inside else 2)
        gradients.append(model.features.projection.weight.grad)
    assert_close(*gradients, ROUNDING)


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_a_step_at_once_reads_the_rows(inner, monkeypatch):
    at_once, taken = ttt4rec.step_at_once, []
    monkeypatch.setattr(ttt4rec, "step_at_once", lambda *given: taken.append(at_once(*given)) or taken[-1])
    model = make_model(make_features(), inner=inner).eval()
    pools, slots = model.make_pools(2), torch.arange(2)
    for change in (False, True):
        if change:  # the prepared call is of another table then
            model.features.replace(make_features(dense=torch.ones(ITEMS + 1, 2)))
        for pool in pools:
            pool.reset(slots)
        for ids in (torch.tensor([1, 4]), torch.tensor([4, 2])):
            y = model.step(ids, pools, slots)
            assert taken[-1] is not None
        expected = model(torch.tensor([[1, 4], [4, 2]]))[:, -1]
        assert_close(y, expected, ROUNDING)
    model.features.id_dropout = 0.5
    model.train()
    model.step(ids, pools, slots)
    assert taken[-1] is None


def test_a_saved_model_brings_its_features(tmp_path):
    model = make_model(make_features(id_dropout=0.25), dtype=torch.float32).eval()
    model.save(tmp_path)
    loaded = TTT4Rec.load(tmp_path)
    assert loaded.features.columns == COLUMNS
    assert loaded.features.id_dropout == 0.25
    assert torch.equal(loaded.served_items(), model.served_items())
    description = tmp_path / "features.json"
    whole = description.read_text()
    description.write_text(whole.replace('"b"', '"d"'))
    with pytest.raises(ValueError, match=r"features.json in .* must be files of one save"):
        TTT4Rec.load(tmp_path)
    description.unlink()
    with pytest.raises(FileNotFoundError, match=r"features.json is missing"):
        TTT4Rec.load(tmp_path)
    description.write_text(whole)
    plain = folded(model)
    plain.save(tmp_path)  # what is left of the other save plays no part
    assert TTT4Rec.load(tmp_path).features is None
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(plain.config)


def test_a_larger_catalogue_and_other_features():
    model = make_model(make_features())
    larger = model.with_items(8)
    assert_close(larger.item_table()[: ITEMS + 1], model.item_table(), ROUNDING)
    assert not larger.item_table()[ITEMS + 1 :].any()
    given = larger.features.given()
    more = make_features()
    updated = given.updated(torch.tensor([8, 2, 1, 3, 4, 7]), more)
    for item, like in ((8, 1), (2, 2), (1, 3), (3, 4), (4, 5), (7, 6)):
        assert torch.equal(updated.dense[item], more.dense[like].double())
        own, expected = (x.categories[x.offsets[i] : x.offsets[i + 1]] for x, i in ((updated, item), (more, like)))
        assert torch.equal(own, expected)
    assert int(updated.offsets[-1]) == len(updated.categories) == 4
    larger.features.learn(torch.tensor([0, 0, 0, 0, 0, 0, 3, 0]))
    assert larger.features.known.tolist() == [*make_features().known.tolist(), True, False]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"id_dropout": 1.0}, "id_dropout must be at least 0 and below 1; given 1.0"),
        ({"categories": torch.tensor([0, 1, 2, 3])}, "of the sizes of their columns"),
        ({"offsets": torch.zeros(3, dtype=torch.int64)}, "of the sizes of their columns"),
        ({"dense": torch.zeros(ITEMS + 1, 1)}, "of the sizes of their columns"),
    ],
)
def test_features_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        make_features(**changes)


def test_wrong_columns_and_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="must be dense or of categories; given 'x'"):
        FeatureColumn("x", "dense", (0.0,), ())
    with pytest.raises(ValueError, match="features must be of num_items, 7; given 6"):
        TTT4Rec(TTT4RecConfig(7), features=make_features())


def test_forward_derivatives_of_rows():
    """With respect to each parameter, where the table would otherwise be one that is kept."""
    model = make_model(make_features()).eval().requires_grad_(False)
    weights = torch.randn(ITEMS + 1, 32, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def total(given):
        names = parameters | given
        return torch.func.functional_call(model, names, (IDS,)).square().sum() + (weights * rows(names)).sum()

    def rows(names):
        own = {name.removeprefix("features."): x for name, x in names.items() if name.startswith("features.")}
        return torch.func.functional_call(model.features, own, (names["embedding.weight"],))

    for block in model.blocks:
        block.mixer.backend = "reference"
    for name in ("embedding.weight", "features.projection.weight", "features.values.weight"):
        given, tangent = {name: parameters[name]}, {name: torch.randn_like(parameters[name])}
        _, forwards = torch.func.jvp(total, (given,), (tangent,))
        backwards = (torch.func.grad(total)(given)[name] * tangent[name]).sum()
        assert_close(forwards, backwards, ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_and_exported_models_have_features(training):
    model = make_model(make_features()).train(training)
    with torch.no_grad():
        expected = model(IDS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(IDS), expected, ROUNDING)
    assert_close(compiled(IDS), expected, ROUNDING)
    assert_close(torch.export.export(model, (IDS,)).module()(IDS), expected, ROUNDING)


def test_under_autocast_rows_stay_float32():
    model = make_model(make_features(), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.item_table().dtype == torch.float32
