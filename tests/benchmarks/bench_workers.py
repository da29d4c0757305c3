"""Operations that block, in kernel workers: how many threads, and what it costs.

Files are made and removed, and a FIFO is opened that nobody writes to: each takes a worker.
``kernel's default`` is what a ring does that sets no bound. The numbers of threads were counted in
a run of their own, 0.3 seconds after all tasks had begun to wait.

    python bench_workers.py [--operations 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import trio
import trio.testing

import trio_uring
from trio_uring import RingConfig
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

CONFIGS = {
    "default": RingConfig(require=True),
    "1 worker": RingConfig(require=True, bounded_workers=1, unbounded_workers=1),
    "64 workers": RingConfig(
        require=True, bounded_workers=64, unbounded_workers=64, max_file_operations=4096
    ),
    "kernel's default": RingConfig(
        require=True, bounded_workers=4096, unbounded_workers=65536, max_file_operations=32768
    ),
}
threads: dict[str, int] = dict.fromkeys(CONFIGS, 0)


def workers() -> int:
    """Count the kernel workers of this thread."""
    name, count = f"iou-wrk-{threading.get_native_id()}", 0
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            count += (thread / "comm").read_text().strip() == name
    return count


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def make_and_remove(directory: str, number: int) -> None:
    path = f"{directory}/{number}"
    os.close(await perform(operations.openat(path, os.O_CREAT | os.O_WRONLY, 0o600)))
    await perform(operations.unlinkat(path))


async def wait_for_a_writer(directory: str, _number: int) -> None:
    os.close(await perform(operations.openat(f"{directory}/fifo", os.O_RDONLY, wait=True)))


def measure(
    name: str, work: Callable[..., Awaitable[None]], count: int, settle: float = 0.0
) -> _measure.Sample:
    samples: list[_measure.Sample] = []

    async def main() -> None:
        with tempfile.TemporaryDirectory() as directory:
            os.mkfifo(f"{directory}/fifo")
            begin, cpu = time.perf_counter(), cpu_seconds()
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(work, directory, number)
                await trio.testing.wait_all_tasks_blocked()
                if settle:  # the kernel starts a worker when one blocks
                    await trio.sleep(settle)
                    threads[name] = workers()
                writer = os.open(f"{directory}/fifo", os.O_RDWR)
            elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
            os.close(writer)
        samples.append(_measure.Sample(rate=count / elapsed, cpu_us=cpu / count * 1e6))

    # A thread of its own, where no earlier ring has left workers.
    run = partial(trio_uring.run, main, ring=CONFIGS[name])
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return samples[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for title, work in (
        ("Files made and removed", make_and_remove),
        ("Opens of a FIFO that wait", wait_for_a_writer),
    ):
        variants = {name: partial(measure, name, work, options.operations) for name in CONFIGS}
        samples = _measure.interleave(variants, options.rounds)
        _measure.report(f"{title}, {options.operations} at once", samples, "default")
        for name in CONFIGS:
            measure(name, work, options.operations, settle=0.3)
        print("threads:", ", ".join(f"{name}: {count}" for name, count in threads.items()))


if __name__ == "__main__":
    main()
