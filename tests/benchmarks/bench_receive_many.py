"""Messages over loopback: `receive_many` against `receive_some`, on the ring and on Trio's epoll.

The peer is another process. It sends, in turns, on all connections; or it sends one message on
each, and waits for all answers. The rate is in messages, CPU is per message, the receiver's.

    python bench_receive_many.py [--messages 20000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import socket
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Receive = Callable[[trio.SocketStream, bool, int], Awaitable[object]]

# Connections, bytes of a message, whether each is answered.
CASES = [(1, 64, False), (64, 64, False), (1, 16384, False), (32, 64, True), (32, 4096, True)]


async def receive_some(stream: trio.SocketStream, answer: bool, size: int) -> None:
    left = size
    async for data in stream:
        left -= len(data)
        if answer and left <= 0:
            left += size
            await stream.send_all(b"x")


async def receive_many(stream: trio.SocketStream, answer: bool, size: int) -> None:
    left = size
    async with trio_uring.receive_many(stream) as leases:
        async for lease in leases:
            with lease:
                left -= len(lease.memory)
            if answer and left <= 0:
                left += size
                await stream.send_all(b"x")


async def receive_nowait(stream: trio.SocketStream, answer: bool, size: int) -> None:
    """Receive all that has arrived, before other tasks run."""
    left = size
    async with trio_uring.receive_many(stream) as leases:
        async for lease in leases:
            try:
                while True:
                    with lease:
                        left -= len(lease.memory)
                    lease = leases.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                pass
            if answer and left <= 0:
                left += size
                await stream.send_all(b"x")


VARIANTS: dict[str, tuple[Callable[..., tuple[float, float]], Receive]] = {
    "Trio, receive_some": (trio.run, receive_some),
    "ring, receive_some": (trio_uring.run, receive_some),
    "receive_many": (trio_uring.run, receive_many),
    "receive_many + nowait": (trio_uring.run, receive_nowait),
}

PEER = """
import socket, sys
port, connections, size, answered, messages = map(int, sys.argv[1:])
conns = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
for c in conns:
    c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
message = bytes(size)
for _ in range(messages // connections):
    for c in conns:
        c.sendall(message)
    if answered:
        for c in conns:
            c.recv(1)
"""


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, connections: int, size: int, answer: bool, messages: int) -> _measure.Sample:
    run, receive = VARIANTS[name]

    async def main(listener: socket.socket) -> tuple[float, float]:
        trio_listener = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
        streams = [await trio_listener.accept() for _ in range(connections)]
        begin, cpu = time.perf_counter(), cpu_seconds()
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(receive, stream, answer, size)
        elapsed = time.perf_counter() - begin, cpu_seconds() - cpu
        for stream in streams:
            await stream.aclose()
        return elapsed

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        numbers = (listener.getsockname()[1], connections, size, int(answer), messages)
        with subprocess.Popen([sys.executable, "-c", PEER, *map(str, numbers)]):
            elapsed, cpu = run(main, listener)
    return _measure.Sample(rate=messages / elapsed, cpu_us=cpu / messages * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for connections, size, answer in CASES:
        variants = {
            name: partial(measure, name, connections, size, answer, options.messages)
            for name in VARIANTS
        }
        samples = _measure.interleave(variants, options.rounds)
        each = "answered" if answer else "not answered"
        title = f"{connections} connections, messages of {size} bytes, {each}"
        _measure.report(title, samples, "Trio, receive_some")


if __name__ == "__main__":
    main()
