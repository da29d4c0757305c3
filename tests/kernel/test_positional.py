"""`open_positional`: one file, many tasks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from accounting import steps_beside
from races import current_files, current_manager, file_size_limit
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_uring
from trio_uring import PositionalFile, RegisteredBuffers, open_positional
from trio_uring._files import _positional
from trio_uring._kernel import native, why_no_native
from trio_uring._kernel.uapi import Opcode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from trio_uring._operations import Operation

open_new = partial(open_positional, mode="r+", flags=os.O_CREAT)

pytestmark = pytest.mark.usefixtures("fd_ledger")


async def in_both_ways(test: Callable[[], Awaitable[object]]) -> None:
    """Run *test* in this run, and in a run without a ring."""
    await test()
    await trio.to_thread.run_sync(trio.run, test)


async def use(path: Path) -> None:
    """Call all methods."""
    async with await open_new(path) as file:
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
    async with await open_new(tmp_path / "file") as file:

        async def write(number: int) -> None:
            assert await file.write_at(bytes([number]) * 4096, number * 4096) == 4096
            assert await file.read_at(4096, number * 4096) == bytes([number]) * 4096

        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(write, number)
    assert (tmp_path / "file").stat().st_size == 100 * 4096


async def test_large_transfers_go_to_workers(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    async with await open_new(tmp_path / "file") as file:
        assert await file.write_at(data, 0) == len(data)
        assert await file.read_at(len(data), 0) == data
    routes = current_files().routes()
    assert routes["inline"] == 0


async def test_a_file_opened_for_appending_is_appended_to(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", "a") as file:
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


@pytest.mark.parametrize("mode", ["w", "a"])
async def test_a_write_that_was_short_goes_on_with_the_rest(writes_short: Path, mode: str) -> None:
    path = writes_short / "file"
    async with await open_positional(path, mode) as file:
        assert await file.write_at(b"0123456789", 0) == 10
        assert await file.writev_at([b"ab", bytearray(b"cd"), b"", b"ef"], 10) == 6
    assert path.read_bytes() == b"0123456789abcdef"


@pytest.mark.parametrize("mode", ["w", "a"])
async def test_a_write_up_to_the_limit_is_short_and_the_next_one_fails(
    writes_short: Path, mode: str
) -> None:
    path = writes_short / "file"
    async with await open_positional(path, mode) as file:
        await file.write_at(bytes(4090), 0)
        with file_size_limit(4096):
            assert await file.write_at(b"0123456789", 4090) == 6
            with pytest.raises(OSError, match="File too large"):
                await file.write_at(b"0123456789", 4096)
    assert path.read_bytes() == bytes(4090) + b"012345"


async def test_a_cancelled_write_that_was_short_goes_on(writes_short: Path) -> None:
    path = writes_short / "file"
    async with await open_new(path) as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.write_at, b"0123456789", 0)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert path.read_bytes() == b"0123456789"


async def test_the_signal_of_a_file_that_grows_too_big_arrives(tmp_path: Path) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGXFSZ, lambda number, _frame: arrived.append(number))
    try:
        async with await open_new(tmp_path / "file") as file:
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
    file = await open_new(tmp_path / "file")
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
    async with await open_new(tmp_path / "file") as file:
        for call in (
            partial(file.write_at, b"x", 0),
            partial(file.read_at, 1, 0),
            partial(file.truncate, 10),
            partial(open_new, tmp_path / "other"),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await call()
            assert scope.cancelled_caught
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").stat().st_size == 0


async def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    async with await open_new(tmp_path / "file") as file:
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
        with pytest.raises(ValueError, match="size"):
            await file.truncate(-1)


async def test_errors_carry_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        await open_positional(tmp_path / "missing")
    assert caught.value.filename == str(tmp_path / "missing")
    async with await open_positional(tmp_path) as file:
        with pytest.raises(IsADirectoryError):
            await file.read_at(1, 0)
    async with await open_positional("/dev/full", "r+") as file:
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
    async with await open_new(tmp_path / "file") as file:
        await file.truncate(100)
    assert (tmp_path / "file").stat().st_size == 100
    assert current_files().routes()["thread"] == 1


async def test_more_calls_than_the_bound_on_operations_all_end(tmp_path: Path) -> None:
    count = current_manager().config.max_file_operations + 20
    async with (
        await open_new(tmp_path / "file") as file,
        trio.open_nursery() as nursery,
    ):
        for _ in range(count):
            nursery.start_soon(file.fdatasync)
    assert current_files().routes()["ring"] >= count


@pytest.fixture
def writes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system write without waiting, which ext4 does not."""
    pwritev = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, data, offset, _flags: pwritev(fd, data, offset))


