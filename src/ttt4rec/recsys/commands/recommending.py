"""What ``ttt4rec recommend``, ``similar`` and ``add-items`` do."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ttt4rec.atomic_files import read_json
from ttt4rec.checks import printable
from ttt4rec.models.event_times import TIMES
from ttt4rec.options import DataOptions
from ttt4rec.recsys.commands.arguments import device_of
from ttt4rec.recsys.data import Id
from ttt4rec.recsys.data.text import DataError, TextFile
from ttt4rec.recsys.data.times import Times
from ttt4rec.recsys.recommend import Recommender, offers
from ttt4rec.recsys.recommend.rerank import MaximalMarginalRelevance
from ttt4rec.recsys.recommend.titles import titles_for
from ttt4rec.recsys.training.console import counted
from ttt4rec.recsys.training.progress import progress_bar
from ttt4rec.recsys.training.report import RUN_FILE

_ASKED_AT_ONCE = 4096
_NAMED = 5  # unknown users


def recommend(args: Namespace) -> None:
    """Print the best items for a user or a history, or write those for many."""
    if args.json and args.out is not None:
        raise ValueError("--json must come without --out, whose suffix says what is written")
    recommender = Recommender.load(args.folder, device_of(args))
    titles = _titles(args, recommender)
    wanted: dict[str, Any] = {name: getattr(args, name) for name in ("k", "min_score", "popular")}
    wanted["exclude_seen"] = not args.include_seen
    times = recommender.model.config.times
    if args.at is not None and not TIMES[times].query:
        raise ValueError(f"--at must come with a model of --times query; given {args.at} for one of --times {times}")
    wanted["at"] = None if args.at is None else _moment(args.at)
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


def similar(args: Namespace) -> None:
    """Print the items most like one."""
    recommender = Recommender.load(args.folder)
    titles = _titles(args, recommender)
    _print_items(recommender.similar_items(args.item, k=args.k), titles)


def add_items(args: Namespace) -> None:
    """Let a model take new items by their features, in its folder."""
    recommender = Recommender.load(args.folder)
    field = args.item_field or _trained_item_field(Path(args.folder))
    larger = recommender.add_items(args.features, item_field=field, encoding=args.encoding)
    count = larger.histories.num_items - recommender.histories.num_items
    if count:
        larger.save(args.folder)
    offered = f"which offers {larger.histories.num_items:,}"
    print(f"{counted(count, 'new item')} of {args.features} in {args.folder}, {offered}")


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


def _titles(args: Namespace, recommender: Recommender) -> Mapping[str, str] | None:
    if args.titles is not None:
        return titles_for(Path(args.titles), recommender.histories.item_ids, args.encoding)
    if args.encoding != "utf-8":
        raise ValueError(f"--encoding must come with the --titles that it is of; given {args.encoding!r} alone")
    return None


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


def _moment(text: str) -> float:
    """A time as the columns of files have it."""
    try:
        return float(Times().texts([text])[0])
    except ValueError:
        raise ValueError(
            "--at must be a finite number in the unit of the data's times, or a date such as 2025-01-31T08:00; "
            f"given {text!r}"
        ) from None


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
