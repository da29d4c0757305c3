"""The SQE of every operation, field by field, as liburing's io_uring_prep_*() sets it."""

from __future__ import annotations

import ast
import inspect
import mmap
import os
import platform
import select
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import (
    AcceptFlag,
    CancelFlag,
    FsyncFlag,
    Futex2Flag,
    MsgRingCommand,
    Opcode,
    RecvSendFlag,
    SqeFlag,
    TimeoutFlag,
)
from trio_uring._operations._operation import SQE_FIELDS
from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from typing_extensions import Buffer


class At:
    """An address at which *content* is in memory."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __eq__(self, address: object) -> bool:
        if isinstance(address, bytes):
            return address == self.content
        assert isinstance(address, int)
        return ffi.buffer(ffi.cast("char *", address), len(self.content))[:] == self.content

    def __repr__(self) -> str:
        return f"At({self.content!r})"

    __hash__ = None  # type: ignore[assignment]


class Pool:
    """An example of provided buffers."""

    group = 7

    def take(self, res: int, flags: int, /) -> bytes:
        return bytes(res)


def address(buffer: Buffer) -> int:
    """Return the address of *buffer*."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer("char[]", buffer)))


def vectors(*buffers: bytes | bytearray) -> At:
    """Return a ``struct iovec`` for each of *buffers*."""
    return At(b"".join(struct.pack("@PN", address(b), len(b)) for b in buffers))


POOL = Pool()
DATA = b"some data"
ROOM = bytearray(b"some room")
MEMORY = mmap.mmap(-1, 3 * mmap.PAGESIZE)
FUTEX = memoryview(MEMORY)[:4]
U64 = 1 << 64

AT_FDCWD = -100  # these from fcntl.h
AT_REMOVEDIR = 0x200
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_NO_AUTOMOUNT = 0x800
AT_EMPTY_PATH = 0x1000
STATX_DIOALIGN = 0x2000
STATX_BASIC_STATS = 0x7FF  # linux/stat.h
CLOEXEC = os.O_CLOEXEC
PRIVATE_FUTEX = Futex2Flag.SIZE_U32 | Futex2Flag.PRIVATE
EPOLL_EVENT = struct.Struct("=IQ" if platform.machine() == "x86_64" else "@IQ")

