"""The operations on files, paths and attributes, compared with the standard library."""

from __future__ import annotations

import os
import socket
import stat
import tty
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from races import current_manager
from trio.testing import wait_all_tasks_blocked

from trio_uring import UnsupportedOpcodeError
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring.lowlevel import Operation, operations, perform as perform_operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("fd_ledger")

HELLO = b"hello, world"


async def perform(operation: Operation[T]) -> T:
    """Perform *operation*. Skip the test if the kernel does not support it."""
    try:
        return await perform_operation(operation)
    except UnsupportedOpcodeError as exc:
        pytest.skip(str(exc))


async def fails_alike(
    operation: Operation[object], function: Callable[..., object], *args: object, **kwargs: object
) -> None:
    """Check that *operation* raises the same as the standard library's *function*."""
    with pytest.raises(OSError) as expected:  # noqa: PT011
        function(*args, **kwargs)
    with pytest.raises(OSError) as actual:  # noqa: PT011
        await perform(operation)
    assert type(actual.value) is type(expected.value)
    assert str(actual.value) == str(expected.value)
    for name in ("errno", "strerror", "filename", "filename2", "args"):
        assert getattr(actual.value, name) == getattr(expected.value, name)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """Open a file that holds `HELLO`, for reading and writing."""
    path = tmp_path / "file"
    path.write_bytes(HELLO)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    fds = os.pipe()
    yield fds
    for fd in fds:
        os.close(fd)


def fill(writer: int) -> None:
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    os.set_blocking(writer, True)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """Open *tmp_path*, for relative paths to start at."""
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


# --- Reading --------------------------------------------------------------------------------


async def test_read(file: int) -> None:
    buffer = bytearray(5)
    assert await perform(operations.read(file, buffer, 7)) == 5
    assert buffer == b"world"
    assert await perform(operations.read(file, buffer, len(HELLO))) == 0
    assert await perform(operations.read(file, buffer, 0, in_worker=True)) == 5
    assert buffer == b"hello"
    assert os.lseek(file, 0, os.SEEK_CUR) == 0


async def test_read_at_the_file_position(file: int) -> None:
    buffer = bytearray(7)
    for expected in (b"hello, ", b"world", b""):
        size = await perform(operations.read(file, buffer, -1))
        assert bytes(buffer[:size]) == expected
    assert os.lseek(file, 0, os.SEEK_CUR) == len(HELLO)


async def test_read_errors(file: int, directory: int, tmp_path: Path) -> None:
    await fails_alike(operations.read(file, bytearray(1), -5), os.pread, file, 1, -5)
    directory = os.open(tmp_path, os.O_RDONLY)
    await fails_alike(operations.read(directory, bytearray(1), 0), os.pread, directory, 1, 0)
    os.close(directory)
    await fails_alike(operations.read(directory, bytearray(1), 0), os.pread, directory, 1, 0)


async def test_read_from_a_pipe_can_be_cancelled(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    buffer = bytearray(20)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.read(reader, buffer, -1))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    os.write(writer, HELLO)
    assert await perform(operations.read(reader, buffer, -1)) == len(HELLO)
    assert buffer.startswith(HELLO)


def terminal() -> tuple[int, int]:
    ends = os.openpty()
    tty.setraw(ends[1])
    return ends


def fifo(tmp_path: Path) -> tuple[int, int]:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    return reader, os.open(tmp_path / "fifo", os.O_WRONLY)


def sockets() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.mark.parametrize("kind", ["pipe", "fifo", "terminal", "sockets", "eventfd"])
async def test_what_can_block_indefinitely_can_be_cancelled(tmp_path: Path, kind: str) -> None:
    kinds: dict[str, Callable[[], tuple[int, int]]] = {
        "pipe": os.pipe,
        "fifo": partial(fifo, tmp_path),
        "terminal": terminal,
        "sockets": sockets,
        "eventfd": lambda: (os.eventfd(0), os.eventfd(0)),
    }
    reader, writer = kinds[kind]()
    buffer = bytearray(8)
    for read in (
        operations.read(reader, buffer, -1),
        operations.readv(reader, [buffer], -1),
        operations.read_select(reader, cast("Any", current_manager().buffers), 8),
    ):
        assert read.cancellable
        assert not read.limited
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, read)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert operations.write(writer, HELLO, -1).cancellable
    assert operations.writev(writer, [HELLO], -1).cancellable
    os.close(reader)
    os.close(writer)


