"""Scenarios that must work on every ring and without one. Child processes run them."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import trio
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, SQPoll

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import outcome

CLIENTS = 10


async def echo() -> None:
    """Serve several clients over TCP."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async def call(port: int, number: int) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            for size in (1, 1000, 100_000):
                sent = bytes([number]) * size
                received = bytearray()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stream.send_all, sent)
                    while len(received) < size:
                        received += await stream.receive_some()
                assert received == sent

    async with trio.open_nursery() as server:
        listeners = await server.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as clients:
            for number in range(CLIENTS):
                clients.start_soon(call, port, number)
        server.cancel_scope.cancel()


async def cancel() -> None:
    """Cancel waiting operations many times, and lose nothing."""
    a, b = trio.socket.socketpair()
    with a, b:
        for number in range(50):
            received = b""
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    nonlocal received
                    received = await a.recv(1)

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                if number % 2:
                    await b.send(b"x")
                nursery.cancel_scope.cancel()
            if not number % 2:
                await b.send(b"x")
            assert received + (b"" if received else await a.recv(1)) == b"x"
        with trio.move_on_after(0.01) as scope:
            await a.recv(1)
        assert scope.cancelled_caught


async def close() -> None:
    """Close a file that another task waits for. The peer notices immediately."""
    for _ in range(10):
        a, b = trio.socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    try:
                        await a.recv(1)
                    except trio.ClosedResourceError:
                        return
                    raise AssertionError("it was closed")

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                a.close()
                assert await b.recv(1) == b""


async def datagrams() -> None:
    """Datagrams, and receives into a buffer of the program."""
    with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as a:
        await a.bind(("127.0.0.1", 0))
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as b:
            await b.bind(("127.0.0.1", 0))
            await b.sendto(b"data", a.getsockname())
            assert await a.recvfrom(100) == (b"data", b.getsockname())
            await b.connect(a.getsockname())
            await b.send(b"more")
            buffer = bytearray(100)
            assert await a.recv_into(buffer) == 4
            assert buffer[:4] == b"more"


async def others() -> None:
    """Threads, child processes, pipes, readiness, files."""
    assert await trio.to_thread.run_sync(lambda: trio.from_thread.run_sync(lambda: 7)) == 7
    done = await trio.run_process([sys.executable, "-c", "print(7)"], capture_stdout=True)
    assert done.stdout == b"7\n"
    a, b = socket.socketpair()
    with a, b:
        await trio.lowlevel.wait_writable(a)
        b.send(b"x")
        await trio.lowlevel.wait_readable(a)
    async with await trio.open_file(__file__) as file:
        assert "readiness, files" in await file.read()


async def everything() -> Any:
    """Run all of the above, and return the statistics."""
    with trio.fail_after(30):
        for scenario in (echo, cancel, close, datagrams, others):
            await scenario()
    return trio.lowlevel.current_statistics().io_statistics


def as_guest(
    main: Callable[[], Awaitable[Any]], ring: RingConfig | None = None, **arguments: Any
) -> Any:
    """Run *main* as a guest of asyncio, and return its result."""

    async def host() -> Any:
        loop = asyncio.get_running_loop()
        loop.slow_callback_duration = 60.0  # no complaints of a busy machine
        ended: asyncio.Future[outcome.Outcome[Any]] = loop.create_future()
        trio_uring.start_guest_run(
            main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=ended.set_result,
            ring=ring,
            **arguments,
        )
        return (await ended).unwrap()

    return asyncio.run(host())


def report(sqpoll: str = "") -> None:
    """Run everything, as a plain run and as a guest, and print the statistics of both as JSON."""
    config = RingConfig(sqpoll=SQPoll(idle=0.001) if sqpoll else None)
    for statistics in (trio_uring.run(everything, ring=config), as_guest(everything, config)):
        print(json.dumps(attrs.asdict(statistics)))


def print_backend() -> None:
    """Run everything with plain ``trio.run``, and print the backend."""
    signal.set_wakeup_fd(-1)  # after a fork it is that of the parent's run, and Trio would warn
    print(trio.run(everything).backend, flush=True)


if __name__ == "__main__":
    report(*sys.argv[1:])