# fmt: off
SQES = [
    # (operation, the SQE fields that differ from zero)
    (operations.nop(), {"opcode": Opcode.NOP, "fd": -1}),
    (operations.async_cancel(5), {"opcode": Opcode.ASYNC_CANCEL, "fd": -1, "addr": 5}),
    (operations.async_cancel_any(),
     {"opcode": Opcode.ASYNC_CANCEL, "fd": -1, "op_flags": CancelFlag.ANY | CancelFlag.ALL}),
    (operations.poll_add(3, select.POLLIN),
     {"opcode": Opcode.POLL_ADD, "fd": 3, "op_flags": select.POLLIN}),
    (operations.close(3), {"opcode": Opcode.CLOSE, "fd": 3}),
    (operations.timeout(2_000_000_003),
     {"opcode": Opcode.TIMEOUT, "fd": -1, "addr": struct.pack("=qq", 2, 3), "len": 1}),
    (operations.timeout(0, absolute=True, clock=time.CLOCK_REALTIME),
     {"opcode": Opcode.TIMEOUT, "fd": -1, "addr": bytes(16), "len": 1,
      "op_flags": TimeoutFlag.ABS | TimeoutFlag.REALTIME}),
    (operations.timeout(0, clock=time.CLOCK_BOOTTIME),
     {"opcode": Opcode.TIMEOUT, "fd": -1, "addr": bytes(16), "len": 1,
      "op_flags": TimeoutFlag.BOOTTIME}),
    (operations.timeout(0, clock=time.CLOCK_MONOTONIC),
     {"opcode": Opcode.TIMEOUT, "fd": -1, "addr": bytes(16), "len": 1}),
    (operations.msg_ring(3, 9, -2),
     {"opcode": Opcode.MSG_RING, "fd": 3, "off": 9, "len": (1 << 32) - 2}),
    (operations.msg_ring_fd(3, 4, 9, 5),
     {"opcode": Opcode.MSG_RING, "fd": 3, "addr": MsgRingCommand.SEND_FD, "off": 9,
      "splice_fd_in": 6, "addr3": 4}),  # file_index, which counts from 1
    (operations.msg_ring_fd(3, 4, 9),
     {"opcode": Opcode.MSG_RING, "fd": 3, "addr": MsgRingCommand.SEND_FD, "off": 9,
      "splice_fd_in": -1, "addr3": 4}),  # file_index: IORING_FILE_INDEX_ALLOC
    (operations.files_update([5, -1], 2),
     {"opcode": Opcode.FILES_UPDATE, "fd": -1, "addr": At(struct.pack("=ii", 5, -1)), "len": 2,
      "off": 2}),
    (operations.files_update([5]),
     {"opcode": Opcode.FILES_UPDATE, "fd": -1, "addr": At(struct.pack("=i", 5)), "len": 1,
      "off": 0xFFFFFFFF}),
    (operations.fixed_fd_install(2),
     {"opcode": Opcode.FIXED_FD_INSTALL, "fd": 2, "sqe_flags": SqeFlag.FIXED_FILE}),
    # --- Sockets
    (operations.socket(socket.AF_INET, socket.SOCK_STREAM, 6),
     {"opcode": Opcode.SOCKET, "fd": socket.AF_INET, "off": socket.SOCK_STREAM, "len": 6}),
    (operations.bind(3, b"sockaddr"),
     {"opcode": Opcode.BIND, "fd": 3, "addr": b"sockaddr", "off": 8}),
    (operations.listen(3, 10), {"opcode": Opcode.LISTEN, "fd": 3, "len": 10}),
    (operations.accept(3),
     {"opcode": Opcode.ACCEPT, "fd": 3, "addr": At(bytes(128)), "off": At(struct.pack("@I", 128)),
      "op_flags": socket.SOCK_CLOEXEC}),
    (operations.accept_multishot(3, print),
     {"opcode": Opcode.ACCEPT, "fd": 3, "op_flags": socket.SOCK_CLOEXEC,
      "ioprio": AcceptFlag.MULTISHOT}),
    (operations.connect(3, b"sockaddr"),
     {"opcode": Opcode.CONNECT, "fd": 3, "addr": b"sockaddr", "off": 8}),
    (operations.shutdown(3, socket.SHUT_WR),
     {"opcode": Opcode.SHUTDOWN, "fd": 3, "len": socket.SHUT_WR}),
    (operations.recv(3, ROOM, socket.MSG_PEEK),
     {"opcode": Opcode.RECV, "fd": 3, "addr": address(ROOM), "len": 9,
      "op_flags": socket.MSG_PEEK}),
    (operations.recv_select(3, POOL, 100, poll_first=True),
     {"opcode": Opcode.RECV, "fd": 3, "len": 100, "sqe_flags": SqeFlag.BUFFER_SELECT,
      "ioprio": RecvSendFlag.POLL_FIRST, "buf_index": 7}),
    (operations.recv_once(3, POOL, 100),
     {"opcode": Opcode.RECV, "fd": 3, "len": 100, "sqe_flags": SqeFlag.BUFFER_SELECT,
      "ioprio": RecvSendFlag.MULTISHOT, "buf_index": 7, "splice_fd_in": 1}),
    (operations.recv_multishot(3, POOL, print, socket.MSG_PEEK),
     {"opcode": Opcode.RECV, "fd": 3, "op_flags": socket.MSG_PEEK,
      "sqe_flags": SqeFlag.BUFFER_SELECT, "ioprio": RecvSendFlag.MULTISHOT, "buf_index": 7}),
    (operations.send(3, DATA, socket.MSG_DONTWAIT),
     {"opcode": Opcode.SEND, "fd": 3, "addr": DATA, "len": 9,
      "op_flags": socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL}),
    (operations.send_zc(3, DATA),
     {"opcode": Opcode.SEND_ZC, "fd": 3, "addr": DATA, "len": 9, "op_flags": socket.MSG_NOSIGNAL}),
    (operations.send_zc(3, DATA, on_copied=print),
     {"opcode": Opcode.SEND_ZC, "fd": 3, "addr": DATA, "len": 9, "op_flags": socket.MSG_NOSIGNAL,
      "ioprio": RecvSendFlag.ZC_REPORT_USAGE}),
    (operations.sendmsg(3, [DATA], [], 0, b"sockaddr"),
     {"opcode": Opcode.SENDMSG, "fd": 3, "addr": At(b""), "len": 1,
      "op_flags": socket.MSG_NOSIGNAL}),
    (operations.sendmsg_zc(3, [DATA]),
     {"opcode": Opcode.SENDMSG_ZC, "fd": 3, "addr": At(b""), "len": 1,
      "op_flags": socket.MSG_NOSIGNAL}),
    (operations.recvmsg(3, [ROOM], 64, socket.MSG_PEEK),
     {"opcode": Opcode.RECVMSG, "fd": 3, "addr": At(b""), "len": 1, "op_flags": socket.MSG_PEEK}),
    (operations.recvmsg_select(3, POOL, 100),
     {"opcode": Opcode.RECVMSG, "fd": 3, "addr": At(b""), "len": 1,
      "sqe_flags": SqeFlag.BUFFER_SELECT, "buf_index": 7}),
    # --- Open files
    (operations.read(3, ROOM, 1 << 40),
     {"opcode": Opcode.READ, "fd": 3, "addr": address(ROOM), "len": 9, "off": 1 << 40}),
    (operations.read(3, ROOM, -1, os.RWF_NOWAIT, cancellable=False, in_worker=True),
     {"opcode": Opcode.READ, "fd": 3, "addr": address(ROOM), "len": 9, "off": U64 - 1,
      "op_flags": os.RWF_NOWAIT, "sqe_flags": SqeFlag.ASYNC}),
    (operations.read_select(3, POOL, 100),
     {"opcode": Opcode.READ, "fd": 3, "len": 100, "off": U64 - 1,
      "sqe_flags": SqeFlag.BUFFER_SELECT, "buf_index": 7}),
    (operations.readv(3, [ROOM, ROOM], 8, cancellable=False, in_worker=True),
     {"opcode": Opcode.READV, "fd": 3, "addr": vectors(ROOM, ROOM), "len": 2, "off": 8,
      "sqe_flags": SqeFlag.ASYNC}),
    (operations.read_fixed(3, ROOM, 8, 2),
     {"opcode": Opcode.READ_FIXED, "fd": 3, "addr": address(ROOM), "len": 9, "off": 8,
      "buf_index": 2}),
    (operations.readv_fixed(3, [ROOM], 8, 2, os.RWF_HIPRI),
     {"opcode": Opcode.READV_FIXED, "fd": 3, "addr": vectors(ROOM), "len": 1, "off": 8,
      "op_flags": os.RWF_HIPRI, "buf_index": 2}),
    (operations.write(3, DATA, 8, os.RWF_DSYNC),
     {"opcode": Opcode.WRITE, "fd": 3, "addr": DATA, "len": 9, "off": 8, "op_flags": os.RWF_DSYNC}),
    (operations.writev(3, [DATA, ROOM], -1),
     {"opcode": Opcode.WRITEV, "fd": 3, "addr": vectors(DATA, ROOM), "len": 2, "off": U64 - 1}),
    (operations.write_fixed(3, ROOM, 8, 2),
     {"opcode": Opcode.WRITE_FIXED, "fd": 3, "addr": address(ROOM), "len": 9, "off": 8,
      "buf_index": 2}),
    (operations.writev_fixed(3, [ROOM], 8, 2),
     {"opcode": Opcode.WRITEV_FIXED, "fd": 3, "addr": vectors(ROOM), "len": 1, "off": 8,
      "buf_index": 2}),
    (operations.fsync(3), {"opcode": Opcode.FSYNC, "fd": 3}),
    (operations.fsync(3, data_only=True),
     {"opcode": Opcode.FSYNC, "fd": 3, "op_flags": FsyncFlag.DATASYNC}),
    (operations.sync_file_range(3, 8, 100, 2),
     {"opcode": Opcode.SYNC_FILE_RANGE, "fd": 3, "off": 8, "len": 100, "op_flags": 2}),
    (operations.fallocate(3, 8, 1 << 40, 1),
     {"opcode": Opcode.FALLOCATE, "fd": 3, "off": 8, "addr": 1 << 40, "len": 1}),
    (operations.fadvise(3, 8, 100, os.POSIX_FADV_WILLNEED),
     {"opcode": Opcode.FADVISE, "fd": 3, "off": 8, "len": 100, "op_flags": os.POSIX_FADV_WILLNEED}),
    (operations.fadvise(3, 0, 1 << 40, os.POSIX_FADV_WILLNEED),
     {"opcode": Opcode.FADVISE, "fd": 3, "addr": 1 << 40, "op_flags": os.POSIX_FADV_WILLNEED}),
    (operations.ftruncate(3, 1 << 40), {"opcode": Opcode.FTRUNCATE, "fd": 3, "off": 1 << 40}),
    (operations.splice(3, 4, 100, offset_out=8, flags=os.SPLICE_F_MORE),
     {"opcode": Opcode.SPLICE, "fd": 4, "off": 8, "addr": U64 - 1, "len": 100,
      "op_flags": os.SPLICE_F_MORE, "splice_fd_in": 3}),  # addr is splice_off_in
    (operations.tee(3, 4, 100), {"opcode": Opcode.TEE, "fd": 4, "len": 100, "splice_fd_in": 3}),
    (operations.pipe(os.O_NONBLOCK),
     {"opcode": Opcode.PIPE, "addr": At(struct.pack("=ii", -1, -1)),
      "op_flags": os.O_NONBLOCK | CLOEXEC}),
    # --- Paths
    (operations.openat("a", os.O_RDONLY),
     {"opcode": Opcode.OPENAT, "fd": AT_FDCWD, "addr": b"a", "len": 0o777,
      "op_flags": os.O_RDONLY | CLOEXEC}),
    (operations.openat(Path("a"), os.O_WRONLY, 0o600, dir_fd=3, wait=True),
     {"opcode": Opcode.OPENAT, "fd": 3, "addr": b"a", "len": 0o600,
      "op_flags": os.O_WRONLY | CLOEXEC, "sqe_flags": SqeFlag.ASYNC}),
    (operations.openat2("ü", os.O_CREAT, 0o600, 8, wait=True),
     {"opcode": Opcode.OPENAT2, "fd": AT_FDCWD, "addr": "ü".encode(),
      "off": At(struct.pack("=QQQ", os.O_CREAT | CLOEXEC, 0o600, 8)), "len": 24,
      "sqe_flags": SqeFlag.ASYNC}),
    (operations.unlinkat(b"a"), {"opcode": Opcode.UNLINKAT, "fd": AT_FDCWD, "addr": b"a"}),
    (operations.unlinkat("a", dir_fd=3, directory=True),
     {"opcode": Opcode.UNLINKAT, "fd": 3, "addr": b"a", "op_flags": AT_REMOVEDIR}),
    (operations.renameat("a", "b", 1),
     {"opcode": Opcode.RENAMEAT, "fd": AT_FDCWD, "addr": b"a", "off": At(b"b\0"),
      "len": (1 << 32) + AT_FDCWD, "op_flags": 1}),
    (operations.mkdirat("a", 0o700, dir_fd=3),
     {"opcode": Opcode.MKDIRAT, "fd": 3, "addr": b"a", "len": 0o700}),
    (operations.symlinkat("a", "b", dir_fd=3),
     {"opcode": Opcode.SYMLINKAT, "fd": 3, "addr": b"a", "off": At(b"b\0")}),
    (operations.linkat("a", "b", source_dir_fd=3, target_dir_fd=4, follow_symlinks=True),
     {"opcode": Opcode.LINKAT, "fd": 3, "addr": b"a", "off": At(b"b\0"), "len": 4,
      "op_flags": AT_SYMLINK_FOLLOW}),
    (operations.statx("a", dir_fd=3, follow_symlinks=False),
     {"opcode": Opcode.STATX, "fd": 3, "addr": b"a", "off": At(bytes(256)),
      "len": STATX_BASIC_STATS, "op_flags": AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT}),
    (operations.statx(3),
     {"opcode": Opcode.STATX, "fd": 3, "addr": b"", "off": At(bytes(256)), "len": STATX_BASIC_STATS,
      "op_flags": AT_EMPTY_PATH | AT_NO_AUTOMOUNT}),
    (operations.statx_alignment(3),
     {"opcode": Opcode.STATX, "fd": 3, "addr": b"", "off": At(bytes(256)), "len": STATX_DIOALIGN,
      "op_flags": AT_EMPTY_PATH | AT_NO_AUTOMOUNT}),
    (operations.getxattr("a", "user.b"),
     {"opcode": Opcode.GETXATTR, "addr": b"user.b", "off": At(bytes(65536)), "len": 65536,
      "addr3": At(b"a\0")}),
    (operations.fgetxattr(3, "user.b"),
     {"opcode": Opcode.FGETXATTR, "fd": 3, "addr": b"user.b", "off": At(bytes(65536)),
      "len": 65536}),
    (operations.setxattr("a", "user.b", DATA, os.XATTR_CREATE),
     {"opcode": Opcode.SETXATTR, "addr": b"user.b", "off": At(DATA), "len": 9,
      "op_flags": os.XATTR_CREATE, "addr3": At(b"a\0")}),
    (operations.fsetxattr(3, b"user.b", DATA, os.XATTR_REPLACE),
     {"opcode": Opcode.FSETXATTR, "fd": 3, "addr": b"user.b", "off": At(DATA), "len": 9,
      "op_flags": os.XATTR_REPLACE}),
    # --- Memory, futexes, processes, epoll
    (operations.madvise(MEMORY, mmap.MADV_WILLNEED, mmap.PAGESIZE, 100),
     {"opcode": Opcode.MADVISE, "fd": -1, "addr": address(MEMORY) + mmap.PAGESIZE, "len": 100,
      "op_flags": mmap.MADV_WILLNEED}),
    (operations.madvise(MEMORY, mmap.MADV_WILLNEED),
     {"opcode": Opcode.MADVISE, "fd": -1, "addr": address(MEMORY), "len": 3 * mmap.PAGESIZE,
      "op_flags": mmap.MADV_WILLNEED}),
    (operations.futex_wait(FUTEX, 9, 6),
     {"opcode": Opcode.FUTEX_WAIT, "fd": Futex2Flag.SIZE_U32, "addr": address(FUTEX), "off": 9,
      "addr3": 6}),
    (operations.futex_waitv([(FUTEX, 9)], private=True),
     {"opcode": Opcode.FUTEX_WAITV,
      "addr": struct.pack("=QQII", 9, address(FUTEX), PRIVATE_FUTEX, 0), "len": 1}),
    (operations.futex_wake(FUTEX, 2, private=True),
     {"opcode": Opcode.FUTEX_WAKE, "fd": PRIVATE_FUTEX, "addr": address(FUTEX), "off": 2,
      "addr3": 0xFFFFFFFF}),
    (operations.waitid(os.P_PID, 99, os.WEXITED),
     {"opcode": Opcode.WAITID, "fd": 99, "off": At(bytes(128)), "len": os.P_PID,
      "splice_fd_in": os.WEXITED}),
    (operations.epoll_ctl(3, 1, 4, select.EPOLLIN),
     {"opcode": Opcode.EPOLL_CTL, "fd": 3, "addr": EPOLL_EVENT.pack(select.EPOLLIN, 4), "len": 1,
      "off": 4}),
    (operations.epoll_wait(3, 10),
     {"opcode": Opcode.EPOLL_WAIT, "fd": 3, "addr": At(bytes(10 * EPOLL_EVENT.size)), "len": 10}),
]
# fmt: on

