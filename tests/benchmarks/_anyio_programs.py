"""What `bench_sockets.py` measures through AnyIO, as `_trio_programs.py`; and clients.

The Redis client is coredis, which is made on AnyIO. The HTTP client is httpx, which on Trio
uses Trio itself.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BACKLOG = 4096
VALUE = b"x" * 64


async def echo() -> None:
    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send(data)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1", backlog=BACKLOG) as listener:
        print(listener.extra(anyio.abc.SocketAttribute.local_port), flush=True)
        await listener.serve(handle)


async def redis(port: str, tasks: str) -> None:
    """SET and GET in turns; one connection for each task."""
    coredis = importlib.import_module("coredis")

    async def use(client: Any, pairs: int) -> None:
        for _ in range(pairs):
            await client.set("key", VALUE)
            assert await client.get("key") == VALUE

    async with coredis.Redis(host="127.0.0.1", port=int(port)) as client:
        await perform_what_is_asked(int(tasks), partial(use, client), operations=2)


async def http(port: str, tasks: str) -> None:
    httpx = importlib.import_module("httpx")
    url = f"http://127.0.0.1:{port}/"

    async def use(client: Any, count: int) -> None:
        for _ in range(count):
            response = await client.get(url)
            assert response.status_code == 200

    async with httpx.AsyncClient(trust_env=False) as client:
        await perform_what_is_asked(int(tasks), partial(use, client))


async def perform_what_is_asked(
    tasks: int, perform: Callable[[int], Awaitable[None]], operations: int = 1
) -> None:
    """Share the number in each line of the input among tasks; *operations* are one turn."""
    while line := sys.stdin.readline():
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(perform, int(line) // tasks // operations)
        print("done", flush=True)


# ---- All of it -----------------------------------------------------------------------------

PROGRAMS = {program.__name__: program for program in (echo, redis, http)}


async def checked(program: Callable[..., Awaitable[None]], *arguments: str) -> None:
    """Run *program*, unless this is another engine than the one to be measured."""
    lowlevel = importlib.import_module("trio.lowlevel")
    engine = getattr(lowlevel.current_statistics().io_statistics, "engine", None)
    asked = os.environ.get("TRIO_URING_ENGINE")
    if engine != asked:
        raise RuntimeError(f"to be measured is the engine {asked}, and this is {engine}")
    await program(*arguments)


def main(system: str, name: str, *arguments: str) -> None:
    program = PROGRAMS[name]
    if system == "trio":
        anyio.run(checked, program, *arguments, backend="trio")
    elif system == "trio_uring":
        config = importlib.import_module("trio_uring").RingConfig(require=True)
        options = {"ring": config}
        anyio.run(checked, program, *arguments, backend="trio_uring", backend_options=options)
    else:
        options = {"loop_factory": importlib.import_module(system).new_event_loop}
        anyio.run(program, *arguments, backend="asyncio", backend_options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
