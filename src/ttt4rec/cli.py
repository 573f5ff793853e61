"""The command line: what ``ttt4rec`` and its commands, such as ``train`` and ``serve``, take."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from ttt4rec.checks import printable
from ttt4rec.extras import MissingPackageError
from ttt4rec.fields import choices, descriptions
from ttt4rec.models.config import TTT4RecConfig
from ttt4rec.models.presets import PRESETS
from ttt4rec.options import TRACKERS, DataOptions, ServeOptions, TrainOptions
from ttt4rec.settings import read_settings

_EPILOG = """\
examples:
  ttt4rec train ml-100k --out runs/ml-100k
  ttt4rec train ml-100k --preset best --out runs/best
  ttt4rec train events.csv --user-field customer --item-field product --time-field at --out runs/shop
  ttt4rec train --config runs/shop/run.json --seed 1 --out runs/again
  ttt4rec evaluate runs/ml-100k --part valid
  ttt4rec recommend runs/ml-100k --user 196
  ttt4rec recommend runs/ml-100k --all-users --out best.csv
  ttt4rec recommend runs/ml-100k --history 50 181 174
  ttt4rec serve runs/ml-100k --port 8000
"""
_ONLY_FROM_PYTHON = ("num_items", "rope_theta", "base_lr", "conv_kernel", "block_conv")  # num_items: from the data


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    It is 0, 2 for an error of the user's, 130 when interrupted, and 141 when what reads the output has closed it.
    """
    args = None
    try:
        try:
            args = make_parser().parse_args(argv)
            if args.command == "train":
                _take_file(args)
            from ttt4rec.recsys import (
                commands,  # after parsing, so that --help need not wait for what only commands need
            )

            with _log_on_stderr(args.log_level):
                getattr(commands, args.command.replace("-", "_"))(args)
        finally:
            print(end="", flush=True)  # so that a closed pipe is noticed here, not at the interpreter's exit
    except KeyboardInterrupt:
        training = args is not None and args.command == "train"
        advice = "; give the same command again to go on from the last finished epoch" if training else ""
        print(f"ttt4rec: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return 128 + 13  # as a shell reports a program that SIGPIPE ended
    except (ValueError, OSError, RuntimeError, OverflowError, MemoryError, MissingPackageError) as error:
        message = printable(" ".join(str(error).split())) or type(error).__name__  # MemoryError may say nothing
        print(f"ttt4rec: error: {message}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _log_on_stderr(level: str) -> Iterator[None]:
    """What the package logs, which alone it would not show, goes to stderr for a while."""
    logger, handler = logging.getLogger("ttt4rec"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("ttt4rec: %(message)s"))
    before = logger.level
    logger.setLevel(level.upper())
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(" ".join(super().format(record).split()))


def _whole(text: str) -> int:
    """A whole number so small that the product of two has 64 bits."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or abs(number) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number below 2**31; given {text[:40]!r}")
    return number


def _add_choices(
    group: argparse._ActionsContainer, option: str, names: Sequence[str], first: str, **options: Any
) -> None:
    """An option of several names, which says where the argument belongs that it takes for one of them."""

    def among(text: str) -> str:
        if text not in names:
            advice = f"write {first} before options of several names"
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}; given {text[:80]!r}: {advice}")
        return text

    group.add_argument(option, type=among, metavar="{" + ",".join(names) + "}", **options)


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in the command line like every other: one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Given(argparse.Action):
    """Stores an option, True if it takes no value, and that it was given: a warm start asks for it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        value = True if self.nargs == 0 else values
        if isinstance(value, list):  # an option of several values may be given several times
            value = (*getattr(namespace, self.dest), *value)
        setattr(namespace, self.dest, value)
        namespace.given = [*namespace.given, self.dest]


class _Data(_Given):
    """As ``_Given``, of a positional argument that was not left out."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        if values is not None:
            super().__call__(parser, namespace, values, option)


class _Config(argparse.Action):
    """Reads options from a file: the parser itself does, as if they were written on the command line."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        assert isinstance(parser, _Parser)
        settings, is_record = read_settings(Path(str(values)))
        odd = [name for name in ("data", "out") if not isinstance(settings.get(name, ""), str)]
        if odd:
            raise ValueError(f"{values} must hold a text as {odd[0]}; given {settings[odd[0]]!r}")
        places = {name: settings.pop(name) for name in ("data", "out") if name in settings}
        if is_record:
            places.pop("out", None)  # another run has another folder
        takes = {action.dest: action for action in parser._actions if action.option_strings}
        unknown = [name for name in settings if name not in takes or name in ("config", "help")]
        if unknown:
            shown = printable(", ".join(_with_likeliest(name, takes) for name in unknown))
            raise ValueError(f"{values} must hold options of ttt4rec train; given {shown} (see {parser.prog} --help)")
        try:
            words = [word for name, value in settings.items() for word in _words(takes[name], value)]
            found = parser.parse_args(words)
        except ValueError as error:
            raise ValueError(f"{values}: {error}") from None
        namespace.read = places | {name: getattr(found, name) for name in found.given}
        namespace.is_record = is_record


def _with_likeliest(name: str, known: Collection[str]) -> str:
    """A name that is no option, and the option that may have been meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"{name} (is {close[0]} meant?)" if close else name


def _words(option: argparse.Action, value: object) -> list[str]:
    """An option as on the command line, in the form that takes values which begin with a dash."""
    name = option.option_strings[-1]
    if option.nargs == 0 and isinstance(value, bool):
        return [name] if value else []
    values = value if isinstance(value, list) and option.nargs == "+" else [value]
    odd = [x for x in values if isinstance(x, bool) or not isinstance(x, str | int | float)]
    if odd:
        raise ValueError(f"argument {name}: must be a number or a text; given {odd[0]!r}")
    return [f"{name}={x}" for x in values]


def _take_file(args: argparse.Namespace) -> None:
    """Give what was left out the values of the file, if there is one; then data and a folder there must be.

    What somebody chose, on the command line or in a file, is noted apart: the record of a run has all options.
    """
    if args.is_record and "preset" in args.given and args.preset != args.read.get("preset"):
        raise ValueError(f"--preset must be left out with a run's record, which has all options; given {args.preset}")
    read = {name: value for name, value in args.read.items() if name not in args.given}
    args.chosen = args.given if args.is_record else [*args.given, *read]
    args.given = [*args.given, *read]
    vars(args).update(read)
    absent = [shown for name, shown in (("data", "DATA"), ("out", "--out")) if getattr(args, name) is None]
    if absent:
        raise ValueError(f"the following arguments are required: {', '.join(absent)} (see ttt4rec train --help)")


_KINDS: dict[Any, dict[str, Any]] = {
    bool: {"nargs": 0},
    int: {"type": _whole, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    float | None: {"type": float, "metavar": "X"},
    str: {"metavar": "NAME"},
    str | None: {"metavar": "TEXT"},
    tuple[str, ...]: {"nargs": "+", "metavar": "NAME"},
}
"""What an option takes by the annotation of its field."""
_LEVELS = ("debug", "info", "warning", "error")
_OF_63_BITS = ("seed", "pool_bytes")
"""Options that are no sizes of a model."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of options that have a value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if any(action.default is x for x in (None, False, ())) else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it raises ValueError for a mistake."""
    parser = _Parser(
        prog="ttt4rec",
        description="Train, evaluate and use TTT4Rec, a sequential recommender that learns from every event it reads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ttt4rec {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(_command(commands, "train", "learn from interactions, rank the test targets, write a model folder"))
    _add_evaluate(_command(commands, "evaluate", "HR, NDCG and MRR of a trained model over the full catalogue"))
    _add_recommend(_command(commands, "recommend", "the best items for a user or a history"))
    _add_similar(_command(commands, "similar", "the items that are most like one, by what is taken after it"))
    _add_new_items(_command(commands, "add-items", "offer items that training never saw, by what their features say"))
    _add_serve(_command(commands, "serve", "take events and recommend over HTTP, by what users did until now"))
    report = _command(
        commands, "report", "configuration, data, curves and metrics of runs, such as seeds, side by side"
    )
    report.add_argument("folders", nargs="+", metavar="DIR", help="folders that train wrote")
    report.add_argument("--out", required=True, metavar="DIR", help="where to write report.md and curves.png")
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("ttt4rec")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _command(commands: argparse._SubParsersAction[_Parser], name: str, text: str) -> argparse.ArgumentParser:
    description = f"{text[0].upper()}{text[1:]}."
    command = commands.add_parser(name, help=text, description=description, formatter_class=_Formatter)
    about = "what is said on stderr of what goes on"
    command.add_argument("--log-level", default="info", choices=_LEVELS, help=about)
    return command


def _add_train(command: argparse.ArgumentParser) -> None:
    about = "a .inter, .csv or .tsv (also .gz) or .parquet file, or ml-100k, gowalla, twitch-100k, amazon-video-games"
    command.register("action", "noted", _Given)
    command.add_argument("data", nargs="?", action=_Data, metavar="DATA", help=about)
    about = "model folder; an interrupted run there goes on"
    command.add_argument("--out", action="noted", metavar="DIR", help=about)
    about = "options by name, a .json or .toml file, or a run.json to repeat; what is given here counts first"
    command.add_argument("--config", action=_Config, metavar="FILE", help=about)
    about = "begin with this model, its shape and the codes of its items"
    command.add_argument("--warm-start", action="noted", metavar="DIR", help=about)
    each = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    about = f"defaults of model and training that go together ({each}; default: none)"
    command.add_argument("--preset", action="noted", choices=tuple(PRESETS), help=about)
    data = command.add_argument_group("data")
    command.set_defaults(given=[], read={}, is_record=False)
    _add_fields(data, DataOptions)
    about = "what is known of items, next to their ids: a .csv, .tsv, .item, .jsonl or .parquet file with a row an item"
    data.add_argument("--item-features", action="noted", metavar="FILE", help=about)
    about = "columns of it to learn from: numbers, names or lists of them (default: all)"
    data.add_argument("--feature-columns", action="noted", nargs="+", default=(), metavar="NAME", help=about)
    about = "drop users with fewer interactions"
    data.add_argument("--min-user", action="noted", type=_whole, default=5, metavar="N", help=about)
    about = "drop items with fewer interactions"
    data.add_argument("--min-item", action="noted", type=_whole, default=5, metavar="N", help=about)
    ways = ["ratio", "last", "time"]
    about = (
        "shares of each user's items; each user's last two; or shares of all by time, the same moments for all users"
    )
    data.add_argument("--split-by", action="noted", default="ratio", choices=ways, help=about)
    about = "shares of train, validation and test"
    data.add_argument("--split", action="noted", default="3:2:5", metavar="A:B:C", help=about)
    _add_fields(command.add_argument_group("model"), TTT4RecConfig, leave_out=_ONLY_FROM_PYTHON)
    _add_fields(command.add_argument_group("training"), TrainOptions)
    watching = command.add_argument_group("watching")
    about = "tell these of every epoch; needs the extra track"
    _add_choices(watching, "--track", TRACKERS, "DATA", action="noted", nargs="+", default=(), help=about)
    _add_machine(command, action="noted")


def _add_fields(group: argparse._ArgumentGroup, settings: type[Any], leave_out: Collection[str] = ()) -> None:
    """An option for each field of a dataclass: what it takes and its default are the field's, its help the docstring's.

    That it was given is noted in the namespace's ``given``.
    """
    kinds, about = get_type_hints(settings), descriptions(settings)
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        among = choices(field)
        takes = _KINDS[kinds[field.name]] if among is None else {"choices": tuple(among)}
        if field.name in _OF_63_BITS:
            takes = takes | {"type": int}
        text = about.get(field.name, "") + ("" if field.default is not None else " (default: none)")
        if isinstance(among, Mapping):
            each = [f"{name}: {x.about}" for name, x in among.items() if hasattr(x, "about")]
            text += f" ({'; '.join(each)})" if each else ""
        option = f"--{field.name.replace('_', '-')}"
        group.add_argument(option, action=_Given, default=field.default, help=text.replace("%", "%%"), **takes)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="folder that train wrote")
    command.add_argument("--part", default="test", choices=["valid", "test"], help="which targets")
    command.add_argument(
        "--exclude-seen", action="store_true", help="rank only targets new to the user, among items new to the user"
    )
    command.add_argument("--intervals", action="store_true", help="with 95 %% intervals, by bootstrap over users")
    about = "a list for each user, against all of the part: precision, recall, coverage, ..., with intervals"
    command.add_argument("--lists", action="store_true", help=about)
    command.add_argument("--include-seen", action="store_true", help="with --lists: items of the history too")
    about = "a table by length of history, popularity of the item and new users, or by the ones that are named"
    _add_choices(command, "--segments", ("history", "popularity", "users"), "DIR", nargs="*", help=about)
    command.add_argument("--cutoffs", type=_whole, nargs="+", default=[10, 50], metavar="K", help="the k of HR@k")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_machine(command)


def _add_recommend(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="folder that train wrote")
    who = command.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", metavar="ID", help="a user of the training data")
    who.add_argument("--users", metavar="FILE", help="users of the training data, one a line")
    who.add_argument("--all-users", action="store_true", help="every user of the training data")
    who.add_argument("--history", nargs="+", metavar="ITEM", help="anybody's item ids, oldest first")
    who.add_argument(
        "--histories",
        metavar="FILE",
        help="a history a line, ids separated by blanks or a JSON array of strings; prints JSON lines",
    )
    command.add_argument("-k", "--k", type=_whole, default=10, metavar="N", help="how many items")
    command.add_argument("--include-seen", action="store_true", help="offer items of the history too")
    command.add_argument("--allow", metavar="FILE", help="offer nothing but these items, one a line")
    command.add_argument("--deny", metavar="FILE", help="offer none of these items, one a line")
    command.add_argument("--min-score", type=float, metavar="X", help="offer nothing of a lower score")
    command.add_argument("--popular", action="store_true", help="what is popular of late, without a known history")
    about = (
        "when the items are asked for, of a model of --times query, in the unit of the data's times; a date such as "
        "2025-01-31T08:00 is seconds since 1970 (default: the time of the user's last event)"
    )
    command.add_argument("--at", metavar="TIME", help=about)
    about = "from 0 to 1: prefer items unlike those above them (maximal marginal relevance)"
    command.add_argument("--diversity", type=float, default=0.0, metavar="X", help=about)
    about = "write a table: .csv, .tsv, .jsonl or .parquet; without it, many users' are lines of JSON on stdout"
    command.add_argument("--out", metavar="FILE", help=about)
    _add_titles(command)
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_machine(command)


def _add_similar(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", metavar="DIR", help="folder that train wrote")
    command.add_argument("item", metavar="ITEM", help="an item of the training data")
    command.add_argument("-k", "--k", type=_whole, default=10, metavar="N", help="how many items")
    _add_titles(command)


def _add_new_items(command: argparse.ArgumentParser) -> None:
    about = "folder that train wrote with --item-features; it takes the items, a service in it at its next start"
    command.add_argument("folder", metavar="DIR", help=about)
    about = "a file with the columns that the model learned from; items that the model knows stay as they are"
    command.add_argument("features", metavar="FILE", help=about)
    about = "column of item ids (default: what train was told)"
    command.add_argument("--item-field", metavar="NAME", help=about)
    command.add_argument("--encoding", default="utf-8", metavar="NAME", help="of a text file, such as latin-1")


def _add_titles(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--titles", metavar="FILE", help="a text file with a column of item ids and one of titles; or ml-100k"
    )
    command.add_argument(
        "--encoding", default="utf-8", metavar="NAME", help="how the titles are encoded, such as latin-1"
    )


def _add_serve(command: argparse.ArgumentParser) -> None:
    about = "folder that train wrote; receives the event log and the states of users"
    command.add_argument("folder", metavar="DIR", help=about)
    command.set_defaults(given=[])
    _add_fields(command.add_argument_group("service"), ServeOptions)


def _add_machine(command: argparse.ArgumentParser, action: str = "store") -> None:
    machine = command.add_argument_group("machine")
    about = "cpu, cuda, cuda:1, ...; auto: a GPU if there is one"
    machine.add_argument("--device", action=action, default="auto", metavar="NAME", help=about)
    about = "CPU threads (default: torch's choice)"
    machine.add_argument("--threads", action=action, type=_whole, metavar="N", help=about)


if __name__ == "__main__":
    sys.exit(main())
