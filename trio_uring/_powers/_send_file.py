"""`send_file`: a file into a socket, inside the kernel.

The kernel moves bytes between files only through a pipe: file → pipe → socket, two splices,
linked so that they are one step for us. What goes through the pipe are references to pages of
the page cache; nothing is copied until the network does it.

A splice always runs in a kernel worker. Trio's sockets are non-blocking, and so are our pipes:
a splice into a full socket fails with ``EAGAIN`` instead of keeping its worker, and we wait for
writability by epoll. So a slow receiver holds a pipe, but no worker. Pipes are few; who finds
none left reads and sends instead of waiting for one, or slow receivers would stop the others.

The two fds are duplicated first: the kernel looks up those of the second splice when the first
is done, and by then another task may have closed the socket, and its number be another's.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import outcome
import trio
from trio.lowlevel import RunVar, checkpoint, enable_ki_protection, spawn_system_task

from trio_uring import _operations as operations
from trio_uring._errors import OperationCancelledError
from trio_uring._io_manager import current_ring
from trio_uring._trio_private import (
    TrioSocket,
    send_conflict_detector,
    socket_errors_as_stream_errors,
)

from ._batch import perform_many

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from trio_uring._io_manager import UringIOManager

# Pipes in use at once in a run, and so kernel workers that read files for us: half of
# RingConfig.unbounded_workers' default. With half, or double, of it, one transfer is as fast.
PIPES_MAX: Final = 16
# The most that an unprivileged process may ask for (pipe(7)). A step costs a task switch and two
# worker hops: with the default of 64 KiB, 16 times as often (benchmarks/bench_send_file.py).
PIPE_SIZE: Final = 1 << 20
_F_SETPIPE_SZ: Final = 1031  # from linux/fcntl.h; Python has it under another name
_F_GETPIPE_SZ: Final = 1032
_SPLICE_F_NONBLOCK: Final = 2
_PAGE: Final = os.sysconf("SC_PAGESIZE")

# What is read, and then sent, where there is no splice.
BLOCK_SIZE: Final = 1 << 18


class HasFileNo(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its file descriptor."""
        ...


@attrs.define
class SendProgress:
    """How far `send_file` has come; also valid when it was cancelled, or failed.

    Args:
      bytes_sent: What the socket has taken. Through other streams, what ``send_all`` was
        done with; of what was being sent when it was broken off, any part may be gone too.
    """

    bytes_sent: int = 0


@enable_ki_protection
async def send_file(
    stream: trio.abc.SendStream | trio.socket.SocketType,
    file: int | HasFileNo,
    *,
    offset: int = 0,
    count: int | None = None,
    progress: SendProgress | None = None,
) -> int:
    """Send a part of a file, or all of it.

    Into a `trio.SocketStream` or a trio socket (TCP or UNIX) the kernel moves it by itself, in a
    run on the ring. Into others, such as a `trio.SSLStream`, and in runs without a ring, it is
    read and sent, with the same result.

    Args:
      stream: Where to. A socket must be of type ``SOCK_STREAM``, and connected.
      file: An open regular file or block device: its fd, or what has a ``fileno`` method. Its
        position is neither used nor changed. Python may still hold what was written to it:
        flush it first.
      offset: Where in the file to begin, in bytes.
      count: How many bytes to send; None: up to the end of the file.
      progress: Is kept up to date with the bytes sent; see `SendProgress`.

    Returns:
      The number of bytes sent: fewer than *count* only where the file ends before.

    Raises:
      ValueError: *offset* or *count* is negative, or the socket is of another type.
      TypeError: *stream* is none.
      OSError: the file cannot be read (``EISDIR``, ``EBADF``, ``EIO``); or for a socket, as
        its ``send``.
      trio.BusyResourceError: another task is sending on this stream.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it was closed, also meanwhile.

    A checkpoint, always. If cancelled, *progress* says how many bytes are gone; the receiver gets
    these and no others.

    Source: splice(2), io_uring_prep_splice(3), pipe(7).
    """
    if offset < 0 or (count is not None and count < 0):
        raise ValueError("offset and count must be 0 or more")
    transfer = _Transfer(offset, count, progress if progress is not None else SendProgress())
    with ExitStack() as stack:
        fd = os.dup(file if isinstance(file, int) else file.fileno())
        stack.callback(os.close, fd)
        sock = _socket_of(stream, transfer, stack)
        if sock is None:
            return await _read_and_send(stream, fd, transfer)
        await checkpoint()
        manager = current_ring("sockets")
        if manager is not None and isinstance(sock, TrioSocket):
            return await _splice(manager, sock, fd, transfer)
        return await _read_and_send(sock, fd, transfer)


