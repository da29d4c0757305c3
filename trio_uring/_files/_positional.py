"""`PositionalFile`: one open file, read and written by many tasks at once.

Each call has an explicit offset. The file therefore needs no position and no lock, and the kernel
can perform the calls of many tasks in parallel.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._arguments import check_count, check_readable, check_several, check_writable
from trio_uring._engine._file_calls import append
from trio_uring._kernel import native
from trio_uring._trio_private import at_cancel_point

from ._bridge import INLINE_MAX, current_files
from ._open_fd import OpenFd, fdatasync
from ._raw import IN_WORKER_MIN
from ._read_many import (
    RWF_NOWAIT,
    buffers_of,
    check_parts,
    read_blocking,
    read_cached,
    read_missing,
)
from ._registered_buffers import BufferLease

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Buffer

    from ._bridge import FilesRun

RWF_DSYNC: Final = getattr(os, "RWF_DSYNC", 2)

# In bytes. The most that one of several reads reads: its memory is reserved first.
_PART_MAX: Final = 1 << 30


class PositionalFile(OpenFd):
    """An open file without a position, made by `open_positional`.

    All methods may be called by any number of tasks at once. Each async method is a checkpoint. If
    cancelled before it begins, nothing happens. Once begun, it completes, unless it says otherwise:
    reads and writes of files are not interrupted. A buffer must not be resized while it is read
    into.

    Where a method takes one buffer, it also takes a `BufferLease`, which is used as a whole. If its
    `RegisteredBuffers` are registered with the run's ring, the kernel need not map the memory.

    Args:
      fd: An open file descriptor. The object owns it, and closes it.
      name: The value of the ``name`` attribute; the fd by default.
      closefd: Whether `aclose` closes the fd.
    """

    # What offsets and sizes are multiples of.
    _unit = 1

    def __init__(
        self, fd: int, name: str | bytes | int | None = None, *, closefd: bool = True
    ) -> None:
        super().__init__(fd, name, closefd=closefd)
        # Whether to try first without waiting. Not a write to an appending file: it could be short,
        # and another process could append to the file before the rest is written.
        self._nowait_read = not self._has_server
        self._nowait_write = not self._has_server and not self._appends

    # ---- Reading ---------------------------------------------------------------------------

    @enable_ki_protection
    async def read_at(self, size: int, offset: int, /) -> bytes:
        """Read *size* bytes, starting *offset* bytes from the beginning of the file.

        Args:
          size: In bytes. At most 0x7ffff000 are read, the kernel's limit per read.
          offset: In bytes, 0 or more.

        Returns:
          The bytes read: fewer than *size* only at the end of the file, and none beyond it.

        Raises:
          OSError: as `os.pread`, for example ``EISDIR`` or ``EIO``.
          ValueError: *size* or *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_read(3), preadv2(2).
        """
        if type(size) is not int or size < 0:
            check_count("size", size)
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check(offset)
        files = current_files()
        if files is not None and files.manager.native is not None and self._nowait_read:
            data = native.read_cached(fd, size, offset)
            if data is not None:
                files.inline += 1
                if not files.manager.turn_budget.skip_schedule_point():
                    await cancel_shielded_checkpoint()
                return data
            buffer = bytearray(size)
            count = await self._read_on_ring(files, fd, [buffer], offset, size)
        else:
            buffer = bytearray(size)
            count = await self.read_into_at(buffer, offset)
        return bytes(buffer) if count == size else bytes(memoryview(buffer)[:count])

    async def read_exactly_at(self, size: int, offset: int, /) -> bytes:
        """Read exactly *size* bytes, starting *offset* bytes from the beginning of the file.

        Args:
          size: In bytes, of any number.
          offset: In bytes, 0 or more.

        Raises:
          EOFError: the file ends before.
          OSError: this and other errors are as for `read_at`.

        Source: io_uring_prep_read(3), preadv2(2).
        """
        data = await self.read_at(min(size, _PART_MAX), offset)
        if len(data) == size:
            return data
        parts, done = [data], len(data)
        with trio.CancelScope(shield=True):
            while done < size:
                # If the end of the file is not at a multiple of the unit, this is the end.
                if not parts[-1] or done % self._unit:
                    raise EOFError(f"{size} bytes wanted, but the file ends after {done} of them")
                parts.append(await self.read_at(min(size - done, _PART_MAX), offset + done))
                done += len(parts[-1])
        return b"".join(parts)

    async def read_into_at(self, buffer: Buffer | BufferLease, offset: int, /) -> int:
        """Read into *buffer*, starting *offset* bytes from the beginning of the file.

        Args:
          buffer: A lease, or writable and contiguous memory. At most 0x7ffff000 bytes of it are
            used.
          offset: In bytes, 0 or more.

        Returns:
          The number of bytes read: less than the size of *buffer* only at the end of the file.

        Raises:
          OSError: as `os.preadv`.
          ValueError: *offset* is negative.
          RuntimeError: the lease was released.
          trio.ClosedResourceError: the file is closed.

        If cancelled after it began, it completes, and *buffer* is written to.

        Source: io_uring_prep_read(3), io_uring_prep_read_fixed(3), preadv2(2).
        """
        if isinstance(buffer, BufferLease):
            memory = buffer.memory
            buffer.users += 1
            try:
                return await self._read([memory], offset, buffer)
            finally:
                buffer.users -= 1
        if type(buffer) is not bytearray:
            check_writable("buffer", buffer)
        return await self._read([buffer], offset)

    async def readv_at(self, buffers: Sequence[Buffer], offset: int, /) -> int:
        """Like `read_into_at`, into several *buffers*, which are filled in order. At most 1024.

        Returns:
          The number of bytes read, into all buffers together.

        Raises:
          OSError: as `os.preadv`.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_readv2(3), preadv2(2).
        """
        check_several("buffers", buffers, "buffers")
        for buffer in buffers:
            check_writable("each of buffers", buffer)
        return await self._read(buffers, offset)

    @enable_ki_protection
    async def read_many_at(self, requests: Iterable[tuple[int, int]], /) -> list[bytes]:
        """Read many parts of the file, at the same time.

        What is in the page cache is read at once. With 64 parts, this takes about as long as a loop
        of `os.pread`, which blocks the event loop for what is not there.

        Args:
          requests: The size and the offset of each part, in bytes, in this order as for `read_at`.
            A size is at most 0x7ffff000.

        Returns:
          The bytes of each part, in the order of *requests*. A part is shorter than its size only
          at the end of the file.

        Raises:
          OSError: as `read_at`. If several parts fail, it is the error of the first.
          ValueError: a size or an offset is negative, or a size is too large.
          trio.ClosedResourceError: the file is closed.

        Source: preadv2(2), io_uring_prep_read(3).
        """
        parts = list(requests)
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check()
        files = current_files()
        found: list[bytes | None] = [None] * len(parts)
        self._users += 1
        try:
            if files is not None and self._nowait_read:
                found, missing = await read_cached(files, fd, parts)
                if not missing:
                    return found  # type: ignore[return-value]
            check_parts(parts)
            buffers = self._buffers_for
            if files is None:
                return await trio.to_thread.run_sync(read_blocking, fd, parts, buffers)
            return await read_missing(files, fd, parts, found, buffers, in_worker=self._has_server)
        finally:
            self._leave()

    def _buffers_for(self, parts: Sequence[tuple[int, int]]) -> Sequence[Buffer]:
        return buffers_of(parts)

    @enable_ki_protection
    async def _read(
        self, buffers: Sequence[Buffer], offset: int, lease: BufferLease | None = None
    ) -> int:
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check(offset)
        files = current_files()
        if files is None:
            return await self._in_thread(os.preadv, fd, buffers, offset)
        size = _size(buffers)
        if self._nowait_read and size <= INLINE_MAX:
            try:
                count = os.preadv(fd, buffers, offset, RWF_NOWAIT)
                if count == size or not count or _ends_at(fd, offset + count):
                    files.inline += 1
                    if not files.manager.turn_budget.skip_schedule_point():
                        await cancel_shielded_checkpoint()
                    return count
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._nowait_read = False
        return await self._read_on_ring(files, fd, buffers, offset, size, lease)

    async def _read_on_ring(
        self,
        files: FilesRun,
        fd: int,
        buffers: Sequence[Buffer],
        offset: int,
        size: int,
        lease: BufferLease | None = None,
    ) -> int:
        in_worker = self._reads_in_worker(size)
        operation = None
        if lease is not None:
            operation = lease.operation(
                operations.read_fixed, files.manager, fd, offset, size, in_worker=in_worker
            )
        if operation is None and len(buffers) == 1:
            operation = operations.read(
                fd, buffers[0], offset, cancellable=False, in_worker=in_worker
            )
        if operation is None:
            operation = operations.readv(
                fd, buffers, offset, cancellable=False, in_worker=in_worker
            )
        return await self._perform(files, operation)

    def _reads_in_worker(self, size: int) -> bool:
        return self._has_server or size > IN_WORKER_MIN

    # ---- Writing ---------------------------------------------------------------------------

    async def write_at(
        self, data: Buffer | BufferLease, offset: int, /, *, dsync: bool = False
    ) -> int:
        """Write *data*, starting *offset* bytes from the beginning of the file.

        Args:
          data: A lease, or contiguous memory. At most 0x7ffff000 bytes of it are written.
          offset: In bytes, 0 or more. The file grows if the data ends beyond its end. If the file
            was opened with ``"a"``, the data is appended whatever the offset.
          dsync: Return only when the data written is on the disk, as after `fdatasync`. What else
            was written to the file is not waited for.

        Returns:
          The number of bytes written: less than the size of *data* if, for example, the disk is
          full, as with `os.pwrite`.

        Raises:
          OSError: as `os.pwrite`, for example ``ENOSPC``, ``EFBIG`` or ``EIO``.
          ValueError: *offset* is negative.
          RuntimeError: the lease was released.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_write(3), io_uring_prep_write_fixed(3), pwritev2(2).
        """
        if isinstance(data, BufferLease):
            memory = data.memory
            data.users += 1
            try:
                return await self._write([memory], offset, dsync, data)
            finally:
                data.users -= 1
        if type(data) is not bytes:
            check_readable("data", data)
        return await self._write([data], offset, dsync)

    @enable_ki_protection
    async def write_all_at(
        self, data: Buffer | BufferLease, offset: int, /, *, dsync: bool = False
    ) -> None:
        """Write all of *data*, starting *offset* bytes from the beginning of the file.

        Args:
          data: As for `write_at`, of any size.
          offset: As for `write_at`.
          dsync: As for `write_at`.

        Raises:
          OSError: as `write_at`; also if only a part could be written, which then is in the file.

        Source: io_uring_prep_write(3), pwritev2(2).
        """
        fd = self._check(offset)
        if isinstance(data, BufferLease):
            data.users += 1
        self._users += 1
        try:
            done = await self.write_at(data, offset, dsync=dsync)
            memory = data.memory if isinstance(data, BufferLease) else data
            with memoryview(memory).cast("B") as view, trio.CancelScope(shield=True):
                while done < view.nbytes:
                    done += await self._write([view[done:]], offset + done, dsync, fd=fd)
        finally:
            if isinstance(data, BufferLease):
                data.users -= 1
            self._leave()

    async def writev_at(
        self, buffers: Sequence[Buffer], offset: int, /, *, dsync: bool = False
    ) -> int:
        """Like `write_at`, from several *buffers*, in order. At most 1024.

        Returns:
          The number of bytes written, of all buffers together.

        Raises:
          OSError: as `os.pwritev`.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_writev2(3), pwritev2(2).
        """
        check_several("buffers", buffers, "buffers")
        for buffer in buffers:
            check_readable("each of buffers", buffer)
        return await self._write(buffers, offset, dsync)

    @enable_ki_protection
    async def append(self, data: Buffer | BufferLease, /, *, dsync: bool = False) -> int:
        """Append *data* to the file, and return the offset at which it begins.

        Other programs and tasks may append to the file at the same time. The kernel's operation
        does not report the offset, so this uses a thread. The calls of one object and its
        duplicates wait for each other, in FIFO order. To learn the offset, it moves the position of
        the file, which nobody else may use meanwhile.

        Args:
          data: A lease, or contiguous memory of any size.
          dsync: Return only when the data is on the disk, as after `fdatasync`.

        Returns:
          The offset of the first byte of *data* in the file, in bytes.

        Raises:
          OSError: as `write_at`; also if only a part could be written, which then is at the end of
            the file. ``EIO`` if somebody else appended to the file before the rest was written.
          trio.ClosedResourceError: the file is closed.

        Source: pwritev2(2), ``RWF_APPEND``.
        """
        if isinstance(data, BufferLease):
            memory = data.memory
            data.users += 1
            try:
                return await self.append(memory, dsync=dsync)
            finally:
                data.users -= 1
        check_readable("data", data)
        with memoryview(data).cast("B") as view:
            fd = self._check()
            self._users += 1
            try:
                async with self._position:
                    start = await self._in_thread(append, fd, view)
                self._written += view.nbytes
                if dsync:
                    with trio.CancelScope(shield=True):
                        await self._call(fdatasync, os.fdatasync, fd=fd)
            finally:
                self._leave()
            return start

    @enable_ki_protection
    async def _write(
        self,
        buffers: Sequence[Buffer],
        offset: int,
        dsync: bool,  # noqa: FBT001 (write_at's)
        lease: BufferLease | None = None,
        fd: int | None = None,
    ) -> int:
        """Write *buffers*. *fd* is for the rest of a call, which goes on while the file closes."""
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        if fd is None:
            fd = self._check(offset)
        files = current_files()
        if files is None:
            return await self._in_thread(os.pwritev, fd, buffers, offset, RWF_DSYNC * dsync)
        size = _size(buffers)
        self._written += size
        done = 0
        if size <= INLINE_MAX and not dsync and self._nowait_write:
            try:
                done = os.pwritev(fd, buffers, offset, RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._nowait_write = False
            if done == size:
                files.inline += 1
                if not files.manager.turn_budget.skip_schedule_point():
                    await cancel_shielded_checkpoint()
                return done
        if not done:
            flags = RWF_DSYNC * dsync
            return await self._write_on_ring(files, fd, buffers, offset, flags, lease)
        try:
            with trio.CancelScope(shield=True):
                rest = _rest_of(buffers, done)
                done += await self._write_on_ring(files, fd, rest, offset + done)
        except OSError:
            pass  # report what was written; the next write gets the error again
        return done

    async def _write_on_ring(
        self,
        files: FilesRun,
        fd: int,
        buffers: Sequence[Buffer],
        offset: int,
        flags: int = 0,
        lease: BufferLease | None = None,
    ) -> int:
        size = _size(buffers)
        in_worker = self._writes_in_worker(size, flags)
        operation = None
        if lease is not None and not flags:  # a lease keeps its operation, which has no flags
            operation = lease.operation(
                operations.write_fixed, files.manager, fd, offset, size, in_worker=in_worker
            )
        if operation is None and len(buffers) == 1:
            operation = operations.write(
                fd, buffers[0], offset, flags, cancellable=False, in_worker=in_worker
            )
        if operation is None:
            operation = operations.writev(
                fd, buffers, offset, flags, cancellable=False, in_worker=in_worker
            )
        try:
            return await self._perform(files, operation)
        except OSError as exc:
            if exc.errno != errno.EFBIG:
                raise
        # SIGXFSZ is delivered to the kernel worker, and lost. A thread's is not.
        return await self._in_thread(os.pwritev, fd, buffers, offset, flags)

    def _writes_in_worker(self, size: int, flags: int) -> bool:
        # Appending writes too, as the kernel would try a non-blocking write first. With RWF_DSYNC,
        # such a write would wait for the disk in the event loop.
        return bool(flags) or not self._nowait_write or size > IN_WORKER_MIN


def _size(buffers: Sequence[Buffer]) -> int:
    size = 0
    for buffer in buffers:
        size += len(buffer) if type(buffer) in _BYTES else memoryview(buffer).nbytes  # type: ignore[arg-type]
    return size


def _rest_of(buffers: Sequence[Buffer], done: int) -> Sequence[memoryview]:
    """Return *buffers* without their first *done* bytes."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        rest.append(view[done:])
        done = max(done - view.nbytes, 0)
    return rest


_BYTES: Final = (bytes, bytearray)


def _ends_at(fd: int, offset: int) -> bool:
    """Return whether the file is known to end at *offset*, without waiting."""
    try:
        return os.preadv(fd, [bytearray(1)], offset, RWF_NOWAIT) == 0
    except OSError:
        return False
