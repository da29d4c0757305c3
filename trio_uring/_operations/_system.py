"""The operations on memory, futexes, processes and epoll, one function each."""

from __future__ import annotations

import os
import platform
import struct
from typing import TYPE_CHECKING, Final

import attrs

from trio_uring._kernel import CData, ffi
from trio_uring._kernel.uapi import FUTEX_BITSET_MATCH_ANY, Futex2Flag, Opcode

from ._operation import Operation, address_of, count, nothing, pin_writable

if TYPE_CHECKING:
    import mmap
    from collections.abc import Sequence

    from typing_extensions import Buffer

# struct epoll_event: the events, and the data from epoll_ctl. It is packed on x86-64.
_EPOLL_EVENT = struct.Struct("=IQ" if platform.machine() == "x86_64" else "@IQ")

# The part of siginfo_t that waitid(2) fills: signal, errno and code, then pid, uid and status,
# aligned like a pointer.
_SIGINFO = struct.Struct("@iii 0P iIi")
_SIGINFO_SIZE: Final = 128

# In bytes. The kernel supports no other size yet.
_FUTEX_SIZE: Final = 4
_FUTEX_WAITV = struct.Struct("=QQII")  # value, address, flags, reserved


@attrs.frozen
class ChildStatus:
    """The state of a child process, as waitid reports it.

    Args:
      pid: The child's process ID.
      uid: The child's real user ID.
      code: What happened: `os.CLD_EXITED`, `os.CLD_KILLED`, `os.CLD_STOPPED`, ...
      status: Its exit status, or the signal that killed, stopped or continued it.
    """

    pid: int
    uid: int
    code: int
    status: int


def madvise(
    memory: mmap.mmap, advice: int, start: int = 0, size: int | None = None
) -> Operation[None]:
    """Tell the kernel how a part of *memory* will be used, like `mmap.mmap.madvise`.

    The part begins at *start*, a multiple of the page size. *advice*: `mmap.MADV_WILLNEED`,
    `mmap.MADV_DONTNEED`, ...

    Completes with: nothing.
    Fails with: ``EINVAL``, ``ENOMEM``, ...: see madvise(2); on older kernels also for 4 GiB or
      more.
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_madvise64(3), madvise(2).
    """
    end = None if size is None else start + size
    pin = ffi.from_buffer("char[]", memoryview(memory)[start:end])
    wide = len(pin) >= 1 << 32  # as in fadvise, but here the wide field is off
    return Operation(
        Opcode.MADVISE,
        nothing,
        addr=pin,
        len=0 if wide else len(pin),
        op_flags=advice,
        off=len(pin) if wide else 0,
        pins=(pin,),
        cancellable=False,
        limited=True,
    )


def futex_wait(
    futex: Buffer, value: int, mask: int = FUTEX_BITSET_MATCH_ANY, *, private: bool = False
) -> Operation[None]:
    """Wait until *futex*, 4 aligned bytes that hold *value*, is woken.

    With *private*, only this process can wake it. Otherwise the bytes may be in shared memory.

    Completes with: nothing. The value may not have changed, so check it.
    Fails with: ``EAGAIN`` if *futex* does not hold *value*; ``EINVAL`` if it is not aligned.
    If cancelled: nothing happened.
    Since: Linux 6.7. Source: io_uring_prep_futex_wait(3), futex(2).
    """
    pin = _pin_futex(futex)
    # The field fd has the flags.
    return Operation(
        Opcode.FUTEX_WAIT,
        nothing,
        _futex_flags(private=private),
        pin,
        off=value,
        addr3=mask,
        pins=(pin,),
        acts_on_fd=False,
    )


def futex_waitv(futexes: Sequence[tuple[Buffer, int]], *, private: bool = False) -> Operation[int]:
    """Wait until one of *futexes*, each with the value that it holds, is woken.

    Completes with: the index of a futex that was woken.
    Fails with: ``EAGAIN`` if a futex does not hold its value; ``EINVAL`` if there are none or more
      than 128, or if one is not aligned.
    If cancelled: nothing happened.
    Since: Linux 6.7. Source: io_uring_prep_futex_waitv(3), futex_waitv(2).
    """
    pins = [_pin_futex(futex) for futex, _ in futexes]
    flags = _futex_flags(private=private)
    vector = b"".join(
        _FUTEX_WAITV.pack(value, address_of(pin), flags, 0)
        for pin, (_, value) in zip(pins, futexes, strict=True)
    )
    return Operation(
        Opcode.FUTEX_WAITV, count, 0, vector, len(pins), pins=tuple(pins), acts_on_fd=False
    )


