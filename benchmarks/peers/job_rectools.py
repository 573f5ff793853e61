"""The job by RecTools: SASRec of its tutorials, 64 wide and with one block."""

from lightning_fabric import seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.metrics import NDCG, HitRate, calc_metrics
from rectools.models import SASRecModel
from rectools.models.nn.transformers.utils import leave_one_out_mask


def load(frame):
    interactions = frame.rename(columns={"timestamp": Columns.Datetime}).assign(**{Columns.Weight: 1})
    last = interactions.groupby(Columns.User).tail(1)
    return Dataset.construct(interactions), Dataset.construct(interactions.drop(last.index)), last


def train(data, epochs):
    seed_everything(0)
    model = SASRecModel(
        n_factors=64, n_blocks=1, session_max_len=50, epochs=epochs, get_val_mask_func=leave_one_out_mask
    )
    return model.fit(data[1])


def evaluate(data, model):
    _, before, last = data
    lists = model.recommend(last[Columns.User], before, k=10, filter_viewed=False)
    metrics = {"HR@10": HitRate(k=10), "NDCG@10": NDCG(k=10, divide_by_achievable=True)}
    return calc_metrics(metrics, lists, last)


def recommend(data, model):
    whole = data[0]
    return model.recommend(whole.user_id_map.external_ids, whole, k=10, filter_viewed=True)
