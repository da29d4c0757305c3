"""`Line`: what the ends of a channel between loops share, and how its tasks are woken.

A task that waits stands in line. Whoever has something for it, in whatever thread, takes it out of
the line, under the lock, and from then on it cannot be cancelled: it gets what was meant for it
when its loop looks into the mailbox. So an object is in the channel or has been received, always.

A loop may not look for long: a task computes there. Objects go to loops that are not so busy, as
far as that is known, and until the loop looks, a receiver of another one that comes by may have
the object instead. If the loop ends before it looks, the object goes back.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final, Generic, Protocol, TypeVar, cast

import attrs
import trio
from outcome import Error, Outcome, Value
from trio.lowlevel import Abort, RunVar, reschedule, spawn_system_task

from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._mailbox import Mailbox
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio.lowlevel import RaiseCancelT, Task

T = TypeVar("T")

# How many of those that wait may be passed over: a bound for the time that it takes to look.
_LOOK_AT_MAX: Final = 16


class End(Protocol[T]):
    """What is known here of the ends."""

    line: Line[T]
    closed: bool
    receives: ClassVar[bool]

    def take_back(self, value: T | None) -> None:
        """Put back what a task did not live to receive."""


@attrs.define(eq=False)
class Waiter(Generic[T]):
    """A task that waits at *end*: in line, and then among those who were served."""

    end: End[T]
    task: Task
    mailbox: Mailbox
    cancelled: bool = False

    def deliver(self) -> None:
        """Wake the task, in its run's thread, unless another one has its object."""
        outcome = self._served()
        if outcome is not None:
            reschedule(self.task, outcome)

    def undelivered(self) -> None:
        """Put its object back: its run has ended."""
        outcome = self._served()
        if isinstance(outcome, Value):
            self.end.take_back(outcome.value)

    def _served(self) -> Outcome[T | None] | None:
        with self.end.line.lock:
            return self.end.line.served.pop(self, None)

    def abort(self, _raise_cancel: RaiseCancelT) -> Abort:
        """Leave the line, for Trio. Who has been served gets that."""
        line = self.end.line
        with line.lock:
            self.cancelled = True
            for waiters in (line.senders, line.receivers):
                if self in waiters:
                    del waiters[self]
                    return Abort.SUCCEEDED
        return Abort.FAILED

    def may_lose_to(self, last_iteration: float) -> bool:
        """Whether another loop, which turned then, may have what this one has not looked at."""
        return (
            self.mailbox.last_iteration < last_iteration
            and self.end.receives
            and not (self.cancelled or self.end.closed)  # it would wait in vain
        )


class Line(Generic[T]):
    """What the ends of a channel share. All of it is for who holds the lock."""

    def __init__(self, max_buffer_size: float) -> None:
        self.max_buffer_size: float = max_buffer_size
        self.lock: threading.Lock = threading.Lock()
        self.buffer: deque[T] = deque()
        self.peak: int = 0
        self.senders: dict[Waiter[T], T] = {}
        self.receivers: dict[Waiter[T], None] = {}
        # What those get who have been in line; their loops have not looked yet.
        self.served: dict[Waiter[T], Outcome[T | None]] = {}
        self.send_channels: int = 0
        self.receive_channels: int = 0

    def put(self, value: T) -> list[Waiter[T]]:
        """Take *value*; returns whom to wake."""
        if not self.receive_channels:
            raise trio.BrokenResourceError("all receive channels are closed")
        if self.receivers:
            receiver = self._next_receiver()
            del self.receivers[receiver]
            return [self.serve(receiver, Value(value))]
        if len(self.buffer) >= self.max_buffer_size:
            raise trio.WouldBlock
        self.buffer.append(value)
        self.peak = max(self.peak, len(self.buffer))
        return []

    def _next_receiver(self) -> Waiter[T]:
        """Return who waits longest in a loop that sleeps, or else in the one that turned last.

        A loop that has not turned for long may not do so for long: a task is computing there.
        """
        first = islice(self.receivers, _LOOK_AT_MAX)
        return max(first, key=lambda receiver: receiver.mailbox.last_iteration)

    def get(self, last_iteration: float = 0.0) -> tuple[T, list[Waiter[T]]]:
        """Return the next object, and whom to wake; *last_iteration*: of the loop that asks."""
        woken: list[Waiter[T]] = []
        if self.senders:
            sender = next(iter(self.senders))
            self.buffer.append(self.senders.pop(sender))
            woken.append(self.serve(sender, Value(None)))
        if self.buffer:
            return self.buffer.popleft(), woken
        for receiver, outcome in islice(self.served.items(), _LOOK_AT_MAX):
            if isinstance(outcome, Value) and receiver.may_lose_to(last_iteration):
                if self.send_channels:
                    del self.served[receiver]
                    self.receivers[receiver] = None
                else:
                    self.serve(receiver, Error(trio.EndOfChannel()))
                return cast("T", outcome.value), []
        if not self.send_channels:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    def serve(self, waiter: Waiter[T], outcome: Outcome[T | None]) -> Waiter[T]:
        """Settle what *waiter*, who has left the line, is to get; returns it."""
        self.served[waiter] = outcome
        return waiter

    def statistics(self) -> trio.MemoryChannelStatistics:
        """Return what Trio's memory channels tell."""
        return trio.MemoryChannelStatistics(
            current_buffer_used=len(self.buffer),
            max_buffer_size=self.max_buffer_size,
            open_send_channels=self.send_channels,
            open_receive_channels=self.receive_channels,
            tasks_waiting_send=len(self.senders),
            tasks_waiting_receive=len(self.receivers),
            peak_buffer_used=self.peak,
        )


# ---- Waking --------------------------------------------------------------------------------

_of_run: Final[RunVar[Mailbox]] = RunVar("trio_uring mailbox")


def mailbox_of_run() -> Mailbox:
    """Return the mailbox of the current run."""
    manager = current_io_manager()
    if isinstance(manager, UringIOManager):
        return manager.mailbox.open()
    try:
        return _of_run.get()
    except LookupError:
        mailbox = Mailbox(None).open()
        _of_run.set(mailbox)
        spawn_system_task(_close_at_the_end, mailbox)
        return mailbox


async def _close_at_the_end(mailbox: Mailbox) -> None:
    try:
        await trio.sleep_forever()
    finally:
        mailbox.close()


def wake(waiters: Sequence[Waiter[T]]) -> None:
    """Wake tasks, of any run."""
    if not waiters:
        return
    manager = _manager_of_this_thread()
    for waiter in waiters:
        mailbox = waiter.mailbox
        if manager is not None and mailbox is manager.mailbox and not mailbox.closed:
            waiter.deliver()
        elif mailbox.put(waiter) and not (manager and mailbox.wake_from(manager)):
            mailbox.notify()


def _manager_of_this_thread() -> UringIOManager | None:
    try:
        manager = current_io_manager()
    except RuntimeError:  # there is no run in this thread
        return None
    return manager if isinstance(manager, UringIOManager) else None
