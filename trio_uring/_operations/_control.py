"""The operations on the ring itself and on fds of any kind, and timeouts, one function each."""

from __future__ import annotations

import os
import struct
import time
from array import array
from typing import TYPE_CHECKING

from trio_uring._arguments import check_index
from trio_uring._kernel.uapi import (
    FILE_INDEX_ALLOC,
    CancelFlag,
    MsgRingCommand,
    Opcode,
    SqeFlag,
    TimeoutFlag,
)

from ._operation import Operation, as_address, count, nothing, pin_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

# struct __kernel_timespec: 64 bits each, on every architecture.
_TIMESPEC = struct.Struct("=qq")


def nop() -> Operation[None]:
    """Do nothing, and complete.

    Completes with: nothing.
    Fails with: nothing.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_nop(3).
    """
    return Operation(Opcode.NOP, nothing, cancellable=False)


def async_cancel(user_data: int) -> Operation[int]:
    """Ask the kernel to stop the operation in flight that has *user_data*.

    The cancelled operation still completes, with ``ECANCELED`` or with its result.

    Completes with: 0, or 1 for some operations.
    Fails with: ``ENOENT`` if it had completed; ``EALREADY`` if it runs in a kernel worker, where it
      may be interrupted or complete.
    If cancelled: it still completes.
    Since: Linux 5.5. Source: io_uring_prep_cancel(3).
    """
    # The field addr has the user_data. It has a pointer in other operations.
    return Operation(Opcode.ASYNC_CANCEL, count, addr=as_address(user_data), cancellable=False)


def async_cancel_any() -> Operation[int]:
    """Ask the kernel to stop every operation in flight on the ring.

    Completes with: the number of operations that it stopped or tried to stop.
    Fails with: ``EINVAL`` before Linux 5.19.
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_cancel(3).
    """
    flags = CancelFlag.ALL | CancelFlag.ANY
    return Operation(Opcode.ASYNC_CANCEL, count, op_flags=int(flags), cancellable=False)


def poll_add(fd: int, events: int) -> Operation[int]:
    """Wait until *fd* is ready for *events*: `select.POLLIN`, `select.POLLOUT`, ...

    The kernel always waits for ``POLLRDHUP``, ``POLLERR`` and ``POLLHUP`` too. So after the peer
    has shut down its side, every wait for ``POLLOUT`` on a full socket ends immediately.

    Completes with: the events that occurred.
    Fails with: ``EBADF``. A regular file is always ready.
    If cancelled: nothing happened.
    Since: Linux 5.1. Source: io_uring_prep_poll_add(3), poll(2).
    """
    check_index("events", events)
    return Operation(Opcode.POLL_ADD, count, fd, op_flags=events)


def close(fd: int, *, in_worker: bool = False) -> Operation[None]:
    """Close *fd*. With *in_worker*, a kernel worker closes it and releases the file.

    Completes with: nothing.
    Fails with: ``EBADF``; ``EIO``, ``ENOSPC``, ``EDQUOT`` from the file system: the fd is closed
      nevertheless.
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_close(3), close(2).
    """
    sqe_flags = int(SqeFlag.ASYNC) if in_worker else 0
    return Operation(Opcode.CLOSE, nothing, fd, sqe_flags=sqe_flags, cancellable=False)


def timeout(
    timeout_ns: int, *, absolute: bool = False, clock: int | None = None
) -> Operation[None]:
    """Wait for *timeout_ns* nanoseconds or, if *absolute*, until *clock* has reached that time.

    *clock*: `time.CLOCK_MONOTONIC` (the default), `time.CLOCK_BOOTTIME` (which also counts while
    the machine is suspended), or `time.CLOCK_REALTIME`. In Trio, prefer `trio.sleep`.

    Completes with: nothing, when the time has elapsed or been reached.
    Fails with: ``EINVAL`` if *timeout_ns* is negative.
    If cancelled: nothing happened.
    Since: Linux 5.4; 5.15 for *clock*. Source: io_uring_prep_timeout(3).
    """
    flags = TimeoutFlag.ABS if absolute else TimeoutFlag(0)
    if clock == time.CLOCK_BOOTTIME:
        flags |= TimeoutFlag.BOOTTIME
    elif clock == time.CLOCK_REALTIME:
        flags |= TimeoutFlag.REALTIME
    elif clock not in (None, time.CLOCK_MONOTONIC):
        raise ValueError(f"io_uring has no timeouts on clock {clock}")
    return Operation(
        Opcode.TIMEOUT,
        nothing,
        addr=_TIMESPEC.pack(*divmod(check_index("timeout_ns", timeout_ns), 10**9)),
        len=1,
        op_flags=int(flags),
        etime_is_success=True,
    )


