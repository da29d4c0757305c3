"""How long an event loop holds up a ticker, beside work with files.

    python _tick_programs.py SYSTEM LOAD

A tick is due a millisecond after the one before it. For each line of the input, which says for how
many seconds, it prints: the number of ticks, the time, and 99th percentiles in seconds, of how long
the loop's own work held up a tick, and of how late it was.

What other processes and threads do makes a tick late, too. So the loop's own work is the CPU time
of its thread since the tick before, if that is less than how late the tick was.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio
from _file_steps import LARGE, MIB, PAGE, random_page
from _trio_programs import checked, runner

# The tests' own file system.
sys.path.insert(0, str(Path(__file__).parent.parent))

from fuse_server import FuseServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager

    Load = Callable[[trio.Path], Awaitable[None]]

TICK = 0.001
READ_MAX = 64 * MIB
READERS = 32
FUSE_SECONDS = 0.4
FUSE_TASKS = 4


async def nothing(_directory: trio.Path) -> None:
    await trio.sleep_forever()


async def large_reads(_directory: trio.Path, mode: str = "rb") -> None:
    while True:
        async with await trio.open_file(LARGE, mode) as file:
            while (data := [await file.read(READ_MAX)])[0]:
                # To free so much memory takes milliseconds.
                await trio.to_thread.run_sync(data.clear)


async def cached_reads(_directory: trio.Path) -> None:
    async def read() -> None:
        async with await trio.open_file(LARGE, "rb") as file:
            while True:
                await file.seek(random_page())
                await file.read(PAGE)

    async with trio.open_nursery() as nursery:
        for _ in range(READERS):
            nursery.start_soon(read)


# ---- A slow server -------------------------------------------------------------------------


class SlowServer(FuseServer):
    def _answer(self, opcode: int, node: int, data: bytes) -> tuple[int, bytes]:
        time.sleep(FUSE_SECONDS)
        return super()._answer(opcode, node, data)


@contextmanager
def slow_directory() -> Iterator[trio.Path]:
    with tempfile.TemporaryDirectory() as name:
        server = SlowServer(Path(name))
        try:
            server.add("file", bytes(4 * PAGE))
            yield trio.Path(name)
        finally:
            server.close()


async def slow_server(directory: trio.Path) -> None:
    async def use() -> None:
        path = directory / "file"
        while True:
            await path.stat()
            await path.read_bytes()
            async with await trio.open_file(path, "r+b") as file:
                await file.read(PAGE)
                await file.write(bytes(PAGE))

    async with trio.open_nursery() as nursery:
        for _ in range(FUSE_TASKS):
            nursery.start_soon(use)


LOADS: dict[str, tuple[Load, Callable[[], AbstractContextManager[trio.Path]]]] = {
    "nothing": (nothing, lambda: nullcontext(trio.Path())),
    "large": (large_reads, lambda: nullcontext(trio.Path())),
    "text": (partial(large_reads, mode="r"), lambda: nullcontext(trio.Path())),
    "cached": (cached_reads, lambda: nullcontext(trio.Path())),
    "slow_server": (slow_server, slow_directory),
}


# ---- The ticker ----------------------------------------------------------------------------


async def tick(seconds: float) -> tuple[list[float], list[float]]:
    """Return how long the loop held up each tick, and how late each tick was."""
    held_up, late = [], []
    end = trio.current_time() + seconds
    before = time.thread_time()
    while trio.current_time() < end:
        due = trio.current_time() + TICK
        await trio.sleep_until(due)
        late.append(trio.current_time() - due)
        now = time.thread_time()
        held_up.append(min(now - before, late[-1]))
        before = now
    return held_up, late


async def tick_as_asked(load: Load, directory: trio.Path) -> None:
    while line := sys.stdin.readline():
        begin = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(load, directory)
            held_up, late = await tick(float(line))
            elapsed = time.perf_counter() - begin
            nursery.cancel_scope.cancel()
        print(len(held_up), elapsed, p99(held_up), p99(late), flush=True)


def p99(values: list[float]) -> float:
    if len(values) == 1:  # of a trial run, or on a busy machine
        return values[0]
    return statistics.quantiles(values, n=100)[98]


def main(system: str, name: str) -> None:
    load, directory = LOADS[name]
    with directory() as path:
        runner(system)(checked, partial(tick_as_asked, load, path))


if __name__ == "__main__":
    main(*sys.argv[1:])
