"""Compute the checksum of each block of a file by direct I/O, which bypasses the page cache.

python examples/direct_checksum.py FILE, or --demo
"""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from pathlib import Path

import trio

import trio_uring

BLOCK = 65536  # bytes
AT_ONCE = 16


async def checksums(path: Path) -> list[int]:
    size = (await trio.Path(path).stat()).st_size
    sums = [0] * -(-size // BLOCK)
    todo = iter(range(len(sums)))

    async def worker() -> None:
        with await buffers.lease() as lease:
            for number in todo:  # shared by all workers, so each block is read once
                count = await file.read_into_at(lease, number * BLOCK)
                sums[number] = zlib.crc32(lease.memory[:count])

    with trio_uring.RegisteredBuffers(AT_ONCE, BLOCK) as buffers:
        async with await trio_uring.open_direct(path) as file, trio.open_nursery() as nursery:
            for _ in range(AT_ONCE):
                nursery.start_soon(worker)
    return sums


async def main(path: Path) -> None:
    try:
        sums = await checksums(path)
    except OSError as exc:  # for example, the file system is in memory
        print(exc)
        return
    print(f"{len(sums)} blocks, first {sums[0]:08x}, last {sums[-1]:08x}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or "--help" in sys.argv:
        print(__doc__)
    elif sys.argv[1] != "--demo":
        trio_uring.run(main, Path(sys.argv[1]))
    else:
        with tempfile.NamedTemporaryFile() as sample:
            sample.write(os.urandom(3 << 20))
            sample.flush()
            trio_uring.run(main, Path(sample.name))
