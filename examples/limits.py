"""Block a thousand opens on few kernel threads, and show the limits in effect.

python examples/limits.py, or --demo
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import trio
import trio.testing

import trio_uring
from trio_uring.lowlevel import operations, perform

COUNT = 1000
RING = trio_uring.RingConfig(
    require=True, bounded_workers=4, unbounded_workers=4, max_file_operations=32
)


def kernel_threads() -> int:
    """Return the number of kernel workers of this process."""
    names = (thread.read_text() for thread in Path("/proc/self/task").glob("*/comm"))
    return sum(name.startswith("iou-wrk") for name in names)


async def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        fifo = f"{directory}/fifo"
        os.mkfifo(fifo)

        async def open_it() -> None:
            os.close(await perform(operations.openat(fifo, os.O_RDONLY, wait=True)))

        async with trio.open_nursery() as nursery:
            for _ in range(COUNT):
                nursery.start_soon(open_it)
            await trio.testing.wait_all_tasks_blocked()
            statistics = trio_uring.statistics()
            print("limits:", dict(statistics.limits))
            print("in flight:", statistics.in_flight)
            print("waiting for the limit:", statistics.waiting_for_limit)
            writer = os.open(fifo, os.O_RDWR)  # now the opens succeed, one after the other
        os.close(writer)
        assert kernel_threads() <= 8
        print("all done")


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        trio_uring.run(main, ring=RING)
