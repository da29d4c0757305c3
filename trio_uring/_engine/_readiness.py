"""Trio's epoll manager, used for `wait_readable`, `wait_writable` and wake-ups by other threads.

Why readiness is not IORING_OP_POLL_ADD
---------------------------------------

The kernel adds POLLRDHUP to the events of every POLL_ADD (IO_POLL_UNMASK in io_uring/poll.c). So
once the peer has shut down its side, a wait for POLLOUT on a full socket completes at once with
res == POLLRDHUP, and so does every retry. poll(2) and epoll(7) keep waiting. On a regular file,
POLL_ADD completes where epoll fails with EPERM. POLL_ADD also keeps the file open after close(2).
Seen on Linux 6.18.

A wait_writable() built on POLL_ADD would use 100 % CPU until the peer reads. Trio's
test_socket_actual_streaming finds this.

So readiness stays with Trio's EpollIOManager and keeps its semantics. The ring watches the epoll fd
with one POLL_ADD, which is submitted again after each batch of readiness events. The cost is one
epoll_wait(2) for each batch; operations on the ring do not need it. Wake-ups by other threads
arrive the same way, through the socketpair in Trio's epoll.
"""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Protocol

from trio_uring._operations import Operation, poll_add
from trio_uring._trio_private import EpollIOManager

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_uring._operations import Exclusive


class HasFileNo(Protocol):
    """An object with a file descriptor, such as a socket or a file."""

    def fileno(self) -> int:
        """Return the file descriptor."""
        ...


class Readiness(EpollIOManager):
    """Trio's `EpollIOManager`, whose epoll fd a ring watches."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[int] = set()  # the fds that may be registered with epoll

    async def wait_readable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is readable; see Trio's docs."""
        self._seen.add(fd if isinstance(fd, int) else fd.fileno())
        await super().wait_readable(fd)

    async def wait_writable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is writable; see Trio's docs."""
        self._seen.add(fd if isinstance(fd, int) else fd.fileno())
        await super().wait_writable(fd)

    def fd_closing(self, fd: int) -> None:
        """Call `notify_closing` if a task has waited on *fd*. For other fds it would do nothing."""
        if fd in self._seen:
            self._seen.discard(fd)
            self.notify_closing(fd)

    def watch(self) -> Operation[int]:
        """Return an operation that completes when `dispatch_ready` has something to do."""
        return poll_add(self._epoll.fileno(), select.POLLIN)

    def dispatch_ready(self) -> None:
        """Reschedule every task whose fd is ready."""
        self.process_events(self.get_events(0))

    @property
    def waits(self) -> Mapping[int, object]:
        """The fds that tasks wait on."""
        return self._registered

    def is_busy(self, fd: int, exclusive: Exclusive) -> bool:
        """Whether a task waits until *fd* is readable or writable, as *exclusive* says."""
        if fd not in self._registered:
            return False
        waiters = self._registered[fd]
        return (waiters.read_task if exclusive == "read" else waiters.write_task) is not None