CALLS: dict[str, tuple[Any, ...]] = {
    "read_at": (2, 0),
    "read_into_at": (bytearray(2), 0),
    "read_many_at": ([(2, 0)],),
    "write_at": (b"01", 0),
}


async def steps_beside_calls(name: str, path: Path) -> int:
    path.write_bytes(b"0123456789")
    async with await open_positional(path, "r+") as file:
        return await steps_beside(lambda: getattr(file, name)(*CALLS[name]), 10)


@pytest.mark.usefixtures("writes_at_once", "no_deterministic_scheduling")
@pytest.mark.ring(turn_budget=1.0)
@pytest.mark.parametrize("name", CALLS)
async def test_calls_that_need_not_wait_share_a_turn(name: str, tmp_path: Path) -> None:
    assert await steps_beside_calls(name, tmp_path / "file") == 0


@pytest.mark.usefixtures("writes_at_once")
@pytest.mark.ring(turn_budget=0)
@pytest.mark.parametrize("name", CALLS)
async def test_without_a_budget_each_call_is_a_schedule_point(name: str, tmp_path: Path) -> None:
    assert await steps_beside_calls(name, tmp_path / "file") >= 9


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EOPNOTSUPP, errno.EIO])
async def test_what_cannot_be_read_without_waiting_is_read_by_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """An error is reported by the ring, too, or at once."""
    (tmp_path / "file").write_bytes(b"0123456789")

    def refuse(*_args: object) -> int:
        raise OSError(error, os.strerror(error))

    async with await open_positional(tmp_path / "file") as file:
        monkeypatch.setattr(os, "preadv", refuse)
        buffer = bytearray(4)
        if error == errno.EIO:
            with pytest.raises(OSError, match="Input/output error"):
                await file.read_into_at(buffer, 0)
        else:
            for _ in range(2):
                assert await file.read_into_at(buffer, 0) == 4
            assert buffer == b"0123"
        assert await file.read_many_at([(4, 0)]) == [b"0123"]


async def test_a_short_read_without_waiting_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    preadv, calls = os.preadv, 0

    def read_a_part(fd: int, buffers: Any, offset: int, flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise BlockingIOError
        return preadv(fd, [memoryview(buffers[0])[:2]], offset, flags)

    async with await open_positional(tmp_path / "file") as file:
        monkeypatch.setattr(os, "preadv", read_a_part)
        buffer = bytearray(4)
        assert await file.read_into_at(buffer, 0) == 4
        assert buffer == b"0123"
    assert calls == 2


# --- Exact reads, all of a write, appending -------------------------------------------------


async def test_an_exact_read_gets_all_or_fails(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "file").write_bytes(b"0123456789")
        async with await open_positional(tmp_path / "file") as file:
            with assert_checkpoints():
                assert await file.read_exactly_at(4, 6) == b"6789"
            with pytest.raises(EOFError, match="5 bytes wanted, but the file ends after 4"):
                await file.read_exactly_at(5, 6)
            with pytest.raises(EOFError, match="after 0 of them"):
                await file.read_exactly_at(5, 10)
            with pytest.raises(ValueError, match="size"):
                await file.read_exactly_at(-1, 0)

    await in_both_ways(test)


async def test_an_exact_read_is_made_of_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_positional, "_PART_MAX", 3)
    (tmp_path / "file").write_bytes(b"0123456789")
    async with await open_positional(tmp_path / "file") as file:
        assert await file.read_exactly_at(10, 0) == b"0123456789"
        with pytest.raises(EOFError, match="after 10 of them"):
            await file.read_exactly_at(11, 0)


async def test_all_is_written_or_the_error_is_raised(writes_short: Path) -> None:
    path = writes_short / "file"
    async with await open_positional(path, "w") as file:
        await file.write_all_at(b"0123456789", 0)
        with file_size_limit(12), pytest.raises(OSError, match="File too large"):
            await file.write_all_at(b"abcdef", 10)
    assert path.read_bytes() == b"0123456789ab"


