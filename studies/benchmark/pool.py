"""Trainings as processes, as many at once as there are cores; each leaves its line when it is done."""

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from ..runner import Result, check_same_description, keep, read_results
from ..study import Run
from .design import Plan
from .training import forget, work

Say = Callable[[str], None]


@dataclass
class Job:
    """A training in progress."""

    run: Run
    process: SpawnProcess


class Pool:
    """What is running, and what came of it.

    Args:
        plan: what to train.
        data: folder of the files.
        models: folder for checkpoints; a training that was stopped goes on there.
        path: of the results.
        processes: how many trainings at once.
        say: told of the progress.
    """

    def __init__(self, plan: Plan, data: Path, models: Path, path: Path, processes: int, say: Say) -> None:
        self.plan, self.data, self.models, self.path = plan, data, models, path
        self.processes, self.say = processes, say
        self.jobs: dict[Connection, Job] = {}
        self.absent: set[str] = set()
        self.failed: list[Run] = []

    def run_all(self) -> list[Run]:
        """Run what has no result yet, but for what has no data; the runs that failed.

        A kill of this process ends the others at the end of their epochs; they lose no more than the one in progress.

        Raises:
            ValueError: results of the same name were of other data.
        """
        try:
            while self._fill() or self.jobs:
                for connection in wait(list(self.jobs)):
                    self._hear(connection)  # type: ignore[arg-type]
        finally:
            for job in self.jobs.values():
                job.process.terminate()
                job.process.join()
        return self.failed

    def _fill(self) -> bool:
        """Start as many trainings as there is room for; whether there was one."""
        results, begun = read_results(self.path), False
        for run in self.plan.missing(results):
            if len(self.jobs) == self.processes:
                break
            running = [job.run for job in self.jobs.values()]
            if run not in running and run not in self.failed and run.data.name not in self.absent:
                self._start(run)
                begun = True
        return begun

    def _start(self, run: Run) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has threads may hang
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(run, self.data, self.models, theirs), daemon=True)
        process.start()
        theirs.close()  # so that its end is heard
        self.jobs[ours] = Job(run, process)

    def _hear(self, connection: Connection) -> None:
        run = self.jobs[connection].run
        try:
            kind, value = connection.recv()
        except EOFError:  # it was killed, say for the memory that it took
            kind, value = "failed", "its process ended"
        self._take(kind, value, run)
        if kind in ("done", "absent", "failed"):
            self.jobs.pop(connection).process.join()

    def _take(self, kind: str, value: Any, run: Run) -> None:
        about = f"{run.data.title}, {run.variant}, learning rate {run.settings['learning_rate']:g}, seed {run.seed}"
        results = read_results(self.path)
        if kind == "data":
            check_same_description(results, run, value)
            self.say(f"{about}: begins")
        elif kind == "epoch":
            number, ndcg = value
            self.say(f"{about}: epoch {number}, validation NDCG@10 {ndcg:.4f}")
        elif kind == "done":
            keep(self.path, value)
            forget(run, self.models)
            self.say(f"{about}: done; {time_left(self.plan, [*results, value], self.processes)}")
        elif kind == "absent" and run.data.name not in self.absent:
            self.absent.add(run.data.name)
            self.say(f"passed over: {value}")
        elif kind == "failed":
            self.failed.append(run)
            self.say(f"{about}: failed: {value}")


def time_left(plan: Plan, results: Sequence[Result], processes: int) -> str:
    """What is still to come and how long it may take, by what the same method took on the same data."""
    seconds, to_come, unknown = 0.0, 0, 0
    for data in plan.datasets:
        of_method = {method: plan.done(data, method, results) for method in plan.methods}
        of_data = [result for done in of_method.values() for result in done]
        whole = [result for result in of_data if result["settings"]["epochs"] == plan.frame["epochs"]]
        for method, done in of_method.items():
            left = plan.runs_of(data, method) - len(done)
            known = [result for result in done if result in whole] or whole or done or of_data
            took = [result["wall_seconds"] for result in known]
            to_come += left
            unknown += 0 if took else left
            seconds += left * sum(took) / max(1, len(took))
    rest = f", and {unknown} more of which nothing is known yet" if unknown else ""
    hours = seconds / processes / 3600
    long = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    expected = f"{to_come - unknown} may take {long} with {processes} at once"
    return f"{plan.total - to_come} of {plan.total} are done, {expected}{rest}"
