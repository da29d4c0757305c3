"""Which file systems answer without asking a server, and which without waiting.

Facts. NFS, SMB and FUSE ask a server when a file is opened, and when it is closed, whatever is in
the cache: RESOLVE_CACHED limits only the walk along the path. They may also ask for each status and
for each seek to the end (Linux 6.18). A server can take seconds to answer, or be a part of this
program. Also statfs(2), which tells the kind of a file system, asks it. A file system on a disk
answers from the kernel's cache, and sends nothing when a file is closed. The kernel hands every
operation on a tmpfs to a worker, reads and writes too, because a tmpfs cannot say which of them
would wait. But a tmpfs is memory: it waits no longer than swapped-out memory does.

What does this mean for us? The mount tells the kind, without asking: ``/proc/self/mountinfo`` is
read once for each mount. Files with a server are used in threads only. Files in memory are read and
written directly. Without ``/proc``, each file may have a server.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Final

from trio_uring._engine._ring import mount_of, note_without_server

_PROC: Final = Path("/proc/self")


class FileSystem(Enum):
    """What a file system's answers need."""

    MEMORY = "memory"
    DISK = "a disk"
    KERNEL = "the kernel itself: /proc, /sys; or a pipe or socket without a path"
    SERVER = "a server, which may take any time"


_MEMORY: Final = "ramfs tmpfs"
# An overlay is one of these, mostly.
_DISK: Final = (
    "adfs affs bcachefs befs bfs btrfs cramfs devtmpfs ecryptfs efs erofs exfat ext2 ext3 ext4"
    " f2fs hfs hfsplus hpfs hugetlbfs iso9660 jffs2 jfs minix msdos nilfs2 ntfs ntfs3 overlay"
    " reiserfs romfs squashfs ubifs udf ufs vfat xfs zfs zonefs"
)
_KERNEL: Final = (
    "anon_inodefs bdev binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts efivarfs"
    " fusectl mqueue nfsd nsfs pipefs proc pstore resctrl rpc_pipefs secretmem securityfs"
    " selinuxfs smackfs sockfs sysfs tracefs"
)
_KINDS: Final = {
    **dict.fromkeys(_MEMORY.split(), FileSystem.MEMORY),
    **dict.fromkeys(_DISK.split(), FileSystem.DISK),
    **dict.fromkeys(_KERNEL.split(), FileSystem.KERNEL),
}

# By number of the mount. A program that uses more has them looked up again, 50 microseconds each.
known: Final[dict[int, FileSystem]] = {}
_KNOWN_MAX: Final = 1024


def file_system_of(fd: int) -> FileSystem:
    """Return what the file system of an open file needs. Asks no server.

    Source: proc_pid_fdinfo(5), proc_pid_mountinfo(5).
    """
    return known.get(mount_of(fd)) or note_file_system(fd)


def note_file_system(fd: int) -> FileSystem:
    """Return what `file_system_of` returns, and note it for `path_is_without_server`.

    That forgets: it knows fewer mounts than we do.
    """
    mount = mount_of(fd)
    kind = known.get(mount) or _look_up(fd)
    if mount:
        if len(known) >= _KNOWN_MAX:
            known.clear()
        known[mount] = kind
        if kind is not FileSystem.SERVER:
            note_without_server(mount)
    return kind


def _look_up(fd: int) -> FileSystem:
    try:
        info = (_PROC / "fdinfo" / str(fd)).read_bytes()
        number = dict(line.split()[:2] for line in info.splitlines() if line)[b"mnt_id:"]
        for mount in (_PROC / "mountinfo").read_bytes().splitlines():
            if mount.split(b" ", 1)[0] == number:
                kind = mount.partition(b" - ")[2].split()[0].decode()
                return _KINDS.get(kind, FileSystem.SERVER)
        # The kernel mounts what has no path for itself: pipes, sockets. Other files may be from
        # another container.
        name = str((_PROC / "fd" / str(fd)).readlink())
    except (OSError, KeyError):
        return FileSystem.SERVER
    if name.startswith("/memfd:"):
        return FileSystem.MEMORY
    return FileSystem.SERVER if name.startswith("/") else FileSystem.KERNEL
