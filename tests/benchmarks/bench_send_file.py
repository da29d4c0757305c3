"""A file over loopback: `send_file` against `os.sendfile` in threads and read + send_all.

The receiver is another process. A rate of 1 is 1 MiB a second; CPU is per MiB, the sender's.

    python bench_send_file.py [--mib 64] [--transfers 3] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Send = Callable[[trio.SocketStream, int, int], Awaitable[object]]

MIB = 1 << 20
BLOCK = 1 << 18


async def send_file(stream: trio.SocketStream, fd: int, size: int) -> None:
    assert await trio_uring.send_file(stream, fd) == size


async def sendfile_in_thread(stream: trio.SocketStream, fd: int, size: int) -> None:
    sent, out = 0, stream.socket.fileno()
    while sent < size:
        try:
            sent += await trio.to_thread.run_sync(os.sendfile, out, fd, sent, size - sent)
        except BlockingIOError:
            await stream.socket.wait_writable()


async def blocking_sendfile_in_thread(stream: trio.SocketStream, fd: int, size: int) -> None:
    """What no event loop does: the thread itself waits for the receiver."""

    def send() -> None:
        sent, out = 0, stream.socket.fileno()
        os.set_blocking(out, True)
        while sent < size:
            sent += os.sendfile(out, fd, sent, size - sent)
        os.set_blocking(out, False)

    await trio.to_thread.run_sync(send)


async def read_and_send_all(stream: trio.SocketStream, fd: int, size: int) -> None:
    for offset in range(0, size, BLOCK):
        await stream.send_all(await trio.to_thread.run_sync(os.pread, fd, BLOCK, offset))


VARIANTS: dict[str, Send] = {
    "os.sendfile in a thread": sendfile_in_thread,
    "blocking, in a thread": blocking_sendfile_in_thread,
    "send_file": send_file,
    "read + send_all": read_and_send_all,
}

RECEIVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
buffer = bytearray(1 << 20)
while True:
    connection = listener.accept()[0]
    while connection.recv_into(buffer):
        pass
    connection.sendall(b"x")
"""


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(send: Send, fd: int, port: int, mib: int, transfers: int) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(transfers):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await send(stream, fd, mib * MIB)
                await stream.send_eof()
                await stream.receive_some(1)
        return time.perf_counter() - begin, cpu_seconds() - cpu

    elapsed, cpu = trio_uring.run(main, ring=trio_uring.RingConfig(require=True))
    total = mib * transfers
    return _measure.Sample(rate=total / elapsed, cpu_us=cpu / total * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--transfers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with (
        tempfile.TemporaryFile() as file,
        subprocess.Popen([sys.executable, "-c", RECEIVER], stdout=-1, text=True) as receiver,
    ):
        assert receiver.stdout is not None
        port = int(receiver.stdout.readline())
        for _ in range(options.mib):
            file.write(os.urandom(MIB))
        file.flush()
        variants = {
            name: lambda send=send: measure(
                send, file.fileno(), port, options.mib, options.transfers
            )
            for name, send in VARIANTS.items()
        }
        samples = _measure.interleave(variants, options.rounds)
        receiver.kill()
    title = f"{options.mib} MiB over loopback: MiB, and CPU µs per MiB"
    _measure.report(title, samples, "os.sendfile in a thread")


if __name__ == "__main__":
    main()
