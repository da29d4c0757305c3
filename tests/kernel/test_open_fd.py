"""What positional files do besides reading and writing: sizes, holes, copies, locks, opening."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from races import current_files, current_manager
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_uring import FallocateMode, PositionalFile, open_direct, open_positional, write_file
from trio_uring._engine import _file_calls
from trio_uring._engine._file_systems import FileSystem
from trio_uring._files import _open_fd, _owned_fd

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.usefixtures("fd_ledger")

PAGE = 4096


async def in_both_ways(test: Callable[[], Awaitable[object]]) -> None:
    """Run *test* in this run, and in a run without a ring."""
    await test()
    await trio.to_thread.run_sync(trio.run, test)


@pytest.fixture
def with_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file one of a file system with a server."""
    monkeypatch.setattr(_owned_fd, "file_system_of", lambda _fd: FileSystem.SERVER)


# --- Opening --------------------------------------------------------------------------------


async def test_the_modes_are_those_of_open(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        async with await open_positional(path, "x", permissions=0o600) as file:
            await file.write_at(b"first", 0)
            assert (await file.stat()).st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError):
            await open_positional(path, "xb")
        async with await open_positional(path, "rb") as file:
            assert await file.read_at(10, 0) == b"first"
            with pytest.raises(OSError, match="Bad file descriptor"):
                await file.write_at(b"x", 0)
        async with await open_positional(path, "r+b") as file:
            await file.write_at(b"F", 0)
        async with await open_positional(path, "a+") as file:
            await file.write_at(b", last", 0)
            assert await file.read_at(20, 0) == b"First, last"
        async with await open_positional(path, "w+") as file:
            assert await file.read_at(20, 0) == b""
        for mode in ("w", "w+", "a", "a+"):
            path.unlink()
            await (await open_positional(path, mode)).aclose()
        path.unlink()
        with pytest.raises(FileNotFoundError):
            await open_positional(path, "r+")
        await (await open_positional(path, "r+", flags=os.O_CREAT)).aclose()
        path.with_name("link").unlink(missing_ok=True)
        path.with_name("link").symlink_to(path)
        with pytest.raises(OSError, match="symbolic links") as caught:
            await open_positional(path.with_name("link"), flags=os.O_NOFOLLOW)
        assert caught.value.errno == errno.ELOOP

    await in_both_ways(test)


async def test_all_functions_refuse_the_same_arguments_before_they_await(tmp_path: Path) -> None:
    path = tmp_path / "file"
    functions: list[Any] = [
        open_positional,
        open_direct,
        lambda *a, **k: write_file(a[0], b"", *a[1:], **k),
    ]
    for function in functions:
        for mode, flags, error, message in (
            (os.O_RDWR, 0, TypeError, r"mode must be a string .* pass the flags .* as flags="),
            ("rt", 0, ValueError, "mode must be one of .* not 'rt'"),
            ("", 0, ValueError, "mode must be one of"),
            ("w", os.O_RDWR, ValueError, "use mode to say"),
        ):
            with pytest.raises(error, match=message) as caught:
                function(path, mode, flags=flags).send(None)
            assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="mode must be one of 'w', 'x', not 'r'"):
        await write_file(path, b"", "r")
    with pytest.raises(TypeError):
        await open_positional(path, "w", 0o600)  # type: ignore[misc]
    with pytest.raises(ValueError, match="closefd"):
        await open_positional(path, closefd=False)
    assert not path.exists()


