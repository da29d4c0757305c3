"""`write_file` has the same results and errors as `open`, `os.write` and `os.close`."""

from __future__ import annotations

import array
import errno
import os
import resource
import signal
import stat
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from races import current_manager
from transfers import completed
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, write_file
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring._files import _write_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fd_ledger")

FIXED_FILES: Final = 64
OPCODES: Final = ("OPENAT", "WRITE", "FSYNC", "CLOSE")


def counts() -> dict[str, int]:
    return {name: completed(name) for name in OPCODES}


def check_fixed_files() -> None:
    """Check that all fixed files are free and empty."""
    fixed = current_manager().run_state.get(_write_file._FixedFiles, current_manager())
    assert fixed.free is not None
    assert sorted(fixed.free) == list(range(FIXED_FILES))
    assert fixed.limiter.available_tokens == FIXED_FILES


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


# ---- Writing -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 300_000])
@pytest.mark.parametrize("sync", [False, True])
async def test_a_file_is_created_and_replaced(tmp_path: Path, size: int, sync: bool) -> None:
    path = tmp_path / "file"
    before = counts()
    for data in (os.urandom(size), os.urandom(size // 2)):
        assert await write_file(path, data, sync=sync) == len(data)
        assert path.read_bytes() == data
    made = {name: count - before[name] for name, count in counts().items()}
    assert made == {"OPENAT": 2, "WRITE": 2, "CLOSE": 2, "FSYNC": 2 if sync else 0}
    check_fixed_files()


async def test_it_is_one_submission(tmp_path: Path) -> None:
    await write_file(tmp_path / "file", b"data")  # which makes the table of fixed files
    before = current_manager().ring.submitted
    await write_file(tmp_path / "file", b"data")
    assert current_manager().ring.submitted - before == 3


@pytest.mark.parametrize(
    "data",
    [bytearray(b"data"), memoryview(b"data"), memoryview(b"xxdataxx")[2:6], array.array("H", [7])],
    ids=["bytearray", "memoryview", "slice", "array"],
)
async def test_any_buffer_will_do(tmp_path: Path, data: Any) -> None:
    expected = bytes(data)
    assert await write_file(str(tmp_path / "file").encode(), data) == len(expected)
    assert (tmp_path / "file").read_bytes() == expected
    if isinstance(data, bytearray):
        data += b"let go"


@pytest.mark.parametrize("data", ["text", memoryview(b"abcd")[::2], 5])
async def test_what_is_no_buffer_is_refused(tmp_path: Path, data: Any) -> None:
    with pytest.raises(TypeError):
        await write_file(tmp_path / "file", data)
    assert not (tmp_path / "file").exists()


async def test_permissions_are_less_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        await write_file(tmp_path / "default", b"")
        await write_file(tmp_path / "all", b"", permissions=0o777)
        await write_file(tmp_path / "all", b"", permissions=0o600)  # it exists
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "default").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "all").stat().st_mode) == 0o750


