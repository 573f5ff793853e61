"""TTT4Rec under RecBole's trainer and evaluator. Run by ``scripts/test_adapters.sh``, which builds the environment."""

import json

import numpy as np
import pytest
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import init_seed

from tests.support import recbole_metrics
from tests.support.recsys_data import write_events
from ttt4rec.recsys.data import build_histories, filter_k_core, keep_item_codes, read_interactions
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recbole import RECBOLE_DEFAULTS, TTT4Rec
from ttt4rec.recsys.training.evaluate import evaluate

MIXERS = [{"inner": "mlp"}, {"inner": "linear", "backbone": "mamba"}, {"mixer": "narm"}]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """RecBole's configuration and its three parts of a small dataset."""
    monkeypatch.chdir(tmp_path)  # RecBole writes logs and checkpoints where it stands
    monkeypatch.setattr("sys.argv", ["recbole"])  # and reads the command line
    (tmp_path / "ring").mkdir()
    write_events(tmp_path / "ring" / "ring.inter")

    def make(**options):
        small = {"width": 16, "num_heads": 2, "ffn_width": 32, "mini_batch_size": 4, "dropout": 0.0}
        settings = {
            "data_path": str(tmp_path),
            "MAX_ITEM_LIST_LENGTH": 8,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "train_batch_size": 64,
            "learning_rate": 1e-2,
            "epochs": 3,
            "topk": [5, 10],  # there are 24 items
            "metric_decimal_place": 9,
            "use_gpu": False,
            "show_progress": False,
            "state": "WARNING",
        }
        config = Config(model=TTT4Rec, dataset="ring", config_dict=RECBOLE_DEFAULTS | small | settings | options)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        return config, dataset, data_preparation(config, dataset)

    return make


@pytest.mark.parametrize("options", MIXERS, ids=str)
def test_recboles_trainer_learns_and_both_evaluators_agree(prepare, tmp_path, options):
    config, dataset, (train, valid, test) = prepare(**options)
    adapter = TTT4Rec(config, train.dataset)
    trainer = Trainer(config, adapter)
    before = trainer.evaluate(test, load_best_model=False)
    trainer.fit(train, valid)
    theirs = trainer.evaluate(test)  # of the best epoch, from RecBole's checkpoint
    assert theirs["ndcg@10"] > before["ndcg@10"] + 0.1

    data = filter_k_core(read_interactions(tmp_path / "ring" / "ring.inter"), min_user=5, min_item=5)
    tokens = dataset.id2token(dataset.iid_field, np.arange(1, dataset.item_num))
    split = split_by_ratio(keep_item_codes(build_histories(data), list(tokens)), (3, 2, 5))
    assert (len(train.dataset), len(valid.dataset), len(test.dataset)) == tuple(
        split.num_targets(part) for part in ("train", "valid", "test")
    )
    for part, given in (("test", theirs), ("valid", trainer.evaluate(valid))):
        ours = evaluate(adapter.model, evaluation_prefixes(split, part, max_len=8), cutoffs=(5, 10))
        for name in ("5", "10"):
            assert given[f"hit@{name}"] == pytest.approx(ours[f"HR@{name}"], abs=1e-4)
            assert given[f"ndcg@{name}"] == pytest.approx(ours[f"NDCG@{name}"], abs=1e-4)


def test_one_item_at_a_time(prepare):
    config, _, (train, _, _) = prepare()
    adapter = TTT4Rec(config, train.dataset).eval()
    interaction = next(iter(train))
    one, every = adapter.predict(interaction), adapter.full_sort_predict(interaction)
    assert every.shape == (len(interaction), adapter.n_items)
    torch.testing.assert_close(one, every.gather(1, interaction["item_id"][:, None])[:, 0])


def test_recboles_configuration_reaches_the_model(prepare):
    config, _, (train, _, _) = prepare(inner="linear", rope_theta=50.0)
    model = TTT4Rec(config, train.dataset).model
    assert (model.config.inner, model.config.rope_theta, model.config.max_len) == ("linear", 50.0, 8)
    assert model.config.num_items == 24


def test_a_mixer_that_wants_more_than_one_target_is_refused(prepare):
    config, _, (train, _, _) = prepare(mixer="bidirectional")
    with pytest.raises(ValueError, match="RecBole has BERT4Rec itself"):
        TTT4Rec(config, train.dataset)


def test_negatives_to_train_on_are_refused(prepare):
    config, _, (train, _, _) = prepare(train_neg_sample_args={"distribution": "uniform", "sample_num": 1})
    with pytest.raises(ValueError, match=r"train_neg_sample_args must be None, .* given negatives of .* 'uniform'"):
        TTT4Rec(config, train.dataset)


def test_recboles_own_metrics_are_those_kept_for_the_tests_of_ours(monkeypatch):
    for name in ("float", "bool"):
        monkeypatch.setattr(np, name, getattr(np, name, None), raising=False)  # set for RecBole's sake, and put back
    kept = json.loads(recbole_metrics.FIXTURE.read_text())
    for name, case in recbole_metrics.cases().items():
        assert case["metrics"] == pytest.approx(kept[name]["metrics"], abs=1e-9)
        assert case["ranks"] == kept[name]["ranks"]
