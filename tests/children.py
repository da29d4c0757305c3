"""Run something in another thread, in a forked child, or in a new Python process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

T = TypeVar("T")

# A child that hangs is killed; one that works needs a small part of this, on a busy machine too.
CHILD_SECONDS = 300

TESTS = Path(__file__).parent


def in_thread(function: Callable[[], T]) -> T:
    """Run *function* in a new thread. Return its result, or raise its exception."""
    returned: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(function())
        except BaseException as exc:  # noqa: BLE001 (raised below)
            raised.append(exc)

    # A daemon: if it hangs, the test fails, and the session goes on and comes to its end.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    for exc in raised:
        raise exc
    return returned[0]


def in_child(function: Callable[[], object]) -> int:
    """Fork, run *function* in the child, and return its exit status: 0 if it raised nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 (the exit status tells)
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:  # pytest-timeout's: the child hangs
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def clean_environment() -> dict[str, str]:
    """Return the environment, without the variables that Trio or we read except the engine's."""
    return {
        name: value
        for name, value in os.environ.items()
        if name[:4] != "TRIO" or name == "TRIO_URING_ENGINE"
    }


def run_python(
    code: str,
    *arguments: object,
    options: tuple[str, ...] = ("-X", "dev", "-W", "error"),
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run *code* in a new Python with strict checks and *environment* added. Return the result.

    It can import the tests' helpers. *arguments* are in its ``sys.argv``.
    """
    path = [str(TESTS), str(TESTS / "programs"), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = clean_environment()
    return subprocess.run(
        [sys.executable, *options, "-c", dedent(code), *map(str, arguments)],
        env={**inherited, "PYTHONPATH": os.pathsep.join(path), **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )


def output_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines that a child printed. It must have succeeded, and printed no warnings."""
    assert (result.returncode, result.stderr) == (0, ""), result.stderr + result.stdout
    return result.stdout.splitlines()


def run_command(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m trio_uring`` with *arguments* and *environment* added. Return the result."""
    return subprocess.run(
        [sys.executable, "-m", "trio_uring", *map(str, arguments)],
        env={**clean_environment(), **(environment or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=CHILD_SECONDS,
    )


def said_by_command(
    *arguments: object, status: int, environment: Mapping[str, str] | None = None
) -> str:
    """Return what a command prints that ends with *status*: its report, or why there is none."""
    result = run_command(*arguments, environment=environment)
    assert result.returncode == status, result.stderr
    return result.stderr if status else result.stdout
