"""Files on the ring: the bridge, locks, errors, large transfers, and calls in threads."""

from __future__ import annotations

import contextvars
import errno
import fcntl
import gc
import io
import os
import resource
import signal
import stat
import sys
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from races import current_files, current_manager, failing_sqe, file_size_limit
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import _files
from trio_uring._engine import _file_systems
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring._files import _bridge, _hooks, _paths, _raw, _routes
from trio_uring._files._bridge import POOL_MAX
from trio_uring._files._open import open_file
from trio_uring._files._raw import RingFileIO
from trio_uring._kernel.uapi import Opcode, SqeFlag
from trio_uring.lowlevel import RingStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio_uring.lowlevel import Operation

pytestmark = pytest.mark.usefixtures("fd_ledger")


def statistics() -> RingStatistics:
    found = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


def routes() -> dict[str, int]:
    return dict(statistics().routes)


class Operations:
    """Records every operation that starts, and makes some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[Operation[Any]] = []
        self.errors: dict[int, int] = {}
        push = Ring.push

        def recording(ring: Ring, operation: Operation[Any], user_data: int) -> bool:
            self.started.append(operation)
            sqe = operation.sqe
            if operation.opcode in self.errors:
                operation.sqe = failing_sqe(self.errors.pop(operation.opcode))
            try:
                return push(ring, operation, user_data)
            finally:
                operation.sqe = sqe

        monkeypatch.setattr(Ring, "push", recording)

    def of(self, opcode: Opcode) -> list[Operation[Any]]:
        return [operation for operation in self.started if operation.opcode == opcode]


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Operations:
    return Operations(monkeypatch)


def hit_of(method: Any) -> Any:
    """Return what *method* of a file tries first, before it uses a bridge."""
    return method.__self__.hit


@pytest.fixture
def nowait_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every transfer use the ring, as on a file system without RWF_NOWAIT."""
    monkeypatch.setattr(RingFileIO, "_nowait_read", False)
    monkeypatch.setattr(RingFileIO, "nowait_write", False)


# --- Files as users know them ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rb", "r", "r+b", "r+", "ab", "a+", "wb", "w+"])
async def test_a_file_is_pythons_own_over_our_raw_layer(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    with path.open(mode) as expected:
        async with await trio.open_file(path, mode) as file:
            assert type(file.wrapped) is type(expected)
            assert (file.name, file.mode) == (expected.name, expected.mode)
            buffered = file.buffer if isinstance(expected, io.TextIOWrapper) else file
            assert type(buffered.raw) is RingFileIO
            assert isinstance(buffered.raw, io.FileIO)
            assert not os.get_inheritable(file.fileno())
    assert file.closed


async def test_an_unbuffered_file_is_the_raw_layer_itself(tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "w+b", buffering=0) as file:
        assert type(file.wrapped) is RingFileIO
        assert await file.write(b"0123456789") == 10
        await file.seek(2)
        assert await file.read(3) == b"234"
        assert await file.readall() == b"56789"
        assert await file.truncate(4) == 4
        assert await file.truncate() == 10
        await file.seek(0)
        assert await file.read() == b"0123" + bytes(6)
        buffer = bytearray(4)
        await file.seek(0)
        assert await file.readinto(buffer) == 4


async def test_nothing_goes_to_a_thread(tmp_path: Path) -> None:
    path = trio.Path(tmp_path, "file")
    async with await path.open("w") as file:
        await file.writelines(["one\n", "two\n"])
        await file.flush()
    async with await trio.open_file(path) as file:
        assert [line async for line in file] == ["one\n", "two\n"]
        await file.seek(0)
        assert await file.readlines() == ["one\n", "two\n"]
    assert await path.read_text() == "one\ntwo\n"
    assert await path.write_bytes(b"bytes") == 5
    assert await path.read_bytes() == b"bytes"
    assert (await path.stat()).st_size == 5
    assert await path.exists()
    assert await path.is_file()
    assert not await path.is_dir()
    assert not await path.is_symlink()
    link = path.with_name("link")
    await link.symlink_to(path)
    assert await link.is_symlink()
    assert stat.S_ISLNK((await link.lstat()).st_mode)
    await path.with_name("hard").hardlink_to(path)
    moved = await path.rename(path.with_name("moved"))
    assert type(moved) is trio.PosixPath
    await (await moved.replace(path)).unlink()
    await path.unlink(missing_ok=True)
    directory = trio.Path(tmp_path, "a", "b")
    await directory.mkdir(parents=True)
    await directory.mkdir(exist_ok=True)
    await directory.rmdir()
    assert routes()["thread"] == 0
    assert routes()["ring"] > 0


async def test_what_has_no_operation_goes_to_a_thread(tmp_path: Path) -> None:
    path = trio.Path(tmp_path, "file")
    await path.touch()
    await path.chmod(0o600)
    assert [found.name for found in await trio.Path(tmp_path).iterdir()] == ["file"]
    assert routes()["thread"] == 3


async def test_a_foreign_file_stays_on_threads() -> None:
    file = trio.wrap_file(io.BytesIO(b"foreign"))
    assert await file.read() == b"foreign"
    await file.aclose()
    assert routes() == {"ring": 0, "inline": 0, "thread": 2}


async def test_files_may_be_left_to_trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_manager(), "disabled", frozenset(["files"]))
    async with await trio.open_file(tmp_path / "file", "wb") as file:
        assert type(file.raw) is io.FileIO


