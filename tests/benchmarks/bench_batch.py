"""Cached reads of 4 KiB: batches against `os.pread` in a loop; CPU per read.

python bench_batch.py [--reads 64] [--batches 500] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring
from trio_uring import perform_many
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Batch = Callable[[int, range], Awaitable[object]]

SIZE = 4096
BUFFER = memoryview(bytearray(SIZE * 4096))  # for 4096 reads at most


async def pread(fd: int, offsets: range) -> None:
    blocks = [os.pread(fd, SIZE, offset) for offset in offsets]
    assert len(blocks[-1]) == SIZE


async def pread_in_thread(fd: int, offsets: range) -> None:
    def read() -> list[bytes]:
        return [os.pread(fd, SIZE, offset) for offset in offsets]

    await trio.to_thread.run_sync(read)


async def read_many(fd: int, offsets: range) -> None:
    buffer = bytearray(SIZE * len(offsets))
    outcomes = await perform_many(operations.read_many(fd, buffer, offsets, SIZE))
    assert outcomes[-1].unwrap() == SIZE


async def read_many_again(fd: int, offsets: range) -> None:
    """Into the same memory each time: new memory costs page faults."""
    described = operations.read_many(fd, BUFFER[: SIZE * len(offsets)], offsets, SIZE)
    outcomes = await perform_many(described)
    assert outcomes[-1].unwrap() == SIZE


async def reads(fd: int, offsets: range) -> None:
    described = [operations.read(fd, bytearray(SIZE), offset) for offset in offsets]
    outcomes = await perform_many(described)
    assert outcomes[-1].unwrap() == SIZE


async def one_by_one(fd: int, offsets: range) -> None:
    for offset in offsets:
        assert await perform(operations.read(fd, bytearray(SIZE), offset)) == SIZE


VARIANTS: dict[str, Batch] = {
    "os.pread": pread,
    "os.pread, in one thread": pread_in_thread,
    "batch: read_many": read_many,
    "the same, one buffer": read_many_again,
    "batch: [read, read, ...]": reads,
    "one by one: perform": one_by_one,
}


def measure(batch: Batch, fd: int, count: int, batches: int) -> _measure.Sample:
    offsets = range(0, count * SIZE, SIZE)

    async def main() -> tuple[float, float]:
        await batch(fd, offsets)
        elapsed, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            await batch(fd, offsets)
        return time.perf_counter() - elapsed, time.process_time() - cpu

    # As many file operations at once as one batch has, so that it is one.
    ring = trio_uring.RingConfig(max_file_operations=max(64, count), require=True)
    elapsed, cpu = trio_uring.run(main, ring=ring)
    return _measure.Sample(rate=count * batches / elapsed, cpu_us=cpu / count / batches * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reads", type=int, default=64, help="in a batch")
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(options.reads * SIZE))
        file.flush()
        variants = {
            name: lambda batch=batch: measure(batch, file.fileno(), options.reads, options.batches)
            for name, batch in VARIANTS.items()
        }
        samples = _measure.interleave(variants, options.rounds)
    _measure.report(f"Cached reads of 4 KiB, {options.reads} at a time", samples, "os.pread")


if __name__ == "__main__":
    main()
