"""Which file systems answer without waiting.

Facts. The kernel hands every operation on a tmpfs to a worker, reads and writes too, because a
tmpfs cannot say which of them would wait. That takes 35 microseconds to copy a page. But a tmpfs is
memory: it waits no longer than swapped-out memory does. A file system on a disk has a file's status
in memory while the path is cached, and sends nothing when a file is closed. A network file system
asks its server for the status, and sends the written data on close, which can block indefinitely.

What does this mean for us? Files in memory are read and written directly. For files in memory or on
a disk, the status is read and the file closed directly. All other file systems, and overlays of
them, use the ring.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/proc/self/mountinfo")
_MEMORY: Final = frozenset(("tmpfs", "ramfs"))


# After an unmount the number may belong to another device. In the worst case, a call then blocks
# the loop.
@lru_cache(maxsize=64)
def is_memory(device: int) -> bool:
    """Whether the file system with this ``st_dev`` is in memory.

    Source: proc_pid_mountinfo(5).
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with _MOUNTS.open(encoding="utf-8", errors="replace") as mounts:
            for mount in mounts:
                place, _, kind = mount.partition(" - ")
                if place.split()[2] == number:
                    return kind.split()[0] in _MEMORY
    except OSError:
        pass
    return False


def is_local(device: int) -> bool:
    """Whether the file system with this ``st_dev`` is on a disk or in memory, without a server."""
    # Only disks have a major number. FUSE on a disk (fuseblk) and a cluster file system on a shared
    # disk count as disks, too: there a call may wait for a daemon or a lock.
    return bool(os.major(device)) or is_memory(device)