async def test_the_rest_is_written_while_the_file_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = PositionalFile._write

    async def write_three_bytes(
        self: PositionalFile, buffers: Any, *args: Any, **kwargs: Any
    ) -> int:
        return await write(self, [bytes(buffers[0])[:3]], *args, **kwargs)

    monkeypatch.setattr(PositionalFile, "_write", write_three_bytes)
    path = tmp_path / "file"
    file = await open_positional(path, "w")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(file.write_all_at, b"0123456789", 0, dsync=True))
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await file.aclose()
    assert path.read_bytes() == b"0123456789"


@pytest.mark.parametrize("dsync", [False, True])
async def test_appending_returns_where_the_data_begins(tmp_path: Path, dsync: bool) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        async with (
            await open_positional(path, "w+") as first,
            await open_positional(path, "a") as second,
        ):
            with assert_checkpoints():
                assert await first.append(b"one", dsync=dsync) == 0
            assert await second.append(bytearray(b"two"), dsync=dsync) == 3
            assert await first.append(b"") == 6
            assert await first.append(memoryview(b"three"), dsync=dsync) == 6
            with pytest.raises(TypeError):
                await first.append("text")  # type: ignore[arg-type]
        assert path.read_bytes() == b"onetwothree"

    await in_both_ways(test)


async def test_many_tasks_append(tmp_path: Path) -> None:
    found: dict[int, bytes] = {}
    path = tmp_path / "file"
    files = [await open_positional(path, "a") for _ in range(3)]

    async def append(number: int) -> None:
        data = bytes([number]) * (number + 1)
        found[await files[number % 3].append(data)] = data

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(append, number)
    for file in files:
        await file.aclose()
    content = path.read_bytes()
    assert len(content) == sum(map(len, found.values()))
    for offset, data in found.items():
        assert content[offset : offset + len(data)] == data


async def test_a_cancelled_append_completes_or_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    pwritev, may_write = os.pwritev, threading.Event()

    def write_later(*args: Any) -> int:
        may_write.wait()
        return pwritev(*args)

    monkeypatch.setattr(os, "pwritev", write_later)
    async with await open_positional(path, "a") as file:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.append, b"first")
            nursery.start_soon(file.append, b"second")  # waits for its turn
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            may_write.set()
        assert path.read_bytes() in (b"first", b"second")


