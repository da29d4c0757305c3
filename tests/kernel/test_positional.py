"""`open_positional`: one file, many tasks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from races import current_files, current_manager, file_size_limit
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import PositionalFile, open_positional
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio_uring._operations import Operation

CREATE = os.O_RDWR | os.O_CREAT

pytestmark = pytest.mark.usefixtures("fd_ledger")


async def use(path: Path) -> None:
    """Call all methods."""
    async with await open_positional(path, CREATE) as file:
        assert await file.write_at(b"0123456789", 0) == 10
        assert await file.writev_at([b"ab", bytearray(b"cd")], 10) == 4
        assert await file.read_at(4, 8) == b"89ab"
        assert await file.read_at(100, 8) == b"89abcd"
        assert await file.read_at(100, 14) == b""
        assert await file.read_at(0, 0) == b""
        buffer = bytearray(6)
        assert await file.read_into_at(memoryview(buffer)[1:4], 2) == 3
        assert buffer == b"\x00234\x00\x00"
        buffers = [bytearray(3), bytearray(4)]
        assert await file.readv_at(buffers, 9) == 5
        assert buffers == [b"9ab", b"cd\x00\x00"]
        await file.fsync()
        await file.fdatasync()
        await file.fallocate(0, 8192)
        assert os.fstat(file.fileno()).st_size == 8192
        await file.truncate(5)
        await file.advise(0, 0, os.POSIX_FADV_WILLNEED)
        assert await file.read_at(100, 0) == b"01234"
        assert file.name == str(path)
        assert not os.get_inheritable(file.fileno())
        assert repr(file) == f"<trio_uring.PositionalFile {str(path)!r}, {file.fileno()}>"
    assert file.closed
    assert file.fileno() == -1
    assert "closed" in repr(file)
    await file.aclose()


@pytest.mark.parametrize("nowait", [True, False])
async def test_all_calls_are_on_the_ring(
    tmp_path: Path, nowait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nowait:
        init = PositionalFile.__init__

        def without(self: PositionalFile, fd: int, name: str) -> None:
            init(self, fd, name)
            self._nowait_read = self._nowait_write = False

        monkeypatch.setattr(PositionalFile, "__init__", without)
    await use(tmp_path / "file")
    routes = current_files().routes()
    assert routes["thread"] == 0
    assert bool(routes["inline"]) == nowait


def test_all_calls_work_without_a_ring(tmp_path: Path) -> None:
    trio.run(use, tmp_path / "file")


async def test_tasks_work_side_by_side(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", CREATE) as file:

        async def write(number: int) -> None:
            assert await file.write_at(bytes([number]) * 4096, number * 4096) == 4096
            assert await file.read_at(4096, number * 4096) == bytes([number]) * 4096

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(write, number)
    assert (tmp_path / "file").stat().st_size == 100 * 4096


async def test_large_transfers_go_to_workers(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    async with await open_positional(tmp_path / "file", CREATE) as file:
        assert await file.write_at(data, 0) == len(data)
        assert await file.read_at(len(data), 0) == data
    routes = current_files().routes()
    assert routes["inline"] == 0


async def test_a_file_opened_for_appending_is_appended_to(tmp_path: Path) -> None:
    flags = CREATE | os.O_APPEND
    async with await open_positional(tmp_path / "file", flags) as file:
        for _ in range(3):
            await file.write_at(b"more", 0)
    assert (tmp_path / "file").read_bytes() == b"moremoremore"


@pytest.fixture(params=["stand-in", "xfs"])
def writes_short(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A directory on a file system that writes only a part if the rest would have to wait."""
    if request.param == "stand-in":
        pwritev = os.pwritev

        def write_three_bytes(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
            return pwritev(fd, [bytes(buffers[0])[:3]] if flags else buffers, offset)

        monkeypatch.setattr(os, "pwritev", write_three_bytes)
        yield tmp_path
        return
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    (tmp_path / "mounted").mkdir()
    make = f"mkfs.xfs -q {image} && mount -o loop {image} {tmp_path}/mounted"
    if subprocess.run(make, shell=True, capture_output=True, check=False).returncode:
        pytest.skip("needs mkfs.xfs, and the right to mount")
    try:
        yield tmp_path / "mounted"
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
async def test_a_write_that_was_short_goes_on_with_the_rest(writes_short: Path, flags: int) -> None:
    path = writes_short / "file"
    async with await open_positional(path, CREATE | flags) as file:
        assert await file.write_at(b"0123456789", 0) == 10
        assert await file.writev_at([b"ab", bytearray(b"cd"), b"", b"ef"], 10) == 6
    assert path.read_bytes() == b"0123456789abcdef"


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
async def test_a_write_up_to_the_limit_is_short_and_the_next_one_fails(
    writes_short: Path, flags: int
) -> None:
    path = writes_short / "file"
    async with await open_positional(path, CREATE | flags) as file:
        await file.write_at(bytes(4090), 0)
        with file_size_limit(4096):
            assert await file.write_at(b"0123456789", 4090) == 6
            with pytest.raises(OSError, match="File too large"):
                await file.write_at(b"0123456789", 4096)
    assert path.read_bytes() == bytes(4090) + b"012345"


async def test_a_cancelled_write_that_was_short_goes_on(writes_short: Path) -> None:
    path = writes_short / "file"
    async with await open_positional(path, CREATE) as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.write_at, b"0123456789", 0)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert path.read_bytes() == b"0123456789"


