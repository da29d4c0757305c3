"""AnyIO inside a run with a ring. Counters show by which route its calls went.

The tests run under `trio_uring.run`. AnyIO looks up its backend by the name "trio", as in a run
that it started by the name "trio_uring".
"""

from __future__ import annotations

import inspect
import io
import os
import socket
import ssl
import sys
import tempfile
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import anyio
import pytest
import sniffio
import trio
import trustme
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.file import FileReadStream, FileWriteStream
from anyio.streams.tls import TLSListener, TLSStream
from trio.testing import wait_all_tasks_blocked

from trio_uring.lowlevel import RingStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from anyio.abc import Listener
    from typing_extensions import Self


def statistics() -> RingStatistics:
    result = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(result, RingStatistics)
    return result


class Counted:
    """What the block did: completions by opcode, and calls on files by route."""

    def __enter__(self) -> Self:
        before = statistics()
        self._opcodes, self._routes = Counter(before.completed), Counter(before.routes)
        return self

    def __exit__(self, *_exc: object) -> None:
        after = statistics()
        self.opcodes = Counter(after.completed) - self._opcodes
        self.routes = Counter(after.routes) - self._routes


# --- Sockets --------------------------------------------------------------------------------


async def echo(stream: anyio.abc.ByteStream) -> None:
    async with stream:
        async for data in stream:
            await stream.send(data)


async def talk(
    listener: Listener[anyio.abc.ByteStream], connect: Callable[[], Awaitable[anyio.abc.ByteStream]]
) -> None:
    """Send a message over a connection made by *connect*, and receive its echo from *listener*."""
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, echo)
        async with await connect() as stream:
            await stream.send(b"hello")
            assert await stream.receive() == b"hello"
        tasks.cancel_scope.cancel()


def port_of(listener: Listener[SocketStream]) -> int:
    return listener.extra(SocketAttribute.local_port)


async def test_tcp() -> None:
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    with Counted() as counted:
        await talk(listener, partial(anyio.connect_tcp, "127.0.0.1", port_of(listener)))
    assert counted.opcodes["SEND"] == 2
    assert counted.opcodes["RECV"] >= 2
    assert counted.opcodes["CONNECT"] == 1


async def test_tls() -> None:
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")

    async def connect() -> TLSStream:
        # Not through connect_tcp, which resolves the name for TLS in a thread.
        stream = await anyio.connect_tcp("127.0.0.1", port_of(listener))
        return await TLSStream.wrap(
            stream, hostname="127.0.0.1", ssl_context=client_context, standard_compatible=False
        )

    with Counted() as counted:
        await talk(TLSListener(listener, server_context, standard_compatible=False), connect)
    assert counted.opcodes["SEND"] >= 4  # the handshake, too
    assert counted.opcodes["RECV"] >= 4


async def test_unix_sockets(tmp_path: Path) -> None:
    listener = await anyio.create_unix_listener(tmp_path / "socket")
    with Counted() as counted:
        await talk(listener, partial(anyio.connect_unix, tmp_path / "socket"))
    assert counted.opcodes["CONNECT"] == 1
    assert counted.opcodes["SEND"] == 2


async def test_fds_are_passed() -> None:
    ends = socket.socketpair(socket.AF_UNIX)
    reader, writer = os.pipe()
    with Counted() as counted:
        async with (
            await anyio.abc.UNIXSocketStream.from_socket(ends[0]) as left,
            await anyio.abc.UNIXSocketStream.from_socket(ends[1]) as right,
        ):
            await left.send_fds(b"fds", [writer])
            os.close(writer)
            message, [passed] = await right.receive_fds(10, 1)
    assert message == b"fds"
    os.write(passed, b"through the copy")
    os.close(passed)
    assert os.read(reader, 100) == b"through the copy"
    os.close(reader)
    assert counted.opcodes["SENDMSG"] == 1


async def test_udp() -> None:
    with Counted() as counted:
        async with (
            await anyio.create_udp_socket(family=socket.AF_INET, local_host="127.0.0.1") as server,
            await anyio.create_connected_udp_socket(
                "127.0.0.1", server.extra(SocketAttribute.local_port)
            ) as client,
        ):
            await client.send(b"ping")
            data, (host, port) = await server.receive()
            await server.sendto(data, host, port)
            assert await client.receive() == b"ping"
    assert counted.opcodes["SEND"] == 1


async def test_no_read_ahead() -> None:
    """Data that nobody receives stays in the socket, where programs look for it."""
    async with (
        await anyio.create_tcp_listener(local_host="127.0.0.1") as listener,
        await anyio.connect_tcp("127.0.0.1", port_of(listener)) as client,
        await listener.listeners[0].accept() as server,
    ):
        await client.send(b"first and second")
        assert await server.receive(5) == b"first"
        await wait_all_tasks_blocked()
        raw = server.extra(SocketAttribute.raw_socket)
        await anyio.wait_readable(raw)
        assert raw.recv(100, socket.MSG_PEEK) == b" and second"


