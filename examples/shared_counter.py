"""Wait for a futex in shared memory that another process wakes, and for that process to exit.

python examples/shared_counter.py, or --demo
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from contextlib import suppress

import trio

import trio_uring
from trio_uring.lowlevel import operations, perform

STEPS = 3

# The other process counts in the first four bytes of the file, and wakes their waiters.
WORKER = """
import mmap, sys, trio_uring
from trio_uring.lowlevel import operations, perform
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 4096) as memory:
    with memoryview(memory) as view, view[:4] as word:
        for step in range(int(sys.argv[2])):
            word[0] += 1
            trio_uring.run(perform, operations.futex_wake(word, 1000))
sys.exit(7)
"""


async def watch(word: memoryview) -> None:
    """Print each value of the counter, up to the last step."""
    while (seen := word[0]) < STEPS:
        with suppress(BlockingIOError):  # it changed before we waited
            await perform(operations.futex_wait(word, int.from_bytes(word, sys.byteorder)))
        if word[0] != seen:
            print("step", word[0])


async def main() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        arguments = [sys.executable, "-c", WORKER, file.name, str(STEPS)]
        with mmap.mmap(file.fileno(), 4096) as memory, memoryview(memory) as view, view[:4] as word:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, word)
                pid = os.posix_spawn(sys.executable, arguments, os.environ)  # noqa: ASYNC221
                ended = await perform(operations.waitid(os.P_PID, pid, os.WEXITED))
                assert ended is not None
                print("exit status", ended.status)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        trio_uring.run(main)
