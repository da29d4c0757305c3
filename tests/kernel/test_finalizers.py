"""Finalizers that use sockets and operations while the engine is in the middle of something.

The garbage collector runs them wherever an object is allocated (until Python 3.11), or wherever
Python code is called. Here a profile function and a callback of the collector stand for one.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from accounting import open_fds
from races import current_manager
from transfers import warm_streams
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._in_flight import IGNORED
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType

    from trio_uring._engine._ring import Completion


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


@pytest.mark.parametrize("wanted", ["c_return", "collection"])
@pytest.mark.parametrize(
    "code",
    [Ring.submit_and_wait.__code__, UringIOManager._get_events.__code__],
    ids=lambda code: code.co_name,
)
async def test_a_socket_closed_while_completions_are_fetched(code: CodeType, wanted: str) -> None:
    """What the close fetches takes nothing away from what was fetched just before."""
    async with AsyncExitStack() as stack:
        kept, peer = await stack.enter_async_context(warm_streams())
        to_close = [(await stack.enter_async_context(warm_streams()))[0] for _ in range(12)]
        received = list[bytes]()
        closed = list[trio.SocketStream]()

        async def receive() -> None:
            received.append(await kept.receive_some())

        async def be_closed(stream: trio.SocketStream) -> None:
            try:
                await stream.receive_some()
            except trio.ClosedResourceError:
                closed.append(stream)

        def close_one(event: str) -> None:
            if event == wanted and to_close:
                to_close.pop().socket.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for stream in to_close:
                nursery.start_soon(be_closed, stream)
            await wait_all_tasks_blocked()
            os.write(peer.socket.fileno(), b"kept")
            # One that was fetched before, for nobody, so that _get_events is called.
            current_manager()._backlog.append((IGNORED, 0, 0))
            with in_the_middle_of(code, close_one):
                await trio.lowlevel.checkpoint()
            for stream in to_close:
                stream.socket.close()
        assert received == [b"kept"]
        assert len(closed) == 12


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


async def test_completions_fetched_while_others_are_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are dispatched in the next iteration."""
    manager = current_manager()
    added = list[tuple[int, int, int]]()

    class Fetched(list[tuple[int, int, int]]):
        def __radd__(self, others: list[Completion]) -> list[Completion]:
            together = [*others, *self]
            added.append((IGNORED, 0, 1))
            manager._backlog += added
            return together

    def fetch(_timeout: float) -> list[Completion]:
        return Fetched([(IGNORED, 0, 2)])

    manager._backlog.append((IGNORED, 0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(manager.ring, "submit_and_wait", fetch)
        found = [*manager._get_events(0)]
    assert found == [(IGNORED, 0, 0), (IGNORED, 0, 2)]
    assert manager._backlog == added
