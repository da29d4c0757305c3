"""Which file systems need not be waited for.

Facts. The kernel hands what it does on a tmpfs to a worker thread, reads and writes too, since a
tmpfs does not say which of them would wait: 35 microseconds, for copying a page. It is memory:
they wait no more than memory does that was swapped out. A file system on a disk has a file's status
in memory while it has its path there, and sends nothing when a file is closed. One behind a
network asks its server for the one, and sends what was written for the other, which can take for
ever.

What does this mean for us? What is memory is read and written at once; of what is memory or on a
disk the status is known, and files are closed at once. All other file systems, and overlays of
them, are left to the ring.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/proc/self/mountinfo")
_MEMORY: Final = frozenset(("tmpfs", "ramfs"))


# A device that was unmounted may give its number to another: then a call may wait where it
# should not, in the worst case.
@lru_cache(maxsize=64)
def is_memory(device: int) -> bool:
    """Whether the file system with this ``st_dev`` is memory.

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
    """Whether the file system with this ``st_dev`` is on a disk, or memory, and asks no server."""
    # Only disks have a device with a major number. FUSE on one (fuseblk), and a cluster's file
    # system on a shared one, count as disks: a call may wait for a daemon, or a lock, there.
    return bool(os.major(device)) or is_memory(device)
