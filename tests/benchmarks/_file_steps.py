"""What the programs of `bench_files.py` have in common, on every system.

A program is a step that a task does over and over, in a directory that `make_files` filled. It
returns how many operations it was.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    Step = Callable[[], Awaitable[int]]
    Program = Callable[[], AbstractAsyncContextManager[Step]]
    # Run each of the functions in a task of its own, and return what they returned.
    RunAll = Callable[[list[Callable[[], Awaitable[int]]]], Awaitable[list[int]]]

MIB = 1 << 20
PAGE = 4096
SMALL_FILES = 1000
LINES_IN_STEP = 256
READS_IN_BATCH = 64
SEND_MAX = 64 * MIB

LARGE = Path("large")  # of lines of text
SMALL = Path("small")  # a directory of nothing but small files
MISSING = "missing"

_LINE = 64


def make_files(large_size: int) -> None:
    """Make the files to be read, in this directory, and have them in the page cache."""
    chunk = b"".join(os.urandom(_LINE // 2).hex()[1:].encode() + b"\n" for _ in range(MIB // _LINE))
    with LARGE.open("wb") as file:
        for _ in range(large_size // MIB):
            file.write(chunk)
    SMALL.mkdir()
    for number in range(SMALL_FILES):
        (SMALL / str(number)).write_bytes(chunk[:PAGE])
    os.sync()
    with LARGE.open("rb") as file:
        while file.read(MIB):
            pass


_pages = LARGE.stat().st_size // PAGE if LARGE.exists() else 0
_new_names = itertools.count()


def random_page() -> int:
    """Return the offset of a page of the large file."""
    return int(random.random() * _pages) * PAGE  # a third of the time of randrange


def random_small() -> Path:
    return SMALL / str(int(random.random() * SMALL_FILES))


def new_file() -> str:
    return f"new-{os.getpid()}-{next(_new_names)}"


async def serve(program: Program, tasks: int, run_all: RunAll) -> None:
    """Do the steps for as many seconds as a line of the input says; print how many, and the time.

    It is done for each line, by the same tasks' files.
    """
    contexts = [program() for _ in range(tasks)]
    steps = [await context.__aenter__() for context in contexts]
    # The process is killed, so that nothing is measured of closing.
    while line := sys.stdin.readline():
        begin = time.perf_counter()
        end = begin + float(line)
        counts = await run_all([lambda step=step: repeat(step, end) for step in steps])
        print(sum(counts), time.perf_counter() - begin, flush=True)


async def repeat(step: Step, end: float) -> int:
    count = 0
    while time.perf_counter() < end:
        count += await step()
    return count
