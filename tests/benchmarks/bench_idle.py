"""Idle connections: the memory of 10,000, under ``trio.run`` and under ``trio_uring.run``.

Both ends are tasks that wait in ``receive_some``, in a process for each end. Measured are what
the process has resident, before and after the connections are there, and after each of them has
carried a message each way; and what the kernel has in its slabs, for both ends together.

    python bench_idle.py [--connections 10000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
import trio.testing

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNS = {"trio": trio.run, "trio_uring": trio_uring.run}

MESSAGE = b"x" * 64
CONNECTING_MAX = 100  # at once


# ---- The two ends, each in a process of its own --------------------------------------------


async def server(connections: int) -> None:
    """Echo what arrives. Print the port and, when asked, the process's memory."""
    idle = trio.Semaphore(0)

    async def echo(stream: trio.SocketStream) -> None:
        idle.release()
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        before = resident()
        listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        print(listeners[0].socket.getsockname()[1], flush=True)
        for _ in range(connections):
            await idle.acquire()
        await tell_memory(before)
        nursery.cancel_scope.cancel()


async def client(connections: int, port: int) -> None:
    """Connect, and wait without end. When asked, send a message and receive its echo."""
    streams: list[trio.SocketStream] = []
    answers = trio.Semaphore(0)

    async def connect() -> None:
        async with limit:
            streams.append(await trio.open_tcp_stream("127.0.0.1", port))

    async def receive(stream: trio.SocketStream) -> None:
        while await stream.receive_some():
            answers.release()

    async def use_all() -> None:
        for stream in streams:
            await stream.send_all(MESSAGE)
        for _ in streams:
            await answers.acquire()

    async with trio.open_nursery() as nursery:
        before = resident()
        limit = trio.CapacityLimiter(CONNECTING_MAX)
        async with trio.open_nursery() as connecting:
            for _ in range(connections):
                connecting.start_soon(connect)
        for stream in streams:
            nursery.start_soon(receive, stream)
        await trio.testing.wait_all_tasks_blocked()
        print("connected", flush=True)
        await tell_memory(before, use_all)
        nursery.cancel_scope.cancel()


async def tell_memory(before: int, use_all: object = None) -> None:
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        if line == "use\n" and callable(use_all):
            await use_all()
        await trio.testing.wait_all_tasks_blocked()
        print(resident() - before, flush=True)


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# ---- Measuring -----------------------------------------------------------------------------


def kernel_memory() -> int:
    """Return the size of the kernel's unreclaimable slabs, in bytes."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SUnreclaim:"):
            return int(line.split()[1]) * 1024
    return 0


class End:
    """The process at one end of the connections."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, __file__, *map(str, arguments)]
        self._process = subprocess.Popen(command, stdin=-1, stdout=-1, text=True)
        self.first = self.read()

    def read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process ended"
        return line.strip()

    def ask(self, what: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return int(self.read())

    def end(self) -> None:
        self._process.communicate()


@contextmanager
def both_ends(run: str, connections: int) -> Iterator[tuple[End, End]]:
    serving = End("--end", "server", run, "--connections", connections)
    connecting = End("--end", "client", run, "--connections", connections, "--port", serving.first)
    yield serving, connecting
    connecting.end()
    serving.end()


def measure(run: str, connections: int) -> dict[str, float]:
    """Return bytes for each connection."""
    kernel_before = kernel_memory()
    with both_ends(run, connections) as (serving, connecting):
        found = {
            "server, idle": serving.ask("tell"),
            "client, idle": connecting.ask("tell"),
            "kernel, idle": kernel_memory() - kernel_before,
        }
        connecting.ask("use")
        found["server, used once"] = serving.ask("tell")
        found["client, used once"] = connecting.ask("tell")
    return {what: count / connections for what, count in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--end", nargs=2, metavar=("END", "RUN"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    allow_files(options.connections + 1000)
    if options.end:
        end, run = options.end
        if end == "server":
            RUNS[run](server, options.connections)
        else:
            RUNS[run](client, options.connections, options.port)
        return
    samples: dict[str, list[dict[str, float]]] = {run: [] for run in RUNS}
    for _ in range(options.rounds):
        for run, found in samples.items():
            found.append(measure(run, options.connections))
    report(samples, options.connections)


def allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


def report(samples: dict[str, list[dict[str, float]]], connections: int) -> None:
    rounds = len(samples["trio"])
    print(f"\n{connections} connections, bytes for each (median of {rounds} rounds)")
    print(f"{'':26}" + "".join(f"{run:>12}" for run in samples) + f"{'ratio':>8}")
    for what in samples["trio"][0]:
        row = [statistics.median(sample[what] for sample in found) for found in samples.values()]
        print(f"{what:26}" + "".join(f"{each:12.0f}" for each in row) + f"{row[1] / row[0]:8.2f}")


if __name__ == "__main__":
    main()
