"""The job by ttt4rec: a model of the default size, trained as by its preset of the name best."""

import pandas as pd
import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys import (
    Recommender,
    TrainOptions,
    build_histories,
    evaluation_prefixes,
    fit,
    load_interactions,
    split_leave_one_out,
)
from ttt4rec.recsys import evaluate as rank_targets
from ttt4rec.recsys.recommend.offers import table


def load(frame):
    return split_leave_one_out(build_histories(load_interactions(frame)))


def train(split, epochs, mixer):
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(num_items=split.histories.num_items, mixer=mixer))
    fit(model, split, "runs/peers", TrainOptions.from_preset("best", split.num_targets("train"), epochs=epochs))
    return model


def evaluate(split, model):
    return rank_targets(model, evaluation_prefixes(split, "test", max_len=50))


def recommend(split, model):
    users = split.histories.user_ids
    results = Recommender(model, split.histories).recommend(users=users, k=10)
    return pd.DataFrame(table(users, results))