def _socket_of(
    stream: trio.abc.SendStream | trio.socket.SocketType, transfer: _Transfer, stack: ExitStack
) -> trio.socket.SocketType | None:
    """Return the socket to send into, if there is one, and keep other tasks from sending."""
    if isinstance(stream, trio.SocketStream):
        if stream.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("can't send data after sending EOF")
        stack.enter_context(send_conflict_detector(stream))
        transfer.socket_errors = socket_errors_as_stream_errors
        return stream.socket
    if isinstance(stream, trio.socket.SocketType):
        if stream.type != trio.socket.SOCK_STREAM:
            raise ValueError("send_file needs a SOCK_STREAM socket")
        return stream
    if isinstance(stream, trio.abc.SendStream):
        return None
    raise TypeError(f"expected a stream or a trio socket, not {type(stream).__name__}")


@attrs.define
class _Transfer:
    """What is still to be sent."""

    offset: int
    left: int | None  # None: up to the end
    progress: SendProgress
    sent: int = 0
    socket_errors: Callable[[], AbstractContextManager[None]] = nullcontext  # or Trio's for streams

    def next(self, most: int) -> int:
        """How much to ask for next: no more than *most*."""
        return most if self.left is None else min(most, self.left)

    def took(self, count: int) -> None:
        """Note that the socket has *count* bytes more."""
        self.sent += count
        self.progress.bytes_sent += count

    def read(self, count: int) -> None:
        """Note that *count* bytes more left the file."""
        self.offset += count
        if self.left is not None:
            self.left -= count


# ---- By splices ----------------------------------------------------------------------------


async def _splice(manager: UringIOManager, sock: TrioSocket, fd: int, transfer: _Transfer) -> int:
    with transfer.socket_errors():
        out = os.dup(sock.fileno())
    try:
        while transfer.left != 0:
            with _pipes().lent() as pipe:
                if pipe is None:
                    block = await _read(fd, transfer)
                    if not block:
                        break
                    await _send(sock, block, transfer)
                elif not await _splice_some(manager, sock, out, fd, transfer, pipe):
                    break
    except _NotSpliceableError:
        return await _read_and_send(sock, fd, transfer)
    finally:
        os.close(out)
    return transfer.sent


async def _splice_some(
    manager: UringIOManager,
    sock: TrioSocket,
    out: int,
    fd: int,
    transfer: _Transfer,
    pipe: Pipe,
) -> bool:
    """Send as much as fits in the pipe; False at the end of the file."""
    # A page of the file takes a page of the pipe, even if only a part of it is sent.
    size = transfer.next(pipe.size - transfer.offset % _PAGE)
    filled, emptied = await perform_many(
        operations.linked(
            [
                operations.splice(
                    fd, pipe.write_fd, size, offset_in=transfer.offset, flags=_SPLICE_F_NONBLOCK
                ),
                operations.splice(pipe.read_fd, out, size, flags=_SPLICE_F_NONBLOCK),
            ]
        )
    )
    try:
        count = filled.unwrap()
    except OSError as exc:
        # Files that know no splice say EINVAL. All other errors come again when it is read.
        raise _NotSpliceableError from exc
    pipe.left += count
    transfer.read(count)
    with transfer.socket_errors():
        while True:
            sent = _sent(emptied)
            pipe.left -= sent
            transfer.took(sent)
            if sock.fileno() == -1:
                raise trio.ClosedResourceError("another task closed this fd")
            if not pipe.left:
                return count > 0
            if not isinstance(emptied, outcome.Error) or isinstance(emptied.error, BlockingIOError):
                await sock.wait_writable()
            [emptied] = await perform_many(
                [operations.splice(pipe.read_fd, out, pipe.left, flags=_SPLICE_F_NONBLOCK)]
            )


