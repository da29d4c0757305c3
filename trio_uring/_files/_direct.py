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
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from trio.lowlevel import checkpoint_if_cancelled, enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._arguments import check_count, check_index, check_path, check_writable
from trio_uring._engine._io_manager import current_ring
from trio_uring._operations._operation import address_of_buffer

from ._bridge import current_files
from ._modes import flags_of
from ._open import open_fd
from ._positional import PositionalFile
from ._registered_buffers import BufferLease
from ._spare_buffers import SPARE_SIZE, spare_buffers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer, Self

    from trio_uring._operations import Operation

    from ._bridge import FilesRun

T = TypeVar("T")

_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)


async def open_direct(
    file: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    mode: str = "r",
    *,
    permissions: int = 0o666,
    flags: int = 0,
    block_size: int | None = None,
) -> DirectFile:
    """Open a file for direct I/O: positional reads and writes without the page cache.

    Direct I/O (``O_DIRECT``) is for programs that have a cache of their own, or that read much data
    once. Other programs get slower with it: every read waits for the device, and so does every
    write.

    Works in every run. In a run without a ring, the file's methods use threads.

    Args:
      file: The path of a regular file or a block device.
      mode: As for `open_positional`.
      permissions: As for `open_positional`.
      flags: As for `open_positional`.
      block_size: What offsets, sizes and addresses must be multiples of: a power of two, in bytes.
        Needed only if the system doesn't report it. The error then asks for it.

    Returns:
      The open file. Close it with ``async with`` or `PositionalFile.aclose`.

    Raises:
      OSError: as `os.open`. ``EOPNOTSUPP`` if the file doesn't support direct I/O, or doesn't
        report its alignment, as on tmpfs and on network file systems.
      TypeError: *mode* is not a string.
      ValueError: *mode*, *flags* or *block_size* is not valid.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes.

    Source: open(2), statx(2), io_uring_prep_openat(3).
    """
    all_flags = flags_of(mode, flags) | _O_DIRECT
    if block_size is not None and not _is_power_of_two(block_size):
        raise ValueError(f"block_size must be a power of two, not {block_size}")
    name = check_path("file", file)
    await checkpoint_if_cancelled()
    try:
        fd = await _open(name, all_flags, permissions)
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


def _is_power_of_two(number: int) -> bool:
    return check_index("block_size", number) > 0 and not number & (number - 1)


