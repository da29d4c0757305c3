"""Every field of a run's statistics is right."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, _run
from trio_uring._kernel.uapi import FeatureFlag, SetupFlag
from trio_uring._run import probe
from trio_uring._statistics import totals
from trio_uring.lowlevel import (
    FallbackStatistics,
    RingStatistics,
    operations,
    perform,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable

HOUR_NS = 3600 * 10**9


def statistics() -> RingStatistics:
    found: object = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


async def settled() -> RingStatistics:
    """Return the statistics when Trio's own tasks wait in epoll."""
    await wait_all_tasks_blocked()
    return statistics()


def difference(before: RingStatistics, after: RingStatistics) -> dict[str, int]:
    """Return by how much the counts of completions grew."""
    return {
        name: count - before.completed.get(name, 0)
        for name, count in after.completed.items()
        if count != before.completed.get(name, 0)
    }


async def test_they_tell_what_the_ring_is() -> None:
    ring = probe(RingConfig())
    found = statistics()
    assert found.backend == "io_uring"
    assert sum(SetupFlag[name] for name in found.setup_flags) == ring.setup_flags
    known = sum(FeatureFlag[name] for name in found.features)
    assert known == ring.features & sum(FeatureFlag)
    assert {"SINGLE_MMAP", "NODROP", "EXT_ARG"} <= set(found.features)
    assert found.refused == ring.refused
    assert found.entries == 256


@pytest.mark.ring(entries=9, completion_entries=9)
async def test_they_tell_the_entries_of_the_ring() -> None:
    assert statistics().entries == 16


async def test_a_run_that_has_done_nothing() -> None:
    found = await settled()
    assert (found.in_flight, found.cancelled, found.waiting_for_limit) == (0, 0, 0)
    # Trio's own wake-ups, and nobody else.
    assert (found.tasks_waiting_read, found.tasks_waiting_write) == (1, 0)
    assert set(found.completed) <= {"POLL_ADD"}


async def test_what_was_submitted_and_completed() -> None:
    before = await settled()
    for _ in range(10):
        await perform(operations.nop())
    after = statistics()
    assert difference(before, after) == {"NOP": 10}
    assert after.submitted - before.submitted == 10
    assert after.enters - before.enters == 10  # one for each turn of the loop
    assert after.in_flight == 0


async def test_many_operations_in_one_turn_need_one_system_call() -> None:
    async def nop() -> None:
        await perform(operations.nop())

    before = await settled()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(nop)
    after = statistics()
    assert difference(before, after) == {"NOP": 100}
    assert after.submitted - before.submitted == 100
    assert after.enters - before.enters < 10


async def test_a_turn_with_nothing_to_do_needs_no_system_call() -> None:
    before = await settled()
    for _ in range(1000):
        await trio.lowlevel.checkpoint()
    assert statistics().enters - before.enters < 10


async def test_failures_are_completions() -> None:
    before = await settled()
    with pytest.raises(OSError, match="Bad file descriptor"):
        await perform(operations.fsync(1_000_000))
    assert difference(before, statistics()) == {"FSYNC": 1}


async def test_in_flight_and_cancelled() -> None:
    before = await settled()
    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(perform, operations.timeout(HOUR_NS))
        waiting = await settled()
        assert waiting.in_flight == 7
        assert waiting.submitted - before.submitted == 7
        nursery.cancel_scope.cancel()
    after = statistics()
    assert after.in_flight == 0
    assert after.cancelled == 7
    assert difference(before, after) == {"TIMEOUT": 7, "ASYNC_CANCEL": 7}
    assert after.submitted - before.submitted == 14


async def test_what_came_first_was_not_cancelled() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.recv, 1)
            await wait_all_tasks_blocked()
            await b.send(b"x")
            nursery.cancel_scope.cancel()
        assert statistics().cancelled == 0


async def test_a_cancelled_scope_that_never_began() -> None:
    before = await settled()
    with trio.CancelScope() as scope:
        scope.cancel()
        await perform(operations.timeout(HOUR_NS))
    after = statistics()
    assert (after.cancelled, after.submitted) == (0, before.submitted)


async def test_they_count_the_tasks_that_wait() -> None:
    before = await settled()
    first, second = trio.socket.socketpair()
    ready, other = socket.socketpair()
    ready.setblocking(False)
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()
    read, write = os.pipe()
    readers = writers = 0
    with first, second, ready, other, listener:
        async with trio.lowlevel.FdStream(read) as stream, trio.open_nursery() as nursery:

            async def check(task: Awaitable[object], reading: int, writing: int) -> None:
                nonlocal readers, writers
                nursery.start_soon(_await, task)
                found = await settled()
                readers, writers = readers + reading, writers + writing
                assert found.tasks_waiting_read == before.tasks_waiting_read + readers
                assert found.tasks_waiting_write == before.tasks_waiting_write + writers

            await check(first.recv(1), 1, 0)
            await check(second.recvfrom(1), 1, 0)
            await check(listener.accept(), 1, 0)
            await check(stream.receive_some(), 1, 0)
            await check(trio.lowlevel.wait_readable(ready), 1, 0)
            await check(perform(operations.timeout(HOUR_NS)), 0, 0)
            with suppress(BlockingIOError):  # when it is full
                while True:
                    ready.send(bytes(100_000))
            await check(trio.lowlevel.wait_writable(ready), 0, 1)
            nursery.cancel_scope.cancel()
    os.close(write)
    after = await settled()
    assert after.tasks_waiting_read == before.tasks_waiting_read
    assert after.tasks_waiting_write == before.tasks_waiting_write


