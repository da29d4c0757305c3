"""`Transfer`: how far a transfer has come; and the steps that the transfers share."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import attrs
import trio

from trio_uring import _operations as operations
from trio_uring._arguments import check_count, check_type
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._engine._io_manager import current_ring

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._streams._endpoints import Sink, Source

    from ._splice_pipes import Pipe

# The size of a block that is read and written, where there is no splice.
BLOCK_SIZE: Final = 1 << 18


@attrs.define
class Transfer:
    """How far a transfer has come.

    Args:
      count: Bytes to move; None for all up to the end.
      note: Called with the number of bytes of each step.
      moved: Bytes moved so far.
    """

    count: int | None
    note: Callable[[int], None]
    moved: int = 0

    @property
    def done(self) -> bool:
        """Whether all *count* bytes are moved."""
        return self.moved == self.count

    def next(self, most: int) -> int:
        """Return how many bytes to move next: at most *most*."""
        return most if self.count is None else min(most, self.count - self.moved)

    def add(self, count: int) -> None:
        """Count *count* bytes that were moved."""
        self.moved += count
        self.note(count)


def check_range(offset: int, count: int | None) -> None:
    """Raise if *offset* or *count* is no int, or negative."""
    check_count("offset", offset)
    if count is not None:
        check_count("count", count)


def check_progress(progress: object, kind: type) -> None:
    """Raise `TypeError` unless *progress* is None or a *kind*."""
    if progress is not None:
        check_type("progress", progress, kind, f"None or a {kind.__name__}()")


# ---- Receiving -----------------------------------------------------------------------------


def fill_from(source: Source, pipe: Pipe, transfer: Transfer) -> int:
    """Move what a socket has received into *pipe*; return how many bytes.

    0 is ambiguous: the end, no data yet, or urgent data (``MSG_OOB``), where splice(2) stops. A
    plain receive finds out.
    """
    assert source.sock is not None
    with source.errors():
        try:
            return pipe.fill_from_socket(source.sock.fileno(), transfer.next(pipe.size))
        except BlockingIOError:
            return 0


# ---- Sending -------------------------------------------------------------------------------


async def empty_into(sink: Sink, pipe: Pipe, transfer: Transfer) -> None:
    """Send all that is in *pipe*; if that fails, the rest stays in it."""
    sock = sink.sock
    assert sock is not None
    with sink.errors():
        while pipe.left:
            try:
                transfer.add(pipe.empty_into_socket(sock.fileno()))
            except BlockingIOError:
                await sock.wait_writable()


async def send_block(sink: Sink, block: memoryview, transfer: Transfer) -> None:
    """Send all of *block*."""
    while block:
        count = await sink.send_some(block)
        transfer.add(count)
        block = block[count:]


# ---- Files ---------------------------------------------------------------------------------


def _has_server(fd: int) -> bool:
    # The kernel starts to read ahead while it takes the SQE, and FUSE may wait for that.
    return file_system_of(fd) is FileSystem.SERVER


async def read_block(fd: int, size: int, offset: int) -> memoryview:
    """Read at most *size* bytes of a file; none only at its end."""
    buffer = bytearray(size)
    manager = current_ring("files")
    if manager is None:
        count = await trio.to_thread.run_sync(os.preadv, fd, [buffer], offset)
    else:
        operation = operations.read(
            fd, buffer, offset, cancellable=False, in_worker=_has_server(fd)
        )
        count = await manager.perform(operation)
    return memoryview(buffer)[:count]


async def write_some(fd: int, block: memoryview, offset: int) -> int:
    """Write *block*, or a part of it; return how many bytes. Ignores cancellation."""
    manager = current_ring("files")
    if manager is not None:
        return await manager.perform_shielded(
            operations.write(fd, block, offset, cancellable=False)
        )
    count = 0
    with trio.CancelScope(shield=True):
        count = await trio.to_thread.run_sync(os.pwrite, fd, block, offset)
    return count  # noqa: RET504 (for all that mypy knows, a scope may end before)
