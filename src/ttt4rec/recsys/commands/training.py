"""What ``ttt4rec train`` does."""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from ttt4rec.atomic_files import write_json
from ttt4rec.checks import printable
from ttt4rec.malloc import keep_freed_memory
from ttt4rec.models.config import TTT4RecConfig
from ttt4rec.models.presets import PRESETS
from ttt4rec.models.ttt4rec import TTT4Rec
from ttt4rec.options import DataOptions, TrainOptions
from ttt4rec.recsys.commands.arguments import chosen, device_of
from ttt4rec.recsys.commands.evaluating import shown
from ttt4rec.recsys.commands.splitting import ratios_of, split_as_asked
from ttt4rec.recsys.data import Interactions, keep_item_codes
from ttt4rec.recsys.data.datasets import NAMED, load_interactions
from ttt4rec.recsys.data.feature_table import FeatureTable, read_item_features
from ttt4rec.recsys.data.item_features import item_features
from ttt4rec.recsys.data.public import PUBLIC
from ttt4rec.recsys.data.split import PARTS, Split
from ttt4rec.recsys.data.text import DataError
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.recommend.new_items import feature_names, take_features, with_new_items
from ttt4rec.recsys.training import parallel
from ttt4rec.recsys.training.callbacks import Callbacks
from ttt4rec.recsys.training.console import Console, best_of, counted
from ttt4rec.recsys.training.evaluate import evaluate as evaluate_windows
from ttt4rec.recsys.training.report import RUN_FILE, describe_data, write_card, write_report
from ttt4rec.recsys.training.track import tracker
from ttt4rec.recsys.training.train import METRICS_FILE, fit
from ttt4rec.settings import check_effects, of_preset

_FEW_STEPS = 50  # in an epoch
_NO_SETTINGS = (
    *("command", "device", "threads", "log_level", "track"),
    *("config", "given", "chosen", "read", "is_record"),
)
"""Arguments that say nothing of what was trained."""


def train(args: Namespace) -> None:
    """Read, filter and split the data, train, rank the test targets, write the folder, show an example."""
    with parallel.processes(device_of(args)) as device:
        _train(args, device)


def _train(args: Namespace, device: str) -> None:
    ratios = ratios_of(args.split)
    _take_preset(args)
    check_effects(args.chosen, of_preset(args.given, vars(args)), NAMED)
    options = TrainOptions(**chosen(args, TrainOptions))
    interactions = load_interactions(args.data, **chosen(args, DataOptions))
    split, cuts = split_as_asked(interactions, args, ratios)
    trained = Recommender.load(args.warm_start, device) if args.warm_start else None
    if trained is not None:
        split = dataclasses.replace(split, histories=keep_item_codes(split.histories, trained.histories.item_ids))
    histories = split.histories
    for part in PARTS:
        if not split.num_targets(part):
            raise DataError(
                f"--split-by {args.split_by} --split {args.split} must leave targets for each of the three parts; "
                f"given no {part} targets"
            )
    options = _of_preset(args, options, split.num_targets("train"))
    config = _model_config(args, histories.num_items, trained)
    if args.row_order and config.times != "none":
        raise ValueError(
            f"--row-order must be left out with --times {config.times}, since the model reads times; given it; name "
            "their column by --time-field"
        )
    table = _feature_table(args, trained)
    features = None if table is None or trained is not None else item_features(table, split)
    _describe(interactions, split, args)
    _advise(args, options, split.num_targets("train"))
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        model = (
            trained.model.with_items(histories.num_items) if trained else TTT4Rec(config, features=features).to(device)
        )
    if table is not None:
        print(take_features(model, table, histories), flush=True)
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out must be a folder; given the file {folder}")
    progress = sys.stderr.isatty() and parallel.rank() == 0
    if device == "cpu":
        keep_freed_memory()
    settings = {name: value for name, value in vars(args).items() if name not in _NO_SETTINGS}
    callbacks = [Console(), *(tracker(name, settings) for name in args.track)]
    reports = fit(model, split, folder, options, progress=progress, callbacks=callbacks)
    if table is not None:
        count = histories.num_items
        model, histories = with_new_items(model, histories, table, leave_out=True)
        if more := histories.num_items - count:
            print(f"{more:,} items of {args.item_features} without an interaction are offered by their features")
    windows = evaluation_prefixes(split, "test", max_len=model.config.max_len)
    metrics = evaluate_windows(model, windows, exclude_seen=args.exclude_seen, shared=True, progress=progress)
    if parallel.rank():
        return
    print(f"best of {counted(len(reports), 'epoch')}: {best_of(reports).epoch}")
    recommender = Recommender(model, histories)
    recommender.save(folder)
    settings |= {name: getattr(model.config, name) for name in chosen(args, TTT4RecConfig)}
    about = {"settings": settings, "processes": parallel.world_size(), "data": describe_data(split), "cuts": cuts}
    about |= {"test": metrics}
    write_json(folder / RUN_FILE, about, [METRICS_FILE])
    write_report([folder], folder)
    write_card(folder, recommender, about)
    print(f"test  {shown(metrics)}")
    _show_example(recommender)
    print(f"model in {folder}", flush=True)
    Callbacks(callbacks).on_test(metrics)


