"""`ChannelState` and `End`: the state of a channel between loops, and how its tasks are woken.

A waiting task is in `senders` or `receivers`. A thread that has an outcome for it moves it to
`assigned`, under the lock. From then on the task cannot be cancelled: it gets the outcome when its
loop delivers its mailbox. So each object is either in the channel or has been received.

A loop delivers late while one of its tasks computes. So objects are assigned to loops that seem
less busy, and until the loop delivers an object, a receiver in another loop can steal it. If the
loop ends before it delivers the object, the object goes back to the channel.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final, Generic, TypeVar, cast

import attrs
import trio
from outcome import Error, Outcome, Value
from trio.lowlevel import Abort, checkpoint, current_task, enable_ki_protection, reschedule

from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._mailbox import Mailbox
from trio_uring._engine._run_state import run_state_without_ring
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from trio.lowlevel import RaiseCancelT, Task
    from typing_extensions import Self

T = TypeVar("T")

# How many waiters are compared: this bounds the time under the lock.
_COMPARED_MAX: Final = 16

# Since Trio 0.33.
_HAS_PEAK: Final = hasattr(trio.MemoryChannelStatistics, "peak_buffer_used")


@attrs.define(eq=False)
class Waiter(Generic[T]):
    """A task that waits at *end*: first in `senders` or `receivers`, then in `assigned`."""

    end: End[T]
    task: Task
    mailbox: Mailbox
    cancelled: bool = False

    def deliver(self) -> None:
        """Wake the task, unless its object was stolen. If its run has ended, put the object back.

        Called in the run's thread, or in any thread if the run has ended.
        """
        with self.end.state.lock:
            outcome = self.end.state.assigned.pop(self, None)
        if outcome is not None and not self.mailbox.closed:
            reschedule(self.task, outcome)
        elif isinstance(outcome, Value):
            self.end.take_back(outcome.value)

    def abort(self, _raise_cancel: RaiseCancelT) -> Abort:
        """Stop waiting, unless an outcome has been assigned. Trio's abort function."""
        state = self.end.state
        with state.lock:
            self.cancelled = True
            for waiters in (state.senders, state.receivers):
                if self in waiters:
                    del waiters[self]
                    return Abort.SUCCEEDED
        return Abort.FAILED

    def can_be_stolen_by(self, last_iteration: float) -> bool:
        """Return whether a loop with this *last_iteration* may take the object assigned here."""
        return (
            self.mailbox.last_iteration < last_iteration
            and self.end.receives
            and not (self.cancelled or self.end.closed)  # it must not wait again
        )


class ChannelState(Generic[T]):
    """What the ends of a channel share. Use it only while holding its lock."""

    def __init__(self, max_buffer_size: float) -> None:
        self.max_buffer_size: float = max_buffer_size
        self.lock: threading.Lock = threading.Lock()
        self.buffer: deque[T] = deque()
        self.peak: int = 0
        self.senders: dict[Waiter[T], T] = {}
        self.receivers: dict[Waiter[T], None] = {}
        # Outcomes that the loops of their tasks have not delivered yet.
        self.assigned: dict[Waiter[T], Outcome[T | None]] = {}
        self.send_channels: int = 0
        self.receive_channels: int = 0

    def put(self, value: T) -> list[Waiter[T]]:
        """Assign *value* to a receiver, or buffer it. Return the waiters to wake."""
        if not self.receive_channels:
            raise trio.BrokenResourceError("all receive channels are closed")
        if self.receivers:
            receiver = self._next_receiver()
            del self.receivers[receiver]
            return [self.assign(receiver, Value(value))]
        if len(self.buffer) >= self.max_buffer_size:
            raise trio.WouldBlock
        self.buffer.append(value)
        self.peak = max(self.peak, len(self.buffer))
        return []

    def _next_receiver(self) -> Waiter[T]:
        """Return the receiver that has waited longest in a sleeping loop.

        If no loop sleeps, return one in the loop with the latest iteration. A loop whose last
        iteration was long ago has a task that computes.
        """
        first = islice(self.receivers, _COMPARED_MAX)
        return max(first, key=lambda receiver: receiver.mailbox.last_iteration)

    def get(self, last_iteration: float = 0.0) -> tuple[T, list[Waiter[T]]]:
        """Return the next object, and the waiters to wake.

        Args:
          last_iteration: When the caller's loop began its last iteration. It may steal objects from
            loops whose last iteration was earlier.
        """
        woken: list[Waiter[T]] = []
        if self.senders:
            sender = next(iter(self.senders))
            self.buffer.append(self.senders.pop(sender))
            woken.append(self.assign(sender, Value(None)))
        if self.buffer:
            return self.buffer.popleft(), woken
        for receiver, outcome in islice(self.assigned.items(), _COMPARED_MAX):
            if isinstance(outcome, Value) and receiver.can_be_stolen_by(last_iteration):
                if self.send_channels:
                    del self.assigned[receiver]
                    self.receivers[receiver] = None
                else:
                    self.assign(receiver, Error(trio.EndOfChannel()))
                return cast("T", outcome.value), []
        if not self.send_channels:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    def assign(self, waiter: Waiter[T], outcome: Outcome[T | None]) -> Waiter[T]:
        """Assign *outcome* to *waiter*, which stops waiting, and return *waiter*."""
        self.assigned[waiter] = outcome
        return waiter

    def statistics(self) -> trio.MemoryChannelStatistics:
        """Return the statistics that Trio's memory channels have."""
        peak = {"peak_buffer_used": self.peak} if _HAS_PEAK else {}
        return trio.MemoryChannelStatistics(
            current_buffer_used=len(self.buffer),
            max_buffer_size=self.max_buffer_size,
            open_send_channels=self.send_channels,
            open_receive_channels=self.receive_channels,
            tasks_waiting_send=len(self.senders),
            tasks_waiting_receive=len(self.receivers),
            **peak,
        )


