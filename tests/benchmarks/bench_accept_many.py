"""Connections over loopback: `accept_many` against `SocketListener.accept`, ring and epoll.

Another process connects: many at a time, or one after the other, each when the last was closed.
The rate is in connections, CPU is per connection, the server's.

    python bench_accept_many.py [--connections 2000] [--rounds 5]
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
    from collections.abc import Callable

# Connections that are opened before the first of them is looked after.
BURSTS = [1, 16, 200]


def plain(listener: trio.SocketListener) -> trio.abc.Listener[trio.SocketStream]:
    return listener


VARIANTS: dict[str, tuple[Callable[..., tuple[float, float]], Callable[..., object]]] = {
    "Trio, accept": (trio.run, plain),
    "ring, accept": (trio_uring.run, plain),
    "accept_many": (trio_uring.run, trio_uring.accept_many),
}

PEER = """
import socket, sys
port, burst, connections = map(int, sys.argv[1:])
for _ in range(connections // burst):
    conns = []
    for _ in range(burst):
        c = socket.socket()
        c.setblocking(False)
        c.connect_ex(("127.0.0.1", port))
        conns.append(c)
    for c in conns:
        c.setblocking(True)
        c.recv(1)
        c.close()
"""


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(name: str, burst: int, connections: int) -> _measure.Sample:
    run, make = VARIANTS[name]

    async def main(sock: socket.socket) -> tuple[float, float]:
        trio_sock = trio.socket.from_stdlib_socket(sock)
        async with make(trio.SocketListener(trio_sock)) as listener:  # type: ignore[attr-defined]
            begin, cpu = time.perf_counter(), cpu_seconds()
            for _ in range(connections):
                stream = await listener.accept()
                stream.socket.close()
            return time.perf_counter() - begin, cpu_seconds() - cpu

    connections -= connections % burst
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        numbers = (sock.getsockname()[1], burst, connections)
        with subprocess.Popen([sys.executable, "-c", PEER, *map(str, numbers)]):
            elapsed, cpu = run(main, sock)
    return _measure.Sample(rate=connections / elapsed, cpu_us=cpu / connections * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for burst in BURSTS:
        variants = {name: partial(measure, name, burst, options.connections) for name in VARIANTS}
        samples = _measure.interleave(variants, options.rounds)
        _measure.report(f"{burst} connections at a time", samples, "Trio, accept")


if __name__ == "__main__":
    main()
