"""Files: the same programs under ``trio.run``, on threads, and ``trio_uring.run``, on the ring.

python bench_files.py [--rounds 5] [--seconds 0.5] [--only WORD ...] [--directory DIR]
"""

from __future__ import annotations

import argparse
import io
import mmap
import os
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import _measure
import trio

import trio_uring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Step = Callable[[], Awaitable[object]]
    # Set up in one task; what it yields is done over and over.
    Program = Callable[[Path], AsyncIterator[Step]]

PAGE = 4096
LARGE_SIZE = 256 << 20
SMALL_FILES = 2000
LINES = 200_000


def make_files(directory: Path) -> None:
    """Make the files to be read, and have them in the page cache."""
    chunk = os.urandom(1 << 20)
    with (directory / "large").open("wb") as file:
        for _ in range(LARGE_SIZE >> 20):
            file.write(chunk)
    (directory / "lines").write_text(
        "a line of some sixty characters, as they are in a log.\n" * LINES
    )
    (directory / "text").write_text("a line of text\n" * ((64 << 20) // 15))
    (directory / "small").mkdir()
    for number in range(SMALL_FILES):
        (directory / "small" / str(number)).write_bytes(chunk[:PAGE])
    os.sync()
    with (directory / "large").open("rb") as file:
        while file.read(1 << 20):
            pass


# --- Programs -------------------------------------------------------------------------------


def random_page() -> int:
    return random.randrange(LARGE_SIZE // PAGE) * PAGE


async def read_with_open_file(directory: Path) -> AsyncIterator[Step]:
    async with await trio.open_file(directory / "large", "rb") as file:

        async def step() -> None:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE

        yield step


async def read_positional(directory: Path) -> AsyncIterator[Step]:
    async with await trio_uring.open_positional(directory / "large") as file:

        async def step() -> None:
            assert len(await file.read_at(PAGE, random_page())) == PAGE

        yield step


async def checkpoint(directory: Path) -> AsyncIterator[Step]:
    yield trio.lowlevel.checkpoint


async def iterate_lines(directory: Path) -> AsyncIterator[Step]:
    async with await trio.open_file(directory / "lines") as file:

        async def step() -> None:
            async for _ in file:
                counted()
                if stopped():
                    return
            await file.seek(0)

        yield step


def random_small(directory: Path) -> Path:
    return directory / "small" / str(random.randrange(SMALL_FILES))


async def open_read_close(directory: Path) -> AsyncIterator[Step]:
    async def step() -> None:
        async with await trio.open_file(random_small(directory), "rb") as file:
            assert len(await file.read()) == PAGE

    yield step


async def read_bytes(directory: Path) -> AsyncIterator[Step]:
    async def step() -> None:
        assert len(await trio.Path(random_small(directory)).read_bytes()) == PAGE

    yield step


async def stat(directory: Path) -> AsyncIterator[Step]:
    async def step() -> None:
        await trio.Path(random_small(directory)).stat()

    yield step


async def mkdir_rmdir(directory: Path) -> AsyncIterator[Step]:
    path = trio.Path(tempfile.mkdtemp(dir=directory), "below")

    async def step() -> None:
        await path.mkdir()
        await path.rmdir()

    yield step


async def write_close_unlink(directory: Path) -> AsyncIterator[Step]:
    path = trio.Path(tempfile.mkdtemp(dir=directory), "file")

    async def step() -> None:
        await path.write_bytes(bytes(PAGE))
        await path.unlink()

    yield step


async def append_sync_threads(directory: Path) -> AsyncIterator[Step]:
    path = Path(tempfile.mkdtemp(dir=directory), "file")
    async with await trio.open_file(path, "ab", buffering=0) as file:

        async def step() -> None:
            await file.write(bytes(PAGE))
            await trio.to_thread.run_sync(os.fdatasync, file.fileno())

        yield step


async def append_sync_positional(directory: Path) -> AsyncIterator[Step]:
    path = Path(tempfile.mkdtemp(dir=directory), "file")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    async with await trio_uring.open_positional(path, flags) as file:

        async def step() -> None:
            await file.write_at(bytes(PAGE), 0)
            await file.fdatasync()

        yield step


async def cold_read_with_open_file(directory: Path) -> AsyncIterator[Step]:
    async with await trio.open_file(directory / "large", "rb", buffering=0) as file:
        # Not file.fileno(): from then on others may move the position, and threads read the file.
        fd = io.FileIO.fileno(file.wrapped)
        # All of it: a part of a large folio would stay.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        async def step() -> None:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE

        yield step


async def direct_threads(directory: Path) -> AsyncIterator[Step]:
    fd = os.open(directory / "large", os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)  # aligned, as O_DIRECT wants it

    async def step() -> None:
        assert await trio.to_thread.run_sync(os.preadv, fd, [buffer], random_page()) == PAGE

    yield step
    os.close(fd)


async def direct_positional(directory: Path) -> AsyncIterator[Step]:
    flags = os.O_RDONLY | os.O_DIRECT
    buffer = mmap.mmap(-1, PAGE)
    async with await trio_uring.open_positional(directory / "large", flags) as file:

        async def step() -> None:
            assert await file.read_into_at(buffer, random_page()) == PAGE

        yield step


# --- Measuring ------------------------------------------------------------------------------

_count = 0
_stop = False


def counted() -> None:
    global _count
    _count += 1


def stopped() -> bool:
    return _stop


def measure(
    run: Callable[..., None], program: Program, directory: Path, tasks: int, seconds: float
) -> _measure.Sample:
    global _count, _stop
    _count, _stop = 0, False
    ready = 0
    samples: list[_measure.Sample] = []

    async def one(go: trio.Event) -> None:
        nonlocal ready
        async for step in program(directory):
            ready += 1
            await go.wait()
            counts_itself = program is iterate_lines
            while not _stop:
                await step()
                if not counts_itself:
                    counted()

    async def main() -> None:
        global _stop
        go = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(one, go)
            while ready < tasks:  # noqa: ASYNC110 (nothing is measured yet)
                await trio.sleep(0.001)
            started, cpu_started = time.perf_counter(), time.process_time()
            go.set()
            await trio.sleep(seconds)
            elapsed = time.perf_counter() - started
            cpu = time.process_time() - cpu_started
            samples.append(_measure.Sample(_count / elapsed, cpu / _count * 1e6))
            _stop = True

    run(main)
    return samples[0]


ROWS: list[tuple[str, tuple[int, ...], dict[str, tuple[str, Program]]]] = [
    (
        "4 KiB random reads of a cached file",
        (1, 32, 128),
        {
            "trio": ("trio", read_with_open_file),
            "ring, same program": ("ring", read_with_open_file),
            "ring, positional": ("ring", read_positional),
            "ring, bare checkpoint": ("ring", checkpoint),
        },
    ),
    (
        "async for line",
        (1, 32),
        {"trio": ("trio", iterate_lines), "ring, same program": ("ring", iterate_lines)},
    ),
    (
        "open + read + close of 4 KiB files",
        (1, 32),
        {
            "trio": ("trio", open_read_close),
            "ring, same program": ("ring", open_read_close),
            "trio, Path.read_bytes": ("trio", read_bytes),
            "ring, Path.read_bytes": ("ring", read_bytes),
        },
    ),
    (
        "4 KiB append + fdatasync",
        (16,),
        {
            "trio": ("trio", append_sync_threads),
            "ring, positional": ("ring", append_sync_positional),
        },
    ),
    (
        "4 KiB cold reads",
        (1, 32),
        {
            "trio": ("trio", cold_read_with_open_file),
            "ring, same program": ("ring", cold_read_with_open_file),
        },
    ),
    (
        "4 KiB O_DIRECT reads",
        (1, 32),
        {"trio": ("trio", direct_threads), "ring, positional": ("ring", direct_positional)},
    ),
    ("Path.stat", (1, 32), {"trio": ("trio", stat), "ring": ("ring", stat)}),
    ("Path.mkdir + rmdir", (1, 32), {"trio": ("trio", mkdir_rmdir), "ring": ("ring", mkdir_rmdir)}),
    (
        "Path.write_bytes + unlink",
        (1, 32),
        {"trio": ("trio", write_close_unlink), "ring": ("ring", write_close_unlink)},
    ),
]

RUNS: dict[str, Callable[..., None]] = {"trio": trio.run, "ring": trio_uring.run}


# --- The latency of the loop ----------------------------------------------------------------


async def ticker(delays: list[float]) -> None:
    while True:
        due = trio.current_time() + 0.001
        await trio.sleep_until(due)
        delays.append(trio.current_time() - due)


async def latency(directory: Path, mode: str, delays: list[float]) -> None:
    path = directory / ("large" if mode == "rb" else "text")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ticker, delays)
        for _ in range(8):
            async with await trio.open_file(path, mode) as file:
                await file.read(64 << 20)
        nursery.cancel_scope.cancel()


def report_latency(directory: Path) -> None:
    print("\nA 1 ms ticker's delay while 64 MiB are read, eight times (ms)")
    print(f"{'':26} {'median':>10} {'p99':>10} {'longest':>10}")
    for mode, kind in (("rb", "binary"), ("r", "text")):
        for name, run in RUNS.items():
            delays: list[float] = []
            run(latency, directory, mode, delays)
            p99 = statistics.quantiles(delays, n=100)[98]
            figures = (statistics.median(delays), p99, max(delays))
            row = " ".join(f"{figure * 1e3:10.2f}" for figure in figures)
            print(f"{name + ', ' + kind:26} {row}")


def main() -> None:
    """Make files, measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--only", nargs="*", default=[""], help="rows with one of these words")
    parser.add_argument("--directory", default=None, help="where to make the files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        make_files(directory)
        for title, task_counts, variants in ROWS:
            if not any(word in title for word in options.only):
                continue
            for tasks in task_counts:
                measures = {
                    variant: partial(measure, RUNS[run], program, directory, tasks, options.seconds)
                    for variant, (run, program) in variants.items()
                }
                samples = _measure.interleave(measures, options.rounds)
                _measure.report(f"{title}, {tasks} tasks", samples, "trio")
        if any(word in "latency" for word in options.only):
            report_latency(directory)


if __name__ == "__main__":
    main()
