"""Whole small files in one linked submission, against `Path.read_bytes` and `Path.write_bytes`.

Writing: `trio_uring.write_file`. Reading: a chain that opens a fixed file, reads it and closes it.
It must know the size beforehand. "guess" has a buffer of 64 KiB, and goes on if a file is shorter.
"32 files" are read in one step: in one call of a thread, or as 32 chains in one batch. Because of
these results, the package reads no file in this way.

python bench_linked_files.py [--size 4096 65536] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import _measure
import trio

import trio_uring
from trio_uring import linked, perform_many
from trio_uring._engine._io_manager import current_ring
from trio_uring._files._write_file import _FixedFiles as FixedFiles
from trio_uring._kernel.uapi import SqeFlag
from trio_uring._operations._fixed_files import close_fixed, on_fixed, open_fixed
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Step = Callable[["Files"], Awaitable[None]]
    Row = tuple[str, Callable[..., None], Step, int]

FILES: Final = 2000
TOGETHER: Final = 32
GUESS: Final = 65536 + 1


class Files:
    """Files of one size in a directory, all in the page cache."""

    def __init__(self, directory: str, size: int) -> None:
        self.size = size
        self.paths = [os.path.join(directory, str(number)) for number in range(FILES)]
        for path in self.paths:
            Path(path).write_bytes(os.urandom(size))

    def pick(self) -> str:
        return random.choice(self.paths)

    def check(self, data: bytes) -> None:
        assert len(data) == self.size


# --- The chain ------------------------------------------------------------------------------

free_slots: list[int] = []


def register_table() -> None:
    manager = current_ring("files")
    if manager is not None:
        free_slots[:] = manager.run_state.get(FixedFiles, manager).free or []


def chain(path: str, slot: int, buffer: bytearray) -> trio_uring.Linked[object]:
    reading = on_fixed(operations.read(slot, buffer, 0))
    # A short read ends a chain, unless the link is a hard one.
    sqe = reading.sqe
    reading.sqe = (sqe[0], sqe[1] | SqeFlag.IO_HARDLINK, *sqe[2:])
    return linked(
        [open_fixed(operations.openat(path, os.O_RDONLY), slot), reading, close_fixed(slot)]
    )


async def read_chains(files: Files, count: int, room: int) -> None:
    slots = [free_slots.pop() for _ in range(count)]
    buffers = [bytearray(room) for _ in slots]
    chains = [
        chain(files.pick(), slot, buffer) for slot, buffer in zip(slots, buffers, strict=True)
    ]
    outcomes = await perform_many(chains)
    free_slots.extend(slots)
    for number, buffer in enumerate(buffers):
        outcomes[3 * number + 2].unwrap()
        files.check(bytes(memoryview(buffer)[: outcomes[3 * number + 1].unwrap()]))


# --- What is compared -----------------------------------------------------------------------


async def path_read_bytes(files: Files) -> None:
    files.check(await trio.Path(files.pick()).read_bytes())


async def in_the_loop(files: Files) -> None:
    await trio.lowlevel.checkpoint()
    files.check(Path(files.pick()).read_bytes())


async def many_in_one_thread(files: Files) -> None:
    def read() -> None:
        for _ in range(TOGETHER):
            files.check(Path(files.pick()).read_bytes())

    await trio.to_thread.run_sync(read)


async def chain_known(files: Files) -> None:
    await read_chains(files, 1, files.size)


async def chain_guess(files: Files) -> None:
    await read_chains(files, 1, GUESS)


async def many_chains_known(files: Files) -> None:
    await read_chains(files, TOGETHER, files.size)


async def many_chains_guess(files: Files) -> None:
    await read_chains(files, TOGETHER, GUESS)


async def path_write_bytes(files: Files) -> None:
    await trio.Path(files.pick()).write_bytes(bytes(files.size))


async def write_file(files: Files) -> None:
    await trio_uring.write_file(files.pick(), bytes(files.size))


async def write_in_the_loop(files: Files) -> None:
    await trio.lowlevel.checkpoint()
    Path(files.pick()).write_bytes(bytes(files.size))


RING = partial(
    trio_uring.run, ring=trio_uring.RingConfig(max_file_operations=3 * TOGETHER, require=True)
)
READS: list[Row] = [
    ("threads, Path.read_bytes", trio.run, path_read_bytes, 1),
    ("ring, Path.read_bytes", RING, path_read_bytes, 1),
    ("ring, chain, size known", RING, chain_known, 1),
    ("ring, chain, guess", RING, chain_guess, 1),
    ("synchronous in the loop", RING, in_the_loop, 1),
    ("32 files in one thread", trio.run, many_in_one_thread, TOGETHER),
    ("32 chains, size known", RING, many_chains_known, TOGETHER),
    ("32 chains, guess", RING, many_chains_guess, TOGETHER),
]
WRITES: list[Row] = [
    ("threads, Path.write_bytes", trio.run, path_write_bytes, 1),
    ("ring, Path.write_bytes", RING, path_write_bytes, 1),
    ("ring, write_file", RING, write_file, 1),
    ("synchronous in the loop", RING, write_in_the_loop, 1),
]


CHAINS: Final = (chain_known, chain_guess, many_chains_known, many_chains_guess)


def measure(
    run: Callable[..., None], step: Step, files: Files, tasks: int, count: int
) -> _measure.Sample:
    spent: list[tuple[float, float]] = []

    async def task() -> None:
        for _ in range(count // tasks):
            await step(files)

    async def main() -> None:
        if run is RING and step in CHAINS:
            register_table()
        await step(files)
        started, cpu_started = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(task)
        spent.append((time.perf_counter() - started, time.process_time() - cpu_started))

    run(main)
    elapsed, cpu = spent[0]
    return _measure.Sample(count / elapsed, cpu / count * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, nargs="*", default=[4096, 65536])
    parser.add_argument("--tasks", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--files", type=int, default=1600, help="read in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="where to make the files")
    options = parser.parse_args()
    for size in options.size:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            files = Files(directory, size)
            for tasks in options.tasks:
                for what, rows in {"read whole": READS, "written": WRITES}.items():
                    compare(
                        f"Files of {size} bytes, {what}, {tasks} tasks", rows, files, tasks, options
                    )


def compare(
    title: str, rows: list[Row], files: Files, tasks: int, options: argparse.Namespace
) -> None:
    rows = [row for row in rows if tasks == 1 or row[3] == 1]
    measures = {
        name: partial(measure, run, step, files, tasks, options.files // together)
        for name, run, step, together in rows
    }
    samples = _measure.interleave(measures, options.rounds)
    for name, _, _, together in rows:
        samples[name] = [
            _measure.Sample(each.rate * together, each.cpu_us / together) for each in samples[name]
        ]
    _measure.report(title, samples, rows[0][0])


if __name__ == "__main__":
    main()
