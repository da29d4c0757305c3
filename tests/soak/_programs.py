"""Files, transfers between files and sockets, subprocesses, and AnyIO."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import anyio
import trio
from _load import Load, LostError, Received

import trio_uring

if TYPE_CHECKING:
    from pathlib import Path

CAT: Final = "/bin/cat"


async def files(load: Load, directory: Path) -> None:
    """Write, read and remove files. A cancelled read takes nothing from its file."""
    workload = "files"
    path = trio.Path(directory, "file")
    while load.goes_on(workload):
        with load.round(workload):
            data = load.data()
            if load.random.random() < 0.5:
                await trio_uring.write_file(path, data)
            else:
                async with await trio.open_file(path, "wb") as file:
                    await file.write(data)
            await read_in_pieces(load, path, data)
            await read_at_positions(load, path, data)
            await path.rename(directory / "renamed")
            await trio.Path(directory, "renamed").unlink()


async def read_in_pieces(load: Load, path: trio.Path, data: bytes) -> None:
    received = Received(load)
    async with await trio.open_file(path, "rb", buffering=0) as file:
        while True:
            piece = await load.perhaps("read", partial(file.read, load.size()))
            if piece is None:
                continue
            if not piece:
                break
            received.add(piece)
    received.check(data, whole=True)


async def read_at_positions(load: Load, path: trio.Path, data: bytes) -> None:
    async with await trio_uring.open_positional(path) as file:
        for _ in range(5):
            position, size = load.random.randrange(len(data) + 1), load.size()
            piece = await load.perhaps("pread", partial(file.read_at, size, position))
            if piece is not None:
                received = Received(load)
                received.add(piece)
                received.check(data[position : position + size], whole=True)


async def transfers(load: Load, directory: Path) -> None:
    """Move a file into a socket and from there into a file. Go on where it was cancelled."""
    workload = "transfers"
    while load.goes_on(workload):
        with load.round(workload):
            data = load.data()
            source, target = directory / "source", directory / "target"
            source.write_bytes(data)
            target.write_bytes(b"")
            ours, theirs = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
            async with ours, theirs, trio.open_nursery() as nursery:
                nursery.start_soon(send_file, load, ours, source, len(data))
                await receive_file(load, theirs, target)
            received = Received(load)
            received.add(target.read_bytes())
            received.check(data, whole=True)


async def send_file(load: Load, stream: trio.SocketStream, path: Path, size: int) -> None:
    sent = 0
    with path.open("rb") as file:
        while sent < size:
            progress = trio_uring.SendProgress()
            sending = partial(trio_uring.send_file, stream, file, offset=sent, progress=progress)
            await load.perhaps("send_file", sending)
            sent += progress.bytes_sent
    await stream.send_eof()


async def receive_file(load: Load, stream: trio.SocketStream, path: Path) -> None:
    received = 0
    with path.open("r+b") as file:
        while True:
            progress = trio_uring.ReceiveProgress()
            receiving = partial(
                trio_uring.receive_file, stream, file, offset=received, progress=progress
            )
            count = await load.perhaps("receive_file", receiving)
            received += progress.bytes_received
            if progress.left:
                os.pwrite(file.fileno(), progress.left, received)
                received += len(progress.left)
            if count is not None:
                return


async def subprocesses(load: Load) -> None:
    """Send data through a program, or end it by a signal or by cancelling."""
    workload = "subprocesses"
    while load.goes_on(workload):
        with load.round(workload):
            match load.random.choice(("data", "data", "signal", "cancel")):
                case "data":
                    data = load.data()
                    result = await trio.run_process([CAT], stdin=data, capture_stdout=True)
                    received = Received(load)
                    received.add(result.stdout)
                    received.check(data, whole=True)
                case "signal":
                    await end_by_signal(load)
                case "cancel":
                    with load.cancelling():
                        await trio.run_process([CAT], stdin=b"x" * 200_000, capture_stdout=True)


async def end_by_signal(load: Load) -> None:
    process = await trio.lowlevel.open_process([CAT], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        with load.cancelling():
            await process.wait()
        process.kill()
        status = await process.wait()
    if status != -signal.SIGKILL:
        raise LostError(f"a killed program ended with {status}")


# --- AnyIO ----------------------------------------------------------------------------------


async def anyio_streams(load: Load) -> None:
    """Echo through AnyIO's TCP streams, with cancelled receives."""
    workload = "anyio"

    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    data = await load.perhaps("receive", partial(stream.receive, load.size()))
                    if data is not None:
                        await stream.send(data)

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        async with anyio.create_task_group() as serving:
            serving.start_soon(listener.serve, serve)
            while load.goes_on(workload):
                with load.round(workload):
                    await anyio_client(load, port)
            serving.cancel_scope.cancel()


async def anyio_client(load: Load, port: int) -> None:
    data = load.data()
    received = Received(load)
    whole = load.random.random() < 0.7
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:

        async def send() -> None:
            view = memoryview(data)
            while view:
                size = load.size()
                await stream.send(bytes(view[:size]))
                view = view[size:]

        with trio.CancelScope() if whole else load.cancelling():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send)
                while received.count < len(data):
                    piece = await load.perhaps("receive", partial(stream.receive, load.size()))
                    if piece is not None:
                        received.add(piece)
    received.check(data, whole=whole)