async def test_two_tasks_may_write_to_one_pipe(pipe: tuple[int, int]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.write(pipe[1], b"1", -1))
        nursery.start_soon(perform, operations.write(pipe[1], b"1", -1))
    assert os.read(pipe[0], 3) == b"11"


async def test_what_ends_by_itself_completes_although_cancelled(tmp_path: Path, file: int) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    for fd in (file, directory, -1):
        read = operations.read(fd, bytearray(1), 0)
        assert (read.cancellable, read.limited) == (False, True)
    os.close(directory)


async def test_read_select(pipe: tuple[int, int], file: int) -> None:
    buffers = current_manager().buffers
    if buffers is None:
        pytest.skip("this kernel has no buffer rings")
    reader, writer = pipe
    os.write(writer, HELLO)
    assert await perform(operations.read_select(reader, buffers, 5)) == b"hello"
    operation = operations.read_select(file, buffers, 100, 7)
    assert await perform(operation) == b"world"


async def test_readv(file: int) -> None:
    expected = [bytearray(3), bytearray(), bytearray(20)]
    actual = [bytearray(3), bytearray(), bytearray(20)]
    size = os.preadv(file, expected, 2)
    assert await perform(operations.readv(file, actual, 2)) == size
    assert actual == expected
    assert await perform(operations.readv(file, actual, -1, in_worker=True)) == len(HELLO)


# --- Writing --------------------------------------------------------------------------------


async def test_write(file: int, tmp_path: Path) -> None:
    assert await perform(operations.write(file, memoryview(b"WORLD!"), 7)) == 6
    assert await perform(operations.write(file, b"J", -1, in_worker=True)) == 1
    assert (tmp_path / "file").read_bytes() == b"Jello, WORLD!"
    assert os.lseek(file, 0, os.SEEK_CUR) == 1


async def test_write_appends(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    await perform(operations.write(fd, b"one", 0))
    await perform(operations.write(fd, b"two", 0))
    os.close(fd)
    assert path.read_bytes() == b"onetwo"


async def test_write_errors(file: int, directory: int) -> None:
    await fails_alike(operations.write(directory, b"x", 0), os.pwrite, directory, b"x", 0)
    reader, writer = os.pipe()
    os.close(reader)
    await fails_alike(operations.write(writer, b"x", -1), os.write, writer, b"x")
    os.close(writer)


async def test_write_to_a_full_pipe_can_be_cancelled(pipe: tuple[int, int]) -> None:
    _, writer = pipe
    fill(writer)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.write(writer, b"x", -1))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


async def test_writev(file: int, tmp_path: Path) -> None:
    buffers: list[bytes | bytearray | memoryview] = [b"H", bytearray(b"E"), memoryview(b"LLO")]
    assert await perform(operations.writev(file, buffers, 0)) == 5
    assert (tmp_path / "file").read_bytes() == b"HELLO, world"
    await fails_alike(operations.writev(file, [b"x"] * 1025, 0), os.pwritev, file, [b"x"] * 1025, 0)


async def test_registered_buffers(file: int, tmp_path: Path) -> None:
    ring = current_manager().ring
    buffer = bytearray(16)
    registered = ffi.new("struct iovec[]", 1)
    registered[0].iov_base = pin = ffi.from_buffer("char[]", buffer)
    registered[0].iov_len = len(buffer)
    ring.register(RegisterOpcode.BUFFERS, registered, 1)
    with memoryview(buffer) as view, view[:5] as front, view[5:7] as back:
        assert await perform(operations.read_fixed(file, front, 7, 0)) == 5
        assert bytes(front) == b"world"
        assert await perform(operations.write_fixed(file, front, 0, 0)) == 5
        assert (tmp_path / "file").read_bytes() == b"world, world"
        with pytest.raises(OSError, match="Bad address"):
            await perform(operations.read_fixed(file, bytearray(5), 0, 0))
        back[:] = b"!!"
        assert await perform(operations.writev_fixed(file, [back, front], 12, 0)) == 7
        assert await perform(operations.readv_fixed(file, [back, front], 0, 0)) == 7
    assert buffer[:7] == b"rld, wo"
    assert (tmp_path / "file").read_bytes() == b"world, world!!world"
    ring.register(RegisterOpcode.UNREGISTER_BUFFERS, ffi.NULL, 0)
    ffi.release(pin)


# --- What else a file is for ------------------------------------------------------------------


