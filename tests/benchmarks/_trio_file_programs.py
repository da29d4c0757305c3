"""What `bench_files.py` measures on Trio and on trio_uring.

    python _trio_file_programs.py SYSTEM PROGRAM TASKS [PORT]

Most are unchanged Trio programs. What plain Trio does not have, it does in its own way.
"""

from __future__ import annotations

import importlib
import io
import mmap
import os
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import trio
from _file_steps import (
    LARGE,
    LINES_IN_STEP,
    MIB,
    MISSING,
    PAGE,
    READS_IN_BATCH,
    SEND_MAX,
    SMALL,
    new_file,
    random_page,
    random_small,
    serve,
)
from _trio_programs import checked, runner

import trio_uring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from _file_steps import Program, Step


# ---- Reading -------------------------------------------------------------------------------


@asynccontextmanager
async def read() -> AsyncIterator[Step]:
    async with await trio.open_file(LARGE, "rb") as file:

        async def step() -> int:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE
            return 1

        yield step


@asynccontextmanager
async def read_at() -> AsyncIterator[Step]:
    async with await trio_uring.open_positional(LARGE) as file:

        async def step() -> int:
            assert len(await file.read_at(PAGE, random_page())) == PAGE
            return 1

        yield step


@asynccontextmanager
async def read_batch() -> AsyncIterator[Step]:
    """Read many pages in one call."""
    async with await trio_uring.open_positional(LARGE) as file:

        async def step() -> int:
            pages = [(PAGE, random_page()) for _ in range(READS_IN_BATCH)]
            assert len((await file.read_many_at(pages))[-1]) == PAGE
            return READS_IN_BATCH

        yield step


@asynccontextmanager
async def read_cold() -> AsyncIterator[Step]:
    async with await trio.open_file(LARGE, "rb", buffering=0) as file:
        # Not file.fileno(): from then on others may move the position, and threads read the file.
        fd = io.FileIO.fileno(file.wrapped)
        # All of it: a part of a large folio would stay.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

        async def step() -> int:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE
            return 1

        yield step


@asynccontextmanager
async def lines() -> AsyncIterator[Step]:
    async with await trio.open_file(LARGE) as file:

        async def step() -> int:
            count = 0
            async for _ in file:
                count += 1
                if count == LINES_IN_STEP:
                    return count
            await file.seek(0)
            return count

        yield step


# ---- Small files and paths -----------------------------------------------------------------


@asynccontextmanager
async def open_read_close() -> AsyncIterator[Step]:
    async def step() -> int:
        async with await trio.open_file(random_small(), "rb") as file:
            assert len(await file.read()) == PAGE
        return 1

    yield step


@asynccontextmanager
async def read_bytes() -> AsyncIterator[Step]:
    async def step() -> int:
        assert len(await trio.Path(random_small()).read_bytes()) == PAGE
        return 1

    yield step


@asynccontextmanager
async def stat() -> AsyncIterator[Step]:
    async def step() -> int:
        await trio.Path(random_small()).stat()
        return 1

    yield step


@asynccontextmanager
async def exists() -> AsyncIterator[Step]:
    async def step() -> int:
        assert not await trio.Path(MISSING).exists()
        return 1

    yield step


@asynccontextmanager
async def iterdir() -> AsyncIterator[Step]:
    async def step() -> int:
        return len(list(await trio.Path(SMALL).iterdir()))

    yield step


@asynccontextmanager
async def mkdir_rmdir() -> AsyncIterator[Step]:
    path = trio.Path(new_file())

    async def step() -> int:
        await path.mkdir()
        await path.rmdir()
        return 1

    yield step


@asynccontextmanager
async def write_unlink() -> AsyncIterator[Step]:
    path = trio.Path(new_file())

    async def step() -> int:
        await path.write_bytes(bytes(PAGE))
        await path.unlink()
        return 1

    yield step


# ---- The disk ------------------------------------------------------------------------------


@asynccontextmanager
async def append() -> AsyncIterator[Step]:
    async with await trio.open_file(new_file(), "ab", buffering=0) as file:

        async def step() -> int:
            await file.write(bytes(PAGE))
            await trio_uring.fdatasync(file)
            return 1

        yield step