async def _await(task: Awaitable[object]) -> None:
    await task


@pytest.mark.ring(max_file_operations=2)
async def test_they_count_the_tasks_in_line() -> None:
    def limited() -> operations.Operation[None]:
        operation = operations.timeout(HOUR_NS)
        operation.limited = True
        return operation

    async with trio.open_nursery() as nursery:
        for number in range(1, 6):
            nursery.start_soon(perform, limited())
            found = await settled()
            assert found.in_flight == min(number, 2)
            assert found.waiting_for_limit == max(number - 2, 0)
        nursery.cancel_scope.cancel()
    found = statistics()
    assert (found.in_flight, found.waiting_for_limit, found.cancelled) == (0, 0, 2)


@pytest.mark.ring(receive_buffers=1)
async def test_they_count_the_receives_without_a_free_buffer() -> None:
    size = 60_000  # two do not fit into a buffer
    pairs = [trio.socket.socketpair() for _ in range(4)]
    assert statistics().buffers_ran_out == 0
    async with trio.open_nursery() as nursery:
        for receiver, _ in pairs:
            nursery.start_soon(receiver.recv, size)
        await wait_all_tasks_blocked()
        for _, sender in pairs:
            sender._sock.send(bytes(size))  # type: ignore[attr-defined]
    assert statistics().buffers_ran_out > 0
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


async def test_they_count_the_calls_of_each_route() -> None:
    assert sum(statistics().routes.values()) == 0
    async with await trio.open_file(__file__, "rb") as file:
        await file.read()
    routes = statistics().routes
    assert set(routes) == {"ring", "inline", "thread"}
    assert sum(routes.values()) == 3  # open, read, close


async def test_fields_cannot_be_changed() -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        statistics().in_flight = 7  # type: ignore[misc]


def fields_of(statistics: RingStatistics | FallbackStatistics) -> dict[str, type]:
    return {name: type(value) for name, value in attrs.asdict(statistics, recurse=False).items()}


def test_they_have_the_same_fields_without_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> RingStatistics | FallbackStatistics:
        found = trio_uring.statistics()
        plain: object = trio.lowlevel.current_statistics().io_statistics
        assert attrs.asdict(found) == attrs.asdict(cast("RingStatistics", plain))
        return found

    ring = trio_uring.run(main, ring=RingConfig(require=True))
    monkeypatch.setenv("TRIO_URING", "off")
    switched_off = trio_uring.run(main)
    monkeypatch.delenv("TRIO_URING")
    monkeypatch.setattr(_run, "why_no_core", "no core, for a test")
    with pytest.warns(RuntimeWarning, match="no core, for a test"):
        fallback = trio_uring.run(main)
    assert isinstance(ring, RingStatistics)
    assert (ring.backend, ring.fallback_reason) == ("io_uring", "")
    assert isinstance(fallback, FallbackStatistics)
    assert (fallback.backend, fallback.fallback_reason) == ("epoll", "no core, for a test")
    assert switched_off.fallback_reason == "TRIO_URING switches io_uring off"
    assert fields_of(fallback) == fields_of(switched_off) == fields_of(ring)


def test_a_run_that_asked_for_no_ring_has_them_too() -> None:
    async def main() -> RingStatistics | FallbackStatistics:
        left, right = trio.socket.socketpair()
        with left, right:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(left.recv, 1)
                await wait_all_tasks_blocked()
                found = trio_uring.statistics()
                nursery.cancel_scope.cancel()
        return found

    found = trio.run(main)
    assert isinstance(found, FallbackStatistics)
    assert (found.tasks_waiting_read, found.tasks_waiting_write) == (2, 0)
    assert found.fallback_reason.startswith("the run did not ask for a ring")
    assert sum(found.completed.values()) == found.enters == found.in_flight == 0


def test_totals_of_a_run_are_added_up() -> None:
    async def main() -> None:
        for _ in range(5):
            await perform(operations.nop())

    before = (totals.ring_runs, totals.fallback_runs, totals.completed["NOP"])
    for _ in range(2):
        trio_uring.run(main, ring=RingConfig(require=True))
    runs, fallbacks, nops = before
    assert (totals.ring_runs, totals.fallback_runs) == (runs + 2, fallbacks)
    assert totals.completed["NOP"] == nops + 10
