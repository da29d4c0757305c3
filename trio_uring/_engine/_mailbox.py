"""`Inbox`: what other threads have for the tasks of a run, and how its loop hears of it.

A message from ring to ring (``IORING_OP_MSG_RING``) carries a few numbers. We send none that
mean anything: what is to be delivered lies in a queue in memory, and the message only says that
there is something. So a message that is lost, comes late, or comes twice does no harm, and no
pointer goes through the kernel.

The target's fd must not be closed while a message to it is in flight: its number could be
another file's, and the message would reach a ring that knows nothing of us. The thread that
sends cannot know when the other closes its ring. So messages go to a duplicate of that fd, and
the last who uses it closes it: the run itself, or a message that came after its end.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakSet

import attrs
import trio

from ._in_flight import InFlight

if TYPE_CHECKING:
    from ._ring import Ring


# Stands for the time of a loop's last turn while it is in the kernel.
ASLEEP: Final = inf


class Delivery(Protocol):
    """Something for a task of the inbox's run."""

    def deliver(self) -> None:
        """Hand it over, in the run's thread."""

    def undelivered(self) -> None:
        """Take it back, in any thread: the run has ended."""


class Dependent(Protocol):
    """Something that a run used, and that must know when the run ends."""

    def run_ended(self, inbox: Inbox) -> None:
        """Take note that the run with *inbox* is over, in its thread."""


class Inbox:
    """What is to be delivered in a run, which is on *ring*, or on none."""

    def __init__(self, ring: Ring | None) -> None:
        self._ring = ring
        self._token: trio.lowlevel.TrioToken | None = None
        self.dependents: WeakSet[Dependent] = WeakSet()
        self.last_turn: float = 0.0  # when the loop, if on a ring, was last in the kernel
        self._lock = threading.Lock()  # for all that follows; nothing is called while it is held
        self._deliveries: deque[Delivery] = deque()
        self._told = False  # that there is something, and has not looked yet
        self.closed: bool = False
        self._users = 1
        self._fd = -1

    def opened(self) -> Inbox:
        """Return it, ready for use. In the run's thread, during the run."""
        if self._token is None:
            self._token = trio.lowlevel.current_trio_token()
            if self._ring is not None:
                with suppress(OSError):  # too many open files: then the word comes another way
                    self._fd = os.dup(self._ring.fd)
        return self

    def put(self, delivery: Delivery) -> bool:
        """Have *delivery* made. From any thread.

        Returns:
          Whether the caller now has to tell the run, by a `Word` or by `tell`.
        """
        with self._lock:
            if not self.closed:
                self._deliveries.append(delivery)
                told, self._told = self._told, True
                return not told
        delivery.undelivered()
        return False

    def hold(self) -> int:
        """Return an fd of the ring, good until `let_go`; -1 if there is none."""
        with self._lock:
            if self.closed or self._fd < 0:
                return -1
            self._users += 1
            return self._fd

    def let_go(self, fd: int) -> None:
        """Undo a `hold` that returned *fd*."""
        if fd >= 0:
            with self._lock:
                self._users -= 1
                last = not self._users
            if last:
                os.close(fd)

    def tell(self) -> None:
        """Have the run look, by the way that Trio has for it. From any thread."""
        assert self._token is not None
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self.look, idempotent=True)

    def look(self) -> None:
        """Make the deliveries. In the run's thread."""
        with self._lock:
            deliveries, self._deliveries = self._deliveries, deque()
            self._told = False
        for delivery in deliveries:
            delivery.deliver()

    def close(self) -> None:
        """Take nothing any more; called when the run ends, in its thread."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            deliveries, self._deliveries = self._deliveries, deque()
        for dependent in list(self.dependents):
            dependent.run_ended(self)
        for delivery in reversed(deliveries):  # what is put back in front comes in order
            delivery.undelivered()
        self.let_go(self._fd)


@attrs.define(eq=False)
class Word(InFlight):
    """The message to another ring that there is something in its inbox. No task waits for it."""

    inbox: Inbox = attrs.field(kw_only=True)

    def done(self) -> None:
        """Let go of the other ring's fd; if it did not hear us, try the other way."""
        self.inbox.let_go(self.operation.fd)
        if self.res < 0:
            self.inbox.tell()

    def discard(self) -> None:
        """As `done`, when our own ring is being closed."""
        self.done()
