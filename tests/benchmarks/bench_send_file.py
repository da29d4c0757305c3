"""A file over loopback: `send_file` against asyncio, `os.sendfile` in threads, and read + send_all.

The receiver is another process. A rate of 1 is 1 MiB a second; CPU is per MiB, the sender's.

    python bench_send_file.py [--mib 64] [--transfers 3] [--rounds 5]

And the same with small files, one after the other on one connection: a rate of 1 is one file.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import _peers
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Send = Callable[[trio.SocketStream, int, int], Awaitable[object]]

BLOCK = 1 << 18
SMALL = 1 << 14
SMALL_FILES = 1000


async def send_file(stream: trio.SocketStream, fd: int, size: int) -> None:
    assert await trio_uring.send_file(stream, fd, count=size) == size


async def sendfile_in_thread(stream: trio.SocketStream, fd: int, size: int) -> None:
    sent, out = 0, stream.socket.fileno()
    while sent < size:
        try:
            sent += await trio.to_thread.run_sync(os.sendfile, out, fd, sent, size - sent)
        except BlockingIOError:
            await stream.socket.wait_writable()


async def blocking_sendfile_in_thread(stream: trio.SocketStream, fd: int, size: int) -> None:
    """The thread itself waits for the receiver, which no event loop does."""

    def send() -> None:
        sent, out = 0, stream.socket.fileno()
        os.set_blocking(out, True)
        while sent < size:
            sent += os.sendfile(out, fd, sent, size - sent)
        os.set_blocking(out, False)

    await trio.to_thread.run_sync(send)


async def read_and_send_all(stream: trio.SocketStream, fd: int, size: int) -> None:
    for offset in range(0, size, BLOCK):
        length = min(BLOCK, size - offset)
        await stream.send_all(await trio.to_thread.run_sync(os.pread, fd, length, offset))


VARIANTS: dict[str, Send] = {
    "os.sendfile in a thread": sendfile_in_thread,
    "blocking, in a thread": blocking_sendfile_in_thread,
    "send_file": send_file,
    "read + send_all": read_and_send_all,
}


def measure(send: Send, fd: int, port: int, mib: int, transfers: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), _peers.cpu_seconds()
        for _ in range(transfers):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await send(stream, fd, mib * _peers.MIB)
                await stream.send_eof()
                await stream.receive_some(1)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
    total = mib * transfers
    return _measure.Sample(rate=total / elapsed, cpu_us=cpu / total * 1e6)


def measure_asyncio(path: str, port: int, mib: int, transfers: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        begin, cpu = time.perf_counter(), _peers.cpu_seconds()
        with Path(path).open("rb") as file:
            for _ in range(transfers):
                with socket.socket() as sock:
                    sock.setblocking(False)
                    await loop.sock_connect(sock, ("127.0.0.1", port))
                    await loop.sock_sendfile(sock, file, 0, mib * _peers.MIB)
                    sock.shutdown(socket.SHUT_WR)
                    await loop.sock_recv(sock, 1)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = asyncio.run(main())
    total = mib * transfers
    return _measure.Sample(rate=total / elapsed, cpu_us=cpu / total * 1e6)


def measure_small(send: Send, fd: int, port: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            begin, cpu = time.perf_counter(), _peers.cpu_seconds()
            for _ in range(SMALL_FILES):
                await send(stream, fd, SMALL)
            await stream.send_eof()
            await stream.receive_some(1)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
    return _measure.Sample(rate=SMALL_FILES / elapsed, cpu_us=cpu / SMALL_FILES * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--transfers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.NamedTemporaryFile() as file, _peers.receiver() as port:
        for _ in range(options.mib):
            file.write(os.urandom(_peers.MIB))
        file.flush()
        variants = {
            name: lambda send=send: measure(
                send, file.fileno(), port, options.mib, options.transfers
            )
            for name, send in VARIANTS.items()
        }
        variants["asyncio"] = lambda: measure_asyncio(
            file.name, port, options.mib, options.transfers
        )
        samples = _measure.interleave(variants, options.rounds)
        small = {
            name: lambda send=send: measure_small(send, file.fileno(), port)
            for name, send in VARIANTS.items()
        }
        small_samples = _measure.interleave(small, options.rounds)
    title = f"{options.mib} MiB over loopback: MiB, and CPU µs per MiB"
    _measure.report(title, samples, "asyncio")
    title = f"Files of {SMALL} bytes over loopback: files, and CPU µs per file"
    _measure.report(title, small_samples, "os.sendfile in a thread")


if __name__ == "__main__":
    main()
