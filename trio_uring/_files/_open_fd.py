"""`OpenFd`: an open file that many tasks use, and what they do with it besides reading and writing.

Most calls are operations on the ring. The kernel has no operation for the others: a call that may
wait for the disk then uses a thread, and one that does not, such as fstat(2), is made directly.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from contextlib import asynccontextmanager
from enum import IntFlag
from functools import partial
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from trio_uring import _operations as operations
from trio_uring._arguments import check_count, check_index, wrong_type
from trio_uring._engine import _file_calls as file_calls

from ._owned_fd import OwnedFd

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# In seconds. The kernel has no lock that can be waited for and cancelled, so a task that waits for
# one asks again, at first soon, then 20 times a second. With a longer delay it would get the lock
# later; with half, 100 tasks that wait would take more than a tenth of a CPU.
_LOCK_DELAY_MIN: Final = 0.001
_LOCK_DELAY_MAX: Final = 0.05

# struct flock: the kind, the base of the offset, the offset, the size, and a pid, which must be 0.
_FLOCK: Final = struct.Struct("@hhqqi")
_F_OFD_SETLK: Final = 37  # from linux/fcntl.h, in case Python was built without it

# In bytes. The most that one call of a thread copies. A copy can be cancelled between two calls. At
# half, a thread switch would be a thousandth of the time, too.
_COPY_MAX: Final = 1 << 26

# The flags of sync_file_range(2): WAIT_BEFORE, WRITE and WAIT_AFTER.
_SYNC_START: Final = 2
_SYNC_AND_WAIT: Final = 1 | 2 | 4
_RANGE_MAX: Final = (1 << 32) - 1  # the size has 32 bits in an SQE


class FallocateMode(IntFlag):
    """What `PositionalFile.fallocate` does with a range of the file. Source: fallocate(2)."""

    ALLOCATE = 0
    """Reserve disk space. The file grows if the range ends beyond its end."""
    KEEP_SIZE = 1
    """Reserve disk space, also beyond the end. The file does not grow."""
    PUNCH_HOLE = 2 | 1
    """Release the disk space. The range then reads as zeros. The file keeps its size."""
    COLLAPSE_RANGE = 8
    """Remove the range. What follows moves forward."""
    ZERO_RANGE = 16
    """Make the range zeros, with disk space reserved. With ``| KEEP_SIZE``, it does not grow."""
    INSERT_RANGE = 32
    """Insert a hole. What follows moves back."""
    UNSHARE_RANGE = 64
    """Give the range disk space of its own, where it shares some with a copy of the file."""


class OpenFd(OwnedFd):
    """An open file, with the methods that `PositionalFile` and `DirectFile` share."""

    # ---- Size and status -------------------------------------------------------------------

    async def stat(self) -> os.stat_result:
        """Return the status of the file, as `os.fstat`.

        The kernel has it in memory. So it is asked directly, and in a thread on a file system with
        a server, such as NFS.

        Raises:
          OSError: as `os.fstat`.
          trio.ClosedResourceError: the file is closed.

        Source: fstat(2).
        """
        return await self._call_directly(os.fstat)

    async def size(self) -> int:
        """Return the size of the file in bytes; for a block device, that of the device.

        Raises:
          OSError: as `os.fstat`.
          trio.ClosedResourceError: the file is closed.

        Source: fstat(2).
        """
        return await self._call_directly(_size_of)

    async def seek_data(self, offset: int, /) -> int | None:
        """Return the offset of the first data at or after *offset*: of what is not in a hole.

        The kernel has no operation for it, so it uses a thread.

        Args:
          offset: In bytes, 0 or more.

        Returns:
          The offset of the data in bytes; None if none follows.

        Raises:
          OSError: as `os.lseek`: ``EINVAL``, ``EOPNOTSUPP``.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: lseek(2), ``SEEK_DATA``.
        """
        return await self._seek(offset, os.SEEK_DATA)

    async def seek_hole(self, offset: int, /) -> int | None:
        """Return the offset of the first hole at or after *offset*; see `seek_data`.

        Returns:
          The offset of the hole in bytes. The end of the file counts as a hole. None if *offset* is
          at the end of the file or beyond it.

        Source: lseek(2), ``SEEK_HOLE``.
        """
        return await self._seek(offset, os.SEEK_HOLE)

    async def _seek(self, offset: int, whence: int) -> int | None:
        self._check(offset)
        try:
            async with self._position:  # it moves the position
                return await self._in_thread(os.lseek, self._check(), offset, whence)
        except OSError as exc:
            if exc.errno != errno.ENXIO:
                raise
            return None

    # ---- Making durable --------------------------------------------------------------------

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
        await self._call(fdatasync, os.fdatasync)

    async def sync_file_range(self, offset: int, size: int, /, *, wait: bool = True) -> None:
        """Write a part of the file's data to the disk, but no metadata.

        After a crash, the data may therefore be there and not be found. Use it to spread the work
        of a later `fdatasync`, or for data in blocks that were written before.

        Args:
          offset: Where the part begins, in bytes, 0 or more.
          size: In bytes; 0 for all that follows *offset*.
          wait: Whether to wait until the data is on the disk. Otherwise the call only starts the
            writing.

        Raises:
          OSError: as sync_file_range(2): ``EIO``, ``ENOSPC``, ``EINVAL``.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_sync_file_range(3), sync_file_range(2).
        """
        flags = _SYNC_AND_WAIT if wait else _SYNC_START
        self._check(offset)
        if size > _RANGE_MAX:
            size = 0
        await self._call(
            operations.sync_file_range, file_calls.sync_file_range, offset, size, flags
        )

    # ---- Space -----------------------------------------------------------------------------

    async def fallocate(
        self, offset: int, size: int, /, mode: FallocateMode = FallocateMode.ALLOCATE
    ) -> None:
        """Reserve disk space for a range of the file, or change the range according to *mode*.

        Args:
          offset: Where the range begins, in bytes, 0 or more.
          size: In bytes, more than 0.
          mode: One of `FallocateMode`. What a file system supports differs.

        Raises:
          OSError: as fallocate(2): ``ENOSPC``, ``EFBIG``, ``EINVAL``; ``EOPNOTSUPP`` if the file
            system does not support *mode*.
          ValueError: *offset* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_fallocate(3), fallocate(2).
        """
        self._check(offset)
        check_count("size", size)
        await self._call(operations.fallocate, file_calls.fallocate, offset, size, int(mode))

    async def truncate(self, size: int, /) -> None:
        """Make the file *size* bytes long: cut it, or extend it with zeros.

        Raises:
          OSError: as `os.ftruncate`.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_ftruncate(3), ftruncate(2).
        """
        check_count("size", size)
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
        check_count("offset", offset)
        check_count("size", size)
        check_index("advice", advice)
        await self._call(operations.fadvise, os.posix_fadvise, offset, size, advice)

    @enable_ki_protection
    async def copy_range(
        self, offset: int, target: OpenFd, target_offset: int, size: int, /
    ) -> int:
        """Copy a part of this file into *target*, inside the kernel.

        Some file systems let both files share the disk space instead of copying. The kernel has no
        operation for it, so it uses a thread, for at most 64 MiB at a time.

        Args:
          offset: Where to begin in this file, in bytes, 0 or more.
          target: A file that is open for writing and not for appending. It may be this file, if the
            two parts do not overlap.
          target_offset: Where to begin in *target*, in bytes, 0 or more.
          size: How many bytes to copy.

        Returns:
          The number of bytes copied: fewer than *size* only if this file ends before.

        Raises:
          OSError: as `os.copy_file_range`: ``EXDEV`` if the files are on file systems between which
            the kernel does not copy; ``EINVAL``, ``EBADF``, ``ENOSPC``.
          ValueError: a number is negative.
          trio.ClosedResourceError: a file is closed.

        If cancelled, the thread finishes its 64 MiB. What was copied stays.

        Source: copy_file_range(2).
        """
        check_count("size", size)
        check_count("target_offset", target_offset)
        if not isinstance(target, OpenFd):
            raise wrong_type("target", target, "a file of open_positional")
        await checkpoint_if_cancelled()
        done = 0
        fd, target_fd = self._check(offset), target._check(target_offset)
        target._users += 1
        self._users += 1
        try:
            while True:
                count = await trio.to_thread.run_sync(
                    os.copy_file_range,
                    *(fd, target_fd, min(size - done, _COPY_MAX)),
                    *(offset + done, target_offset + done),
                )
                done += count
                if not count or done == size:
                    return done
        finally:
            self._leave()
            target._leave()

    # ---- Locks -----------------------------------------------------------------------------

    async def lock(self, offset: int = 0, size: int = 0, /, *, shared: bool = False) -> None:
        """Lock a part of the file against other programs; wait until nobody else has a lock on it.

        It is a lock of the open file (an "open file description lock"). It excludes those who have
        opened the file themselves, in other processes or in this one. It does not exclude tasks
        that use this object or a `dup` of it: use a `trio.Lock` for these. It is advisory: it
        excludes other locks, no reads and writes. A part that is locked already gets the new kind
        of lock.

        The kernel offers no wait that can be cancelled. So the call tries again, first after 1 ms,
        then less often, down to every 50 ms.

        Args:
          offset: Where the part begins, in bytes, 0 or more.
          size: In bytes; 0 for all that follows *offset*, however much the file grows.
          shared: Whether others may have a shared lock as well. The file must be open for reading
            then, and otherwise for writing.

        Raises:
          OSError: ``EBADF``: the file is not open for that; ``ENOLCK``.
          ValueError: *offset* or *size* is negative.
          trio.ClosedResourceError: the file is closed, or closes meanwhile.

        If cancelled, no lock was taken.

        Source: fcntl(2), ``F_OFD_SETLK``.
        """
        delay = _LOCK_DELAY_MIN
        while not await self.try_lock(offset, size, shared=shared):
            await trio.sleep(delay)
            delay = min(2 * delay, _LOCK_DELAY_MAX)

    async def try_lock(self, offset: int = 0, size: int = 0, /, *, shared: bool = False) -> bool:
        """Lock a part of the file as `lock`, if that is possible without waiting.

        Returns:
          Whether it is locked. If not, somebody else has a lock on the part or on some of it.

        Raises:
          OSError: this and other errors are as for `lock`.

        Source: fcntl(2), ``F_OFD_SETLK``.
        """
        _check_part(offset, size)
        kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
        try:
            await self._call_directly(_set_lock, kind, offset, size)
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            await cancel_shielded_checkpoint()
            return False
        return True

    async def unlock(self, offset: int = 0, size: int = 0, /) -> None:
        """Unlock a part of the file, whatever locks this open file has on it.

        Closing unlocks, too, unless the fd was duplicated.

        Args:
          offset: Where the part begins, in bytes, 0 or more.
          size: In bytes; 0 for all that follows *offset*.

        Raises:
          OSError: as fcntl(2).
          ValueError: *offset* or *size* is negative.
          trio.ClosedResourceError: the file is closed.

        Source: fcntl(2), ``F_OFD_SETLK``.
        """
        _check_part(offset, size)
        await self._call_directly(_set_lock, fcntl.F_UNLCK, offset, size)

    @asynccontextmanager
    async def locked(
        self, offset: int = 0, size: int = 0, /, *, shared: bool = False
    ) -> AsyncGenerator[None]:
        """Lock a part of the file as `lock`, and unlock it at the end of the ``async with`` block.

        Raises:
          OSError: this and other errors are as for `lock`.

        Source: fcntl(2), ``F_OFD_SETLK``.
        """
        await self.lock(offset, size, shared=shared)
        try:
            yield
        finally:
            if not self.closed:
                with trio.CancelScope(shield=True):
                    await self.unlock(offset, size)


fdatasync: Final = partial(operations.fsync, data_only=True)


def _size_of(fd: int) -> int:
    status = os.fstat(fd)
    return os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size


def _check_part(offset: int, size: int) -> None:
    check_count("offset", offset)
    check_count("size", size)


def _set_lock(fd: int, kind: int, offset: int, size: int) -> None:
    """Lock or unlock *size* bytes of a file; 0 for all that follow *offset*. Does not wait.

    Args:
      fd: An open file.
      kind: ``fcntl.F_RDLCK``, ``F_WRLCK`` or ``F_UNLCK``.
      offset: In bytes.
      size: In bytes.

    Raises:
      OSError: ``EAGAIN`` if somebody else has a lock on the part; ``EBADF``, ``ENOLCK``.

    Source: fcntl(2), ``F_OFD_SETLK``.
    """
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, offset, size, 0))
