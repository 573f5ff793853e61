"""How contests become pytest-benchmark's results.

pytest-benchmark runs one test at a time, each with one result; ratios hold on a noisy machine only if all sides are
timed in turn. So a contest is run as a whole when the first test of it asks, with all the sides selected for this run,
and every test then replays its own side's rounds to its ``benchmark`` fixture, whose clock is set to show them.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest

from tools.environment import environment, load_average

from .contests import Contest
from .measure import REPLAY, Outcome, roofs, take_turns
from .sides import default_device

KEY = "ttt4rec"
"""Of what is added to pytest-benchmark's JSON."""


class Arena:
    """Runs contests within the time budget and keeps what came of them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.device = config, default_device()
        self.size = config.getoption("size") or ("full" if self.device == "cuda" else "small")
        self.selected: dict[Contest, list[str]] = {}
        self.results: dict[Contest, dict[str, tuple[Outcome, dict[str, Any]]]] = {}
        self.begin, self.load, self.roofs = 0.0, load_average(), {}

    def result(self, contest: Contest, side: str) -> tuple[Outcome, dict[str, Any]]:
        """A side's outcome and what is known about its cost; runs the contest if it has not been run."""
        if not self.results:
            self.begin = time.monotonic()
        if contest not in self.results:
            left = self.config.getoption("budget") - (time.monotonic() - self.begin)
            to_come = sum(c.weight for c in self.selected if c not in self.results)
            self._run(contest, max(1.0, left * contest.weight / to_come))
        return self.results[contest][side]

    def _run(self, contest: Contest, seconds: float) -> None:
        infos: dict[str, dict[str, Any]] = {side: contest.size | {"side": side} for side in self.selected[contest]}
        makers = {side: _maker(contest, side, self.device, info) for side, info in infos.items()}
        outcomes = take_turns(makers, self.device, seconds)
        for side, info in infos.items():
            if (dtype := info.get("dtype")) and dtype not in self.roofs:
                self.roofs[dtype] = roofs(self.device, dtype)
            info["peak_bytes"] = outcomes[side].peak_bytes
        self.results[contest] = {side: (outcomes[side], infos[side]) for side in infos}
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        timed = sum(bool(outcome.seconds) for outcome in outcomes.values())
        with self.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(
                f"{time.monotonic() - self.begin:4.0f} s  {contest.size['table']}, {contest.size['column']}: "
                f"{timed} of {len(outcomes)} sides measured"
            )

    def record(self) -> dict[str, Any]:
        """What goes into the JSON beside pytest-benchmark's own."""
        missing = [
            {"table": contest.size["table"], "column": contest.size["column"], "side": side, "why": why}
            for contest, sides in self.results.items()
            for side, why in (
                contest.absent(self.device) | {side: outcome.why_not for side, (outcome, _) in sides.items()}
            ).items()
            if why
        ]
        return {
            "device_type": self.device,
            "size": self.size,
            "note": self.config.getoption("note"),
            "load_average": [self.load, load_average()],
            "roofs": self.roofs,
            "contests": [[contest.size["table"], contest.size["column"]] for contest in self.results],
            "sides": list(dict.fromkeys(side for c in self.results for side in _everyone(c, self.device))),
            "not_measured": missing,
        }


def _everyone(contest: Contest, device: str) -> list[str]:
    return [*contest.sides(device), *contest.absent(device)]


def _maker(contest: Contest, side: str, device: str, info: dict[str, Any]) -> Callable[[], Any]:
    return lambda: contest.prepare(side, device, info)


ARENA = pytest.StashKey[Arena]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ttt4rec")
    group.addoption("--size", choices=("small", "full"), help="what is measured; default: full on a GPU, else small")
    group.addoption("--budget", type=float, default=200.0, help="seconds for all contests together; default: 200")
    group.addoption("--note", default="", help="what a reader of the results should know about the machine")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ARENA] = Arena(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contest" in metafunc.fixturenames:
        arena = metafunc.config.stash[ARENA]
        pairs = [(c, side) for c in metafunc.module.contests(arena.size) for side in c.sides(arena.device)]
        metafunc.parametrize(("contest", "side"), pairs, ids=[f"{c.name}-{side}" for c, side in pairs])


def pytest_collection_finish(session: pytest.Session) -> None:
    selected = session.config.stash[ARENA].selected
    for item in session.items:
        if isinstance(item, pytest.Function) and "contest" in getattr(item, "fixturenames", ()):
            selected.setdefault(item.callspec.params["contest"], []).append(item.callspec.params["side"])


@pytest.fixture
def record(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Contest, str], Outcome]:
    """Hands a side's rounds to pytest-benchmark; what was not measured leaves only a line in the JSON."""

    def replay(contest: Contest, side: str) -> Outcome:
        outcome, info = pytestconfig.stash[ARENA].result(contest, side)
        benchmark.group = f"{info['table']}, {info['column']}"
        benchmark.extra_info |= info
        benchmark.disabled = benchmark.disabled or not outcome.seconds
        REPLAY.load(outcome.seconds)
        benchmark.pedantic(lambda: None, rounds=max(1, len(outcome.seconds)))
        if outcome.error is not None:
            raise outcome.error
        return outcome

    return replay


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for key in ("node", "cpu"):  # a name of no interest, and pages of flags
        machine_info.pop(key, None)
    machine_info |= environment(config.stash[ARENA].device)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json[KEY] = config.stash[ARENA].record()
    for entry in output_json["benchmarks"]:
        if "contest" in (entry["params"] or {}):  # contests cannot be written as JSON; extra_info has all of it
            entry["params"] = None
