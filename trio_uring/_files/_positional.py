"""`open_positional`: one open file, read and written by many tasks at once.

Each call has an explicit offset. The file therefore needs no position and no lock, and the kernel
can perform the calls of many tasks in parallel.
"""

from __future__ import annotations

import errno
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import (
    ParkingLot,
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._errors import UnsupportedOpcodeError
from trio_uring._trio_private import at_cancel_point

from ._bridge import INLINE_MAX, current_files
from ._open import open_fd
from ._raw import IN_WORKER_MIN

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from trio_uring._operations import Operation

    from ._bridge import FilesRun

T = TypeVar("T")

_RWF_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 8)
RWF_DSYNC: Final = getattr(os, "RWF_DSYNC", 2)
_CLOSED: Final = -1


async def open_positional(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    flags: int = os.O_RDONLY,
    mode: int = 0o666,
) -> PositionalFile:
    """Open a file for positional reads and writes, by any number of tasks at once.

    Works in every run. In a run without a ring, the file's methods use threads.

    Args:
      path: The path of a regular file or a block device.
      flags: As for `os.open`: `os.O_RDWR` ``|`` `os.O_CREAT`, ... Child processes do not inherit
        the file.
      mode: The permissions of a file that is created, before the umask is applied.

    Returns:
      The open file. Close it with ``async with`` or `PositionalFile.aclose`.

    Raises:
      OSError: as `os.open`, with its ``filename``.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes.

    Source: io_uring_prep_openat(3), open(2).
    """
    flags |= getattr(os, "O_CLOEXEC", 0)
    name = os.fspath(path)
    files = current_files()
    if files is None:
        fd = await trio.to_thread.run_sync(os.open, name, flags, mode)
    else:
        await checkpoint_if_cancelled()
        sys.audit("open", name, None, flags)
        fd = await open_fd(files.manager, name, flags, mode)
    return PositionalFile(fd, name)


