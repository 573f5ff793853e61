"""A run on the terminal: what begins, a line for each epoch, and how long it may take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ttt4rec.inner_models import INNER_MODELS
from ttt4rec.layers.ttt import TTTLayer
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.operators.backends import effective_backend
from ttt4rec.recsys.training.callbacks import Callback, EpochReport, TrainingRun

_SHOWN = ("HR@10", "NDCG@10")
_KEPT_BY = "NDCG@10"


class Console(Callback):
    """Prints what begins and a line for each epoch to stdout."""

    def __init__(self) -> None:
        self._reports = list[EpochReport]()
        self._epochs = self._patience = 0

    def on_start(self, run: TrainingRun) -> None:
        """Print what is trained, where, and for how long at most."""
        options = run.options
        self._reports, self._epochs, self._patience = [*run.reports], options.epochs, options.patience
        parameters = sum(p.numel() for p in run.model.parameters())
        steps = -(-run.split.num_targets("train") // options.targets_per_batch)
        print(f"model: {describe_model(run.model)}, {parameters:,} parameters, on {_device(run.model)}")
        print(
            f"at most {counted(options.epochs, 'epoch')} of about {counted(steps, 'step')}; "
            f"ends after {options.patience} without a better validation {_KEPT_BY}",
            flush=True,
        )
        if run.reports:
            print(f"going on from the checkpoint in {run.folder}, {len(run.reports)} epochs are done", flush=True)

    def on_epoch(self, report: EpochReport) -> None:
        """Print the epoch."""
        self._reports.append(report)
        best = best_of(self._reports)
        valid = "  ".join(f"{name} {report.metrics[name]:.4f}" for name in _SHOWN)
        mark = "best so far" if best is report else f"best was epoch {best.epoch}"
        seconds = f"train {report.train_seconds:.1f} s  valid {report.valid_seconds:.1f} s"
        numbers = f"epoch {report.epoch:3d}  loss {report.loss:.4f}  valid {valid}  {seconds}"
        print(f"{numbers}  {mark}{self._left(best)}", flush=True)

    def _left(self, best: EpochReport) -> str:
        """How long it still takes if no epoch is better any more, and at most."""
        done = len(self._reports)
        most = self._epochs - done
        least = min(most, self._patience - (self._reports[-1].epoch - best.epoch))
        if least <= 0:
            return ""
        seconds = [x.train_seconds + x.valid_seconds for x in self._reports[-3:]]
        each = sum(seconds) / len(seconds)
        first, last = duration(least * each), duration(most * each)
        return f"  {last} left" if first == last else f"  {first} to {last} left"


def describe_model(model: TTT4Rec) -> str:
    """The sequence layer of a model, its sizes and, of a TTT layer, what computes it."""
    config = model.config
    sizes = f"width {config.width}, {counted(config.num_blocks, 'block')}"
    layer = next((module for module in model.modules() if isinstance(module, TTTLayer)), None)
    if layer is None:
        return f"{config.mixer}, {sizes}"
    inner = INNER_MODELS[layer.inner]
    weights = [getattr(layer, name) for name in inner.weights]
    sizes_of_layer = (layer.head_dim, layer.mini_batch_size, layer.inner, inner.hidden(weights))
    backend = effective_backend(layer.backend, weights[0], *sizes_of_layer)
    return f"{config.mixer} ({layer.inner}, backend {backend}), {sizes}"


def _device(model: TTT4Rec) -> str:
    device = model.embedding.weight.device
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({counted(torch.get_num_threads(), 'thread')})"


def counted(count: int, what: str) -> str:
    """A number of things, which are one or several."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it: below 1 s, 40 s, 5 min, 3.2 h."""
    if seconds < 1:
        return "below 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def best_of(reports: Sequence[EpochReport]) -> EpochReport:
    """The epoch whose weights are kept."""
    return max(reports, key=lambda report: report.metrics[_KEPT_BY])
