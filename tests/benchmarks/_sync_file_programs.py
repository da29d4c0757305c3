"""What `bench_files.py` measures without an event loop: what nothing on one can be faster than.

    python _sync_file_programs.py MODULE PROGRAM

The module is not used: the other programs have it there, too.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _file_steps import (
    LARGE,
    LINES_IN_STEP,
    MISSING,
    PAGE,
    READS_IN_BATCH,
    SMALL,
    new_file,
    random_page,
    random_small,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = Callable[[], int]


def read() -> Step:
    file = LARGE.open("rb")

    def step() -> int:
        file.seek(random_page())
        assert len(file.read(PAGE)) == PAGE
        return 1

    return step


def read_at() -> Step:
    fd = os.open(LARGE, os.O_RDONLY)

    def step() -> int:
        assert len(os.pread(fd, PAGE, random_page())) == PAGE
        return 1

    return step


def read_batch() -> Step:
    fd = os.open(LARGE, os.O_RDONLY)

    def step() -> int:
        offsets = [random_page() for _ in range(READS_IN_BATCH)]
        found = [os.pread(fd, PAGE, offset) for offset in offsets]
        assert len(found[-1]) == PAGE
        return READS_IN_BATCH

    return step


def lines() -> Step:
    file = LARGE.open()

    def step() -> int:
        count = 0
        for _ in file:
            count += 1
            if count == LINES_IN_STEP:
                return count
        file.seek(0)
        return count

    return step


def open_read_close() -> Step:
    def step() -> int:
        with random_small().open("rb") as file:
            assert len(file.read()) == PAGE
        return 1

    return step


def read_bytes() -> Step:
    def step() -> int:
        assert len(random_small().read_bytes()) == PAGE
        return 1

    return step


def stat() -> Step:
    def step() -> int:
        random_small().stat()
        return 1

    return step


def exists() -> Step:
    def step() -> int:
        assert not Path(MISSING).exists()
        return 1

    return step


def iterdir() -> Step:
    def step() -> int:
        return len(list(SMALL.iterdir()))

    return step


def append() -> Step:
    fd = os.open(new_file(), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def step() -> int:
        os.write(fd, bytes(PAGE))
        os.fdatasync(fd)
        return 1

    return step


def read_direct() -> Step:
    fd = os.open(LARGE, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)  # aligned, as O_DIRECT wants it

    def step() -> int:
        assert os.preadv(fd, [buffer], random_page()) == PAGE
        return 1

    return step


# ---- All of it -----------------------------------------------------------------------------

PROGRAMS = {
    program.__name__: program
    for program in (
        *(read, read_at, read_batch, lines, open_read_close, read_bytes, stat, exists, iterdir),
        *(append, read_direct),
    )
}


def main(_module: str, name: str) -> None:
    """Do the steps for as many seconds as each line of the input says."""
    step = PROGRAMS[name]()
    while line := sys.stdin.readline():
        count = 0
        begin = time.perf_counter()
        end = begin + float(line)
        while time.perf_counter() < end:
            count += step()
        print(count, time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
