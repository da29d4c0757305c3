"""A proxy, and an upload into a file, over loopback: through the kernel, and through Python.

Senders and receivers are other processes. A rate of 1 is 1 MiB a second; CPU is per MiB, that of
the one in the middle.

    python bench_splice.py [--mib 64] [--transfers 3] [--rounds 5]

And many small messages through a proxy, one after the other: a rate of 1 is one there and back.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import _measure
import _peers
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[..., Any]
    Pass = Callable[[trio.SocketStream, trio.SocketStream], Awaitable[object]]
    Store = Callable[[trio.SocketStream, int], Awaitable[object]]

ring = partial(trio_uring.run, ring=trio_uring.RingConfig(require=True))
MESSAGES = 2000
MESSAGE = bytes(100)


# --- A proxy --------------------------------------------------------------------------------


async def receive_and_send(source: trio.SocketStream, destination: trio.SocketStream) -> None:
    async for block in source:
        await destination.send_all(block)


PROXIES: dict[str, tuple[Run, Pass]] = {
    "Trio on epoll": (trio.run, receive_and_send),
    "Trio on the ring": (ring, receive_and_send),
    "relay": (ring, trio_uring.relay),
}


def measure_proxy(
    run: Run, pass_on: Pass, ports: tuple[int, int], mib: int, transfers: int
) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), _peers.cpu_seconds()
        for _ in range(transfers):
            async with (
                await trio.open_tcp_stream("127.0.0.1", ports[0]) as source,
                await trio.open_tcp_stream("127.0.0.1", ports[1]) as destination,
            ):
                await pass_on(source, destination)
                await destination.send_eof()
                await destination.receive_some(1)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = run(main)
    total = mib * transfers
    return _measure.Sample(rate=total / elapsed, cpu_us=cpu / total * 1e6)


def measure_messages(run: Run, pass_on: Pass) -> _measure.Sample:
    async def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        ours = await trio.open_tcp_stream(*listeners[0].socket.getsockname())
        return ours, await listeners[0].accept()

    async def main() -> tuple[float, float]:
        (client, source), (destination, server) = await pair(), await pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pass_on, source, destination)
            begin, cpu = time.perf_counter(), _peers.cpu_seconds()
            for _ in range(MESSAGES):
                await client.send_all(MESSAGE)
                await server.receive_some()
            end = time.perf_counter() - begin, _peers.cpu_seconds() - cpu
            nursery.cancel_scope.cancel()
        return end

    elapsed, cpu = run(main)
    return _measure.Sample(rate=MESSAGES / elapsed, cpu_us=cpu / MESSAGES * 1e6)


# --- An upload ------------------------------------------------------------------------------


async def receive_and_write(source: trio.SocketStream, fd: int) -> None:
    async with trio.wrap_file(open(fd, "wb", buffering=0, closefd=False)) as file:
        async for block in source:
            await file.write(block)


UPLOADS: dict[str, tuple[Run, Store]] = {
    "Trio on epoll": (trio.run, receive_and_write),
    "Trio on the ring": (ring, receive_and_write),
    "receive_file": (ring, trio_uring.receive_file),
}


def measure_upload(
    run: Run, store: Store, fd: int, port: int, mib: int, transfers: int
) -> _measure.Sample:
    async def main() -> tuple[float, float]:
        begin, cpu = time.perf_counter(), _peers.cpu_seconds()
        for _ in range(transfers):
            os.lseek(fd, 0, os.SEEK_SET)
            async with await trio.open_tcp_stream("127.0.0.1", port) as source:
                await store(source, fd)
        return time.perf_counter() - begin, _peers.cpu_seconds() - cpu

    elapsed, cpu = run(main)
    assert os.fstat(fd).st_size == mib * _peers.MIB
    total = mib * transfers
    return _measure.Sample(rate=total / elapsed, cpu_us=cpu / total * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--transfers", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = (options.mib, options.transfers)
    with (
        _peers.sender(options.mib) as source,
        _peers.receiver() as destination,
        tempfile.TemporaryFile() as file,
    ):
        ports, fd = (source, destination), file.fileno()
        proxies = {
            name: partial(measure_proxy, *way, ports, *size) for name, way in PROXIES.items()
        }
        proxied = _measure.interleave(proxies, options.rounds)
        uploads = {
            name: partial(measure_upload, *way, fd, source, *size) for name, way in UPLOADS.items()
        }
        uploaded = _measure.interleave(uploads, options.rounds)
    messages = {name: partial(measure_messages, *way) for name, way in PROXIES.items()}
    sent = _measure.interleave(messages, options.rounds)
    baseline = "Trio on epoll"
    _measure.report(f"A proxy for {options.mib} MiB: MiB, CPU µs per MiB", proxied, baseline)
    _measure.report(f"An upload of {options.mib} MiB: MiB, CPU µs per MiB", uploaded, baseline)
    _measure.report("A proxy for messages of 100 bytes: round trips", sent, baseline)


if __name__ == "__main__":
    main()