def _take_preset(args: Namespace) -> None:
    """Give arguments that were left out the values of the preset, if there is one: of the model and of the data."""
    if args.preset is None:
        return
    preset = PRESETS[args.preset]
    values = dict(preset.model)
    if preset.as_published and args.data in PUBLIC:
        values |= {"min_user": PUBLIC[args.data].min_user, "max_len": PUBLIC[args.data].max_len}
    for name in values.keys() - set(args.given):
        setattr(args, name, values[name])


def _of_preset(args: Namespace, options: TrainOptions, num_targets: int) -> TrainOptions:
    """The options, those that were left out of the preset, if there is one; the arguments then say them too."""
    if args.preset is None:
        return options
    given = {name: value for name, value in dataclasses.asdict(options).items() if name in args.given}
    options = TrainOptions.from_preset(args.preset, num_targets, **given)
    vars(args).update(dataclasses.asdict(options))
    return options


def _feature_table(args: Namespace, trained: Recommender | None) -> FeatureTable | None:
    """What is known of items, if a file is given."""
    if args.item_features is None:
        return None
    if trained is not None and trained.model.features is None:
        raise ValueError(
            f"--item-features must be left out, as in {args.warm_start}, whose model --warm-start goes on with; given "
            f"{args.item_features}; train without --warm-start to learn from features"
        )
    columns = args.feature_columns or (None if trained is None else feature_names(trained.model))
    return read_item_features(args.item_features, item_field=args.item_field, columns=columns, encoding=args.encoding)


def _model_config(args: Namespace, num_items: int, trained: Recommender | None) -> TTT4RecConfig:
    """The shape that the arguments name or, after a warm start, the trained model's, which they may not contradict."""
    shape = chosen(args, TTT4RecConfig)
    if trained is None:
        return TTT4RecConfig(num_items=num_items, **shape)
    config = dataclasses.replace(trained.model.config, num_items=num_items)
    other = {name: getattr(args, name) for name in dict.fromkeys(args.given) if name in shape}
    other = {name: given for name, given in other.items() if given != getattr(config, name)}
    if other:
        wanted = ", ".join(f"--{name.replace('_', '-')} must be left out or {getattr(config, name)}" for name in other)
        raise ValueError(
            f"{wanted}, as in {args.warm_start}, with whose shape --warm-start goes on; "
            f"given {', '.join(map(str, other.values()))}"
        )
    return config


def _describe(interactions: Interactions, split: Split, args: Namespace) -> None:
    """What was read, how much of it the filter has left out, and what is left."""
    histories = split.histories
    parts = " / ".join(f"{split.num_targets(part):,}" for part in PARTS)
    kept = {
        "users": (int((np.diff(histories.offsets) > 0).sum()), len(interactions.user_ids)),
        "items": (len(np.unique(histories.items)), len(interactions.item_ids)),
        "interactions": (len(histories.items), len(interactions)),
    }
    lost = ", ".join(f"{of - left:,} of {of:,} {name}" for name, (left, of) in kept.items() if of > left)
    if lost:
        print(f"left out by --min-user {args.min_user} and --min-item {args.min_item}: {lost}")
    print(f"{histories.num_users:,} users, {histories.num_items:,} items, {len(histories.items):,} interactions")
    print(f"{parts} train / valid / test targets", flush=True)


def _advise(args: Namespace, options: TrainOptions, num_targets: int) -> None:
    """Say so if an epoch has few steps, which nobody asked for: three of these epochs show next to nothing."""
    steps = -(-num_targets // options.targets_per_batch)
    if args.preset is None and "targets_per_batch" not in args.given and steps < _FEW_STEPS:
        advice = "--preset best or --targets-per-batch N makes smaller ones, which learn in fewer epochs"
        print(f"an epoch has about {counted(steps, 'step')}: {advice}", file=sys.stderr)


def _show_example(recommender: Recommender) -> None:
    histories = recommender.histories
    user = histories.user_ids[0]
    last = ", ".join(printable(str(histories.item_ids[code - 1])) for code in histories.history(0)[-5:])
    best = ", ".join(printable(str(item)) for item, _ in recommender.recommend(user, k=5).items)
    print(f"user {printable(str(user))}, whose last items are {last}: next {best or 'none, all items are seen'}")
