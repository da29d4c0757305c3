"""Reads and writes of `trio.lowlevel.FdStream`: pipes, and the streams of child processes.

These two functions replace methods of Trio's class, which is final. Trio makes the fd non-blocking.
For a pipe, Linux (since about 6.4) waits nevertheless. For terminals and similar files, the
operation fails with EAGAIN. Then we wait until the fd is ready, as Trio does.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from trio_uring import _operations as operations
from trio_uring._engine._buffer_pool import RECEIVE_BUFFER_SIZE
from trio_uring._engine._io_manager import current_ring
from trio_uring._trio_private import FdStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_trio_receive_some: Final[Callable[..., Awaitable[bytes]]] = FdStream.receive_some
_trio_send_all: Final[Callable[..., Awaitable[None]]] = FdStream.send_all


async def receive_some(self: FdStream, max_bytes: int | None = None) -> bytes:
    """Receive from 1 to *max_bytes* bytes; empty at the end. See `trio.abc.ReceiveStream`."""
    manager = current_ring("sockets")
    wanted = RECEIVE_BUFFER_SIZE if max_bytes is None else max_bytes
    buffers = manager.buffers if manager is not None else None
    if manager is None or buffers is None or type(wanted) is not int or wanted < 1:
        return await _trio_receive_some(self, max_bytes)
    with self._receive_conflict_detector:
        if self._fd_holder.closed:
            await trio.lowlevel.checkpoint()
        fd = self._fd_holder.fd
        if fd >= 0:
            size = min(wanted, RECEIVE_BUFFER_SIZE)
            try:
                return await manager.perform(
                    operations.read_select(fd, buffers, size, -1, cancellable=True)
                )
            except OSError as exc:
                if exc.errno not in {errno.ENOBUFS, errno.EAGAIN}:
                    _raise_stream_error(exc)
        # There is no data yet, or more reads completed at once than there are provided buffers.
        # This task has waited, so it doesn't use the ring again. The stream may have been closed
        # meanwhile, and then its fd is -1.
        while True:
            try:
                return os.read(self._fd_holder.fd, wanted)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._fd_holder.fd)
            except OSError as exc:
                _raise_stream_error(exc)


async def send_all(self: FdStream, data: bytes | bytearray | memoryview) -> None:
    """Send all of *data*; see `trio.abc.SendStream`."""
    manager = current_ring("sockets")
    if manager is None:
        await _trio_send_all(self, data)
        return
    with self._send_conflict_detector:
        if self._fd_holder.closed:
            raise trio.ClosedResourceError("file was already closed")
        sent, length = 0, len(data)
        with memoryview(data) as view:
            if not length:
                await trio.lowlevel.checkpoint()
            while sent < length:
                fd = self._fd_holder.fd  # -1 if it was closed since the last write
                with view[sent:] as remaining:
                    try:
                        sent += await manager.perform(
                            operations.write(fd, remaining, -1, cancellable=True)
                        )
                    except BlockingIOError:
                        if not self._fd_holder.closed:
                            await manager.wait_writable(fd)
                    except OSError as exc:
                        _raise_stream_error(exc)


def _raise_stream_error(exc: OSError) -> NoReturn:
    if exc.errno == errno.EBADF:
        raise trio.ClosedResourceError("file was already closed") from None
    raise trio.BrokenResourceError from exc
