"""AnyIO's socket streams on the native engine; what differs from AnyIO's own is in conformance."""

from __future__ import annotations

import inspect
import random
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import pytest
import trio
from anyio._backends import _trio as anyio_trio
from anyio.abc import SocketAttribute, SocketStream, UNIXSocketStream
from trio.testing import wait_all_tasks_blocked

import trio_uring.anyio_backend  # noqa: F401 (as AnyIO imports it)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


@asynccontextmanager
async def streams() -> AsyncGenerator[tuple[UNIXSocketStream, UNIXSocketStream], None]:
    a, b = [await UNIXSocketStream.from_socket(end) for end in socket.socketpair()]
    async with a, b:
        # A socket's first receive is Python's, which finds out what kind of a socket it is.
        for ours, theirs in ((a, b), (b, a)):
            await ours.send(b"first")
            assert await theirs.receive() == b"first"
        yield a, b


def frames(task: trio.lowlevel.Task) -> list[str]:
    return [frame.f_code.co_name for frame, _ in task.iter_await_frames()]


async def test_one_frame_waits_for_a_receive() -> None:
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    async with streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive)
        await wait_all_tasks_blocked()
        [task] = nursery.child_tasks
        if statistics.engine == "native":
            assert frames(task) == ["receive"]
        await b.send(b"x")


async def test_the_methods_stay_coroutine_functions() -> None:
    for name, parameters in (("receive", ["self", "max_bytes"]), ("send", ["self", "item"])):
        method = getattr(anyio_trio.SocketStream, name)
        assert inspect.iscoroutinefunction(method)
        assert list(inspect.signature(method).parameters) == parameters
    async with streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.receive, 1)
        nursery.start_soon(b.send, b"x")


async def test_a_cancelled_receive_lets_the_next_one_in_and_loses_nothing() -> None:
    async with streams() as (a, b):
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.receive)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await b.send(b"x")
            assert await a.receive() == b"x"


async def test_a_cancelled_send_lets_the_next_one_in() -> None:
    async with streams() as (a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, bytes(5_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(anyio.BusyResourceError):
                await a.send(b"x")
            nursery.cancel_scope.cancel()
        raw = b.extra(SocketAttribute.raw_socket)
        with suppress(BlockingIOError):
            while True:
                raw.recv(1_000_000)
        await a.send(b"y")
        assert await b.receive() == b"y"


async def test_a_guard_that_somebody_else_holds() -> None:
    async with streams() as (a, b):
        guards: Any = a
        with guards._receive_guard, pytest.raises(anyio.BusyResourceError, match="reading from"):
            await a.receive()
        with guards._send_guard, pytest.raises(anyio.BusyResourceError, match="writing to"):
            await a.send(b"x")
        await a.send(b"x")
        assert await b.receive() == b"x"


async def test_another_reader_of_the_socket_is_found() -> None:
    async with streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(trio.lowlevel.wait_readable, a._raw_socket)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await a.receive()
        await b.send(b"x")
        await wait_all_tasks_blocked()
        assert await a.receive() == b"x"


@pytest.mark.ring(receive_buffers=1)
async def test_one_buffer_for_many() -> None:
    async def echo(stream: SocketStream) -> None:
        async for data in stream:
            await stream.send(data)
        await stream.send_eof()

    async def client(stream: SocketStream) -> None:
        for number in range(50):
            await stream.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number
        await stream.send_eof()
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for _ in range(20):
            a, b = await stack.enter_async_context(streams())
            nursery.start_soon(echo, a)
            nursery.start_soon(client, b)


@pytest.mark.ring(receive_buffers=1)
async def test_ends_and_resets_that_find_no_buffer() -> None:
    ended: list[type[Exception]] = []

    async def receive(stream: SocketStream) -> None:
        try:
            while True:
                await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError) as exc:
            ended.append(type(exc))

    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        for number in range(20):
            a, b = await stack.enter_async_context(streams())
            nursery.start_soon(receive, a)
            await a.send(b"unread" * (number % 2))  # a peer that is closed with this resets
            await b.send(b"x")
            await b.aclose()
    assert ended.count(anyio.EndOfStream) == 10
    assert ended.count(anyio.BrokenResourceError) == 10


async def test_bytes_of_all_sizes_arrive_in_order() -> None:
    data = random.Random(0).randbytes(2_000_000)
    sizes = random.Random(1)

    async def send(stream: SocketStream) -> None:
        start = 0
        while start < len(data):
            end = start + sizes.choice((1, 64, 4096, 70_000, 400_000))
            await stream.send(data[start:end])
            start = end
        await stream.send_eof()

    async with streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(send, a)
        received = b""
        async for part in b:
            assert len(part) <= 65536
            received += part
        assert received == data


def test_a_run_without_a_ring() -> None:
    async def main() -> None:
        async with streams() as (a, b):
            await a.send(b"x")
            assert await b.receive() == b"x"
            await a.send_eof()
            with pytest.raises(anyio.EndOfStream):
                await b.receive()

    anyio.run(main, backend="trio")


async def test_no_reference_to_a_stream_stays() -> None:
    async with streams() as (a, b):
        before = sys.getrefcount(a), sys.getrefcount(a._receive_guard)  # type: ignore[attr-defined]
        for _ in range(10):
            await b.send(b"x")
            await a.receive()
            await a.send(b"x")
            await b.receive()
        after = sys.getrefcount(a), sys.getrefcount(a._receive_guard)  # type: ignore[attr-defined]
        assert after == before