class End(Generic[T]):
    """The part that both kinds of ends of a channel have in common."""

    receives: ClassVar[bool]

    def __init__(self, state: ChannelState[T]) -> None:
        self.state: ChannelState[T] = state
        self.closed: bool = False
        self._used_in: Mailbox | None = None

    def statistics(self) -> trio.MemoryChannelStatistics:
        """Return the statistics of the channel, as Trio's memory channels have them."""
        with self.state.lock:
            return self.state.statistics()

    def close(self) -> None:
        raise NotImplementedError

    def run_ended(self, mailbox: Mailbox) -> None:
        """Close this end, because the run that used it last has ended. Not for users."""
        if self._used_in is mailbox:
            self.close()

    def take_back(self, value: T | None) -> None:
        """Put *value* back: the run of its receiver has ended. Not for users."""

    @enable_ki_protection
    async def aclose(self) -> None:
        """Close this end, like ``close``. A checkpoint."""
        self.close()
        await checkpoint()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _waiter(self) -> Waiter[T]:
        mailbox = mailbox_of_run()
        if self._used_in is not mailbox:
            self._used_in = mailbox
            mailbox.dependents.add(self)
        return Waiter(self, current_task(), mailbox)

    def _check(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError

    def _close_out(self, waiting: dict[Waiter[T], None] | dict[Waiter[T], T]) -> list[Waiter[T]]:
        """Remove the waiters of this end from *waiting*, and assign them the error."""
        self.closed = True
        waiters = [waiter for waiter in waiting if waiter.end is self]
        for waiter in waiters:
            del waiting[waiter]
            self.state.assign(waiter, Error(trio.ClosedResourceError()))
        return waiters


# ---- Waking --------------------------------------------------------------------------------


def mailbox_of_run() -> Mailbox:
    """Return the mailbox of the current run."""
    manager = current_io_manager()
    if isinstance(manager, UringIOManager):
        return manager.open_mailbox()
    return run_state_without_ring().get(Mailbox, None)


def wake(waiters: Sequence[Waiter[T]]) -> None:
    """Wake *waiters*, which may be in any run. Called in any thread, without the lock."""
    if not waiters:
        return
    manager = _manager_of_this_thread()
    for waiter in waiters:
        mailbox = waiter.mailbox
        if manager is not None and mailbox is manager.mailbox:
            waiter.deliver()
        elif mailbox.put(waiter.deliver) and not (manager and mailbox.wake_from(manager)):
            mailbox.notify()


def _manager_of_this_thread() -> UringIOManager | None:
    try:
        manager = current_io_manager()
    except RuntimeError:  # there is no run in this thread
        return None
    return manager if isinstance(manager, UringIOManager) else None
