"""What a run is doing, as data for ``trio-uring top`` and ``dump``: tasks and their operations.

It is taken in the thread of the run, between two steps of tasks. If the thread is busy, it is taken
in another one: what the loop does not run does not change.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypedDict

import attrs

from ._engine._in_flight import InFlight
from ._engine._io_manager import UringIOManager
from ._fallback import FallbackIOManager
from ._kernel import native, why_no_native
from ._statistics import opcode_name
from ._trio_private import count_steps, is_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from trio.lowlevel import Task


if why_no_native and not TYPE_CHECKING:

    class Op:
        """A stand-in where the native engine was not built."""
else:
    Op = native.Op

# The packages whose functions a task waits in, while it is the program's function that is shown.
_LIBRARIES: Final = frozenset({"trio", "trio_uring", "anyio", "contextlib"})


class TaskInfo(TypedDict):
    """One task. Tasks come in the order of the tree: a parent before its children.

    ``steps`` counts how often the task has run: as long as it stays the same, the task waits.
    ``seconds`` is for how long it has waited for its operation; None if it waits for another thing.
    """

    id: int
    depth: int
    name: str
    waits_for: str
    where: str
    steps: int
    seconds: float | None
    cancelled: bool


class RunInfo(TypedDict):
    """One run. ``busy_in`` is the stack of its thread, if the loop did not answer."""

    thread: str
    statistics: dict[str, object]
    in_flight: dict[str, int]
    tasks: list[TaskInfo]
    tasks_total: int
    busy_in: list[str]


def take_snapshot(
    thread: str,
    manager: object,
    root: Task,
    tasks_max: int,
) -> RunInfo:
    """Describe a run: what its I/O manager counts, and its tasks, at most *tasks_max* of them."""
    assert isinstance(manager, UringIOManager | FallbackIOManager)
    tasks: list[TaskInfo] = []
    total = 0
    for task, depth in _tree(root):
        total += 1
        if len(tasks) < tasks_max:
            tasks.append(_describe(task, depth))
    return {
        "thread": thread,
        "statistics": attrs.asdict(manager.statistics()),
        "in_flight": (manager.in_flight_by_name() if isinstance(manager, UringIOManager) else {}),
        "tasks": tasks,
        "tasks_total": total,
        "busy_in": [],
    }


def _tree(root: Task) -> Iterator[tuple[Task, int]]:
    left = [(root, 0)]
    while left:
        task, depth = left.pop()
        yield task, depth
        for nursery in task.child_nurseries:
            left += ((child, depth + 1) for child in sorted(nursery.child_tasks, key=id))


def _describe(task: Task, depth: int) -> TaskInfo:
    frames: list[FrameType] = []
    with suppress(AttributeError, RuntimeError):  # Trio does not know how a coroutine is awaited
        frames += (frame for frame, _ in task.iter_await_frames())
    own = [place for place, frame in enumerate(frames) if not _is_in_library(frame)]
    last = own[-1] if own else 0
    data = task.custom_sleep_data
    if isinstance(data, InFlight | Op):
        waits_for = _describe_operation(data)
        cancelled = data.raise_cancel is not None
        seconds = _seconds_of(data)
    else:
        waits_for = "its turn" if is_ready(task) else _describe_wait(frames[last + 1 :])
        cancelled = False
        seconds = None
    return {
        "id": id(task),
        "depth": depth,
        "name": task.name,
        "waits_for": waits_for,
        "where": _place(frames[last]) if own else "",
        "steps": count_steps(task),
        "seconds": seconds,
        "cancelled": cancelled,
    }


def _describe_operation(entry: InFlight | Op) -> str:
    operation = entry.operation
    fd = operation.fd if operation.acts_on_fd else -1
    if isinstance(entry, Op) and entry.fd is not None:
        fd = entry.fd
    words = [opcode_name(operation.opcode)]
    if fd >= 0:
        words.append(f"fd {fd} {_name_of(fd)}".rstrip())
    path = operation.filename
    if path is not None:
        words.append(os.fsdecode(path))
    return " ".join(words)


def _seconds_of(entry: InFlight | Op) -> float | None:
    # A multishot operation has no task: it stays in flight while its task waits again and again.
    if not entry.since or (isinstance(entry, InFlight) and entry.task is None):
        return None
    return (time.monotonic_ns() - entry.since) / 1e9


def _name_of(fd: int) -> str:
    """Return the path of a file, or the address of a socket's peer; empty if there is none."""
    try:
        path = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 (one call, often)
        if not path.startswith("socket:"):
            return path
        with socket.socket(fileno=os.dup(fd)) as duplicate:
            with suppress(OSError):
                return _address(duplicate.getpeername())
            return f"at {_address(duplicate.getsockname())}"  # of a listener
    except OSError:
        return ""


def _address(address: object) -> str:
    match address:
        case (str(host), int(port), *_):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case str(path) if path:
            return path
        case _:
            return "socket"


def _describe_wait(frames: list[FrameType]) -> str:
    """Name the function of Trio that the task called: *frames* are inside of it."""
    for frame in frames:
        if frame.f_code.co_name == "_nested_child_finished":
            return "its children"
        if not frame.f_code.co_name.startswith("__"):
            return f"{_package(frame)}.{_name(frame)}"
    return "Trio"


def _is_in_library(frame: FrameType) -> bool:
    return _package(frame) in _LIBRARIES


def _package(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else ""


def _name(frame: FrameType) -> str:
    code = frame.f_code
    return getattr(code, "co_qualname", code.co_name)  # since Python 3.11


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {_name(frame)}"
