"""The operations on the ring, memory, futexes, processes and epoll, and zero-copy sends."""

from __future__ import annotations

import mmap
import os
import select
import socket
import subprocess
import sys
import time
from array import array
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from races import current_manager
from trio.testing import wait_all_tasks_blocked

from trio_uring import RingConfig, UnsupportedOpcodeError
from trio_uring._engine._ring import Ring
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring.lowlevel import Operation, operations, perform as perform_operation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeVar

    T = TypeVar("T")

pytestmark = pytest.mark.usefixtures("fd_ledger")

HOUR_NS = 3600 * 10**9


async def perform(operation: Operation[T]) -> T:
    """Perform *operation*. Skip the test if the kernel does not support it."""
    try:
        return await perform_operation(operation)
    except UnsupportedOpcodeError as exc:
        pytest.skip(str(exc))


async def check_cancellable(operation: Operation[object]) -> None:
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operation)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


# --- The ring -------------------------------------------------------------------------------


async def test_nop() -> None:
    await perform(operations.nop())


async def test_poll_add() -> None:
    reader, writer = os.pipe()
    await check_cancellable(operations.poll_add(reader, select.POLLIN))
    os.write(writer, b"x")
    assert await perform(operations.poll_add(reader, select.POLLIN)) == select.POLLIN
    for fd in (reader, writer):
        await perform(operations.close(fd))


@pytest.mark.parametrize("clock", [time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME])
async def test_timeout(clock: int) -> None:
    before = time.clock_gettime_ns(clock)
    await perform(operations.timeout(2_000_000, clock=clock))
    assert time.clock_gettime_ns(clock) >= before + 2_000_000
    await perform(operations.timeout(before + 3_000_000, absolute=True, clock=clock))
    assert time.clock_gettime_ns(clock) >= before + 3_000_000
    await perform(operations.timeout(before, absolute=True, clock=clock))
    await check_cancellable(operations.timeout(HOUR_NS, clock=clock))


async def test_negative_timeout() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await perform(operations.timeout(-1))


@contextmanager
def another_ring() -> Iterator[Ring]:
    ring = Ring(RingConfig())
    try:
        yield ring
    finally:
        ring.close()


async def test_msg_ring() -> None:
    with another_ring() as other:
        await perform(operations.msg_ring(other.fd, 1 << 63, -2))
        await perform(operations.msg_ring(other.fd, 9, 7))
        assert other.submit_and_wait(5.0) == [(1 << 63, -2, 0), (9, 7, 0)]
    with pytest.raises(OSError, match="File descriptor in bad state"):
        await perform(operations.msg_ring(0, 9))


def register_files(ring: Ring, fds: list[int]) -> None:
    ring.register(RegisterOpcode.FILES, ffi.from_buffer("char[]", array("i", fds)), len(fds))


@pytest.fixture
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    path = tmp_path_factory.mktemp("fixed") / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


async def test_fixed_files(file: int) -> None:
    with pytest.raises(OSError, match="No such device or address"):
        await perform(operations.files_update([file]))
    ring = current_manager().ring
    register_files(ring, [-1, -1, -1])
    assert await perform(operations.files_update([file], 1)) == [1]
    assert sorted(await perform(operations.files_update([file, file]))) == [0, 2]
    with pytest.raises(OSError, match="Too many open files in system"):
        await perform(operations.files_update([file]))
    fd = await perform(operations.fixed_fd_install(2))
    assert os.fstat(fd) == os.fstat(file)
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert await perform(operations.files_update([-1], 2)) == [2]
    with pytest.raises(OSError, match="Bad file descriptor"):
        await perform(operations.fixed_fd_install(2))
    ring.register(RegisterOpcode.UNREGISTER_FILES, ffi.NULL, 0)


async def test_msg_ring_fd(file: int) -> None:
    ring = current_manager().ring
    register_files(ring, [file])
    with another_ring() as other:
        register_files(other, [-1, -1, -1])
        await perform(operations.msg_ring_fd(other.fd, 0, 5, 2))
        assert await perform(operations.msg_ring_fd(other.fd, 0, 6)) == 0
        assert await perform(operations.msg_ring_fd(other.fd, 0, 7)) == 1
        with pytest.raises(OSError, match="Too many open files in system"):
            await perform(operations.msg_ring_fd(other.fd, 0, 8))
        assert other.submit_and_wait(5.0) == [(5, 0, 0), (6, 0, 0), (7, 1, 0)]
    ring.register(RegisterOpcode.UNREGISTER_FILES, ffi.NULL, 0)


# --- Memory and futexes ---------------------------------------------------------------------


