"""Objects between the loops of two threads: messages from ring to ring, or Trio's wake-ups.

``ring``: both runs on rings. ``ring, Trio's wake-ups``: the same, but MSG_RING is not allowed.
``epoll``: the same channel between two plain Trio runs. ``to_thread``: for scale, a call in a
worker thread for each object. An operation is one object there and one back, or one there.

    python bench_ring_channel.py [--objects 5000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import resource
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import RingConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Any

    Run = Callable[[Callable[[], Awaitable[Any]]], Any]

RUNS: dict[str, Run] = {
    "epoll": trio.run,
    "ring, Trio's wake-ups": partial(
        trio_uring.run, ring=RingConfig(require=True, allowed_operations=frozenset())
    ),
    "ring": partial(trio_uring.run, ring=RingConfig(require=True)),
}


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def there_and_back(run: Run, objects: int) -> _measure.Sample:
    questions, asked = trio_uring.open_ring_channel[int](0)
    answers, answered = trio_uring.open_ring_channel[int](0)

    async def ask() -> None:
        async with questions, answered:
            for number in range(objects):
                await questions.send(number)
                await answered.receive()

    async def answer() -> None:
        async with asked, answers:
            async for number in asked:
                await answers.send(number)

    return two_loops(run, ask, answer, objects)


def there(run: Run, objects: int, size: int) -> _measure.Sample:
    send_channel, receive_channel = trio_uring.open_ring_channel[int](size)

    async def send() -> None:
        async with send_channel:
            for number in range(objects):
                await send_channel.send(number)

    async def receive() -> None:
        async with receive_channel:
            async for _ in receive_channel:
                pass

    return two_loops(run, send, receive, objects)


def two_loops(
    run: Run,
    ours: Callable[[], Awaitable[None]],
    theirs: Callable[[], Awaitable[None]],
    objects: int,
) -> _measure.Sample:
    begin, cpu = time.perf_counter(), cpu_seconds()
    thread = threading.Thread(target=run, args=(theirs,))
    thread.start()
    run(ours)
    thread.join()
    elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return _measure.Sample(rate=objects / elapsed, cpu_us=cpu / objects * 1e6)


def in_worker_threads(objects: int) -> _measure.Sample:
    async def main() -> None:
        for number in range(objects):
            await trio.to_thread.run_sync(int, number)

    begin, cpu = time.perf_counter(), cpu_seconds()
    trio.run(main)
    elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    return _measure.Sample(rate=objects / elapsed, cpu_us=cpu / objects * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    objects, rounds = options.objects, options.rounds
    variants: dict[str, Callable[[], _measure.Sample]] = {
        name: partial(there_and_back, run, objects) for name, run in RUNS.items()
    }
    variants["to_thread"] = partial(in_worker_threads, objects)
    samples = _measure.interleave(variants, rounds)
    _measure.report("There and back, no buffer", samples, "epoll")
    for size in (0, 100):
        variants = {name: partial(there, run, objects, size) for name, run in RUNS.items()}
        samples = _measure.interleave(variants, rounds)
        _measure.report(f"There, a buffer of {size}", samples, "epoll")


if __name__ == "__main__":
    main()