async def test_fsync(file: int, pipe: tuple[int, int]) -> None:
    os.write(file, b"x")
    await perform(operations.fsync(file))
    await perform(operations.fsync(file, data_only=True))
    await fails_alike(operations.fsync(pipe[0]), os.fsync, pipe[0])


async def test_sync_file_range(file: int, pipe: tuple[int, int]) -> None:
    os.write(file, b"x")
    wait_before, write, wait_after = 1, 2, 4
    await perform(operations.sync_file_range(file, 0, 0, wait_before | write | wait_after))
    with pytest.raises(OSError, match="Illegal seek"):
        await perform(operations.sync_file_range(pipe[1], 0, 0, write))


async def test_fallocate(file: int) -> None:
    keep_size = 1
    await perform(operations.fallocate(file, 0, 1 << 20, keep_size))
    assert os.fstat(file).st_size == len(HELLO)
    assert os.fstat(file).st_blocks * 512 >= 1 << 20
    await perform(operations.fallocate(file, 0, 1 << 16))
    assert os.fstat(file).st_size == 1 << 16
    with pytest.raises(OSError, match="Invalid argument"):
        await perform(operations.fallocate(file, 0, -1))


async def test_fadvise(file: int, pipe: tuple[int, int]) -> None:
    await perform(operations.fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED))
    await fails_alike(
        operations.fadvise(pipe[0], 0, 0, os.POSIX_FADV_DONTNEED),
        *(os.posix_fadvise, pipe[0], 0, 0, os.POSIX_FADV_DONTNEED),
    )


async def test_ftruncate(file: int, tmp_path: Path) -> None:
    await perform(operations.ftruncate(file, 5))
    assert (tmp_path / "file").read_bytes() == b"hello"
    await perform(operations.ftruncate(file, 1 << 33))
    assert os.fstat(file).st_size == 1 << 33
    await fails_alike(operations.ftruncate(file, -1), os.ftruncate, file, -1)


