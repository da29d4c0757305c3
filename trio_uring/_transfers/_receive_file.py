"""`receive_file`: receive from a socket into a file inside the kernel: socket → pipe → file."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import attrs
from trio.lowlevel import checkpoint, enable_ki_protection

from trio_uring._streams._endpoints import dup_file, ring_for_splices, source_of

from ._splice_pipes import current_pipes
from ._transfer import (
    BLOCK_SIZE,
    Transfer,
    check_progress,
    check_range,
    fill_from,
    write_some,
)

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    import trio

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._streams._endpoints import HasFileNo, ReceivesBytes, Source

    from ._splice_pipes import Pipe


@attrs.define
class ReceiveProgress:
    """How far `receive_file` has come; also valid when it was cancelled or failed.

    Args:
      bytes_received: How many bytes were written to the file.
      left: Data that was received and could not be written, because the disk is full or broken;
        otherwise empty. It is appended to what is there already.
    """

    bytes_received: int = 0
    left: bytes = b""


@enable_ki_protection
async def receive_file(
    stream: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes,
    file: int | HasFileNo,
    *,
    offset: int = 0,
    count: int | None = None,
    progress: ReceiveProgress | None = None,
) -> int:
    """Receive into a file: up to the stream's end, or *count* bytes.

    From a `trio.SocketStream`, a trio socket, and AnyIO's TCP and UNIX streams, the kernel moves
    the bytes without copying them through the program. This needs a run on the ring. For other
    streams, such as a `trio.SSLStream`, and without a ring, the data is received and written, with
    the same result. Never more than *count* bytes are taken out of the stream.

    Args:
      stream: A stream of Trio's or AnyIO's, or a trio socket. A socket must be of type
        ``SOCK_STREAM``, and connected.
      file: A regular file or block device that is open for writing: its fd, or an object with a
        ``fileno`` method. Its position is neither used nor changed, and it is not truncated.
      offset: Where in the file to begin, in bytes. A file that was opened with ``O_APPEND`` is
        appended to, whatever this is.
      count: How many bytes to receive; None for all up to the end of the stream.
      progress: Is kept up to date with the bytes received; see `ReceiveProgress`.

    Returns:
      The number of bytes received: fewer than *count* only if the stream ends before.

    Raises:
      ValueError: *offset* or *count* is negative, or the socket is of another type.
      TypeError: an argument has the wrong type.
      OSError: the file cannot be written (``EBADF``, ``ESPIPE``, ``ENOSPC``, ``EFBIG``,
        ``EIO``); or, for a socket, as its ``recv``.
      trio.BusyResourceError: another task waits to receive from this stream.
      trio.BrokenResourceError: for a stream, the connection is broken.
      trio.ClosedResourceError: for a stream, it is closed, or closes meanwhile. For AnyIO's streams
        these three are AnyIO's own.

    A checkpoint, always. If cancelled, all data that was taken out of the stream is in the file,
    and *progress* says how much. It does not flush the file to the disk: see
    `PositionalFile.fdatasync`.

    Source: splice(2), io_uring_prep_splice(3), pipe(7).
    """
    check_range(offset, count)
    check_progress(progress, ReceiveProgress)
    async with dup_file(file) as fd:
        return await _receive(stream, _Target(fd, offset, count, progress or ReceiveProgress()))
    raise AssertionError("dup_file swallows no exception")


async def _receive(
    stream: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes, target: _Target
) -> int:
    with ExitStack() as stack:
        source = source_of("stream", stream, stack)
        await checkpoint()
        if source.splices and not target.flags & os.O_APPEND:  # splice(2) refuses with EINVAL
            target.manager = ring_for_splices(files=True)
        while not target.transfer.done and await _receive_some(source, target):
            pass
        return target.transfer.moved


class _Target:
    """The file, and how much of it is written."""

    def __init__(self, fd: int, offset: int, count: int | None, progress: ReceiveProgress) -> None:
        self.flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if self.flags & os.O_ACCMODE == os.O_RDONLY:
            # The error of write(2), but before any data is taken out of the stream.
            raise OSError(errno.EBADF, "file must be open for writing, and is open for reading")
        self.fd = fd
        self.offset = offset
        self.progress = progress
        self.transfer = Transfer(count, self._add)
        self.manager: UringIOManager | None = None  # None: do not splice

    def _add(self, count: int) -> None:
        self.progress.bytes_received += count


async def _receive_some(source: Source, target: _Target) -> bool:
    """Receive what is available; False at the end."""
    if target.manager is None:
        return await _receive_and_write(source, target)
    await source.wait_readable()
    with current_pipes().lent() as pipe:
        count = 0 if pipe is None else fill_from(source, pipe, target.transfer)
        if pipe is not None and count:
            await _empty_into_file(pipe, target.manager, target)
    return count > 0 or await _receive_and_write(source, target)


async def _receive_and_write(source: Source, target: _Target) -> bool:
    block = memoryview(await source.receive_some(target.transfer.next(BLOCK_SIZE)))
    await _write(block, target)
    return len(block) > 0


async def _empty_into_file(pipe: Pipe, manager: UringIOManager, target: _Target) -> None:
    transfer = target.transfer
    while pipe.left:
        try:
            written = await pipe.empty_into_file(manager, target.fd, target.offset + transfer.moved)
        except OSError:
            # EINVAL for files that cannot be spliced. Any other error comes again at the write.
            target.manager = None
            await _write(memoryview(pipe.take_rest()), target)
        else:
            transfer.add(written)


async def _write(left: memoryview, target: _Target) -> None:
    try:
        while left:
            written = await write_some(target.fd, left, target.offset + target.transfer.moved)
            target.transfer.add(written)
            left = left[written:]
    except BaseException:
        target.progress.left += bytes(left)
        raise
