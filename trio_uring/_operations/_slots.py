"""Operations on fixed files: those in the slots of the ring's own table, which have no fd.

The operations of a linked chain are described before the first of them runs. So a file that the
first one opens has to be in a place that is known beforehand: an fd is not, a slot is.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import Operation, nothing

T = TypeVar("T")

_FIXED_FILE: Final = int(SqeFlag.FIXED_FILE)


def into_slot(opening: Operation[int], slot: int) -> Operation[int]:
    """Have *opening*, an ``openat``, put the file into *slot* of the ring's table; in a chain.

    What was in the slot is closed.

    Completes with: 0.
    Fails with: as *opening*; ``ENXIO``, ``EINVAL``: the table has no such slot.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_openat_direct(3).
    """
    # A file without an fd is not inherited by child processes, and may not be told not to be.
    opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, _, addr3 = opening.sqe
    flags &= ~os.O_CLOEXEC
    file_index = slot + 1  # in a union with splice_fd_in; 0 stands for no slot
    opening.sqe = (
        opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, file_index, addr3
    )  # fmt: skip
    opening.discard = None
    opening.cancellable = False
    return opening


def on_slot(operation: Operation[T]) -> Operation[T]:
    """Have *operation*, which was made with a slot in place of its fd, act on the file there.

    Completes with: what *operation* does.
    Fails with: as *operation*; ``EBADF`` if the slot is empty.
    If cancelled: as *operation*.
    Since: Linux 5.1. Source: io_uring_enter(2), ``IOSQE_FIXED_FILE``.
    """
    sqe = operation.sqe
    operation.sqe = (sqe[0], sqe[1] | _FIXED_FILE, *sqe[2:])
    operation.acts_on_fd = False
    return operation


def close_slot(slot: int) -> Operation[None]:
    """Empty *slot* of the ring's table.

    Unlike close(2) it does not have a network's file system send what was written.

    Completes with: nothing.
    Fails with: ``EBADF`` if the slot is empty.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_close_direct(3).
    """
    return Operation(Opcode.CLOSE, nothing, 0, splice_fd_in=slot + 1, cancellable=False)
