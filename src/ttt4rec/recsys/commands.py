"""What the commands of ``ttt4rec.cli`` do with their parsed arguments."""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt4rec.atomic_files import read_json, write_json
from ttt4rec.checks import printable
from ttt4rec.extras import require
from ttt4rec.malloc import keep_freed_memory
from ttt4rec.models.presets import PRESETS
from ttt4rec.models.ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.options import DataOptions, ServeOptions, TrainOptions
from ttt4rec.recsys.data import Histories, Id, Interactions, build_histories, filter_k_core, keep_item_codes
from ttt4rec.recsys.data.datasets import NAMED, load_interactions
from ttt4rec.recsys.data.feature_table import FeatureTable, read_item_features
from ttt4rec.recsys.data.item_features import item_features
from ttt4rec.recsys.data.public import PUBLIC
from ttt4rec.recsys.data.split import PARTS, Split, split_at, split_by_ratio, split_by_time, split_leave_one_out
from ttt4rec.recsys.data.text import DataError, TextFile
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recommend import Recommender, offers
from ttt4rec.recsys.recommend.new_items import feature_names, take_features, with_new_items
from ttt4rec.recsys.recommend.rerank import MaximalMarginalRelevance
from ttt4rec.recsys.recommend.titles import read_titles
from ttt4rec.recsys.training import parallel
from ttt4rec.recsys.training.console import Console, best_of
from ttt4rec.recsys.training.evaluate import evaluate as evaluate_windows
from ttt4rec.recsys.training.evaluate import evaluate_with_intervals
from ttt4rec.recsys.training.intervals import Estimate
from ttt4rec.recsys.training.lists import evaluate_lists
from ttt4rec.recsys.training.progress import progress_bar
from ttt4rec.recsys.training.report import RUN_FILE, describe_data, write_card, write_report
from ttt4rec.recsys.training.segments import SEGMENTATIONS, Segment, evaluate_segments
from ttt4rec.recsys.training.track import tracker
from ttt4rec.recsys.training.train import METRICS_FILE, fit
from ttt4rec.settings import check_effects, of_preset

_MOST_THREADS = 1024  # the OpenMP library ends the process when it cannot start as many as it was told
_FEW_STEPS = 50  # in an epoch
_ASKED_AT_ONCE = 4096
_NAMED = 5  # unknown users
_NO_SETTINGS = (
    *("command", "device", "threads", "log_level", "track"),
    *("config", "given", "chosen", "read", "is_record"),
)
"""Arguments that say nothing of what was trained."""


def train(args: Namespace) -> None:
    """Read, filter and split the data, train, rank the test targets, write the folder, show an example."""
    with parallel.processes(_machine(args)) as device:
        _train(args, device)


def _train(args: Namespace, device: str) -> None:
    ratios = _ratios(args.split)
    _take_preset(args)
    check_effects(args.chosen, of_preset(args.given, vars(args)), NAMED)
    options = TrainOptions(**_chosen(args, TrainOptions))
    interactions = load_interactions(args.data, **_chosen(args, DataOptions))
    split, cuts = _split(interactions, args, ratios)
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
    print(f"best of {len(reports)} epochs: {best_of(reports).epoch}")
    recommender = Recommender(model, histories)
    recommender.save(folder)
    settings |= {name: getattr(model.config, name) for name in _chosen(args, TTT4RecConfig)}
    about = {"settings": settings, "processes": parallel.world_size(), "data": describe_data(split), "cuts": cuts}
    about |= {"test": metrics}
    write_json(folder / RUN_FILE, about, [METRICS_FILE])
    write_report([folder], folder)
    write_card(folder, recommender, about)
    print(f"test  {_format(metrics)}")
    _show_example(recommender)
    print(f"model in {folder}")


