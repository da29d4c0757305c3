"""The operations that steer the ring itself, or wait, one function each."""

from __future__ import annotations

import os
import struct
import time
from array import array
from typing import TYPE_CHECKING

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
    """Do nothing: go to the kernel and come back.

    Completes with: nothing.
    Fails with: nothing.
    If cancelled: it still completes.
    Since: Linux 5.1. Source: io_uring_prep_nop(3).
    """
    return Operation(Opcode.NOP, nothing, cancellable=False)


def async_cancel(user_data: int) -> Operation[int]:
    """Ask the kernel to stop the operation in flight under *user_data*.

    The cancelled operation still completes, with ``ECANCELED`` or with what it did.

    Completes with: 0, or 1 for some operations.
    Fails with: ``ENOENT``: it had completed; ``EALREADY``: it runs in a kernel worker, and may
      be interrupted or complete.
    If cancelled: it still completes.
    Since: Linux 5.5. Source: io_uring_prep_cancel(3).
    """
    # The user_data to look for travels in addr, which holds a pointer elsewhere.
    return Operation(Opcode.ASYNC_CANCEL, count, addr=as_address(user_data), cancellable=False)


def async_cancel_any() -> Operation[int]:
    """Ask the kernel to stop every operation in flight on the ring.

    Completes with: how many it stopped, or asked to stop.
    Fails with: ``EINVAL`` before Linux 5.19.
    If cancelled: it still completes.
    Since: Linux 5.19. Source: io_uring_prep_cancel(3).
    """
    flags = CancelFlag.ALL | CancelFlag.ANY
    return Operation(Opcode.ASYNC_CANCEL, count, op_flags=int(flags), cancellable=False)


def poll_add(fd: int, events: int) -> Operation[int]:
    """Wait until *fd* is ready for *events*: `select.POLLIN`, `select.POLLOUT`, ...

    The kernel always waits for ``POLLRDHUP``, ``POLLERR`` and ``POLLHUP`` too: a wait for
    ``POLLOUT`` on a full socket ends, again and again, once its peer shut down its side.

    Completes with: the events that came.
    Fails with: ``EBADF``. A regular file is always ready.
    If cancelled: nothing happened.
    Since: Linux 5.1. Source: io_uring_prep_poll_add(3), poll(2).
    """
    return Operation(Opcode.POLL_ADD, count, fd, op_flags=events)


def close(fd: int, *, in_worker: bool = False) -> Operation[None]:
    """Close *fd*. With *in_worker* a kernel worker does it, and the last of the file's work.

    Completes with: nothing.
    Fails with: ``EBADF``; ``EIO``, ``ENOSPC``, ``EDQUOT`` from the file system: the fd is closed
      all the same.
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_close(3), close(2).
    """
    sqe_flags = int(SqeFlag.ASYNC) if in_worker else 0
    return Operation(Opcode.CLOSE, nothing, fd, sqe_flags=sqe_flags, cancellable=False)


def timeout(
    timeout_ns: int, *, absolute: bool = False, clock: int | None = None
) -> Operation[None]:
    """Wait for *timeout_ns* nanoseconds or, if *absolute*, until a clock shows them.

    *clock*: `time.CLOCK_MONOTONIC` (the default), `time.CLOCK_BOOTTIME` (which also counts
    while the machine sleeps), or `time.CLOCK_REALTIME`. In Trio, prefer `trio.sleep`.

    Completes with: nothing, when the time has come.
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
        addr=_TIMESPEC.pack(*divmod(timeout_ns, 10**9)),
        len=1,
        op_flags=int(flags),
        etime_is_success=True,
    )


def msg_ring(ring_fd: int, user_data: int, res: int = 0) -> Operation[None]:
    """Post a completion with *user_data* and *res* to the CQ of another ring.

    That ring's owner must know what to make of it: a run of this package would not.

    Completes with: nothing, when the other ring has it.
    Fails with: ``EBADFD`` if *ring_fd* is no ring; ``EOVERFLOW`` if its CQ is full.
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
    """Put the fixed file *source* of this ring into slot *target* of another's fixed files.

    And tell it so, by a completion with *user_data*. *target* None: a slot that is free.

    Completes with: the slot that was found, or 0; that completion's ``res`` is the same.
    Fails with: ``EBADF`` if there is no *source*; ``EBADFD`` if *ring_fd* is no ring; ``ENFILE``
      if no slot is free; ``ENXIO``, ``EINVAL`` if the slot does not exist; ``EOVERFLOW``.
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
    """Make *fds* fixed files from *slot* on; -1 empties a slot. None: whichever are free.

    Completes with: the slots. There are fewer than *fds* if one of them could not be used.
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
    """Make an ordinary fd of the fixed file in *slot*; child processes do not inherit it.

    Completes with: the new fd, which the caller owns.
    Fails with: ``EBADF`` if the slot is empty; ``EMFILE``.
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
    """Return *slot* as the SQE's file_index, which counts from 1; -1 asks for a free one."""
    return -1 if slot is None else slot + 1
