"""Recommenders on the Hugging Face Hub: the files of ``TTT4Rec.save``, with a model card."""

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, snapshot_download

from ..models.event_times import TIMES
from ..models.ttt4rec import CONFIG_FILE, FEATURES_FILE, WEIGHTS_FILE, TTT4Rec

CARD_FILE = "README.md"
_MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, FEATURES_FILE)  # the last one of a model with features of items alone


def save_pretrained(model: TTT4Rec, folder: str | os.PathLike[str], *, card: ModelCard | str | None = None) -> None:
    """Write a model and its card into a folder, which is made if it is not there.

    Args:
        model: the recommender.
        folder: where to; ``TTT4Rec.load`` reads it, too.
        card: the card; None: ``model_card(model)``.

    Raises:
        TypeError: the model is no ``TTT4Rec``.
        OSError: a file cannot be written.
    """
    if not isinstance(model, TTT4Rec):
        raise TypeError(f"model must be a TTT4Rec; given {type(model).__name__}")
    folder = Path(folder)
    model.save(folder)
    (folder / CARD_FILE).write_text(str(model_card(model) if card is None else card), encoding="utf-8")


def push_to_hub(model: TTT4Rec, repo_id: str, *, card: ModelCard | str | None = None, **options: Any) -> str:
    """Upload a model and its card, to a repository that is made if it is not there.

    Args:
        model: the recommender.
        repo_id: ``"name"`` or ``"organisation/name"``.
        card: the card; None: ``model_card(model)``.
        options: ``token``, ``private``, ``commit_message``, ``branch`` and ``create_pr``, as in ``huggingface_hub``.

    Returns:
        The address of the commit.

    Raises:
        TypeError: the model is no ``TTT4Rec``.
    """
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, card=card)
        return _upload(Path(folder), repo_id, **options)


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    device: str = "cpu",
) -> TTT4Rec:
    """Load a model of a folder, or of a repository on the Hub, in evaluation mode.

    Args:
        name: the folder if there is one, else a repository, ``"organisation/name"``.
        revision: branch, tag or commit; this and what follows are as in ``huggingface_hub``.
        token: for repositories that not all may read.
        cache_dir: where downloads are kept.
        force_download: whether to download what is there already.
        local_files_only: whether to take what was downloaded before, without asking.
        device: of the parameters.

    Raises:
        FileNotFoundError: there is no model in the folder or repository.
        ValueError: its files are damaged or belong to something else.
        OSError: the download failed.
    """
    folder = Path(name)
    if not folder.is_dir():
        found = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            allow_patterns=[*_MODEL_FILES],
        )
        folder = Path(found)
    return TTT4Rec.load(folder, device)


def model_card(
    model: TTT4Rec, *, dataset: str | None = None, metrics: dict[str, float] | None = None, **data: Any
) -> ModelCard:
    """What the Hub shows of a model: how to load it, its shape, and what it achieved.

    Args:
        model: the recommender.
        dataset: the name of what it was trained and tested on.
        metrics: what it achieved there, such as ``{"NDCG@10": 0.17}``.
        data: more of ``ModelCardData``, such as ``license`` and ``language``.

    Raises:
        ValueError: there are metrics without a data set.
    """
    if metrics and dataset is None:
        raise ValueError(f"dataset must be named that the metrics {', '.join(metrics)} were taken on; given None")
    name = data.pop("model_name", f"TTT4Rec, {model.config.mixer}")
    results = [
        EvalResult("sequential-recommendation", "recommendation", str(dataset), metric, value, metric_name=metric)
        for metric, value in (metrics or {}).items()
    ]
    tags = ["ttt4rec", "sequential-recommendation", "test-time-training", *data.pop("tags", [])]
    head = ModelCardData(library_name="ttt4rec", tags=tags, model_name=name, eval_results=results or None, **data)
    rows = [f"| {key} | {json.dumps(value)} |" for key, value in dataclasses.asdict(model.config).items()]
    reached = [f"| {metric} | {value:.4g} |" for metric, value in (metrics or {}).items()]
    parts = [f"---\n{head.to_yaml()}\n---\n", f"# {name}\n", _use(model)]
    if reached:
        parts.append("\n".join([f"## Results on {dataset}\n", "| metric | value |", "| --- | --- |", *reached, ""]))
    parts.append("\n".join(["## Shape\n", "| option | value |", "| --- | --- |", *rows, ""]))
    return ModelCard("\n".join(parts))


def _use(model: TTT4Rec) -> str:
    """What the model is, and a program that takes what it reads."""
    times = TIMES[model.config.times]
    lines = ["import torch", "from ttt4rec.hf import from_pretrained"]
    lines += ["from ttt4rec.models.event_times import gaps_of"] if times.gaps else []
    lines += ["", 'model = from_pretrained("this repository\'s name")']
    if model.hidden_item is not None:
        lines += ["history = torch.tensor([[1, 2, 3, 0]])  # 0 is what comes next, hidden"]
        lines += ["h = model(history, cu_seqlens=torch.tensor([0, 4]))[:, -1]"]
    elif times.gaps:
        lines += ["history, times = torch.tensor([[1, 2, 3]]), torch.tensor([[0, 60, 3600]])"]
        lines += ["h = model(history, gaps=gaps_of(times))[:, -1]"]
    else:
        lines += ["history = torch.tensor([[1, 2, 3]])", "h = model(history)[:, -1]"]
    lines += ["h = model.at_request(h, torch.tensor([60]))  # so long after the last event"] if times.query else []
    lines += ["scores, items = model.top_k(h, k=10)"]
    return _USE.format(times=" and times of events" if times.gaps else "", program="\n".join(lines))


_USE = """A sequential recommender whose layers learn while they read a history. It takes ids of items, from 1{times},
and gives scores of all items.

```python
{program}
```
"""


def _upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Upload a TTT4Rec model",
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    api = HfApi(token=token, library_name="ttt4rec")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if branch is not None:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=[*_MODEL_FILES, CARD_FILE],
        commit_message=commit_message,
        revision=branch,
        create_pr=create_pr,
    )
    return str(commit.commit_url)
