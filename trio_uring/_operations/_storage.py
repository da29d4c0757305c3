"""The operations on the storage of open files: to flush it, reserve it, and cut it."""

from __future__ import annotations

from trio_uring._kernel.uapi import FsyncFlag, Opcode

from ._operation import Operation, as_address, nothing, signed_64_bits

# A plain int: an IntFlag in an expression costs a microsecond.
_DATASYNC = int(FsyncFlag.DATASYNC)


def fsync(fd: int, *, data_only: bool = False) -> Operation[None]:
    """Flush a file to the disk: its data and, unless *data_only*, its metadata.

    Completes with: nothing.
    Fails with: ``EIO``, ``ENOSPC``; ``EINVAL`` if *fd* cannot be synchronised.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_fsync(3), fsync(2).
    """
    flags = _DATASYNC if data_only else 0
    return Operation(Opcode.FSYNC, nothing, fd, op_flags=flags, cancellable=False, limited=True)


def sync_file_range(fd: int, offset: int, size: int, flags: int) -> Operation[None]:
    """Write back dirty pages of a file: *size* bytes from *offset* on; 0 for all that follow.

    *flags* is a combination of 1 (wait for a write-back that has begun), 2 (start a write-back) and
    4 (wait for it). No metadata is written, so this does not replace `fsync`.

    Completes with: nothing.
    Fails with: ``EIO``, ``ENOSPC``, ``ESPIPE``, ``EINVAL``: see sync_file_range(2).
    If cancelled: it still completes.
    Since: Linux 5.2. Source: io_uring_prep_sync_file_range(3), sync_file_range(2).
    """
    return Operation(
        Opcode.SYNC_FILE_RANGE,
        nothing,
        fd,
        len=size,
        op_flags=flags,
        off=signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def fallocate(fd: int, offset: int, size: int, mode: int = 0) -> Operation[None]:
    """Reserve disk space for *size* bytes at *offset*, or change the range according to *mode*.

    *mode*: the ``FALLOC_FL_*`` of fallocate(2). 1 keeps the size of the file, 3 punches a hole.

    Completes with: nothing.
    Fails with: ``ENOSPC``, ``EFBIG``, ``EOPNOTSUPP``, ``EINVAL``, ...: see fallocate(2).
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_fallocate(3), fallocate(2).
    """
    # The field addr has the size, and len has the mode.
    return Operation(
        Opcode.FALLOCATE,
        nothing,
        fd,
        as_address(signed_64_bits(size, "size")),
        mode,
        off=signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def fadvise(fd: int, offset: int, size: int, advice: int) -> Operation[None]:
    """Tell the kernel how *size* bytes at *offset* will be used. A *size* of 0: all that follow.

    *advice*: `os.POSIX_FADV_WILLNEED`, `os.POSIX_FADV_DONTNEED`, ...

    Completes with: nothing.
    Fails with: ``ESPIPE`` for a pipe; ``EINVAL``, on older kernels also for a *size* of 4 GiB or
      more.
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_fadvise64(3), posix_fadvise(2).
    """
    # Older kernels read the size from len. Newer ones also read it from addr, which has 64 bits.
    wide = signed_64_bits(size, "size") >= 1 << 32
    return Operation(
        Opcode.FADVISE,
        nothing,
        fd,
        as_address(signed_64_bits(size) if wide else 0),
        0 if wide else size,
        advice,
        signed_64_bits(offset),
        cancellable=False,
        limited=True,
    )


def ftruncate(fd: int, size: int) -> Operation[None]:
    """Make a file *size* bytes long: cut it, or extend it with zeros.

    Completes with: nothing.
    Fails with: ``EINVAL``, ``EFBIG``, ``EBADF``, ...: see ftruncate(2).
    If cancelled: it still completes.
    Since: Linux 6.9. Source: io_uring_prep_ftruncate(3), ftruncate(2).
    """
    off = signed_64_bits(size, "size")
    return Operation(Opcode.FTRUNCATE, nothing, fd, off=off, cancellable=False, limited=True)
