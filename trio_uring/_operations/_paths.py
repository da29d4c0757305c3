"""The operations on paths, one function each.

A path is `str`, `bytes` or `os.PathLike`. A relative one starts at *dir_fd*, an open directory,
or at the current directory. Errors carry the path as ``filename``, as those of `os` do.
"""

from __future__ import annotations

import os
import struct
from typing import Final

from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import Operation, address_of, count, nothing

StrOrBytesPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# From fcntl.h; the `os` module has its own way to say each of them.
AT_FDCWD: Final = -100  # in place of an fd: the current directory
_AT_REMOVEDIR: Final = 0x200
_AT_SYMLINK_FOLLOW: Final = 0x400

_ASYNC: Final = int(SqeFlag.ASYNC)

# A second dir_fd travels in the unsigned len.
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
    """Open a file; child processes do not inherit it. *flags*: `os.O_RDONLY`, ...

    Opening a FIFO does not wait for the other side, unlike open(2): for reading it succeeds at
    once, for writing it fails with ``ENXIO``. With *wait* it does, and occupies a kernel worker
    until the other side comes: eight such opens can hold up all other work on files.

    Completes with: the new fd, which the caller owns.
    Fails with: ``ENOENT``, ``EACCES``, ``EISDIR``, ``EMFILE``, ...: see open(2).
    If cancelled: a file that was opened, or created, first is the result.
    Since: Linux 5.6. Source: io_uring_prep_openat(3), open(2).
    """
    name = os.fspath(path)
    return Operation(
        Opcode.OPENAT,
        count,
        dir_fd,
        encode_path(name),
        mode,
        flags | os.O_CLOEXEC,
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
    """Open a file, with rules for how its path may be resolved; otherwise like `openat`.

    *resolve*: ``RESOLVE_BENEATH`` (8): not outside *dir_fd*; ``RESOLVE_IN_ROOT`` (16): as if
    *dir_fd* were the root; ``RESOLVE_NO_SYMLINKS`` (4), ``RESOLVE_NO_MAGICLINKS`` (2),
    ``RESOLVE_NO_XDEV`` (1), ``RESOLVE_CACHED`` (32): only if that needs no disk. *mode* must be
    0 unless a file is to be created.

    Completes with: the new fd, which the caller owns.
    Fails with: as `openat`; ``EXDEV``, ``ELOOP``: the rules were broken; ``EAGAIN``; ``EINVAL``.
    If cancelled: a file that was opened, or created, first is the result.
    Since: Linux 5.6. Source: io_uring_prep_openat2(3), openat2(2).
    """
    name = os.fspath(path)
    how = ffi.from_buffer("char[]", _OPEN_HOW.pack(flags | os.O_CLOEXEC, mode, resolve))
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
    """Remove a file's name or, with *directory*, an empty directory.

    Completes with: nothing.
    Fails with: ``ENOENT``, ``EISDIR``, ``ENOTDIR``, ``ENOTEMPTY``, ``EACCES``, ...: see unlink(2).
    If cancelled: it still completes.
    Since: Linux 5.11. Source: io_uring_prep_unlinkat(3), unlinkat(2).
    """
    name = os.fspath(path)
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

    *flags*: ``RENAME_NOREPLACE`` (1): not if it exists; ``RENAME_EXCHANGE`` (2): exchange the
    two; ``RENAME_WHITEOUT`` (4).

    Completes with: nothing.
    Fails with: ``ENOENT``, ``EXDEV``, ``EEXIST``, ``ENOTEMPTY``, ``EINVAL``, ...: see rename(2).
    If cancelled: it still completes.
    Since: Linux 5.11. Source: io_uring_prep_renameat(3), renameat2(2).
    """
    source_name, target_name = os.fspath(source), os.fspath(target)
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
    """Create a directory with the permissions *mode*, less the process's umask.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EACCES``, ``ENOSPC``, ...: see mkdir(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_mkdirat(3), mkdirat(2).
    """
    name = os.fspath(path)
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
    """Create a symbolic link at *path* that holds *target*.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EACCES``, ``ENAMETOOLONG``, ...: see symlink(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_symlinkat(3), symlinkat(2).
    """
    target_name, name = os.fspath(target), os.fspath(path)
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
    """Give the file *source* a second name, *target*.

    With *follow_symlinks*, a symbolic link's own target gets it, not the link.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EXDEV``, ``EPERM``, ``EMLINK``, ...: see link(2).
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_linkat(3), linkat(2).
    """
    source_name, target_name = os.fspath(source), os.fspath(target)
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


def encode_path(path: str | bytes) -> bytes:
    """Return *path* as the kernel takes it: Python ends each `bytes` with the zero it looks for.

    Raises:
      ValueError: there is a zero in it, as the standard library says it.
    """
    encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte")
    return encoded


def pin_path(path: str | bytes) -> CData:
    """Return *path* as memory, for the fields of an SQE that are plain numbers."""
    return ffi.from_buffer("char[]", encode_path(path))
