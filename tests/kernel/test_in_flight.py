"""In-flight entries are reused, and keep nothing alive while they are free."""

from __future__ import annotations

import gc
import weakref

import trio
from races import current_manager
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._in_flight import InFlight
from trio_uring.lowlevel import operations, perform


class Data(bytearray):
    """Bytes that support weak references."""


async def test_no_buffer_stays_alive() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        data = Data(b"data")
        gone = weakref.ref(data)
        assert await a.send(data) == 4
        del data
        assert gone() is None
        buffer = Data(4)
        gone = weakref.ref(buffer)
        assert await b.recv_into(buffer) == 4
        del buffer
        assert gone() is None


async def test_a_cancelled_operation_is_no_cyclic_garbage() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            with trio.move_on_after(0) as scope:
                await b.recv(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.recv, 1)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            gc.collect()
            # Of earlier runs there may be some that takes the collector two rounds.
            entries = [entry for entry in gc.garbage if isinstance(entry, InFlight)]
            assert not [entry for entry in entries if entry.table is current_manager()]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert scope.cancelled_caught


async def test_what_happened_to_one_operation_says_nothing_about_the_next() -> None:
    """What happened to one operation says nothing about the next."""
    a, b = trio.socket.socketpair()
    with a, b:
        for _ in range(10):
            with trio.move_on_after(0) as scope:
                await b.recv(1)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.recv, 1)
                await wait_all_tasks_blocked()
                await a.send(b"1")  # completed by the time it is cancelled
                nursery.cancel_scope.cancel()
            await perform(operations.nop())
            await a.send(b"2")
            assert await b.recv(1) == b"2"
