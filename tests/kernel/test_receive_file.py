"""`receive_file`: every byte is written at its place in the file, and none is lost."""

from __future__ import annotations

import errno
import os
import resource
import socket as stdlib_socket
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from accounting import open_fds
from races import current_manager
from transfers import (
    KINDS,
    RUNS,
    all_of,
    closing,
    completed,
    connected,
    no_fds_but,
    tls_pair,
)
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

import trio_uring
from trio_uring import ReceiveProgress, receive_file
from trio_uring._transfers import _splice_pipes

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA: Final = os.urandom((3 << 20) + 12345)


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        yield opened.fileno()


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.usefixtures("fd_ledger")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_the_file_holds_all_that_was_sent(run: str, kind: str, file: int) -> None:
    async def one(data: bytes, offset: int) -> None:
        progress = ReceiveProgress()
        with connected(kind) as (client, source):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, data))
                count = await receive_file(source, file, offset=offset, progress=progress)
        assert count == len(data)
        assert progress == ReceiveProgress(len(data), b"")
        assert os.pread(file, len(data) + 1, offset) == data

    async def main() -> None:
        before = completed("SPLICE") if run == "ring" else 0
        os.lseek(file, 3, os.SEEK_SET)
        for data, offset in [(b"", 0), (DATA, 0), (DATA[::-1], 4097), (b"x", len(DATA) + 4097)]:
            await one(data, offset)
        assert os.lseek(file, 0, os.SEEK_CUR) == 3
        if run == "ring":
            assert completed("SPLICE") - before >= 4 + 4 + 1

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_it_receives_only_as_much_as_was_asked_for(run: str, file: int) -> None:
    async def main() -> None:
        os.pwrite(file, b"0123456789", 0)
        with connected("TCP") as (client, source):
            await client.send_all(b"head and body")
            assert await receive_file(source, file, offset=2, count=4) == 4
            assert await receive_file(source.socket, file, count=0) == 0
            assert await receive_file(source.socket, file, count=1) == 1
            assert await source.receive_some() == b"and body"
        assert content(file) == b" 1head6789"

    RUNS[run](main)


@pytest.mark.usefixtures("fd_ledger")
async def test_what_counts_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    async with (
        await trio.open_file(path, "wb") as opened,
        await trio_uring.open_positional(path, "r+") as positional,
    ):
        for each in (opened, positional, opened.fileno()):
            with connected("UNIX") as (client, source):
                await client.send_all(str(each).encode())
                await client.send_eof()
                count = await receive_file(source, each)
                assert path.read_bytes()[:count] == str(each).encode()


@pytest.mark.parametrize("run", RUNS)
def test_streams_that_are_no_sockets_are_received_from_too(run: str, file: int) -> None:
    async def main() -> None:
        for ours, theirs in (memory_stream_pair(), await tls_pair()):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, ours, partial(ours.send_all, DATA))
                assert await receive_file(theirs, file) == len(DATA)
            assert content(file) == DATA
            os.ftruncate(file, 0)

    RUNS[run](main)


# --- Files that know no splice --------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_urgent_data_is_left_out(run: str, file: int) -> None:
    """It is left out, as by recv(2). splice(2) does not get past it (Linux 6.18)."""

    async def main() -> None:
        with connected("TCP") as (client, source):
            for data, flags in ((b"123", 0), (b"!", stdlib_socket.MSG_OOB), (b"abc", 0)):
                assert await client.socket.send(data, flags) == len(data)
            await client.send_eof()
            assert await receive_file(source, file) == 6
        assert content(file) == b"123abc"

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_a_file_opened_for_appending_is_appended_to(run: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"what was there, ")

    async def main() -> None:
        with path.open("ab") as opened, connected("UNIX") as (client, source):
            await client.send_all(b"and more")
            assert await receive_file(source, opened, count=8) == 8

    RUNS[run](main)
    assert path.read_bytes() == b"what was there, and more"


async def test_a_file_that_knows_no_splice_is_written_to() -> None:
    path = Path("/proc/self/comm")
    name = path.read_bytes()
    before = completed("WRITE")
    with path.open("r+b", buffering=0) as opened, connected("UNIX") as (client, source):
        await client.send_all(b"spliced")
        assert await receive_file(source, opened, count=7) == 7
        assert path.read_bytes() == b"spliced\n"
    path.write_bytes(name)
    assert completed("WRITE") > before


