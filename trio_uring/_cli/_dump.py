"""``trio-uring dump PID``: the tasks of a running program, and what each waits for."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Final

from ._observed import NotObservedError, command_of, duration, look_at

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from trio_uring._snapshot import RunInfo, TaskInfo

_ALL_TASKS: Final = 1_000_000


def main(options: argparse.Namespace) -> int:
    """Print the runs of a process. Return 1 if it does not tell."""
    try:
        runs = look_at(options.pid, _ALL_TASKS)
    except NotObservedError as exc:
        print(f"trio-uring: {exc}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(runs, indent=2))
        return 0
    print(f"process {options.pid}: {command_of(options.pid)}")
    for run in runs:
        print("", *_lines(run), sep="\n")
    if not runs:
        print("it has no Trio run that asked for a ring just now")
    return 0


def _lines(run: RunInfo) -> Iterator[str]:
    statistics = run["statistics"]
    how = f"{statistics['backend']}"
    how += f", {statistics['engine']} engine" if statistics["backend"] == "io_uring" else ""
    in_flight = ", ".join(f"{count} {name}" for name, count in run["in_flight"].items())
    yield f"run in {run['thread']}: {how}; {run['tasks_total']} tasks; in flight: {in_flight or 0}"
    if run["busy_in"]:
        yield "the loop does not answer; its thread is in:"
        yield from "".join(run["busy_in"]).rstrip().splitlines()
    for task in run["tasks"]:
        yield _line(task)


def _line(task: TaskInfo) -> str:
    since = "" if task["seconds"] is None else f", {duration(task['seconds'])}"
    cancelled = ", cancelled" if task["cancelled"] else ""
    where = f"  {task['where']}" if task["where"] else ""
    return f"{'  ' * task['depth']}{task['name']}  [{task['waits_for']}{since}{cancelled}]{where}"
