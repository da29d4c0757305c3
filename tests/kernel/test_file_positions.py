"""File positions: files that others share move the position as the standard library does.

The position belongs to the open file description. All duplicates of the fd share it: ``2>&1``, a
child process, a thread.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._ring import Ring
from trio_uring._files._raw import IN_WORKER_MIN, RingFileIO
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from trio_uring.lowlevel import Operation

pytestmark = pytest.mark.usefixtures("fd_ledger")

SIZES = [4096, IN_WORKER_MIN + 1]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """An fd of an empty file, as ``> file`` gives it to a program."""
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def routes() -> dict[str, int]:
    return dict(trio.lowlevel.current_statistics().io_statistics.routes)  # type: ignore[union-attr]


async def write_many(file: Any, data: bytes, times: int) -> None:
    for _ in range(times):
        assert await file.write(data) == len(data)


@pytest.mark.parametrize("size", SIZES)
async def test_two_files_over_one_description_overwrite_nothing(fd: int, size: int) -> None:
    async with (
        await trio.open_file(os.dup(fd), "wb", buffering=0) as first,
        await trio.open_file(os.dup(fd), "wb", buffering=0) as second,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(write_many, first, b"a" * size, 10)
        nursery.start_soon(write_many, second, b"b" * size, 10)
    data = os.pread(fd, 30 * size, 0)
    pieces = {data[start : start + size] for start in range(0, len(data), size)}
    assert len(data) == 20 * size
    assert pieces == {b"a" * size, b"b" * size}


async def test_two_readers_of_one_description_share_the_file(fd: int) -> None:
    total, got = 4 << 20, [0]
    os.pwrite(fd, bytes(total), 0)

    async def read(file: Any) -> None:
        while data := await file.read(IN_WORKER_MIN + 1):
            got[0] += len(data)

    async with (
        await trio.open_file(os.dup(fd), "rb", buffering=0) as first,
        await trio.open_file(os.dup(fd), "rb", buffering=0) as second,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(read, first)
        nursery.start_soon(read, second)
    assert got == [total]


LINES = 1000
CHILD = f"import os\nfor i in range({LINES}): os.write(1, b'child %d\\n' % i)\n"


@pytest.mark.parametrize("opened", ["by number", "by path"])
@pytest.mark.parametrize("buffering", [0, -1])
async def test_no_line_of_a_child_or_of_ours_is_lost(
    fd: int, tmp_path: Path, opened: str, buffering: int
) -> None:
    name: int | Path = os.dup(fd) if opened == "by number" else tmp_path / "file"
    async with (
        await trio.open_file(name, "wb", buffering=buffering) as file,
        trio.open_nursery() as nursery,
    ):
        command = [sys.executable, "-c", CHILD]
        await nursery.start(partial(trio.run_process, command, stdout=file.wrapped))
        for number in range(LINES):
            await file.write(b"parent %d\n" % number)
            await file.flush()
    lines = os.pread(fd, 1 << 20, 0).split(b"\n")
    expected = [b"%s %d" % (who, n) for who in (b"child", b"parent") for n in range(LINES)]
    assert sorted(lines) == sorted([*expected, b""])


# Python 3.12 warns of forks beside threads.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
async def test_a_forked_process_has_the_position_too(tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "wb", buffering=0) as file:
        await file.write(b"before\n")
        assert routes()["thread"] == 0
        child = os.fork()
        if not child:
            try:
                file.wrapped.write(b"child\n")
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        await file.write(b"after\n")
    assert (tmp_path / "file").read_bytes() == b"before\nchild\nafter\n"
    assert routes()["thread"] == 1


async def test_a_file_that_nobody_else_can_have_uses_the_ring(tmp_path: Path) -> None:
    large = bytes(IN_WORKER_MIN + 1)
    async with await trio.open_file(tmp_path / "file", "w+b", buffering=0) as file:
        await file.write(large)
        await file.seek(0)
        assert await file.read(len(large)) == large
        assert routes()["thread"] == 0
        file.fileno()
        await file.write(large)
        assert routes()["thread"] == 1
        assert await file.tell() == 2 * len(large)


async def test_who_gets_the_fd_during_a_write_writes_behind_it(tmp_path: Path) -> None:
    large = b"x" * (IN_WORKER_MIN + 1)
    async with (
        await trio.open_file(tmp_path / "file", "wb", buffering=0) as file,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(file.write, large)
        await wait_all_tasks_blocked()
        os.write(file.fileno(), b"behind")
    assert (tmp_path / "file").read_bytes() == large + b"behind"


@pytest.mark.parametrize("opened", ["by number", "by path"])
async def test_a_write_that_has_begun_completes_though_cancelled(
    fd: int, tmp_path: Path, opened: str
) -> None:
    name: int | Path = os.dup(fd) if opened == "by number" else tmp_path / "file"
    large = b"x" * (IN_WORKER_MIN + 1)
    async with await trio.open_file(name, "wb", buffering=0) as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.write, large)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with trio.CancelScope() as scope:
            scope.cancel()
            await file.write(b"this never begins")
        await file.write(b"end")
        assert await file.tell() == len(large) + 3
    assert os.pread(fd, 1 << 20, 0) == large + b"end"


@pytest.fixture
def short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel write only a third of the data."""
    push = Ring.push

    def push_short(self: Ring, operation: Operation[Any], user_data: int) -> bool:
        sqe = operation.sqe
        if operation.opcode == Opcode.WRITE:
            operation.sqe = (*sqe[:6], sqe[6] // 3, *sqe[7:])
        try:
            return push(self, operation, user_data)
        finally:
            operation.sqe = sqe

    monkeypatch.setattr(Ring, "push", push_short)
    monkeypatch.setattr(RingFileIO, "nowait_write", False)


@pytest.mark.parametrize("mode", ["wb", "ab", "r+b"])
async def test_a_short_write_leaves_the_position_behind_what_was_written(
    tmp_path: Path, mode: str, short_writes: None
) -> None:
    (tmp_path / "file").write_bytes(b"")
    async with await trio.open_file(tmp_path / "file", mode, buffering=0) as file:
        assert await file.write(b"123456789") == 3
        assert await file.tell() == 3
        assert await file.write(b"abcdef") == 2
        assert await file.tell() == 5
    assert (tmp_path / "file").read_bytes() == b"123ab"


def largest_position(fd: int) -> int:
    """Return where the file system has files end."""
    low, high = 0, 1 << 63
    while high - low > 1:
        middle = (low + high) // 2
        try:
            os.lseek(fd, middle, os.SEEK_SET)
        except OSError:
            high = middle
        else:
            low = middle
    return low


async def test_a_write_beyond_the_largest_file_is_that_of_the_standard_library(
    tmp_path: Path,
) -> None:
    async def outcomes(write: Callable[[bytes], Awaitable[int | None]]) -> list[object]:
        found: list[object] = []
        for _ in range(2):
            try:
                found.append(await write(b"0123456789"))
            except OSError as exc:
                found.append(exc.errno)
        return found

    async with await trio.open_file(tmp_path / "ours", "wb", buffering=0) as ours:
        with (tmp_path / "theirs").open("wb", buffering=0) as theirs:
            position = largest_position(theirs.fileno()) - 4
            await ours.seek(position)
            theirs.seek(position)

            async def write(data: bytes) -> int | None:
                return theirs.write(data)

            assert await outcomes(ours.write) == await outcomes(write)
            assert await ours.tell() == theirs.tell()
