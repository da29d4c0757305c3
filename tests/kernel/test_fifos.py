"""Opening FIFOs, reading pipes, and cancelling both: no fd and no byte is lost."""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger, Rounds
from races import Order, current_files, current_manager, every_order, fail_once, race
from trio.lowlevel import FdStream
from trio.testing import wait_all_tasks_blocked

from trio_uring import _files
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._files import _open
from trio_uring._files._raw import RingFileIO
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from pathlib import Path

ROUNDS: Final = 1600

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def fifo(tmp_path: Path) -> str:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return str(path)


async def open_binary(path: str, mode: str) -> Any:
    return await trio.open_file(path, mode, buffering=0)


# --- Opening --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("rb", "wb"), ("wb", "rb")])
async def test_each_side_waits_for_the_other(fifo: str, order: tuple[str, str]) -> None:
    opened: dict[str, Any] = {}

    async def open_(mode: str) -> None:
        opened[mode] = await open_binary(fifo, mode)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_, order[0])
        await wait_all_tasks_blocked()
        await trio.to_thread.run_sync(os.stat, fifo)  # time enough for a wrong open to succeed
        assert not opened
        nursery.start_soon(open_, order[1])
    assert await opened["wb"].write(b"through") == 7
    assert await opened["rb"].read(100) == b"through"
    await opened["wb"].aclose()
    assert await opened["rb"].read(100) == b""
    await opened["rb"].aclose()
    assert current_files().waiting_opens == 0


@pytest.mark.parametrize("order", [("rb", "wb"), ("wb", "rb")])
async def test_each_side_waits_for_the_other_without_proc(
    fifo: str, order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_open, "OPEN_FILES", fifo + " has no proc")
    await test_each_side_waits_for_the_other(fifo, order)


async def test_the_bytes_of_a_path_are_all_that_comes(fifo: str) -> None:
    data = os.urandom(100_000)  # more than fits in the pipe
    received: list[bytes] = []

    async def receive() -> None:
        received.append(await trio.Path(fifo).read_bytes())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        file = await open_binary(fifo, "wb")
        for start in range(0, len(data), 1000):
            assert await file.write(data[start : start + 1000]) == 1000
        await file.aclose()
    assert received == [data]


@pytest.mark.parametrize("mode", ["rb", "wb"])
async def test_a_waiting_open_can_be_cancelled(fifo: str, mode: str) -> None:
    with trio.move_on_after(3600) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_binary, fifo, mode)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert current_files().waiting_opens == 0


async def test_a_writer_that_came_and_went_was_there(fifo: str) -> None:
    """Its bytes are read, although it had closed before the second open began to wait."""
    with trio.fail_after(3600):
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async with await open_binary(fifo, "rb") as file:
                    assert await file.readall() == b"fleeting"

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            os.write(writer, b"fleeting")
            os.close(writer)


