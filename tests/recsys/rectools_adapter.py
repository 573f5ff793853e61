"""TTT layers in RecTools' SASRec. Run by ``scripts/test_adapters.sh``, which builds the environment."""

import numpy as np
import pandas as pd
import pytest
import torch
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel, SASRecModel

from tests.support.recsys_data import NUM_ITEMS, write_events
from ttt4rec.layers.ttt import TTTLayer
from ttt4rec.recsys.data import build_histories, read_interactions
from ttt4rec.recsys.rectools import TTTLayers, TTTLightningModule

OPTIONS = [{"inner": "mlp"}, {"inner": "linear", "backbone": "mamba"}]


@pytest.fixture
def histories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes logs where it stands
    torch.manual_seed(0)
    return build_histories(read_interactions(write_events(tmp_path / "ring.inter")))


def dataset_of(histories):
    users = np.repeat(histories.user_ids, np.diff(histories.offsets))
    items = np.array(histories.item_ids)[histories.items - 1]
    return Dataset.construct(
        pd.DataFrame(
            {
                Columns.User: users,
                Columns.Item: items,
                Columns.Weight: 1,
                Columns.Datetime: pd.to_datetime(histories.times),
            }
        )
    )


def make_model(options, **training):
    return SASRecModel(
        n_blocks=1,
        n_heads=2,
        n_factors=16,
        use_pos_emb=False,
        session_max_len=8,
        batch_size=64,
        loss="softmax",
        dropout_rate=0.0,
        transformer_layers_type=TTTLayers,
        transformer_layers_kwargs=options | {"mini_batch_size": 4},
        lightning_module_type=TTTLightningModule,
        recommend_torch_device="cpu",
        **training,
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rectools_fits_and_recommends(histories, options):
    model, dataset = make_model(options, epochs=40, lr=1e-2), dataset_of(histories)
    model.fit(dataset)
    recommended = model.recommend(histories.user_ids, dataset, k=1, filter_viewed=False)
    last = {
        user: int(histories.item_ids[histories.history(u)[-1] - 1][1:]) for u, user in enumerate(histories.user_ids)
    }
    hits = [
        (int(item[1:]) - last[user]) % NUM_ITEMS == 1
        for user, item in zip(recommended[Columns.User], recommended[Columns.Item], strict=True)
    ]
    assert np.mean(hits) > 0.5  # 1/24 by chance; users go on to the next item nine times in ten


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ttt_layers_begin_as_they_were_made(histories, options):
    model = make_model(options, epochs=1, lr=0.0)
    model.fit(dataset_of(histories))
    (layer,) = (module for module in model.torch_model.modules() if isinstance(module, TTTLayer))
    assert (layer.inner_norm_weight == 1).all()
    assert not layer.b1.any()
    assert layer.inner_lr_weight.std() < 0.04


def test_a_model_that_reads_both_ways_is_refused(histories):
    model = BERT4RecModel(
        n_blocks=1, n_heads=2, n_factors=16, session_max_len=8, epochs=1, transformer_layers_type=TTTLayers
    )
    with pytest.raises(ValueError, match="attn_mask must be causal, as TTT layers read forwards; given None"):
        model.fit(dataset_of(histories))


def test_padding_and_later_items_do_not_matter():
    torch.manual_seed(0)
    layers = TTTLayers(n_blocks=2, n_factors=8, n_heads=2, dropout_rate=0.0, mini_batch_size=4).double()
    seqs = torch.randn(1, 9, 8, dtype=torch.float64)
    mask, causal = torch.ones(1, 9, 1, dtype=torch.bool), torch.ones(9, 9, dtype=torch.bool).triu(1)
    whole = layers(seqs, mask, causal)
    mask[:, :3] = False
    padded = layers(seqs, mask, causal)[:, 3:]
    torch.testing.assert_close(padded, layers(seqs[:, 3:], mask[:, 3:], causal[3:, 3:]), rtol=0, atol=1e-12)
    short = layers(seqs[:, :5], mask[:, 3:8], causal[:5, :5])
    torch.testing.assert_close(short, whole[:, :5], rtol=0, atol=1e-12)
