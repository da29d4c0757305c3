"""AnyIO on trio_uring, beside AnyIO on Trio, on asyncio and on uvloop.

Reads of files; a file through Starlette under Hypercorn, as a `FileResponse` and through
`StaticFiles`, where the load comes from another process and CPU is the server's.

    python bench_anyio.py [files] [http] [--rounds 5]

Needs anyio, uvloop, hypercorn and starlette; a backend that is not installed is left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _measure
import _socket_load
import anyio
from _peers import cpu_clock, cpu_seconds

import trio_uring  # noqa: F401 (makes its backend known to AnyIO)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

BASELINE = "trio"
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "trio": ("trio", {}),
    "trio_uring": ("trio_uring", {}),
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
}
if importlib.util.find_spec("uvloop") is None:
    del BACKENDS["uvloop"]

BLOCK = 4096
BLOCKS = 4096  # in the file that is read: 16 MiB, which stay in the page cache
READS = 8_000
READERS = 32
LINE = 64

REQUESTS = 4_000
HTTP_CONNECTIONS = 32


# ---- Files ---------------------------------------------------------------------------------


async def read_lines(path: str) -> None:
    async with await anyio.open_file(path) as file:
        for _ in range(READS):
            await file.readline()


async def read_blocks(path: str) -> None:
    generator = random.Random(0)

    async def read() -> None:
        async with await anyio.open_file(path, "rb", buffering=0) as file:
            for _ in range(READS // READERS):
                await file.seek(generator.randrange(BLOCKS) * BLOCK)
                assert len(await file.read(BLOCK)) == BLOCK

    async with anyio.create_task_group() as tasks:
        for _ in range(READERS):
            tasks.start_soon(read)


async def read_whole(path: str) -> None:
    small = anyio.Path(path).with_name("small")
    for _ in range(READS // 8):
        assert len(await small.read_bytes()) == BLOCK


FILE_READS: dict[str, tuple[Callable[[str], Awaitable[None]], int]] = {
    "lines": (read_lines, READS),
    "blocks": (read_blocks, READS),
    "whole": (read_whole, READS // 8),
}


async def files(kind: str) -> None:
    """Print the operations per second, and the CPU microseconds of each."""
    function, count = FILE_READS[kind]
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as directory:
        path = Path(directory, "file")
        path.write_bytes((b"x" * (LINE - 1) + b"\n") * (BLOCKS * BLOCK // LINE))
        path.with_name("small").write_bytes(bytes(BLOCK))
        await function(str(path))
        begin, before = time.perf_counter(), cpu_seconds()
        await function(str(path))
        elapsed, cpu = time.perf_counter() - begin, cpu_seconds() - before
    print(count / elapsed, cpu / count * 1e6)


def measure_files(kind: str, backend: str) -> _measure.Sample:
    command = [sys.executable, __file__, "--run", kind, backend]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return _measure.Sample(*map(float, output.split()))


# ---- HTTP ----------------------------------------------------------------------------------

APPLICATION = """
from starlette.applications import Starlette
from starlette.responses import FileResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

async def file(request):
    return FileResponse("files/small")

app = Starlette(routes=[Route("/file", file), Mount("/static", StaticFiles(directory="files"))])
"""
PATHS = {"a FileResponse": "/file", "StaticFiles": "/static/small"}
SERVERS = {
    "trio": ["-m", "hypercorn", "--worker-class", "trio"],
    "trio_uring": ["-m", "trio_uring", "-m", "hypercorn", "--worker-class", "trio"],
    "asyncio": ["-m", "hypercorn", "--worker-class", "asyncio"],
    "uvloop": ["-m", "hypercorn", "--worker-class", "uvloop"],
}


def measure_http(path: str, server: str) -> _measure.Sample:
    options = ["--workers", "0", "--bind", "127.0.0.1:0", "--config", "hypercorn.toml"]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "files").mkdir()
        Path(directory, "files", "small").write_bytes(bytes(BLOCK))
        Path(directory, "app.py").write_text(APPLICATION)
        Path(directory, "hypercorn.toml").write_text(f"keep_alive_max_requests = {10 * REQUESTS}\n")
        with subprocess.Popen(
            [sys.executable, "-u", *SERVERS[server], *options, "app:app"],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                return _measure_server(process, path)
            finally:
                process.terminate()


def _measure_server(process: subprocess.Popen[str], path: str) -> _measure.Sample:
    assert process.stdout is not None
    said = ""
    while (match := re.search(r"Running on http://127.0.0.1:(\d+)", said)) is None:
        line = process.stdout.readline()
        said += line
        assert line, said
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    port = int(match[1])
    size = _socket_load.http_answer_size(port, request)
    with _socket_load.connected(port, HTTP_CONNECTIONS) as connections:
        _socket_load.exchange(connections, request, size, REQUESTS // 10)
        clock = cpu_clock(process.pid)
        before = time.clock_gettime(clock)
        elapsed = _socket_load.exchange(connections, request, size, REQUESTS)
        cpu = time.clock_gettime(clock) - before
    return _measure.Sample(rate=REQUESTS / elapsed, cpu_us=cpu / REQUESTS * 1e6)


# ---- All of it -----------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["files", "http"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", nargs=2, metavar=("WHAT", "BACKEND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        what, name = options.run
        backend, backend_options = BACKENDS[name]
        function = functools.partial(files, what)
        anyio.run(function, backend=backend, backend_options=backend_options)
        return
    measurements: list[tuple[str, str, Callable[[str], _measure.Sample]]] = [
        *(
            ("files", f"AnyIO, {title}", functools.partial(measure_files, kind))
            for kind, title in {
                "lines": f"readline, {LINE} B",
                "blocks": f"seek and read {BLOCK} B, {READERS} tasks, each counted as one",
                "whole": f"Path.read_bytes, {BLOCK} B",
            }.items()
        ),
        *(
            ("http", f"Hypercorn, {BLOCK} B by {name}", functools.partial(measure_http, path))
            for name, path in PATHS.items()
        ),
    ]
    for what, title, measure in measurements:
        if what in options.what:
            variants = {name: functools.partial(measure, name) for name in BACKENDS}
            _measure.report(title, _measure.interleave(variants, options.rounds), BASELINE)


if __name__ == "__main__":
    main()
