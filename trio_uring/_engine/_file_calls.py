"""System calls on open files that Python's `os` does not have."""

from __future__ import annotations

import errno
import os
from typing import Final

from trio_uring._errors import operation_error
from trio_uring._kernel import lib, why_no_core

# For pwritev2(2): append, and move the position behind the data.
_RWF_APPEND: Final = getattr(os, "RWF_APPEND", 16)
_POSITION: Final = -1


def append(fd: int, data: memoryview) -> int:
    """Append *data* to a file, and return the offset at which it begins. Blocks.

    It moves the position of the open file, which nobody else may use meanwhile.

    Raises:
      OSError: as pwritev2(2); ``EIO`` if a part was written, and somebody else appended then.

    Source: pwritev2(2), ``RWF_APPEND``.
    """
    count = os.pwritev(fd, [data], _POSITION, _RWF_APPEND)
    start = os.lseek(fd, 0, os.SEEK_CUR if data.nbytes else os.SEEK_END) - count
    while count < data.nbytes:
        more = os.pwritev(fd, [data[count:]], _POSITION, _RWF_APPEND)
        if os.lseek(fd, 0, os.SEEK_CUR) != start + count + more:
            raise OSError(errno.EIO, "somebody else appended to the file before the rest of data")
        count += more
    return start


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


def is_cached(fd: int, offset: int, size: int) -> bool:
    """Whether *size* bytes of a file, which needs no server, can be read without waiting.

    False if it is not known, or if the file ends before. Does not block.

    Since: Linux 6.5; False before. Source: cachestat(2), preadv2(2).
    """
    return bool(lib.is_cached(fd, offset, size))