class PositionalFile(trio.abc.AsyncResource):
    """An open file without a position, made by `open_positional`.

    All methods may be called by any number of tasks at once. Each async method is a checkpoint. If
    cancelled before it begins, nothing happens. Once begun, it completes: reads and writes of files
    are not interrupted. A buffer must not be resized while it is read into.

    Args:
      fd: An open file descriptor. The object owns it, and closes it.
      name: The value of the ``name`` attribute.
    """

    def __init__(self, fd: int, name: str | bytes | int) -> None:
        self.name = name
        self._fd = fd
        self._users = 0
        self._waiters = ParkingLot()
        self._has_server = file_system_of(fd) is FileSystem.SERVER
        self._nowait_read = not self._has_server
        self._nowait_write: bool | None = False if self._has_server else None  # not known yet
        self._written = 0

    def __repr__(self) -> str:
        return f"<trio_uring.PositionalFile {self.name!r}, {'closed' if self.closed else self._fd}>"

    def fileno(self) -> int:
        """Return the file descriptor, which the object still owns; -1 after `aclose`."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether `aclose` has begun."""
        return self._fd == _CLOSED

    # ---- Reading ---------------------------------------------------------------------------

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
        if size < 0:
            raise ValueError("size must be 0 or more")
        buffer = bytearray(size)
        count = await self.read_into_at(buffer, offset)
        return bytes(buffer) if count == size else bytes(memoryview(buffer)[:count])

    async def read_into_at(self, buffer: Buffer, offset: int, /) -> int:
        """Read into *buffer*, starting *offset* bytes from the beginning of the file.

        Args:
          buffer: Writable and contiguous. At most 0x7ffff000 bytes of it are used.
          offset: In bytes, 0 or more.

        Returns:
          The number of bytes read: less than the size of *buffer* only at the end of the file.

        Raises:
          OSError: as `os.preadv`.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        If cancelled after it began, it completes, and *buffer* is written to.

        Source: io_uring_prep_read(3), preadv2(2).
        """
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
        return await self._read(buffers, offset)

    @enable_ki_protection
    async def _read(self, buffers: Sequence[Buffer], offset: int) -> int:
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check(offset)
        files = current_files()
        if files is None:
            return await self._in_thread(os.preadv, fd, buffers, offset)
        size = _size(buffers)
        if self._nowait_read and size <= INLINE_MAX:
            try:
                count = os.preadv(fd, buffers, offset, _RWF_NOWAIT)
                if count == size or not count or _ends_at(fd, offset + count):
                    files.inline += 1
                    await cancel_shielded_checkpoint()
                    return count
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._nowait_read = False
        in_worker = self._has_server or size > IN_WORKER_MIN
        if len(buffers) == 1:
            operation = operations.read(
                fd, buffers[0], offset, cancellable=False, in_worker=in_worker
            )
        else:
            operation = operations.readv(
                fd, buffers, offset, cancellable=False, in_worker=in_worker
            )
        return await self._perform(files, operation)

    # ---- Writing ---------------------------------------------------------------------------

    async def write_at(self, data: Buffer, offset: int, /, *, dsync: bool = False) -> int:
        """Write *data*, starting *offset* bytes from the beginning of the file.

        Args:
          data: Contiguous. At most 0x7ffff000 bytes of it are written.
          offset: In bytes, 0 or more. The file grows if the data ends beyond its end. If the file
            was opened with ``O_APPEND``, the data is appended whatever the offset.
          dsync: Return only when the data written is on the disk, as after `fdatasync`. What else
            was written to the file is not waited for.

        Returns:
          The number of bytes written: less than the size of *data* if, for example, the disk is
          full, as with `os.pwrite`.

        Raises:
          OSError: as `os.pwrite`, for example ``ENOSPC``, ``EFBIG`` or ``EIO``.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_write(3), pwritev2(2).
        """
        return await self._write([data], offset, dsync)

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
        return await self._write(buffers, offset, dsync)

    @enable_ki_protection
    async def _write(self, buffers: Sequence[Buffer], offset: int, dsync: bool) -> int:  # noqa: FBT001
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check(offset)
        files = current_files()
        if files is None:
            return await self._in_thread(os.pwritev, fd, buffers, offset, RWF_DSYNC * dsync)
        size = _size(buffers)
        self._written += size
        done = 0
        if size <= INLINE_MAX and not dsync and self._may_write_at_once(fd):
            try:
                done = os.pwritev(fd, buffers, offset, _RWF_NOWAIT)
            except BlockingIOError:
                pass
            except OSError as exc:
                if exc.errno != errno.EOPNOTSUPP:
                    raise
                self._nowait_write = False
            if done == size:
                files.inline += 1
                await cancel_shielded_checkpoint()
                return done
        if not done:
            return await self._write_on_ring(files, fd, buffers, offset, RWF_DSYNC * dsync)
        try:
            with trio.CancelScope(shield=True):
                rest = _rest_of(buffers, done)
                done += await self._write_on_ring(files, fd, rest, offset + done)
        except OSError:
            pass  # report what was written; the next write gets the error again
        return done

    def _may_write_at_once(self, fd: int) -> bool:
        """Return whether to try a non-blocking write first.

        Not for an appending file: the write could be short, and another process could append to the
        file before the rest is written.
        """
        if self._nowait_write is None:
            self._nowait_write = not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND
        return self._nowait_write

    async def _write_on_ring(
        self, files: FilesRun, fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0
    ) -> int:
        # Appending writes too, as the kernel would try a non-blocking write first. With RWF_DSYNC,
        # such a write would wait for the disk in the event loop.
        in_worker = bool(flags) or not self._nowait_write or _size(buffers) > IN_WORKER_MIN
        if len(buffers) == 1:
            operation = operations.write(
                fd, buffers[0], offset, flags, cancellable=False, in_worker=in_worker
            )
        else:
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

    # ---- Other operations ------------------------------------------------------------------

    async def fsync(self) -> None:
        """Write the file's data and metadata to the disk, and wait until they are there.

        Raises:
          OSError: as `os.fsync`: ``EIO``, ``ENOSPC``, ``EDQUOT``. It is not known which data were
            lost, and the next call may succeed nevertheless.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_fsync(3), fsync(2).
        """
        await self._call(operations.fsync, os.fsync)

    async def fdatasync(self) -> None:
        """Write the file's data, and the metadata needed to read it back, to the disk.

        Raises:
          OSError: as `fsync`.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_fsync(3), fdatasync(2).
        """
        await self._call(partial(operations.fsync, data_only=True), os.fdatasync)

    async def fallocate(self, offset: int, size: int, /) -> None:
        """Reserve disk space for *size* bytes at *offset*. The file grows if it is shorter.

        Raises:
          OSError: as `os.posix_fallocate`: ``ENOSPC``, ``EFBIG``, ``EINVAL``, ``EOPNOTSUPP``.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_fallocate(3), fallocate(2).
        """
        await self._call(operations.fallocate, os.posix_fallocate, offset, size)

    async def truncate(self, size: int, /) -> None:
        """Make the file *size* bytes long: cut it, or extend it with zeros.

        Raises:
          OSError: as `os.ftruncate`.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_ftruncate(3), ftruncate(2).
        """
        await self._call(operations.ftruncate, os.ftruncate, size)

    async def advise(self, offset: int, size: int, advice: int, /) -> None:
        """Tell the kernel how a part of the file will be used.

        Args:
          offset: Where the part begins, in bytes.
          size: In bytes; 0 for all that follows *offset*.
          advice: `os.POSIX_FADV_WILLNEED`, `os.POSIX_FADV_RANDOM`, ...

        Raises:
          OSError: as `os.posix_fadvise`.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_fadvise64(3), posix_fadvise(2).
        """
        await self._call(operations.fadvise, os.posix_fadvise, offset, size, advice)

    @enable_ki_protection
    async def aclose(self) -> None:
        """Wait for the calls that other tasks have begun, and close the file.

        Calls that begin later raise `trio.ClosedResourceError`. If cancelled, the file is closed
        nevertheless.

        Raises:
          OSError: ``EIO``, ``ENOSPC``, ``EDQUOT``, from file systems that write data when a file is
            closed.

        Source: close(2).
        """
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            with trio.CancelScope(shield=True):
                if self._users:
                    await self._waiters.park()
                # For the reasons that `RingFileIO.close` has.
                files = current_files()
                if files is None or self._has_server or self._written > IN_WORKER_MIN:
                    await trio.to_thread.run_sync(os.close, fd)
                else:
                    os.close(fd)
                    files.manager.ring.flush()
        await trio.lowlevel.checkpoint()

    # ---- Helpers ---------------------------------------------------------------------------

    def _check(self, offset: int = 0) -> int:
        if self._fd == _CLOSED:
            raise trio.ClosedResourceError("the file is closed")
        if offset < 0:
            raise ValueError("offset must be 0 or more")
        return self._fd

    @enable_ki_protection
    async def _call(
        self,
        operation: Callable[..., Operation[None]],
        function: Callable[..., object],
        *args: int,
    ) -> None:
        await checkpoint_if_cancelled()
        fd = self._check()
        files = current_files()
        if files is not None:
            try:
                return await self._perform(files, operation(fd, *args))
            except UnsupportedOpcodeError:  # ftruncate, before Linux 6.9
                files.in_thread += 1
            except OSError as exc:
                if exc.errno != errno.EFBIG:  # for its signal, see _write_on_ring
                    raise
        await self._in_thread(function, fd, *args)
        return None

    async def _perform(self, files: FilesRun, operation: Operation[T]) -> T:
        self._users += 1
        try:
            result = await files.manager.perform(operation)
        finally:
            self._leave()
        files.on_ring += 1
        return result

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        self._users += 1
        try:
            return await trio.to_thread.run_sync(function, *args)
        finally:
            self._leave()

    def _leave(self) -> None:
        self._users -= 1
        if not self._users:
            self._waiters.unpark_all()


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
        return os.preadv(fd, [bytearray(1)], offset, _RWF_NOWAIT) == 0
    except OSError:
        return False
