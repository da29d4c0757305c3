"""4 KiB direct reads by 32 tasks, compared with a C program on raw io_uring.

The C program, direct_read.c beside this file, does the same: the same file, depth, size of reads,
kind of ring, registered buffers, and one thread. It is built with the command that is printed.
The rows below it: leases of registered buffers; the same without the registration; `read_at`, which
returns bytes; as many reads in flight by an eighth of the tasks, with `perform_many`; and
`os.preadv` in Trio's threads, on plain Trio. Offsets are random. The CPU time is that of all
threads of the process.

    python bench_direct.py [--directory .] [--tasks 32] [--reads 40000] [--mib 256] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import _measure
import trio

import trio_uring
from trio_uring import RegisteredBuffers, open_direct, perform_many
from trio_uring.lowlevel import operations

SIZE = 4096
BATCH = 8
RING = trio_uring.RingConfig(require=True)
SOURCE = Path(__file__).with_name("direct_read.c")


def build(directory: Path) -> Path:
    program = directory / "direct_read"
    command = ["cc", "-O2", "-o", str(program), str(SOURCE)]
    print(shlex.join(command))
    subprocess.run(command, check=True)
    return program


def measure_c(program: Path, path: Path, tasks: int, reads: int) -> _measure.Sample:
    size = path.stat().st_size
    command = [program, path, str(size), str(tasks), str(reads), str(random.getrandbits(24))]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate, cpu_us = map(float, printed.split())
    return _measure.Sample(rate=rate, cpu_us=cpu_us)


async def measure(path: Path, tasks: int, reads: int, kind: str) -> _measure.Sample:
    last = path.stat().st_size // SIZE - 1

    async def work() -> None:
        offsets = [random.randint(0, last) * SIZE for _ in range(reads // tasks)]
        with await buffers.lease() as lease:
            target = lease if kind == "leases" else lease.memory
            ready.append(None)
            await begin.wait()
            for offset in offsets:
                if kind == "read_at":
                    assert len(await file.read_at(SIZE, offset)) == SIZE
                else:
                    assert await file.read_into_at(target, offset) == SIZE

    ready: list[None] = []
    begin = trio.Event()
    with RegisteredBuffers(tasks, SIZE) as buffers:
        async with await open_direct(path) as file:
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(work)
                while len(ready) < tasks:
                    await trio.lowlevel.checkpoint()
                start, cpu = time.perf_counter(), cpu_seconds()
                begin.set()
            elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return _measure.Sample(rate=reads / elapsed, cpu_us=cpu / reads * 1e6)


async def measure_batches(path: Path, tasks: int, reads: int) -> _measure.Sample:
    """The same number of reads in flight, by fewer tasks, `BATCH` at a time."""
    last = path.stat().st_size // SIZE - 1
    tasks //= BATCH

    async def work() -> None:
        with await buffers.lease() as lease:
            for _ in range(reads // tasks // BATCH):
                offsets = [random.randint(0, last) * SIZE for _ in range(BATCH)]
                described = operations.read_many(file.fileno(), lease.memory, offsets, SIZE)
                outcomes = await perform_many(described)
                assert outcomes[-1].unwrap() == SIZE

    with RegisteredBuffers(tasks, SIZE * BATCH) as buffers:
        async with await open_direct(path) as file:
            start, cpu = time.perf_counter(), cpu_seconds()
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(work)
            elapsed, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return _measure.Sample(rate=reads / elapsed, cpu_us=cpu / reads * 1e6)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default=".", help="where there is O_DIRECT")
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--reads", type=int, default=40_000)
    parser.add_argument("--mib", type=int, default=256, help="size of the file")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    reads = options.reads // options.tasks * options.tasks
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        path = Path(directory, "file")
        with path.open("wb") as file:
            for _ in range(options.mib):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        program = build(Path(directory))
        load = (path, options.tasks, reads)
        variants = {
            "C on raw io_uring": lambda: measure_c(program, *load),
            "leases, registered": lambda: trio_uring.run(measure, *load, "leases", ring=RING),
            "leases' memory, as it is": lambda: trio_uring.run(measure, *load, "", ring=RING),
            "read_at": lambda: trio_uring.run(measure, *load, "read_at", ring=RING),
            f"batches of {BATCH}": lambda: trio_uring.run(measure_batches, *load, ring=RING),
            "trio, threads": lambda: trio.run(measure, *load, ""),
        }
        title = f"{SIZE} B O_DIRECT reads, {options.tasks} tasks"
        _measure.report(title, _measure.interleave(variants, options.rounds), "C on raw io_uring")


if __name__ == "__main__":
    main()
