"""Files on a file system with a server: the event loop never blocks until its answers."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from fuse_server import FuseServer, Request
from races import current_files
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring._engine import _file_systems
from trio_uring._engine._file_systems import FileSystem
from trio_uring._files import _open, _paths, _quick
from trio_uring._files._raw import RingFileIO

if TYPE_CHECKING:
    from collections.abc import Iterator

LARGE = b"large\n" * 300_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FuseServer]:
    """A file system whose server needs our loop, mounted at ``tmp_path / "mounted"``."""
    (tmp_path / "mounted").mkdir()
    try:
        server = FuseServer(tmp_path / "mounted")
    except OSError as exc:
        pytest.skip(f"needs /dev/fuse, and the right to mount: {exc}")
    server.add("file", b"line one\nline two\n")
    server.add("large", LARGE)
    try:
        yield server
    finally:
        server.close()


async def test_files_are_read(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    for mode in ("rb", "r", "r+b", "r+"):
        for buffering in (-1, 0) if "b" in mode else (-1, 1):
            # More than once: what is cached then must not be opened in the loop, either.
            async with await trio.open_file(mounted / "file", mode, buffering) as file:
                assert len(await file.readline()) == 9
                place = await file.tell()
                assert await file.read(4) in {"line", b"line"}
                assert await file.seek(0, os.SEEK_END) == 18
                await file.seek(place)
                assert len(await file.read()) == 9
    assert await (mounted / "file").read_bytes() == b"line one\nline two\n"
    assert await (mounted / "file").read_text() == "line one\nline two\n"
    assert await (mounted / "large").read_bytes() == LARGE
    assert await (mounted / "large").read_text() == LARGE.decode()
    async with await (mounted / "file").open() as file:
        assert [line async for line in file] == ["line one\n", "line two\n"]
    plain = await trio.to_thread.run_sync(open, mounted / "file")
    async with trio.wrap_file(plain) as file:
        assert await file.readline() == "line one\n"
    assert not server.stood_still
    assert {Request.OPEN, Request.READ, Request.FLUSH} <= server.asked


async def test_a_file_that_takes_the_place_of_a_pipe(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    read_end, write_end = os.pipe()
    os.write(write_end, b"in the pipe\n")
    os.close(write_end)
    async with trio.wrap_file(open(read_end, "rb", buffering=0)) as file:
        assert await file.read(20) == b"in the pipe\n"
        fd = await trio.to_thread.run_sync(os.open, mounted / "file", os.O_RDONLY)
        await trio.to_thread.run_sync(os.dup2, fd, read_end)
        await trio.to_thread.run_sync(os.close, fd)
        assert await file.read(8) == b"line one"
    assert not server.stood_still


async def test_files_are_written(server: FuseServer) -> None:
    mounted = server.need_this_loop()

    def content(name: str) -> bytes:
        return bytes(server.files[server.names[name.encode()]])

    async with await trio.open_file(mounted / "file", "r+b", 0) as raw:
        assert await raw.write(b"LINE") == 4
        await raw.truncate(8)
    assert content("file") == b"LINE one"
    async with await trio.open_file(mounted / "file", "a") as text:
        await text.write(" appended")
        await text.flush()
        await text.write(".")
    assert content("file") == b"LINE one appended."
    async with await trio.open_file(mounted / "new", "wb") as file:
        await file.write(LARGE)
    assert content("new") == LARGE
    await (mounted / "new").write_bytes(b"bytes")
    assert content("new") == b"bytes"
    await (mounted / "new").write_text("text")
    assert content("new") == b"text"
    await trio_uring.write_file(mounted / "new", b"written")
    assert content("new") == b"written"
    await (mounted / "new").unlink()
    assert not server.stood_still
    assert {Request.CREATE, Request.WRITE, Request.FLUSH, Request.UNLINK} <= server.asked


async def test_paths_are_looked_up(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    for _ in range(2):
        assert (await (mounted / "file").stat()).st_size == 18
        assert await (mounted / "file").exists()
        assert await (mounted / "file").is_file()
        assert not await (mounted / "missing").exists()
        with pytest.raises(FileNotFoundError) as caught:
            await trio.open_file(mounted / "missing")
        assert caught.value.filename == str(mounted / "missing")
    assert not server.stood_still
    assert Request.GETATTR in server.asked


async def test_positional_files(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    for _ in range(2):
        async with await trio_uring.open_positional(mounted / "file", "r+") as file:
            assert await file.read_at(4, 0) == b"line"
            assert await file.write_at(b"two!", 5) == 4
            await file.fsync()
            await file.truncate(18)
    assert bytes(server.files[server.names[b"file"]]) == b"line two!line two\n"
    assert not server.stood_still
    assert {Request.FSYNC, Request.SETATTR} <= server.asked


async def test_a_file_is_opened_by_number(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    fd = await trio.to_thread.run_sync(os.open, mounted / "file", os.O_RDWR)
    async with await trio.open_file(fd, "r+") as file:
        assert await file.readline() == "line one\n"
        await file.seek(0)
        await file.write("changed")
    assert bytes(server.files[server.names[b"file"]]).startswith(b"changed")
    assert not server.stood_still


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("kind", ["file", "positional"])
async def test_errors_of_close_are_reported(server: FuseServer, code: int, kind: str) -> None:
    mounted = server.need_this_loop()
    server.errors[Request.FLUSH] = code
    file: Any
    if kind == "file":
        file = await trio.open_file(mounted / "file", "r+b")
        await file.write(b"data")
    else:
        file = await trio_uring.open_positional(mounted / "file", "r+")
        await file.write_at(b"data", 0)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await file.aclose()
    assert caught.value.errno == code
    assert file.closed
    await file.aclose()
    assert bytes(server.files[server.names[b"file"]]).startswith(b"data")
    assert not server.stood_still


async def test_a_cancelled_task_closes_the_file(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    file = await trio.open_file(mounted / "file", "r+b")
    with trio.CancelScope() as scope:
        scope.cancel()
        await file.aclose()
    assert scope.cancelled_caught
    assert file.closed
    assert not server.stood_still


@pytest.fixture
def all_have_servers(monkeypatch: pytest.MonkeyPatch, no_native_paths: None) -> None:
    """Have every file system say that it has a server, where nothing may be mounted."""
    monkeypatch.setattr(_file_systems, "known", {})
    monkeypatch.setattr(_file_systems, "_look_up", lambda _fd: FileSystem.SERVER)
    monkeypatch.setattr(_open, "path_is_without_server", lambda _path: False)
    monkeypatch.setattr(_quick, "mode_cached", lambda *_args: -errno.EXDEV)
    monkeypatch.setattr(_paths, "find_cached", lambda *_args: -errno.EXDEV)


async def test_files_with_a_server_are_used_in_threads(
    tmp_path: Path, all_have_servers: None
) -> None:
    path = trio.Path(tmp_path, "file")

    def threads() -> int:
        return dict(trio.lowlevel.current_statistics().io_statistics.routes)["thread"]  # type: ignore[union-attr]

    await path.write_bytes(b"some bytes")
    assert threads() == 1
    assert await path.read_bytes() == b"some bytes"
    assert await path.read_text() == "some bytes"
    assert threads() == 3
    async with await path.open("r+b", buffering=0) as file:
        assert await file.read(4) == b"some"
        assert await file.seek(0) == 0
    async with await trio.open_file(os.open(path, os.O_RDWR), "r+b") as file:
        await file.write(b"more")
        assert await file.tell() == 4
    assert threads() == 11
    async with await trio_uring.open_positional(path, "r+") as positional:
        assert await positional.read_at(4, 0) == b"more"
        assert await positional.write_at(b"most", 0) == 4
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            assert await trio_uring.send_file(ours, positional) == 10
            assert await trio_uring.receive_file(theirs, positional, offset=10, count=10) == 10
    assert await path.read_bytes() == b"most bytes" * 2
    with pytest.raises(FileNotFoundError):
        await trio.open_file(tmp_path / "missing" / "file")


async def test_a_file_opened_on_a_bridge_is_closed_in_a_thread(
    tmp_path: Path, all_have_servers: None
) -> None:
    """As one is whose path led elsewhere just now."""
    path = tmp_path / "file"
    path.write_bytes(b"data")

    def use() -> bytes | None:
        with RingFileIO(str(path), "r", True, _open.open_on_ring) as raw:
            return raw.read(4)

    assert await current_files().call(use) == b"data"
    assert current_files().routes()["thread"] == 1


def fds_of(path: Path) -> int:
    """Return how many fds of this process are open on *path*."""
    links = Path("/proc/self/fd").iterdir()
    return sum(str(path) == os.readlink(link) for link in links if link.is_symlink())


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_transfer_keeps_no_fd(
    tmp_path: Path, all_have_servers: None, cancelled: bool
) -> None:
    path = tmp_path / "file"
    ours, theirs = trio.socket.socketpair()
    with ours, theirs, path.open("wb") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio_uring.receive_file, ours, file)
            await wait_all_tasks_blocked()
            assert fds_of(path) == 2
            if cancelled:
                nursery.cancel_scope.cancel()
            else:
                theirs.shutdown(socket.SHUT_WR)
        assert fds_of(path) == 1


async def test_files_are_sent_and_received(server: FuseServer) -> None:
    mounted = server.need_this_loop()
    ours, theirs = trio.socket.socketpair()
    file = await trio_uring.open_positional(mounted / "large")
    target = await trio_uring.open_positional(mounted / "new", "w+")
    with ours, theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio_uring.send_file, ours, file)
            await trio_uring.receive_file(theirs, target, count=len(LARGE))
    await file.aclose()
    await target.aclose()
    assert bytes(server.files[server.names[b"new"]]) == LARGE
    assert not server.stood_still