def evaluate(args: Namespace) -> None:
    """Rank the targets of a part by the protocol of the paper."""
    device = _machine(args)
    run = _trained(Path(args.folder))
    recommender = Recommender.load(args.folder, device)
    split = _split_again(recommender.histories, *run)
    if args.include_seen and not args.lists:
        raise ValueError("--include-seen must come with --lists; without it, only --exclude-seen leaves out seen items")
    if args.lists and args.segments is not None:
        raise ValueError("--segments must come without --lists, whose metrics are of users, not of targets")
    asked: dict[str, Any] = {"cutoffs": args.cutoffs, "progress": sys.stderr.isatty()}
    if args.lists:
        _print_estimates(
            evaluate_lists(recommender, split, args.part, exclude_seen=not args.include_seen, **asked), args.json
        )
        return
    windows = evaluation_prefixes(split, args.part, max_len=recommender.model.config.max_len)
    asked["exclude_seen"] = args.exclude_seen
    if args.segments is not None:
        by = {name: SEGMENTATIONS[name] for name in args.segments or SEGMENTATIONS}
        asked["samples"] = 1000 if args.intervals else 0
        _print_segments(evaluate_segments(recommender.model, split, args.part, by=by, **asked), args.json)
        return
    if args.intervals:
        _print_estimates(evaluate_with_intervals(recommender.model, windows, **asked), args.json)
        return
    metrics = evaluate_windows(recommender.model, windows, **asked)
    print(json.dumps(metrics, indent=2) if args.json else f"{args.part}  {_format(metrics)}")


def _print_segments(segments: Sequence[Segment], as_json: bool) -> None:
    if as_json:
        print(json.dumps([dataclasses.asdict(segment) for segment in segments], indent=2))
        return
    names = [name for name in segments[0].metrics if not name.startswith("MRR")]
    rows = [["by", "segment", "users", "targets", *names]]
    for x in segments:
        numbers = [_with_interval(x.metrics[name]) for name in names]
        rows.append([x.by, x.name, f"{x.users:,}", f"{x.targets:,}", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(n) if place < 2 else cell.rjust(n)
            for place, (cell, n) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells))


def _with_interval(metric: Estimate) -> str:
    interval = "" if metric.low is None else f"  [{metric.low:.4f}, {metric.high:.4f}]"
    return f"{metric.value:.4f}{interval}"


def _print_estimates(found: Mapping[str, Estimate], as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: dataclasses.asdict(metric) for name, metric in found.items()}, indent=2))
        return
    for name, metric in found.items():
        print(f"{name:14}  {_with_interval(metric)}")


def recommend(args: Namespace) -> None:
    """Print the best items for a user or a history, or write those for many."""
    if args.json and args.out is not None:
        raise ValueError("--json must come without --out, whose suffix says what is written")
    recommender = Recommender.load(args.folder, _machine(args))
    titles = _titles(args)
    wanted: dict[str, Any] = {name: getattr(args, name) for name in ("k", "min_score", "popular")}
    wanted["exclude_seen"] = not args.include_seen
    wanted |= {name: _ids_in(Path(getattr(args, name))) for name in ("allow", "deny") if getattr(args, name)}
    if args.diversity:
        wanted["rerank"] = MaximalMarginalRelevance(recommender.model.served_items(), args.diversity)
    if args.history is not None:
        _check_ids(recommender, args.history)
    if args.out is not None or args.user is args.history is None:
        _recommend_many(recommender, args, wanted, titles)
        return
    result = recommender.recommend(args.user, args.history, **wanted)
    if args.json:
        print(json.dumps(offers.as_json(result, titles), indent=2))
    else:
        _print_items(result.items, titles)
        if result.source == "popular":
            print("popular of late, as there is no history with a known item", file=sys.stderr)
    if not result.items:
        print(f"nothing to recommend: {_no_item_left(args)}", file=sys.stderr)
    if result.unknown:
        print(f"not in the catalogue, left out: {', '.join(map(printable, map(str, result.unknown)))}", file=sys.stderr)


def _check_ids(recommender: Recommender, history: list[str]) -> None:
    """Refuse several ids in one word, which nobody would notice where the word alone is unknown."""

    def is_known(item: str) -> bool:
        return len(recommender.histories.item_codes([item])[0]) > 0

    for word in history:
        parts = [part.strip() for part in word.split(",")]
        if len(parts) > 1 and not is_known(word) and any(map(is_known, parts)):
            raise DataError(f"--history must have ids between blanks; given {word!r}: write {' '.join(parts)}")


def _no_item_left(args: Namespace) -> str:
    """Which of the options given or left out may have kept all items from one who has a history."""
    kept = [f"--{name.replace('_', '-')}" for name in ("allow", "deny", "min_score") if getattr(args, name) is not None]
    reasons = [] if args.include_seen else ["all items are in the history (--include-seen offers them too)"]
    return ", or ".join([*reasons, *([f"{' and '.join(kept)} leave none"] if kept else [])])


