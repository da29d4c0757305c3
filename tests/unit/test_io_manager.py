"""The I/O manager on a ring that has no room, is interrupted, or reports at odd moments."""

from __future__ import annotations

import errno
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, NoReturn, cast

import pytest
import trio
from scripted_ring import LONG, ScriptedRing, close, in_flight
from trio.testing import wait_all_tasks_blocked

from trio_uring import RingConfig, SQPoll, UnsupportedOpcodeError
from trio_uring._engine._fd_waiters import FdReservation
from trio_uring._engine._in_flight import CANCEL, IGNORED, SHIELDED, WAKE, InFlight
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._engine._mailbox import ASLEEP
from trio_uring._kernel.uapi import CqeFlag
from trio_uring._operations._arrays import array_of
from trio_uring._trio_private import current_io_manager, current_run_queue
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from trio_uring._engine._guest import GuestWakeup
    from trio_uring._engine._ring import Ring


@pytest.fixture
def ring() -> ScriptedRing:
    return ScriptedRing()


@pytest.fixture(params=[True, False], ids=["plain", "not plain"])
def manager(ring: ScriptedRing, request: pytest.FixtureRequest) -> Iterator[UringIOManager]:
    manager = UringIOManager(cast("Ring", ring), RingConfig())
    manager.begun = True
    manager._is_plain = request.param
    manager._watch()
    ring.flush()
    yield manager
    close(manager, ring)