async def test_many_files_can_be_written_at_once(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(4 * FIXED_FILES):
            nursery.start_soon(write_file, tmp_path / str(number), b"%d" % number)
    for number in range(4 * FIXED_FILES):
        assert (tmp_path / str(number)).read_bytes() == b"%d" % number
    check_fixed_files()


async def test_it_needs_no_fd(tmp_path: Path) -> None:
    await write_file(tmp_path / "file", b"old")
    highest = os.dup(0)
    os.close(highest)
    with limited(resource.RLIMIT_NOFILE, highest):
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(0)
        await write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


# ---- Errors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing/below", "file/below", ".", "loop", "x" * 300])
async def test_errors_are_those_of_open(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = str(tmp_path / name)
    with pytest.raises(OSError) as expected:  # noqa: PT011 (whichever it is)
        open(path, "wb")  # noqa: SIM115
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await write_file(path, b"data")
    assert type(caught.value) is type(expected.value)
    assert caught.value.args == expected.value.args
    assert caught.value.filename == path
    check_fixed_files()


async def test_a_zero_in_the_path_is_refused() -> None:
    with pytest.raises(ValueError, match="null byte"):
        await write_file("a\0b", b"data")
    check_fixed_files()


async def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device or address") as caught:
        await write_file(tmp_path / "fifo", b"data")
    assert caught.value.errno == errno.ENXIO
    check_fixed_files()


@pytest.mark.parametrize("sync", [False, True])
async def test_what_fits_is_written_and_then_it_fails(tmp_path: Path, sync: bool) -> None:
    data = os.urandom(10_000)
    arrived: list[int] = []
    before = signal.signal(signal.SIGXFSZ, lambda number, _frame: arrived.append(number))
    try:
        with (
            limited(resource.RLIMIT_FSIZE, 5000),
            pytest.raises(OSError, match="File too large") as caught,
        ):
            await write_file(tmp_path / "file", data, sync=sync)
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.errno == errno.EFBIG
    assert arrived == [signal.SIGXFSZ]
    assert (tmp_path / "file").read_bytes() == data[:5000]
    check_fixed_files()


@pytest.mark.parametrize("sync", [False, True])
async def test_a_short_write_is_gone_on_with(
    tmp_path: Path, sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write can be short although the disk has room, for example because of a signal."""
    limits = [5000]
    perform = UringIOManager.perform_shielded

    async def with_room(manager: UringIOManager, operation: Any) -> Any:
        if limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            limits.clear()
        return await perform(manager, operation)

    monkeypatch.setattr(UringIOManager, "perform_shielded", with_room)
    data = os.urandom(10_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    syncs = completed("FSYNC")
    with limited(resource.RLIMIT_FSIZE, limits[0]):
        assert await write_file(tmp_path / "file", data, sync=sync) == len(data)
    assert (tmp_path / "file").read_bytes() == data
    assert not limits
    assert completed("FSYNC") - syncs == 2 * sync  # the one of the chain was not begun
    check_fixed_files()


async def test_an_error_of_the_flush_is_raised() -> None:
    with pytest.raises(OSError, match="Invalid argument") as caught:
        await write_file("/dev/null", b"data", sync=True)
    assert caught.value.errno == errno.EINVAL
    check_fixed_files()


# ---- Cancellation --------------------------------------------------------------------------


async def test_cancelled_before_nothing_is_done(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await write_file(tmp_path / "file", b"data")
    assert scope.cancelled_caught
    assert not (tmp_path / "file").exists()


async def test_cancelled_in_line_nothing_is_done(tmp_path: Path) -> None:
    manager = current_manager()
    await write_file(tmp_path / "first", b"")
    fixed = manager.run_state.get(_write_file._FixedFiles, manager)
    assert fixed.free is not None
    for limit in (fixed.limiter, manager.file_limiter):
        count = limit.available_tokens
        await limit.acquire_many(count)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write_file, tmp_path / "file", b"data")
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught
        limit.release_many(count)
    assert not (tmp_path / "file").exists()
    check_fixed_files()


async def test_cancelled_once_begun_it_is_done(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    written: list[int] = []

    async def write() -> None:
        written.append(await write_file(tmp_path / "file", data, sync=True))

    await write_file(tmp_path / "file", b"old")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            while not current_manager().statistics().in_flight:
                await trio.lowlevel.checkpoint()
            scope.cancel()
    assert written == [len(data)]
    assert (tmp_path / "file").read_bytes() == data
    check_fixed_files()


# ---- Where there is no table ---------------------------------------------------------------


def written_in_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    threads: list[int] = []
    synchronously = _write_file._write_synchronously

    def recording(*args: Any) -> int:
        threads.append(threading.get_ident())
        return synchronously(*args)

    monkeypatch.setattr(_write_file, "_write_synchronously", recording)

    async def main() -> None:
        data = os.urandom(10_000)
        for sync in (False, True):
            written = await write_file(tmp_path / "file", data, permissions=0o600, sync=sync)
            assert written == len(data)
            assert (tmp_path / "file").read_bytes() == data
        with pytest.raises(FileNotFoundError) as caught:
            await write_file(tmp_path / "missing" / "file", data)
        assert caught.value.filename == str(tmp_path / "missing" / "file")
        assert len(threads) == 3
        assert threading.get_ident() not in threads

    return main


def test_without_a_ring_it_writes_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio.run(written_in_thread(tmp_path, monkeypatch))


def test_a_ring_too_small_for_a_chain_writes_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = RingConfig(max_file_operations=2, require=True)
    trio_uring.run(written_in_thread(tmp_path, monkeypatch), ring=ring)


def test_a_kernel_without_fixed_files_writes_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register = Ring.register

    def refusing(ring: Ring, opcode: int, argument: object, count: int) -> int:
        if opcode == _write_file.RegisterOpcode.FILES2:
            raise OSError(errno.EINVAL, "not here")
        return register(ring, opcode, argument, count)

    monkeypatch.setattr(Ring, "register", refusing)
    write = written_in_thread(tmp_path, monkeypatch)

    async def main() -> None:
        await write()
        refused = current_manager().statistics().refused
        assert any(step.startswith("REGISTER_FILES2") for step in refused)

    trio_uring.run(main, ring=RingConfig(require=True))