class DirectFile(PositionalFile):
    """A file opened for direct I/O, made by `open_direct`.

    It is a `PositionalFile` with one difference. Offsets and sizes must be multiples of
    *block_size*, and addresses of *memory_alignment*, both in bytes. Otherwise a `ValueError` says
    which of them is wrong. A `BufferLease` is aligned, and a slice of its memory may be.

    The end of a file need not be aligned. A read there returns fewer bytes. To write such an end,
    write a whole block, then call `PositionalFile.truncate`.

    A write returns when the device has the data. The device may still hold it in a cache of its
    own: `PositionalFile.fdatasync` flushes that cache, and stores the file's new size. So does a
    write with *dsync*.
    """

    def __init__(
        self,
        fd: int,
        name: str | bytes | int | None,
        memory_alignment: int,
        block_size: int,
        *,
        closefd: bool = True,
    ) -> None:
        super().__init__(fd, name, closefd=closefd)
        self.memory_alignment: int = memory_alignment
        self.block_size: int = block_size
        self._unit = block_size
        self._nowait_read = self._nowait_write = False

    def _with_fd(self, fd: int) -> Self:
        return type(self)(fd, self.name, self.memory_alignment, self.block_size)

    # ---- Reading and writing ---------------------------------------------------------------

    @enable_ki_protection
    async def read_at(self, size: int, offset: int, /) -> bytes:
        """Read *size* bytes, starting *offset* bytes from the beginning of the file.

        The bytes are read into aligned memory, then copied. `PositionalFile.read_into_at` doesn't
        copy.

        Args:
          size: In bytes, a multiple of *block_size*.
          offset: In bytes, a multiple of *block_size*.

        Returns:
          The bytes read: fewer than *size* only at the end of the file, and none beyond it.

        Raises:
          OSError: as `os.pread`, for example ``EIO``.
          ValueError: *size* or *offset* is negative, or not a multiple of *block_size*.
          trio.ClosedResourceError: the file is closed.

        Source: io_uring_prep_read_fixed(3), preadv2(2).
        """
        check_count("size", size)
        if size <= SPARE_SIZE:
            spare = spare_buffers()
            lease = spare.take()
            try:
                count = await self._read_leased(lease, size, offset)
                return bytes(lease.memory[:count])
            finally:
                spare.put_back(lease)
        # Anonymous mappings are aligned to a page.
        with mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with memoryview(memory) as buffer:
                count = await self._read([buffer], offset)
            return memory[:count]

    async def read_into_at(self, buffer: Buffer | BufferLease, offset: int, /) -> int:
        """Read into *buffer*, starting *offset* bytes from the beginning of the file.

        As `PositionalFile.read_into_at`.

        Args:
          buffer: A lease, or writable, contiguous and aligned memory.
          offset: In bytes, a multiple of *block_size*.

        Raises:
          ValueError: *offset*, *buffer*'s size or its address are not aligned.

        Source: io_uring_prep_read_fixed(3), preadv2(2).
        """
        if isinstance(buffer, BufferLease):
            return await self._read_leased(buffer, len(buffer.memory), offset)
        check_writable("buffer", buffer)
        return await self._read([buffer], offset)

    @enable_ki_protection
    async def _read_leased(self, lease: BufferLease, size: int, offset: int) -> int:
        fd = self._check(offset)
        self._check_multiples(offset, size)
        files = current_files()
        lease.users += 1
        self._users += 1
        try:
            if files is None:
                buffers = [lease.memory[:size]]
                return await trio.to_thread.run_sync(os.preadv, fd, buffers, offset)
            operation = lease.operation(
                operations.read_fixed, files.manager, fd, offset, size, in_worker=self._has_server
            )
            if operation is None:
                operation = operations.read(
                    fd, lease.memory[:size], offset, cancellable=False, in_worker=self._has_server
                )
            files.on_ring += 1
            operation.for_device = True
            return await files.manager.perform(operation)
        finally:
            lease.users -= 1
            self._leave()

    async def _perform(self, files: FilesRun, operation: Operation[T]) -> T:
        operation.for_device = True
        return await super()._perform(files, operation)

    def _buffers_for(self, parts: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Return aligned memory for each part. All are in one mapping, which ends with the last."""
        for size, offset in parts:
            self._check_multiples(offset, size)
        starts = [0]
        for size, _ in parts:
            starts.append(starts[-1] + -(-size // self.memory_alignment) * self.memory_alignment)
        memory = mmap.mmap(-1, starts[-1] or 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        whole = memoryview(memory)
        return [
            whole[start : start + size] for start, (size, _) in zip(starts, parts, strict=False)
        ]

    async def _read(
        self, buffers: Sequence[Buffer], offset: int, lease: BufferLease | None = None
    ) -> int:
        for buffer in buffers:
            self._check_aligned(buffer, offset)
        return await super()._read(buffers, offset, lease)

    async def append(self, data: Buffer | BufferLease, /, *, dsync: bool = False) -> int:
        """Append *data* to the file, and return the offset at which it begins.

        As `PositionalFile.append`.

        Args:
          data: A lease, or contiguous and aligned memory.
          dsync: As for `PositionalFile.write_at`.

        Raises:
          OSError: ``EINVAL`` if the end of the file is not aligned.
          ValueError: *data*'s size or its address are not aligned.

        Source: pwritev2(2), ``RWF_APPEND``.
        """
        self._check_aligned(data.memory if isinstance(data, BufferLease) else data, 0)
        return await super().append(data, dsync=dsync)

    async def _write(
        self,
        buffers: Sequence[Buffer],
        offset: int,
        dsync: bool,  # noqa: FBT001 (write_at's)
        lease: BufferLease | None = None,
        fd: int | None = None,
    ) -> int:
        if lease is not None:
            self._check_multiples(offset, len(lease.memory))
        else:
            for buffer in buffers:
                self._check_aligned(buffer, offset)
        return await super()._write(buffers, offset, dsync, lease, fd)

    # The kernel begins direct reads and writes without waiting, and copies nothing.

    def _reads_in_worker(self, size: int) -> bool:
        return self._has_server

    def _writes_in_worker(self, size: int, flags: int) -> bool:
        return self._has_server

    # ---- Alignment -------------------------------------------------------------------------

    def _check_aligned(self, buffer: Buffer, offset: int) -> None:
        with memoryview(buffer) as view:
            size = view.nbytes
        self._check_multiples(offset, size)
        address = address_of_buffer(buffer)
        if size and address % self.memory_alignment:
            raise ValueError(
                f"the buffer's address, {address:#x}, is not a multiple of "
                f"{self.memory_alignment}, which this file's memory_alignment is: take memory "
                "from trio_uring.RegisteredBuffers or mmap, which begin at a page"
            )

    def _check_multiples(self, offset: int, size: int) -> None:
        if not (offset | size) & (self.block_size - 1):
            return
        name, value = ("offset", offset) if offset % self.block_size else ("size", size)
        raise ValueError(
            f"the {name}, {value}, is not a multiple of {self.block_size}, "
            "which this file's block_size is"
        )


# ---- Opening -------------------------------------------------------------------------------


async def _open(name: str | bytes, flags: int, permissions: int) -> int:
    manager = current_ring("files")
    if manager is None:
        return await trio.to_thread.run_sync(os.open, name, flags, permissions)
    sys.audit("open", name, None, flags)
    return await open_fd(manager, name, flags, permissions)


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
