"""Connections served by one loop, and by the loops of several threads.

Each connection asks for one answer, for which the server computes: ``hash`` lets other threads work
meanwhile, ``Python`` does not. Ways to several loops:

- ``serve_threads``: one loop accepts, and hands over;
- ``shared listener``: each accepts from the same socket;
- ``SO_REUSEPORT``: each has a socket of its own, and the kernel chooses one by the addresses.

Then, what it costs to pass a file to another ring: as an fd, with a message that says so, or as a
fixed file, which the kernel sends (IORING_MSG_SEND_FD) and for which an fd is made there.

    python bench_serve_threads.py [--connections 300] [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import socket as stdlib_socket
import sys
import time
from array import array
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import RingConfig
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Work = Callable[[], object]
    Serve = Callable[[Callable[[trio.SocketStream], Awaitable[None]], int], Awaitable[None]]

BLOCK = bytes(1 << 20)
REQUIRED = RingConfig(require=True)
WORK: dict[str, Work] = {
    "hash": lambda: hashlib.sha256(BLOCK).digest(),
    "Python": lambda: sum(range(50_000)),
}

# Sixteen connections at a time, each new, from a process of its own.
CLIENT = """
import sys, threading, socket
port, count = map(int, sys.argv[1:])
def call(number):
    for _ in range(number):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b"x"
threads = [threading.Thread(target=call, args=(count // 16,)) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


async def one_loop(handler: Callable[[trio.SocketStream], Awaitable[None]], _threads: int) -> None:
    listeners = await trio.open_tcp_listeners(PORT, host="127.0.0.1")
    await trio.serve_listeners(handler, listeners)


async def serve_threads(
    handler: Callable[[trio.SocketStream], Awaitable[None]], threads: int
) -> None:
    listeners = await trio.open_tcp_listeners(PORT, host="127.0.0.1")
    await trio_uring.serve_threads(handler, listeners, threads=threads, ring=REQUIRED)


async def each_accepts(
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    threads: int,
    listener: Callable[[], stdlib_socket.socket],
) -> None:
    """Without the handling of cancellation and errors that `serve_threads` has."""
    scopes: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def loop(sock: stdlib_socket.socket) -> None:
        with trio.CancelScope() as scope:
            scopes.append((trio.lowlevel.current_trio_token(), scope))
            sock.setblocking(False)
            own = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
            await trio.serve_listeners(handler, [own])

    async with trio.open_nursery() as nursery:
        for _ in range(threads):
            run = partial(trio_uring.run, loop, listener(), ring=REQUIRED)
            nursery.start_soon(trio.to_thread.run_sync, run)
        try:
            await trio.sleep_forever()
        finally:
            for token, scope in scopes:
                token.run_sync_soon(scope.cancel)


async def shared_listener(
    handler: Callable[[trio.SocketStream], Awaitable[None]], threads: int
) -> None:
    with stdlib_socket.create_server(("127.0.0.1", PORT), backlog=1024) as listener:
        await each_accepts(handler, threads, listener.dup)


async def reuse_port(handler: Callable[[trio.SocketStream], Awaitable[None]], threads: int) -> None:
    await each_accepts(
        handler,
        threads,
        lambda: stdlib_socket.create_server(("127.0.0.1", PORT), backlog=1024, reuse_port=True),
    )


SERVE: dict[str, Serve] = {
    "one loop": one_loop,
    "serve_threads": serve_threads,
    "shared listener": shared_listener,
    "SO_REUSEPORT": reuse_port,
}
PORT = 0


def free_port() -> int:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(serve: Serve, work: Work, connections: int, threads: int) -> _measure.Sample:
    global PORT
    PORT = free_port()
    connections = max(connections // 16, 1) * 16

    async def handler(stream: trio.SocketStream) -> None:
        if await stream.receive_some():  # not the one that asked whether we listen
            work()
            await stream.send_all(b"x")

    async def main() -> tuple[float, float]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, handler, threads)
            while True:  # until it listens
                try:
                    await (await trio.open_tcp_stream("127.0.0.1", PORT)).aclose()
                    break
                except OSError:
                    await trio.sleep(0.001)
            begin, cpu = time.perf_counter(), cpu_seconds()
            client = [sys.executable, "-Sc", CLIENT, str(PORT), str(connections)]
            await trio.run_process(client)
            elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
            nursery.cancel_scope.cancel()
        return elapsed, cpu

    elapsed, cpu = trio_uring.run(main, ring=REQUIRED)
    return _measure.Sample(rate=connections / elapsed, cpu_us=cpu / connections * 1e6)


# ---- What it costs to pass a file ----------------------------------------------------------


def pass_files(way: str, count: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        manager = current_io_manager()
        assert isinstance(manager, UringIOManager)
        other = Ring(RingConfig())
        read, write = os.pipe()
        for ring in (manager.ring, other):
            slots = array("i", [-1])
            ring.register(RegisterOpcode.FILES, ffi.from_buffer("char[]", slots), 1)
        pass_one = PASS[way]
        begin, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(count):
            await pass_one(other, read)
        elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
        other.close()
        os.close(read)
        os.close(write)
        return elapsed, cpu

    elapsed, cpu = trio_uring.run(main, ring=REQUIRED)
    return _measure.Sample(rate=count / elapsed, cpu_us=cpu / count * 1e6)


async def as_an_fd(other: Ring, fd: int) -> None:
    """Like an accepted connection: a new fd, which the receiver closes."""
    new = os.dup(fd)
    await perform(operations.msg_ring(other.fd, 1))
    other.submit_and_wait(0)
    os.close(new)


async def as_a_fixed_file(other: Ring, fd: int) -> None:
    """Like a connection accepted as a fixed file, which the sender closes after sending it."""
    await perform(operations.files_update([fd], 0))
    await perform(operations.msg_ring_fd(other.fd, 0, 1, 0))
    await perform(operations.files_update([-1], 0))
    other.submit_and_wait(0)
    other.push(operations.fixed_fd_install(0), 2)
    other.push(operations.files_update([-1], 0), 3)
    for _, res, _ in other.submit_and_wait(1.0) or ():
        if res > 1:
            os.close(res)


PASS: dict[str, Callable[[Ring, int], Awaitable[None]]] = {
    "as an fd": as_an_fd,
    "as a fixed file": as_a_fixed_file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name, work in WORK.items():
        variants = {
            way: partial(measure, serve, work, options.connections, options.threads)
            for way, serve in SERVE.items()
        }
        samples = _measure.interleave(variants, options.rounds)
        title = f"Connections, work: {name}, {options.threads} threads"
        _measure.report(title, samples, "one loop")
    files = {way: partial(pass_files, way, options.connections * 10) for way in PASS}
    _measure.report("Files passed", _measure.interleave(files, options.rounds), "as an fd")


if __name__ == "__main__":
    main()