@asynccontextmanager
async def append_on_trio() -> AsyncIterator[Step]:
    async with await trio.open_file(new_file(), "ab", buffering=0) as file:

        async def step() -> int:
            await file.write(bytes(PAGE))
            await trio.to_thread.run_sync(os.fdatasync, file.fileno())
            return 1

        yield step


@asynccontextmanager
async def read_direct() -> AsyncIterator[Step]:
    async with await trio_uring.open_direct(LARGE) as file:

        async def step() -> int:
            assert len(await file.read_at(PAGE, random_page())) == PAGE
            return 1

        yield step


@asynccontextmanager
async def read_leased() -> AsyncIterator[Step]:
    with trio_uring.RegisteredBuffers(1, PAGE) as buffers, await buffers.lease() as lease:
        async with await trio_uring.open_direct(LARGE) as file:

            async def step() -> int:
                assert await file.read_into_at(lease, random_page()) == PAGE
                return 1

            yield step


@asynccontextmanager
async def read_direct_on_trio() -> AsyncIterator[Step]:
    fd = os.open(LARGE, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, PAGE)  # aligned, as O_DIRECT wants it

    async def step() -> int:
        assert await trio.to_thread.run_sync(os.preadv, fd, [buffer], random_page()) == PAGE
        return 1

    yield step


# ---- A file to a socket --------------------------------------------------------------------


async def send_file(stream: trio.SocketStream, fd: int, size: int) -> None:
    assert await trio_uring.send_file(stream, fd, count=size) == size


async def send_file_on_trio(stream: trio.SocketStream, fd: int, size: int) -> None:
    sent, out = 0, stream.socket.fileno()
    while sent < size:
        try:
            sent += await trio.to_thread.run_sync(os.sendfile, out, fd, sent, size - sent)
        except BlockingIOError:
            await trio.lowlevel.wait_writable(out)


@asynccontextmanager
async def sending(
    send: Callable[[trio.SocketStream, int, int], Awaitable[None]], port: str
) -> AsyncIterator[Step]:
    """Send the beginning of the large file; an operation is a MiB."""
    size = min(SEND_MAX, LARGE.stat().st_size)
    with LARGE.open("rb") as file:

        async def step() -> int:
            async with await trio.open_tcp_stream("127.0.0.1", int(port)) as stream:
                await send(stream, file.fileno(), size)
                await stream.send_eof()
                await stream.receive_some(1)
            return size // MIB

        yield step


# ---- Other ---------------------------------------------------------------------------------


@asynccontextmanager
async def checkpoints() -> AsyncIterator[Step]:
    async def step() -> int:
        await trio.lowlevel.checkpoint()
        return 1

    yield step


# ---- All of it -----------------------------------------------------------------------------

PROGRAMS = {
    program.__name__: program
    for program in (
        *(read, read_at, read_batch, read_cold, lines, open_read_close, read_bytes, stat, exists),
        *(iterdir, mkdir_rmdir, write_unlink, append, read_direct, read_leased, checkpoints),
    )
}
ON_TRIO = {"read_at": read, "append": append_on_trio, "read_direct": read_direct_on_trio,
           "read_leased": read_direct_on_trio}  # fmt: skip


def program_of(system: str, name: str, *arguments: str) -> Program:
    if name == "send_file":
        return partial(sending, send_file_on_trio if system == "trio" else send_file, *arguments)
    if name.startswith("anyio_"):
        return importlib.import_module("_anyio_file_programs").PROGRAMS[name]
    return (ON_TRIO.get(name) if system == "trio" else None) or PROGRAMS[name]


async def run_all(functions: list[Callable[[], Awaitable[int]]]) -> list[int]:
    counts: list[int] = []

    async def run_one(function: Callable[[], Awaitable[int]]) -> None:
        counts.append(await function())

    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(run_one, function)
    return counts


def main(system: str, name: str, tasks: str, *arguments: str) -> None:
    program = program_of(system, name, *arguments)
    runner(system)(checked, partial(serve, program, int(tasks), run_all))


if __name__ == "__main__":
    main(*sys.argv[1:])