async def test_an_append_that_was_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    pwritev = os.pwritev
    between = b""

    def write_three_bytes(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = pwritev(fd, [bytes(buffers[0])[:3]], offset, flags)
        if between:
            with path.open("ab") as other:
                other.write(between)
        return count

    monkeypatch.setattr(os, "pwritev", write_three_bytes)
    async with await open_positional(path, "a") as file:
        assert await file.append(b"0123456789") == 0
        assert path.read_bytes() == b"0123456789"
        between = b"other"
        with pytest.raises(OSError, match="somebody else appended") as caught:
            await file.append(b"abcdef")
        assert caught.value.errno == errno.EIO


# --- Many reads in one call -----------------------------------------------------------------


@pytest.mark.parametrize("nowait", [True, False])
async def test_many_reads_in_one_call(tmp_path: Path, nowait: bool) -> None:
    data = os.urandom(2 << 20)
    (tmp_path / "file").write_bytes(data)

    async def test() -> None:
        async with await open_positional(tmp_path / "file") as file:
            file._nowait_read = nowait
            for parts in (
                [(4096, 4096 * number) for number in range(64)],
                [(4096, 4096 * number) for number in range(400, 0, -1)],
                [(1, number) for number in range(1000)],
                [(300_000, 5), (10, 0), (300_000, 1_000_000), (5, 5)],
                [(200_000, 0)] * 5,
                [(10, len(data) - 5), (10, len(data)), (10, len(data) + 10), (0, 0)],
                [],
            ):
                with assert_checkpoints():
                    found = await file.read_many_at(parts)
                assert found == [data[offset : offset + size] for size, offset in parts]

    await in_both_ways(test)


async def test_what_is_not_cached_is_read_by_the_ring(tmp_path: Path) -> None:
    data = os.urandom(100 * 4096)
    (tmp_path / "file").write_bytes(data)
    parts = [(4096, 4096 * number) for number in range(0, 100, 7)]
    async with await open_positional(tmp_path / "file") as file:
        await file.fsync()
        await file.advise(0, 0, os.POSIX_FADV_RANDOM)
        await file.advise(0, 0, os.POSIX_FADV_DONTNEED)
        found = await file.read_many_at(parts)
        assert found == [data[offset : offset + size] for size, offset in parts]
        before = current_files().routes()["inline"]
        assert await file.read_many_at(iter(parts)) == found
        assert current_files().routes()["inline"] == before + len(parts)


@pytest.mark.skipif(bool(why_no_native), reason=why_no_native)
@pytest.mark.parametrize("size", [4096, 8192])
def test_what_is_not_all_cached_is_not_read_at_once(tmp_path: Path, size: int) -> None:
    data = os.urandom(8192)
    (tmp_path / "file").write_bytes(data)
    fd = os.open(tmp_path / "file", os.O_RDWR)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def evict_the_second_page() -> None:
        os.pread(fd, 8192, 0)  # so that no read of it is under way
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(fd, 1, 0)

    evict_the_second_page()
    try:
        with suppress(BlockingIOError):
            os.preadv(fd, [bytearray(1)], 4096, os.RWF_NOWAIT)
            pytest.skip("this file system does not evict pages")
        assert native.read_cached(fd, 4096, 0) == data[:4096]
        evict_the_second_page()
        assert native.read_cached(fd, size, 8192 - size) is None
        os.pread(fd, 8192, 0)
        assert native.read_cached(fd, size, 8192 - size) == data[8192 - size :]
    finally:
        os.close(fd)


async def test_wrong_parts_and_errors_of_many_reads(tmp_path: Path) -> None:
    async with await open_positional(tmp_path) as directory:
        with pytest.raises(IsADirectoryError):
            await directory.read_many_at([(1, 0)])
        for part in ((-1, 0), (1, -1), (1 << 31, 0)):
            with pytest.raises(ValueError, match="must be a size and an offset"):
                await directory.read_many_at([part])
        with pytest.raises(OverflowError):
            await directory.read_many_at([(1, 1 << 63)])


async def test_odd_parts_are_read_or_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    odd: Any = [[1, 2], (True, 3)]
    async with await open_positional(tmp_path / "file") as file:
        assert await file.read_many_at(odd) == [b"2", b"3"]
        assert await file.read_at(True, 4) == b"4"
        for part in ((1.0, 0), (1, 0.0), ("1", 0), (1,), (1, 2, 3), None):
            wrong: Any = [part]
            with pytest.raises((TypeError, ValueError)):
                await file.read_many_at(wrong)
        for args in ((1.0, 0), (1, 0.0), (1, None)):
            with pytest.raises(TypeError):
                await file.read_at(*args)  # type: ignore[arg-type]
        with pytest.raises(OverflowError):
            await file.read_at(1, 1 << 64)


# --- Leases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nowait", [True, False])
async def test_a_lease_is_read_into_and_written_from(tmp_path: Path, nowait: bool) -> None:
    path = tmp_path / "file"

    async def test() -> None:
        with RegisteredBuffers(2, 4096) as buffers:
            async with await open_positional(path, "w+") as file:
                file._nowait_read = file._nowait_write = nowait
                with await buffers.lease() as lease, await buffers.lease() as other:
                    lease.memory[:] = b"l" * 4096
                    assert await file.write_at(lease, 0) == 4096
                    await file.write_all_at(lease, 4096, dsync=True)
                    lease.memory[:5] = b"first"
                    await file.write_all_at(lease, 0)
                    assert await file.read_into_at(other, 0) == 4096
                    assert other.memory == lease.memory
                    assert await file.read_into_at(other, 4096) == 4096
                    assert other.memory == b"l" * 4096
                with pytest.raises(RuntimeError, match="given back"):
                    await file.read_into_at(lease, 0)
                with pytest.raises(RuntimeError, match="given back"):
                    await file.write_at(lease, 0)

    await in_both_ways(test)
    completed = current_manager().statistics().completed
    assert completed.get("READ_FIXED", 0) == (0 if nowait else 2)
    assert nowait or completed["WRITE_FIXED"] == 2
