"""The I/O manager at the end of its ring: draining, and going on without it."""

from __future__ import annotations

import errno
from itertools import repeat
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from scripted_ring import LONG, ScriptedRing, close, in_flight
from trio.testing import wait_all_tasks_blocked

from trio_uring import RingConfig
from trio_uring._engine import _in_flight, _io_manager
from trio_uring._engine._completion_batches import CompletionBatch
from trio_uring._engine._in_flight import BATCH_DONE, InFlight
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._kernel.uapi import Opcode
from trio_uring._operations._arrays import array_of
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_uring._engine._ring import Completion, Ring
    from trio_uring._kernel._native import Loop
    from trio_uring._operations import Operation


class Clock:
    """The time, which each wait of the ring takes a second of."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class LateRing(ScriptedRing):
    """A ring on which time passes, and that notes what was pushed."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.pushes: list[int] = []
        self.batch_results = [(0, 0)]

    def push(self, operation: Operation[object], user_data: int) -> bool:
        pushed = super().push(operation, user_data)
        self.pushes += [user_data] * pushed
        return pushed

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        self.clock.now += 1
        return super().submit_and_wait(timeout)

    def close_batch(self, _number: int, count: int) -> list[tuple[int, int]]:
        assert count == len(self.batch_results)
        return self.batch_results


class FakeNative:
    """The native engine with some operations in flight."""

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self.calls: list[object] = []
        self.send_operation = operations.send(-1, b"")
        self.sent_now = 5
        self.fetched: set[int] = set()

    def discard(self) -> None:
        if "cancel_all" in self.calls:
            self.in_flight = 0
        self.calls.append("discard")

    def cancel_all(self) -> None:
        self.calls.append("cancel_all")

    def fail_all(self, res: int) -> None:
        self.calls.append(res)

    def dispatch(self) -> None:
        self.calls.append("dispatch")

    def has_fetched(self, user_data: int) -> bool:
        return user_data in self.fetched

    def completed(self) -> list[int]:
        return [2] * 256

    def in_flight_by_opcode(self) -> list[int]:
        counts = [0] * 256
        counts[Opcode.RECV] = self.in_flight
        return counts

    def close(self) -> None:
        pass


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> LateRing:
    ring = LateRing()
    monkeypatch.setattr(_in_flight, "time", ring.clock)
    return ring


@pytest.fixture
def manager(ring: LateRing) -> Iterator[UringIOManager]:
    manager = UringIOManager(cast("Ring", ring), RingConfig(max_file_operations=7))
    manager.begun = True
    yield manager
    manager.native = None
    manager._batches.clear()
    close(manager, ring)


def batch_of(
    manager: UringIOManager, number: int, *batched: Operation[object], task: object = None
) -> CompletionBatch:
    array = array_of(batched)
    batch = CompletionBatch(array, 0, array.count, array.opcodes, 1, cast("Any", task))
    manager._batches[number] = batch
    return batch


# ---- Draining --------------------------------------------------------------------------------


def test_all_that_is_in_flight_is_cancelled_and_waited_for(
    manager: UringIOManager, ring: LateRing
) -> None:
    buffer = bytearray(1)
    entry = in_flight(manager)
    entry.operation = operations.recv(1, buffer)
    ring.refuse_to_push = 1
    ring.late = [None, [(100, -errno.ECANCELED, 0)]]
    assert manager.drain()
    assert ring.pushes == [_in_flight.CANCEL]
    assert (manager._entries, manager.fd_waiters, entry.in_flight) == ({}, {}, False)
    assert ring.timeouts == [2, 1]
    buffer.append(0)


def test_what_was_fetched_is_not_waited_for(manager: UringIOManager, ring: LateRing) -> None:
    in_flight(manager)
    manager._backlog = [(100, 1, 0)]
    assert manager.drain()
    assert (ring.timeouts, manager._backlog) == ([], [])


def test_it_does_not_wait_for_ever(manager: UringIOManager, ring: LateRing) -> None:
    in_flight(manager)
    ring.late = [[], None, [], []]
    assert not manager.drain()
    assert ring.timeouts == [2, 1]


def test_the_first_operation_of_a_ring_is_one_of_them(
    manager: UringIOManager, ring: LateRing
) -> None:
    entry = manager.start(operations.recv(1, bytearray(1)), None)
    assert entry.user_data == _in_flight._FIRST
    ring.late = [[(entry.user_data, 0, 0)]]
    assert manager.drain()
    assert not entry.in_flight


def test_a_batch_is_waited_for_and_its_fds_are_closed(
    manager: UringIOManager, ring: LateRing
) -> None:
    closed: list[int] = []
    operation = operations.nop()
    operation.discard = closed.append
    batch_of(manager, 3, operation)
    ring.batch_results = [(9, 0)]
    ring.late = [[], [(BATCH_DONE, 3, 0)]]
    assert manager.drain()
    assert (closed, ring.timeouts) == ([9], [2, 1])


@pytest.mark.parametrize(("operations_of_it", "timeouts"), [(0, []), (1, [2])])
def test_the_native_engine_is_waited_for(
    manager: UringIOManager, ring: LateRing, operations_of_it: int, timeouts: list[float]
) -> None:
    native = FakeNative(operations_of_it)
    manager.native = cast("Loop", native)
    assert manager.drain()
    assert native.calls == ["discard", "cancel_all", *repeat("discard", len(timeouts))]
    assert ring.timeouts == timeouts