NO_FUNCTION = {
    Opcode.POLL_REMOVE: "a wait ends when its task is cancelled",
    Opcode.TIMEOUT_REMOVE: "a timeout ends when its task is cancelled",
    Opcode.LINK_TIMEOUT: "races with the operation it limits (liburing #1422); Trio has deadlines",
    Opcode.PROVIDE_BUFFERS: "buffer rings have taken its place",
    Opcode.REMOVE_BUFFERS: "buffer rings have taken its place",
    Opcode.URING_CMD: "its arguments are a driver's own",
    Opcode.READ_MULTISHOT: "one operation has one result, so far",
    Opcode.RECV_ZC: "needs a network queue of its own, and CQEs of 32 bytes",
    Opcode.NOP128: "needs SQEs of 128 bytes",
    Opcode.URING_CMD128: "needs SQEs of 128 bytes",
}


@pytest.mark.parametrize(
    ("operation", "fields"), SQES, ids=[Opcode(operation.opcode).name for operation, _ in SQES]
)
def test_sqe(operation: Operation[object], fields: dict[str, object]) -> None:
    sqe: dict[str, object] = dict(zip(SQE_FIELDS, operation.sqe, strict=True))
    if isinstance(sqe["addr"], CData):
        sqe["addr"] = int(ffi.cast("uintptr_t", sqe["addr"]))
    differ = {name: value for name, value in sqe.items() if value != 0 or name == "opcode"}
    assert differ == fields


