"""Makes only the test that hangs fail: its run is cancelled before pytest-timeout fails it.

pytest-timeout has two methods. ``thread`` ends the whole session, because nothing else can stop a
thread. ``signal`` raises an exception wherever the main thread is. If a test hangs, that is in
Trio's loop, outside of all tasks. Trio cannot end such a run: every later test would fail because
it is "inside a run", and operations would be in flight on freed memory. So we use ``signal``, and
cancel the run of the main thread first. Its tasks end, and its ring is closed as usual. Trio wakes
up for every signal, whatever the kernel does for the ring at the time.

If the run does not end when it is cancelled, the signal comes again. Then it raises, and the
session is over.
"""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from trio._core._run import GLOBAL_RUN_CONTEXT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    import trio

# For a run to end once it is cancelled.
SECONDS_TO_END = 60

_hung = pytest.StashKey[bool]()


def cancel_run_first(item: pytest.Item) -> None:
    """Make pytest-timeout's signal cancel the run of *item*; see `fails_if_it_hung`."""
    fail: Any = signal.getsignal(signal.SIGALRM)

    def timed_out(number: int, frame: FrameType | None) -> None:
        runner = getattr(GLOBAL_RUN_CONTEXT, "runner", None)
        if item.stash.get(_hung, default=False):
            item.session.shouldfail = f"{item.nodeid} cannot be cancelled"
            fail(number, frame)
        if runner is None or runner.main_task is None:
            fail(number, frame)
        item.stash[_hung] = True
        writer = item.config.get_terminal_writer()
        writer.sep("+", title=f"Timeout: the tasks of {item.name}")
        for line in _task_tree(runner.main_task):
            writer.line(line)
        signal.setitimer(signal.ITIMER_REAL, SECONDS_TO_END)
        runner.entry_queue.run_sync_soon(runner.main_task.parent_nursery.cancel_scope.cancel)

    signal.signal(signal.SIGALRM, timed_out)


@contextmanager
def fails_if_it_hung(item: pytest.Item) -> Iterator[None]:
    """Fail if the run of *item* had to be cancelled, whatever the test's own result."""
    cause: BaseException | None = None
    try:
        yield
    except BaseException as exc:
        if not item.stash.get(_hung, default=False):
            raise
        cause = exc
    if item.stash.get(_hung, default=False):
        raise pytest.fail.Exception("it hung: its tasks are in the captured output") from cause


def _task_tree(task: trio.lowlevel.Task, indent: str = "") -> Iterator[str]:
    yield f"{indent}{task.name}"
    for frame, line in task.iter_await_frames():
        yield f'{indent}  File "{frame.f_code.co_filename}", line {line}, in {frame.f_code.co_name}'
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _task_tree(child, f"{indent}    ")
