"""Training: one causal pass scores every position of a window; early stopping on validation NDCG@10."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttt4rec.atomic_files import checksum, locked, remove_partials, replacing
from ttt4rec.checks import check_integer
from ttt4rec.layers.ttt import TTTLayer
from ttt4rec.models.losses import Loss
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.options import TrainOptions
from ttt4rec.precision import flushes_denormals
from ttt4rec.recsys.data.interactions import TimeArray
from ttt4rec.recsys.data.split import Part, Split
from ttt4rec.recsys.data.windows import batches, training_windows
from ttt4rec.recsys.training import parallel
from ttt4rec.recsys.training.averaging import Average
from ttt4rec.recsys.training.callbacks import Callback, Callbacks, EpochReport, TrainingRun
from ttt4rec.recsys.training.checkpoint import UNTOLD, as_of_today, differences, load_checkpoint, save_checkpoint
from ttt4rec.recsys.training.evaluate import evaluate, packed
from ttt4rec.recsys.training.progress import progress_bar

METRICS_FILE, CHECKPOINT_FILE = "metrics.csv", "checkpoint.safetensors"


def fit(
    model: TTT4Rec,
    split: Split,
    folder: str | os.PathLike[str],
    options: TrainOptions | None = None,
    *,
    progress: bool = False,
    report: Callable[[EpochReport], None] | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[EpochReport]:
    """Train until validation NDCG@10 stops improving; leave the best weights in the model.

    Where ``torch.distributed`` is initialised, all its processes call this with the same arguments and train one model
    together: see ``parallel``. They end with the same weights. Only the first one reads and writes the folder, which
    the others need not see. Another number of processes may go on from a checkpoint.

    ``folder`` receives ``metrics.csv`` and ``checkpoint.safetensors``, the latter replaced atomically after every
    epoch. Called again on a folder that holds a checkpoint of the same run, training goes on from there and ends with
    the same numbers. The model is then as it was at the run's start, or as the last call left it.

    Args:
        model: trained in place, on the device it is on.
        split: histories and their parts.
        folder: created if missing.
        options: how to train.
        progress: show a progress bar.
        report: called after every epoch, in all processes.
        callbacks: follow the run, and may end it early: see ``callbacks.Callback``. Another call goes on after that.

    Returns:
        What happened in each epoch.

    Raises:
        ValueError: the folder's checkpoint is damaged or belongs to another run, another run is using the folder, there
            are no targets to train on or to validate, the model knows too few items, or training diverged. Of several
            processes: they have not joined, differ in what they were given, or are too many for the items.
        OSError: the folder cannot be written or the disk is full; the last checkpoint stays whole.
    """
    options = options or TrainOptions()
    folder = Path(folder)
    parallel.check_group()
    parallel.check_whole(model)
    if parallel.world_size() > 1:
        parallel.check_alike(_given(model, split, options))
    _check_data(model, split, options.exclude_seen)
    parallel.from_first(lambda: _prepare(folder))
    with _alone(folder):
        run = _Run(model, split, options, folder)
        with _followed(run, split, callbacks) as followers:
            return _fit(run, progress, report, followers)


@contextmanager
def _followed(run: _Run, split: Split, callbacks: Sequence[Callback]) -> Iterator[Callbacks]:
    """Tell of the run's start and end, the first process alone."""
    followers = Callbacks(callbacks)
    about = TrainingRun(run.model, split, run.options, run.folder, tuple(run.reports))
    try:
        parallel.from_first(lambda: followers.on_start(about))
        yield followers
    except BaseException as error:
        if parallel.rank() == 0:  # the others may be beyond reach
            followers.on_end(run.reports, error)
        raise
    parallel.from_first(lambda: followers.on_end(run.reports, None))


def _fit(
    run: _Run, progress: bool, report: Callable[[EpochReport], None] | None, followers: Callbacks
) -> list[EpochReport]:
    """Bring the run to its end."""
    model, options = run.model, run.options
    with (
        _deterministic(options.deterministic),
        _denormals_flushed(),
        torch.random.fork_rng([run.device] if run.device.type == "cuda" else []),
    ):
        torch.manual_seed(options.seed + (parallel.rank() << 20))  # of its 64 bits the CPU's generator takes 32
        run.restore_random_state()
        while not run.finished():
            with parallel.collected_after_errors(model):
                epoch = run.epoch(progress and parallel.rank() == 0)
                run.save()
                run.write_metrics()
            if report is not None:
                report(epoch)
            if parallel.from_first(partial(followers.on_epoch, epoch)):
                break
    model.load_state_dict(run.best_weights)
    parallel.collect(model)
    return run.reports