async def test_without_bridges_all_goes_to_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (_bridge, _routes, _hooks):
        monkeypatch.setattr(module, "BRIDGE_REFUSED", "files: for a test")
    async with await trio.open_file(tmp_path / "file", "wb") as file:
        assert type(file.raw) is io.FileIO
        await file.write(b"bytes")
    assert routes()["thread"] == 3
    assert "files: for a test" in statistics().refused


def test_a_file_outlives_the_run_it_was_opened_in(tmp_path: Path) -> None:
    async def open_and_write() -> Any:
        file = await trio.open_file(tmp_path / "file", "w+")
        await file.write("in a run\n")
        return file

    file = trio_uring.run(open_and_write)
    file.wrapped.write("outside\n")

    async def read() -> str:
        await file.seek(0)
        text: str = await file.read()
        await file.aclose()
        return text

    assert trio.run(read) == "in a run\noutside\n"


async def test_a_file_works_synchronously_and_in_threads(tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "w+b") as file:
        file.wrapped.write(b"synchronous")
        file.wrapped.seek(0)
        assert await trio.to_thread.run_sync(file.wrapped.read) == b"synchronous"


async def test_an_opener_runs_in_a_thread_and_the_file_is_ours(tmp_path: Path) -> None:
    opened: list[object] = []

    def opener(path: str, flags: int) -> int:
        opened.append(path)
        with pytest.raises(RuntimeError):
            trio.lowlevel.current_task()
        return os.open(path, flags)

    path = str(tmp_path / "file")
    async with await trio.open_file(path, "wb", opener=opener) as file:
        assert type(file.raw) is RingFileIO
    assert opened == [path]


