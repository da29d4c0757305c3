"""`FdWaiters`: the operations and reservations on each fd.

Every operation that can be cancelled is registered here from its push to its last CQE. The table
says which operations must be cancelled before an fd is closed, and whether an exclusive operation
may start. Tasks that wait for readiness are in Trio's epoll manager, which is checked too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._operations import Exclusive, Operation

    from ._readiness import HasFileNo, Readiness


class FdWaiter:
    """Waits on the fds of its *operation*: an operation in flight, or a reservation."""

    __slots__ = ()

    operation: Operation[object]
    user_data: int = 0  # 0 if it is not in flight

    def fd_closing(self) -> None:
        """End the wait, because one of the fds is about to be closed."""
        raise NotImplementedError

    def finish_cancelled(self) -> None:
        """If the wait was cancelled, wait for its end."""


class FdReservation(FdWaiter):
    """Reserves an fd as *operation* would, including while that operation is not in flight."""

    def __init__(self, operation: Operation[object], on_close: Callable[[], None]) -> None:
        self.operation = operation
        self.on_close = on_close

    def fd_closing(self) -> None:
        """Call *on_close*."""
        self.on_close()


class FdWaiters(dict[int, list[FdWaiter]]):
    """Maps each fd to its waiters. No list is empty."""

    def __init__(self, readiness: Readiness) -> None:
        self._readiness = readiness
        # Each lets go of an fd whose user was garbage collected. Appended in any thread.
        self.forgotten: deque[Callable[[], object]] = deque()

    def register(self, waiter: FdWaiter) -> None:
        """Add *waiter*.

        Raises:
          trio.BusyResourceError: another task has an exclusive operation on the same fd.
        """
        operation = waiter.operation
        fd = operation.fd
        if fd < 0 or not operation.acts_on_fd:
            return
        waiters = self.get(fd)
        if operation.exclusive is not None and (waiters or fd in self._readiness.waits):
            self.check_not_busy(fd, operation.exclusive)
            waiters = self.get(fd)  # check_not_busy() may have removed a cancelled one
        if waiters is None:
            self[fd] = [waiter]
        else:
            waiters.append(waiter)
        if operation.second_fd >= 0:
            self.setdefault(operation.second_fd, []).append(waiter)

    def unregister(self, waiter: FdWaiter) -> None:
        """Remove *waiter*, if it is registered.

        After notify_closing() the fd's list may be gone or may belong to a new file.
        """
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
        """Return the number of waiters whose operation has the kind *exclusive*."""
        kinds = [waiter.operation.exclusive for waiters in self.values() for waiter in waiters]
        return kinds.count(exclusive)

    def check_not_busy(self, fd: int | HasFileNo, exclusive: Exclusive) -> None:
        """Raise `trio.BusyResourceError` if another task waits for *exclusive* on *fd*.

        A cancelled operation does not count, as in Trio. This waits for its end first. What was
        garbage collected does not count either.
        """
        if self.forgotten:
            self.let_go()
        if not isinstance(fd, int):
            fd = fd.fileno()
        for waiter in tuple(self.get(fd, ())):
            waiter.finish_cancelled()
        if self._readiness.is_busy(fd, exclusive) or any(
            waiter.operation.exclusive == exclusive for waiter in self.get(fd, ())
        ):
            raise trio.BusyResourceError("another task is already reading / writing this fd")

    def let_go(self) -> None:
        """Let go of what was forgotten."""
        while self.forgotten:
            self.forgotten.popleft()()
