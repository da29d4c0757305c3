"""`send_file`: send a file into a socket inside the kernel.

Which way
---------

Facts. sendfile(2) takes half the CPU time of two splices through a pipe, one of which is an
operation on the ring. But it waits for the disk where the file is not in the page cache.

What does this mean for us? What is in the page cache is sent by sendfile(2), directly in the event
loop's thread. The rest is spliced: file → pipe on the ring, which may wait for the disk, and pipe →
socket. A few bytes are read and sent.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from socket import AF_UNIX, IPPROTO_TCP
from typing import TYPE_CHECKING, Final

import attrs
from trio.lowlevel import checkpoint, checkpoint_if_cancelled, enable_ki_protection

from trio_uring._engine._file_calls import is_cached
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._streams._endpoints import dup_file, ring_for_splices, sink_of

from ._splice_pipes import current_pipes
from ._transfer import (
    BLOCK_SIZE,
    Transfer,
    check_progress,
    check_range,
    empty_into,
    read_block,
    send_block,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import trio

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._streams._endpoints import HasFileNo, SendsBytes, Sink

    from ._splice_pipes import Pipe

# TCP_NOTSENT_LOWAT of tcp(7). Python has it since 3.12.
_NOTSENT_LOWAT: Final = 25

# In bytes. The most that one call of sendfile(2) sends, which takes about 250 microseconds. Then
# other tasks run. At half, checking the cache and the checkpoints would take twice the time.
_SENDFILE_MAX: Final = 1 << 21

_PAGE: Final = os.sysconf("SC_PAGESIZE")
# Less than this is read and sent if it is not cached: a hop to a worker costs more than two copies
# of it. So 16 KiB take half as long as with a splice. From 256 KiB on, the splice is faster
# (benchmarks/bench_send_file.py).
_SPLICE_MIN: Final = 1 << 17


@attrs.define
class SendProgress:
    """How far `send_file` has come; also valid when it was cancelled or failed.

    Args:
      bytes_sent: How many bytes the socket has taken. For other streams, the bytes for which
        ``send_all`` or ``send`` has returned. If the last such call was cancelled or failed, any
        part of its block may have been sent, too.
    """

    bytes_sent: int = 0


@enable_ki_protection
async def send_file(
    stream: trio.abc.SendStream | trio.socket.SocketType | SendsBytes,
    file: int | HasFileNo,
    *,
    offset: int = 0,
    count: int | None = None,
    progress: SendProgress | None = None,
) -> int:
    """Send a file, or a part of it (``sendfile``).

    Into a `trio.SocketStream`, a trio socket, and AnyIO's TCP and UNIX streams, the kernel moves
    the bytes without copying them through the program. This needs a run on the ring. For other
    streams, such as a `trio.SSLStream`, without a ring, and for less than 128 KiB that is not in
    the page cache, the file is read and sent, with the same result.

    Args:
      stream: A stream of Trio's or AnyIO's, or a trio socket. A socket must be of type
        ``SOCK_STREAM``, and connected.
      file: An open regular file or block device: its fd, or an object with a ``fileno`` method. Its
        position is neither used nor changed. Flush a Python file that was written to first.
      offset: Where in the file to begin, in bytes.
      count: How many bytes to send; None for all up to the end of the file.
      progress: Is kept up to date with the bytes sent; see `SendProgress`.

    Returns:
      The number of bytes sent: fewer than *count* only if the file ends before.

    Raises:
      ValueError: *offset* or *count* is negative, or the socket is of another type.
      TypeError: an argument has the wrong type.
      OSError: the file cannot be read (``EISDIR``, ``ESPIPE``, ``EBADF``, ``EIO``); or, for a
        socket, as its ``send``.
      trio.BusyResourceError: another task is sending on this stream.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it is closed, or closes meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, *progress* says how many bytes were sent; the receiver gets
    exactly these.

    Source: sendfile(2), cachestat(2), splice(2), io_uring_prep_splice(3), pipe(7).
    """
    check_range(offset, count)
    check_progress(progress, SendProgress)
    transfer = Transfer(count, sent_counter(progress or SendProgress()))
    async with dup_file(file) as fd:
        return await _send(stream, fd, offset, count, transfer)
    raise AssertionError("dup_file swallows no exception")


async def _send(
    stream: trio.abc.SendStream | trio.socket.SocketType | SendsBytes,
    fd: int,
    offset: int,
    count: int | None,
    transfer: Transfer,
) -> int:
    with ExitStack() as stack:
        sink = sink_of("stream", stream, stack)
        await checkpoint()
        manager = ring_for_splices(files=True)
        # A file system with a server would be asked in the event loop.
        if manager is not None and sink.splices and file_system_of(fd) is not FileSystem.SERVER:
            try:
                return await _send_in_kernel(manager, sink, fd, offset, transfer)
            except _NotSpliceableError:
                pass
        while not transfer.done and await _read_and_send(sink, fd, offset, transfer):
            pass
        return transfer.moved


def sent_counter(progress: SendProgress) -> Callable[[int], None]:
    """Return a function that adds to ``progress.bytes_sent``."""

    def add(count: int) -> None:
        progress.bytes_sent += count

    return add


async def _send_in_kernel(
    manager: UringIOManager, sink: Sink, fd: int, offset: int, transfer: Transfer
) -> int:
    end = _end_of(fd)
    size = transfer.next(_SPLICE_MIN if end is None else max(end - offset, 0))
    pipes = current_pipes() if size >= _SPLICE_MIN else None
    with nullcontext() if pipes is None else _full_send_buffer(sink):
        while not transfer.done:
            await checkpoint_if_cancelled()
            start = offset + transfer.moved
            if end is not None and start >= end:
                end = _end_of(fd)  # it may have grown
                if end is not None and start >= end:
                    break
            size = 0 if end is None else transfer.next(min(end - start, _SENDFILE_MAX))
            if is_cached(fd, start, size):
                await _send_cached(sink, fd, start, size, transfer)
                continue
            with nullcontext() if pipes is None else pipes.lent() as pipe:
                if pipe is None:
                    more = await _read_and_send(sink, fd, offset, transfer)
                else:
                    more = await _splice_some(manager, sink, fd, offset, transfer, pipe)
            if not more:
                break
        return transfer.moved
    raise AssertionError("the block swallows no exception")


def _end_of(fd: int) -> int | None:
    """Return the size of a file; None if it is not known, as for devices and in /proc."""
    status = os.fstat(fd)
    return status.st_size if stat.S_ISREG(status.st_mode) and status.st_size else None


@contextmanager
def _full_send_buffer(sink: Sink) -> Generator[None]:
    """Let the kernel buffer as much unsent data as it does for other programs.

    Trio's TCP streams are writable only while less than 16 KiB wait to be sent. With so little, the
    task would be woken up ten times as often.
    """
    sock = sink.sock
    assert sock is not None
    if sock.family == AF_UNIX:
        yield
        return
    with sink.errors():
        before = sock.getsockopt(IPPROTO_TCP, _NOTSENT_LOWAT)
        sock.setsockopt(IPPROTO_TCP, _NOTSENT_LOWAT, 0)  # the system's default
    try:
        yield
    finally:
        with suppress(OSError):  # it was closed
            sock.setsockopt(IPPROTO_TCP, _NOTSENT_LOWAT, before)


async def _send_cached(sink: Sink, fd: int, start: int, size: int, transfer: Transfer) -> None:
    """Send *size* bytes that are in the page cache, or as many of them as the socket takes."""
    sock = sink.sock
    assert sock is not None
    with sink.errors():
        try:
            count = os.sendfile(sock.fileno(), fd, start, size)
        except BlockingIOError:
            count = 0
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            raise _NotSpliceableError from exc
        transfer.add(count)
        if count < size:
            await sock.wait_writable()
        elif not transfer.done:
            await checkpoint()


async def _splice_some(
    manager: UringIOManager, sink: Sink, fd: int, offset: int, transfer: Transfer, pipe: Pipe
) -> bool:
    """Send as much as fits in the pipe; False at the end of the file."""
    offset += transfer.moved
    # A page of the file takes a page of the pipe, even if only a part of it is sent.
    size = transfer.next(pipe.size - offset % _PAGE)
    try:
        count = await pipe.fill_from_file(manager, fd, size, offset)
    except OSError as exc:
        # EINVAL for files that cannot be spliced. Any other error comes again at the read.
        raise _NotSpliceableError from exc
    await empty_into(sink, pipe, transfer)
    return count > 0


async def _read_and_send(sink: Sink, fd: int, offset: int, transfer: Transfer) -> bool:
    """Send a block; False at the end of the file."""
    block = await read_block(fd, transfer.next(BLOCK_SIZE), offset + transfer.moved)
    await send_block(sink, block, transfer)
    return len(block) > 0


class _NotSpliceableError(Exception):
    pass