@pytest.mark.usefixtures("fd_ledger")
async def test_without_fds_for_a_pipe_it_copies(file: int) -> None:
    before = completed("SPLICE")
    with connected("UNIX") as (client, source), no_fds_but(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(closing, client, partial(client.send_all, DATA))
            assert await receive_file(source, file) == len(DATA)
    assert content(file) == DATA
    assert completed("SPLICE") == before


# --- Waiting and cancelling -----------------------------------------------------------------


async def test_waiting_holds_neither_pipe_nor_worker(file: int) -> None:
    with connected("TCP") as (client, source):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive_file, source, file)
            await client.send_all(b"abc")
            while content(file) != b"abc" or current_manager().statistics().in_flight:
                await trio.lowlevel.checkpoint()  # for ever, if it held a worker
            await wait_all_tasks_blocked()
            assert _splice_pipes.current_pipes().in_use == 0
            await client.aclose()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_cancelled_midway_it_loses_no_byte(run: str, kind: str, file: int) -> None:
    """What was received is in the file, and the rest is still in the stream."""
    came_so_far = set()

    async def one_round(steps: int) -> None:
        progress = ReceiveProgress()
        os.ftruncate(file, 0)
        with connected(kind) as (client, source):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, DATA))
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as inner:
                        inner.start_soon(partial(receive_file, source, file, progress=progress))
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()
                assert progress.left == b""
                assert content(file) == DATA[: progress.bytes_received]
                assert content(file) + await all_of(source) == DATA
        came_so_far.add(progress.bytes_received)

    async def main() -> None:
        for steps in range(40):
            await one_round(steps)

    fds = open_fds()
    RUNS[run](main)
    assert open_fds() == fds
    assert came_so_far - {0, len(DATA)}


# --- Errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_a_file_opened_for_reading_is_refused(run: str) -> None:
    """With the error of write(2), and without receiving a byte."""

    async def main() -> None:
        with Path(__file__).open("rb") as opened, connected("TCP") as (client, source):
            await client.send_all(b"abc")
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await receive_file(source, opened)
            assert caught.value.errno == errno.EBADF
            assert await source.receive_some() == b"abc"

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_pipes_and_sockets_are_refused_as_the_file(run: str) -> None:
    """A write to one could block indefinitely, and could not be cancelled."""

    async def main() -> None:
        with connected("UNIX") as (client, source), connected("UNIX") as (other, _):
            await client.send_all(b"abc")
            reader, writer = os.pipe()
            for fd in (writer, other.socket.fileno()):
                with pytest.raises(OSError, match="Illegal seek") as caught:
                    await receive_file(source, fd)
                assert caught.value.errno == errno.ESPIPE
            os.close(reader)
            os.close(writer)
            assert await source.receive_some() == b"abc"

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_a_full_disk_hands_the_bytes_back(run: str) -> None:
    async def main() -> None:
        progress = ReceiveProgress()
        with Path("/dev/full").open("wb") as opened, connected("TCP") as (client, source):
            await client.send_all(b"abc")
            with pytest.raises(OSError) as caught:  # noqa: PT011
                await receive_file(source, opened, progress=progress)
            assert caught.value.errno == errno.ENOSPC
        assert progress == ReceiveProgress(0, b"abc")

    RUNS[run](main)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("run", RUNS)
def test_a_file_that_gets_too_large(run: str, file: int) -> None:
    async def main() -> None:
        progress = ReceiveProgress()
        with connected("TCP") as (client, source):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(closing, client, partial(client.send_all, DATA))
                with file_size_limit(1_000_000), pytest.raises(OSError) as caught:  # noqa: PT011
                    await receive_file(source, file, progress=progress)
                rest = await all_of(source)
        assert caught.value.errno == errno.EFBIG
        assert progress.bytes_received == 1_000_000
        assert content(file) + progress.left + rest == DATA

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_receive_from_one_stream(run: str, file: int) -> None:
    async def main() -> None:
        with connected("UNIX") as (client, source):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive_file, source, file)
                await wait_all_tasks_blocked()
                for other in (source.receive_some, partial(receive_file, source, file)):
                    with pytest.raises(trio.BusyResourceError):
                        await other()
                await client.aclose()

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_closing_the_stream_ends_it(run: str, file: int) -> None:
    async def main() -> None:
        with connected("UNIX") as (_, source):
            async with trio.open_nursery() as nursery:

                async def receive() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await receive_file(source, file)

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                await source.aclose()
            await receive()
            with pytest.raises(OSError, match="Bad file descriptor"):
                await receive_file(source.socket, file)

    RUNS[run](main)


async def test_bad_arguments_are_refused(file: int) -> None:
    with connected("TCP") as (_, source):
        for options in ({"offset": -1}, {"count": -1}):
            with pytest.raises(ValueError, match="0 or more"):
                await receive_file(source, file, **options)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="must be a stream"):
            await receive_file(3, file)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="Bad file descriptor"):
            await receive_file(source, 1_000_000)
    datagrams = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
    with datagrams, pytest.raises(ValueError, match="SOCK_STREAM"):
        await receive_file(datagrams, file)
