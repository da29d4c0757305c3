"""`open_direct`: direct I/O, between the program's memory and the disk, without the page cache.

The kernel requires every offset, size and address to be a multiple of a power of two, and fails
with a bare ``EINVAL`` otherwise. Here each of them is checked, and the error says which one is
wrong and what it must be a multiple of.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import checkpoint_if_cancelled, current_task, enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._engine._io_manager import current_ring
from trio_uring._operations._operation import address_of_buffer
from trio_uring._trio_private import is_cancelled

from ._bridge import current_files
from ._open import open_fd
from ._positional import RWF_DSYNC, PositionalFile
from ._registered_buffers import BufferLease

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from trio_uring._operations import Operation

_FLAGS: Final = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "w+": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "x": os.O_WRONLY | os.O_CREAT | os.O_EXCL,
    "x+": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}
# The permissions of a new file, before the umask is applied. The same as for `open`.
_MODE: Final = 0o666
_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_O_CLOEXEC: Final = getattr(os, "O_CLOEXEC", 0)


async def open_direct(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: str = "r",
    *,
    block_size: int | None = None,
) -> DirectFile:
    """Open a file for direct I/O: positional reads and writes without the page cache.

    Direct I/O (``O_DIRECT``) is for programs that have a cache of their own, or that read much data
    once. Other programs get slower with it: every read waits for the device, and so does every
    write.

    Works in every run. In a run without a ring, the file's methods use threads.

    Args:
      path: The path of a regular file or a block device.
      mode: ``"r"``, ``"w"`` (truncates or creates the file) or ``"x"`` (creates it), with ``"+"``
        for both reading and writing. The file is always binary.
      block_size: What offsets, sizes and addresses must be multiples of: a power of two, in bytes.
        Needed only if the system doesn't report it. The error then asks for it.

    Returns:
      The open file. Close it with ``async with`` or `PositionalFile.aclose`.

    Raises:
      OSError: as `os.open`. ``EOPNOTSUPP`` if the file doesn't support direct I/O, or doesn't
        report its alignment, as on tmpfs and on network file systems.
      ValueError: *mode* or *block_size* is not valid.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes.

    Source: open(2), statx(2), io_uring_prep_openat(3).
    """
    if mode.replace("b", "", 1) not in _FLAGS:
        raise ValueError(f"mode must be one of {', '.join(_FLAGS)}, not {mode!r}")
    if block_size is not None and (block_size < 1 or block_size & (block_size - 1)):
        raise ValueError(f"block_size must be a power of two, not {block_size}")
    name = os.fspath(path)
    flags = _FLAGS[mode.replace("b", "", 1)] | _O_DIRECT | _O_CLOEXEC
    await checkpoint_if_cancelled()
    try:
        fd = await _open(name, flags)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        raise _unsupported(name, "it has no O_DIRECT (open(2): EINVAL)") from None
    try:
        aligned = (block_size, block_size) if block_size else await _alignment(fd, name)
    except BaseException:
        os.close(fd)
        raise
    return DirectFile(fd, name, *aligned)


class DirectFile(PositionalFile):
    """A file opened for direct I/O, made by `open_direct`.

    It is a `PositionalFile` with two differences. Offsets and sizes must be multiples of
    *block_size*, and addresses of *memory_alignment*, both in bytes. Otherwise a `ValueError` says
    which of them is wrong. Reads and writes also accept a `BufferLease`. If its `RegisteredBuffers`
    are registered with the run's ring, they use the registered buffer.

    The end of a file need not be aligned. A read there returns fewer bytes. To write such an end,
    write a whole block, then call `PositionalFile.truncate`.
    """

    def __init__(self, fd: int, name: str | bytes, memory_alignment: int, block_size: int) -> None:
        super().__init__(fd, name)
        self.memory_alignment = memory_alignment
        self.block_size = block_size

    def __repr__(self) -> str:
        return f"<trio_uring.DirectFile {self.name!r}, {'closed' if self.closed else self._fd}>"

    # ---- Reading and writing ---------------------------------------------------------------

    async def read_at(self, size: int, offset: int, /) -> bytes:
        """Read *size* bytes, starting *offset* bytes from the beginning of the file.

        The bytes are read into aligned memory, then copied. `read_into_at` doesn't copy.

        Args:
          size: In bytes, a multiple of *block_size*.
          offset: In bytes, a multiple of *block_size*.

        Returns:
          The bytes read: fewer than *size* only at the end of the file, and none beyond it.

        Raises:
          OSError: as `os.pread`, for example ``EIO``.
          ValueError: *size* or *offset* is negative, or not a multiple of *block_size*.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_read(3), preadv2(2).
        """
        if size < 0:
            raise ValueError("size must be 0 or more")
        # Anonymous mappings are aligned to a page.
        with mmap.mmap(-1, size or 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with memoryview(memory) as whole, whole[:size] as buffer:
                count = await self._read([buffer], offset)
            return memory[:count]

    async def read_into_at(self, buffer: Buffer | BufferLease, offset: int, /) -> int:
        """Read into *buffer*, starting *offset* bytes from the beginning of the file.

        Args:
          buffer: A lease, which is used as a whole, or aligned writable memory, such as a slice of
            a lease's memory.
          offset: In bytes, a multiple of *block_size*.

        Returns:
          The number of bytes read: less than the size of *buffer* only at the end of the file.

        Raises:
          OSError: as `os.preadv`.
          ValueError: *offset*, *buffer*'s size or its address are not aligned.
          RuntimeError: the lease was released.
          trio.ClosedResourceError: the file is closed.

        If cancelled after it began, it completes, and *buffer* is written to.

        Source: io_uring_prep_read_fixed(3), preadv2(2).
        """
        if isinstance(buffer, BufferLease):
            return await self._leased(operations.read_fixed, operations.read, buffer, offset)
        return await self._read([buffer], offset)

    async def write_at(
        self, data: Buffer | BufferLease, offset: int, /, *, dsync: bool = False
    ) -> int:
        """Write *data*, starting *offset* bytes from the beginning of the file.

        Returns when the device has the data. The device may still hold it in a cache of its own:
        `PositionalFile.fdatasync` flushes that cache, and stores the file's new size.

        Args:
          data: A lease, which is used as a whole, or aligned memory, such as a slice of a lease's
            memory.
          offset: In bytes, a multiple of *block_size*. The file grows if the data ends beyond its
            end.
          dsync: Return only when the data, and the file's size, are stored, as after `fdatasync`.

        Returns:
          The number of bytes written: less than the size of *data* if the disk is full.

        Raises:
          OSError: as `os.pwrite`, for example ``ENOSPC`` or ``EIO``.
          ValueError: *offset*, *data*'s size or its address are not aligned.
          RuntimeError: the lease was released.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_write_fixed(3), pwritev2(2).
        """
        if isinstance(data, BufferLease):
            flags = RWF_DSYNC * dsync
            return await self._leased(operations.write_fixed, operations.write, data, offset, flags)
        return await self._write([data], offset, dsync)

    @enable_ki_protection
    async def _leased(
        self,
        fixed: Callable[[int, Buffer, int, int], Operation[int]],
        plain: Callable[[int, Buffer, int, int], Operation[int]],
        lease: BufferLease,
        offset: int,
        flags: int = 0,
    ) -> int:
        memory = lease.memory
        fd = self._check(offset)
        if (offset | len(memory)) & (self.block_size - 1):
            self._explain(offset, len(memory))
        if is_cancelled(current_task()):
            await checkpoint_if_cancelled()
        files = None if self._has_server else current_files()
        index = lease.pool.index_in(files.manager) if files is not None else -1
        # A lease keeps its operations, which are all without flags.
        is_fixed = index >= 0 and not flags
        operation = lease.operation(fixed, fd, offset, index) if is_fixed else None
        lease.users += 1
        try:
            if files is None:
                call = os.preadv if fixed is operations.read_fixed else os.pwritev
                return await self._in_thread(call, fd, [memory], offset, flags)
            return await self._perform(files, operation or plain(fd, memory, offset, flags))
        finally:
            lease.users -= 1

    async def _read(self, buffers: Sequence[Buffer], offset: int) -> int:
        return await self._direct(operations.readv, os.preadv, buffers, offset)

    async def _write(self, buffers: Sequence[Buffer], offset: int, dsync: bool) -> int:  # noqa: FBT001
        flags = RWF_DSYNC * dsync
        return await self._direct(operations.writev, os.pwritev, buffers, offset, flags)

    @enable_ki_protection
    async def _direct(
        self,
        operation: Callable[[int, Sequence[Buffer], int, int], Operation[int]],
        call: Callable[[int, Sequence[Buffer], int, int], int],
        buffers: Sequence[Buffer],
        offset: int,
        flags: int = 0,
    ) -> int:
        if is_cancelled(current_task()):
            await checkpoint_if_cancelled()
        fd = self._check(offset)
        for buffer in buffers:
            self._check_aligned(buffer, offset)
        files = current_files()
        if files is None or self._has_server:
            return await self._in_thread(call, fd, buffers, offset, flags)
        return await self._perform(files, operation(fd, buffers, offset, flags))

    # ---- Alignment -------------------------------------------------------------------------

    def _check_aligned(self, buffer: Buffer, offset: int) -> None:
        with memoryview(buffer) as view:
            size = view.nbytes
        if (offset | size) & (self.block_size - 1):
            self._explain(offset, size)
        address = address_of_buffer(buffer)
        if size and address % self.memory_alignment:
            raise ValueError(
                f"the buffer's address, {address:#x}, is not a multiple of "
                f"{self.memory_alignment}, which this file's memory_alignment is: take memory "
                "from trio_uring.RegisteredBuffers or mmap, which begin at a page"
            )

    def _explain(self, offset: int, size: int) -> None:
        name, value = ("offset", offset) if offset % self.block_size else ("size", size)
        raise ValueError(
            f"the {name}, {value}, is not a multiple of {self.block_size}, "
            "which this file's block_size is"
        )


# ---- Opening -------------------------------------------------------------------------------


async def _open(name: str | bytes, flags: int) -> int:
    manager = current_ring("files")
    if manager is None:
        return await trio.to_thread.run_sync(os.open, name, flags, _MODE)
    sys.audit("open", name, None, flags)
    return await open_fd(manager, name, flags, _MODE)


async def _alignment(fd: int, name: str | bytes) -> tuple[int, int]:
    """Return the alignment of addresses, and that of offsets and sizes, in bytes."""
    manager = current_ring("files")
    told: tuple[int, int] | None = None
    if manager is not None:
        told = await manager.perform_shielded(operations.statx_alignment(fd))
    if told is None:  # no ring, Linux before 6.1, or a file system that doesn't report it
        block_size = _logical_block_size(os.fstat(fd))
        told = (block_size, block_size)
        if not block_size:
            raise _unsupported(
                name,
                "it is in no block device, and does not say how it can be used past the page "
                "cache: tmpfs and the like cannot; if this one can, give block_size",
            )
    if not all(told):
        raise _unsupported(name, "statx(2) says that O_DIRECT does not work for this file")
    return told


def _logical_block_size(status: os.stat_result) -> int:
    """Return the block size of the device that contains a file or is it; 0 if there is none."""
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue directory of its own. Its whole device has one.
    for queue in (entry / "queue", entry / ".." / "queue"):
        try:
            return int((queue / "logical_block_size").read_text())
        except OSError:
            continue
    return 0


def _unsupported(name: str | bytes, why: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, f"no direct I/O on this file: {why}", name)
