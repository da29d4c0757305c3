"""The operations on paths, one function each.

A path is a `str`, `bytes` or `os.PathLike`. A relative path starts at *dir_fd*, an open directory,
or at the current directory. Errors have the path as ``filename``, as in `os`.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from trio_uring._arguments import Path as StrOrBytesPath, check_path, wrong_type
from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import Operation, address_of, count, nothing

# From fcntl.h. The `os` module has no names for these constants.
AT_FDCWD: Final = -100  # in place of an fd: the current directory
_AT_REMOVEDIR: Final = 0x200
_AT_SYMLINK_FOLLOW: Final = 0x400

_ASYNC: Final = int(SqeFlag.ASYNC)

# The field len has the second dir_fd. It is unsigned.
_UNSIGNED_32_BITS: Final = 0xFFFFFFFF

# struct open_how of openat2(2): flags, mode, resolve.
_OPEN_HOW = struct.Struct("=QQQ")


def openat(
    path: StrOrBytesPath,
    flags: int,
    mode: int = 0o777,
    *,
    dir_fd: int = AT_FDCWD,
    wait: bool = False,
) -> Operation[int]:
    """Open a file, which child processes do not inherit. *flags*: `os.O_RDONLY`, ...

    Unlike open(2), opening a FIFO does not wait until the other end is opened: for reading it
    succeeds immediately, for writing it fails with ``ENXIO``. With *wait* it waits, and occupies a
    kernel worker. Eight such opens can block all other operations on files.

    Completes with: the new fd, which the caller owns.
    Fails with: ``ENOENT``, ``EACCES``, ``EISDIR``, ``EMFILE``, ...: see open(2).
    If cancelled: if the file was opened or created first, its fd is the result.
    Since: Linux 5.6. Source: io_uring_prep_openat(3), open(2).
    """
    name = check_path("path", path)
    return Operation(
        Opcode.OPENAT,
        count,
        dir_fd,
        encode_path(name),
        mode,
        _with_cloexec(flags),
        sqe_flags=_ASYNC if wait else 0,
        limited=True,
        discard=os.close,
        filename=name,
    )


def openat2(
    path: StrOrBytesPath,
    flags: int,
    mode: int = 0,
    resolve: int = 0,
    *,
    dir_fd: int = AT_FDCWD,
    wait: bool = False,
) -> Operation[int]:
    """Like `openat`, with restrictions on how the path is resolved.

    *resolve*: ``RESOLVE_BENEATH`` (8): nothing outside *dir_fd*; ``RESOLVE_IN_ROOT`` (16): treat
    *dir_fd* as the root; ``RESOLVE_NO_SYMLINKS`` (4); ``RESOLVE_NO_MAGICLINKS`` (2);
    ``RESOLVE_NO_XDEV`` (1): no other file systems; ``RESOLVE_CACHED`` (32): only if this needs no
    access to the disk. *mode* must be 0 unless *flags* create a file.

    Completes with: the new fd, which the caller owns.
    Fails with: as `openat`; ``EXDEV`` or ``ELOOP`` if *resolve* forbids the path; ``EAGAIN`` if the
      path is not cached; ``EINVAL``.
    If cancelled: if the file was opened or created first, its fd is the result.
    Since: Linux 5.6. Source: io_uring_prep_openat2(3), openat2(2).
    """
    name = check_path("path", path)
    how = ffi.from_buffer("char[]", _OPEN_HOW.pack(_with_cloexec(flags), mode, resolve))
    return Operation(
        Opcode.OPENAT2,
        count,
        dir_fd,
        encode_path(name),
        _OPEN_HOW.size,
        off=address_of(how),
        sqe_flags=_ASYNC if wait else 0,
        pins=(how,),
        limited=True,
        discard=os.close,
        filename=name,
    )


def unlinkat(
    path: StrOrBytesPath, *, dir_fd: int = AT_FDCWD, directory: bool = False
) -> Operation[None]:
    """Remove a file or, with *directory*, an empty directory.

    Completes with: nothing.
    Fails with: ``ENOENT``, ``EISDIR``, ``ENOTDIR``, ``ENOTEMPTY``, ``EACCES``, ...: see unlink(2).
    If cancelled: it still completes.
    Since: Linux 5.11. Source: io_uring_prep_unlinkat(3), unlinkat(2).
    """
    name = check_path("path", path)
    return Operation(
        Opcode.UNLINKAT,
        nothing,
        dir_fd,
        encode_path(name),
        op_flags=_AT_REMOVEDIR if directory else 0,
        cancellable=False,
        limited=True,
        filename=name,
    )


def renameat(
    source: StrOrBytesPath,
    target: StrOrBytesPath,
    flags: int = 0,
    *,
    source_dir_fd: int = AT_FDCWD,
    target_dir_fd: int = AT_FDCWD,
) -> Operation[None]:
    """Rename *source* to *target*, which is replaced if it exists.

    *flags*: ``RENAME_NOREPLACE`` (1): fail if *target* exists; ``RENAME_EXCHANGE`` (2): exchange
    the two; ``RENAME_WHITEOUT`` (4).

    Completes with: nothing.
    Fails with: ``ENOENT``, ``EXDEV``, ``EEXIST``, ``ENOTEMPTY``, ``EINVAL``, ...: see rename(2).
    If cancelled: it still completes.
    Since: Linux 5.11. Source: io_uring_prep_renameat(3), renameat2(2).
    """
    source_name, target_name = check_path("source", source), check_path("target", target)
    target_pin = pin_path(target_name)
    return Operation(
        Opcode.RENAMEAT,
        nothing,
        source_dir_fd,
        encode_path(source_name),
        target_dir_fd & _UNSIGNED_32_BITS,
        flags,
        address_of(target_pin),
        pins=(target_pin,),
        cancellable=False,
        limited=True,
        filename=source_name,
        filename2=target_name,
    )


def mkdirat(path: StrOrBytesPath, mode: int = 0o777, *, dir_fd: int = AT_FDCWD) -> Operation[None]:
    """Create a directory with the permissions *mode*, to which the umask is applied.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EACCES``, ``ENOSPC``, ...: see mkdir(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_mkdirat(3), mkdirat(2).
    """
    name = check_path("path", path)
    return Operation(
        Opcode.MKDIRAT,
        nothing,
        dir_fd,
        encode_path(name),
        mode,
        cancellable=False,
        limited=True,
        filename=name,
    )


def symlinkat(
    target: StrOrBytesPath, path: StrOrBytesPath, *, dir_fd: int = AT_FDCWD
) -> Operation[None]:
    """Create a symbolic link at *path* that points to *target*.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EACCES``, ``ENAMETOOLONG``, ...: see symlink(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_symlinkat(3), symlinkat(2).
    """
    target_name, name = check_path("target", target), check_path("path", path)
    pin = pin_path(name)
    return Operation(
        Opcode.SYMLINKAT,
        nothing,
        dir_fd,
        encode_path(target_name),
        off=address_of(pin),
        pins=(pin,),
        cancellable=False,
        limited=True,
        filename=target_name,
        filename2=name,
    )


def linkat(
    source: StrOrBytesPath,
    target: StrOrBytesPath,
    *,
    source_dir_fd: int = AT_FDCWD,
    target_dir_fd: int = AT_FDCWD,
    follow_symlinks: bool = False,
) -> Operation[None]:
    """Create *target* as a hard link to the file *source*.

    If *source* is a symbolic link, the new link is to the symbolic link itself or, with
    *follow_symlinks*, to its target.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EXDEV``, ``EPERM``, ``EMLINK``, ...: see link(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_linkat(3), linkat(2).
    """
    source_name, target_name = check_path("source", source), check_path("target", target)
    target_pin = pin_path(target_name)
    return Operation(
        Opcode.LINKAT,
        nothing,
        source_dir_fd,
        encode_path(source_name),
        target_dir_fd & _UNSIGNED_32_BITS,
        _AT_SYMLINK_FOLLOW if follow_symlinks else 0,
        address_of(target_pin),
        pins=(target_pin,),
        cancellable=False,
        limited=True,
        filename=source_name,
        filename2=target_name,
    )


def _with_cloexec(flags: int) -> int:
    if not isinstance(flags, int):
        raise wrong_type("flags", flags, "os.O_RDONLY, os.O_WRONLY, ...: an int")
    return flags | os.O_CLOEXEC


def encode_path(path: str | bytes) -> bytes:
    """Return *path* as bytes, which Python ends with the null byte that the kernel needs.

    Raises:
      ValueError: *path* contains a null byte. The message is that of the standard library.
    """
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded


def pin_path(path: str | bytes) -> CData:
    """Return *path* as pinned memory, for the fields of an SQE that take an address as a number."""
    return ffi.from_buffer("char[]", encode_path(path))
