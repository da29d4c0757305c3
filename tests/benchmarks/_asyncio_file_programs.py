"""What `bench_files.py` measures on the event loops of asyncio, with other packages for files.

    python _asyncio_file_programs.py MODULE PROGRAM PEER TASKS [PORT]

A package whose files have no position reads at an offset, which is one call instead of two; so
does blazio, since its `read` would read 64 KiB.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from _file_steps import (
    LARGE,
    LINES_IN_STEP,
    MIB,
    MISSING,
    PAGE,
    SEND_MAX,
    SMALL,
    new_file,
    random_page,
    random_small,
    serve,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager
    from typing import Any

    from _file_steps import Program, Step

    # The same for several packages, which it gets.
    ProgramOf = Callable[[Any], AbstractAsyncContextManager[Step]]


# ---- aiofiles, and blazio, which has its API -----------------------------------------------


@asynccontextmanager
async def seek_and_read(package: Any) -> AsyncIterator[Step]:
    async with package.open(LARGE, "rb") as file:

        async def step() -> int:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE
            return 1

        yield step


@asynccontextmanager
async def pread(package: Any) -> AsyncIterator[Step]:
    async with package.open(LARGE, "rb") as file:

        async def step() -> int:
            assert len(await file.pread(PAGE, random_page())) == PAGE
            return 1

        yield step


@asynccontextmanager
async def lines(package: Any) -> AsyncIterator[Step]:
    async with package.open(LARGE) as file:

        async def step() -> int:
            count = 0
            async for _ in file:
                count += 1
                if count == LINES_IN_STEP:
                    return count
            await file.seek(0)
            return count

        yield step


@asynccontextmanager
async def open_read_close(package: Any) -> AsyncIterator[Step]:
    async def step() -> int:
        async with package.open(random_small(), "rb") as file:
            assert len(await file.read()) == PAGE
        return 1

    yield step


@asynccontextmanager
async def aiofiles_append(package: Any) -> AsyncIterator[Step]:
    async with package.open(new_file(), "ab", buffering=0) as file:

        async def step() -> int:
            await file.write(bytes(PAGE))
            await asyncio.to_thread(os.fdatasync, file.fileno())
            return 1

        yield step


@asynccontextmanager
async def aiofiles_stat(package: Any) -> AsyncIterator[Step]:
    async def step() -> int:
        await package.os.stat(random_small())
        return 1

    yield step


@asynccontextmanager
async def aiofiles_exists(package: Any) -> AsyncIterator[Step]:
    async def step() -> int:
        assert not await package.os.path.exists(MISSING)
        return 1

    yield step


@asynccontextmanager
async def aiofiles_listdir(package: Any) -> AsyncIterator[Step]:
    async def step() -> int:
        return len([SMALL / name for name in await package.os.listdir(SMALL)])

    yield step


# ---- uringio -------------------------------------------------------------------------------


@asynccontextmanager
async def uringio_read(package: Any) -> AsyncIterator[Step]:
    async with await package.open_file(path=str(LARGE), flags=os.O_RDONLY, mode=0) as file:

        async def step() -> int:
            assert len(await file.read(size=PAGE, offset=random_page())) == PAGE
            return 1

        yield step


@asynccontextmanager
async def uringio_open_read_close(package: Any) -> AsyncIterator[Step]:
    async def step() -> int:
        path = str(random_small())
        async with await package.open_file(path=path, flags=os.O_RDONLY, mode=0) as file:
            assert len(await file.read(size=PAGE)) == PAGE
        return 1

    yield step


@asynccontextmanager
async def uringio_append(package: Any) -> AsyncIterator[Step]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    async with await package.open_file(path=new_file(), flags=flags, mode=0o666) as file:

        async def step() -> int:
            await file.write(data=bytes(PAGE))
            await file.fdatasync()
            return 1

        yield step


# ---- pyaio and caio, which have no files of their own --------------------------------------


@asynccontextmanager
async def pyaio_read(package: Any) -> AsyncIterator[Step]:
    fd = os.open(LARGE, os.O_RDONLY)
    ring = shared(package.UringIO)

    async def step() -> int:
        assert len(await ring.read(fd, random_page(), PAGE)) == PAGE
        return 1

    yield step


@asynccontextmanager
async def pyaio_append(package: Any) -> AsyncIterator[Step]:
    fd = os.open(new_file(), os.O_WRONLY | os.O_CREAT)
    ring = shared(package.UringIO)
    end = 0

    async def step() -> int:
        nonlocal end
        end += await ring.write_all(fd, bytes(PAGE), end)
        await ring.fsync(fd, datasync=True)
        return 1

    yield step


@asynccontextmanager
async def caio_read(package: Any) -> AsyncIterator[Step]:
    fd = os.open(LARGE, os.O_RDONLY)
    context = shared(package.AsyncioContext)

    async def step() -> int:
        assert len(await context.read(PAGE, fd, random_page())) == PAGE
        return 1

    yield step


@asynccontextmanager
async def caio_append(package: Any) -> AsyncIterator[Step]:
    fd = os.open(new_file(), os.O_WRONLY | os.O_CREAT)
    context = shared(package.AsyncioContext)
    end = 0

    async def step() -> int:
        nonlocal end
        await context.write(bytes(PAGE), fd, end)
        end += PAGE
        await context.fdsync(fd)
        return 1

    yield step


_shared: dict[type, Any] = {}


def shared(make: type) -> Any:
    """Return the one that all tasks use."""
    if make not in _shared:
        _shared[make] = make()
    return _shared[make]


# ---- asyncio itself ------------------------------------------------------------------------


@asynccontextmanager
async def send_file(port: str) -> AsyncIterator[Step]:
    """Send the beginning of the large file; an operation is a MiB."""
    loop = asyncio.get_running_loop()
    size = min(SEND_MAX, LARGE.stat().st_size)
    with LARGE.open("rb") as file:

        async def step() -> int:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
            assert await loop.sendfile(writer.transport, file, 0, size, fallback=False) == size
            writer.write_eof()
            await reader.read(1)
            writer.close()
            return size // MIB

        yield step


# ---- All of it -----------------------------------------------------------------------------

# The module to import, and its programs.
PEERS: dict[str, tuple[str, dict[str, ProgramOf]]] = {
    "aiofiles": (
        "aiofiles",
        {
            "read": seek_and_read,
            "read_at": seek_and_read,
            "lines": lines,
            "open_read_close": open_read_close,
            "append": aiofiles_append,
            "stat": aiofiles_stat,
            "exists": aiofiles_exists,
            "iterdir": aiofiles_listdir,
        },
    ),
    "blazio": (
        "blazio",
        {"read": pread, "read_at": pread, "lines": lines, "open_read_close": open_read_close},
    ),
    "uringio": (
        "uringio",
        {
            "read": uringio_read,
            "read_at": uringio_read,
            "open_read_close": uringio_open_read_close,
            "append": uringio_append,
        },
    ),
    "uvloop + pyaio": (
        "pyaio.uring",
        {"read": pyaio_read, "read_at": pyaio_read, "append": pyaio_append},
    ),
    "caio": ("caio", {"read": caio_read, "read_at": caio_read, "append": caio_append}),
}


def program_of(name: str, peer: str, *arguments: str) -> Program:
    if name == "send_file":
        return partial(send_file, *arguments)
    if name.startswith("anyio_"):
        return importlib.import_module("_anyio_file_programs").PROGRAMS[name]
    module, programs = PEERS[peer]
    package = importlib.import_module(module)
    if peer == "aiofiles":
        importlib.import_module("aiofiles.os")
    return partial(programs[name], package)


async def run_all(functions: list[Callable[[], Awaitable[int]]]) -> list[int]:
    return await asyncio.gather(*(function() for function in functions))


def main(module: str, name: str, peer: str, tasks: str, *arguments: str) -> None:
    package = importlib.import_module(module)
    loop = package.UringioLoop() if module == "uringio" else package.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(serve(program_of(name, peer, *arguments), int(tasks), run_all))


if __name__ == "__main__":
    main(*sys.argv[1:])
