"""``trio-uring top``: rates, mean times and waits of a running program."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from children import CHILD_SECONDS, clean_environment, said_by_command

if not os.environ.get("CI"):
    pytest.importorskip("rich", reason="the extra `cli` is not installed")

from trio_uring._cli._observed import duration
from trio_uring._cli._top import _Samples

if TYPE_CHECKING:
    from trio_uring._snapshot import RunInfo, TaskInfo

# It prints a line when it waits, and ends when its standard input does.
PROGRAM = """
import sys, trio, trio_uring

async def receive(stream):
    await stream.receive_some()

async def main():
    left, right = trio.socket.socketpair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive, trio.SocketStream(left))
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()

trio_uring.run(main)
"""


def top(pid: int, *options: str, status: int = 0) -> str:
    """Return what the command prints: its view, or why there is none."""
    return said_by_command("top", pid, *options, status=status, environment={"COLUMNS": "150"})


@pytest.mark.parametrize("inspect", ["1", "0"])
def test_a_running_program(inspect: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**clean_environment(), "TRIO_URING_INSPECT": inspect},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        status = 0 if inspect == "1" else 1
        shown = top(process.pid, "--samples", "3", "--interval", "0.01", status=status)
        process.communicate(timeout=CHILD_SECONDS)
    if inspect == "0":
        assert shown.startswith(f"trio-uring: process {process.pid} shows no run: ")
        return
    assert f"process {process.pid}: " in shown
    assert "run in MainThread: io_uring, " in shown
    assert re.search(r"[1-9]\d* threads, \d+ kernel workers", shown)
    assert re.search(r"RECV +│ +1 │", shown)
    assert re.search(r"__main__\.receive +│ RECV fd \d+", shown)
    assert re.search(r"__main__\.main +│ trio\.to_thread_run_sync", shown)


def task(
    number: int, steps: int, waits_for: str = "RECV", seconds: float | None = None
) -> TaskInfo:
    return {
        "id": number,
        "depth": 0,
        "name": f"task {number}",
        "waits_for": waits_for,
        "where": "",
        "steps": steps,
        "seconds": seconds,
        "cancelled": False,
    }


def sample(done: int, in_flight: int, *tasks: TaskInfo) -> RunInfo:
    return {
        "thread": "MainThread",
        "statistics": {"enters": done // 10, "completed": {"RECV": done}},
        "in_flight": {"RECV": in_flight},
        "tasks": [*tasks],
        "tasks_total": len(tasks),
        "busy_in": [],
    }


def test_rates_and_mean_times() -> None:
    samples = _Samples()
    samples.add(sample(1000, 10), 100.0)
    assert samples.rate("completed", "RECV") == 0
    assert samples.mean_seconds("RECV") is None
    samples.add(sample(3000, 20), 102.0)
    assert samples.rate("completed", "RECV") == 1000
    assert samples.rate("enters") == 100
    assert samples.rate("completed", "SEND") == 0
    assert samples.mean_seconds("RECV") == 0.015  # 15 in flight at 1000 a second
    assert samples.mean_seconds("SEND") is None


def test_who_waits_longest() -> None:
    samples = _Samples()
    samples.add(sample(0, 0, task(1, 5), task(2, 5), task(3, 1, "its children")), 100.0)
    samples.add(sample(0, 0, task(1, 6), task(2, 5), task(4, 1)), 101.0)
    samples.add(sample(0, 0, task(1, 6), task(2, 5), task(4, 1), task(5, 1)), 103.0)
    found = [(seconds, each["name"]) for seconds, each in samples.waiting(103.0)]
    assert found == [(3.0, "task 2"), (2.0, "task 1"), (2.0, "task 4"), (0.0, "task 5")]


def test_an_operation_began_before_the_first_look() -> None:
    samples = _Samples()
    samples.add(sample(0, 0, task(1, 5, seconds=90.0), task(2, 5)), 100.0)
    samples.add(sample(0, 0, task(1, 5, seconds=93.0), task(2, 5)), 103.0)
    assert [seconds for seconds, _ in samples.waiting(103.0)] == [93.0, 3.0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        *((0.00002, "20 µs"), (0.0015, "1.5 ms"), (0.25, "250.0 ms")),
        *((12.34, "12.3 s"), (600, "10 min"), (9000, "2.5 h")),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_without_the_extra_it_says_what_to_install() -> None:
    program = """
import sys
sys.modules["rich"] = None
sys.modules["rich.console"] = None
from trio_uring.__main__ import main
main(["top", "1"])
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )
    assert result.returncode == 1
    [line] = result.stderr.splitlines()
    assert (
        line == "trio-uring: this command needs rich: install it with pip install 'trio-uring[cli]'"
    )


@pytest.mark.parametrize("interval", ["0", "-1", "x"])
def test_wrong_intervals(interval: str) -> None:
    assert "argument --interval" in top(1, f"--interval={interval}", status=2)
