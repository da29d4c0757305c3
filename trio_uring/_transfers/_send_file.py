"""`send_file`: a file into a socket, inside the kernel: file → pipe → socket."""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import attrs
from trio.lowlevel import checkpoint, checkpoint_if_cancelled, enable_ki_protection

from trio_uring._streams._endpoints import dup_file, ring_for_splices, sink_of

from ._splice_pipes import current_pipes
from ._transfer import BLOCK_SIZE, Transfer, check_range, empty_into, read_block, send_block

if TYPE_CHECKING:
    from collections.abc import Callable

    import trio

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._streams._endpoints import HasFileNo, SendsBytes, Sink

    from ._splice_pipes import Pipe

_PAGE: Final = os.sysconf("SC_PAGESIZE")
# Less than this is read and sent: the way to a worker and back costs more than two copies of it.
# 16 KiB then take half as long; from 256 KiB on it would be the other way round
# (benchmarks/bench_send_file.py).
_SPLICE_MIN: Final = 1 << 17


@attrs.define
class SendProgress:
    """How far `send_file` has come; also valid when it was cancelled, or failed.

    Args:
      bytes_sent: What the socket has taken. Through other streams, what their ``send_all`` or
        ``send`` was done with; of what was being sent when it was broken off, any part may be
        gone too.
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
    """Send a part of a file, or all of it.

    Into a `trio.SocketStream`, a trio socket or AnyIO's TCP and UNIX streams the kernel moves it
    by itself, in a run on the ring. Into others, such as a `trio.SSLStream`, and in runs without
    a ring, it is read and sent, with the same result; so are less than 128 KiB.

    Args:
      stream: Where to: a stream of Trio's or AnyIO's, or a trio socket. That must be of type
        ``SOCK_STREAM``, and connected.
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
      OSError: the file cannot be read (``EISDIR``, ``ESPIPE``, ``EBADF``, ``EIO``); or for a
        socket, as its ``send``.
      trio.BusyResourceError: another task is sending on this stream.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it was closed, also meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, *progress* says how many bytes are gone; the receiver gets
    these and no others.

    Source: splice(2), io_uring_prep_splice(3), pipe(7).
    """
    check_range(offset, count)
    transfer = Transfer(count, sent_counter(progress or SendProgress()))
    with ExitStack() as stack:
        fd = dup_file(file, stack)
        sink = sink_of(stream, stack)
        await checkpoint()
        manager = ring_for_splices(files=True)
        if manager is not None and sink.splices and _is_large(fd, offset, count):
            try:
                return await _splice(manager, sink, fd, offset, transfer)
            except _NotSpliceableError:
                pass
        while not transfer.done and await _read_and_send(sink, fd, offset, transfer):
            pass
        return transfer.moved


def sent_counter(progress: SendProgress) -> Callable[[int], None]:
    """Return what adds to *progress*."""

    def add(count: int) -> None:
        progress.bytes_sent += count

    return add


def _is_large(fd: int, offset: int, count: int | None) -> bool:
    status = os.fstat(fd)
    known = stat.S_ISREG(status.st_mode) and status.st_size  # not in /proc, and of no device
    left = status.st_size - offset if known else _SPLICE_MIN
    return left >= _SPLICE_MIN and (count is None or count >= _SPLICE_MIN)


async def _splice(
    manager: UringIOManager, sink: Sink, fd: int, offset: int, transfer: Transfer
) -> int:
    while not transfer.done:
        await checkpoint_if_cancelled()
        with current_pipes().lent() as pipe:
            if pipe is None:
                more = await _read_and_send(sink, fd, offset, transfer)
            else:
                more = await _splice_some(manager, sink, fd, offset, transfer, pipe)
        if not more:
            break
    return transfer.moved


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
        # Files that know no splice say EINVAL. All other errors come again when it is read.
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
