"""The I/O manager when the ring has no room: it must not sleep before everything is submitted."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import TYPE_CHECKING, cast

import pytest
import trio
from simulated_ring import SimulatedKernel, SimulatedRing

from trio_uring import RingConfig
from trio_uring._engine._in_flight import InFlight
from trio_uring._engine._io_manager import UringIOManager
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
        self.timeouts: list[float] = []
        self.completions: deque[Completion] = deque()

    def slept(self) -> None:
        pytest.fail("it slept")

    def push(self, operation: Operation[object], user_data: int) -> bool:
        if self.refuse_to_push:
            self.refuse_to_push -= 1
            return False
        return super().push(operation, user_data)

    def flush(self) -> None:
        if self.refuse_to_submit:
            self.refuse_to_submit -= 1
        else:
            self._kernel.pushed.clear()

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        self.timeouts.append(timeout)
        self.flush()
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


def test_notify_closing_outside_a_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="async context"):
        trio.lowlevel.notify_closing(1)
