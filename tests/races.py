"""Races between an operation and its cancellation, with a forced order of events.

Under ``DEFER_TASKRUN`` the kernel does its work only inside our calls of io_uring_enter. So the
test can force most orders: between two loop iterations, only the test itself acts.
"""

from __future__ import annotations

import errno
import itertools
import resource
from contextlib import contextmanager
from enum import Enum
from types import coroutine
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring._files import _bridge
from trio_uring._kernel.uapi import Opcode
from trio_uring._operations._operation import NO_ADDRESS
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    import pytest
    from accounting import Rounds

    from trio_uring._files._bridge import FilesRun
    from trio_uring._operations._operation import Sqe
    from trio_uring.lowlevel import Operation

T = TypeVar("T")

# Of io_uring.h: the result of a NOP is what its len says. Linux 6.11.
_NOP_INJECT_RESULT: Final = 1


class Order(Enum):
    """The order of events. *Ready* is the event that the operation waits for."""

    NEVER_READY = "the operation waits; it is cancelled"
    ONE_ENTER = "one enter submits the operation and its cancel; it is not ready"
    ONE_ENTER_READY = "it is ready; one enter submits the operation and its cancel"
    AT_ONCE_UNSEEN = "it is ready; the kernel completes it as it is submitted; it is cancelled"
    READY_UNNOTICED = "the operation waits; it is ready and cancelled before the next enter"
    READY_UNSEEN = "the operation waits; it is ready; the kernel completes it; it is cancelled"
    READY_SEEN = "the operation waits; it is ready; its task is woken; it is cancelled"
    NO_CANCEL = "the operation waits; it is ready; it is not cancelled"


# Where the operation need not wait: what it waits for is there when it is submitted.
NOT_READY: Final = (Order.NEVER_READY, Order.ONE_ENTER)

_READY_BEFORE: Final = (Order.ONE_ENTER_READY, Order.AT_ONCE_UNSEEN)
_CANCELLED_WHEN_PARKED: Final = (Order.ONE_ENTER, *_READY_BEFORE)
_NOT_CANCELLED_FROM_OUTSIDE: Final = (Order.READY_SEEN, Order.NO_CANCEL)


def failing_sqe(code: int) -> Sqe:
    """Return the SQE of an operation that does nothing and fails with *code*."""
    res = -code & 0xFFFFFFFF
    return (Opcode.NOP, 0, 0, -1, 0, NO_ADDRESS, res, _NOP_INJECT_RESULT, 0, 0, 0)


def fail_once(monkeypatch: pytest.MonkeyPatch, opcode: Opcode, code: int) -> None:
    """Make the next operation with *opcode* fail with *code*; it does nothing else."""
    push, failed = Ring.push, list[object]()

    def failing(ring: Ring, operation: Operation[Any], user_data: int) -> bool:
        sqe = operation.sqe
        if operation.opcode == opcode and not failed:
            failed.append(operation)
            operation.sqe = failing_sqe(code)
        try:
            return push(ring, operation, user_data)
        finally:
            operation.sqe = sqe

    monkeypatch.setattr(Ring, "push", failing)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files to *size* bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def current_manager() -> UringIOManager:
    """Return the manager of the run that the test is in."""
    manager = current_io_manager()
    assert isinstance(manager, UringIOManager)
    return manager


def current_files() -> FilesRun:
    """Return what the current run keeps for its files."""
    files = _bridge.current_files()
    assert files is not None
    return files


class Outcome(Generic[T]):
    """How a round ended: with a value, with an exception of the operation, or cancelled."""

    def __init__(self) -> None:
        self.ending = ""
        self.values: list[T] = []

    @property
    def value(self) -> T:
        """The result. A cancelled round has none."""
        return self.values[0]

    def __bool__(self) -> bool:
        return bool(self.values)


async def race(
    rounds: Rounds,
    order: Order,
    operation: Callable[[], Awaitable[T]],
    make_ready: Callable[[], object],
    *,
    close: Callable[[], object] | None = None,
) -> Outcome[T]:
    """Perform *operation*, cancel it in *order* relative to *make_ready*, and count the ending.

    With *close*, that is called instead of cancelling; an error that says so then counts as
    cancelled.
    """
    outcome: Outcome[T] = Outcome()
    scope = trio.CancelScope()
    asked = False

    def cancel() -> None:
        nonlocal asked
        if not asked:
            asked = True
            (close or scope.cancel)()

    def parked() -> None:
        if order is Order.AT_ONCE_UNSEEN:
            current_manager().ring.flush()
        if order in _CANCELLED_WHEN_PARKED:
            cancel()

    async def perform() -> None:
        outcome.ending = "cancelled"
        woken = cancel if order is Order.READY_SEEN else _nothing
        with scope, _suppress_closed():
            outcome.values.append(await driven(operation(), parked=parked, woken=woken))
            outcome.ending = "late" if asked else "completed"

    if order in _READY_BEFORE:
        make_ready()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform)
        if order not in _CANCELLED_WHEN_PARKED:
            await wait_all_tasks_blocked()
            if order is not Order.NEVER_READY:
                make_ready()
            if order is Order.READY_UNSEEN:
                current_manager().ring.flush()
            if order not in _NOT_CANCELLED_FROM_OUTSIDE:
                cancel()
    rounds.add(outcome.ending)
    return outcome


def every_order(count: int) -> list[Order]:
    """Return *count* orders, with the same number of each."""
    return list(itertools.islice(itertools.cycle(Order), count))


@contextmanager
def _suppress_closed() -> Iterator[None]:
    try:
        yield
    except trio.ClosedResourceError:
        pass
    except OSError as exc:  # it was woken, as Trio wakes, and then it was closed
        if exc.errno != errno.EBADF:
            raise


def _nothing() -> None:
    pass


@coroutine
def driven(
    awaitable: Awaitable[T],
    *,
    parked: Callable[[], object] = _nothing,
    woken: Callable[[], object] = _nothing,
) -> Generator[Any, Any, T]:
    """Await a coroutine. Call *parked* before Trio sees its first park, and *woken* at each wake.

    If a scope is cancelled before Trio sees the park, Trio aborts at once, so that the cancellation
    is submitted in the same enter as the operation. *woken* is called between the completion and
    the return of its result.
    """
    steps = awaitable.__await__()
    try:
        trap = steps.send(None)
        parked()
        while True:
            try:
                value = yield trap
            except BaseException as exc:  # noqa: BLE001 (what Trio throws in belongs to them)
                woken()
                trap = steps.throw(exc)
            else:
                woken()
                trap = steps.send(value)
    except StopIteration as done:
        result: T = done.value
        return result
