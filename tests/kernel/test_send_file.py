"""`send_file`: every byte of the file arrives once and in order, whatever the socket does."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import types
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import open_fds
from children import output_of, run_python
from races import current_manager
from transfers import KINDS, RUNS, all_of, completed, connected, no_fds_but
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

import trio_uring
from trio_uring import SendProgress, send_file
from trio_uring._engine._file_systems import FileSystem
from trio_uring._streams import _endpoints
from trio_uring._transfers import _send_file, _splice_pipes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

SIZE: Final = (3 << 20) + 12345
DATA: Final = os.urandom(SIZE)


@pytest.fixture(scope="module")
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(DATA)
        opened.flush()
        yield opened.fileno()


@pytest.fixture(autouse=True, params=["cached", "not cached"])
def is_cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the files are in the page cache, as far as `send_file` knows."""
    cached: bool = request.param == "cached"
    if not cached:
        monkeypatch.setattr(_send_file, "is_cached", lambda *_args: False)
    return cached


not_cached = pytest.mark.parametrize("is_cached", ["not cached"], indirect=True)


async def sent_and_closed(stream: trio.abc.Stream, to: Any, *args: Any, **options: Any) -> int:
    async with stream:
        return await send_file(to, *args, **options)


async def transferred(
    ours: trio.abc.Stream, theirs: trio.abc.ReceiveStream, *args: Any, **options: Any
) -> bytes:
    """Send, and return what arrived, which must be as much as was reported."""
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await all_of(theirs))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        count = await sent_and_closed(ours, ours, *args, **options)
    assert count == len(received[0])
    return received[0]


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_all_of_the_file_arrives(run: str, kind: str, file: int, is_cached: bool) -> None:
    async def main() -> None:
        before = completed("SPLICE") if run == "ring" else 0
        position = os.lseek(file, 0, os.SEEK_CUR)
        for offset, count in [
            *((0, None), (1, 5), (4097, 1 << 20), (SIZE - 3, 100), (SIZE, None), (SIZE + 1, None)),
            *((SIZE - 200_000, None), (7, 200_000), (SIZE - 199_000, 200_000)),
        ]:
            progress = SendProgress()
            with connected(kind) as (ours, theirs):
                got = await transferred(
                    ours, theirs, file, offset=offset, count=count, progress=progress
                )
            assert got == DATA[offset:][:count]
            assert progress.bytes_sent == len(got)
        with connected(kind) as (ours, theirs):
            assert await send_file(ours, file, count=0) == 0
            assert await send_file(ours.socket, file, offset=7, count=3) == 3
            assert await theirs.receive_some(10) == DATA[7:10]
        assert os.lseek(file, 0, os.SEEK_CUR) == position
        if run == "ring":
            assert (completed("SPLICE") - before >= 4 + 1) == (not is_cached)

    RUNS[run](main)


@pytest.mark.usefixtures("fd_ledger")
async def test_what_counts_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    async with (
        await trio.open_file(path, "rb") as opened,
        await trio_uring.open_positional(path) as positional,
    ):
        for each in (opened, positional, opened.fileno()):
            with connected("UNIX") as (ours, theirs):
                assert await transferred(ours, theirs, each) == b"some bytes"


async def test_streams_that_are_no_sockets_are_sent_to_too(file: int) -> None:
    ours, theirs = memory_stream_pair()
    before = completed("SPLICE")
    assert await transferred(ours, theirs, file, offset=5) == DATA[5:]
    assert completed("SPLICE") == before


@pytest.mark.usefixtures("fd_ledger")
async def test_a_file_that_grows_and_shrinks_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with connected("UNIX") as (ours, theirs), path.open("r+b") as opened:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sent_and_closed, ours, ours, opened)
            await wait_all_tasks_blocked()
            with path.open("ab") as other:
                other.write(DATA)
            assert await all_of(theirs) == DATA + DATA
    with connected("UNIX") as (ours, theirs), path.open("r+b") as opened:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sent_and_closed, ours, ours, opened)
            await wait_all_tasks_blocked()
            opened.truncate(0)
            got = await all_of(theirs)
            assert got == (DATA + DATA)[: len(got)]
            assert len(got) < 2 * SIZE