async def test_processes() -> None:
    command = [sys.executable, "-c", "print(input().upper())"]
    with Counted() as counted:
        result = await anyio.run_process(command, input=b"hello\n")
    assert result.stdout == b"HELLO\n"
    assert counted.opcodes["READ"] >= 1
    assert counted.opcodes["WRITE"] >= 1


# --- Files ----------------------------------------------------------------------------------


async def test_open_file(tmp_path: Path) -> None:
    await anyio.Path(tmp_path, "first").touch()
    await anyio.Path(tmp_path, "first").read_bytes()  # from now on the mount is known
    with Counted() as counted:
        async with await anyio.open_file(tmp_path / "file", "w+") as file:
            await file.write("one\ntwo\n")
            await file.seek(0)
            assert [line async for line in file] == ["one\n", "two\n"]
            assert isinstance(file.wrapped, io.TextIOWrapper)
    assert counted.routes["ring"] > 0
    assert counted.routes["inline"] > 0
    assert counted.routes["thread"] == 0
    assert counted.opcodes["OPENAT"] == 1


async def test_path(tmp_path: Path) -> None:
    path = anyio.Path(tmp_path, "file")
    with Counted() as counted:
        await path.write_bytes(b"text")
        assert await path.read_bytes() == b"text"
        assert await path.exists()
        assert await path.is_file()
        assert not await path.is_dir()
        assert (await path.stat()).st_size == 4
        assert (await path.lstat()).st_size == 4
        await path.rename(tmp_path / "renamed")
        await anyio.Path(tmp_path, "renamed").unlink()
        assert not await path.exists()
        async with await path.open("wb") as file:
            await file.write(b"bytes")
        await anyio.Path(tmp_path, "directory").mkdir()
        await anyio.Path(tmp_path, "directory").rmdir()
    assert counted.routes["thread"] == 0
    # What is cached is read, and its status known, without the ring.
    assert counted.routes["ring"] + counted.routes["inline"] >= 13
    assert counted.routes["ring"] >= 6


async def test_hardlink(tmp_path: Path) -> None:
    path = anyio.Path(tmp_path, "file")
    await path.touch()
    with Counted() as counted:
        await anyio.Path(tmp_path, "other").hardlink_to(path)
        with pytest.raises(FileExistsError) as caught:
            await anyio.Path(tmp_path, "other").hardlink_to(path)
    assert (tmp_path / "other").samefile(tmp_path / "file")
    assert (caught.value.filename, caught.value.filename2) == (str(path), str(tmp_path / "other"))
    assert (counted.routes["ring"], counted.routes["thread"]) == (2, 0)


async def test_file_streams(tmp_path: Path) -> None:
    with Counted() as counted:
        async with await FileWriteStream.from_path(tmp_path / "file") as writer:
            await writer.send(b"x" * 100_000)
        async with await FileReadStream.from_path(tmp_path / "file") as reader:
            assert b"".join([chunk async for chunk in reader]) == b"x" * 100_000
    assert counted.routes["thread"] == 0
    assert counted.routes["ring"] + counted.routes["inline"] >= 4


# Every method of AnyIO's files, in an order in which each has something to do. `aclose` comes last.
FILE_CALLS: dict[str, tuple[object, ...]] = {
    "write": ("one\ntwo\n",),
    "flush": (),
    "writelines": (["three\n"],),
    "truncate": (12,),
    "tell": (),
    "seek": (0,),
    "readline": (),
    "readinto": (bytearray(1),),
    "readinto1": (bytearray(1),),
    "read1": (1,),
    "read": (1,),
    "readlines": (),
}


@pytest.mark.parametrize("mode", ["w+", "w+b"])
@pytest.mark.parametrize("kind", ["open_file", "TemporaryFile", "NamedTemporaryFile"])
async def test_no_method_of_a_file_uses_a_thread(kind: str, mode: str, tmp_path: Path) -> None:
    methods = {
        name for name, value in vars(anyio.AsyncFile).items() if inspect.iscoroutinefunction(value)
    }
    assert methods == FILE_CALLS.keys() | {"aclose"}
    binary = "b" in mode
    opened = (
        await anyio.open_file(tmp_path / "file", mode)
        if kind == "open_file"
        else getattr(anyio, kind)(mode, dir=str(tmp_path))
    )
    async with opened as file:
        for name, args in FILE_CALLS.items():
            if name in {"readinto", "readinto1", "read1"} and not binary:
                continue
            if binary and name == "write":
                args = (b"one\ntwo\n",)
            if binary and name == "writelines":
                args = ([b"three\n"],)
            with Counted() as counted:
                await getattr(file, name)(*args)
            assert (counted.routes.total(), counted.routes["thread"]) == (1, 0), name