def msg_ring(ring_fd: int, user_data: int, res: int = 0) -> Operation[None]:
    """Post a completion with *user_data* and *res* to the CQ of another ring.

    The other ring must belong to a program that expects it. A run of this package doesn't.

    Completes with: nothing, when the completion has been posted.
    Fails with: ``EBADFD`` if *ring_fd* is not a ring; ``EOVERFLOW`` if its CQ is full.
    If cancelled: it still completes.
    Since: Linux 5.18. Source: io_uring_prep_msg_ring(3).
    """
    return Operation(
        Opcode.MSG_RING,
        nothing,
        ring_fd,
        as_address(MsgRingCommand.DATA),
        res & 0xFFFFFFFF,
        off=user_data,
        cancellable=False,
    )


def msg_ring_fd(
    ring_fd: int, source: int, user_data: int, target: int | None = None
) -> Operation[int]:
    """Make the fixed file *source* of this ring the fixed file *target* of another ring.

    The other ring gets a completion with *user_data*. If *target* is None, the kernel chooses a
    free index.

    Completes with: the index that the kernel chose, or 0. The ``res`` of the completion in the
      other ring is the same.
    Fails with: ``EBADF`` if there is no *source*; ``EBADFD`` if *ring_fd* is not a ring; ``ENFILE``
      if no index is free; ``ENXIO``, ``EINVAL`` if there is no such index; ``EOVERFLOW``.
    If cancelled: it still completes.
    Since: Linux 6.0. Source: io_uring_prep_msg_ring_fd(3).
    """
    return Operation(
        Opcode.MSG_RING,
        count,
        ring_fd,
        as_address(MsgRingCommand.SEND_FD),
        off=user_data,
        splice_fd_in=_file_index(target),
        addr3=source,
        cancellable=False,
    )


def files_update(fds: Sequence[int], slot: int | None = None) -> Operation[list[int]]:
    """Make *fds* fixed files of the ring.

    They get consecutive indexes, starting at *slot*. An fd of -1 clears its index. If *slot* is
    None, the kernel chooses free indexes.

    Completes with: the indexes: fewer than *fds* if one of *fds* could not be used.
    Fails with: ``ENXIO`` if the ring has no fixed files; ``EBADF``; ``EINVAL``; ``ENFILE``.
    If cancelled: it still completes.
    Since: Linux 5.6; 6.0 for *slot* None. Source: io_uring_prep_files_update(3).
    """
    slots = array("i", fds)
    pin = pin_writable(slots)

    def decode(res: int, _flags: int) -> list[int]:
        return slots[:res].tolist() if slot is None else list(range(slot, slot + res))

    return Operation(
        Opcode.FILES_UPDATE,
        decode,
        addr=pin,
        len=len(fds),
        off=FILE_INDEX_ALLOC if slot is None else slot,
        pins=(pin,),
        cancellable=False,
    )


def fixed_fd_install(slot: int) -> Operation[int]:
    """Make an fd for the fixed file with the index *slot*. Child processes do not inherit it.

    Completes with: the new fd, which the caller owns.
    Fails with: ``EBADF`` if there is no such file; ``EMFILE``.
    If cancelled: it still completes.
    Since: Linux 6.8. Source: io_uring_prep_fixed_fd_install(3).
    """
    return Operation(
        Opcode.FIXED_FD_INSTALL,
        count,
        slot,
        sqe_flags=int(SqeFlag.FIXED_FILE),
        cancellable=False,
        discard=os.close,
    )


def _file_index(slot: int | None) -> int:
    """Return the SQE's file_index for the index *slot*: it counts from 1; -1 for a free one."""
    return -1 if slot is None else slot + 1
