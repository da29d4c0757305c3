"""Operations on fixed files: files in the ring's own table, which have an index and no fd.

The operations of a linked chain are made before the first of them runs. If the first one opens a
file, the others need a number for it that is known beforehand. The index of a fixed file is known,
and an fd is not.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import Operation, nothing

T = TypeVar("T")

_FIXED_FILE: Final = int(SqeFlag.FIXED_FILE)


def open_fixed(opening: Operation[int], index: int) -> Operation[int]:
    """Make *opening*, an ``openat``, open a fixed file with this *index*. For linked chains.

    If the index was in use, its file is closed.

    Completes with: 0.
    Fails with: as *opening*; ``ENXIO``, ``EINVAL`` if the table has no such index.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_openat_direct(3).
    """
    # The kernel refuses O_CLOEXEC for fixed files, which child processes never inherit.
    opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, _, addr3 = opening.sqe
    flags &= ~os.O_CLOEXEC
    file_index = index + 1  # shares a field with splice_fd_in; 0 means no fixed file
    opening.sqe = (
        opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, file_index, addr3
    )  # fmt: skip
    opening.discard = None
    opening.cancellable = False
    return opening


def on_fixed(operation: Operation[T]) -> Operation[T]:
    """Make *operation* act on a fixed file. It was made with an index in place of an fd.

    Completes with: as *operation*.
    Fails with: as *operation*; ``EBADF`` if there is no such file.
    If cancelled: as *operation*.
    Since: Linux 5.1. Source: io_uring_enter(2), ``IOSQE_FIXED_FILE``.
    """
    sqe = operation.sqe
    operation.sqe = (sqe[0], sqe[1] | _FIXED_FILE, *sqe[2:])
    operation.acts_on_fd = False
    return operation


def close_fixed(index: int) -> Operation[None]:
    """Close the fixed file *index*.

    Unlike close(2), this does not make a network file system send the written data.

    Completes with: nothing.
    Fails with: ``EBADF`` if there is no such file.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_close_direct(3).
    """
    return Operation(Opcode.CLOSE, nothing, 0, splice_fd_in=index + 1, cancellable=False)
