"""Hypercorn and Starlette under the launcher, unmodified, with requests by HTTP/1.1 and HTTP/2."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from contextlib import contextmanager
from textwrap import dedent
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme
from children import CHILD_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FILES = {"small.txt": b"small", "large.bin": bytes(range(256)) * 4096}

APPLICATION = """
import anyio
import trio
from starlette.applications import Starlette
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles


async def file(request):
    return FileResponse(f"files/{request.path_params['name']}")


async def upload(request):
    async with await anyio.open_file("files/uploaded", "wb") as file:
        async for chunk in request.stream():
            await file.write(chunk)
    return JSONResponse((await anyio.Path("files/uploaded").stat()).st_size)


async def statistics(request):
    io = trio.lowlevel.current_statistics().io_statistics
    return JSONResponse({
        "backend": io.backend, "completed": dict(io.completed), "routes": dict(io.routes)
    })


app = Starlette(routes=[
    Route("/file/{name}", file),
    Route("/upload", upload, methods=["POST"]),
    Route("/statistics", statistics),
    Mount("/static", StaticFiles(directory="files")),
])
"""


@contextmanager
def hypercorn(directory: Path, *options: str) -> Iterator[str]:
    """Serve `APPLICATION` with TLS on a free port; yield its address."""
    (directory / "app.py").write_text(dedent(APPLICATION))
    (directory / "files").mkdir()
    for name, content in FILES.items():
        (directory / "files" / name).write_bytes(content)
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(directory / "certificate.pem")
    authority.cert_pem.write_to_path(directory / "authority.pem")
    command = [
        *(sys.executable, "-m", "trio_uring", "-m", "hypercorn", "--worker-class", "trio"),
        *("--bind", "127.0.0.1:0", "--certfile", "certificate.pem", "--keyfile", "key.pem"),
        *(*options, "app:app"),
    ]
    with subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TRIO_URING": "require"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            seen = ""
            while "Running on" not in seen:
                line = process.stdout.readline()
                seen += line
                assert line, seen
            yield seen.split("Running on ")[1].split()[0]
        finally:
            process.terminate()
            process.communicate(timeout=CHILD_SECONDS)


# With no worker it serves in the process that was launched, else in one that that starts.
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/2"])
def test_an_anyio_server_sends_files_over_http(tmp_path: Path, version: str, workers: int) -> None:
    with (
        hypercorn(tmp_path, "--workers", str(workers)) as address,
        httpx.Client(
            base_url=address,
            http1=version == "HTTP/1.1",
            http2=version == "HTTP/2",
            verify=ssl.create_default_context(cafile=tmp_path / "authority.pem"),
            timeout=CHILD_SECONDS,
        ) as client,
    ):
        before = client.get("/statistics").json()
        assert before["backend"] == "io_uring"
        for name, content in FILES.items():
            for where in ("file", "static"):
                response = client.get(f"/{where}/{name}")
                assert (response.status_code, response.http_version) == (200, version)
                assert response.content == content
        assert client.get("/static/missing").status_code == 404
        assert client.post("/upload", content=FILES["large.bin"]).json() == 2**20
        assert (tmp_path / "files" / "uploaded").read_bytes() == FILES["large.bin"]
        after = client.get("/statistics").json()
    # Four downloads and an upload opened files, and `FileResponse` asked for their sizes. What is
    # in the kernel's caches by then is opened and read at once, without the ring.
    assert after["routes"]["ring"] + after["routes"]["inline"] >= 15
    assert after["completed"]["OPENAT"] >= 1
    assert after["completed"]["WRITE"] >= 1
    assert after["completed"]["RECV"] > before["completed"].get("RECV", 0)
    assert after["completed"]["SEND"] > before["completed"].get("SEND", 0)
    # `StaticFiles` looks its files up with a function of its own, which has to be in a thread:
    # that is no call on a file that we know of. The large upload is closed in one.
    assert after["routes"].get("thread", 0) == 1
