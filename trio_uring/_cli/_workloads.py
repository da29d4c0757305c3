"""What ``trio-uring bench`` measures, in a process of its own: one workload on one event loop.

    python -m trio_uring._cli._workloads WORKLOAD LOOP SECONDS

Each does the same on each loop, as a program would write it: echoes on many connections, whose both
ends are in this process, and reads of small files. It prints the rate and the CPU time as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from trio_uring._config import RingConfig
from trio_uring._run import run

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Sleep = Callable[[float], Awaitable[object]]

_CONNECTIONS: Final = 64
_MESSAGE: Final = bytes(64)
_READERS: Final = 8
_FILES: Final = 64
_FILE: Final = bytes(4096)
_HOST: Final = "127.0.0.1"
_WARM_UP_SECONDS: Final = 0.1


class _Meter:
    """Counts operations, and measures for *seconds* how many are done."""

    def __init__(self, seconds: float) -> None:
        self.count = 0
        self._seconds = seconds
        self.result: dict[str, float] = {}

    async def measure(self, sleep: Sleep) -> None:
        """Measure what other tasks do meanwhile."""
        await sleep(_WARM_UP_SECONDS)
        count, wall, cpu = self.count, time.perf_counter(), time.process_time()
        await sleep(self._seconds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        done = max(self.count - count, 1)
        self.result = {"rate": done / wall, "cpu_us": cpu / done * 1e6}


# ---- On Trio -------------------------------------------------------------------------------


async def _trio_answer(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def _trio_echo(meter: _Meter) -> None:
    async def ask(stream: trio.SocketStream) -> None:
        while True:
            await stream.send_all(_MESSAGE)
            await stream.receive_some()
            meter.count += 1

    [listener] = await trio.open_tcp_listeners(0, host=_HOST)
    port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, _trio_answer, [listener])
        for _ in range(_CONNECTIONS):
            nursery.start_soon(ask, await trio.open_tcp_stream(_HOST, port))
        await meter.measure(trio.sleep)
        nursery.cancel_scope.cancel()


async def _trio_files(meter: _Meter) -> None:
    async def read(paths: list[Path]) -> None:
        own = [*map(trio.Path, paths)]
        while True:
            for path in own:
                await path.read_bytes()
                meter.count += 1

    with tempfile.TemporaryDirectory() as directory:
        async with trio.open_nursery() as nursery:
            for paths in _made_files(directory):
                nursery.start_soon(read, paths)
            await meter.measure(trio.sleep)
            nursery.cancel_scope.cancel()


# ---- On asyncio ----------------------------------------------------------------------------


async def _asyncio_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # The clients end while their last messages are under way.
    with suppress(asyncio.CancelledError, ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _asyncio_echo(meter: _Meter) -> None:
    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                writer.write(_MESSAGE)
                await writer.drain()
                await reader.read(65536)
                meter.count += 1
        writer.close()

    server = await asyncio.start_server(_asyncio_answer, _HOST, 0, backlog=_CONNECTIONS)
    port = server.sockets[0].getsockname()[1]
    streams = [await asyncio.open_connection(_HOST, port) for _ in range(_CONNECTIONS)]
    tasks = [asyncio.ensure_future(ask(*stream)) for stream in streams]
    await meter.measure(asyncio.sleep)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks)
    server.close()


async def _asyncio_files(meter: _Meter) -> None:
    async def read(paths: list[Path]) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                for path in paths:
                    await asyncio.to_thread(path.read_bytes)
                    meter.count += 1

    with tempfile.TemporaryDirectory() as directory:
        tasks = [asyncio.ensure_future(read(paths)) for paths in _made_files(directory)]
        await meter.measure(asyncio.sleep)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)


def _made_files(directory: str) -> list[list[Path]]:
    """Write the files, and return those of each reader."""
    paths = [Path(directory, f"{number}") for number in range(_FILES)]
    for path in paths:
        path.write_bytes(_FILE)
    return [paths[reader::_READERS] for reader in range(_READERS)]


# ---- One measurement -----------------------------------------------------------------------

_ON_TRIO: Final = {"echo": _trio_echo, "files": _trio_files}
_ON_ASYNCIO: Final = {"echo": _asyncio_echo, "files": _asyncio_files}
WORKLOADS: Final = {
    "echo": f"echoes of {len(_MESSAGE)} bytes on {_CONNECTIONS} connections, client and server",
    "files": f"reads of files of {len(_FILE) // 1024} KiB, by {_READERS} tasks",
}


def _measure(workload: str, loop: str, seconds: float) -> dict[str, float]:
    meter = _Meter(seconds)
    match loop:
        case "trio_uring":  # with the engine that the environment says
            run(_ON_TRIO[workload], meter, ring=RingConfig(require=True))
        case "trio":
            trio.run(_ON_TRIO[workload], meter)
        case "uvloop":
            import_module("uvloop").run(_ON_ASYNCIO[workload](meter))
        case _:
            asyncio.run(_ON_ASYNCIO[workload](meter))
    return meter.result


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
