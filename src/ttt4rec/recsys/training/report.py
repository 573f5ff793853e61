"""A report of finished runs: configuration, data, curves, and metrics with their spread, as Markdown with a picture.

Also the card of a single model, which goes with its weights.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ttt4rec.atomic_files import check_digest, read_json, replacing
from ttt4rec.checks import printable
from ttt4rec.models.mixers import MIXERS
from ttt4rec.recsys.data import DataError, Id
from ttt4rec.recsys.data.split import PARTS, Split
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.plot import plot_curves
from ttt4rec.recsys.training.train import METRICS_FILE

RUN_FILE, REPORT_FILE, CURVES_FILE, CARD_FILE = "run.json", "report.md", "curves.png", "model_card.md"

_CARD = """\
---
library_name: ttt4rec
tags: [sequential-recommendation, test-time-training]
---

# {name}

A sequential recommender: it reads a history of items and ranks what may come next among {items:,} items. Sequence
layer `{mixer}`, width {width}, {parameters:,} parameters, the embeddings of items included. Weights are in
`model.safetensors`, the model's shape in `config.json`, names of users and items and the histories in the other files.

```python
from ttt4rec.recsys import Recommender

recommender = Recommender.load(".")  # this folder
print(recommender.recommend(history=[{item}], {times}k=10).items)
```

## Trained on

{data}
## Test metrics

All items are ranked for every test target{seen}.

{metrics}
## Limits

It knows the items above and no others, and what users of its data did; it was not tested on other data. The folder
holds the histories of these users: remove `ids.json` and `histories.safetensors` before it goes to anybody who may not
see them. `TTT4Rec.load` needs neither.

## Settings

{settings}"""
_ASKED = {"none": "", "gap": "times=[0], ", "query": "times=[0], at=3600, "}
"""When events and request are in the card's program, by ``TTT4RecConfig.times``."""


def describe_data(split: Split) -> dict[str, float]:
    """Statistics of the histories and the parts, by name; new users have nothing in training."""
    histories = split.histories
    lengths = np.diff(histories.offsets)
    first, end = split.bounds("test")
    return {
        "users": histories.num_users,
        "items": histories.num_items,
        "interactions": len(histories.items),
        "mean history": round(float(lengths.mean()), 1),
        "median history": float(np.median(lengths)),
        "longest history": int(lengths.max()),
        "share of repeats": round(1 - len(histories.first_places()) / len(histories.items), 4),
        "test targets of new users": int((end - first)[split.train_begin == split.train_end].sum()),
    } | {f"{part} targets": split.num_targets(part) for part in PARTS}


