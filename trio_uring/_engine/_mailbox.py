"""`Mailbox`: deliveries from other threads to the tasks of a run, and how its loop is woken.

A message between rings (``IORING_OP_MSG_RING``) carries a few numbers. The numbers in our messages
are not used. The deliveries are in a queue in memory, and the message only wakes the loop, which
then processes the queue. So a message that is lost, late or duplicated does no harm, and no pointer
goes through the kernel.

The target's fd must stay open while a message to it is in flight. Otherwise its number could be
reused, and the message would reach another ring. The sending thread cannot know when the other
thread closes its ring. So messages are sent to a duplicate of that fd. Its last user closes it: the
run itself, or the last message in flight.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakSet

import trio

from trio_uring._operations import msg_ring

from ._in_flight import WAKE, InFlight
from ._run_state import RunResource

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_uring._operations import Operation

    from ._in_flight import InFlightTable
    from ._ring import Ring


# The value of `Mailbox.last_iteration` while the loop waits in the kernel.
ASLEEP: Final = inf


# Not a Callable, because a mailbox holds these weakly, and a bound method would be freed at once.
class Dependent(Protocol):
    """An object that a run uses, and that is notified when the run ends."""

    def run_ended(self, mailbox: Mailbox) -> None:
        """The run with *mailbox* has ended. Called in its thread."""


class Mailbox(RunResource):
    """The queue of deliveries to the current run. *ring* is None if the run has no ring."""

    def __init__(self, ring: Ring | None) -> None:
        self._ring = ring
        self._token = trio.lowlevel.current_trio_token()
        self.dependents: WeakSet[Dependent] = WeakSet()
        # When the loop last returned from the kernel. It starts as the creation time for a run
        # with a ring, and as 0.0 for one without.
        self.last_iteration: float = 0.0 if ring is None else time.monotonic()
        self._lock = threading.Lock()  # guards what follows; no callback is called while it is held
        self._deliveries: deque[Callable[[], object]] = deque()
        self._notified = False  # whether the run was woken and has not called `deliver_all` yet
        self.closed: bool = False
        self._users = 1  # of `_fd`: this mailbox, and each message in flight
        self._fd = -1
        self._process = os.getpid()  # the process that opened `_fd`
        if ring is not None:
            with suppress(OSError):  # too many open files; `notify` works without the fd
                self._fd = ring.dup_fd()

    def put(self, deliver: Callable[[], object]) -> bool:
        """Queue *deliver*, which the run calls in its thread. Called in any thread.

        If the run has ended, *deliver* is called at once, in the calling thread. It finds out from
        `closed`.

        Returns:
          Whether the caller must wake the run, with a `WakeMessage` or with `notify`.
        """
        with self._lock:
            if not self.closed:
                self._deliveries.append(deliver)
                notified, self._notified = self._notified, True
                return not notified
        deliver()
        return False

    def acquire_fd(self) -> int:
        """Return an fd of the ring, which stays open until `release_fd`; -1 if there is none."""
        with self._lock:
            if self.closed or self._fd < 0:
                return -1
            self._users += 1
            return self._fd

    def release_fd(self, fd: int) -> None:
        """Undo an `acquire_fd` that returned *fd*."""
        if fd >= 0:
            with self._lock:
                self._users -= 1
                last = not self._users
            if last and os.getpid() == self._process:  # in a forked child it is closed already
                os.close(fd)

    def wake_from(self, table: InFlightTable) -> bool:
        """Wake the run with a message from the ring of *table*. Called in that ring's thread.

        Returns:
          Whether the message was submitted. If not, the caller must use `notify`.
        """
        fd = self.acquire_fd()
        operation = msg_ring(fd, WAKE)
        pushed = False
        if fd >= 0 and table.ring.offers(operation.opcode):
            message = WakeMessage(table, operation, mailbox=self)
            with suppress(OSError, RuntimeError):  # that ring is lost
                pushed = table.start_if_room(message)
        if not pushed:
            self.release_fd(fd)
            return False
        # Submit now: this loop may not submit again before the other run answers.
        with suppress(OSError):
            table.ring.flush()
        return not table.ring.unsubmitted

    def notify(self) -> None:
        """Make the run call `deliver_all`, through its `TrioToken`. Called in any thread."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.deliver_all, idempotent=True)

    def deliver_all(self) -> None:
        """Make the queued deliveries. Called in the run's thread."""
        with self._lock:
            deliveries, self._deliveries = self._deliveries, deque()
            self._notified = False
        for deliver in deliveries:
            deliver()

    def ring_lost(self) -> None:
        """The ring gets no messages any more. Make the deliveries of those that it may have got.

        Called in the run's thread.
        """
        with self._lock:
            fd, self._fd = self._fd, -1
        if self._ring is not None:
            self._ring.forget_dup_fd()
        self._ring = None
        self.last_iteration = 0.0
        self.release_fd(fd)
        self.deliver_all()

    def close(self, *, drained: bool) -> None:
        """Close the mailbox, then call the queued deliveries, which find that it is closed.

        Called at the end of the run, in its thread.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
            deliveries, self._deliveries = self._deliveries, deque()
        if self._ring is not None:
            self._ring.forget_dup_fd()
        for dependent in list(self.dependents):
            dependent.run_ended(self)
        # Each object goes back to the front of its channel, so the last one goes first.
        for deliver in reversed(deliveries):
            deliver()
        self.release_fd(self._fd)


class WakeMessage(InFlight):
    """The message that wakes another run for its mailbox. No task waits for it."""

    __slots__ = ("mailbox",)

    def __init__(
        self, table: InFlightTable, operation: Operation[object], *, mailbox: Mailbox
    ) -> None:
        super().__init__(table, operation)
        self.mailbox = mailbox

    def done(self) -> None:
        """Release the other ring's fd. If the message failed, wake the run through its token."""
        self.mailbox.release_fd(self.operation.fd)
        if self.res < 0:
            self.mailbox.notify()

    def discard(self) -> None:
        """Do the same as `done`, while our own ring is being closed."""
        self.done()