async def test_splice_and_tee(file: int, pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    other_reader, other_writer = await perform(operations.pipe())
    assert await perform(operations.splice(file, writer, 100, offset_in=7)) == 5
    assert os.lseek(file, 0, os.SEEK_CUR) == 0
    assert await perform(operations.splice(file, writer, 5)) == 5
    assert os.lseek(file, 0, os.SEEK_CUR) == 5
    assert await perform(operations.tee(reader, other_writer, 100)) == 10
    assert os.read(other_reader, 100) == b"worldhello"
    assert await perform(operations.splice(reader, file, 100, offset_out=7)) == 10
    assert os.pread(file, 100, 0) == b"hello, worldhello"
    for fd in (other_reader, other_writer):
        os.close(fd)


async def test_splice_can_be_cancelled(file: int, pipe: tuple[int, int]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.splice(pipe[0], file, 100))
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


async def test_pipe() -> None:
    reader, writer = await perform(operations.pipe(os.O_NONBLOCK))
    os.write(writer, HELLO)
    assert os.read(reader, 100) == HELLO
    for fd in (reader, writer):
        assert not os.get_inheritable(fd)
        assert not os.get_blocking(fd)
        await perform(operations.close(fd))
    await fails_alike(operations.close(reader), os.close, reader)


# --- Opening --------------------------------------------------------------------------------


async def test_openat(tmp_path: Path, directory: int) -> None:
    fd = await perform(operations.openat(tmp_path / "new", os.O_WRONLY | os.O_CREAT, 0o640))
    assert not os.get_inheritable(fd)
    os.close(fd)
    os.close(os.open(tmp_path / "expected", os.O_WRONLY | os.O_CREAT, 0o640))
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "expected").stat().st_mode
    for path in ("new", b"new"):
        fd = await perform(operations.openat(path, os.O_RDONLY, dir_fd=directory))
        assert os.fstat(fd).st_ino == (tmp_path / "new").stat().st_ino
        os.close(fd)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("missing", os.O_RDONLY),
        ("", os.O_RDONLY),
        (b"file", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        ("file/below", os.O_RDONLY),
        ("file", os.O_DIRECTORY),
        ("loop", os.O_RDONLY),
        ("n" * 300, os.O_RDONLY),
        (Path("sub"), os.O_WRONLY),
        ("fifo", os.O_WRONLY | os.O_NONBLOCK),
    ],
)
async def test_openat_errors(
    name: str | bytes | Path, flags: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.chdir(tmp_path)
    await fails_alike(operations.openat(name, flags), os.open, name, flags)
    await fails_alike(operations.openat2(name, flags), os.open, name, flags)


async def test_opening_a_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    fds: list[int] = []

    async def open_side(flags: int) -> None:
        fds.append(await perform(operations.openat(path, flags, wait=True)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(open_side, os.O_RDONLY)
        await wait_all_tasks_blocked()
        assert fds == []
        nursery.start_soon(open_side, os.O_WRONLY)
    assert len(fds) == 2
    for fd in fds:
        os.close(fd)


async def test_opening_a_fifo_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    for operation in (
        operations.openat(path, os.O_WRONLY, wait=True),
        operations.openat2(path, os.O_RDONLY, wait=True),
    ):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(perform, operation)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert scope.cancelled_caught


async def test_openat2(tmp_path: Path, directory: int) -> None:
    beneath = 8  # RESOLVE_BENEATH
    (tmp_path / "out").symlink_to("..")
    flags = os.O_WRONLY | os.O_CREAT
    os.close(await perform(operations.openat2("new", flags, 0o600, beneath, dir_fd=directory)))
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    with pytest.raises(OSError, match="Invalid cross-device link: 'out'"):
        await perform(operations.openat2("out", os.O_RDONLY, resolve=beneath, dir_fd=directory))


# --- Names ----------------------------------------------------------------------------------


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


async def test_unlinkat(tmp_path: Path, directory: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "sub").mkdir()
    await fails_alike(
        operations.unlinkat("sub", dir_fd=directory), os.unlink, "sub", dir_fd=directory
    )
    await fails_alike(
        operations.unlinkat(tmp_path / "file", directory=True), os.rmdir, tmp_path / "file"
    )
    await fails_alike(operations.unlinkat(tmp_path, directory=True), os.rmdir, tmp_path)
    await perform(operations.unlinkat(tmp_path / "file"))
    await perform(operations.unlinkat("sub", dir_fd=directory, directory=True))
    assert names(tmp_path) == []


async def test_renameat(tmp_path: Path, directory: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    no_replace, exchange = 1, 2
    source.write_text("source")
    target.write_text("target")
    with pytest.raises(FileExistsError, match=r"'.*source' -> '.*target'"):
        await perform(operations.renameat(source, target, no_replace))
    await perform(
        operations.renameat(
            "source", "target", exchange, source_dir_fd=directory, target_dir_fd=directory
        )
    )
    assert (source.read_text(), target.read_text()) == ("target", "source")
    await perform(operations.renameat(source, target))
    assert names(tmp_path) == ["target"]
    assert target.read_text() == "target"
    await fails_alike(operations.renameat(source, target), os.rename, source, target)
    await fails_alike(operations.renameat(b"no", b"way"), os.rename, b"no", b"way")


async def test_mkdirat(tmp_path: Path, directory: int) -> None:
    for mode in (0o777, 0o700, 0o1755):
        expected, actual = f"expected {mode}", f"actual {mode}"
        os.mkdir(expected, mode, dir_fd=directory)
        await perform(operations.mkdirat(actual, mode, dir_fd=directory))
        modes = [(tmp_path / name).stat().st_mode for name in (expected, actual)]
        assert modes[0] == modes[1]
    await fails_alike(operations.mkdirat(tmp_path), os.mkdir, tmp_path)


async def test_symlinkat(tmp_path: Path, directory: int) -> None:
    await perform(operations.symlinkat(b"nowhere", "link", dir_fd=directory))
    assert os.readlink(tmp_path / "link") == "nowhere"
    link = tmp_path / "link"
    await fails_alike(operations.symlinkat("again", link), os.symlink, "again", link)


async def test_linkat(tmp_path: Path, directory: int) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "symlink").symlink_to("file")
    await perform(operations.linkat("symlink", tmp_path / "first", source_dir_fd=directory))
    await perform(
        operations.linkat(
            tmp_path / "symlink", "second", target_dir_fd=directory, follow_symlinks=True
        )
    )
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").samefile(tmp_path / "file")
    assert not (tmp_path / "second").is_symlink()
    await fails_alike(operations.linkat("no", b"way"), os.link, "no", b"way")


# --- Status ---------------------------------------------------------------------------------


STAT_FIELDS = [name for name in dir(os.stat_result) if name.startswith("st_")]


def same_status(actual: os.stat_result, expected: os.stat_result) -> bool:
    assert len(STAT_FIELDS) >= 16
    assert actual == expected
    for name in STAT_FIELDS:
        assert getattr(actual, name) == getattr(expected, name), name
    assert [type(value) for value in actual] == [type(value) for value in expected]
    return repr(actual) == repr(expected)


async def test_statx_of_a_file(tmp_path: Path, directory: int, file: int) -> None:
    path = tmp_path / "file"
    os.link(path, tmp_path / "second name")
    path.chmod(0o4755)
    expected = path.stat()
    for name in (path, str(path), os.fsencode(path)):
        assert same_status(await perform(operations.statx(name)), expected)
    assert same_status(await perform(operations.statx("file", dir_fd=directory)), expected)
    assert same_status(await perform(operations.statx(file)), os.fstat(file))
    assert same_status(await perform(operations.statx(directory)), os.fstat(directory))


@pytest.mark.parametrize(
    "times",
    [
        (0, 0),
        (1, -1),
        (-(10**18) - 1, 2 * 10**18 + 123456789),
        (1_700_000_000_999_999_999, 1_700_000_000_000_000_001),
    ],
)
async def test_statx_times(tmp_path: Path, times: tuple[int, int]) -> None:
    path = tmp_path / "file"
    path.touch()
    os.utime(path, ns=times)
    assert same_status(await perform(operations.statx(path)), path.stat())


def every_kind(directory: Path) -> list[Path]:
    """Make a file of each kind in *directory*. Return them, and others that the system has."""
    (directory / "directory").mkdir()
    (directory / "symlink").symlink_to("sparse")
    os.mkfifo(directory / "fifo")
    (directory / "sparse").touch()
    os.truncate(directory / "sparse", 1 << 40)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "socket"))
    others = [Path("/"), Path("/dev/null"), Path("/proc/self/exe")]
    devices = [path for path in Path("/dev").iterdir() if path.is_block_device()]
    return [*directory.iterdir(), *others, *devices]


async def test_statx_of_every_kind(tmp_path: Path) -> None:
    for path in every_kind(tmp_path):
        assert same_status(await perform(operations.statx(path)), path.stat())
        operation = operations.statx(path, follow_symlinks=False)
        assert same_status(await perform(operation), path.lstat())


async def test_statx_errors(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (tmp_path / "dangling", str(tmp_path / "missing"), b"", tmp_path / "dangling/x"):
        await fails_alike(operations.statx(path), os.stat, path)
    closed = os.open(tmp_path, os.O_PATH)
    os.close(closed)
    await fails_alike(operations.statx(closed), os.fstat, closed)


# --- Extended attributes ----------------------------------------------------------------------


@pytest.fixture
def attributes(tmp_path: Path, file: int) -> Path:
    """Give the file one extended attribute, ``user.old``."""
    path = tmp_path / "file"
    try:
        os.setxattr(path, "user.old", b"value")
    except OSError as exc:
        pytest.skip(f"no extended attributes in {tmp_path}: {exc}")
    return path


async def test_xattr(attributes: Path, file: int) -> None:
    await perform(operations.setxattr(attributes, "user.new", b"a\0b"))
    await perform(operations.fsetxattr(file, b"user.empty", bytearray()))
    assert sorted(os.listxattr(file)) == ["user.empty", "user.new", "user.old"]
    for name in os.listxattr(file):
        value = os.getxattr(file, name)
        assert await perform(operations.getxattr(attributes, name)) == value
        assert await perform(operations.fgetxattr(file, name)) == value
    large = bytes(2000)
    await perform(operations.fsetxattr(file, "user.old", large, os.XATTR_REPLACE))
    assert os.getxattr(file, "user.old") == large


async def test_xattr_errors(attributes: Path, file: int) -> None:
    path = str(attributes)
    await fails_alike(operations.getxattr(path, "user.no"), os.getxattr, path, "user.no")
    missing = Path(path + "?")
    await fails_alike(operations.getxattr(missing, "user.old"), os.getxattr, missing, "user.old")
    exists = (path, "user.old", b"", os.XATTR_CREATE)
    await fails_alike(operations.setxattr(*exists), os.setxattr, *exists)
    absent = (path, "user.no", b"", os.XATTR_REPLACE)
    await fails_alike(operations.setxattr(*absent), os.setxattr, *absent)
    with pytest.raises(OSError, match=r"No data available$"):
        await perform(operations.fgetxattr(file, "user.no"))
    with pytest.raises(FileExistsError):
        await perform(operations.fsetxattr(file, "user.old", b"", os.XATTR_CREATE))
