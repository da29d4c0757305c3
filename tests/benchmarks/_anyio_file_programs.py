"""What `bench_files.py` measures through AnyIO, on Trio's runs and on asyncio's event loops."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from _file_steps import LARGE, PAGE, SMALL, random_page

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from _file_steps import Step


@asynccontextmanager
async def anyio_read() -> AsyncIterator[Step]:
    async with await anyio.open_file(LARGE, "rb") as file:

        async def step() -> int:
            await file.seek(random_page())
            assert len(await file.read(PAGE)) == PAGE
            return 1

        yield step


@asynccontextmanager
async def anyio_iterdir() -> AsyncIterator[Step]:
    async def step() -> int:
        count = 0
        async for _ in anyio.Path(SMALL).iterdir():
            count += 1
        return count

    yield step


PROGRAMS = {program.__name__: program for program in (anyio_read, anyio_iterdir)}
