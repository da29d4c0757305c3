"""`write_file`: open, write and close in one linked submission.

Why only to write
-----------------

Facts. To create or truncate a file, and to write to it, takes a kernel worker each, on most file
systems: in a chain, Python is not asked in between, and the loop turns once. To open and read
what is cached takes no worker: there a chain of three operations costs as much to describe as
it saves (benchmarks/bench_linked_files.py).

A fixed file has no fd, and closing it is not close(2): a network file system sends what was written
later, and its errors are reported to nobody. With fdatasync in the chain they are reported.

What does this mean for us? Whole files are written in one submission where a program asks for it.
`trio.Path.write_bytes` closes its file, as always.
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
from trio_uring._batch import perform_many
from trio_uring._engine._io_manager import current_ring
from trio_uring._engine._limiter import Limiter
from trio_uring._engine._registered_tables import RegisteredTable
from trio_uring._engine._run_state import RunResource
from trio_uring._kernel.uapi import RegisterOpcode
from trio_uring._operations._fixed_files import close_fixed, on_fixed, open_fixed
from trio_uring._operations._operation import IO_MAX

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._operations import Operation

# Fixed files of one run, written at once; the others wait. Each costs the kernel 16 bytes. With
# half, 32 tasks are as fast; double is more than RingConfig.max_file_operations lets begin.
_FIXED_FILES_MAX: Final = 64

# Above this the kernel's worker copies, as for all files.
_IN_WORKER_MIN: Final = 256 * 1024

_CHAIN_MAX: Final = 4

# O_NONBLOCK: opening a FIFO would wait for a reader, in a worker that others need.
# Windows, where the package imports all the same, has neither.
_FLAGS: Final = (
    os.O_WRONLY
    | os.O_CREAT
    | os.O_TRUNC
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
)


class _FixedFiles(RunResource):
    """The ring's table of fixed files: its `free` indexes, None if the kernel has no such table."""

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
    mode: int = 0o666,
    *,
    sync: bool = False,
) -> int:
    """Make *data* all that the file at *path* holds: open, write and close in one submission.

    Creates the file, or truncates it, as ``open(path, "wb")`` does; uses no file descriptor. For
    regular files. Without a ring, or before Linux 5.19, in a thread.

    Args:
      path: What `open` takes for a path.
      data: Any contiguous buffer. Do not change it meanwhile.
      mode: The permissions of a file that is created, less the process's umask.
      sync: Flush the data to the disk too (fdatasync(2)). Without it, a file system behind a
        network (NFS, SMB, FUSE) may send later, and nobody hears of its errors.

    Returns:
      The size of *data* in bytes.

    Raises:
      OSError: as `open`, with ``filename``: ``ENOENT``, ``EACCES``, ``EISDIR``, ``ENXIO`` for a
        FIFO that nobody reads, ...; as `os.write`: ``ENOSPC``, ``EDQUOT``, ``EFBIG``, ``EIO``,
        after which the file holds a first part of *data*; as `os.fdatasync`: ``EIO``.
      ValueError: there is a zero in *path*.
      TypeError: *data* is no contiguous buffer.

    A checkpoint. If cancelled before it begins, nothing was done; after that, it is done to
    the end, as with all files.

    Source: io_uring_prep_openat_direct(3), open(2).
    """
    await checkpoint_if_cancelled()
    name = os.fspath(path)
    view = memoryview(data).cast("B")
    manager = current_ring("files")
    fixed = None if manager is None else manager.run_state.get(_FixedFiles, manager)
    if manager is None or fixed is None or fixed.free is None or view.nbytes > IO_MAX:
        return await trio.to_thread.run_sync(_write_synchronously, name, view, mode, sync)
    await fixed.limiter.acquire()
    index = fixed.free.pop()
    try:
        sys.audit("open", name, None, _FLAGS)
        return await _write_fixed(manager, index, name, view, mode, sync)
    except OSError as exc:
        if exc.errno != errno.EFBIG:
            raise
    finally:
        fixed.free.append(index)
        fixed.limiter.release()
    # A worker's SIGXFSZ reaches nobody. A thread's reaches the process.
    with trio.CancelScope(shield=True):
        return await trio.to_thread.run_sync(_write_synchronously, name, view, mode, sync)
    raise AssertionError("a shielded scope swallows no exception")


async def _write_fixed(
    manager: UringIOManager,
    index: int,
    name: str | bytes,
    view: memoryview,
    mode: int,
    sync: bool,  # noqa: FBT001 (write_file's)
) -> int:
    chain: list[Operation[object]] = [
        open_fixed(operations.openat(name, _FLAGS, mode), index),
        _write(index, view),
        *([_sync(index)] if sync else []),
        close_fixed(index),
    ]
    opened, written, *rest = await perform_many(operations.linked(chain))
    opened.unwrap()
    if not isinstance(rest[-1], Error):
        rest[0].unwrap()  # an fsync that failed does not end the chain
        return view.nbytes
    # The chain ends where something failed, or the disk was full after a part of the data.
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


def _write_synchronously(name: str | bytes, view: memoryview, mode: int, sync: bool) -> int:  # noqa: FBT001
    fd = os.open(name, _FLAGS, mode)
    try:
        done = 0
        while done < view.nbytes:
            done += os.write(fd, view[done:])
        if sync:
            os.fdatasync(fd)
        return done
    finally:
        os.close(fd)
