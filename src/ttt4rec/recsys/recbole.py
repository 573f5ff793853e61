"""TTT4Rec and its baselines as a sequential model of RecBole, trained and evaluated by RecBole (extra ``recbole``).

    config = Config(model=TTT4Rec, dataset="ml-100k", config_dict=RECBOLE_DEFAULTS | {"inner": "linear"})
    train, valid, test = data_preparation(config, create_dataset(config))
    model = TTT4Rec(config, train.dataset).to(config["device"])
    Trainer(config, model).fit(train, valid)

Every field of ``TTT4RecConfig`` may stand in RecBole's configuration under its own name, except
``num_items``, which the data say, and ``max_len``, RecBole's ``MAX_ITEM_LIST_LENGTH``. Every mixer is available but the
one that is trained to fill in hidden items, since RecBole gives one target a history. Times are not read. Nothing else
imports this module.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt4rec.extras import missing
from ttt4rec.models import ttt4rec as models
from ttt4rec.models.config import TTT4RecConfig
from ttt4rec.models.mixers import MIXERS

try:
    from recbole.model.abstract_recommender import SequentialRecommender
    from recbole.utils import InputType
except ModuleNotFoundError as error:
    raise missing("ttt4rec.recsys.recbole", error) from error

RECBOLE_DEFAULTS: dict[str, Any] = {
    "train_neg_sample_args": None,  # the loss is the softmax over all items
    "eval_args": {"split": {"RS": [3, 2, 5]}, "group_by": "user", "order": "TO", "mode": "full"},
    "train_batch_size": 2048,
    "eval_batch_size": 4096,
    "epochs": 300,
    "stopping_step": 5,
    "metrics": ["Hit", "NDCG"],
    "topk": [10, 50],
    "valid_metric": "NDCG@10",
    "user_inter_num_interval": "[5,inf)",
    "item_inter_num_interval": "[5,inf)",
}
"""The paper's protocol in RecBole's words."""


class TTT4Rec(SequentialRecommender):  # type: ignore[misc]
    """A model of ``ttt4rec`` between RecBole's data and RecBole's trainer.

    Attributes:
        model: the ``ttt4rec.TTT4Rec``; its item ids are RecBole's.

    Raises:
        ValueError: the configuration has a mixer that is not causal, times, negatives to train on, which are RecBole's
            default, or a value that no model can have.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        sizes = {"num_items": self.n_items - 1, "max_len": self.max_seq_length}
        names = {field.name for field in dataclasses.fields(TTT4RecConfig)} - sizes.keys()
        options = {name: config[name] for name in names if name in config}
        negatives = config["train_neg_sample_args"]["distribution"]
        if negatives != "none":  # else they would be rows of the batches, to be told from targets by a label
            raise ValueError(
                "train_neg_sample_args must be None, as in RECBOLE_DEFAULTS, since the loss is the softmax over all "
                f"items; given negatives of distribution {negatives!r}"
            )
        shape = TTT4RecConfig(**sizes, **options)
        if not MIXERS[shape.mixer].causal:
            raise ValueError(f"mixer must be causal; given {shape.mixer!r}, but RecBole has BERT4Rec itself")
        if shape.times != "none":
            raise ValueError(f"times must be none, as RecBole's batches here have no times; given {shape.times!r}")
        self.model = models.TTT4Rec(shape)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Hidden states ``[B, width]`` after histories ``[B, L]`` of given lengths ``[B]``, padded on the right."""
        cu_seqlens = F.pad(item_seq_len.cumsum(0), (1, 0))
        ids = item_seq[item_seq != 0]
        wanted = torch.zeros_like(ids).index_fill(0, cu_seqlens[1:] - 1, 1)  # any item, after the last of each history
        hidden, _ = self.model.predict(ids[None], wanted, cu_seqlens)
        return hidden

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Mean cross-entropy of the next items among all."""
        loss: Tensor = self.model.nll(self._read(interaction), interaction[self.POS_ITEM_ID], "mean")
        return loss

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of one item for each history."""
        items: Tensor = self.model.embedding(interaction[self.ITEM_ID])
        return (self._read(interaction) * items).sum(-1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores ``[B, n_items]`` of all items; column 0 is padding."""
        return F.pad(self.model.scores(self._read(interaction)), (1, 0))

    def _read(self, interaction: Any) -> Tensor:
        hidden: Tensor = self(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return hidden