async def test_madvise() -> None:
    with mmap.mmap(-1, 3 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = b"x" * len(memory)
        await perform(operations.madvise(memory, mmap.MADV_DONTNEED, mmap.PAGESIZE, mmap.PAGESIZE))
        for page, byte in enumerate((b"x", b"\0", b"x")):
            start = page * mmap.PAGESIZE
            assert memory[start : start + mmap.PAGESIZE] == byte * mmap.PAGESIZE
        with pytest.raises(OSError, match="Invalid argument"):
            await perform(operations.madvise(memory, mmap.MADV_DONTNEED, 1))


@pytest.mark.parametrize("private", [False, True])
async def test_futex(private: bool) -> None:
    futex = bytearray(4)
    woken: list[int] = []

    async def wait(mask: int) -> None:
        await perform(operations.futex_wait(futex, 0, mask, private=private))
        woken.append(mask)

    async with trio.open_nursery() as nursery:
        for mask in (1, 2, 4):
            nursery.start_soon(wait, mask)
        await wait_all_tasks_blocked()
        wake = partial(operations.futex_wake, futex, private=private)
        assert await perform(wake(10, 8)) == 0
        assert await perform(wake(10, 2)) == 1
        await wait_all_tasks_blocked()
        assert woken == [2]
        assert await perform(wake(10)) == 2
    futex[0] = 1
    with pytest.raises(BlockingIOError):
        await perform(operations.futex_wait(futex, 0, private=private))
    await check_cancellable(operations.futex_wait(futex, 1, private=private))


async def test_futex_waitv() -> None:
    futexes = [bytearray(4) for _ in range(3)]
    woken: list[int] = []

    async def wait() -> None:
        woken.append(await perform(operations.futex_waitv([(futex, 0) for futex in futexes])))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert await perform(operations.futex_wake(futexes[1])) == 1
    assert woken == [1]
    with pytest.raises(BlockingIOError):
        await perform(operations.futex_waitv([(futexes[0], 7)]))
    await check_cancellable(operations.futex_waitv([(futexes[0], 0)]))


async def test_closing_an_fd_wakes_no_futex() -> None:
    # The kernel takes the flags of a futex, 2, where others have an fd.
    futex = bytearray(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.futex_wait(futex, 0))
        await wait_all_tasks_blocked()
        trio.lowlevel.notify_closing(2)
        await wait_all_tasks_blocked()
        assert await perform(operations.futex_wake(futex)) == 1


# --- Processes and epoll --------------------------------------------------------------------


def child(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-Sc", code], stdin=subprocess.PIPE)


async def test_waitid() -> None:
    process = child("import sys; sys.stdin.read(); sys.exit(7)")
    assert process.stdin is not None
    options = os.WEXITED | os.WNOWAIT
    nothing = operations.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG)
    assert await perform(nothing) is None
    await check_cancellable(operations.waitid(os.P_PID, process.pid, os.WEXITED))
    process.stdin.close()
    status = await perform(operations.waitid(os.P_PID, process.pid, options))
    assert status == operations.ChildStatus(process.pid, os.getuid(), os.CLD_EXITED, 7)
    assert process.wait() == 7
    with pytest.raises(ChildProcessError):
        await perform(operations.waitid(os.P_PID, process.pid, options))


async def test_waitid_for_a_pidfd() -> None:
    process = child("input()")
    pid_fd = os.pidfd_open(process.pid)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.waitid(os.P_PIDFD, pid_fd, os.WEXITED | os.WNOWAIT))
        await wait_all_tasks_blocked()
        process.kill()
    os.close(pid_fd)
    process.communicate()


async def test_epoll() -> None:
    add, delete, modify = 1, 2, 3
    reader, writer = os.pipe()
    with select.epoll() as epoll:
        fd = epoll.fileno()
        await perform(operations.epoll_ctl(fd, add, reader, select.EPOLLIN))
        await check_cancellable(operations.epoll_wait(fd, 8))
        os.write(writer, b"x")
        assert await perform(operations.epoll_wait(fd, 8)) == [(reader, select.EPOLLIN)]
        assert epoll.poll() == [(reader, select.EPOLLIN)]
        await perform(operations.epoll_ctl(fd, add, writer, select.EPOLLOUT))
        ready = await perform(operations.epoll_wait(fd, 8))
        assert sorted(ready) == sorted([(reader, select.EPOLLIN), (writer, select.EPOLLOUT)])
        await perform(operations.epoll_ctl(fd, modify, writer, 0))
        await perform(operations.epoll_ctl(fd, delete, reader))
        assert epoll.poll(0) == []
        with pytest.raises(FileNotFoundError):
            await perform(operations.epoll_ctl(fd, delete, reader))
    os.close(reader)
    os.close(writer)


# --- Zero-copy sends ------------------------------------------------------------------------


@contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        yield client, server


async def test_send_zc() -> None:
    data = bytearray(b"without a copy")
    with tcp_pair() as (client, server):
        assert await perform(operations.send_zc(client.fileno(), data)) == len(data)
        data.clear()  # it is no longer pinned
        assert server.recv(100) == b"without a copy"


async def test_send_zc_keeps_the_buffer_until_the_network_is_done() -> None:
    data = bytearray(1 << 20)
    sent = received = 0

    async def send(client: socket.socket) -> None:
        nonlocal sent
        sent = await perform(operations.send_zc(client.fileno(), data))
        client.shutdown(socket.SHUT_WR)

    with tcp_pair() as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, client)
            await wait_all_tasks_blocked()
            assert sent == 0
            with pytest.raises(BufferError):
                data.append(0)
            buffer = bytearray(65536)
            while size := await perform(operations.recv(server.fileno(), buffer)):
                received += size
    assert sent == received > 0
    data.append(0)


async def test_sendmsg_zc() -> None:
    with tcp_pair() as (client, server):
        operation = operations.sendmsg_zc(client.fileno(), [b"without ", bytearray(b"a copy")])
        assert await perform(operation) == 14
        assert server.recv(100) == b"without a copy"


async def test_zero_copy_errors() -> None:
    a, b = socket.socketpair()
    with a, b, pytest.raises(OSError, match="Operation not supported"):
        await perform(operations.send_zc(a.fileno(), b"x"))
    with tcp_pair() as (client, _):
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(BrokenPipeError):
            await perform(operations.send_zc(client.fileno(), b"x"))