async def test_waiting_opens_leave_workers_for_others(fifo: str) -> None:
    config = current_manager().config
    scope = trio.CancelScope()
    count = config.bounded_workers

    async def open_and_close() -> None:
        await (await open_binary(fifo, "wb")).aclose()

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(open_and_close)
        await wait_all_tasks_blocked()
        assert current_files().waiting_opens == config.bounded_workers // 2
        assert (await trio.Path(fifo).stat()).st_size == 0
        with scope:
            reader = await trio.to_thread.run_sync(os.open, fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.close(reader)


async def test_opening_for_both_never_waits(fifo: str) -> None:
    async with await trio.open_file(fifo, "r+b", buffering=0) as file:
        await file.write(b"to myself")
        assert await file.read(100) == b"to myself"


# --- Cancelling -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rb", "wb"])
async def test_racing_opens_lose_no_fd(fifo: str, mode: str, rounds: Rounds) -> None:
    other_flags = os.O_RDWR | os.O_NONBLOCK
    for order in every_order(ROUNDS // 4):
        others: list[int] = []

        def other_side() -> None:
            others.append(os.open(fifo, other_flags))

        outcome = await race(rounds, order, partial(open_binary, fifo, mode), other_side)
        if outcome:
            await outcome.value.aclose()
        for fd in others:
            os.close(fd)


async def test_racing_creations_lose_no_fd(tmp_path: Path, rounds: Rounds) -> None:
    path = str(tmp_path / "file")
    for order in every_order(ROUNDS):
        outcome = await race(rounds, order, partial(trio.open_file, path, "xb"), lambda: None)
        assert os.path.exists(path) == bool(outcome)
        if outcome:
            await outcome.value.aclose()
            os.unlink(path)


@pytest.mark.parametrize("nowait", [True, False])
async def test_racing_reads_lose_no_byte(
    rounds: Rounds, nowait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RingFileIO, "_nowait_read", nowait)
    read_end, write_end = os.pipe()
    ledger = ByteLedger()
    async with await trio.open_file(read_end, "rb", buffering=0) as file:
        for order in every_order(ROUNDS):
            outcome = await race(
                rounds,
                order,
                partial(file.read, 64),
                lambda: os.write(write_end, ledger.take(10)),
            )
            if outcome:
                ledger.received(outcome.value)
            while ledger.missing:
                ledger.received(await file.read(64))
    os.close(write_end)


async def test_a_cancelled_readall_keeps_what_it_has(rounds: Rounds) -> None:
    """It can be cancelled until it has read the first byte, and no longer after that."""
    for order in (Order.NEVER_READY, Order.READY_SEEN, Order.NO_CANCEL):
        read_end, write_end = os.pipe()
        async with await trio.open_file(read_end, "rb", buffering=0) as file:
            outcome: Any = None

            def write_and_close(fd: int = write_end) -> None:
                os.write(fd, b"all")
                os.close(fd)

            outcome = await race(rounds, order, file.readall, write_and_close)
            if outcome:
                assert outcome.value == b"all"
            else:
                os.close(write_end)


async def test_a_write_that_waits_can_be_cancelled_and_says_what_it_wrote() -> None:
    read_end, write_end = os.pipe()
    capacity = 1 << 16
    async with await trio.open_file(write_end, "wb", buffering=0) as file:
        written: list[int] = []
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def write() -> None:
                    written.append(await file.write(bytes(capacity + 100)))

                nursery.start_soon(write)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert written == [capacity]
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(file.write, b"none of it")
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
    assert len(os.read(read_end, 1 << 20)) == capacity
    os.close(read_end)


async def test_a_buffered_read_is_not_cancelled_midway() -> None:
    read_end, write_end = os.pipe()
    async with await trio.open_file(read_end, "rb") as file:
        lines: list[bytes] = []
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def read_line() -> None:
                    lines.append(await file.readline())

                nursery.start_soon(read_line)
                await wait_all_tasks_blocked()
                os.write(write_end, b"half a ")
                await wait_all_tasks_blocked()
                scope.cancel()
                with trio.CancelScope(shield=True):
                    await wait_all_tasks_blocked()
                os.write(write_end, b"line\n")
        assert lines == [b"half a line\n"]
    os.close(write_end)


# --- Closing --------------------------------------------------------------------------------


@pytest.mark.parametrize("buffering", [0, -1])
async def test_closing_ends_a_wait_inside(buffering: int) -> None:
    read_end, write_end = os.pipe()
    file = await trio.open_file(read_end, "rb", buffering=buffering)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(ValueError, match="closed file"):
                await file.read(1)

        for _ in range(2):
            nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await file.aclose()
    assert file.closed
    os.close(write_end)


async def test_closing_the_wrapped_file_ends_a_wait_inside() -> None:
    """A caller may pass the method of the wrapped file to a thread."""
    read_end, write_end = os.pipe()
    file = await trio.open_file(read_end, "rb", buffering=0)
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(ValueError, match="closed file"):
                await file.read(1)

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await _files.run_sync(file.wrapped.close)
    assert file.closed
    os.close(write_end)


async def test_a_non_blocking_fd_says_so() -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    async with await trio.open_file(read_end, "rb", buffering=0) as reader:
        assert await reader.read(1) is None
        assert await reader.readinto(bytearray(1)) is None
        assert await reader.readall() is None
        os.write(write_end, b"some")
        assert await reader.readall() == b"some"
    async with await trio.open_file(write_end, "wb", buffering=0) as writer:
        with pytest.raises(BrokenPipeError):
            await writer.write(b"x")


async def test_a_full_non_blocking_pipe_takes_a_part() -> None:
    read_end, write_end = os.pipe2(os.O_NONBLOCK)
    async with await trio.open_file(write_end, "wb", buffering=0) as writer:
        assert await writer.write(bytes(100_000)) == 1 << 16
        assert await writer.write(b"x") is None
    os.close(read_end)


async def test_terminals() -> None:
    master, terminal = os.openpty()
    async with await trio.open_file(terminal, "r+b", buffering=0) as file:
        assert file.isatty()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await file.read(100) == b"typed\n"

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            os.write(master, b"typed\n")
        assert await file.write(b"shown") == 5
    os.close(master)


# --- Terminals ------------------------------------------------------------------------------


async def test_a_terminal_is_waited_for() -> None:
    """The kernel reads from it only if there is something, and else fails with EAGAIN."""
    ours, theirs = os.openpty()
    received: list[bytes] = []
    async with trio.lowlevel.FdStream(ours) as stream, trio.open_nursery() as nursery:

        async def receive() -> None:
            received.append(await stream.receive_some(10))

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        assert not received
        os.write(theirs, b"typed")
    assert received == [b"typed"]
    os.close(theirs)


async def test_a_pipe_that_a_write_finds_full(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[object]()

    async def wait_writable(_manager: UringIOManager, fd: object) -> None:
        waited.append(fd)

    monkeypatch.setattr(UringIOManager, "wait_writable", wait_writable)
    fail_once(monkeypatch, Opcode.WRITE, errno.EAGAIN)
    read_end, write_end = os.pipe()
    async with FdStream(read_end) as reader, FdStream(write_end) as writer:
        await writer.send_all(b"x")
        assert await reader.receive_some() == b"x"
    assert waited == [write_end]


async def test_without_provided_buffers_streams_are_read_by_system_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("buffers", "stream_buffers"):
        monkeypatch.setattr(UringIOManager, name, None)
    read_end, write_end = os.pipe()
    async with FdStream(read_end) as reader, FdStream(write_end) as writer:
        await writer.send_all(b"hello")
        assert await reader.receive_some() == b"hello"
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())
    async with ours, theirs:
        await ours.send_all(b"hello")
        assert await theirs.receive_some() == b"hello"
