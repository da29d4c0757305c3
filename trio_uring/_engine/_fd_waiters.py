"""`FdWaiters`: the one table of who waits on which fd.

Every operation that can be cancelled stands here from its push to its last CQE. The table answers
two questions: who must be cancelled before an fd can be closed, and whether another task already
waits for the same thing on it. Readiness waits are in epoll's own table, which is asked too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._operations import Exclusive, Operation

    from ._readiness import HasFileNo, Readiness


class FdWaiter:
    """What waits on the fds of its *operation*."""

    __slots__ = ()

    operation: Operation[object]
    user_data: int = 0  # while it is in flight

    def fd_closing(self) -> None:
        """End the wait, because one of the fds is about to be closed."""
        raise NotImplementedError

    def finish_cancelled(self) -> None:
        """If the wait was cancelled, see it end."""


@attrs.define(eq=False)
class FdReservation(FdWaiter):
    """Keeps other tasks from an fd as *operation* would, also while that is not in flight."""

    operation: Operation[object]
    on_close: Callable[[], None]

    def fd_closing(self) -> None:
        """Tell the owner."""
        self.on_close()


class FdWaiters(dict[int, list[FdWaiter]]):
    """By fd, who waits on it; no fd has an empty list."""

    def __init__(self, readiness: Readiness) -> None:
        super().__init__()
        self._readiness = readiness

    def register(self, waiter: FdWaiter) -> None:
        """Add *waiter*.

        Raises:
          trio.BusyResourceError: another task waits for the same thing on the same fd.
        """
        operation = waiter.operation
        fd = operation.fd
        if fd < 0 or not operation.acts_on_fd:
            return
        waiters = self.get(fd)
        if operation.exclusive is not None and (waiters or fd in self._readiness.waits):
            self.check_not_busy(fd, operation.exclusive)
            waiters = self.get(fd)  # one that was cancelled may be gone
        if waiters is None:
            self[fd] = [waiter]
        else:
            waiters.append(waiter)
        if operation.second_fd >= 0:
            self.setdefault(operation.second_fd, []).append(waiter)

    def unregister(self, waiter: FdWaiter) -> None:
        """Remove *waiter*. After notify_closing() the list may be gone, or be a new file's."""
        operation = waiter.operation
        self._remove(operation.fd, waiter)
        if operation.second_fd >= 0:
            self._remove(operation.second_fd, waiter)

    def _remove(self, fd: int, waiter: FdWaiter) -> None:
        waiters = self.get(fd)
        if waiters is not None and waiter in waiters:
            if len(waiters) == 1:
                del self[fd]
            else:
                waiters.remove(waiter)

    def count(self, exclusive: Exclusive) -> int:
        """Return how many operations exclude others of the kind *exclusive*."""
        kinds = [waiter.operation.exclusive for waiters in self.values() for waiter in waiters]
        return kinds.count(exclusive)

    def check_not_busy(self, fd: int | HasFileNo, exclusive: Exclusive) -> None:
        """Raise `trio.BusyResourceError` if a task waits for *exclusive* on *fd*.

        One that was cancelled does not count, as with Trio, but its operation has to end first.
        """
        if not isinstance(fd, int):
            fd = fd.fileno()
        for waiter in tuple(self.get(fd, ())):
            waiter.finish_cancelled()
        if self._readiness.is_busy(fd, exclusive) or any(
            waiter.operation.exclusive == exclusive for waiter in self.get(fd, ())
        ):
            raise trio.BusyResourceError("another task is already reading / writing this fd")