async def test_the_signal_of_a_file_that_grows_too_big_arrives(tmp_path: Path) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGXFSZ, lambda number, _frame: arrived.append(number))
    try:
        async with await open_positional(tmp_path / "file", CREATE) as file:
            with file_size_limit(4096):
                for call in (
                    partial(file.write_at, b"x", 4096),
                    partial(file.truncate, 4097),
                    partial(file.fallocate, 0, 4097),
                ):
                    with pytest.raises(OSError, match="File too large"):
                        await call()
        assert arrived == [signal.SIGXFSZ] * 3
    finally:
        signal.signal(signal.SIGXFSZ, before)


async def test_closing_waits_for_the_others(tmp_path: Path) -> None:
    file = await open_positional(tmp_path / "file", CREATE)
    results: list[int] = []

    async def write() -> None:
        results.append(await file.write_at(bytes(8 << 20), 0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        await file.aclose()
        assert results == [8 << 20]
        for call in (
            partial(file.read_at, 1, 0),
            partial(file.write_at, b"x", 0),
            file.fsync,
            partial(file.truncate, 0),
        ):
            with pytest.raises(trio.ClosedResourceError):
                await call()


async def test_a_cancelled_task_does_nothing(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", CREATE) as file:
        for call in (
            partial(file.write_at, b"x", 0),
            partial(file.read_at, 1, 0),
            partial(file.truncate, 10),
            partial(open_positional, tmp_path / "other", CREATE),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_size == 0


async def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", CREATE) as file:
        with pytest.raises(ValueError, match="offset"):
            await file.read_at(1, -1)
        with pytest.raises(ValueError, match="offset"):
            await file.write_at(b"", -1)
        with pytest.raises(ValueError, match="size"):
            await file.read_at(-1, 0)
        for buffer in (b"read-only", 5):
            with pytest.raises((TypeError, BufferError)):
                await file.read_into_at(buffer, 0)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            await file.write_at("text", 0)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="Invalid argument"):
            await file.truncate(-1)


async def test_errors_carry_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await open_positional(tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")
    async with await open_positional(tmp_path) as file:
        with pytest.raises(IsADirectoryError):
            await file.read_at(1, 0)
    async with await open_positional("/dev/full", os.O_WRONLY) as file:
        with pytest.raises(OSError, match="No space left") as full:
            await file.write_at(b"x", 0)
        assert full.value.errno == errno.ENOSPC


async def test_an_old_kernel_truncates_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = type(current_manager()).perform

    async def refusing(manager: Any, operation: Operation[Any]) -> Any:
        if operation.opcode == Opcode.FTRUNCATE:
            raise trio_uring.UnsupportedOpcodeError(errno.EOPNOTSUPP, "not here")
        return await perform(manager, operation)

    monkeypatch.setattr(type(current_manager()), "perform", refusing)
    async with await open_positional(tmp_path / "file", CREATE) as file:
        await file.truncate(100)
    assert (tmp_path / "file").stat().st_size == 100
    assert current_files().routes()["thread"] == 1


async def test_more_calls_than_the_bound_on_operations_all_end(tmp_path: Path) -> None:
    count = current_manager().config.max_file_operations + 20
    async with (
        await open_positional(tmp_path / "file", CREATE) as file,
        trio.open_nursery() as nursery,
    ):
        for _ in range(count):
            nursery.start_soon(file.fdatasync)
    assert current_files().routes()["ring"] >= count
