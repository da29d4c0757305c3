"""The I/O manager when the ring has no room: it must not sleep before everything is submitted."""

from __future__ import annotations

import errno
from collections import deque
from random import Random
from typing import TYPE_CHECKING, cast

import pytest
import trio
from simulated_ring import SimulatedKernel, SimulatedRing

from trio_uring import RingConfig
from trio_uring._engine._in_flight import CANCEL, InFlight
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._operations._arrays import array_of
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_uring._engine._ring import Completion, Ring
    from trio_uring._operations import Operation

LONG = 3600.0


class ScriptedRing(SimulatedRing):
    """A ring that refuses to push, to submit or to sleep for a given number of times."""

    def __init__(self) -> None:
        super().__init__(SimulatedKernel(Random(0), entries=64), self.slept)
        self.refuse_to_push = 0
        self.refuse_to_submit = 0
        self.interrupted = 0  # how often a signal ends a wait
        self.many: deque[int | OSError] = deque()  # how far calls of push_many get
        self.timeouts: list[float] = []
        self.completions: deque[Completion] = deque()

    def slept(self) -> None:
        pytest.fail("it slept")

    def push(self, operation: Operation[object], user_data: int) -> bool:
        if self.refuse_to_push:
            self.refuse_to_push -= 1
            return False
        return super().push(operation, user_data)

    def push_many(self, *_args: object) -> int:
        result = self.many.popleft()
        if isinstance(result, OSError):
            raise result
        return result

    def flush(self) -> None:
        if self.refuse_to_submit:
            self.refuse_to_submit -= 1
        else:
            self._kernel.pushed.clear()

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        self.timeouts.append(timeout)
        self.flush()
        if self.interrupted:
            self.interrupted -= 1
            return None
        found, self.completions = list(self.completions), deque()
        return found


@pytest.fixture
def ring() -> ScriptedRing:
    return ScriptedRing()


@pytest.fixture
def manager(ring: ScriptedRing) -> Iterator[UringIOManager]:
    manager = UringIOManager(cast("Ring", ring), RingConfig())
    manager.begun = True
    manager._watch()
    ring.flush()
    yield manager
    manager._entries.clear()
    ring.close = lambda: None  # type: ignore[method-assign]
    manager.close()


def in_flight(manager: UringIOManager, fd: int = 1) -> InFlight:
    entry = InFlight(manager, operations.recv(fd, bytearray(1)), user_data=100)
    manager._entries[entry.user_data] = entry
    manager.fd_waiters.register(entry)
    return entry


def test_sleeps_when_there_is_nothing_to_do(manager: UringIOManager, ring: ScriptedRing) -> None:
    assert not manager.get_events(LONG)
    assert ring.timeouts == [LONG]


