"""RecTools' SASRec and HSTU on the benchmark's data, trained and evaluated by RecTools: an outside check.

    .venv-adapters/bin/python -m studies.benchmark.rectools_check --data FOLDER --datasets ml-100k --seeds 0 1 2

It runs in the environment that ``scripts/test_adapters.sh`` makes, and nothing imports it. Targets are those of the
benchmark, leave-one-out; the file of results is read by ``report``.
"""

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import seed_everything
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from rectools import Columns
from rectools.dataset import Dataset
from rectools.dataset.context import get_context
from rectools.models import HSTUModel, SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.utils import leave_one_out_mask
from torch import Tensor

from tools.environment import environment
from ttt4rec.recsys.data.split import Split
from ttt4rec.recsys.training.report import describe_data

from ..runner import Result, keep, load_split, read_results
from ..study import LEAVE_ONE_OUT, Data
from .checks import CHECKS_FILE, best_rate
from .design import DATASETS, FRAME, RATES, TIMED

CUTOFF, PATIENCE, EPOCHS = 10, 5, 100
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SASRec": (SASRecModel, {"n_blocks": 1}),
    "HSTU": (HSTUModel, {"n_blocks": 2, "lightning_module_kwargs": {"logits_t": 0.05}}),
}
"""Blocks are the benchmark's. HSTU scores by cosines, which its tutorial divides by 0.05."""


class BestEpoch(Callback):  # type: ignore[misc]
    """Ranks the validation targets after each epoch, ends a training, and puts the best epoch's weights back.

    Attributes:
        curve: NDCG@10 among all items, of all targets: RecTools leaves out those it has not seen in training.
    """

    def __init__(self, targets: int) -> None:
        self.targets = targets
        self.curve: list[float] = []
        self.gains: list[Tensor] = []
        self.best: dict[str, Tensor] = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *others: Any
    ) -> None:
        """Rank the targets of a batch."""
        wanted = batch["y"]  # [B, 1]
        scores = outputs["logits"].reshape(len(wanted), -1)[:, 1:]  # without padding
        ranks = 1 + (scores > scores.gather(1, wanted - 1)).sum(1)
        self.gains.append(gains(ranks))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights if they are the best."""
        self.curve.append(float(torch.cat(self.gains).sum()) / self.targets)
        self.gains.clear()
        print(f"  epoch {len(self.curve) - 1}: validation NDCG@{CUTOFF} {self.curve[-1]:.4f}", flush=True)
        best = int(np.argmax(self.curve))
        if best == len(self.curve) - 1:
            self.best = {name: x.clone() for name, x in pl_module.torch_model.state_dict().items()}
        trainer.should_stop = len(self.curve) - 1 - best >= PATIENCE

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights back."""
        pl_module.torch_model.load_state_dict(self.best)


def gains(ranks: Tensor) -> Tensor:
    """What NDCG@10 counts for targets of these ranks."""
    return (1 / torch.log2(1 + ranks.double())) * (ranks <= CUTOFF)


def make_trainer(targets: int, epochs: int) -> Trainer:
    """Early stopping as in RecTools' guide, here by the benchmark's measure."""
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[BestEpoch(targets)],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def tables(split: Split, timed: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What comes before the test targets, and these; without real times a user's n-th interaction is at n seconds."""
    histories = split.histories
    lengths = np.diff(histories.offsets)
    place = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], lengths)
    seconds = histories.times if timed else place
    frame = pd.DataFrame(
        {
            Columns.User: np.repeat(np.arange(histories.num_users), lengths),
            Columns.Item: histories.items,
            Columns.Weight: 1,
            Columns.Datetime: pd.to_datetime(seconds, unit="s"),
        }
    )
    first, last = (np.repeat(edge, lengths) for edge in split.bounds("test"))
    return frame[place < first], frame[(place >= first) & (place < last)]


def settings_of(name: str, data: Data, split: Split, rate: float, epochs: int) -> dict[str, Any]:
    """The benchmark's frame in RecTools' words, with about as many targets in a step."""
    first, last = split.bounds("train")
    targets = np.minimum(last - first, FRAME["max_len"]).mean()
    wanted = {**FRAME, **data.settings}["targets_per_batch"]
    sizes = {"n_factors": FRAME["width"], "n_heads": FRAME["num_heads"], "session_max_len": FRAME["max_len"]}
    times = {"relative_time_attention": data.name in TIMED} if name == "HSTU" else {}
    steps = {"batch_size": max(1, round(wanted / targets)), "epochs": epochs, "learning_rate": rate}
    return {**sizes, **times, **MODELS[name][1], "dropout_rate": FRAME["dropout"], "loss": "softmax", **steps}