def similar(args: Namespace) -> None:
    """Print the items most like one."""
    recommender = Recommender.load(args.folder)
    titles = _titles(args)
    _print_items(recommender.similar_items(args.item, k=args.k), titles)


def _titles(args: Namespace) -> Mapping[str, str] | None:
    if args.titles is not None:
        return read_titles(Path(args.titles), args.encoding)
    if args.encoding != "utf-8":
        raise ValueError(f"--encoding must come with the --titles that it is of; given {args.encoding!r} alone")
    return None


def add_items(args: Namespace) -> None:
    """Let a model take new items by their features, in its folder."""
    recommender = Recommender.load(args.folder)
    field = args.item_field or _trained_item_field(Path(args.folder))
    larger = recommender.add_items(args.features, item_field=field, encoding=args.encoding)
    count = larger.histories.num_items - recommender.histories.num_items
    if count:
        larger.save(args.folder)
    print(f"{count:,} new items of {args.features} in {args.folder}, which offers {larger.histories.num_items:,}")


def _trained_item_field(folder: Path) -> str:
    """What the column of item ids was called where ``train`` wrote the folder; from Python there is no record of it."""
    path = folder / RUN_FILE
    default = DataOptions().item_field
    if not path.is_file():
        return default
    try:
        return str(read_json(path)["settings"].get("item_field", default))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged; it must hold the settings of a training run ({error})") from error


def _print_items(items: list[tuple[Id, float]], titles: Mapping[str, str] | None) -> None:
    for rank, (item, score) in enumerate(items, start=1):
        title = "" if titles is None else f"  {printable(titles.get(str(item), ''))}"
        print(f"{rank:3d}  {printable(str(item))}  {score:.4f}{title}".rstrip())


def report(args: Namespace) -> None:
    """Write a report of several runs together."""
    print(f"report in {write_report(args.folders, args.out)}")


def serve(args: Namespace) -> None:
    """Take events and recommend over HTTP until the process is told to end."""
    require("ttt4rec serve", "httptools", "prometheus_client", "pydantic", "uvicorn")
    from ttt4rec.recsys.serving import command  # after the others, since it needs these packages

    command.serve(Path(args.folder), ServeOptions(**_chosen(args, ServeOptions)))


def _recommend_many(
    recommender: Recommender, args: Namespace, wanted: dict[str, Any], titles: Mapping[str, str] | None
) -> None:
    """A line of JSON for each user or history, or rows of a file."""
    total, sources, unserved = 0, 0, 0
    strangers = list[Id]()
    out = None if args.out is None else Path(args.out)
    everyone = len(recommender.histories.user_ids) if args.all_users else 0
    by_history = args.histories is not None or args.history is not None
    with (
        offers.sink(out, titles, named=not by_history) as write,
        progress_bar(
            total=everyone, unit="user", desc="recommend", enabled=out is not None and sys.stderr.isatty()
        ) as bar,
    ):
        for chunk in _asked(recommender, args):
            if by_history:
                results = recommender.recommend_batch([history for _, history in chunk], **wanted)
            else:
                results = recommender.recommend(users=[user for user, _ in chunk], **wanted)
                strangers += [user for user, _ in chunk if recommender.histories.find_user(user) is None]
            write([user for user, _ in chunk], results)
            bar.update(len(chunk))
            total += len(chunk)
            sources += sum(result.source == "popular" for result in results)
            unserved += sum(not result.items for result in results)
        if not total and not args.all_users:  # here, where no file is written
            what = "user" if args.users else "history"
            raise DataError(f"{args.users or args.histories} must have at least one {what}; given an empty file")
    if strangers:  # a user id may hold what moves a cursor
        shown = printable(", ".join(map(str, strangers[:_NAMED])), 200) + (", ..." if len(strangers) > _NAMED else "")
        print(f"unknown users, {len(strangers):,} of {total:,}: {shown}", file=sys.stderr)
    if out is not None:
        print(f"recommendations for {total - unserved:,} of {total:,} in {out}")
    if sources:
        print(f"what is popular of late for {sources:,}, who have no history with a known item", file=sys.stderr)
    if unserved and out is not None:
        reason = "no item was left, or no history with a known item; --popular serves the latter"
        print(f"nothing for {unserved:,}: {reason}", file=sys.stderr)