def _given(model: TTT4Rec, split: Split, options: TrainOptions) -> list[Any]:
    """What all processes must be given alike; initial weights are the first one's."""
    histories = split.histories
    arrays: list[TimeArray] = [
        *(histories.items, histories.offsets, split.train_begin, split.train_end, split.valid_end)
    ]
    arrays += [] if model.event_times is None else [histories.times]
    weights = [(name, list(x.shape), str(x.dtype), x.requires_grad) for name, x in model.named_parameters()]
    parts = [dataclasses.asdict(options), dataclasses.asdict(model.config), weights]
    features = model.features
    known = None if features is None else [features.as_json(), checksum(dict(features.named_buffers()))]
    return [*parts, histories.num_items, known, _digest(arrays)]


def _check_data(model: TTT4Rec, split: Split, exclude_seen: bool) -> None:
    parts: tuple[Part, ...] = ("train", "valid")
    for part in parts:
        if not split.num_targets(part):
            raise ValueError(f"the split must have targets to train on and to validate; given no {part} targets")
    if exclude_seen and not split.num_new_targets("valid"):
        raise ValueError(
            "validation targets must be new to their users for exclude_seen; given only items that they had before"
        )
    if model.config.num_items < split.histories.num_items:
        raise ValueError(
            f"the model must know at least the data's {split.histories.num_items} items; given {model.config.num_items}"
        )


def _prepare(folder: Path) -> None:
    """Make the folder; that it cannot be written is better known before the first epoch than after it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the first process does, and all of them learn if it cannot."""
    with locked(folder) if parallel.rank() == 0 else nullcontext(True) as free:
        if not parallel.from_first(lambda: free):
            raise ValueError(f"another run is using {folder}; wait for its end or choose another folder")
        if parallel.rank() == 0:
            remove_partials(folder)
        yield


