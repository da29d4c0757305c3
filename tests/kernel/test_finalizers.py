"""Finalizers that use sockets and operations while the engine is in the middle of something.

The garbage collector runs them wherever an object is allocated (until Python 3.11), or wherever
Python code is called. Here a profile function and a callback of the collector stand for one.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio
from accounting import open_fds
from transfers import warm_streams
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._ring import Ring
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType


@contextmanager
def in_the_middle_of(code: CodeType, finalize: Callable[[str], None]) -> Iterator[None]:
    """Call *finalize* at each point of *code* where a finalizer can run."""

    def look(frame: FrameType | None, event: str) -> None:
        if frame is not None and frame.f_code is code:
            finalize(event)

    def profile(frame: FrameType, event: str, _argument: object) -> None:
        look(frame, event)

    def collected(phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            look(sys._getframe(1), "collection")

    # The interpreter keeps the memory of some small lists, whose reuse collects nothing.
    lists: list[list[object]] = [[] for _ in range(100)]
    thresholds = gc.get_threshold()
    gc.callbacks.append(collected)
    gc.set_threshold(1)
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(collected)
        lists.clear()


async def test_a_socket_closed_while_completions_are_fetched() -> None:
    """What the close fetches takes nothing away from what was fetched just before."""
    async with (
        warm_streams() as (kept, peer),
        warm_streams() as (first, _),
        warm_streams() as (second, _),
    ):
        received = list[bytes]()
        closed = list[trio.SocketStream]()

        async def receive() -> None:
            received.append(await kept.receive_some())

        async def be_closed(stream: trio.SocketStream) -> None:
            try:
                await stream.receive_some()
            except trio.ClosedResourceError:
                closed.append(stream)

        to_close = [first, second]

        def close_one(event: str) -> None:
            if event in {"c_return", "collection"} and to_close:
                to_close.pop().socket.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(be_closed, first)
            nursery.start_soon(be_closed, second)
            await wait_all_tasks_blocked()
            os.write(peer.socket.fileno(), b"kept")
            with in_the_middle_of(Ring.submit_and_wait.__code__, close_one):
                await trio.lowlevel.checkpoint()
            for stream in to_close:
                stream.socket.close()
        assert received == [b"kept"]
        assert len(closed) == 2


async def test_an_operation_started_while_another_one_is_pushed() -> None:
    """Each gets its own completion."""
    reading, writing = os.pipe()
    os.write(writing, b"data")
    inner = perform(operations.nop())
    started = list[object]()

    def start(event: str) -> None:
        if event == "call" and not started:
            started.append(None)
            started.append(inner.send(None))
            inner.close()

    buffer = bytearray(4)
    with in_the_middle_of(Ring.push.__code__, start):
        assert await perform(operations.readv(reading, [buffer], -1)) == 4
    assert buffer == b"data"
    assert len(started) == 2
    os.close(reading)
    os.close(writing)


async def test_an_fd_that_an_abandoned_operation_opens() -> None:
    """It is closed, and the task is not woken."""
    before = open_fds()
    opening = perform(operations.openat("/dev/null", os.O_RDONLY))
    opening.send(None)
    opening.close()
    await wait_all_tasks_blocked()
    await perform(operations.nop())
    assert open_fds() == before
