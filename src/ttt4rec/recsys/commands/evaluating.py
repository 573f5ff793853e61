"""What ``ttt4rec evaluate`` and ``report`` do."""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ttt4rec.recsys.commands.arguments import device_of
from ttt4rec.recsys.commands.splitting import split_again, split_of_run
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.evaluate import evaluate as evaluate_windows
from ttt4rec.recsys.training.evaluate import evaluate_with_intervals
from ttt4rec.recsys.training.intervals import Estimate
from ttt4rec.recsys.training.lists import evaluate_lists
from ttt4rec.recsys.training.report import write_report
from ttt4rec.recsys.training.segments import SEGMENTATIONS, Segment, evaluate_segments


def evaluate(args: Namespace) -> None:
    """Rank the targets of a part by the protocol of the paper."""
    device = device_of(args)
    run = split_of_run(Path(args.folder))
    recommender = Recommender.load(args.folder, device)
    split = split_again(recommender.histories, *run)
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
    print(json.dumps(metrics, indent=2) if args.json else f"{args.part}  {shown(metrics)}")


def report(args: Namespace) -> None:
    """Write a report of several runs together."""
    print(f"report in {write_report(args.folders, args.out)}")


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


def shown(metrics: dict[str, float]) -> str:
    """HR and NDCG in a line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if not name.startswith("MRR"))
