"""SQPOLL against a plain ring: operations per second, and the CPU of program and kernel thread.

A NOP and a cached read of 4 KiB, by one task (each operation waits for the kernel's thread) and
by 64 (the loop always has something to do), and as many tasks beside one that never waits, so
that the loop never sleeps. The CPU time is that of all threads of the process, the polling
thread among them.

    python bench_sqpoll.py [--operations 20000] [--rounds 5] [--idle 0.05]
"""

from __future__ import annotations

import argparse
import functools
import os
import resource
import tempfile
import time

import _measure
import trio

import trio_uring
from trio_uring.lowlevel import Operation, operations, perform


async def spin(scope: trio.CancelScope) -> None:
    """Keep the loop from sleeping."""
    with scope:
        while True:
            await trio.lowlevel.checkpoint()


async def measure(kind: str, fd: int, tasks: int, count: int, spinning: bool) -> _measure.Sample:
    """Have *tasks* perform *count* operations between them."""

    async def work() -> None:
        buffer = bytearray(4096)
        for _ in range(count // tasks):
            operation: Operation[object] = operations.nop()
            if kind == "read":
                operation = operations.read(fd, buffer, 0)
            await perform(operation)

    await work() if tasks == 1 else None  # the polling thread is awake
    scope = trio.CancelScope()
    async with trio.open_nursery() as outer:
        if spinning:
            outer.start_soon(spin, scope)
        cpu, begin = cpu_seconds(), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(work)
        elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
        scope.cancel()
    return _measure.Sample(rate=count / elapsed, cpu_us=cpu / count * 1e6)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=0.05, help="seconds")
    options = parser.parse_args()
    rings = {
        "plain ring": trio_uring.RingConfig(require=True),
        "SQPOLL": trio_uring.RingConfig(require=True, sqpoll=trio_uring.SQPoll(idle=options.idle)),
    }
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(4096))
        file.flush()
        for kind in ("nop", "read"):
            for tasks, spinning in ((1, False), (64, False), (64, True)):
                variants = {
                    name: functools.partial(
                        trio_uring.run,
                        *(measure, kind, file.fileno(), tasks, options.operations, spinning),
                        ring=ring,
                    )
                    for name, ring in rings.items()
                }
                title = f"{kind}, {tasks} tasks{', a loop that never sleeps' * spinning}"
                samples = _measure.interleave(variants, options.rounds)
                _measure.report(title, samples, "plain ring")


if __name__ == "__main__":
    main()
