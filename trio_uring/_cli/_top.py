"""``trio-uring top PID``: a live view of a running program, drawn by rich."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final, cast

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trio_uring._metrics import threads_of

from ._observed import NotObservedError, command_of, duration, look_at

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from rich.console import RenderableType

    from trio_uring._snapshot import RunInfo

_TASKS_MAX: Final = 500
_TASKS_SHOWN: Final = 15
_SAMPLES: Final = 10  # over which rates and mean times are taken


def main(options: argparse.Namespace) -> int:
    """Show the runs of a process until it ends, or the user has seen enough."""
    view = _View(options.pid)
    left = options.samples
    try:
        view.look()
        with Live(view.draw(), console=Console(), auto_refresh=False, transient=False) as live:
            while left is None or left > 1:
                left = None if left is None else left - 1
                time.sleep(options.interval)
                view.look()
                live.update(view.draw(), refresh=True)
    except NotObservedError as exc:
        print(f"trio-uring: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


class _Samples:
    """What one run was doing, in the last few samples."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, RunInfo]] = deque(maxlen=_SAMPLES)
        self._since: dict[int, tuple[int, float]] = {}  # of each task: its steps, and since when

    def add(self, run: RunInfo, now: float) -> None:
        """Add what the run is doing *now*."""
        self._samples.append((now, run))
        since: dict[int, tuple[int, float]] = {}
        for task in run["tasks"]:
            steps, begun = self._since.get(task["id"], (-1, now))
            since[task["id"]] = (steps, begun) if steps == task["steps"] else (task["steps"], now)
        self._since = since

    @property
    def last(self) -> RunInfo:
        """The last sample."""
        return self._samples[-1][1]

    def rate(self, counter: str, name: str | None = None) -> float:
        """Return by how much a counter of the statistics grows in a second."""
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        grown = _count(last, counter, name) - _count(first, counter, name)
        return grown / (end - begin) if end > begin else 0.0

    def mean_seconds(self, opcode: str) -> float | None:
        """Return how long an operation is in flight, on average; None if none was done.

        That is the mean number in flight divided by the rate (Little's law), so that no operation
        has to be timed.
        """
        rate = self.rate("completed", opcode)
        in_flight = [run["in_flight"].get(opcode, 0) for _, run in self._samples]
        return sum(in_flight) / len(in_flight) / rate if rate > 0 else None

    def waiting(self, now: float) -> list[tuple[float, Mapping[str, object]]]:
        """Return the tasks that wait, with the seconds: those that wait longest first."""
        tasks = [
            (task["seconds"] or now - self._since[task["id"]][1], task)
            for task in self.last["tasks"]
            if task["waits_for"] != "its children"
        ]
        return sorted(tasks, key=lambda each: -each[0])


def _count(run: RunInfo, counter: str, name: str | None) -> int:
    found = run["statistics"][counter]
    if name is None:
        return cast("int", found)
    return cast("dict[str, int]", found).get(name, 0)


class _View:
    """What is shown of process *pid*."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._runs: dict[tuple[str, int], _Samples] = {}
        self._now = 0.0

    def look(self) -> None:
        """Take a sample of all runs."""
        runs = look_at(self._pid, _TASKS_MAX)
        self._now = time.monotonic()
        known, self._runs = self._runs, {}
        for run in runs:
            # The id of the root task: a thread may have one run after another.
            key = (run["thread"], run["tasks"][0]["id"])
            self._runs[key] = known.get(key, _Samples())
            self._runs[key].add(run, self._now)

    def draw(self) -> RenderableType:
        """Draw the last sample."""
        threads, workers = threads_of(self._pid)
        title = Text(f"process {self._pid}: {command_of(self._pid)}", style="bold")
        below = Text(f"{threads} threads, {workers} kernel workers; Ctrl-C ends this view")
        parts: list[RenderableType] = [title, below]
        for samples in self._runs.values():
            parts += ["", self._summary(samples), _operations(samples), self._tasks(samples)]
        if not self._runs:
            parts.append(Text("it has no Trio run that asked for a ring just now"))
        return Group(*parts)

    def _summary(self, samples: _Samples) -> Text:
        run = samples.last
        statistics = run["statistics"]
        engine = f", {statistics['engine']} engine" if statistics["entries"] else ""
        busy = "; THE LOOP DOES NOT ANSWER" if run["busy_in"] else ""
        return Text(
            f"run in {run['thread']}: {statistics['backend']}{engine}{busy}\n"
            f"{run['tasks_total']} tasks, {statistics['in_flight']} operations in flight, "
            f"{statistics['waiting_for_limit']} tasks wait for the limit of files; "
            f"{samples.rate('enters'):.0f} enters/s, {samples.rate('cancelled'):.0f} cancelled/s"
        )

    def _tasks(self, samples: _Samples) -> Table:
        table = Table(title="tasks that wait longest", title_justify="left", expand=True)
        for heading, justify in (("for", "right"), ("task", "left"), ("waits for", "left")):
            table.add_column(heading, justify=justify, no_wrap=True, min_width=len("1000 s"))  # type: ignore[arg-type]
        table.add_column("where", ratio=1, no_wrap=True, min_width=len("program.py:100"))
        for seconds, task in samples.waiting(self._now)[:_TASKS_SHOWN]:
            cancelled = " (cancelled)" if task["cancelled"] else ""
            where = f"{task['where']}".rpartition("/")[2]  # its name, the line and the function
            words = (f"{task['name']}", f"{task['waits_for']}{cancelled}", where)
            table.add_row(f"{seconds:.0f} s", *map(Text, words))
        return table


def _operations(samples: _Samples) -> Table:
    table = Table(title="operations", title_justify="left")
    table.add_column("opcode")
    for heading in ("in flight", "done/s", "mean time", "done"):
        table.add_column(heading, justify="right")
    completed = cast("dict[str, int]", samples.last["statistics"]["completed"])
    in_flight = samples.last["in_flight"]
    for opcode in sorted({*completed, *in_flight}):
        mean = samples.mean_seconds(opcode)
        table.add_row(
            opcode,
            f"{in_flight.get(opcode, 0)}",
            f"{samples.rate('completed', opcode):.0f}",
            "-" if mean is None else duration(mean),
            f"{completed.get(opcode, 0)}",
        )
    return table