def _sent(emptied: outcome.Outcome[int]) -> int:
    """Return what the socket took, where it could not take all of it; raise real errors."""
    try:
        return emptied.unwrap()
    except (BlockingIOError, OperationCancelledError):  # full; or less than expected was read
        return 0


class _NotSpliceableError(Exception):
    pass


# ---- Pipes ---------------------------------------------------------------------------------


class Pipe:
    """A pipe, as large as we may make it."""

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.left = 0  # bytes in it
        with suppress(PermissionError):  # this user has too many: pipe-user-pages-soft in pipe(7)
            fcntl.fcntl(self.write_fd, _F_SETPIPE_SZ, PIPE_SIZE)
        self.size = fcntl.fcntl(self.write_fd, _F_GETPIPE_SZ)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class Pipes:
    """The pipes of a run: at most `PIPES_MAX` in use, and those that are not kept for later."""

    def __init__(self) -> None:
        self.free: list[Pipe] = []
        self.in_use = 0
        self._closed = False

    @contextmanager
    def lent(self) -> Generator[Pipe | None]:
        """Lend a pipe; None if all are in use, or no more fds are to be had."""
        pipe = self._take()
        if pipe is None:
            yield None
            return
        self.in_use += 1
        clean = False
        try:
            yield pipe
            clean = True
        finally:
            self.in_use -= 1
            if clean and not self._closed:
                assert not pipe.left
                self.free.append(pipe)
            else:
                pipe.close()

    def _take(self) -> Pipe | None:
        if self.free:
            return self.free.pop()
        if self.in_use == PIPES_MAX:
            return None
        try:
            return Pipe()
        except OSError:  # EMFILE, ENFILE
            return None

    async def close_at_the_end(self) -> None:
        """Close all pipes when the run ends."""
        try:
            await trio.sleep_forever()
        finally:
            self._closed = True
            while self.free:
                self.free.pop().close()


_of_run: Final[RunVar[Pipes]] = RunVar("trio_uring pipes")


def _pipes() -> Pipes:
    try:
        return _of_run.get()
    except LookupError:
        pipes = Pipes()
        _of_run.set(pipes)
        spawn_system_task(pipes.close_at_the_end)
        return pipes


# ---- By reading and sending ----------------------------------------------------------------


async def _read_and_send(
    to: trio.abc.SendStream | trio.socket.SocketType, fd: int, transfer: _Transfer
) -> int:
    while block := await _read(fd, transfer):
        if isinstance(to, trio.abc.SendStream):
            await to.send_all(block)
            transfer.took(len(block))
        else:
            await _send(to, block, transfer)
    return transfer.sent


async def _read(fd: int, transfer: _Transfer) -> memoryview:
    """Read the next block; empty at the end."""
    buffer = bytearray(transfer.next(BLOCK_SIZE))
    manager = current_ring("files")
    if manager is None:
        count = await trio.to_thread.run_sync(os.preadv, fd, [buffer], transfer.offset)
    else:
        count = await manager.perform(operations.read(fd, buffer, transfer.offset))
    transfer.read(count)
    return memoryview(buffer)[:count]


async def _send(sock: trio.socket.SocketType, block: memoryview, transfer: _Transfer) -> None:
    with transfer.socket_errors():
        while block:
            count = await sock.send(block)
            transfer.took(count)
            block = block[count:]
