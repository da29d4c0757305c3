"""Trio's own epoll, beside the ring: for `wait_readable`, `wait_writable` and other threads.

Why readiness is not IORING_OP_POLL_ADD
---------------------------------------

Facts. The kernel adds POLLRDHUP to every POLL_ADD, asked for or not (IO_POLL_UNMASK in
io_uring/poll.c). So once the peer has shut down its side, a wait for POLLOUT on a full
socket completes at once with res == POLLRDHUP, and so does every retry. poll(2) and epoll(7)
keep waiting. On a regular file POLL_ADD says "ready" where epoll says EPERM. And it holds the
file open after close(2). Seen on Linux 6.18.

What does this mean for us? A wait_writable() built on POLL_ADD burns 100 % CPU until the peer
reads. Trio's own test_socket_actual_streaming catches it.

So readiness stays with Trio's EpollIOManager, semantics and all, and the ring watches the
epoll fd with one POLL_ADD, armed again after each batch. The price is one epoll_wait(2) for a
batch of readiness events; our own operations never pay it. Wake-ups by other threads arrive
the same way, through the socketpair that Trio keeps in its epoll.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING, Protocol

import attrs

from trio_uring._operations import Operation, poll_add
from trio_uring._trio_private import EpollIOManager

if TYPE_CHECKING:
    from collections.abc import Container

    from trio_uring._operations import Exclusive


class HasFileNo(Protocol):
    """A socket, a file, or the like."""

    def fileno(self) -> int:
        """Return the file descriptor."""
        ...


class Readiness(EpollIOManager):
    """Trio's `EpollIOManager`, watched by a ring."""

    def watch(self) -> Operation[int]:
        """Return the operation that completes when `harvest` has something to do."""
        return poll_add(self._epoll.fileno(), select.POLLIN)

    def harvest(self) -> None:
        """Reschedule every task whose fd is ready."""
        self.process_events(self.get_events(0))

    @property
    def waits(self) -> Container[int]:
        """The fds that tasks wait for."""
        return self._registered

    def is_busy(self, fd: int, exclusive: Exclusive) -> bool:
        """Whether a task waits for *fd* to be readable, or writable."""
        if fd not in self._registered:
            return False
        waiters = self._registered[fd]
        return (waiters.read_task if exclusive == "read" else waiters.write_task) is not None


@attrs.frozen(eq=False)
class FallbackStatistics:
    """`trio.lowlevel.RunStatistics.io_statistics` of a run that wanted a ring and got none.

    Args:
      tasks_waiting_read: As in Trio's own statistics.
      tasks_waiting_write: As in Trio's own statistics.
      fallback_reason: Why there is no ring, and what to do about it.
    """

    tasks_waiting_read: int
    tasks_waiting_write: int
    fallback_reason: str
    backend: str = "epoll"


class FallbackIOManager(EpollIOManager):
    """Trio's own I/O manager, which also says why it was chosen."""

    fallback_reason: str = ""

    @classmethod
    def because(cls, reason: str) -> FallbackIOManager:
        """Return a new one that gives *reason* in its statistics."""
        manager = cls()
        manager.fallback_reason = reason
        return manager

    def statistics(self) -> FallbackStatistics:  # type: ignore[override]
        """Return Trio's statistics, and the reason."""
        plain = super().statistics()
        return FallbackStatistics(
            plain.tasks_waiting_read, plain.tasks_waiting_write, self.fallback_reason
        )


class GuestWakeup:
    """How the worker thread of a guest run waits for the ring without touching it.

    In guest mode Trio calls ``get_events`` with a timeout in a worker thread. That thread may
    not enter the ring (``EEXIST``), and polling the fd of a ring with DEFER_TASKRUN never
    wakes. An eventfd registered with the ring does, as soon as there is work to run; the
    host's thread then fetches the completions. (Linux 6.18)
    """

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self.eventfd, select.POLLIN)

    def wait(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds; whether the ring wants attention. For the worker."""
        return bool(self._poll.poll(timeout * 1000))

    def drain(self) -> None:
        """Reset, before the host's thread enters the ring."""
        if self._poll.poll(0):
            os.eventfd_read(self.eventfd)

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.eventfd)
