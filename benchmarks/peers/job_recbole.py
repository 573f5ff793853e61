"""The job by RecBole: SASRec of its quick start, with one block."""

from pathlib import Path

import numpy as np
import pandas as pd
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from recbole.utils.case_study import full_sort_topk

SETTINGS = {
    "data_path": ".",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "train_neg_sample_args": None,
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    "metrics": ["Hit", "NDCG"],
    "valid_metric": "NDCG@10",
    "n_layers": 1,
    "use_gpu": False,
    "show_progress": False,
}


def load(frame):
    Path("frame").mkdir(exist_ok=True)
    names = {"user_id": "user_id:token", "item_id": "item_id:token", "timestamp": "timestamp:float"}
    frame.rename(columns=names).to_csv("frame/frame.inter", sep="\t", index=False)
    config = Config(model="SASRec", dataset="frame", config_dict=SETTINGS)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    return config, dataset, *data_preparation(config, dataset)


def train(data, epochs):
    config, _, train_data, valid_data, _ = data
    config["epochs"] = epochs
    trainer = Trainer(config, SASRec(config, train_data.dataset).to(config["device"]))
    trainer.fit(train_data, valid_data)
    return trainer


def evaluate(data, trainer):
    return trainer.evaluate(data[-1])


def recommend(data, trainer):
    config, dataset, _, _, test_data = data
    users = np.arange(1, dataset.user_num)
    scores, items = full_sort_topk(users, trainer.model, test_data, k=10, device=config["device"])
    return pd.DataFrame(
        {
            "user_id": np.repeat(dataset.id2token(dataset.uid_field, users), 10),
            "item_id": dataset.id2token(dataset.iid_field, items.cpu()).ravel(),
            "score": scores.cpu().numpy().ravel(),
        }
    )
