"""`write_file`: open, write and close as one linked chain.

Why files are written in a chain, but not read
----------------------------------------------

Facts. On most file systems, opening with O_CREAT or O_TRUNC and writing take a kernel worker each.
In a linked chain they need one loop iteration, and no Python in between. Opening and reading a
cached file takes no worker, and making three operations costs as much as the chain saves
(benchmarks/bench_linked_files.py).

A fixed file has no fd, and closing it is not close(2): a network file system sends the written data
later, and nobody gets its errors. With fdatasync in the chain they are reported.

What does this mean for us? A program can ask for a chain by calling `write_file`.
`trio.Path.write_bytes` uses an fd and close(2), as in Trio.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Final

import trio
from outcome import Error
from trio.lowlevel import checkpoint_if_cancelled, enable_ki_protection

from trio_uring import _operations as operations
from trio_uring._arguments import check_path, check_readable
from trio_uring._batch import perform_many
from trio_uring._engine._io_manager import current_ring
from trio_uring._engine._limiter import Limiter
from trio_uring._engine._registered_tables import RegisteredTable
from trio_uring._engine._run_state import RunResource
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring._operations._fixed_files import close_fixed, on_fixed, open_fixed
from trio_uring._operations._operation import IO_MAX

from ._modes import WRITE_MODES, flags_of

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._operations import Operation

# How many fixed files a run can write at once. Further calls wait. Each costs the kernel 16 bytes.
# At half, 32 tasks are as fast. Double is more than RingConfig.max_file_operations allows.
_FIXED_FILES_MAX: Final = 64

# In bytes. A kernel worker performs larger writes, as for all files.
_IN_WORKER_MIN: Final = 256 * 1024

_CHAIN_MAX: Final = 4

# Because opening a FIFO would wait for a reader, and occupy a kernel worker. getattr, because the
# package can be imported on Windows.
_O_NONBLOCK: Final = getattr(os, "O_NONBLOCK", 0)


class _FixedFiles(RunResource):
    """The ring's fixed files. `free` has the unused indexes; None if there is no such table."""

    def __init__(self, manager: UringIOManager) -> None:
        self.limiter = Limiter(_FIXED_FILES_MAX)
        self.free: list[int] | None = None
        if min(manager.ring.entries, manager.config.max_file_operations) >= _CHAIN_MAX:
            try:
                table = RegisteredTable(manager.ring, RegisterOpcode.FILES2, _FIXED_FILES_MAX)
            except OSError as exc:  # EINVAL before Linux 5.19
                manager.ring.note_refused("REGISTER_FILES2", exc)
            else:
                self.free = table.free


@enable_ki_protection
async def write_file(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    data: Buffer,
    mode: str = "w",
    *,
    permissions: int = 0o666,
    flags: int = 0,
    sync: bool = False,
) -> int:
    """Write *data* to the file at *path*: open, write and close in one submission.

    Uses no file descriptor. For regular files. In a run without a ring, or before Linux 5.19, the
    file is written in a thread.

    Args:
      path: A path, as for `open`.
      data: Any contiguous buffer. Do not change it until the call returns.
      mode: As for `open`: ``"w"`` creates or truncates the file, ``"x"`` creates it. The file is
        always binary.
      permissions: Of a file that is created, before the umask is applied.
      flags: More flags for `os.open`: `os.O_DSYNC`, `os.O_NOFOLLOW`, ...
      sync: Also flush the data to the disk (fdatasync(2)). Otherwise NFS, SMB and FUSE may send the
        data later, and their errors are lost.

    Returns:
      The size of *data* in bytes.

    Raises:
      OSError: as `open`, with ``filename``: ``ENOENT``, ``EACCES``, ``EISDIR``, ``ENXIO`` for a
        FIFO that nobody reads, ... As `os.write`: ``ENOSPC``, ``EDQUOT``, ``EFBIG``, ``EIO``, after
        which the file holds the first part of *data*. As `os.fdatasync`: ``EIO``.
      ValueError: *path* contains a null byte. *mode* is none of these, or *flags* contradict it.
      TypeError: *data* is not a contiguous buffer. *mode* is not a string.

    A checkpoint. If cancelled before it begins, nothing happens. Once begun, it completes, as with
    all files.

    Source: io_uring_prep_openat_direct(3), open(2).
    """
    all_flags = flags_of(mode, flags, WRITE_MODES) | _O_NONBLOCK
    name = check_path("path", path)
    check_readable("data", data)
    await checkpoint_if_cancelled()
    view = memoryview(data).cast("B")
    manager = current_ring("files")
    fixed = None if manager is None else manager.run_state.get(_FixedFiles, manager)
    if manager is None or fixed is None or fixed.free is None or view.nbytes > IO_MAX:
        return await trio.to_thread.run_sync(
            _write_synchronously, name, view, all_flags, permissions, sync
        )
    await fixed.limiter.acquire()
    index = fixed.free.pop()
    try:
        sys.audit("open", name, None, all_flags)
        opening = operations.openat(name, all_flags, permissions)
        return await _write_fixed(manager, index, opening, view, sync)
    except OSError as exc:
        if exc.errno != errno.EFBIG:
            raise
    finally:
        fixed.free.append(index)
        fixed.limiter.release()
    # SIGXFSZ is delivered to the kernel worker, and lost. A thread's is not. The thread writes the
    # file again from the beginning. The file may have been created just now.
    again = all_flags & ~os.O_EXCL | os.O_TRUNC
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(
            _write_synchronously, name, view, again, permissions, sync
        )
    raise AssertionError("a shielded scope swallows no exception")


async def _write_fixed(
    manager: UringIOManager,
    index: int,
    opening: Operation[int],
    view: memoryview,
    sync: bool,  # noqa: FBT001 (write_file's)
) -> int:
    chain: list[Operation[object]] = [
        open_fixed(opening, index),
        _write(index, view),
        *([_sync(index)] if sync else []),
        close_fixed(index),
    ]
    opened, written, *rest = await perform_many(operations.linked(chain))
    opened.unwrap()
    if not isinstance(rest[-1], Error):
        rest[0].unwrap()  # a failed fsync doesn't end the chain
        return view.nbytes
    # The chain ended at an error, or at a short write because the disk was full.
    try:
        done = written.unwrap()
        assert isinstance(done, int)
        while done < view.nbytes:
            done += await manager.perform_shielded(_write(index, view[done:], done))
        if sync:
            await manager.perform_shielded(_sync(index))
        return done
    finally:
        await manager.perform_shielded(close_fixed(index))


def _write(index: int, view: memoryview, offset: int = 0) -> Operation[int]:
    in_worker = view.nbytes > _IN_WORKER_MIN
    return on_fixed(operations.write(index, view, offset, cancellable=False, in_worker=in_worker))


def _sync(index: int) -> Operation[None]:
    return on_fixed(operations.fsync(index, data_only=True))


def _write_synchronously(
    name: str | bytes,
    view: memoryview,
    flags: int,
    permissions: int,
    sync: bool,  # noqa: FBT001 (write_file's)
) -> int:
    fd = os.open(name, flags, permissions)
    try:
        done = 0
        while done < view.nbytes:
            done += os.write(fd, view[done:])
        if sync:
            os.fdatasync(fd)
        return done
    finally:
        os.close(fd)