@pytest.mark.parametrize("as_stream", [True, False])
async def test_the_send_buffer_is_as_before_afterwards(tmp_path: Path, as_stream: bool) -> None:
    """Of a TCP connection. It is full while the file is sent."""
    path = tmp_path / "large"
    path.write_bytes(bytes(32 << 20))
    with connected("TCP") as (ours, theirs), path.open("rb") as file:
        sock = ours.socket

        def low_water_mark() -> int:
            return sock.getsockopt(socket.IPPROTO_TCP, _send_file._NOTSENT_LOWAT)

        assert low_water_mark() == 2**14
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_file, ours if as_stream else sock, file)
            await wait_all_tasks_blocked()
            assert low_water_mark() == 0
            nursery.cancel_scope.cancel()
        assert low_water_mark() == 2**14
        assert len(await theirs.receive_some(SIZE)) > 0


async def test_a_full_socket_is_waited_for(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sendfile, calls = os.sendfile, 0

    def full_at_first(*args: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise BlockingIOError
        return sendfile(*args)

    monkeypatch.setattr(os, "sendfile", full_at_first)
    with connected("TCP") as (ours, theirs):
        assert await transferred(ours, theirs, file) == DATA


async def test_a_tcp_stream_that_is_closed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(32 << 20))
    with connected("TCP") as (ours, _), path.open("rb") as file:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await send_file(ours, file)

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            await ours.aclose()


async def test_a_cached_file_that_knows_no_sendfile_is_read(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "sendfile", refuse)
    with connected("TCP") as (ours, theirs):
        assert await transferred(ours, theirs, file) == DATA


@pytest.mark.parametrize("kind", KINDS)
async def test_a_file_that_knows_no_splice_is_read(kind: str) -> None:
    with Path("/proc/self/status").open("rb") as opened:
        with connected(kind) as (ours, theirs):
            got = await transferred(ours, theirs, opened)
        assert got.startswith(b"Name:")


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_receiver_keeps_no_worker(kind: str, file: int) -> None:
    """It waits in epoll, with no operation in flight."""
    with connected(kind) as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sent_and_closed, ours, ours, file)
            got = b""
            while len(got) < SIZE:
                await wait_all_tasks_blocked()
                while current_manager().statistics().in_flight:  # else this goes on for ever
                    await trio.lowlevel.checkpoint()
                got += await theirs.receive_some(300_000)
            assert got == DATA


@not_cached
@pytest.mark.usefixtures("fd_ledger")
async def test_more_transfers_than_pipes_all_end(file: int) -> None:
    """Further transfers read and send, and do not wait for a pipe."""
    count = _splice_pipes.PIPES_MAX + 4
    pairs = [connected("UNIX") for _ in range(count)]
    made = [pair.__enter__() for pair in pairs]
    async with trio.open_nursery() as nursery:
        for ours, _ in made:
            nursery.start_soon(sent_and_closed, ours, ours, file)
        await wait_all_tasks_blocked()
        assert _splice_pipes.current_pipes().in_use == _splice_pipes.PIPES_MAX
        for _, theirs in reversed(made):
            assert await all_of(theirs) == DATA
    assert _splice_pipes.current_pipes().in_use == 0
    assert len(_splice_pipes.current_pipes().free) == _splice_pipes.PIPES_MAX
    for pair in pairs:
        pair.__exit__(None, None, None)