async def test_a_file_is_written_that_did_not_exist(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        path.unlink(missing_ok=True)
        assert await write_file(path, b"data", "xb", permissions=0o600) == 4
        with pytest.raises(FileExistsError) as caught:
            await write_file(path, b"other", "x")
        assert caught.value.filename == str(path)
        assert path.read_bytes() == b"data"
        assert await write_file(path, b"da", flags=os.O_DSYNC) == 2
        assert path.read_bytes() == b"da"

    await in_both_ways(test)


async def test_an_fd_is_used_and_closed_or_not(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    with assert_checkpoints():
        file = await open_positional(fd, closefd=False)
    await file.write_at(b"data", 0)
    assert file.name == file.fileno() == fd
    await file.aclose()
    assert os.pread(fd, 10, 0) == b"data"
    async with await open_positional(fd) as file:
        assert await file.read_at(4, 0) == b"data"
    for call in (partial(PositionalFile, fd), partial(os.fstat, fd)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()


async def test_a_duplicate_is_the_same_open_file(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", "a+") as file:
        async with file.dup() as other:
            assert type(other) is PositionalFile
            assert other.name == file.name
            assert other.fileno() != file.fileno()
            assert not os.get_inheritable(other.fileno())
            offsets: list[int] = []

            async def append(to: PositionalFile) -> None:
                offsets.extend([await to.append(b"1234") for _ in range(20)])

            async with trio.open_nursery() as nursery:
                for each in (file, other):
                    nursery.start_soon(append, each)
                    nursery.start_soon(append, each)
            assert sorted(offsets) == list(range(0, 320, 4))
        assert await file.size() == 320
    with pytest.raises(trio.ClosedResourceError):
        file.dup()


# --- Sizes, space and holes -----------------------------------------------------------------


async def test_size_and_status(tmp_path: Path) -> None:
    async def test() -> None:
        async with await open_positional(tmp_path / "file", "w") as file:
            await file.write_at(b"12345", 0)
            with assert_checkpoints():
                assert await file.size() == 5
            with assert_checkpoints():
                assert await file.stat() == os.fstat(file.fileno())

    await in_both_ways(test)
    assert current_files().routes()["thread"] == 0


async def test_the_size_of_a_block_device_is_where_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status has no size. Here a file stands in for a device."""
    monkeypatch.setattr(stat, "S_ISBLK", stat.S_ISREG)
    async with await open_positional(tmp_path / "file", "w") as file:
        await file.truncate(12345)
        assert await file.size() == 12345


async def test_the_size_of_a_block_device_is_that_of_the_device() -> None:
    for device in Path("/sys/class/block").iterdir():
        sectors = int((device / "size").read_text())
        path = Path("/dev", device.name)
        if sectors and os.access(path, os.R_OK):
            try:
                file = await open_positional(path)
            except OSError:  # containers may forbid it
                continue
            async with file:
                assert await file.size() == 512 * sectors
            return
    pytest.skip("there is no block device that may be read")


async def test_holes_are_punched_and_found(tmp_path: Path) -> None:
    async def test() -> None:
        async with await open_positional(tmp_path / "file", "w+") as file:
            await file.write_at(bytes([1]) * 16 * PAGE, 0)
            await file.fsync()
            with assert_checkpoints():
                await file.fallocate(4 * PAGE, 4 * PAGE, FallocateMode.PUNCH_HOLE)
            assert await file.read_at(1, 4 * PAGE) == b"\0"
            assert await file.size() == 16 * PAGE
            with assert_checkpoints():
                assert await file.seek_hole(0) == 4 * PAGE
            with assert_checkpoints():
                assert await file.seek_data(4 * PAGE) == 8 * PAGE
            assert await file.seek_hole(8 * PAGE) == 16 * PAGE
            assert await file.seek_data(16 * PAGE) is None
            assert await file.seek_hole(16 * PAGE) is None
            await file.fallocate(0, 32 * PAGE, mode=FallocateMode.KEEP_SIZE)
            assert await file.size() == 16 * PAGE
            await file.fallocate(0, PAGE, FallocateMode.ZERO_RANGE)
            assert await file.read_at(1, 0) == b"\0"
            with pytest.raises(ValueError, match="offset"):
                await file.seek_data(-1)
            with pytest.raises(ValueError, match="offset"):
                await file.fallocate(-1, 1)
            with pytest.raises(OSError, match="Invalid argument"):
                await file.fallocate(0, 0)

    await in_both_ways(test)


async def test_other_errors_of_seeking_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with await open_positional(tmp_path / "file", "w+") as file:
        monkeypatch.setattr(os, "lseek", refuse)
        with pytest.raises(OSError, match="Input/output error"):
            await file.seek_hole(0)


async def test_a_part_is_written_to_the_disk(tmp_path: Path) -> None:
    async def test() -> None:
        async with await open_positional(tmp_path / "file", "w+") as file:
            await file.write_at(bytes(1 << 20), 0)
            for wait in (False, True):
                with assert_checkpoints():
                    await file.sync_file_range(0, PAGE, wait=wait)
                await file.sync_file_range(PAGE, 0, wait=wait)
                await file.sync_file_range(0, 1 << 33, wait=wait)
            with pytest.raises(ValueError, match="offset"):
                await file.sync_file_range(-1, 1)

    await in_both_ways(test)
    assert current_files().routes()["thread"] == 0


async def test_without_the_c_core_less_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with await open_positional(tmp_path / "file", "w+") as file:
            await file.fallocate(0, PAGE)
            assert await file.size() == PAGE
            assert synced == []
            await file.sync_file_range(0, PAGE)
            assert len(synced) == 1
            with pytest.raises(OSError, match="mode") as caught:
                await file.fallocate(0, PAGE, FallocateMode.PUNCH_HOLE)
            assert caught.value.errno == errno.EOPNOTSUPP

    synced: list[int] = []
    monkeypatch.setattr(_file_calls, "why_no_core", "the test says so")
    monkeypatch.setattr(os, "fdatasync", synced.append)
    await trio.to_thread.run_sync(trio.run, test)


async def test_errors_of_the_calls_for_threads(tmp_path: Path) -> None:
    async def test() -> None:
        async with await open_positional(tmp_path / "file", "w+") as file:
            for call in (
                partial(file.fallocate, 0, 0),
                partial(file.sync_file_range, 0, -1),
            ):
                with pytest.raises(OSError, match="Invalid argument"):
                    await call()

    await trio.to_thread.run_sync(trio.run, test)


# --- Copying --------------------------------------------------------------------------------


async def test_a_part_is_copied(tmp_path: Path) -> None:
    async def test() -> None:
        data = os.urandom(100_000)
        (tmp_path / "source").write_bytes(data)
        async with (
            await open_positional(tmp_path / "source", "r+") as source,
            await open_positional(tmp_path / "target", "w+") as target,
        ):
            with assert_checkpoints():
                assert await source.copy_range(1000, target, 50, 5000) == 5000
            assert await target.read_at(10_000, 0) == bytes(50) + data[1000:6000]
            assert await source.copy_range(99_000, target, 0, 5000) == 1000
            assert await source.copy_range(0, target, 0, 0) == 0
            assert await source.copy_range(0, source, 100_000, 100) == 100
            assert await source.read_at(200, 100_000) == data[:100]
            for args in ((-1, target, 0, 1), (0, target, -1, 1), (0, target, 0, -1)):
                with pytest.raises(ValueError, match="must be 0 or more"):
                    await source.copy_range(*args)
            with pytest.raises(OSError, match="Invalid argument"):
                await source.copy_range(0, source, 1, 100)
        for pair in ((source, target), (target, source)):
            with pytest.raises(trio.ClosedResourceError):
                await pair[0].copy_range(0, pair[1], 0, 1)

    await in_both_ways(test)


async def test_a_copy_can_be_cancelled_between_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_open_fd, "_COPY_MAX", 1000)
    copy, sizes = os.copy_file_range, []

    def spy(source: int, target: int, size: int, *offsets: int) -> int:
        sizes.append(copy(source, target, size, *offsets))
        if len(sizes) == 3:
            trio.from_thread.run_sync(scope.cancel)
        return sizes[-1]

    monkeypatch.setattr(os, "copy_file_range", spy)
    (tmp_path / "source").write_bytes(bytes(10_000))
    with trio.CancelScope() as scope:
        async with (
            await open_positional(tmp_path / "source") as source,
            await open_positional(tmp_path / "target", "w") as target,
        ):
            await source.copy_range(0, target, 0, 10_000)
    assert scope.cancelled_caught
    assert sizes == [1000] * 3
    assert (tmp_path / "target").stat().st_size == 3000


async def test_closing_the_target_waits_for_the_copy(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(1 << 20))
    source = await open_positional(tmp_path / "source")
    target = await open_positional(tmp_path / "target", "w")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.copy_range, 0, target, 0, 1 << 20)
        await wait_all_tasks_blocked()
        await target.aclose()
        await source.aclose()
    assert (tmp_path / "target").stat().st_size == 1 << 20


# --- Locks ----------------------------------------------------------------------------------


async def test_locks_exclude_other_open_files(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        async with (
            await open_positional(path, "w+") as first,
            await open_positional(path, "r+") as second,
        ):
            with assert_checkpoints():
                await first.lock()
            with assert_checkpoints():
                assert await first.try_lock(0, 10)  # its own lock does not exclude it
            with assert_checkpoints():
                assert not await second.try_lock(5, 1)
            assert not await second.try_lock(5, 1, shared=True)
            with assert_checkpoints():
                await first.unlock(0, 100)
            assert await second.try_lock(0, 100)
            assert not await second.try_lock(0, 101)
            await first.unlock()
            await second.unlock()
            assert await first.try_lock(shared=True)
            assert await second.try_lock(shared=True)
            assert not await second.try_lock()
            await first.aclose()
            assert await second.try_lock()
            for part in ((-1, 0), (0, -1)):
                with pytest.raises(ValueError, match="must be 0 or more"):
                    await second.lock(*part)
                with pytest.raises(ValueError, match="must be 0 or more"):
                    await second.unlock(*part)
            async with await open_positional(path) as reader:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    await reader.lock()

    await in_both_ways(test)


async def test_a_task_waits_for_a_lock(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    path = tmp_path / "file"
    async with (
        await open_positional(path, "w+") as first,
        await open_positional(path, "r+") as second,
    ):
        with trio.move_on_after(60) as scope:
            async with first.locked(), second.locked(shared=True):
                pytest.fail("both have it")
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def hold() -> None:
                async with first.locked(10, 10):
                    held.set()
                    await trio.sleep(1)

            held = trio.Event()
            nursery.start_soon(hold)
            await held.wait()
            async with second.locked(15, 1):
                assert 1 <= trio.current_time() - 60 < 1.1
        assert await second.try_lock()


async def test_a_file_that_closes_ends_the_wait_for_its_lock(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with await open_positional(tmp_path / "file", "w+") as first:
        await first.lock()
        second = await open_positional(tmp_path / "file", "r+")
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await second.lock()

            nursery.start_soon(wait)
            await trio.sleep(1)
            await second.aclose()
        await first.unlock()
        async with first.locked():
            await first.aclose()  # which unlocks it


async def test_other_errors_of_locks_are_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks left")

    async with await open_positional(tmp_path / "file", "w+") as file:
        monkeypatch.setattr(fcntl, "fcntl", refuse)
        with pytest.raises(OSError, match="no locks left"):
            await file.lock()


@pytest.mark.usefixtures("with_server")
async def test_a_server_is_asked_in_a_thread(tmp_path: Path) -> None:
    async with await open_positional(tmp_path / "file", "w+") as file:
        asked: list[object] = []
        run_sync = trio.to_thread.run_sync

        async def spy(function: Any, *args: Any) -> Any:
            asked.append(function)
            return await run_sync(function, *args)

        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(trio.to_thread, "run_sync", spy)
            for call in (file.stat, file.size, file.lock, file.unlock):
                await call()
    assert len(asked) == 4


# --- All calls ------------------------------------------------------------------------------

CALLS: dict[str, tuple[Any, ...]] = {
    "advise": (0, 0, os.POSIX_FADV_NORMAL),
    "append": (b"data",),
    "fallocate": (0, PAGE),
    "fdatasync": (),
    "fsync": (),
    "lock": (),
    "read_at": (1, 0),
    "read_exactly_at": (0, 0),
    "read_into_at": (bytearray(1), 0),
    "read_many_at": ([(1, 0)],),
    "readv_at": ([bytearray(1)], 0),
    "seek_data": (0,),
    "seek_hole": (0,),
    "size": (),
    "stat": (),
    "sync_file_range": (0, 0),
    "truncate": (0,),
    "try_lock": (),
    "unlock": (),
    "write_all_at": (b"data", 0),
    "write_at": (b"data", 0),
    "writev_at": ([b"data"], 0),
}


def test_all_calls_are_in_the_table() -> None:
    methods = {
        name for cls in PositionalFile.__mro__[:3] for name in vars(cls) if not name.startswith("_")
    }
    others = {"fileno", "closed", "dup", "locked", "copy_range", "aclose"}
    assert methods - others == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
async def test_a_call_is_a_checkpoint_and_refuses_a_closed_file(name: str, tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "file"
        async with await open_positional(path, "w+") as file:
            for _ in range(3):
                with assert_checkpoints():
                    await getattr(file, name)(*CALLS[name])
            os.truncate(path, 0)
            with trio.CancelScope() as scope:
                scope.cancel()
                await getattr(file, name)(*CALLS[name])
            assert scope.cancelled_caught
            assert path.stat().st_size == 0
        with pytest.raises(trio.ClosedResourceError):
            await getattr(file, name)(*CALLS[name])

    await in_both_ways(test)
    assert current_manager().statistics().in_flight == 0