async def test_an_fd_is_opened_and_kept_open_if_asked(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    async with await trio.open_file(fd, "w+", closefd=False) as file:
        await file.write("text")
    assert os.pread(fd, 10, 0) == b"text"
    await (await trio.open_file(fd, "rb")).aclose()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


async def test_a_closing_file_warns_when_it_is_forgotten(tmp_path: Path) -> None:
    file = await trio.open_file(tmp_path / "file", "wb")
    with pytest.warns(ResourceWarning, match="unclosed file"):  # noqa: PT031 (either may)
        del file
        gc.collect()


async def test_offsets_beyond_4_gib(tmp_path: Path, nowait_refused: None) -> None:
    far = 5 << 30
    async with await trio.open_file(tmp_path / "sparse", "w+b") as file:
        await file.seek(far)
        await file.write(b"far away")
        await file.seek(far - 2)
        assert await file.read() == b"\0\0far away"
        assert await file.tell() == far + 8


async def test_proc_and_tmpfs() -> None:
    expected = Path("/proc/self/cmdline").read_bytes()
    assert await trio.Path("/proc/self/cmdline").read_bytes() == expected
    assert "VmRSS" in await trio.Path("/proc/self/status").read_text()
    assert len(await trio.Path("/proc/kallsyms").read_bytes()) > 1 << 20


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a tmpfs."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = Path(directory)
        assert file_system_at(path) is FileSystem.MEMORY
        yield path


def file_system_at(path: Path | str) -> FileSystem:
    fd = os.open(path, os.O_PATH)
    try:
        return file_system_of(fd)
    finally:
        os.close(fd)


async def test_what_is_memory_is_not_waited_for(in_memory: Path, operations: Operations) -> None:
    path = trio.Path(in_memory, "file")
    await path.write_bytes(b"x" * 100_000)
    assert await path.read_bytes() == b"x" * 100_000
    async with await trio.open_file(path, "a+b") as file:
        await file.write(b"appended")
        await file.seek(-10, os.SEEK_END)
        assert await file.read() == b"xxappended"
        await file.seek(0)
        assert len(await file.read(100_008)) == 100_008
    assert (await path.stat()).st_size == 100_008
    assert not operations.of(Opcode.READ) + operations.of(Opcode.WRITE)
    assert len(operations.of(Opcode.STATX)) <= 1
    large = b"y" * (1 << 20)
    await path.write_bytes(large)
    assert await path.read_bytes() == large
    assert operations.of(Opcode.READ)
    assert operations.of(Opcode.WRITE)


def refuse(_fd: int, _buffers: object, _offset: int, flags: int) -> int:
    assert flags, "this would wait"
    raise OSError(errno.EOPNOTSUPP, "cannot tell")


@pytest.mark.parametrize("plain", [True, False])
async def test_a_pipe_is_waited_for_wherever_it_is(
    in_memory: Path, operations: Operations, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """Also if the kernel cannot tell whether it would wait, as for files in memory."""
    path = in_memory / "file"
    if plain:
        path.write_bytes(b"data")
        monkeypatch.setattr(_raw, "file_system_of", lambda _fd: FileSystem.DISK)
    else:
        os.mkfifo(path)
    monkeypatch.setattr(os, "preadv", refuse)
    monkeypatch.setattr(os, "pwritev", refuse)
    async with await trio.open_file(path, "r+b", buffering=0) as file:
        assert await file.write(b"more") == 4
        await wait_all_tasks_blocked()
        assert await file.read(4) == (b"" if plain else b"more")
    assert len(operations.of(Opcode.READ)) == len(operations.of(Opcode.WRITE)) == 1


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the cache of mounts."""
    monkeypatch.setattr(_file_systems, "known", {})


def test_a_lock_does_not_hide_the_file_system(tmp_path: Path, nothing_known: None) -> None:
    """The kernel lists the locks where it says which mount a file is in."""
    path = tmp_path / "file"
    with path.open("w") as file:
        expected = file_system_of(file.fileno())
        _file_systems.known.clear()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert file_system_of(file.fileno()) is expected


def test_the_mount_says_what_a_file_system_needs(
    tmp_path: Path, in_memory: Path, nothing_known: None
) -> None:
    assert file_system_at("/proc/self/status") is FileSystem.KERNEL
    assert file_system_at(in_memory) is FileSystem.MEMORY
    first, second = os.pipe()
    memory = os.memfd_create("test")
    kinds = [file_system_of(fd) for fd in (first, memory, -1)]
    assert kinds == [FileSystem.KERNEL, FileSystem.MEMORY, FileSystem.SERVER]
    for fd in (first, second, memory):
        os.close(fd)


@pytest.mark.parametrize("mounts", ["", "{id} 1 0:99 / / rw - fuse.sshfs host: rw\n"])
def test_what_is_not_known_may_have_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_known: None, mounts: str
) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    for name in ("fdinfo", "fd"):
        (tmp_path / name).mkdir()
    (tmp_path / "fdinfo" / str(fd)).write_text("pos:\t0\nmnt_id:\t77\n")
    (tmp_path / "mountinfo").write_text(mounts.format(id=77))
    (tmp_path / "fd" / str(fd)).symlink_to(tmp_path)
    monkeypatch.setattr(_file_systems, "_PROC", tmp_path)
    assert file_system_of(fd) is FileSystem.SERVER
    os.close(fd)


def test_what_is_known_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_known: None
) -> None:
    monkeypatch.setattr(_file_systems, "_KNOWN_MAX", 1)
    for path in ("/proc/self/status", "/dev/shm", "/proc/self/status"):
        file_system_at(path)
        assert len(_file_systems.known) == 1


async def test_a_status_that_is_cached_needs_no_operation(
    tmp_path: Path, operations: Operations
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", 0o600 | stat.S_IFSOCK)
    (tmp_path / "secret").touch(mode=0)
    names = ["file", "link", "directory", "directory/", "directory/../file", "fifo", "socket"]
    for name in [*names, "secret", "dangling"]:
        path = tmp_path / name
        if name != "dangling":
            assert every_field(await trio.Path(path).stat()) == every_field(path.stat())
        assert every_field(await trio.Path(path).lstat()) == every_field(path.lstat())
    # What others rename or mount may put the kernel off, now and then.
    assert len(operations.of(Opcode.STATX)) < len(names)
    assert routes()["thread"] == 0
    assert not [fd for fd in os.listdir("/proc/self/fd") if fd_is_below(int(fd), tmp_path)]


def every_field(status: os.stat_result) -> dict[str, float]:
    return {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}


def fd_is_below(fd: int, path: Path) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith(str(path))
    except FileNotFoundError:  # the listing's own
        return False


@pytest.mark.usefixtures("no_native_paths")
@pytest.mark.parametrize("path", ["/proc/self/status", "/dev/pts", "/sys/kernel"])
async def test_a_status_that_a_server_might_know_is_asked_for(
    path: str, operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_paths, "find_cached", lambda *_args: -errno.EAGAIN)
    status = await trio.Path(path).stat()
    assert (status.st_ino, status.st_mode) == (os.stat(path).st_ino, os.stat(path).st_mode)
    assert len(operations.of(Opcode.STATX)) == 1


@pytest.mark.parametrize("size", [0, 1, 16383, 16384, 16385, 65536, 65537, 65538, 300_000, 3 << 20])
@pytest.mark.parametrize("nowait", [True, False])
async def test_reading_all(
    tmp_path: Path, size: int, nowait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RingFileIO, "_nowait_read", nowait)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    async with await trio.open_file(tmp_path / "file", "rb") as file:
        assert await file.read() == data
        assert await file.read() == b""
    assert await trio.Path(tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("hit_budget", [0, 4])
async def test_an_error_takes_nothing_with_it(
    tmp_path: Path, operations: Operations, monkeypatch: pytest.MonkeyPatch, hit_budget: int
) -> None:
    """The bytes before it are the result. The next read gets the error again."""
    (tmp_path / "file").write_bytes(b"0123456789")
    preadv = os.preadv

    def failing(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        if os.lseek(fd, 0, os.SEEK_CUR):
            raise OSError(errno.EIO, "broken")
        return preadv(fd, [buffers[0][:4]], offset, flags)

    async with await trio.open_file(tmp_path / "file", "rb", buffering=0) as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            operations.errors[Opcode.READ] = errno.EIO
            hit_of(file.read).budget = hit_budget
            assert await file.read(8) == b"0123"
            hit_of(file.read).budget = 0
            with pytest.raises(OSError, match="broken"):
                await file.read(8)
        assert await file.read() == b"456789"


async def test_a_failed_seek_makes_no_stream_of_a_file(
    tmp_path: Path, operations: Operations, nowait_refused: None
) -> None:
    """Although `io.FileIO` takes the file for a stream if its first seek fails."""
    async with await trio.open_file(tmp_path / "file", "w+b", buffering=0) as file:
        with pytest.raises(OSError, match="Invalid argument"):
            await file.seek(-3)
        assert not file.seekable()
        assert await file.write(b"data") == 4
        assert await file.tell() == 4
    [write] = operations.of(Opcode.WRITE)
    assert write.sqe[4] == 0  # where to, and not "at the file's position"


async def test_what_cannot_be_read_says_so_whatever_the_buffer(tmp_path: Path) -> None:
    buffers = [bytearray(4), memoryview(bytearray(4)), bytearray(), memoryview(bytearray())]
    async with await trio.open_file(tmp_path / "file", "wb", buffering=0) as file:
        for buffer in buffers:
            with pytest.raises(io.UnsupportedOperation):
                await file.readinto(buffer)
    for buffer in buffers:
        with pytest.raises(ValueError, match="closed file"):
            await file.readinto(buffer)


async def test_a_local_file_is_closed_at_once(tmp_path: Path, operations: Operations) -> None:
    async with await trio.open_file(tmp_path / "file", "wb") as file:
        await file.write(b"data")
    assert not operations.of(Opcode.CLOSE)
    assert routes()["thread"] == 0
    assert (tmp_path / "file").read_bytes() == b"data"


async def test_large_transfers_are_copied_by_workers(
    tmp_path: Path, operations: Operations
) -> None:
    data = os.urandom(1 << 20)
    async with await trio.open_file(tmp_path / "file", "w+b") as file:
        await file.write(data)
        await file.seek(0)
        assert await file.read(1 << 20) == data
        assert routes()["thread"] == 0
    for opcode in (Opcode.WRITE, Opcode.READ):
        [large] = [operation for operation in operations.of(opcode) if operation.sqe[6] > 1 << 18]
        assert large.sqe[1] & SqeFlag.ASYNC
    # The last close of what was written much to may take long.
    assert routes()["thread"] == 1


def is_open_for_writing(path: Path) -> bool:
    """Return whether the file is open for writing, so that, for example, it cannot be executed."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize("how", ["buffered", "raw", "path", "positional", "write_file"])
async def test_a_closed_file_is_let_go(tmp_path: Path, size: int, how: str) -> None:
    path, data = tmp_path / "file", bytes(size)
    for _ in range(20):
        if how == "path":
            await trio.Path(path).write_bytes(data)
        elif how == "write_file":
            await trio_uring.write_file(path, data)
        elif how == "positional":
            async with await trio_uring.open_positional(path, "w") as positional:
                await positional.write_at(data, 0)
        else:
            buffering = 0 if how == "raw" else -1
            async with await trio.open_file(path, "wb", buffering) as file:
                await file.write(data)
        assert not is_open_for_writing(path)


@pytest.mark.parametrize("mode", ["rb", "r+b"])
async def test_operations_that_have_ended_let_a_closed_file_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowait_refused: None, mode: str
) -> None:
    (tmp_path / "file").write_bytes(b"data")
    flush = Ring.flush
    closed: list[bool] = []

    def flush_when_closed(ring: Ring) -> None:
        fds = os.listdir("/proc/self/fd")
        closed.append(not any(fd_is_below(int(fd), tmp_path) for fd in fds))
        flush(ring)

    monkeypatch.setattr(Ring, "flush", flush_when_closed)
    async with await trio.open_file(tmp_path / "file", mode, buffering=0) as file:
        await file.read(4)
    async with await trio_uring.open_positional(tmp_path / "file") as positional:
        await positional.read_at(4, 0)
    assert closed == [True, True]


async def test_large_texts_are_decoded_in_threads(tmp_path: Path) -> None:
    text = "line\n" * 300_000
    path = trio.Path(tmp_path, "file")
    await path.write_text(text)
    assert routes()["thread"] == 1
    assert await path.read_text() == text
    assert routes()["thread"] == 2
    async with await trio.open_file(path) as file:
        assert await file.read() == text
        await file.seek(0)
        assert len(await file.readlines()) == 300_000
        assert routes()["thread"] == 4
        await file.seek(0)
        assert await file.readline() == "line\n"
        assert routes()["thread"] == 4


async def test_a_long_call_lets_others_run(tmp_path: Path, operations: Operations) -> None:
    (tmp_path / "file").write_bytes(b"x" * (1 << 20) + b"\n")
    async with await trio.open_file(tmp_path / "file", "rb") as file:
        operations.started.clear()
        assert len(await file.readline()) == (1 << 20) + 1
    # After each 256 KiB from the page cache it takes its turn on the ring.
    assert 3 <= len(operations.of(Opcode.READ)) <= 5


async def test_an_old_kernel_truncates_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = UringIOManager.perform_shielded

    async def refusing(manager: UringIOManager, operation: Operation[Any]) -> Any:
        if operation.opcode == Opcode.FTRUNCATE:
            raise trio_uring.UnsupportedOpcodeError(errno.EOPNOTSUPP, "not here")
        return await perform(manager, operation)

    monkeypatch.setattr(UringIOManager, "perform_shielded", refusing)
    async with await trio.open_file(tmp_path / "file", "wb") as file:
        assert await file.truncate(100) == 100
    assert (tmp_path / "file").stat().st_size == 100
    assert routes()["thread"] == 1


@pytest.mark.parametrize("mode", ["rb", "r"])
async def test_methods_can_be_taken_in_a_thread(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\ntwo\n")
    async with await trio.open_file(path, mode) as file:
        line = await trio.to_thread.run_sync(lambda: trio.from_thread.run(file.readline))
        assert line in {b"one\n", "one\n"}
        assert await file.readline() in {b"two\n", "two\n"}


# --- The bridge -----------------------------------------------------------------------------


async def test_a_call_runs_in_a_copy_of_the_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("the task's")

    def call() -> str:
        seen = variable.get()
        variable.set("changed")
        return seen

    assert await current_files().call(call) == "the task's"
    assert variable.get() == "the task's"


async def test_exceptions_keep_their_context() -> None:
    def call() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904 (the context is what is tested)

    with pytest.raises(ValueError, match="outer") as caught:
        await current_files().call(call)
    assert isinstance(caught.value.__context__, KeyError)


@pytest.mark.usefixtures("no_native_paths")
async def test_bridges_are_pooled_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        _paths, "find_cached", lambda *_args: -errno.EAGAIN
    )  # so that the call waits
    path = trio.Path("/proc/self")
    files = current_files()
    for _ in range(5):
        await path.stat()
    assert len(files.idle) == 1
    async with trio.open_nursery() as nursery:
        for _ in range(POOL_MAX + 20):
            nursery.start_soon(path.stat)
    assert len(files.idle) == POOL_MAX


def test_ctrl_c_waits_for_the_call_to_end() -> None:
    seen: list[str] = []

    def call() -> None:
        signal.raise_signal(signal.SIGINT)
        seen.append("not interrupted")

    async def main() -> None:
        await current_files().call(call)
        seen.append("after the call")
        await trio.lowlevel.checkpoint()
        seen.append("never")

    with pytest.raises(KeyboardInterrupt):
        trio_uring.run(main)
    assert seen[0] == "not interrupted"
    assert "never" not in seen


async def test_another_file_inside_a_call_blocks_as_always(
    tmp_path: Path, operations: Operations, nowait_refused: None
) -> None:
    (tmp_path / "file").write_bytes(b"other")
    other = await trio.open_file(tmp_path / "file", "r+b")
    operations.started.clear()

    def finaliser() -> bytes:
        data: bytes = other.wrapped.read()
        other.wrapped.close()
        return data

    assert await current_files().call(finaliser) == b"other"
    assert operations.started == []


async def test_a_cancelled_task_does_not_begin(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await trio.open_file(tmp_path / "file", "wb")
    assert scope.cancelled_caught
    assert not (tmp_path / "file").exists()


async def test_every_call_is_a_checkpoint(tmp_path: Path) -> None:
    file = await trio.open_file(tmp_path / "file", "w+b")
    for call in (
        partial(file.write, b"bytes"),
        partial(file.seek, 0),
        file.tell,
        partial(file.read, 1),
        partial(file.read, 0),
        file.flush,
        trio.Path(tmp_path).stat,
        file.aclose,
        file.aclose,
    ):
        with trio.testing.assert_checkpoints():
            await call()


async def test_a_file_closes_even_if_cancelled(tmp_path: Path) -> None:
    file = await trio.open_file(tmp_path / "file", "wb")
    await file.write(b"kept")
    with trio.CancelScope() as scope:
        scope.cancel()
        await file.aclose()
    assert scope.cancelled_caught
    assert file.closed
    assert (tmp_path / "file").read_bytes() == b"kept"


async def test_an_abandoned_call_is_leaked(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    raw = RingFileIO(read_end, "r", closefd=False)
    leaked = len(_bridge._leaked)
    call = current_files().call(raw.read, (1,), raw)
    call.send(None)  # it waits in the kernel
    call.close()  # as when a crashed run is collected
    assert len(_bridge._leaked) == leaked + 1
    os.write(write_end, b"x")
    while statistics().in_flight:
        await trio.lowlevel.checkpoint()
    os.close(read_end)
    os.close(write_end)


# --- One task at a time ---------------------------------------------------------------------


async def test_tasks_take_turns_in_a_file(nowait_refused: None) -> None:
    read_end, write_end = os.pipe()
    lines: list[bytes] = []

    async with await trio.open_file(read_end, "rb") as file:

        async def read_line() -> None:
            lines.append(await file.readline())

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read_line)
                await wait_all_tasks_blocked()
            with trio.CancelScope() as scope:  # one that waits in line may leave it
                scope.cancel()
                await file.readline()
            os.write(write_end, b"one\ntw")
            await wait_all_tasks_blocked()
            assert lines == [b"one\n"]
            os.write(write_end, b"o\nthree\n")
    assert lines == [b"one\n", b"two\n", b"three\n"]
    os.close(write_end)


async def test_a_task_in_line_can_be_cancelled() -> None:
    read_end, write_end = os.pipe()
    async with await trio.open_file(read_end, "rb") as file, trio.open_nursery() as nursery:
        nursery.start_soon(file.readline)
        await wait_all_tasks_blocked()
        scopes = [trio.CancelScope() for _ in range(2)]

        async def in_line(scope: trio.CancelScope, call: Callable[[], Any]) -> None:
            with scope:
                await call()

        nursery.start_soon(in_line, scopes[0], file.readline)
        nursery.start_soon(in_line, scopes[1], file.tell)
        await wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert all(scope.cancelled_caught for scope in scopes)
        os.write(write_end, b"\n")
    os.close(write_end)


# --- Errors ---------------------------------------------------------------------------------


def facts(exc: OSError) -> tuple[object, ...]:
    return type(exc), exc.errno, exc.strerror, exc.filename, exc.filename2, str(exc)


ERRORS: list[tuple[str, str, str]] = [
    ("missing", "rb", "no such file"),
    ("missing/below", "wb", "no such directory"),
    ("file/below", "rb", "not a directory"),
    (".", "rb", "a directory"),
    (".", "wb", "a directory to write"),
    ("file", "xb", "exists"),
    ("loop", "rb", "too many links"),
    ("x" * 300, "rb", "a long name"),
    ("socket", "rb", "a socket"),
]


@pytest.mark.parametrize(("name", "mode"), [row[:2] for row in ERRORS], ids=[r[2] for r in ERRORS])
async def test_errors_of_open(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mknod(tmp_path / "socket", 0o600 | stat.S_IFSOCK)
    path = str(tmp_path / name)
    with pytest.raises(OSError) as expected:  # noqa: PT011 (whichever it is)
        open(path, mode)  # noqa: SIM115
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await trio.open_file(path, mode)
    assert facts(caught.value) == facts(expected.value)
    if mode == "rb":
        with pytest.raises(OSError) as caught:  # noqa: PT011
            await trio.Path(path).read_bytes()
        assert facts(caught.value) == facts(expected.value)


async def test_too_many_open_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as expected:
            open(path)  # noqa: SIM115
        with pytest.raises(OSError, match="Too many open files") as caught:
            await trio.open_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert facts(caught.value) == facts(expected.value)


async def test_a_file_closes_with_no_fd_to_spare(tmp_path: Path) -> None:
    file = await trio.open_file(tmp_path / "file", "wb")
    await file.write(b"x" * (1 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        await file.aclose()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert file.closed


async def test_a_file_that_grows_too_big(tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "wb", buffering=0) as file:
        with file_size_limit(4096):
            assert await file.write(bytes(5000)) == 4096
            with pytest.raises(OSError, match="File too large") as caught:
                await file.write(b"more")
            assert caught.value.errno == errno.EFBIG
            with pytest.raises(OSError, match="File too large"):
                await file.truncate(10_000)


@pytest.mark.parametrize("mode", ["wb", "ab"])
async def test_the_signal_of_a_file_that_grows_too_big_arrives(tmp_path: Path, mode: str) -> None:
    arrived: list[int] = []
    before = signal.signal(signal.SIGXFSZ, lambda number, _frame: arrived.append(number))
    try:
        async with await trio.open_file(tmp_path / "file", mode, buffering=0) as file:
            await file.write(bytes(4096))
            with file_size_limit(4096):
                with pytest.raises(OSError, match="File too large"):
                    await file.write(b"more")
                with pytest.raises(OSError, match="File too large"):
                    await file.truncate(4097)
                with pytest.raises(OSError, match="File too large"):
                    await _hooks.run_sync(os.ftruncate, file.fileno(), 4097)
        assert arrived == [signal.SIGXFSZ] * 3
    finally:
        signal.signal(signal.SIGXFSZ, before)


async def test_an_append_is_one_write(tmp_path: Path, operations: Operations) -> None:
    # The kernel's own attempt without waiting could write a part, and others append behind that.
    async with await trio.open_file(tmp_path / "file", "ab", buffering=0) as file:
        await file.write(b"a line\n")
    [write] = operations.of(Opcode.WRITE)
    assert write.sqe[1] & SqeFlag.ASYNC


@pytest.mark.parametrize("kind", ["wb", "w"])
async def test_a_full_disk_loses_nothing_that_io_would_keep(kind: str) -> None:
    data = b"kept" if kind == "wb" else "kept"
    with open("/dev/full", kind) as expected:
        expected.write(data)
        with pytest.raises(OSError, match="No space left") as theirs:
            expected.flush()
        file = await trio.open_file("/dev/full", kind)
        await file.write(data)
        for _ in range(2):  # it is still there to be written, and still cannot be
            with pytest.raises(OSError, match="No space left") as ours:
                await file.flush()
            assert facts(ours.value) == facts(theirs.value)
        with pytest.raises(OSError, match="No space left"):
            await file.aclose()
        assert file.closed
        with pytest.raises(OSError, match="No space left"):
            expected.close()


@pytest.mark.parametrize(
    ("opcode", "code"),
    [
        (Opcode.READ, errno.EIO),
        (Opcode.READ, errno.EINTR),
        (Opcode.WRITE, errno.ENOSPC),
        (Opcode.WRITE, errno.EDQUOT),
        (Opcode.WRITE, errno.EIO),
        (Opcode.WRITE, errno.EINTR),
    ],
    ids=str,
)
async def test_errors_of_transfers(
    tmp_path: Path,
    operations: Operations,
    nowait_refused: None,
    opcode: Opcode,
    code: int,
) -> None:
    file = await trio.open_file(tmp_path / "file", "w+b")
    operations.errors[opcode] = code
    met: int | None = None
    try:
        await file.write(b"data")
        await file.flush()
        await file.seek(0)
        assert await file.read() == b"data"
        await file.aclose()
    except OSError as exc:
        met = exc.errno
    assert met == (None if code == errno.EINTR else code)
    await file.aclose()
    assert file.closed
    assert (tmp_path / "file").read_bytes() == b"data"


@pytest.mark.parametrize(
    "make",
    [
        lambda path: partial(path.stat),
        lambda path: partial(path.unlink),
        lambda path: partial(path.rmdir),
        lambda path: partial((path / "below").mkdir),
        lambda path: partial(path.rename, path.with_name("target")),
        lambda path: partial(path.hardlink_to, path.with_name("target")),
        lambda path: partial((path / "below").symlink_to, "target"),
        lambda path: partial(path.read_text),
        lambda path: partial(path.read_bytes),
        lambda path: partial(path.lstat),
    ],
)
async def test_errors_of_paths(tmp_path: Path, make: Callable[[Any], Callable[[], Any]]) -> None:
    with pytest.raises(OSError) as expected:  # noqa: PT011
        make(tmp_path / "missing")()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await make(trio.Path(tmp_path / "missing"))()
    assert facts(caught.value) == facts(expected.value)
    assert routes()["thread"] == 0


# --- Audit events ---------------------------------------------------------------------------

_events: list[tuple[str, tuple[Any, ...]]] = []
_listening = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _listening and (event == "open" or event.startswith("os.")):
        _events.append((event, args))


@contextmanager
def audited() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    global _listening
    if not _events:
        sys.addaudithook(_hook)
    _events.clear()
    _listening = True
    heard: list[tuple[str, tuple[Any, ...]]] = []
    try:
        yield heard
    finally:
        _listening = False
        heard += _events
        _events[:] = [("one, so that the hook is added once", ())]


async def test_audit_events_are_those_of_the_standard_library(tmp_path: Path) -> None:
    def exercise(path: Any) -> Iterator[Callable[[], Any]]:
        below = path / "below"
        yield partial(below.mkdir, 0o700)
        yield partial((below / "file").write_text, "text")
        yield partial((below / "file").read_bytes)
        yield partial((below / "link").symlink_to, "file")
        yield partial((below / "hard").hardlink_to, below / "file")
        yield partial((below / "hard").rename, below / "moved")
        yield partial((below / "moved").replace, below / "again")
        for name in ("file", "link", "again"):
            yield partial((below / name).unlink)
        yield partial(below.rmdir)

    with audited() as expected:
        for call in exercise(tmp_path):
            call()
    with audited() as heard:
        for call in exercise(trio.Path(tmp_path)):
            await call()
    assert heard == expected
    assert routes()["thread"] == 0


# --- The route table ------------------------------------------------------------------------


async def test_only_exact_matches_are_routed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MyPath(type(tmp_path)):  # type: ignore[misc]
        pass

    route = partial(_files.route, current_files())
    assert route(os.stat, (str(tmp_path),)) is not None
    assert route(os.stat, (tmp_path,)) is not None
    assert route(partial(os.stat, str(tmp_path), follow_symlinks=False)) is not None
    assert route(tmp_path.stat) is not None
    assert route(partial(tmp_path.mkdir, exist_ok=True)) is not None
    assert route(open, (str(tmp_path / "file"), "w")) is not None
    for function, args in (
        (MyPath(tmp_path).stat, ()),
        (os.stat, (MyPath(tmp_path),)),
        (os.stat, ("a\0b",)),
        (os.stat, ()),
        (os.stat, (str(tmp_path), 5)),
        (partial(os.stat, str(tmp_path), dir_fd=3), ()),
        (os.unlink, (5,)),
        (open, (str(tmp_path), "rw")),
        (open, (str(tmp_path), "r", -1, "no such codec")),
        (open, (str(tmp_path), "r", -1, "idna")),
        (open, (str(tmp_path), "r", -1, None, "my error handler")),
        (open, ()),
        (partial(open, str(tmp_path), nonsense=1), ()),
        (tmp_path.iterdir, ()),
        (tmp_path.touch, ()),
        (partial(tmp_path.rename, 5), ()),
        (partial(tmp_path.mkdir, "mode"), ()),
        (partial(tmp_path.mkdir, nonsense=True), ()),
        (partial(tmp_path.write_text, "x" * (2 << 20)), ()),
        (io.BytesIO().read, ()),
        (len, ((),)),
        (lambda: None, ()),
        (print, ()),
    ):
        assert route(function, args) is None, (function, args)
    monkeypatch.setattr(os, "stat", lambda *_args, **_keywords: None)
    assert route(tmp_path.stat) is None
    assert route(os.stat, (str(tmp_path),)) is None


async def test_functions_of_os(tmp_path: Path) -> None:
    async def call(function: Callable[..., Any], *args: Any) -> Any:
        steps = _files.route(current_files(), function, args)
        assert steps is not None
        return await steps()

    path, other = str(tmp_path / "file"), bytes(tmp_path / "other")
    file = await call(open, path, "w+b")
    assert type(file.raw) is RingFileIO
    await call(file.write, b"0123456789")
    await call(file.flush)
    assert await call(os.fstat, file.fileno()) == os.stat(path)
    assert await call(os.stat, file.fileno()) == os.stat(path)
    await call(os.ftruncate, file.fileno(), 4)
    await call(os.fsync, file.fileno())
    await call(os.fdatasync, file.fileno())
    assert await call(os.stat, path) == os.stat(path)
    assert await call(os.lstat, path) == os.lstat(path)
    await call(file.close)
    await call(os.rename, os.fsencode(path), other)
    await call(os.symlink, b"file", other + b"-link")
    await call(os.link, other, other + b"-hard")
    await call(os.replace, other, other + b"-hard")
    await call(os.unlink, other + b"-link")
    await call(os.remove, other)
    await call(os.remove, other + b"-hard")
    await call(os.mkdir, other, 0o700)
    await call(os.rmdir, other)
    assert list(tmp_path.iterdir()) == []
    assert routes()["thread"] == 0


async def test_pathlib_paths_are_pathlib_paths(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    steps = _files.route(current_files(), (tmp_path / "file").rename, (tmp_path / "moved",))
    assert steps is not None
    moved = await steps()
    assert type(moved) is type(tmp_path)
    assert moved == tmp_path / "moved"


def test_open_file_elsewhere_is_open(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="line buffering"):
        file = open_file(str(tmp_path / "file"), "wb", 1)
    with file:
        file.write(b"blocking")
    with pytest.raises(LookupError):
        open_file(str(tmp_path / "file"), encoding="no such codec")
    assert (tmp_path / "file").read_bytes() == b"blocking"
