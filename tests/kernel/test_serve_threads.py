"""`serve_threads`: every connection is handled, in one of the loops, and closed."""

from __future__ import annotations

import errno
import logging
import socket as stdlib_socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.lowlevel import checkpoint
from trio.testing import memory_stream_pair, open_stream_to_socket_listener, wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, RingUnavailableError, serve_threads
from trio_uring.lowlevel import on_ring

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup  # type: ignore[import-not-found, unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Handler = Callable[[trio.SocketStream], Awaitable[object]]

pytestmark = pytest.mark.usefixtures("fd_ledger")

REQUIRED: Final = RingConfig(require=True)
RUNS: Final = {"ring": partial(trio_uring.run, ring=REQUIRED), "no ring": trio.run}
THREADS: Final = 3


async def started(
    nursery: trio.Nursery, handler: Handler, threads: int = THREADS, **options: Any
) -> trio.SocketListener:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await nursery.start(partial(serve_threads, handler, listeners, threads=threads, **options))
    return listeners[0]


def wake_messages() -> int:
    statistics = trio.lowlevel.current_statistics().io_statistics
    return statistics.completed.get("MSG_RING", 0) if statistics.backend == "io_uring" else 0


@pytest.mark.parametrize("run", RUNS)
def test_each_connection_is_handled_in_one_of_the_threads(run: str) -> None:
    handled: Counter[str] = Counter()

    async def echo(stream: trio.SocketStream) -> None:
        assert on_ring()
        handled[threading.current_thread().name] += 1
        async for data in stream:
            await stream.send_all(data)

    async def call(listener: trio.SocketListener, number: int) -> None:
        async with await open_stream_to_socket_listener(listener) as stream:
            for size in (1, 100_000):
                data = bytes([number]) * size
                await stream.send_all(data)
                received = b""
                while len(received) < size:
                    received += await stream.receive_some()
                assert received == data

    async def main() -> None:
        async with trio.open_nursery() as server:
            listener = await started(server, echo, ring=REQUIRED)
            async with trio.open_nursery() as clients:
                for number in range(30):
                    clients.start_soon(call, listener, number)
            if run == "ring":
                assert wake_messages() > 0
            server.cancel_scope.cancel()
        assert listener.socket.fileno() == -1

    RUNS[run](main)
    assert handled.total() == 30
    assert threading.current_thread().name not in handled
    assert 1 < len(handled) <= THREADS


async def test_a_loop_that_is_busy_gets_none() -> None:
    """Another one takes the connection."""
    blocked, free = threading.Event(), threading.Event()
    threads: list[int] = []

    async def handler(stream: trio.SocketStream) -> None:
        threads.append(threading.get_ident())
        if not blocked.is_set():
            await wait_all_tasks_blocked()  # its loop waits for the next connection
            blocked.set()
            free.wait()  # the whole loop
        await stream.send_all(b"x")

    async with trio.open_nursery() as server:
        listener = await started(server, handler, threads=2)
        first = await open_stream_to_socket_listener(listener)
        while not blocked.is_set():
            await checkpoint()
        for _ in range(5):
            async with await open_stream_to_socket_listener(listener) as stream:
                assert await stream.receive_some() == b"x"
        free.set()
        assert await first.receive_some() == b"x"
        await first.aclose()
        server.cancel_scope.cancel()
    assert threads.count(threads[0]) == 1


async def test_cancelled_with_handlers_in_all_loops() -> None:
    waiting: list[str] = []
    cancelled: list[str] = []

    async def handler(_stream: trio.SocketStream) -> None:
        name = threading.current_thread().name
        waiting.append(name)
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(name)

    async with trio.open_nursery() as server:
        listener = await started(server, handler)
        clients = [await open_stream_to_socket_listener(listener) for _ in range(20)]
        while len(waiting) < len(clients):
            await checkpoint()
        server.cancel_scope.cancel()
    assert sorted(cancelled) == sorted(waiting)
    for client in clients:
        assert await client.receive_some() == b""
        await client.aclose()


@pytest.mark.parametrize("steps", range(0, 40, 3))
async def test_cancelled_at_any_time(steps: int) -> None:
    """Each connection is closed, wherever it is at that time."""

    async def handler(stream: trio.SocketStream) -> None:
        await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=64)
        clients = [
            stdlib_socket.create_connection(listeners[0].socket.getsockname()) for _ in range(9)
        ]
        nursery.start_soon(partial(serve_threads, handler, listeners, threads=2))
        for _ in range(steps):
            await checkpoint()
        nursery.cancel_scope.cancel()
    for client in clients:
        client.settimeout(30)
        with suppress(ConnectionResetError):  # it was in the backlog
            assert client.recv(1) == b""
        client.close()


async def test_a_handler_that_fails_ends_it_all() -> None:
    waiting, ended = threading.Event(), threading.Event()

    async def handler(stream: trio.SocketStream) -> None:
        if await stream.receive_some() == b"!":
            raise ValueError("on purpose")
        waiting.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(serve_threads, handler, listeners, threads=2))
            async with (
                await open_stream_to_socket_listener(listeners[0]) as one,
                await open_stream_to_socket_listener(listeners[0]) as two,
            ):
                await one.send_all(b".")
                while not waiting.is_set():
                    await checkpoint()
                await two.send_all(b"!")
                await trio.sleep_forever()
    assert caught.group_contains(ValueError, match="on purpose")
    assert ended.is_set()


class Accepts(trio.abc.Listener[trio.abc.Stream]):
    """A listener that accepts the given streams, then waits."""

    def __init__(self, *given: trio.abc.Stream | Exception) -> None:
        self.given = list(given)
        self.closed = False

    async def accept(self) -> trio.abc.Stream:
        await checkpoint()
        if not self.given:
            await trio.sleep_forever()
        given = self.given.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    async def aclose(self) -> None:
        self.closed = True


async def test_an_error_of_accept_ends_it_all_unless_fds_ran_out(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = memory_stream_pair()
    listener = Accepts(OSError(errno.EMFILE, "on purpose"), theirs, OSError(errno.EBADF, "really"))
    handled: list[object] = []
    with caplog.at_level(logging.ERROR), pytest.raises(BaseExceptionGroup) as caught:
        await serve_threads(_append_to(handled), [listener], threads=1)
    assert caught.group_contains(OSError, match="really")
    assert "trying again" in caplog.text
    assert listener.closed
    with pytest.raises((trio.ClosedResourceError, trio.BrokenResourceError)):
        await theirs.send_all(b"x")
    await ours.aclose()


def _append_to(handled: list[object]) -> Callable[[trio.abc.Stream], Awaitable[None]]:
    async def handler(stream: trio.abc.Stream) -> None:
        handled.append(stream)
        await checkpoint()

    return handler


@pytest.mark.parametrize("threads", [0, -1, 1025])
async def test_wrong_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 1024"):
        await serve_threads(_append_to([]), [], threads=threads)


async def test_threads_that_get_no_ring_fail_if_one_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They fall back, or fail, as any run does."""
    impossible = {"sqpoll": trio_uring.SQPoll(cpu=65535)}
    with pytest.raises(BaseExceptionGroup) as caught:
        await serve_threads(
            _append_to([]), [Accepts()], threads=2, ring=RingConfig(require=True, **impossible)
        )
    assert caught.group_contains(RingUnavailableError)


async def test_cancelled_before_it_begins_it_starts_no_thread() -> None:
    listener = Accepts()
    with trio.CancelScope() as scope:
        scope.cancel()
        await serve_threads(_append_to([]), [listener], threads=2)
    assert scope.cancelled_caught
    assert listener.closed
    await wait_all_tasks_blocked()
