"""`GuestWakeup`: lets a guest run wait for its ring in Trio's worker thread."""

from __future__ import annotations

import os
import select


class GuestWakeup:
    """An eventfd on which the worker thread of a guest run waits.

    In guest mode Trio calls ``get_events`` with a timeout in a worker thread. The kernel refuses
    io_uring_enter(2) in that thread (``EEXIST``). Polling the fd of a ring with DEFER_TASKRUN never
    wakes. An eventfd registered with the ring becomes readable as soon as there is work to run. The
    host's thread then fetches the completions. (Seen on Linux 6.18.)
    """

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self.eventfd, select.POLLIN)

    def wait(self, timeout: float) -> bool:
        """Wait at most *timeout* seconds; return whether the ring has work. For the worker."""
        return bool(self._poll.poll(timeout * 1000))

    def drain(self) -> None:
        """Reset the eventfd, before the host's thread enters the ring."""
        if self._poll.poll(0):
            os.eventfd_read(self.eventfd)

    def close(self) -> None:
        """Close the eventfd."""
        os.close(self.eventfd)
