"""Waits in the kernel: for child processes, and for a word in memory that another thread changes.

A child that ends: ``WAITID`` on the ring, against a wait for the readability of a pidfd and then
waitid(2), as Trio does it. There and back between two loops: futexes, eventfds, and channels.

    python bench_waits.py [--children 100] [--turns 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import RingConfig
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Side = Callable[[], Awaitable[None]]

REQUIRED = RingConfig(require=True)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def sample(count: int, run: Callable[[], object]) -> _measure.Sample:
    begin, cpu = time.perf_counter(), cpu_seconds()
    run()
    elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return _measure.Sample(rate=count / elapsed, cpu_us=cpu / count * 1e6)


# ---- Children ------------------------------------------------------------------------------


async def by_waitid(pid: int) -> None:
    assert await perform(operations.waitid(os.P_PID, pid, os.WEXITED)) is not None


async def by_pidfd(pid: int) -> None:
    pid_fd = os.pidfd_open(pid)
    await trio.lowlevel.wait_readable(pid_fd)
    assert os.waitid(os.P_PIDFD, pid_fd, os.WEXITED) is not None
    os.close(pid_fd)


def children(count: int, wait: Callable[[int], Awaitable[None]]) -> _measure.Sample:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(wait, os.posix_spawn("/bin/true", ["true"], os.environ))

    return sample(count, partial(trio_uring.run, main, ring=REQUIRED))


# ---- There and back ------------------------------------------------------------------------


def by_futexes(turns: int) -> tuple[Side, Side]:
    words = bytearray(4), bytearray(4)

    async def turn(mine: bytearray, theirs: bytearray, first: bool) -> None:
        for number in range(1, turns + 1):
            if first:
                theirs[:] = number.to_bytes(4, "little")
                await perform(operations.futex_wake(theirs, private=True))
            while int.from_bytes(mine, "little") < number:
                with suppress(BlockingIOError):  # it changed before we waited
                    await perform(operations.futex_wait(mine, number - 1, private=True))
            if not first:
                theirs[:] = number.to_bytes(4, "little")
                await perform(operations.futex_wake(theirs, private=True))

    return partial(turn, *words, True), partial(turn, *reversed(words), False)


def by_eventfds(turns: int) -> tuple[Side, Side]:
    fds = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)

    async def turn(mine: int, theirs: int, first: bool) -> None:
        for _ in range(turns):
            if first:
                os.eventfd_write(theirs, 1)
            await trio.lowlevel.wait_readable(mine)
            os.eventfd_read(mine)
            if not first:
                os.eventfd_write(theirs, 1)
        os.close(mine)

    return partial(turn, *fds, True), partial(turn, *reversed(fds), False)


def by_channels(turns: int) -> tuple[Side, Side]:
    there, ahead = trio_uring.open_ring_channel[None](0), trio_uring.open_ring_channel[None](0)

    async def ask() -> None:
        for _ in range(turns):
            await there[0].send(None)
            await ahead[1].receive()

    async def answer() -> None:
        for _ in range(turns):
            await there[1].receive()
            await ahead[0].send(None)

    return ask, answer


def there_and_back(turns: int, make: Callable[[int], tuple[Side, Side]]) -> _measure.Sample:
    def run() -> None:
        one, other = make(turns)
        thread = threading.Thread(target=partial(trio_uring.run, other, ring=REQUIRED))
        thread.start()
        trio_uring.run(one, ring=REQUIRED)
        thread.join()

    return sample(turns, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--children", type=int, default=100)
    parser.add_argument("--turns", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    waits = {"pidfd": by_pidfd, "WAITID": by_waitid}
    variants = {name: partial(children, options.children, wait) for name, wait in waits.items()}
    _measure.report("Children", _measure.interleave(variants, options.rounds), "pidfd")
    ways = {"eventfds": by_eventfds, "futexes": by_futexes, "ring channels": by_channels}
    variants = {name: partial(there_and_back, options.turns, make) for name, make in ways.items()}
    _measure.report("There and back", _measure.interleave(variants, options.rounds), "eventfds")


if __name__ == "__main__":
    main()