def write_report(runs: Sequence[str | os.PathLike[str]], folder: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` about one run or several, such as seeds, and with matplotlib ``curves.png`` next to it.

    Args:
        runs: folders that ``ttt4rec train`` wrote.
        folder: where to write; created if missing.

    Returns:
        Path of the report.

    Raises:
        DataError: a folder holds no finished run, or its files are damaged.
    """
    folders = [Path(run) for run in runs]
    read = [_read(run) | {"name": name} for run, name in zip(folders, _names(folders), strict=True)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = [
        "# Training report\n",
        "## Test metrics\n",
        _metrics_table(read),
        "## Data\n",
        _table(["", *(run["name"] for run in read)], _side_by_side([run["data"] for run in read])),
        "## Configuration\n",
        _table(["", *(run["name"] for run in read)], _side_by_side([run["settings"] for run in read])),
        "## Training\n",
    ]
    if importlib.util.find_spec("matplotlib"):
        methods = {run["name"]: _method(run["settings"]) for run in read}
        plot_curves({run["name"]: run["epochs"] for run in read}, folder / CURVES_FILE, methods)
        tables.append(f"![loss and validation NDCG@10 by epoch, a star at the one that is kept]({CURVES_FILE})\n")
    rows = [[run["name"], *_summary(run["epochs"])] for run in read]
    tables.append(_table(["run", "epochs", "best", "NDCG@10 there", "loss there", "training s", "validation s"], rows))
    with replacing(folder / REPORT_FILE) as partial:
        partial.write_text("\n".join(tables), encoding="utf-8")
    return folder / REPORT_FILE


def write_card(folder: Path, recommender: Recommender, about: dict[str, Any]) -> None:
    """Write ``model_card.md``: what the model in a folder is, how it is loaded, what it learned from and how well.

    Its head is what the Hugging Face hub reads of a README.md.

    Args:
        folder: where the recommender was saved.
        recommender: the model with its items.
        about: the content of ``run.json``.
    """
    config, settings = recommender.model.config, about["settings"]
    card = _CARD.format(
        name=f"TTT4Rec on {Path(settings['data']).name}",
        items=config.num_items,
        mixer=config.mixer,
        width=config.width,
        parameters=sum(p.numel() for p in recommender.model.parameters()),
        item=printable(_literal(recommender.histories.item_ids[0])),
        data=_table(["", "count"], _side_by_side([about["data"]])),
        times=_ASKED[config.times],
        seen=", except items the user had before" if settings["exclude_seen"] else "",
        metrics=_table(["metric", "value"], [[name, f"{value:.4f}"] for name, value in about["test"].items()]),
        settings=_table(["option", "value"], _side_by_side([settings])),
    )
    with replacing(folder / CARD_FILE) as partial:
        partial.write_text(card, encoding="utf-8")


def _literal(item: Id) -> str:
    """An id as a program has it."""
    return str(item) if isinstance(item, int) else json.dumps(str(item), ensure_ascii=False)


def _read(folder: Path) -> dict[str, Any]:
    try:
        run = read_json(folder / RUN_FILE)
        check_digest(folder / METRICS_FILE, run)
        with (folder / METRICS_FILE).open(newline="", encoding="utf-8") as file:
            epochs = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
        found = {"epochs": epochs} | {part: dict(run[part]) for part in ("settings", "data", "test")}
    except FileNotFoundError as error:
        raise DataError(f"{folder} holds no finished training run: {Path(error.filename).name} is missing") from error
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise DataError(f"{folder} must hold the files of a training run; given damaged ones ({error})") from error
    if not epochs:
        raise DataError(f"{folder / METRICS_FILE} must hold at least one epoch; given none")
    return found


def _method(settings: dict[str, Any]) -> str:
    """What a run trained, as pictures name it."""
    if settings.get("mixer") == "ttt":
        inner = str(settings.get("inner"))
        return f"TTT-{'MLP' if inner == 'mlp' else inner.capitalize()}"
    mixer = MIXERS.get(str(settings.get("mixer")))
    return "" if mixer is None else mixer.published


def _names(folders: Sequence[Path]) -> list[str]:
    """As many of the last parts of the folders' paths as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, paths))):
        names = ["/".join(parts[-count:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _metrics_table(runs: Sequence[dict[str, Any]]) -> str:
    """A column for each run; mean and spread where the seed and nothing else differs."""
    names = ("seed", "out")
    other = [(run["data"], {name: x for name, x in run["settings"].items() if name not in names}) for run in runs]
    seeds = [run["settings"].get("seed") for run in runs]
    are_seeds = 1 < len(runs) == len(set(seeds)) and all(x == other[0] for x in other)
    rows = []
    for name in runs[0]["test"]:
        values = [run["test"].get(name, float("nan")) for run in runs]
        row = [name, *(f"{value:.4f}" for value in values)]
        if are_seeds:
            row += [f"{statistics.fmean(values):.4f}", f"{statistics.stdev(values):.4f}"]
        rows.append(row)
    spread = ["mean", "standard deviation"] if are_seeds else []
    return _table(["metric", *(run["name"] for run in runs), *spread], rows)


def _summary(epochs: Sequence[dict[str, float]]) -> list[str]:
    best = max(epochs, key=lambda row: row["valid_NDCG@10"])
    seconds = [f"{sum(row[f'{part}_seconds'] for row in epochs):.1f}" for part in ("train", "valid")]
    return [str(len(epochs)), f"{best['epoch']:.0f}", f"{best['valid_NDCG@10']:.4f}", f"{best['loss']:.4f}", *seconds]


def _side_by_side(columns: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [[name, *(str(column.get(name, "")) for column in columns)] for name in columns[0]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
