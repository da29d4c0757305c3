"""Locks on parts of a file that belong to the open file, not to the process as POSIX locks do."""

from __future__ import annotations

import os
import struct
import sys
from typing import Final

if sys.platform != "win32":
    import fcntl

# struct flock: the kind, the base of the offset, the offset, the size, and a pid, which must be 0.
_FLOCK: Final = struct.Struct("@hhqqi")

# From linux/fcntl.h, in case Python was built without it.
_F_OFD_SETLK: Final = 37


def set_lock(fd: int, kind: int, offset: int, size: int) -> None:
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
