"""The operations on a file's status and extended attributes, one function each."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final

from trio_uring._arguments import Path as StrOrBytesPath, check_path
from trio_uring._kernel.uapi import Opcode

from ._operation import Operation, address_of, nothing, pin_export, pin_writable
from ._paths import AT_FDCWD, encode_path, pin_path

if TYPE_CHECKING:
    from typing_extensions import Buffer

# From fcntl.h.
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_NO_AUTOMOUNT: Final = 0x800
_AT_EMPTY_PATH: Final = 0x1000

# struct statx of linux/stat.h, the same on every architecture. Its 256 bytes include space for
# future fields. The fields below are those that stat(2) has too.
_STATX_SIZE: Final = 256
_STATX_BASIC_STATS: Final = 0x7FF
_STATX_DIOALIGN: Final = 0x2000
_STATX = struct.Struct(
    "=4x I 8x III H 2x QQQ 8x"  # blksize; nlink, uid, gid; mode; ino, size, blocks
    " qI 4x 16x qI 4x qI 4x"  # atime, (birth,) ctime, mtime: seconds and nanoseconds
    " II II"  # rdev, dev: major and minor
)

# stx_mask, stx_dio_mem_align, stx_dio_offset_align.
_STATX_ALIGNMENT = struct.Struct("=I 148x II")

# The largest value of an extended attribute (XATTR_SIZE_MAX of linux/limits.h).
_XATTR_SIZE_MAX: Final = 65536


def statx(
    path: StrOrBytesPath | int, *, dir_fd: int = AT_FDCWD, follow_symlinks: bool = True
) -> Operation[os.stat_result]:
    """Get the status of a file, by path or, like `os.fstat`, by fd.

    Completes with: an `os.stat_result`, as `os.stat` returns.
    Fails with: ``ENOENT``, ``EACCES``, ``ELOOP``, ``ENOTDIR``, ``EBADF``: see statx(2).
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_statx(3), statx(2).
    """
    # Like stat(2), which doesn't trigger automounts.
    flags = _AT_NO_AUTOMOUNT
    name: str | bytes | None = None
    if isinstance(path, int):
        dir_fd = path
        encoded = b""
        flags |= _AT_EMPTY_PATH
    else:
        name = check_path("path", path)
        encoded = encode_path(name)
        flags |= 0 if follow_symlinks else _AT_SYMLINK_NOFOLLOW
    status = bytearray(_STATX_SIZE)
    pin = pin_writable(status)
    return Operation(
        Opcode.STATX,
        lambda _res, _flags: stat_result(status),
        dir_fd,
        encoded,
        _STATX_BASIC_STATS,
        flags,
        address_of(pin),
        pins=(pin,),
        cancellable=False,
        limited=True,
        filename=name,
    )


def statx_alignment(fd: int) -> Operation[tuple[int, int] | None]:
    """Get the alignment that direct I/O (``O_DIRECT``) on an open file requires.

    Completes with: the alignment of addresses, and that of offsets and sizes, in bytes. Both are 0
      if the file doesn't support direct I/O. None if the file system doesn't report it.
    Fails with: ``EBADF``, ``EIO``: see statx(2).
    If cancelled: it still completes.
    Since: Linux 5.6; reported since 6.1. Source: io_uring_prep_statx(3), statx(2).
    """
    status = bytearray(_STATX_SIZE)
    pin = pin_writable(status)

    def decode(_res: int, _flags: int) -> tuple[int, int] | None:
        mask, address, offset = _STATX_ALIGNMENT.unpack_from(status)
        return (address, offset) if mask & _STATX_DIOALIGN else None

    return Operation(
        Opcode.STATX,
        decode,
        fd,
        b"",
        _STATX_DIOALIGN,
        _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT,
        address_of(pin),
        pins=(pin,),
        cancellable=False,
        limited=True,
    )


def getxattr(path: StrOrBytesPath, name: StrOrBytesPath) -> Operation[bytes]:
    """Read the extended attribute *name*, such as ``user.mime_type``, of the file at *path*.

    Completes with: the value of the attribute.
    Fails with: ``ENODATA`` if it does not exist, ``EOPNOTSUPP``, ``ENOENT``, ...: see getxattr(2).
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_getxattr(3), getxattr(2).
    """
    return _get_attribute(Opcode.GETXATTR, 0, name, check_path("path", path))


def fgetxattr(fd: int, name: StrOrBytesPath) -> Operation[bytes]:
    """Read the extended attribute *name* of an open file.

    Completes with: the value of the attribute.
    Fails with: as `getxattr`; ``EBADF``.
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_fgetxattr(3), fgetxattr(2).
    """
    return _get_attribute(Opcode.FGETXATTR, fd, name)


def setxattr(
    path: StrOrBytesPath, name: StrOrBytesPath, value: Buffer, flags: int = 0
) -> Operation[None]:
    """Set the extended attribute *name* of the file at *path* to *value*.

    *flags*: `os.XATTR_CREATE`: fail if the attribute exists; `os.XATTR_REPLACE`: fail if it
    doesn't.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENODATA``, ``EOPNOTSUPP``, ``ENOSPC``, ...: see setxattr(2).
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_setxattr(3), setxattr(2).
    """
    return _set_attribute(Opcode.SETXATTR, 0, name, value, flags, check_path("path", path))


def fsetxattr(fd: int, name: StrOrBytesPath, value: Buffer, flags: int = 0) -> Operation[None]:
    """Set the extended attribute *name* of an open file to *value*; *flags* as for `setxattr`.

    Completes with: nothing.
    Fails with: as `setxattr`; ``EBADF``.
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_fsetxattr(3), fsetxattr(2).
    """
    return _set_attribute(Opcode.FSETXATTR, fd, name, value, flags)


def _get_attribute(
    opcode: int, fd: int, name: StrOrBytesPath, path: str | bytes | None = None
) -> Operation[bytes]:
    value = bytearray(_XATTR_SIZE_MAX)
    pin = pin_writable(value)
    file_pins = () if path is None else (pin_path(path),)
    return Operation(
        opcode,
        lambda res, _flags: bytes(memoryview(value)[:res]),
        fd,
        encode_path(check_path("name", name)),
        len(value),
        off=address_of(pin),
        addr3=address_of(*file_pins) if file_pins else 0,
        pins=(pin, *file_pins),
        cancellable=False,
        limited=True,
        filename=path,
    )


def _set_attribute(
    opcode: int,
    fd: int,
    name: StrOrBytesPath,
    value: Buffer,
    flags: int,
    path: str | bytes | None = None,
) -> Operation[None]:
    pin = pin_export("value", value)
    file_pins = () if path is None else (pin_path(path),)
    return Operation(
        opcode,
        nothing,
        fd,
        encode_path(check_path("name", name)),
        len(pin),
        flags,
        address_of(pin),
        addr3=address_of(*file_pins) if file_pins else 0,
        pins=(pin, *file_pins),
        cancellable=False,
        limited=True,
        filename=path,
    )


def stat_result(status: Buffer) -> os.stat_result:
    """Return a ``struct statx`` as an `os.stat_result`."""
    (
        block_size, links, uid, gid, mode, inode, size, blocks,
        atime, atime_ns, ctime, ctime_ns, mtime, mtime_ns,
        rdev_major, rdev_minor, dev_major, dev_minor,
    ) = _STATX.unpack_from(status)  # fmt: skip
    device = os.makedev(dev_major, dev_minor)
    return os.stat_result(
        (mode, inode, device, links, uid, gid, size, atime, mtime, ctime),
        {
            # Computed as in os.stat, so that the floats are exactly equal.
            "st_atime": atime + 1e-9 * atime_ns,
            "st_mtime": mtime + 1e-9 * mtime_ns,
            "st_ctime": ctime + 1e-9 * ctime_ns,
            "st_atime_ns": atime * 10**9 + atime_ns,
            "st_mtime_ns": mtime * 10**9 + mtime_ns,
            "st_ctime_ns": ctime * 10**9 + ctime_ns,
            "st_blksize": block_size,
            "st_blocks": blocks,
            "st_rdev": os.makedev(rdev_major, rdev_minor),
        },
    )