def test_what_the_native_engine_has_fetched_has_ended(
    manager: UringIOManager, ring: LateRing
) -> None:
    in_flight(manager)
    native = FakeNative(1)
    manager.native = cast("Loop", native)
    native.fetched = {100}
    manager.notify_closing(1)
    assert ring.timeouts == []


# ---- Without the ring ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.EBADF])
@pytest.mark.parametrize("plain", [True, False])
async def test_a_run_that_loses_its_ring_goes_on(
    manager: UringIOManager, ring: LateRing, monkeypatch: pytest.MonkeyPatch, code: int, *,
    plain: bool,
) -> None:  # fmt: skip
    def fail(_timeout: float) -> None:
        raise OSError(code, "refused")

    leaked: list[object] = []
    monkeypatch.setattr(_io_manager, "_leaked", leaked)
    monkeypatch.setattr(ring, "submit_and_wait", fail)
    manager._watch()
    manager._is_plain = plain
    closed, results, buffers = [], [], [bytearray(1), bytearray(1)]
    monkeypatch.setattr(ring, "close", lambda: closed.append(1))
    native = FakeNative(1)
    entry = in_flight(manager)
    entry.operation = operations.recv(1, buffers[0])

    async def wait_for_batch() -> None:
        task = trio.lowlevel.current_task()
        two = operations.nop(), operations.send(1, buffers[1])
        batch = batch_of(manager, 3, operations.nop(), *two, task=task)
        batch.start = 1  # the first one was in another batch
        await trio.lowlevel.wait_task_rescheduled(batch.abort)
        results.extend(batch.results)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_batch)
        await wait_all_tasks_blocked()
        events = manager.get_events(LONG)
        assert manager.fallback_reason == ""
        manager._backlog.append((50, 1, 0))
        manager._cancels.append(100)
        manager.native = cast("Loop", native)
        expected = [(50, 1, 0), *((number, -code, 0) for number in manager._entries)]
        with pytest.warns(RuntimeWarning, match="the run lost its ring") as warned:
            assert list(events) == expected
        manager.native = None
    assert len(warned) == 1
    assert native.calls == [-code, "dispatch"]
    assert results == [(-code, 0)] * 2
    assert manager.file_limiter.available_tokens == 8  # its token is back
    assert manager.disabled == {"files", "sockets"}
    assert manager.fallback_reason.startswith("the run lost its ring: ")
    assert (len(leaked), closed) == (1, [1])
    assert (len(manager._cancels), len(manager._backlog), len(manager._batches)) == (0, 0, 0)
    for each in (*manager._entries.values(), entry):
        each.operation.release()
    for buffer in buffers:  # the kernel may still write to it
        with pytest.raises(BufferError):
            buffer.append(0)
    trios = manager._readiness
    for name in ("get_events", "process_events", "notify_closing"):
        assert getattr(manager, name) == getattr(trios, name)


# ---- What it tells ---------------------------------------------------------------------------


def test_what_is_counted(manager: UringIOManager, ring: LateRing) -> None:
    manager._watch()
    assert (manager.statistics().in_flight, manager.in_flight_by_name()) == (0, {})
    manager._entries[200] = InFlight(manager, operations.nop(), user_data=200)
    batch_of(manager, 3, operations.nop(), operations.nop(), operations.fsync(1))
    in_flight(manager)
    writer = InFlight(manager, operations.send(2, b"x"), user_data=300)
    manager._entries[300] = writer
    manager.fd_waiters.register(writer)
    manager.sent_now = 3
    manager._completed[Opcode.NOP] = 4
    manager._cancelled = 6
    ring.refused = ("one", "", "two")
    ring.worker_limits = {"bounded_workers": 1}
    found = manager.statistics()
    assert (found.in_flight, found.completed) == (6, {"NOP": 4, "SEND": 3})
    assert manager.in_flight_by_name() == {"NOP": 3, "FSYNC": 1, "RECV": 1, "SEND": 1}
    assert (found.tasks_waiting_read, found.tasks_waiting_write) == (1, 1)
    assert (found.cancelled, found.refused) == (6, ("one", "two"))
    assert found.limits == {"max_file_operations": 7, "bounded_workers": 1}
    assert (found.engine, found.engine_reason) == ("python", manager.why_python)
    native = FakeNative(2)
    manager.native, manager.why_python = cast("Loop", native), ""
    found = manager.statistics()
    assert (found.in_flight, found.engine, found.engine_reason) == (8, "native", "")
    assert (found.completed["NOP"], found.completed["SEND"]) == (6, 10)
    assert manager.in_flight_by_name() == {"NOP": 3, "FSYNC": 1, "RECV": 3, "SEND": 1}
    assert manager._completed[Opcode.NOP] == 4


async def test_an_iteration_begins_a_budget_and_counts_the_ready_tasks(
    manager: UringIOManager,
) -> None:
    manager.turn_budget.end = 5.0
    manager._run_queue = (1, 2, 3)
    manager.process_events(())
    assert (manager.turn_budget.end, manager._ready_tasks) == (0, 3)


async def test_readiness_ends_the_watch(
    manager: UringIOManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatched: list[int] = []
    monkeypatch.setattr(manager._readiness, "dispatch_ready", lambda: dispatched.append(1))
    manager._watch()
    watch = manager._watch_entry
    assert watch is not None
    manager.process_events([(watch.user_data, 1, 0)])
    assert (manager._watch_entry, dispatched) == (None, [1])