def futex_wake(
    futex: Buffer,
    wake_max: int = 1,
    mask: int = FUTEX_BITSET_MATCH_ANY,
    *,
    private: bool = False,
) -> Operation[int]:
    """Wake at most *wake_max* waiters of *futex* whose mask has a bit in common with *mask*.

    Completes with: the number of waiters that were woken.
    Fails with: ``EINVAL`` if *futex* is not aligned.
    If cancelled: it still completes.
    Since: Linux 6.7. Source: io_uring_prep_futex_wake(3), futex(2).
    """
    pin = _pin_futex(futex)
    return Operation(
        Opcode.FUTEX_WAKE,
        count,
        _futex_flags(private=private),
        pin,
        off=wake_max,
        addr3=mask,
        pins=(pin,),
        cancellable=False,
        acts_on_fd=False,
    )


def waitid(id_type: int, id: int, options: int) -> Operation[ChildStatus | None]:
    """Wait until a child process changes state.

    *id_type*: `os.P_PID`, `os.P_PIDFD`, `os.P_ALL`, ... *options*: `os.WEXITED`, `os.WSTOPPED`,
    `os.WCONTINUED`, `os.WNOHANG` (do not wait), `os.WNOWAIT` (leave the child in a state in which
    it can be waited for again).

    Completes with: the child's status; with `os.WNOHANG`, None if no child has changed state.
    Fails with: ``ECHILD``, ``EINVAL``: see waitid(2).
    If cancelled: no child was reaped.
    Since: Linux 6.7. Source: io_uring_prep_waitid(3), waitid(2).
    """
    info = bytearray(_SIGINFO_SIZE)
    pin = pin_writable(info)

    def decode(_res: int, _flags: int) -> ChildStatus | None:
        _, _, code, pid, uid, status = _SIGINFO.unpack_from(info)
        return ChildStatus(pid, uid, code, status) if pid else None

    return Operation(
        Opcode.WAITID,
        decode,
        id,
        len=id_type,
        off=address_of(pin),
        splice_fd_in=options,
        pins=(pin,),
        acts_on_fd=id_type == os.P_PIDFD,
    )


def epoll_ctl(epoll_fd: int, command: int, fd: int, events: int = 0) -> Operation[None]:
    """Add *fd* to an epoll, remove it, or change its *events*.

    *command*: 1 to add, 2 to remove, 3 to change. *epoll_fd* can be that of a `select.epoll`.

    Completes with: nothing.
    Fails with: ``EEXIST``, ``ENOENT``, ``EPERM`` for a regular file, ...: see epoll_ctl(2).
    If cancelled: it still completes.
    Since: Linux 5.6. Source: io_uring_prep_epoll_ctl(3), epoll_ctl(2).
    """
    # The field len has the command, and off has the fd.
    return Operation(
        Opcode.EPOLL_CTL,
        nothing,
        epoll_fd,
        _EPOLL_EVENT.pack(events, fd),
        command,
        off=fd,
        cancellable=False,
    )


def epoll_wait(epoll_fd: int, events_max: int) -> Operation[list[tuple[int, int]]]:
    """Wait until at least one fd in an epoll is ready.

    Completes with: ``(fd, events)`` for at most *events_max* fds, as `select.epoll.poll`.
    Fails with: ``EBADF``, ``EINVAL``: see epoll_wait(2).
    If cancelled: no event is lost.
    Since: Linux 6.15. Source: io_uring_prep_epoll_wait(3), epoll_wait(2).
    """
    events = bytearray(events_max * _EPOLL_EVENT.size)
    pin = pin_writable(events)

    def decode(res: int, _flags: int) -> list[tuple[int, int]]:
        ready = _EPOLL_EVENT.iter_unpack(memoryview(events)[: res * _EPOLL_EVENT.size])
        return [(fd, mask) for mask, fd in ready]

    return Operation(Opcode.EPOLL_WAIT, decode, epoll_fd, pin, events_max, pins=(pin,))


def _pin_futex(futex: Buffer) -> CData:
    pin = pin_writable(futex)
    if len(pin) != _FUTEX_SIZE:
        raise ValueError(f"a futex has {_FUTEX_SIZE} bytes, not {len(pin)}")
    return pin


def _futex_flags(*, private: bool) -> int:
    return int(Futex2Flag.SIZE_U32 | (Futex2Flag.PRIVATE if private else 0))
