"""Counts what small programs cost on the ring, without measuring time, and prints it as JSON.

A program is an async context manager that yields a function of *n*, which performs *n* operations.
These are counted for each operation, in the loop's thread:

- ``calls``: Python functions that were entered or resumed;
- ``enters``: calls of io_uring_enter(2), and the send(2) that the native engine makes itself;
- ``blocks``: blocks of memory that are not freed with the garbage collector off: leaks, and memory
  that only the collector would free.
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import tempfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio
from anyio.abc import SocketStream

import trio_uring
from trio_uring import RingConfig
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Operations = Callable[[int], Awaitable[object]]

WARM_UP = 50  # lists of free objects and buffers, and caches of bytecode, are full then
OPERATIONS = 400
SAMPLES = 3  # the kernel may once answer a turn later

DATA = bytes(64)


# --- The programs ---------------------------------------------------------------------------


@asynccontextmanager
async def stream_echo() -> AsyncIterator[Operations]:
    a, b = (trio.SocketStream(sock) for sock in trio.socket.socketpair())

    async def echo() -> None:
        async for data in b:
            await b.send_all(data)

    async def round_trips(n: int) -> None:
        for _ in range(n):
            await a.send_all(DATA)
            await a.receive_some()

    async with a, b, trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        yield round_trips
        await a.send_eof()


@asynccontextmanager
async def socket_echo() -> AsyncIterator[Operations]:
    a, b = trio.socket.socketpair()

    async def echo() -> None:
        while data := await b.recv(100):
            await b.send(data)

    async def round_trips(n: int) -> None:
        for _ in range(n):
            await a.send(DATA)
            await a.recv(100)

    with a, b:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            yield round_trips
            a.shutdown(trio.socket.SHUT_WR)


@asynccontextmanager
async def datagram_echo() -> AsyncIterator[Operations]:
    kind = trio.socket.SOCK_DGRAM
    with trio.socket.socket(type=kind) as a, trio.socket.socket(type=kind) as b:
        for sock in (a, b):
            await sock.bind(("127.0.0.1", 0))
        address = b.getsockname()

        async def echo() -> None:
            while True:
                await b.sendto(*await b.recvfrom(100))

        async def round_trips(n: int) -> None:
            for _ in range(n):
                await a.sendto(DATA, address)
                await a.recvfrom(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            yield round_trips
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def anyio_echo() -> AsyncIterator[Operations]:
    a, b = [await SocketStream.from_socket(sock) for sock in tcp_pair()]

    async def echo() -> None:
        async for data in b:
            await b.send(data)

    async def round_trips(n: int) -> None:
        for _ in range(n):
            await a.send(DATA)
            await a.receive()

    async with a, b, trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        yield round_trips
        await a.send_eof()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


@asynccontextmanager
async def accept() -> AsyncIterator[Operations]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()

    async def connections(n: int) -> None:
        for _ in range(n):
            with trio.socket.socket() as client:
                await client.connect(address)
                stream = await listener.accept()
                await trio.aclose_forcefully(stream)

    async with listener:
        yield connections


@asynccontextmanager
async def cached_read() -> AsyncIterator[Operations]:
    with tempfile.TemporaryDirectory() as directory:
        path = trio.Path(directory, "file")
        await path.write_bytes(DATA)
        async with await path.open("rb", buffering=0) as file:

            async def reads(n: int) -> None:
                for _ in range(n):
                    await file.read(len(DATA))
                    await file.seek(0)

            yield reads


@asynccontextmanager
async def path_stat() -> AsyncIterator[Operations]:
    path = trio.Path(__file__)

    async def stats(n: int) -> None:
        for _ in range(n):
            await path.stat()

    yield stats


@asynccontextmanager
async def small_file() -> AsyncIterator[Operations]:
    with tempfile.TemporaryDirectory() as directory:
        path = trio.Path(directory, "file")
        await path.write_bytes(DATA)

        async def files(n: int) -> None:
            for _ in range(n):
                async with await trio.open_file(path, "rb") as file:
                    await file.read()

        yield files


@asynccontextmanager
async def path_read() -> AsyncIterator[Operations]:
    with tempfile.TemporaryDirectory() as directory:
        path = trio.Path(directory, "file")
        await path.write_bytes(DATA)

        async def reads(n: int) -> None:
            for _ in range(n):
                await path.read_bytes()

        yield reads


@asynccontextmanager
async def empty_turn() -> AsyncIterator[Operations]:
    async def turns(n: int) -> None:
        for _ in range(n):
            await trio.lowlevel.checkpoint()

    yield turns


PROGRAMS = (
    *(stream_echo, socket_echo, datagram_echo, anyio_echo),
    *(accept, cached_read, small_file, path_read, path_stat, empty_turn),
)


# --- Counting -------------------------------------------------------------------------------


def enters() -> int:
    manager: Any = current_io_manager()
    sent_now = 0 if manager.native is None else manager.native.sent_now
    return manager.ring.enters + manager.sent_now + sent_now


async def calls_of(operations: Operations) -> float:
    calls = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    try:
        await operations(OPERATIONS)
    finally:
        sys.setprofile(None)
    return calls / OPERATIONS


async def enters_of(operations: Operations) -> float:
    before = enters()
    await operations(OPERATIONS)
    return (enters() - before) / OPERATIONS


async def blocks_of(operations: Operations) -> float:
    gc.collect()
    await operations(WARM_UP)  # the collector has emptied the lists of free objects
    before = sys.getallocatedblocks()
    await operations(OPERATIONS)
    return (sys.getallocatedblocks() - before) / OPERATIONS


async def count(program: Callable[[], Any]) -> dict[str, float]:
    async with program() as operations:
        await operations(WARM_UP)
        samples = [
            (await calls_of(operations), await enters_of(operations), await blocks_of(operations))
            for _ in range(SAMPLES)
        ]
    # A few calls and blocks are those of the counting; a system call that is made for one
    # operation in ten is worth a line.
    calls, enters, blocks = map(min, zip(*samples, strict=True))
    return {"calls": round(calls), "enters": round(enters, 1), "blocks": round(blocks)}


async def main() -> None:
    gc.disable()
    statistics: Any = trio.lowlevel.current_statistics().io_statistics
    costs = {program.__name__: await count(program) for program in PROGRAMS}
    print(json.dumps({"engine": statistics.engine, "costs": costs}))


def print_costs() -> None:
    # With an ample turn budget, so that the counts do not depend on how fast the machine is.
    trio_uring.run(main, ring=RingConfig(require=True, turn_budget=1.0))


if __name__ == "__main__":
    print_costs()