def test_it_does_not_sleep_while_a_cancel_is_in_line(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    ring.refuse_to_push = 2
    manager.request_cancel(in_flight(manager))
    # There was no room twice. Nobody's time ran out: come again.
    assert manager.get_events(LONG)
    assert not manager.get_events(LONG)
    assert ring.timeouts == [0, LONG]


def test_it_does_not_sleep_without_the_watch_on_epoll(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    """Otherwise it would not notice calls from other threads, or signals."""
    manager._watch_entry = None
    ring.refuse_to_push = 1
    assert not manager.get_events(LONG)
    assert manager._watch_entry is not None
    assert ring.timeouts == [0, LONG]


def test_it_does_not_sleep_on_a_backlog(manager: UringIOManager, ring: ScriptedRing) -> None:
    manager._backlog.append((1, 0, 0))
    ring.completions.append((1, -2, 0))
    assert manager.get_events(LONG) == [(1, 0, 0), (1, -2, 0)]
    assert ring.timeouts == [0]


def test_notify_closing_submits_all_that_the_kernel_refuses_at_first(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    """Otherwise an SQE would act on the next file with the same fd."""
    for refused in range(4):
        ring.push(operations.send(1, b"x"), 50 + refused)
        ring.refuse_to_submit = refused
        manager.notify_closing(1)
        assert not ring.unsubmitted


def test_notify_closing_pushes_all_cancels(manager: UringIOManager, ring: ScriptedRing) -> None:
    entry = in_flight(manager)
    ring.refuse_to_push = 3
    ring.completions.append((1, 0, 0))
    manager.notify_closing(1)
    assert entry.closing
    assert not manager._cancels
    assert not ring.unsubmitted
    assert manager._backlog == [(1, 0, 0)]  # kept for the next turn


def test_nothing_to_close_costs_nothing(manager: UringIOManager, ring: ScriptedRing) -> None:
    manager.notify_closing(1)
    assert not ring.timeouts


def test_an_operation_waits_for_room_also_after_a_signal(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    ring.refuse_to_push, ring.interrupted = 2, 1
    ring.completions.append((1, 0, 0))
    entry = manager.start(operations.recv(5, bytearray(1)), None)
    assert entry.in_flight
    assert ring.timeouts == [0, 0]
    assert manager._backlog == [(1, 0, 0)]


@pytest.mark.parametrize("limited", [True, False])
def test_an_operation_that_cannot_be_pushed_leaves_nothing_behind(
    manager: UringIOManager, ring: ScriptedRing, *, limited: bool
) -> None:
    def fail(*_args: object) -> bool:
        raise OverflowError

    ring.push = fail  # type: ignore[method-assign]
    operation = operations.recv(5, bytearray(1))
    operation.limited = limited
    manager.file_limiter.available_tokens = 7
    with pytest.raises(OverflowError):
        manager.start(operation, None)
    assert 5 not in manager.fd_waiters
    assert manager.file_limiter.available_tokens == 7 + limited  # its task had taken one


def test_what_is_pushed_only_if_there_is_room(manager: UringIOManager, ring: ScriptedRing) -> None:
    first, second = (InFlight(manager, operations.nop()) for _ in range(2))
    ring.refuse_to_push = 1
    before = manager._entries.copy()
    assert not manager.start_if_room(first)
    assert (first.in_flight, manager._entries) == (False, before)
    assert manager.start_if_room(second)
    assert manager._entries == {**before, second.user_data: second}


def test_many_operations_wait_for_room_also_after_a_signal(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    array = array_of([operations.nop()] * 3)
    ring.many.extend([0, 2, 3])
    ring.interrupted = 1
    ring.completions.append((1, 0, 0))
    manager.start_many([InFlight(manager, each) for each in array.operations], array)
    assert (not ring.many, ring.timeouts, manager._backlog) == (True, [0, 0], [(1, 0, 0)])


def test_many_operations_that_the_kernel_refuses_end_the_use_of_the_ring(
    manager: UringIOManager, ring: ScriptedRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "close", lambda: None)
    array = array_of([operations.nop()])
    entry = InFlight(manager, array.operations[0])
    ring.many.append(OSError(errno.EPERM, "refused"))
    manager._is_plain = True
    manager.start_many([entry], array)
    events = manager.get_events(LONG)
    with pytest.warns(RuntimeWarning, match="the run lost its ring"):
        assert (entry.user_data, -errno.EPERM, 0) in list(events)
    assert ring.timeouts == []


def test_a_cancelled_operation_that_does_not_end_keeps_others_out(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    """A worker of the kernel has it."""
    manager.request_cancel(in_flight(manager))
    for _ in range(2):
        with pytest.raises(trio.BusyResourceError):
            manager.fd_waiters.check_not_busy(1, "read")
    ring.completions.append((100, -errno.ECANCELED, 0))
    manager.fd_waiters.check_not_busy(1, "read")


def test_an_operation_that_was_not_cancelled_keeps_others_out_until_its_task_runs(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    in_flight(manager)
    ring.completions.append((100, 1, 0))
    with pytest.raises(trio.BusyResourceError):
        manager.fd_waiters.check_not_busy(1, "read")
    assert ring.timeouts == []


@pytest.mark.parametrize(("res", "closed"), [(0, [0]), (7, [7]), (-errno.ECANCELED, [])])
def test_an_fd_that_nobody_gets_is_closed(
    manager: UringIOManager, res: int, closed: list[int]
) -> None:
    entry = in_flight(manager)
    found: list[int] = []
    entry.operation.discard = found.append
    manager.discard(entry.user_data, res, 0)
    assert (found, entry.in_flight, entry.user_data in manager._entries) == (closed, False, False)
    assert 1 not in manager.fd_waiters


async def test_who_waits_for_a_cancel_that_found_nothing_hears_of_it(
    manager: UringIOManager,
) -> None:
    heard: list[str] = []
    manager.on_cancel_missed.add(lambda: heard.append("missed"))
    for res in (0, -errno.EALREADY, -errno.ENOENT):
        manager.dispatch([(CANCEL, res, 0)])
    assert heard == ["missed"]
    assert manager.statistics().completed == {"ASYNC_CANCEL": 3}


def test_notify_closing_outside_a_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="async context"):
        trio.lowlevel.notify_closing(1)