@pytest.mark.usefixtures("fd_ledger")
async def test_without_fds_for_a_pipe_it_copies(file: int) -> None:
    """One fd is needed for the file. The bytes then pass through the program."""
    before = completed("SPLICE")
    with connected("UNIX") as (ours, theirs), no_fds_but(2):
        assert await transferred(ours, theirs, file) == DATA
    assert completed("SPLICE") == before
    assert _splice_pipes.current_pipes().in_use == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_connection_raises_no_signal(kind: str) -> None:
    """Also if SIGPIPE would kill the process. Then it does not splice."""
    code = """
        import signal, sys, tempfile, trio, trio_uring
        from transfers import completed, connected

        async def main():
            with tempfile.TemporaryFile() as file:
                file.write(bytes(5_000_000))
                file.flush()
                with connected(sys.argv[1]) as (ours, theirs):
                    await theirs.aclose()
                    try:
                        await trio_uring.send_file(ours, file)
                    except trio.BrokenResourceError:
                        print("broken", completed("SPLICE"))

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        trio_uring.run(main)
    """
    assert output_of(run_python(code, kind)) == ["broken 0"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_cancelled_midway_it_has_sent_what_progress_says(
    run: str, kind: str, file: int, is_cached: bool
) -> None:
    """The receiver gets exactly the bytes that *progress* reports."""

    async def one_round(steps: int) -> None:
        progress = SendProgress()
        with connected(kind) as (ours, theirs):
            got = bytearray()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(partial(send_file, ours, file, progress=progress))
                    for _ in range(steps):
                        await trio.lowlevel.checkpoint()
                    if steps % 3 == 0:
                        got += await theirs.receive_some(100_000)
                    scope.cancel()
            await ours.aclose()
            got += await all_of(theirs)
            assert got == DATA[: progress.bytes_sent]

    async def main() -> None:
        before = completed("SPLICE") if run == "ring" else 0
        for steps in range(60):
            await one_round(steps)
        if run == "ring":
            assert (completed("SPLICE") > before) == (not is_cached)

    fds = open_fds()
    RUNS[run](main)
    assert open_fds() == fds  # pipes and all


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_send_on_one_stream(run: str, file: int) -> None:
    async def main() -> None:
        with connected("UNIX") as (ours, theirs):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sent_and_closed, ours, ours, file)
                await wait_all_tasks_blocked()
                for other in (
                    partial(ours.send_all, b"x"),
                    partial(send_file, ours, file),
                    ours.wait_send_all_might_not_block,
                ):
                    with pytest.raises(trio.BusyResourceError):
                        await other()
                assert await all_of(theirs) == DATA

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_closed_and_broken_streams_raise_trios_errors(run: str, file: int) -> None:
    async def main() -> None:
        with connected("UNIX") as (ours, theirs):
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await send_file(ours, file)

                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                await ours.aclose()
            for count in (None, 0):  # as send_all(b"")
                with pytest.raises(trio.ClosedResourceError):
                    await send_file(ours, file, count=count)
            with pytest.raises(OSError, match="Bad file descriptor"):
                await send_file(ours.socket, file)
            assert DATA.startswith(await all_of(theirs))
        for as_stream, error in ((True, trio.BrokenResourceError), (False, BrokenPipeError)):
            with connected("UNIX") as (ours, theirs):
                await theirs.aclose()
                with pytest.raises(error):
                    await send_file(ours if as_stream else ours.socket, file)
        with connected("UNIX") as (ours, _):
            await ours.send_eof()
            with pytest.raises(trio.ClosedResourceError):
                await send_file(ours, file)

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_pipes_and_sockets_are_refused_as_the_file(run: str) -> None:
    """A read of one could block indefinitely, and could not be cancelled."""

    async def main() -> None:
        with connected("UNIX") as (ours, _), connected("UNIX") as (other, _):
            reader, writer = os.pipe()
            os.write(writer, b"abc")
            for fd in (reader, other.socket.fileno()):
                with pytest.raises(OSError, match="Illegal seek") as caught:
                    await send_file(ours, fd, count=1)
                assert caught.value.errno == errno.ESPIPE
            os.close(reader)
            os.close(writer)

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_bad_arguments_are_refused(run: str, file: int, tmp_path: Path) -> None:
    async def main() -> None:
        with connected("TCP") as (ours, _):
            for options in ({"offset": -1}, {"count": -1}):
                with pytest.raises(ValueError, match="0 or more"):
                    await send_file(ours, file, **options)  # type: ignore[arg-type]
            directory = os.open(tmp_path, os.O_RDONLY)
            with pytest.raises(IsADirectoryError):
                await send_file(ours, directory)
            os.close(directory)
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await send_file(ours, directory)
            assert caught.value.errno == errno.EBADF
        with pytest.raises(TypeError, match="must be a stream"):
            await send_file(3, file)  # type: ignore[arg-type]
        sock = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        with sock, pytest.raises(ValueError, match="SOCK_STREAM"):
            await send_file(sock, file)

    RUNS[run](main)


@pytest.mark.parametrize("system", [FileSystem.SERVER, FileSystem.DISK])
def test_a_collected_transfer_closes_its_file_at_once(
    system: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash of the run nobody can wait for a thread."""

    @types.coroutine
    def wait() -> Generator[None, None, None]:
        yield

    async def use() -> None:
        with open(tmp_path / "file", "wb") as file:
            async with _endpoints.dup_file(file) as fd:
                fds.append(fd)
                await wait()

    fds: list[int] = []
    monkeypatch.setattr(_endpoints, "file_system_of", lambda _fd: system)
    task = use()
    task.send(None)
    task.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])
