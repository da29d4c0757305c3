"""Operations on fixed files: files in the ring's own table, which have an index and no fd.

The operations of a linked chain are described before the first of them runs. So a file that the
first one opens must get a number that is known beforehand: an fd is not, an index is.
"""

from __future__ import annotations

import os
from typing import Final, TypeVar

from trio_uring._kernel.uapi import Opcode, SqeFlag

from ._operation import Operation, nothing

T = TypeVar("T")

_FIXED_FILE: Final = int(SqeFlag.FIXED_FILE)


def open_fixed(opening: Operation[int], index: int) -> Operation[int]:
    """Have *opening*, an ``openat``, open the fixed file *index*; in a chain.

    The file that had this index is closed.

    Completes with: 0.
    Fails with: as *opening*; ``ENXIO``, ``EINVAL``: the table has no such index.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_openat_direct(3).
    """
    # A file without an fd is not inherited by child processes, and may not be told not to be.
    opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, _, addr3 = opening.sqe
    flags &= ~os.O_CLOEXEC
    file_index = index + 1  # in a union with splice_fd_in; 0 stands for no fixed file
    opening.sqe = (
        opcode, sqe_flags, ioprio, fd, off, addr, len_, flags, buf_index, file_index, addr3
    )  # fmt: skip
    opening.discard = None
    opening.cancellable = False
    return opening


def on_fixed(operation: Operation[T]) -> Operation[T]:
    """Have *operation*, which was made with an index in place of its fd, act on that fixed file.

    Completes with: what *operation* does.
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

    Unlike close(2) it does not make a network file system send what was written.

    Completes with: nothing.
    Fails with: ``EBADF`` if there is no such file.
    If cancelled: it still completes.
    Since: Linux 5.15. Source: io_uring_prep_close_direct(3).
    """
    return Operation(Opcode.CLOSE, nothing, 0, splice_fd_in=index + 1, cancellable=False)