@contextmanager
def outcome_of(results: list[object]) -> Iterator[None]:
    """Add the type of an exception to *results*."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001 (the caller compares it)
        results.append(type(exc))


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
    manager._backlog.append((1, -4, 0))
    ring.interrupted = 1
    assert manager.get_events(LONG) == [(1, -4, 0)]


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


@pytest.mark.parametrize(
    ("asked", "user_data", "closed", "pushed"),
    [(False, 100, False, 1), (True, 100, False, 0), (False, 0, False, 0), (False, 100, True, 0)],
)
def test_what_is_cancelled_once_while_it_is_in_flight(
    manager: UringIOManager,
    ring: ScriptedRing,
    *,
    asked: bool,
    user_data: int,
    closed: bool,
    pushed: int,
) -> None:
    entry = in_flight(manager)
    entry.cancel_asked, entry.user_data, ring.closed = asked, user_data, closed
    for _ in range(2):
        manager.request_cancel(entry)
    ring.closed = False
    assert (ring.unsubmitted, len(manager._cancels)) == (pushed, 0)


def test_a_cancel_without_room_is_submitted_before_others_may_start(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    ring.refuse_to_push = 2
    manager.request_cancel(in_flight(manager))
    ring.interrupted = 1
    with pytest.raises(trio.BusyResourceError):
        manager.fd_waiters.check_not_busy(1, "read")
    assert (len(manager._cancels), ring.unsubmitted) == (0, 0)
    assert set(ring.timeouts) == {0}


def test_closing_waits_for_what_the_kernel_still_does(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    in_flight(manager)
    ring.late = [None, [], [(1, 0, 0)], [(100, -errno.ECANCELED, 0)]]
    ring.more = 2
    manager.notify_closing(1)
    assert manager._backlog == [(1, 0, 0), (100, -errno.ECANCELED, 0)]
    assert ring.timeouts == [0, 0, 0, 0]


def test_closing_does_not_wait_for_a_reservation(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    ended: list[int] = []
    reserved = operations.recv(1, bytearray(1))
    manager.fd_waiters.register(FdReservation(reserved, lambda: ended.append(1)))
    manager.notify_closing(1)
    assert (ended, ring.timeouts) == ([1], [])


def test_only_what_acts_on_the_fd_is_submitted_before_a_call(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    flushed: list[int] = []
    ring.flush = lambda: flushed.append(ring._kernel.pushed.clear() or 1)  # type: ignore[func-returns-value, method-assign]
    manager.submit_for(5)
    assert flushed == []
    ring.push(operations.nop(), 50)
    ring.closed = True
    manager.submit_for(5)
    assert flushed == []
    ring.closed = False
    manager.submit_for(5)
    assert (flushed, ring.timeouts) == ([1], [])


def test_nothing_in_flight_is_nothing_to_wait_for(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    manager._entries.clear()
    assert manager.drain()
    assert ring.timeouts == []


# ---- Iterations ------------------------------------------------------------------------------


def test_a_signal_is_not_the_end_of_the_time(manager: UringIOManager, ring: ScriptedRing) -> None:
    ring.interrupted = 1
    assert manager.get_events(LONG)
    assert not manager.get_events(LONG)


@pytest.mark.parametrize("plain", [True, False])
def test_completions_that_no_iteration_dispatched_are_discarded_at_the_end(
    ring: ScriptedRing, *, plain: bool
) -> None:
    manager = UringIOManager(cast("Ring", ring), RingConfig())
    manager.begun, manager._is_plain = True, plain
    manager._watch()
    watch = manager._watch_entry
    assert watch is not None
    entry, found = in_flight(manager), list[int]()
    entry.operation.discard = found.append
    ring.late = [[(100, 7, 0)]]
    assert manager.get_events(LONG) == [(100, 7, 0)]
    manager.discard(watch.user_data, 0, 0)
    ring.close = lambda: None  # type: ignore[method-assign]
    manager.close()
    assert found == [7]


@pytest.mark.parametrize("mailbox", [True, False])
async def test_the_first_iteration_finishes_the_setup(ring: ScriptedRing, *, mailbox: bool) -> None:
    manager = UringIOManager(cast("Ring", ring), RingConfig())
    if mailbox:
        manager.open_mailbox()
    assert not manager.get_events(0)
    assert manager.begun
    assert ring.registered
    assert manager._is_plain != mailbox
    assert manager._run_queue is current_run_queue()
    assert manager._watch_entry is not None
    assert manager.fallback_reason == ""
    close(manager, ring)


def test_an_operation_that_does_not_block_is_performed_at_once(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    ring.refuse_to_push = 2
    ring.late = [None, [(7, 0, 0)], None, [], [(8, 1, 0), (IGNORED, 5, 3), (9, 2, 0)]]
    assert manager.perform_now(operations.nop()) == (5, 3)
    assert manager._backlog == [(7, 0, 0), (8, 1, 0), (9, 2, 0)]
    assert ring.timeouts == [0, 0, 1, 1, 1]


async def test_a_message_from_another_ring_makes_the_deliveries(
    manager: UringIOManager, ring: ScriptedRing
) -> None:
    delivered: list[int] = []
    manager.dispatch([(WAKE, 0, 0)])  # for a mailbox that was never opened
    mailbox = manager.open_mailbox()
    assert manager.open_mailbox() is mailbox
    mailbox.put(lambda: delivered.append(1))
    seen: list[float] = []
    ring.flush = lambda: seen.append(mailbox.last_iteration)  # type: ignore[method-assign]
    assert not manager.get_events(LONG)
    assert seen == [ASLEEP]
    assert mailbox.last_iteration < ASLEEP
    manager.dispatch([(WAKE, 0, 0)])
    assert delivered == [1]


class FakeGuest:
    """An eventfd on which nobody waits."""

    def __init__(self, *, ready: bool = False) -> None:
        self.ready = ready
        self.drained = 0
        self.waited: list[float] = []

    def drain(self) -> None:
        self.drained += 1

    def wait(self, timeout: float) -> bool:
        self.waited.append(timeout)
        return self.ready

    def close(self) -> None:
        pass


@pytest.mark.parametrize("ready", [True, False])
def test_the_worker_thread_of_a_guest_run_waits_without_the_ring(
    manager: UringIOManager, ring: ScriptedRing, *, ready: bool
) -> None:
    manager._is_plain, guest = False, FakeGuest(ready=ready)
    manager._guest = cast("GuestWakeup", guest)
    ring.closed = True  # to that thread
    assert bool(manager.get_events(3)) == ready
    assert manager.get_events(3) is not None
    ring.closed = False
    assert (guest.waited, guest.drained, ring.timeouts) == ([3, 3], 0, [])


def test_the_host_fetches_all_that_is_there(manager: UringIOManager, ring: ScriptedRing) -> None:
    """The kernel writes to the eventfd once for all of it."""
    manager._is_plain, guest = False, FakeGuest()
    manager._guest = cast("GuestWakeup", guest)
    ring.late, ring.more = [[], [], [(1, 0, 0)]], 2
    assert manager.get_events(0) == [(1, 0, 0)]
    assert (guest.drained, ring.timeouts) == (3, [0, 0, 0])
    assert not manager.get_events(0)
    assert guest.drained == 4
    ring.late, ring.more = [[(1, -4, 0)]], 1
    assert manager.get_events(0) == [(1, -4, 0)]
    manager._guest, ring.more = None, 1
    assert not manager.get_events(0)


QUIET: dict[str, object] = {
    "_ready_tasks": 1, "_run_queue": (), "native": None, "_may_send_now": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("noise", "others", "unsubmitted", "quiet"),
    [
        ({}, 1, 0, True),
        ({}, 2, 0, False),
        ({}, 1, 1, False),
        ({"_ready_tasks": 0}, 0, 0, True),
        ({"_ready_tasks": 2}, 0, 0, False),
        ({"_run_queue": (1,)}, 0, 0, False),
        ({"native": object()}, 0, 0, False),
        ({"_may_send_now": False}, 0, 0, False),
    ],
)
def test_when_a_system_call_is_cheaper_than_the_ring(
    manager: UringIOManager,
    ring: ScriptedRing,
    noise: dict[str, object],
    others: int,
    unsubmitted: int,
    *,
    quiet: bool,
) -> None:
    for number in range(others):
        manager._entries[200 + number] = InFlight(manager, operations.nop())
    for number in range(unsubmitted):
        ring.push(operations.nop(), 300 + number)
    for name, value in {**QUIET, **noise}.items():
        setattr(manager, name, value)
    assert manager.is_quiet() == quiet
    manager.native = None


@pytest.mark.parametrize(
    ("config", "may"),
    [
        (RingConfig(), True),
        (RingConfig(allowed_operations=frozenset({"SEND"})), False),
        (RingConfig(sqpoll=SQPoll()), False),
    ],
)
def test_which_runs_may_send_by_a_system_call(
    ring: ScriptedRing, config: RingConfig, *, may: bool
) -> None:
    manager = UringIOManager(cast("Ring", ring), config)
    assert manager.is_quiet() == may
    close(manager, ring)


async def test_a_layer_that_is_disabled_has_no_ring() -> None:
    manager = current_io_manager()
    assert isinstance(manager, UringIOManager)
    before = manager.disabled
    manager.disabled = frozenset({"sockets"})
    try:
        assert current_ring("sockets") is None
        assert current_ring("files") is manager
    finally:
        manager.disabled = before
    assert current_ring("sockets") is manager


# ---- Results ---------------------------------------------------------------------------------


class ProbedError(RuntimeError):
    """What a probe finds."""


class CancelledError(RuntimeError):
    """What Trio raises for a task that was cancelled."""


def raise_cancelled() -> NoReturn:
    raise CancelledError


@pytest.mark.parametrize(
    ("res", "state", "error"),
    [
        (-errno.ECANCELED, {"closing": True}, trio.ClosedResourceError),
        (-errno.EINTR, {"closing": True}, trio.ClosedResourceError),
        (-errno.EIO, {"closing": True}, "[Errno 5] Input/output error"),
        (-errno.ECANCELED, {"raise_cancel": raise_cancelled}, CancelledError),
        (-errno.EIO, {"raise_cancel": raise_cancelled}, "[Errno 5] Input/output error"),
        (-errno.ECANCELED, {}, ProbedError),
        (-errno.ECANCELED, {"cancel_asked": True}, "[Errno 125] Operation canceled"),
        (-errno.EIO, {}, "[Errno 5] Input/output error"),
        (-errno.ETIME, {}, "[Errno 62] Timer expired"),
        (-errno.EINVAL, {}, "[Errno 22] Invalid argument"),
        (-errno.EINVAL, {"supported": ()}, UnsupportedOpcodeError),
        (-errno.EIO, {"supported": ()}, "[Errno 5] Input/output error"),
        (-errno.EACCES, {}, "[Errno 13] Permission denied"),
        (-errno.EACCES, {"allowed": False}, "may not perform RECV"),
        (-errno.EPERM, {"allowed": False}, "[Errno 1] Operation not permitted"),
        (-errno.EIO, {"fallback_reason": "no ring"}, "[Errno 5] no ring"),
    ],
)
def test_why_an_operation_has_failed(
    manager: UringIOManager,
    ring: ScriptedRing,
    res: int,
    state: dict[str, object],
    error: type[BaseException] | str,
) -> None:
    entry = InFlight(manager, operations.recv(1, bytearray(1)))
    entry.res = res
    for name, value in state.items():
        [owner] = [each for each in (entry, ring, manager) if hasattr(each, name)]
        setattr(owner, name, value)
    with pytest.raises(error if isinstance(error, type) else OSError) as caught:
        manager.failed(entry.operation, entry, ProbedError)
    if isinstance(error, str):
        assert error in str(caught.value)
    assert manager.statistics().cancelled == (caught.type is CancelledError)


def test_a_worker_that_there_is_is_not_the_reason(manager: UringIOManager) -> None:
    entry = InFlight(manager, operations.recv(1, bytearray(1)))
    entry.res = -errno.ECANCELED
    for probe in (None, lambda: None):
        with pytest.raises(OSError, match="Operation canceled"):
            manager.failed(entry.operation, entry, probe)


def test_a_timeout_that_ran_out_is_no_failure(manager: UringIOManager) -> None:
    operation = operations.timeout(1)
    operation.decode = lambda res, flags: (res, flags)  # type: ignore[assignment, return-value]
    entry = InFlight(manager, operation)
    entry.res, entry.flags = -errno.ETIME, 7
    assert manager.failed(operation, entry) == (0, 7)  # type: ignore[func-returns-value]


@pytest.mark.parametrize("closing", [True, False])
@pytest.mark.parametrize("cancelled", [True, False])
def test_an_entry_is_used_again_unless_somebody_asked_for_its_end(
    manager: UringIOManager, *, cancelled: bool, closing: bool
) -> None:
    entry = InFlight(manager, operations.nop())
    entry.raise_cancel, entry.closing = raise_cancelled if cancelled else None, closing
    entry.trap = SHIELDED
    operation = entry.operation
    manager._result(operation, entry)
    again = not cancelled and not closing
    assert manager._free_entries == [entry] * again
    assert (entry.operation is operation) != again  # so that it keeps no buffer
    assert (entry.trap is None) != again  # a reference cycle otherwise


# ---- Tasks that wait -------------------------------------------------------------------------


@asynccontextmanager
async def open_tasks(manager: UringIOManager) -> AsyncIterator[trio.Nursery]:
    """Open a nursery for tasks that perform operations; if the test fails, these fail too."""
    others = manager._entries.copy()
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException:
            manager.dispatch((number, -errno.EIO, 0) for number in {*manager._entries} - {*others})
            raise


def last(manager: UringIOManager) -> InFlight:
    return list(manager._entries.values())[-1]


async def test_an_interrupted_operation_is_repeated_unless_its_fd_closes(
    manager: UringIOManager,
) -> None:
    results: list[object] = []

    async def perform() -> None:
        with outcome_of(results):
            results.append(await manager.perform_shielded(operations.recv(9, bytearray(1))))

    for closing, expected in ((False, 1), (True, trio.ClosedResourceError)):
        async with open_tasks(manager) as nursery:
            nursery.start_soon(perform)
            await wait_all_tasks_blocked()
            [task] = nursery.child_tasks
            first = last(manager)
            assert task.custom_sleep_data is first
            first.closing = closing
            manager.dispatch([(first.user_data, -errno.EINTR, 0)])
            await wait_all_tasks_blocked()
            if not closing:
                assert last(manager).in_flight
                manager.dispatch([(last(manager).user_data, 1, 0)])
        assert results.pop() == expected


@pytest.mark.parametrize("call", ["perform", "perform_shielded"])
async def test_a_limited_operation_waits_for_its_token(manager: UringIOManager, call: str) -> None:
    manager.file_limiter.available_tokens = 1
    others = len(manager._entries)

    async def perform(*, limited: bool) -> None:
        operation = operations.fsync(9)
        operation.limited = limited
        await getattr(manager, call)(operation)

    async with open_tasks(manager) as nursery:
        for limited in (True, True, False):
            nursery.start_soon(partial(perform, limited=limited))
        for in_flight, tokens in ((2, 0), (2, 0), (1, 1)):
            await wait_all_tasks_blocked()
            assert len(manager._entries) - others == in_flight
            assert manager.file_limiter.available_tokens == tokens
            limited_first = sorted(
                list(manager._entries.values())[others:], key=lambda it: not it.operation.limited
            )
            manager.dispatch([(limited_first[0].user_data, 0, 0)])
    assert manager.file_limiter.available_tokens == 1


@pytest.mark.parametrize("call", ["perform", "perform_shielded"])
async def test_an_operation_with_a_buffer_is_performed_once(
    manager: UringIOManager, call: str
) -> None:
    operation = operations.recv(9, bytearray(1))
    async with open_tasks(manager) as nursery:
        nursery.start_soon(getattr(manager, call), operation)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="was performed already"):
            await getattr(manager, call)(operation)
        manager.dispatch([(last(manager).user_data, 1, 0)])


@pytest.mark.parametrize("call", ["perform", "perform_shielded"])
async def test_a_task_that_ends_by_force_leaves_its_buffer_in_place(
    manager: UringIOManager, call: str
) -> None:
    """As in a run that crashed, when it is collected."""
    buffer = bytearray(1)
    coroutine = getattr(manager, call)(operations.recv(9, buffer))
    coroutine.send(None)
    entry = last(manager)
    with pytest.raises(KeyError):
        coroutine.throw(KeyError())
    with pytest.raises(BufferError):
        buffer.append(0)
    manager.dispatch([(entry.user_data, 1, 0)])
    buffer.append(0)


async def test_the_result_of_a_zero_copy_send_comes_before_its_end(
    manager: UringIOManager,
) -> None:
    results: list[object] = []

    async def perform() -> None:
        results.append(await manager.perform(operations.send_zc(9, b"hello")))

    async with open_tasks(manager) as nursery:
        nursery.start_soon(perform)
        await wait_all_tasks_blocked()
        number = last(manager).user_data
        manager.dispatch([(number, 5, int(CqeFlag.MORE))])
        await wait_all_tasks_blocked()
        assert results == []
        manager.dispatch([(number, 0, int(CqeFlag.NOTIF))])
    assert results == [5]


def test_notify_closing_outside_a_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="async context"):
        trio.lowlevel.notify_closing(1)
