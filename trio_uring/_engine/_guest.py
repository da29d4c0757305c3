"""`GuestWakeup`: how a guest run waits for its ring in Trio's worker thread."""

from __future__ import annotations

import os
import select


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
