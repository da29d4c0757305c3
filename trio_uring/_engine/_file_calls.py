"""System calls on open files that Python's `os` does not have. Each blocks or not, as it says."""

from __future__ import annotations

import errno
import os
from array import array
from typing import TYPE_CHECKING

from trio_uring._errors import operation_error
from trio_uring._kernel import ffi, lib, why_no_core

if TYPE_CHECKING:
    from collections.abc import Sequence


def read_many_cached(
    fd: int, memory: bytearray | memoryview, requests: Sequence[tuple[int, int]]
) -> list[int]:
    """Read parts of a file from the page cache into *memory*, one after the other. Does not block.

    Args:
      fd: An open file that needs no server.
      memory: Writable. It has room for all parts, each of its full size.
      requests: The size and the offset of each part.

    Returns:
      For each part, the number of bytes read; ``-EAGAIN`` or another negative errno if it was not
      read.

    Source: preadv2(2), ``RWF_NOWAIT``.
    """
    sizes = array("I", [size for size, _ in requests])
    offsets = array("q", [offset for _, offset in requests])
    results = array("i", bytes(4 * len(sizes)))
    lib.read_many_cached(
        fd,
        ffi.from_buffer("char[]", memory),
        ffi.from_buffer("uint32_t[]", sizes),
        ffi.from_buffer("int64_t[]", offsets),
        ffi.from_buffer("int32_t[]", results),
        len(sizes),
    )
    return results.tolist()


def fallocate(fd: int, offset: int, size: int, mode: int) -> None:
    """Reserve disk space, or change the range according to *mode*. Blocks.

    Raises:
      OSError: as fallocate(2).

    Source: fallocate(2).
    """
    if why_no_core:
        if mode:
            raise OSError(errno.EOPNOTSUPP, "trio_uring has no C core here, and mode is not 0")
        os.posix_fallocate(fd, offset, size)
    elif (result := lib.allocate_range(fd, mode, offset, size)) < 0:
        raise operation_error(result)


def sync_file_range(fd: int, offset: int, size: int, flags: int) -> None:
    """Write back a part of a file. Blocks. Without the C core, it writes back all of the file.

    Raises:
      OSError: as sync_file_range(2).

    Source: sync_file_range(2).
    """
    if why_no_core:
        os.fdatasync(fd)
    elif (result := lib.sync_range(fd, offset, size, flags)) < 0:
        raise operation_error(result)