def _asked(recommender: Recommender, args: Namespace) -> Iterator[list[tuple[Id, list[str]]]]:
    """Who asks, some at a time: users, or numbers of histories and the histories."""
    if args.all_users:
        ids = recommender.histories.user_ids
        for start in range(0, len(ids), _ASKED_AT_ONCE):
            yield [(user, []) for user in ids[start : start + _ASKED_AT_ONCE]]
    elif args.user is not None:
        yield [(args.user, [])]
    elif args.history is not None:
        yield [(1, args.history)]
    else:
        number = 1
        for lines in _lines_of(Path(args.users or args.histories)):
            if args.users is not None:
                yield [(user, []) for line in lines if (user := line.strip())]
            else:
                yield [(number + place, _history(line)) for place, line in enumerate(lines)]
            number += len(lines)


def _ids_in(path: Path) -> list[str]:
    """Ids of a file, one a line."""
    return [name for lines in _lines_of(path) for line in lines if (name := line.strip())]


def _lines_of(path: Path) -> Iterator[list[str]]:
    """Lines of a text file, some at a time."""
    try:
        with TextFile(path) as text:
            while lines := list(text.some(text.lines, _ASKED_AT_ONCE)):
                yield lines
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be UTF-8 text; given the byte {error.object[error.start]:#04x}") from error


def _history(line: str) -> list[str]:
    """Item ids, separated by blanks or, where they hold blanks themselves, a JSON array of strings or whole numbers."""
    try:
        ids = json.loads(line)
    except (ValueError, RecursionError):  # the latter of brackets in brackets in brackets
        return line.split()
    if not isinstance(ids, list):  # one id that looks like JSON, such as 5
        return line.split()
    if not all(type(x) in (str, int) for x in ids):
        raise DataError(f"a history's ids must be strings or whole numbers; given the line {line.strip()[:80]!r}")
    return [str(x) for x in ids]


def _chosen(args: Namespace, target: type[Any]) -> dict[str, Any]:
    """The arguments that are fields of a dataclass."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(target) if hasattr(args, f.name)}


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
    shape = _chosen(args, TTT4RecConfig)
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


def _ratios(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() and len(part) <= 6 for part in parts):
        raise ValueError(f"--split must be three whole numbers below 1,000,000, such as 3:2:5; given {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _split(
    interactions: Interactions, args: Namespace, ratios: tuple[int, int, int]
) -> tuple[Split, tuple[float, float] | None]:
    """The split that the arguments name, and the moments at which it cuts if it does so by time."""
    smallest = {"min_user": args.min_user, "min_item": args.min_item}
    if args.split_by == "time":
        return split_by_time(interactions, ratios, **smallest)
    histories = build_histories(filter_k_core(interactions, **smallest))
    return _split_again(histories, args.split_by, ratios, None), None


def _split_again(
    histories: Histories, way: str, ratios: tuple[int, int, int], cuts: tuple[float, float] | None
) -> Split:
    if cuts is not None:
        return split_at(histories, *cuts)
    return split_leave_one_out(histories) if way == "last" else split_by_ratio(histories, ratios)


def _trained(folder: Path) -> tuple[str, tuple[int, int, int], tuple[float, float] | None]:
    """How the run that wrote a folder split its data."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no finished training run: {RUN_FILE} is missing")
    try:
        run = read_json(path)
        cuts = run["cuts"] and (run["cuts"][0], run["cuts"][1])
        return run["settings"]["split_by"], _ratios(run["settings"]["split"]), cuts
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is damaged; it must hold the settings of a training run ({error})") from error


def _machine(args: Namespace) -> str:
    """The device asked for, checked; the number of threads is set on the way."""
    name: str = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads is not None:
        if not 1 <= args.threads <= _MOST_THREADS:
            raise ValueError(f"--threads must be from 1 to {_MOST_THREADS}; given {args.threads}")
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be a name such as cpu or cuda; given {name!r}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {name} is not available on this machine")
    return name


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
        print(f"an epoch has about {steps} {'step' if steps == 1 else 'steps'}: {advice}", file=sys.stderr)


def _show_example(recommender: Recommender) -> None:
    histories = recommender.histories
    user = histories.user_ids[0]
    last = ", ".join(printable(str(histories.item_ids[code - 1])) for code in histories.history(0)[-5:])
    best = ", ".join(printable(str(item)) for item, _ in recommender.recommend(user, k=5).items)
    print(f"user {printable(str(user))}, whose last items are {last}: next {best or 'none, all items are seen'}")


def _format(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith("MRR"))