def ranked(model: Any, before: pd.DataFrame, last: pd.DataFrame, *, new: bool) -> dict[str, float]:
    """HR@10 and NDCG@10 of the targets among all items; new: of new ones among those that the user has not had."""
    dataset, columns = Dataset.construct(before), [Columns.User, Columns.Item]
    if new:
        known = last[columns].merge(before[columns].drop_duplicates(), how="left", indicator=True)["_merge"] == "both"
        last = last[~known.to_numpy()]
    context = get_context(last) if model.require_recommend_context else None
    users = last[Columns.User].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lists = model.recommend(users, dataset, k=CUTOFF, filter_viewed=new, context=context)
    hits = torch.from_numpy(last[columns].merge(lists, on=columns)[Columns.Rank].to_numpy())
    return {"HR@10": len(hits) / len(last), "NDCG@10": float(gains(hits).sum()) / len(last)}


def train(name: str, data: Data, settings: dict[str, Any], seed: int, folder: Path) -> Result:
    """One training with one thread, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    split = load_split(folder, data)
    before, last = tables(split, data.name in TIMED)
    given = dict(settings)
    rate, epochs = given.pop("learning_rate"), given.pop("epochs")
    seed_everything(seed, verbose=False)
    model = MODELS[name][0](
        **given,
        lr=rate,
        item_net_block_types=(IdEmbeddingsItemNet,),
        get_val_mask_func=leave_one_out_mask,
        get_trainer_func=make_trainer,
        get_trainer_func_kwargs={"targets": split.num_targets("valid"), "epochs": epochs},
        recommend_torch_device="cpu",
    )
    clocks = {"cpu_seconds": time.process_time, "wall_seconds": time.perf_counter}
    begin = {clock: read() for clock, read in clocks.items()}
    model.fit(Dataset.construct(before))
    seconds = {clock: round(read() - begin[clock], 2) for clock, read in clocks.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    (curve,) = (callback.curve for callback in model.fit_trainer.callbacks if isinstance(callback, BestEpoch))
    return {
        **data.key,
        "model": name,
        "rectools": metadata.version("rectools"),
        "seed": seed,
        "settings": settings,
        "data": describe_data(split),
        "parameters": sum(p.numel() for p in model.torch_model.parameters()),
        "validation": [round(x, 6) for x in curve],
        "best_epoch": int(np.argmax(curve)),
        **seconds,
        "peak_mib": round(peak),
        "test": ranked(model, before, last, new=False),
        "test, new items": ranked(model, before, last, new=True),
        "environment": environment("cpu"),
    }


def main() -> int:
    """Run what has no result yet: each rate with the first seed, then the best rate with the other seeds."""
    parser = argparse.ArgumentParser(prog="python -m studies.benchmark.rectools_check", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with NAME/NAME.inter.gz")
    parser.add_argument("--datasets", nargs="+", default=["ml-100k"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most so many")
    parser.add_argument("--results", type=Path, default=CHECKS_FILE)
    given = parser.parse_args()
    for data in DATASETS:
        if data.name in given.datasets and data.split == LEAVE_ONE_OUT:
            for name in given.models:
                check(name, data, given)
    return 0


def check(name: str, data: Data, given: argparse.Namespace) -> None:
    """One model on one data set."""
    split, path = load_split(given.data, data), given.results
    for rate in given.rates:
        run_once(name, data, settings_of(name, data, split, rate, given.epochs), given.seeds[0], given.data, path)
    best = settings_of(name, data, split, best_rate(name, data, read_results(path)), given.epochs)
    for seed in given.seeds[1:]:
        run_once(name, data, best, seed, given.data, path)


def run_once(name: str, data: Data, settings: dict[str, Any], seed: int, folder: Path, path: Path) -> None:
    """Train in a process of its own, so that its memory is its own, unless there is a result."""
    key = {**data.key, "model": name, "seed": seed, "settings": settings}
    if any(key.items() <= result.items() for result in read_results(path)):
        return
    print(f"{data.title}, RecTools' {name}, learning rate {settings['learning_rate']:g}, seed {seed}", flush=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(train, (name, data, settings, seed, folder))
    keep(path, result)
    print(f"  seen out: {result['test, new items']}, {result['cpu_seconds'] / 60:.1f} CPU min", flush=True)


if __name__ == "__main__":
    sys.exit(main())
