"""How late the unlucky are: echoes and a timer, beside 511 other connections and a greedy one.

A server echoes, and has a task that sleeps for a millisecond again and again. It is plain Trio, or
trio_uring with one of its engines, and each round measures each of them in a fresh process. The
load is another process. It sends messages of 64 B at random times, which keeps the server busy in
part (paced), or each of its connections sends again as soon as it has its answer (busy). A greedy
connection, from a third process, sends blocks of 64 KiB without end, and takes their echo. The
server has a core of its own, if there are two.

    python bench_tails.py [--connections 512] [--rounds 5] [--seconds 3] [--rate 3000] [--smoke]

Printed are medians of the rounds, in milliseconds, and how they compare with plain Trio's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import selectors
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Iterator

SYSTEMS: Final = {
    "trio": (trio.run, {}),
    "trio_uring": (trio_uring.run, {"TRIO_URING_ENGINE": "native"}),
    "python engine": (trio_uring.run, {"TRIO_URING_ENGINE": "python"}),
}
LOADS: Final = {"paced": False, "paced, and a greedy one": True, "busy, and a greedy one": True}

PERCENTILES: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

MESSAGE: Final = b"x" * 64
GREEDY_BLOCK: Final = b"x" * 65536
TIMER_SECONDS: Final = 0.001
CORES: Final = sorted(os.sched_getaffinity(0))
WARM_UP_SECONDS: Final = 0.5


# ---- The server ----------------------------------------------------------------------------


async def serve() -> None:
    """Print the port; at the end of the standard input, what the timer found."""
    found: dict[str, list[float]] = {"timer": [], "CPU": []}
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
        print(listeners[0].socket.getsockname()[1], flush=True)
        nursery.start_soon(tick, found)
        await trio.lowlevel.wait_readable(sys.stdin)
        nursery.cancel_scope.cancel()
    print(json.dumps(found))


async def echo(stream: trio.SocketStream) -> None:
    try:
        async for data in stream:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        return  # the greedy one is killed


async def tick(found: dict[str, list[float]]) -> None:
    """Note how late the timer is, and the CPU time that passed meanwhile.

    Where others compute on this machine, the latter tells what the server itself did so long.
    """
    while True:
        begin, cpu = time.perf_counter(), time.thread_time()
        await trio.sleep(TIMER_SECONDS)
        found["timer"].append(time.perf_counter() - begin - TIMER_SECONDS)
        found["CPU"].append(time.thread_time() - cpu)


# ---- The load ------------------------------------------------------------------------------


class Crowd:
    """Connections that each have at most one message under way, and note how long it took."""

    def __init__(self, address: tuple[str, int], count: int, stack: ExitStack) -> None:
        self.idle: deque[socket.socket] = deque()
        self.latencies: list[float] = []
        self._by_fd: dict[int, socket.socket] = {}
        self._sent: dict[int, float] = {}
        self._missing: dict[int, int] = {}
        self._epoll = stack.enter_context(select.epoll())
        for _ in range(count):
            sock = stack.enter_context(socket.create_connection(address))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._by_fd[sock.fileno()] = sock
            self._epoll.register(sock, select.EPOLLIN)
            self.idle.append(sock)

    def send(self) -> None:
        sock = self.idle.popleft()
        self._missing[sock.fileno()] = len(MESSAGE)
        self._sent[sock.fileno()] = time.perf_counter()
        sock.send(MESSAGE)

    def take_answers(self, seconds: float) -> None:
        """Wait for answers, no longer than this."""
        for fd, _ in self._epoll.poll(max(0, seconds)):
            sock = self._by_fd[fd]
            # An answer may come in two parts.
            self._missing[fd] -= len(sock.recv(len(MESSAGE)))
            if not self._missing[fd]:
                self.latencies.append(time.perf_counter() - self._sent[fd])
                self.idle.append(sock)

    def run(self, seconds: float, rate: float | None) -> None:
        """Send at random times with a mean *rate*, or always."""
        chance = random.Random(1)
        now = following = time.perf_counter()
        end = now + seconds
        while now < end:
            if rate is None:
                following = now + 1
                while self.idle:
                    self.send()
            while self.idle and following <= now:
                assert rate is not None
                self.send()
                following += chance.expovariate(rate)
            self.take_answers(min(following, end) - now)
            now = time.perf_counter()


def be_greedy(port: int) -> None:
    """Send without end, and take the echo."""
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)) as sock:
        print("connected", flush=True)
        sock.setblocking(False)
        buffer = bytearray(len(GREEDY_BLOCK))
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
            while True:
                [(_, events)] = selector.select()
                if events & selectors.EVENT_WRITE:
                    sock.send(GREEDY_BLOCK)
                if events & selectors.EVENT_READ:
                    sock.recv_into(buffer)


# ---- Measuring -----------------------------------------------------------------------------


@contextmanager
def started(*arguments: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run this file in another process."""
    command = [sys.executable, __file__, *arguments]
    with subprocess.Popen(
        command, stdin=-1, stdout=-1, text=True, env=os.environ | (env or {})
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@attrs.frozen
class Measure:
    """A load, and for how long."""

    connections: int
    seconds: float
    rate: float | None
    greedy: bool

    def __call__(self, system: str) -> dict[str, float]:
        with ExitStack() as stack:
            environment = SYSTEMS[system][1]
            server = stack.enter_context(started("--serve", system, env=environment))
            assert server.stdin is not None
            assert server.stdout is not None
            port = int(server.stdout.readline())
            os.sched_setaffinity(server.pid, CORES[:1])
            crowd = Crowd(("127.0.0.1", port), self.connections, stack)
            if self.greedy:
                greedy = stack.enter_context(started("--greedy", str(port)))
                assert greedy.stdout is not None
                greedy.stdout.readline()
            crowd.run(min(WARM_UP_SECONDS, self.seconds), self.rate)
            crowd.latencies.clear()
            crowd.run(self.seconds, self.rate)
            found = {"echo": crowd.latencies, **json.loads(server.communicate()[0])}
        return {
            f"{what} {name}": value
            for what, each in found.items()
            for name, value in percentiles(each).items()
        }


def percentiles(found: list[float]) -> dict[str, float]:
    """Return the percentiles in milliseconds."""
    found.sort()
    return {
        name: 1000 * found[min(int(share * len(found)), len(found) - 1)]
        for name, share in PERCENTILES.items()
    }


def report(title: str, rounds: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{title}: ms, median of {len(rounds['trio'])} rounds, and its ratio to trio's")
    print(f"{'':14}" + "".join(f"{system:>22}" for system in rounds))
    for what in rounds["trio"][0]:
        row = {
            system: statistics.median(each[what] for each in found)
            for system, found in rounds.items()
        }
        cells = [f"{value:13.2f} ({value / row['trio']:5.2f})" for value in row.values()]
        print(f"{what:14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rate", type=float, default=3000, help="messages a second, if paced")
    parser.add_argument("--smoke", action="store_true", help="a moment of each")
    parser.add_argument("--serve", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--greedy", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        SYSTEMS[options.serve][0](serve)
        return
    if options.greedy:
        be_greedy(options.greedy)
        return
    os.sched_setaffinity(0, CORES[1:] or CORES)  # the greedy one's, too
    if options.smoke:
        options.connections, options.rounds, options.seconds = 8, 1, 0.1
    for title, greedy in LOADS.items():
        rate = options.rate if title.startswith("paced") else None
        measure = Measure(options.connections, options.seconds, rate, greedy)
        rounds: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
        for _ in range(options.rounds):
            for system, found in rounds.items():
                found.append(measure(system))
        report(f"{options.connections} connections, {title}", rounds)


if __name__ == "__main__":
    main()