class _Run:
    """The state of a training run, as it is checkpointed; taken up from the folder's checkpoint if there is one."""

    def __init__(self, model: TTT4Rec, split: Split, options: TrainOptions, folder: Path) -> None:
        self.model, self.options, self.folder = model, options, folder
        self.device = model.embedding.weight.device
        self.train_windows = training_windows(split, max_len=model.config.max_len)
        self.valid_windows = training_windows(split, max_len=model.config.max_len, part="valid")
        counts = torch.from_numpy(split.train_counts()).to(self.device)
        if model.features is not None:
            model.features.learn(counts)
        self.loss = Loss.make(
            options.loss,
            counts,
            num_negatives=options.num_negatives,
            popularity=options.popularity,
            calibration=options.calibration,
        )
        # of the first one's weights, which ``distribute`` gives to all
        self.initial: str = parallel.from_first(lambda: checksum(model.state_dict()))
        progress, tensors = self._read()  # while the model is as it was, in case the checkpoint is another run's
        parallel.distribute(model)
        # the item table, of several processes a DTensor, in a group of its own: no fused operator mixes it with others
        parts = _parts(model)
        self.parameters = {name: p for part in parts for name, p in part.items()}
        decays = (options.weight_decay, options.weight_decay, 0.0)
        groups = [
            {"params": [*part.values()], "weight_decay": decay} for part, decay in zip(parts, decays, strict=True)
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.learning_rate, fused=True)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.reports: list[EpochReport] = []
        self.steps = 0
        self.average = Average(self.parameters, options.average_over) if options.average_over else None
        self.best_weights = _copy(model)
        self.random_state: dict[str, Tensor] = {}
        if progress is not None:
            with parallel.collected_after_errors(model):
                self._take_up(progress, tensors)

    def finished(self) -> bool:
        """Whether all epochs are done or the last ``patience`` brought nothing better."""
        done = len(self.reports)
        return done >= self.options.epochs or (done > 0 and done - 1 - self._best() >= self.options.patience)

    def _best(self) -> int:
        return max(range(len(self.reports)), key=lambda i: self.reports[i].metrics["NDCG@10"])

    def epoch(self, progress: bool) -> EpochReport:
        """Train on every target once, then validate."""
        begin = time.perf_counter()
        loss = self._train_epoch(progress)
        middle = time.perf_counter()
        with nullcontext() if self.average is None else self.average.in_place():
            metrics = self._validate(progress)
            end = time.perf_counter()
            self.reports.append(EpochReport(len(self.reports), loss, middle - begin, end - middle, metrics))
            if self._best() == len(self.reports) - 1:
                self.best_weights = _copy(self.model)
        return self.reports[-1]

    def _validate(self, progress: bool) -> dict[str, float]:
        exclude_seen = self.options.exclude_seen
        with parallel.collected(self.model):
            return evaluate(self.model, self.valid_windows, exclude_seen=exclude_seen, shared=True, progress=progress)

    def _train_epoch(self, progress: bool) -> float:
        windows = self.train_windows
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        plan = list(batches(windows, targets_per_batch=self.options.targets_per_batch, generator=self.generator))
        with progress_bar(total=len(plan), unit="step", desc=f"epoch {len(self.reports)}", enabled=progress) as bar:
            for indices in plan:
                total += self._step(indices)
                bar.update()
        self._set_inner_lr_scale(1.0)  # what is validated and kept is the model as it will be used
        mean = float(total) / windows.num_targets
        if not math.isfinite(mean):
            raise ValueError(
                f"training diverged: the loss of epoch {len(self.reports)} is {mean}; lower the learning rate, "
                "warm up the inner rates or bound them with max_inner_step"
            )
        return mean

    def _step(self, indices: Tensor) -> Tensor:
        """One update by the mean loss of some windows' targets; returns its sum."""
        warmup = self.options.inner_lr_warmup
        self._set_inner_lr_scale(self.steps / warmup if self.steps < warmup else 1.0)
        count = int(self.train_windows.targets_per_window[indices].sum())
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimizer.zero_grad()
        for piece in indices.tensor_split(min(self.options.accumulate, len(indices))):
            own, counts = parallel.share(piece)
            batch = packed(self.model, self.train_windows, own)
            with parallel.scoring(), self.model.one_item_table():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
                    hidden, items = self.model.predict(*batch)
                    # 1, but for BERT4Rec, which predicts some of the targets, and for a process without a part
                    weight = counts * batch[1].count_nonzero() / len(items)
                    loss = self.loss(self.model, hidden, items) * weight
                (loss / count).backward()
            total += loss.detach()
        parallel.add_up_gradients(self.model)
        parallel.clip_gradients(self.model, self.options.clip_norm)
        rising = min(1.0, (self.steps + 1) / max(1, self.options.learning_rate_warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * rising
        self.optimizer.step()
        self.steps += 1
        if self.average is not None:
            self.average.add(self.steps)
        return parallel.add_up(total)

    def _set_inner_lr_scale(self, scale: float) -> None:
        for module in self.model.modules():
            if isinstance(module, TTTLayer):
                module.set_inner_lr_scale(scale)

    def save(self) -> None:
        """Write everything that the rest of the run depends on; the first process does."""
        parts = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        parts |= {f"best.{name}": x for name, x in self.best_weights.items()}
        if self.average is not None:
            parts |= {f"average.{name}": x for name, x in self.average.values.items()}
        names = list(self.parameters)
        for index, slots in self.optimizer.state_dict()["state"].items():
            parts |= {f"adam.{slot}.{names[index]}": x for slot, x in slots.items()}
        tensors = {}
        for name, x in parts.items():  # one after the other: together they may be more than a GPU holds
            one = parallel.whole(x)
            if parallel.rank() == 0:
                tensors[name] = one.cpu()
        tensors |= {"random.global": parallel.gather(torch.get_rng_state())}
        tensors |= {"random.batches": self.generator.get_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = parallel.gather(torch.cuda.get_rng_state(self.device))
        progress = {
            "steps": self.steps,
            "reports": [dataclasses.asdict(r) for r in self.reports],
            "run": self._identity(),
        }
        parallel.from_first(lambda: save_checkpoint(self.folder / CHECKPOINT_FILE, tensors, progress))

    def write_metrics(self) -> None:
        """Write the reports so far; the first process does."""
        parallel.from_first(self._write_metrics)

    def _write_metrics(self) -> None:
        with replacing(self.folder / METRICS_FILE) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.reports[0].row()))
            writer.writeheader()
            writer.writerows(report.row() for report in self.reports)

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """What ``save`` wrote, if it did: its progress and, in the first process, its tensors."""
        path, tensors = self.folder / CHECKPOINT_FILE, dict[str, Tensor]()

        def read() -> dict[str, Any] | None:
            if not path.exists():
                return None
            loaded, progress = load_checkpoint(path)
            best = {name.removeprefix("best."): x for name, x in loaded.items() if name.startswith("best.")}
            run = as_of_today(progress.get("run"))
            if isinstance(run, dict) and self.initial == checksum(best):  # the model as this run's last call left it
                self.initial = str(run.get("initial"))
            if run != self._identity():
                found = "; ".join(differences(run, self._identity()))
                raise ValueError(
                    f"{path} must be this run's to go on from it; given another's: {found}; choose another folder, or "
                    "delete the file to begin again"
                )
            tensors.update(loaded)
            return progress

        return parallel.from_first(read), tensors

    def _take_up(self, progress: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        try:
            self._take(parallel.hand_out(tensors, self.parameters), progress)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.folder / CHECKPOINT_FILE} is damaged: {str(error).splitlines()[0]}") from error
        self.write_metrics()  # the interruption may have come just before this

    def _take(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "average": {}, "adam": {}, "random": {}}
        for name, x in tensors.items():
            group, _, rest = name.partition(".")
            groups[group][rest] = x
        for group in ("best", "model"):  # the best ones only to see that they fit
            self.model.load_state_dict(groups[group])
        self.best_weights = groups["best"]
        if self.average is not None:
            self.average.restore(groups["average"])
        self._restore_optimizer(groups["adam"])
        self.random_state = groups["random"]
        self.steps = progress["steps"]
        self.reports = [EpochReport(**entry) for entry in progress["reports"]]
        if not self.reports:
            raise ValueError("it has no report of an epoch")
        check_integer("steps", self.steps)
        self._best()  # that each has what it is compared by

    def restore_random_state(self) -> None:
        """Put back the random states of the checkpoint, if there was one and this process had a part in it."""
        if not self.random_state:
            return
        self.generator.set_state(self.random_state["batches"])
        rank = parallel.rank()  # below, copies: torch reads a state from the start of a view's storage
        if rank < len(self.random_state["global"]):
            torch.set_rng_state(self.random_state["global"][rank].clone())
        if self.device.type == "cuda" and rank < len(self.random_state.get("cuda", ())):
            torch.cuda.set_rng_state(self.random_state["cuda"][rank].clone(), self.device)

    def _restore_optimizer(self, slots: dict[str, Tensor]) -> None:
        state = self.optimizer.state_dict()
        names = list(self.parameters)
        for key, x in slots.items():
            slot, _, name = key.partition(".")
            state["state"].setdefault(names.index(name), {})[slot] = x
        self.optimizer.load_state_dict(state)

    def _identity(self) -> dict[str, Any]:
        """What must agree for a checkpoint to be this run's; the number of epochs and the patience may change."""
        options = dataclasses.asdict(self.options)
        for name in UNTOLD:
            del options[name]
        both = (self.train_windows, self.valid_windows)
        of_data = [[w.items, w.starts, w.lengths, w.leading] for w in both]
        if self.model.event_times is not None:
            of_data = [[*x, w.times] for x, w in zip(of_data, both, strict=True) if w.times is not None]
        data = [_digest(x.numpy() for x in tensors) for tensors in of_data]
        identity = {
            "options": options,
            "config": dataclasses.asdict(self.model.config),
            "data": data,
            "initial": self.initial,
        }
        features = self.model.features  # the encoded ones are among the weights
        return identity if features is None else identity | {"features": features.fingerprints()}


def _digest(arrays: Iterable[TimeArray]) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(x.tobytes())
    return digest.hexdigest()


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    """Torch's deterministic mode for a while."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error" if enabled else before)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Numbers too small to be normal count as zero for a while: a CPU takes many times as long for them.

    Gradients of scores that a loss has pushed far down are denormal; gBCE's made a step four times as long.
    """
    before = flushes_denormals()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _parts(model: TTT4Rec) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters by name: the items; weights of linear maps and of features; all others, which do not decay."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)}
    others = {name: p for name, p in model.named_parameters() if name != "embedding.weight"}
    return (
        {"embedding.weight": model.embedding.weight},
        {name: p for name, p in others.items() if id(p) in linear},
        {name: p for name, p in others.items() if id(p) not in linear},
    )


def _copy(model: TTT4Rec) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}
