"""What an `Operation` pins and refuses, how it decodes results, and how it is cancelled."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trio_uring._kernel import CData, ffi
from trio_uring._operations._operation import SQE_FIELDS
from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from collections.abc import Callable

DATA = b"some data"
ROOM = bytearray(b"some room")


class Pool:
    """An example of provided buffers."""

    group = 7

    def take(self, res: int, flags: int, /) -> bytes:
        return bytes(res)


POOL = Pool()


def field(operation: Operation[object], name: str) -> object:
    """Return one field of the SQE."""
    return operation.sqe[SQE_FIELDS.index(name)]


# --- Buffers -----------------------------------------------------------------------------------


PINNING: list[Callable[[bytearray], Operation[object]]] = [
    lambda buffer: operations.recv(3, buffer),
    lambda buffer: operations.recvmsg(3, [bytearray(1), buffer]),
    lambda buffer: operations.send(3, buffer),
    lambda buffer: operations.send_zc(3, buffer),
    lambda buffer: operations.sendmsg(3, [b"", buffer]),
    lambda buffer: operations.sendmsg_zc(3, [b"", buffer]),
    lambda buffer: operations.read(3, buffer, 0),
    lambda buffer: operations.read_fixed(3, buffer, 0, 0),
    lambda buffer: operations.readv(3, [bytearray(1), buffer], 0),
    lambda buffer: operations.readv_fixed(3, [buffer], 0, 0),
    lambda buffer: operations.write(3, buffer, 0),
    lambda buffer: operations.write_fixed(3, buffer, 0, 0),
    lambda buffer: operations.writev(3, [b"", buffer], 0),
    lambda buffer: operations.writev_fixed(3, [buffer], 0, 0),
    lambda buffer: operations.setxattr("a", "user.b", buffer),
    lambda buffer: operations.fsetxattr(3, "user.b", buffer),
    lambda buffer: operations.futex_wait(buffer, 0),
    lambda buffer: operations.futex_wake(buffer),
    lambda buffer: operations.futex_waitv([(bytearray(4), 0), (buffer, 0)]),
]


@pytest.mark.parametrize("make", PINNING)
def test_buffer_is_pinned_until_release(make: Callable[[bytearray], Operation[object]]) -> None:
    buffer = bytearray(4)
    operation = make(buffer)
    with pytest.raises(BufferError):
        buffer.append(0)
    operation.release()
    buffer.append(0)
    operation.release()  # once more does no harm


def test_memory_cannot_be_unmapped_under_madvise() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    operation = operations.madvise(memory, mmap.MADV_NORMAL)
    with pytest.raises(BufferError):
        memory.close()
    operation.release()
    memory.close()


@pytest.mark.parametrize(
    "make",
    [
        operations.recv,
        lambda fd, buffer: operations.recvmsg(fd, [buffer]),
        lambda fd, buffer: operations.read(fd, buffer, 0),
        lambda fd, buffer: operations.readv(fd, [buffer], 0),
    ],
    ids=["recv", "recvmsg", "read", "readv"],
)
@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (b"read-only", BufferError),
        (memoryview(b"read-only"), BufferError),
        (memoryview(bytearray(8))[::2], BufferError),
        ("text", TypeError),
        (8, TypeError),
        (None, TypeError),
    ],
    ids=["bytes", "read-only view", "not contiguous", "str", "int", "None"],
)
def test_what_is_no_writable_buffer_is_refused(
    make: Callable[[int, object], Operation[object]], buffer: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(3, buffer)


@pytest.mark.parametrize(
    "make",
    [
        operations.send,
        lambda fd, buffer: operations.sendmsg(fd, [buffer]),
        lambda fd, buffer: operations.write(fd, buffer, 0),
        lambda fd, buffer: operations.writev(fd, [buffer], 0),
        lambda fd, buffer: operations.fsetxattr(fd, "user.a", buffer),
    ],
    ids=["send", "sendmsg", "write", "writev", "fsetxattr"],
)
@pytest.mark.parametrize(
    ("buffer", "error"),
    [
        (memoryview(bytearray(8))[::2], BufferError),
        ("text", TypeError),
        (8, TypeError),
        (None, TypeError),
    ],
    ids=["not contiguous", "str", "int", "None"],
)
def test_what_is_no_buffer_is_refused(
    make: Callable[[int, object], Operation[object]], buffer: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        make(3, buffer)


def test_sizes_beyond_what_an_sqe_can_say() -> None:
    no_reserve = 0x4000  # MAP_NORESERVE: nothing of this is ever touched
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    with mmap.mmap(-1, 5 << 30, flags=flags) as memory:
        for make in (operations.read, operations.write):
            operation = make(3, memory, 0)
            assert field(operation, "len") == 0x7FFFF000  # as read(2) and write(2)
            operation.release()
        advice = operations.madvise(memory, mmap.MADV_NORMAL)
        assert (field(advice, "len"), field(advice, "off")) == (0, 5 << 30)
        advice.release()


@pytest.mark.parametrize("size", [0, 3, 8])
def test_a_futex_has_four_bytes(size: int) -> None:
    with pytest.raises(ValueError, match=f"a futex has 4 bytes, not {size}"):
        operations.futex_wait(bytearray(size), 0)


# --- Numbers -----------------------------------------------------------------------------------


TAKING_OFFSETS: list[Callable[[int], Operation[object]]] = [
    lambda offset: operations.read(3, ROOM, offset),
    lambda offset: operations.read_select(3, POOL, 1, offset),
    lambda offset: operations.writev(3, [DATA], offset),
    lambda offset: operations.sync_file_range(3, offset, 0, 0),
    lambda offset: operations.fallocate(3, offset, 1),
    lambda offset: operations.fadvise(3, offset, 1, 0),
    lambda offset: operations.ftruncate(3, offset),
    lambda offset: operations.splice(3, 4, 1, offset_out=offset),
]


@pytest.mark.parametrize("make", TAKING_OFFSETS)
def test_offsets_have_64_bits(make: Callable[[int], Operation[object]]) -> None:
    assert field(make((1 << 63) - 1), "off") == (1 << 63) - 1
    assert field(make(-5), "off") == (1 << 64) - 5  # for the kernel to refuse
    for offset in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError, match="does not fit"):
            make(offset)


def test_an_unknown_clock_is_refused() -> None:
    with pytest.raises(ValueError, match="no timeouts on clock"):
        operations.timeout(1, clock=time.CLOCK_PROCESS_CPUTIME_ID)


# --- Paths -------------------------------------------------------------------------------------


TAKING_PATHS: list[Callable[[str], Operation[object]]] = [
    lambda path: operations.openat(path, os.O_RDONLY),
    lambda path: operations.openat2(path, os.O_RDONLY),
    operations.unlinkat,
    lambda path: operations.renameat(path, "b"),
    lambda path: operations.renameat("b", path),
    operations.mkdirat,
    lambda path: operations.symlinkat(path, "b"),
    lambda path: operations.symlinkat("b", path),
    lambda path: operations.linkat(path, "b"),
    lambda path: operations.linkat("b", path),
    operations.statx,
    lambda path: operations.getxattr(path, "user.a"),
    lambda path: operations.getxattr("b", path),
    lambda path: operations.setxattr(path, "user.a", b""),
    lambda path: operations.fgetxattr(3, path),
    lambda path: operations.fsetxattr(3, path, b""),
]


@pytest.mark.parametrize("make", TAKING_PATHS)
def test_a_path_with_a_null_byte_is_refused(make: Callable[[object], Operation[object]]) -> None:
    for path in ("a\0b", b"a\0b", Path("a\0b")):
        with pytest.raises(ValueError, match=r"^embedded null byte$"):
            make(path)


@pytest.mark.parametrize("make", TAKING_PATHS)
def test_what_is_no_path_is_refused(make: Callable[[object], Operation[object]]) -> None:
    for path in (1.5, None, bytearray(b"a"), ["a"]):
        with pytest.raises(TypeError):
            make(path)


@pytest.mark.parametrize("make", TAKING_PATHS)
def test_a_path_that_is_no_unicode_is_encoded_as_os_fsencode_does(
    make: Callable[[object], Operation[object]],
) -> None:
    # As os.fsencode: such names come from os.listdir and must lead back to their files.
    operation = make("\udcff")
    assert operation.filename in ("\udcff", "b", None)
    addresses = [field(operation, name) for name in ("off", "addr3")]
    assert b"\xff" in (field(operation, "addr"), *map(byte_at, addresses))


def byte_at(address: object) -> bytes:
    assert isinstance(address, int)
    return ffi.buffer(ffi.cast("char *", address), 1)[:] if address else b""


@pytest.mark.parametrize(
    ("operation", "filename", "filename2"),
    [
        (operations.openat("a", 0), "a", None),
        (operations.openat2(Path("a"), 0), "a", None),
        (operations.unlinkat(b"a"), b"a", None),
        (operations.renameat("a", b"b"), "a", b"b"),
        (operations.mkdirat("a"), "a", None),
        (operations.symlinkat("a", Path("b")), "a", "b"),
        (operations.linkat("a", "b"), "a", "b"),
        (operations.statx(""), "", None),
        (operations.statx(3), None, None),
        (operations.getxattr("a", "user.b"), "a", None),
        (operations.setxattr("a", "user.b", b""), "a", None),
        (operations.fgetxattr(3, "user.b"), None, None),
        (operations.read(3, ROOM, 0), None, None),
    ],
)
def test_filenames_for_errors(
    operation: Operation[object], filename: str | bytes | None, filename2: str | bytes | None
) -> None:
    assert (operation.filename, operation.filename2) == (filename, filename2)


# --- Results -----------------------------------------------------------------------------------


def written(operation: Operation[object], content: bytes) -> object:
    """Return the result of *operation* if the kernel writes *content* and completes it."""
    pin = operation.pins[0]
    assert isinstance(pin, CData)
    ffi.buffer(pin)[: len(content)] = content
    return operation.decode(0, 0)


def test_waitid_results() -> None:
    info = struct.pack("@iii0PiIi", 17, 0, os.CLD_EXITED, 123, 1000, 7)
    status = written(operations.waitid(os.P_ALL, 0, os.WEXITED), info)
    assert status == operations.ChildStatus(pid=123, uid=1000, code=os.CLD_EXITED, status=7)
    assert written(operations.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG), bytes(128)) is None


def test_files_update_results() -> None:
    assert operations.files_update([5, 6, 7], 2).decode(2, 0) == [2, 3]
    assert written(operations.files_update([5, 6]), struct.pack("=ii", 8, 9)) == []
    operation = operations.files_update([5, 6])
    written(operation, struct.pack("=ii", 8, 9))
    assert operation.decode(2, 0) == [8, 9]


def test_what_comes_when_no_task_is_there_is_closed() -> None:
    reader, writer = os.pipe()
    operation = operations.pipe()
    written(operation, struct.pack("=ii", reader, writer))
    assert operation.discard is not None
    operation.discard(0)
    for fd in (reader, writer):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    for other in (operations.openat("a", 0), operations.openat2("a", 0)):
        assert other.discard is os.close


# --- What cancelling means ---------------------------------------------------------------------


def test_regular_files_are_waited_for_within_a_bound() -> None:
    file = os.open(__file__, os.O_RDONLY)
    for operation in (
        operations.read(file, ROOM, 0),
        operations.readv(file, [ROOM], 0),
        operations.read_select(file, POOL, 1, 0),
        operations.read_select(-1, POOL, 1, 0, cancellable=False),
        operations.read_fixed(file, ROOM, 0, 0),
        operations.write(file, DATA, 0),
        operations.writev(file, [DATA], 0),
        operations.fsync(3),
        operations.statx("a"),
        operations.unlinkat("a"),
    ):
        assert (operation.cancellable, operation.limited) == (False, True)
        assert operation.exclusive is None
    os.close(file)


@pytest.mark.parametrize(
    ("operation", "exclusive"),
    [
        (operations.read(3, ROOM, -1, cancellable=True), "read"),
        (operations.readv(3, [ROOM], -1, cancellable=True), "read"),
        (operations.read_select(3, POOL, 1, cancellable=True), "read"),
        (operations.write(3, DATA, -1, cancellable=True), "write"),
        (operations.writev(3, [DATA], -1, cancellable=True), "write"),
    ],
)
def test_what_can_wait_for_ever_takes_no_place(
    operation: Operation[object], exclusive: str
) -> None:
    assert (operation.cancellable, operation.limited) == (True, False)
    assert operation.exclusive == exclusive


def test_opens_can_be_cancelled_within_the_bound() -> None:
    for operation in (operations.openat("fifo", 0, wait=True), operations.openat2("fifo", 0)):
        assert (operation.cancellable, operation.limited) == (True, True)


def test_what_is_no_fd_is_not_taken_for_one() -> None:
    # Closing fd 2 must not end a wait for a futex, whose flags happen to be 2.
    assert not operations.futex_wait(bytearray(4), 0).acts_on_fd
    assert not operations.futex_waitv([(bytearray(4), 0)]).acts_on_fd
    assert not operations.waitid(os.P_PID, 3, os.WEXITED).acts_on_fd
    assert operations.waitid(os.P_PIDFD, 3, os.WEXITED).acts_on_fd
