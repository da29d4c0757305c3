"""A file over loopback: `send_file` against `os.sendfile` in threads and read + send_all.

The receiver is another process. A rate of 1 is 1 MiB a second; CPU is per MiB, the sender's.

    python bench_send_file.py [--mib 64] [--transfers 3] [--rounds 5]

And the same with small files, one after the other on one connection: a rate of 1 is one file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
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
    with tempfile.TemporaryFile() as file, _peers.receiver() as port:
        for _ in range(options.mib):
            file.write(os.urandom(_peers.MIB))
        file.flush()
        variants = {
            name: lambda send=send: measure(
                send, file.fileno(), port, options.mib, options.transfers
            )
            for name, send in VARIANTS.items()
        }
        samples = _measure.interleave(variants, options.rounds)
        small = {
            name: lambda send=send: measure_small(send, file.fileno(), port)
            for name, send in VARIANTS.items()
        }
        small_samples = _measure.interleave(small, options.rounds)
    title = f"{options.mib} MiB over loopback: MiB, and CPU µs per MiB"
    _measure.report(title, samples, "os.sendfile in a thread")
    title = f"Files of {SMALL} bytes over loopback: files, and CPU µs per file"
    _measure.report(title, small_samples, "os.sendfile in a thread")


if __name__ == "__main__":
    main()