async def test_temporary_files(tmp_path: Path) -> None:
    directory = str(tmp_path)
    async with (
        anyio.TemporaryFile("w+", newline="", dir=directory) as file,
        anyio.NamedTemporaryFile(dir=directory, suffix=".named") as named,
        anyio.SpooledTemporaryFile(max_size=1, dir=directory) as spooled,
    ):
        await spooled.write(b"one")  # rolls over
        with Counted() as counted:
            await file.write("one\r\n")
            await file.seek(0)
            assert await file.read() == "one\r\n"
            await named.write(b"one")
            await named.flush()
            [path] = tmp_path.glob("*.named")
            assert path.read_bytes() == b"one"
            await spooled.seek(0)
            assert await spooled.read() == b"one"
        assert counted.routes["thread"] == 0
        assert counted.routes["ring"] >= 2
    assert list(tmp_path.iterdir()) == []


async def test_temporary_file_with_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="encoding"):
        async with anyio.TemporaryFile("w+b", encoding="ascii"):  # type: ignore[call-overload]
            raise AssertionError


async def test_replaced_tempfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: io.BytesIO(b"replaced"))
    async with anyio.TemporaryFile() as file:
        assert await file.read() == b"replaced"


# --- Direct calls ---------------------------------------------------------------------------


async def test_direct_calls(tmp_path: Path) -> None:
    with Counted() as counted:
        status = await anyio.to_thread.run_sync(os.stat, tmp_path)
        assert status == tmp_path.stat()
        await anyio.to_thread.run_sync(partial(os.stat, follow_symlinks=False), str(tmp_path))
        with pytest.raises(FileNotFoundError) as caught:
            await anyio.to_thread.run_sync(os.stat, "/no/such/file")
    assert caught.value.filename == "/no/such/file"
    assert (counted.routes.total(), counted.routes["thread"]) == (3, 0)


async def test_who_means_a_thread_gets_one(tmp_path: Path) -> None:
    limiter = anyio.CapacityLimiter(1)
    with Counted() as counted:
        await anyio.to_thread.run_sync(os.stat, tmp_path, limiter=limiter)
        await anyio.Path(tmp_path).resolve()
        await anyio.to_thread.run_sync(os.listdir, tmp_path)
    assert counted.routes == Counter(thread=3)
    with Counted() as counted:
        name = await anyio.to_thread.run_sync(lambda: threading.current_thread().name)
    assert name != threading.current_thread().name
    assert counted.routes == Counter()  # it is not about files


async def test_replaced_functions_run_in_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stat(path: object) -> tuple[object, int]:
        return path, threading.get_ident()

    monkeypatch.setattr(os, "stat", stat)
    path, thread = await anyio.to_thread.run_sync(os.stat, tmp_path)
    assert path == tmp_path
    assert thread != threading.get_ident()


async def test_wrapped_foreign_files_stay_on_threads(tmp_path: Path) -> None:
    class Foreign(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return b"%d" % threading.get_ident()

    assert int(await anyio.wrap_file(Foreign()).read()) != threading.get_ident()
    with (tmp_path / "file").open("w+b") as file, Counted() as counted:
        await anyio.wrap_file(file).write(b"x")
    assert counted.routes == Counter(thread=1)


async def test_cancelled_before() -> None:
    with anyio.CancelScope() as scope, Counted() as counted:
        scope.cancel()
        await anyio.to_thread.run_sync(os.stat, "/")
    assert scope.cancelled_caught
    assert counted.opcodes["STATX"] == 0


async def test_abandoned_call_ends_by_itself(tmp_path: Path) -> None:
    """Like a thread. AnyIO's paths abandon calls that change nothing."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(partial(anyio.to_thread.run_sync, fifo.read_bytes, abandon_on_cancel=True))
        await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    # Nobody waits any more, and the open in the kernel still does.
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))


async def test_abandoned_call_that_is_not_cancelled(tmp_path: Path) -> None:
    with Counted() as counted:
        call = partial(anyio.to_thread.run_sync, abandon_on_cancel=True)
        assert (await call(os.stat, tmp_path)).st_ino == tmp_path.stat().st_ino
        with pytest.raises(FileNotFoundError):
            await call(os.stat, "/no/such/file")
    assert (counted.routes.total(), counted.routes["thread"]) == (2, 0)


# --- What must stay as it is ----------------------------------------------------------------


async def test_the_name_is_trios() -> None:
    assert sniffio.current_async_library() == "trio"
    assert anyio.get_cancelled_exc_class() is trio.Cancelled


async def test_threads_can_call_back() -> None:
    async def double(number: int) -> int:
        await anyio.lowlevel.checkpoint()
        return 2 * number

    def in_thread() -> tuple[int, float]:
        return anyio.from_thread.run(double, 21), anyio.from_thread.run_sync(anyio.current_time)

    number, _time = await anyio.to_thread.run_sync(in_thread)
    assert number == 42


async def test_portal_inside_a_run() -> None:
    async with anyio.from_thread.BlockingPortal() as portal:
        assert await anyio.to_thread.run_sync(portal.call, anyio.Path("/").exists) is True
