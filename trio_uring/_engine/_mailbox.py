"""`Mailbox`: what other threads deliver to the tasks of a run, and how its loop is woken for it.

A message from ring to ring (``IORING_OP_MSG_RING``) carries a few numbers. Ours mean nothing: the
deliveries are in a queue in memory, and the message only makes the loop look there. So a message
that is lost, late or duplicated does no harm, and no pointer goes through the kernel.

The target's fd must stay open while a message to it is in flight. Its number could otherwise be
reused, and the message would reach a ring that does not expect it. The sending thread cannot know
when the other thread closes its ring. So messages go to a duplicate of that fd, and its last user
closes it: the run itself, or the last message in flight.
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

import attrs
import trio

from trio_uring._operations import msg_ring

from ._in_flight import WAKE, InFlight
from ._run_state import RunResource

if TYPE_CHECKING:
    from ._in_flight import InFlightTable
    from ._ring import Ring


# A loop's `Mailbox.last_iteration` while it waits in the kernel.
ASLEEP: Final = inf


class Delivery(Protocol):
    """What another thread delivers to a task of the mailbox's run."""

    def deliver(self) -> None:
        """Deliver it. Called in the run's thread."""

    def undelivered(self) -> None:
        """Take it back, because the run has ended. Called in any thread."""


class Dependent(Protocol):
    """What a run uses and must be told when the run ends."""

    def run_ended(self, mailbox: Mailbox) -> None:
        """The run with *mailbox* has ended. Called in its thread."""


class Mailbox(RunResource):
    """The queue of deliveries to the current run; *ring* is its ring, or None if it has none."""

    def __init__(self, ring: Ring | None) -> None:
        self._ring = ring
        self._token = trio.lowlevel.current_trio_token()
        self.dependents: WeakSet[Dependent] = WeakSet()
        # When a loop with a ring last left the kernel: if it had no mailbox then, about now.
        self.last_iteration: float = 0.0 if ring is None else time.monotonic()
        self._lock = threading.Lock()  # guards what follows; no code of others runs under it
        self._deliveries: deque[Delivery] = deque()
        self._notified = False  # and `deliver_all` has not run since
        self.closed: bool = False
        self._users = 1
        self._fd = -1
        self._process = -1  # which has that fd
        if ring is not None:
            with suppress(OSError):  # too many open files: `notify` works without
                self._fd = ring.dup_fd()
                self._process = os.getpid()

    def put(self, delivery: Delivery) -> bool:
        """Queue *delivery*. Called in any thread.

        Returns:
          Whether the caller must wake the run, with a `WakeMessage` or with `notify`.
        """
        with self._lock:
            if not self.closed:
                self._deliveries.append(delivery)
                notified, self._notified = self._notified, True
                return not notified
        delivery.undelivered()
        return False

    def acquire_fd(self) -> int:
        """Return an fd of the ring that stays open until `release_fd`; -1 if there is none."""
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
            if last and os.getpid() == self._process:  # a forked child has closed it
                os.close(fd)

    def wake_from(self, table: InFlightTable) -> bool:
        """Wake the run with a message from the ring of *table*; False if that is not possible.

        Called in the thread of that ring.
        """
        fd = self.acquire_fd()
        operation = msg_ring(fd, WAKE)
        pushed = fd >= 0 and table.ring.offers(operation.opcode)
        if pushed:
            message = WakeMessage(table, operation, mailbox=self)
            with suppress(OSError, RuntimeError):
                pushed = table.start_if_room(message)
        if not pushed:
            self.release_fd(fd)
            return False
        with suppress(OSError):  # at once: this loop may not submit again before the other answers
            table.ring.flush()
        return not table.ring.unsubmitted

    def notify(self) -> None:
        """Have the run call `deliver_all`, through Trio's `TrioToken`. Called in any thread."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.deliver_all, idempotent=True)

    def deliver_all(self) -> None:
        """Deliver what is queued. Called in the run's thread."""
        with self._lock:
            deliveries, self._deliveries = self._deliveries, deque()
            self._notified = False
        for delivery in deliveries:
            delivery.deliver()

    def close(self, *, drained: bool) -> None:
        """Refuse further deliveries. Called when the run ends, in its thread."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            deliveries, self._deliveries = self._deliveries, deque()
        if self._ring is not None:
            self._ring.forget_dup_fd()
        for dependent in list(self.dependents):
            dependent.run_ended(self)
        for delivery in reversed(deliveries):  # each goes back to the front of its queue
            delivery.undelivered()
        self.release_fd(self._fd)


@attrs.define(eq=False)
class WakeMessage(InFlight):
    """The message that wakes another run's ring for its mailbox. No task waits for it."""

    mailbox: Mailbox = attrs.field(kw_only=True)

    def done(self) -> None:
        """Release the other ring's fd; if the message failed, wake the run through its token."""
        self.mailbox.release_fd(self.operation.fd)
        if self.res < 0:
            self.mailbox.notify()

    def discard(self) -> None:
        """Do as `done`, while our own ring is being closed."""
        self.done()