def test_every_function_has_a_row() -> None:
    tree = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    [rows] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SQES"
    ]
    called = {ast.unparse(node.func) for node in ast.walk(rows) if isinstance(node, ast.Call)}
    functions = {
        name
        for name, function in vars(operations).items()
        if inspect.isfunction(function)
        and "Operation[" in str(inspect.get_annotations(function)["return"])
    }
    assert len(functions) > 50
    assert {f"operations.{name}" for name in functions} <= called


def test_every_opcode_has_a_function_or_a_reason() -> None:
    with_function = {operation.opcode for operation, _ in SQES}
    assert not with_function & set(NO_FUNCTION)
    assert with_function | set(NO_FUNCTION) == set(Opcode)


# --- Messages ----------------------------------------------------------------------------------


def message_header(operation: Operation[object]) -> CData:
    addr = operation.sqe[SQE_FIELDS.index("addr")]
    assert isinstance(addr, CData)
    return ffi.cast("struct msghdr *", addr)


def test_sendmsg_header() -> None:
    right = struct.pack("@i", 5)
    operation = operations.sendmsg(
        3, [DATA, ROOM], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, right)], 0, b"sockaddr"
    )
    header = message_header(operation)
    assert ffi.buffer(header.msg_name, header.msg_namelen)[:] == b"sockaddr"
    assert header.msg_iovlen == 2
    assert vectors(DATA, ROOM) == int(ffi.cast("uintptr_t", header.msg_iov))
    assert header.msg_controllen == socket.CMSG_SPACE(len(right))
    control = struct.pack("@Nii", socket.CMSG_LEN(4), socket.SOL_SOCKET, socket.SCM_RIGHTS)
    assert ffi.buffer(header.msg_control, socket.CMSG_LEN(4))[:] == control + right


def test_sendmsg_header_without_all_that() -> None:
    header = message_header(operations.sendmsg_zc(3, []))
    assert header.msg_name == header.msg_control == ffi.NULL
    assert header.msg_namelen == header.msg_iovlen == header.msg_controllen == 0


@pytest.mark.parametrize(
    ("operation", "base", "size"),
    [
        (operations.recvmsg(3, [ROOM], 64), address(ROOM), 9),
        (operations.recvmsg_select(3, POOL, 100, 64), 0, 100),
    ],
    ids=["recvmsg", "recvmsg_select"],
)
def test_recvmsg_header(operation: Operation[object], base: int, size: int) -> None:
    header = message_header(operation)
    assert header.msg_namelen == 128
    assert header.msg_controllen == 64
    assert header.msg_iovlen == 1
    assert int(ffi.cast("uintptr_t", header.msg_iov[0].iov_base)) == base
    assert header.msg_iov[0].iov_len == size
