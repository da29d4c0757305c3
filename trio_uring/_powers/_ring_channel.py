"""`open_ring_channel`: a channel between the loops of several threads.

Objects go from hand to hand in memory, under a lock that is held for a few steps and never while
anything else is called. What the rings tell each other is only that somebody has to be woken;
see `_inbox.py`.

A task that waits stands in line with its loop's inbox. Whoever has something for it, in whatever
thread, takes it out of the line, under the lock, and from then on it cannot be cancelled: it gets
what was meant for it when its loop looks into the inbox. So an object is in the channel or has
been received, at any time. If the loop ends before it looks, the object goes back.
"""

from __future__ import annotations

import threading
from collections import deque
from math import inf
from typing import TYPE_CHECKING, Final, Generic, TypeVar, cast

import attrs
import trio
from outcome import Error, Outcome, Value
from trio.lowlevel import (
    Abort,
    RunVar,
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    reschedule,
    spawn_system_task,
    wait_task_rescheduled,
)

from trio_uring._inbox import Inbox
from trio_uring._io_manager import UringIOManager
from trio_uring._trio_private import current_io_manager

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from trio.lowlevel import RaiseCancelT, Task
    from typing_extensions import Self

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


# Written as a class, as Trio's is, so that one can say open_ring_channel[int](5).
class open_ring_channel(  # noqa: N801
    tuple["RingSendChannel[T]", "RingReceiveChannel[T]"], Generic[T]
):
    """Open a channel for Python objects between tasks of several threads, each in its own run.

    It works as one of `trio.open_memory_channel`, which is for the tasks of one run. Where both
    runs are on a ring, they wake each other by messages from ring to ring, which go along with
    what else their loops submit; otherwise as `trio.lowlevel.TrioToken` does.

    The methods that are not async may be called from any thread, outside Trio too; but, as
    they take a lock, not from signal handlers and finalizers.

    Args:
      max_buffer_size: How many objects may be on their way before ``send`` waits: 0 or more, or
        `math.inf`.

    Returns:
      ``(send_channel, receive_channel)``, a `RingSendChannel` and a `RingReceiveChannel`.

    Raises:
      TypeError: *max_buffer_size* is neither an int nor `math.inf`.
      ValueError: *max_buffer_size* is negative.

    Source: io_uring_prep_msg_ring(3).
    """

    __slots__ = ()

    def __new__(cls, max_buffer_size: float) -> Self:
        """Make both ends."""
        if max_buffer_size != inf and not isinstance(max_buffer_size, int):
            raise TypeError("max_buffer_size must be an int or math.inf")
        if max_buffer_size < 0:
            raise ValueError("max_buffer_size must be 0 or more")
        line = _Line[T](max_buffer_size)
        ends = RingSendChannel(line), RingReceiveChannel(line)
        return super().__new__(cls, ends)


@attrs.define(eq=False)
class _Waiter(Generic[T]):
    """A task that waits at *end*, and what it is to get."""

    end: _End[T]
    task: Task
    inbox: Inbox
    outcome: Outcome[T | None] = attrs.field(factory=lambda: Value(None))

    def deliver(self) -> None:
        reschedule(self.task, self.outcome)

    def undelivered(self) -> None:
        self.end.take_back(self.outcome)

    def abort(self, _raise_cancel: RaiseCancelT) -> Abort:
        """Leave the line, for Trio; who is in it no longer has been served."""
        line = self.end.line
        with line.lock:
            for waiters in (line.senders, line.receivers):
                if self in waiters:
                    del waiters[self]
                    return Abort.SUCCEEDED
        return Abort.FAILED


class _Line(Generic[T]):
    """What the ends of a channel share. All of it is for who holds the lock."""

    def __init__(self, max_buffer_size: float) -> None:
        self.max_buffer_size = max_buffer_size
        self.lock = threading.Lock()
        self.buffer: deque[T] = deque()
        self.peak = 0
        self.senders: dict[_Waiter[T], T] = {}
        self.receivers: dict[_Waiter[T], None] = {}
        self.send_channels = 0
        self.receive_channels = 0

    def put(self, value: T) -> list[_Waiter[T]]:
        """Take *value*; returns whom to wake."""
        if not self.receive_channels:
            raise trio.BrokenResourceError("all receive channels are closed")
        if self.receivers:
            receiver = next(iter(self.receivers))
            del self.receivers[receiver]
            receiver.outcome = Value(value)
            return [receiver]
        if len(self.buffer) >= self.max_buffer_size:
            raise trio.WouldBlock
        self.buffer.append(value)
        self.peak = max(self.peak, len(self.buffer))
        return []

    def get(self) -> tuple[T, list[_Waiter[T]]]:
        """Return the next object, and whom to wake."""
        woken: list[_Waiter[T]] = []
        if self.senders:
            sender = next(iter(self.senders))
            self.buffer.append(self.senders.pop(sender))
            woken.append(sender)
        if self.buffer:
            return self.buffer.popleft(), woken
        if not self.send_channels:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    def statistics(self) -> trio.MemoryChannelStatistics:
        return trio.MemoryChannelStatistics(
            current_buffer_used=len(self.buffer),
            max_buffer_size=self.max_buffer_size,
            open_send_channels=self.send_channels,
            open_receive_channels=self.receive_channels,
            tasks_waiting_send=len(self.senders),
            tasks_waiting_receive=len(self.receivers),
            peak_buffer_used=self.peak,
        )


class _End(Generic[T]):
    """What both ends have in common."""

    def __init__(self, line: _Line[T]) -> None:
        self.line: _Line[T] = line
        self._closed = False
        self._used_in: Inbox | None = None

    def statistics(self) -> trio.MemoryChannelStatistics:
        """Return what Trio's memory channels tell, for all ends of the channel together."""
        with self.line.lock:
            return self.line.statistics()

    def close(self) -> None:
        raise NotImplementedError

    def run_ended(self, inbox: Inbox) -> None:
        """Close this end with the run that used it last. Not for users."""
        if self._used_in is inbox:
            self.close()

    def take_back(self, outcome: Outcome[T | None]) -> None:
        """Put back what a task did not live to receive. Not for users."""

    @enable_ki_protection
    async def aclose(self) -> None:
        """Close this end; see ``close``. A checkpoint."""
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

    def _waiter(self) -> _Waiter[T]:
        inbox = _inbox_of_run()
        if self._used_in is not inbox:
            self._used_in = inbox
            inbox.dependents.add(self)
        return _Waiter(self, current_task(), inbox)

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError

    def _close_out(self, line: dict[_Waiter[T], None] | dict[_Waiter[T], T]) -> list[_Waiter[T]]:
        """Take those who wait at this end out of their *line*."""
        self._closed = True
        waiters = [waiter for waiter in line if waiter.end is self]
        for waiter in waiters:
            del line[waiter]
            waiter.outcome = Error(trio.ClosedResourceError())
        return waiters


class RingSendChannel(_End[T], trio.abc.SendChannel[T], Generic[T]):
    """The end of a channel between loops into which objects go; see `open_ring_channel`.

    Any number of tasks may send on it. But it belongs to one run: that in which a task last
    waited for it. When that run ends, in whatever way, it is closed. For other runs, make clones.
    """

    def __init__(self, line: _Line[T]) -> None:
        super().__init__(line)
        with line.lock:
            line.send_channels += 1

    @enable_ki_protection
    def send_nowait(self, value: T) -> None:
        """Send *value* at once. From any thread.

        Raises:
          trio.WouldBlock: nobody waits to receive, and the buffer is full.
          trio.ClosedResourceError: this end is closed.
          trio.BrokenResourceError: the receiving ends are closed, all of them.
        """
        with self.line.lock:
            self._check()
            woken = self.line.put(value)
        _wake(woken)

    @enable_ki_protection
    async def send(self, value: T) -> None:
        """Send *value*; wait while nobody takes it and the buffer is full.

        Raises:
          trio.ClosedResourceError: this end is closed, or closes while we wait.
          trio.BrokenResourceError: the receiving ends are closed, all of them.
          RuntimeError: outside a run.

        A checkpoint, always. If cancelled, *value* was not sent.
        """
        await checkpoint_if_cancelled()
        waiter = self._waiter()
        woken: list[_Waiter[T]] | None = None
        with self.line.lock:
            self._check()
            try:
                woken = self.line.put(value)
            except trio.WouldBlock:
                self.line.senders[waiter] = value
        if woken is None:
            await wait_task_rescheduled(waiter.abort)
        else:
            _wake(woken)
            await cancel_shielded_checkpoint()

    @enable_ki_protection
    def clone(self) -> RingSendChannel[T]:
        """Return another sending end of the same channel, for another task, or another run.

        Receivers get `trio.EndOfChannel` only when all are closed. From any thread.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        self._check()
        return RingSendChannel(self.line)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end; tasks that wait at it get `trio.ClosedResourceError`. From any thread."""
        line = self.line
        with line.lock:
            if self._closed:
                return
            woken = self._close_out(line.senders)
            line.send_channels -= 1
            if not line.send_channels:
                for receiver in line.receivers:
                    receiver.outcome = Error(trio.EndOfChannel())
                woken += line.receivers
                line.receivers.clear()
        _wake(woken)


class RingReceiveChannel(_End[T], trio.abc.ReceiveChannel[T], Generic[T]):
    """The end of a channel between loops from which objects come; see `open_ring_channel`.

    Any number of tasks may receive from it, each object goes to one. But it belongs to one run:
    that in which a task last waited for it. When that run ends, in whatever way, it is closed.
    For other runs, make clones.
    """

    def __init__(self, line: _Line[T]) -> None:
        super().__init__(line)
        with line.lock:
            line.receive_channels += 1

    @enable_ki_protection
    def receive_nowait(self) -> T:
        """Receive what is there already. From any thread.

        Raises:
          trio.WouldBlock: there is nothing.
          trio.ClosedResourceError: this end is closed.
          trio.EndOfChannel: the sending ends are closed, all of them, and all was received.
        """
        with self.line.lock:
            self._check()
            value, woken = self.line.get()
        _wake(woken)
        return value

    @enable_ki_protection
    async def receive(self) -> T:
        """Receive the next object; wait for one if there is none.

        Raises:
          trio.ClosedResourceError: this end is closed, or closes while we wait.
          trio.EndOfChannel: the sending ends are closed, all of them, and all was received.
          RuntimeError: outside a run.

        A checkpoint, always. If cancelled, no object was taken.
        """
        await checkpoint_if_cancelled()
        waiter = self._waiter()
        received: tuple[T, list[_Waiter[T]]] | None = None
        with self.line.lock:
            self._check()
            try:
                received = self.line.get()
            except trio.WouldBlock:
                self.line.receivers[waiter] = None
        if received is None:
            return cast("T", await wait_task_rescheduled(waiter.abort))
        value, woken = received
        _wake(woken)
        await cancel_shielded_checkpoint()
        return value

    @enable_ki_protection
    def clone(self) -> RingReceiveChannel[T]:
        """Return another receiving end of the same channel, for another task, or another run.

        From any thread.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        self._check()
        return RingReceiveChannel(self.line)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end; tasks that wait at it get `trio.ClosedResourceError`. From any thread.

        With the last receiving end, what is in the buffer is gone.
        """
        line = self.line
        dropped: list[T] = []  # what these objects do when they go, they do without the lock
        with line.lock:
            if self._closed:
                return
            woken = self._close_out(line.receivers)
            line.receive_channels -= 1
            if not line.receive_channels:
                for sender in line.senders:
                    sender.outcome = Error(trio.BrokenResourceError())
                woken += line.senders
                dropped += (*line.senders.values(), *line.buffer)
                line.senders.clear()
                line.buffer.clear()
        _wake(woken)

    def take_back(self, outcome: Outcome[T | None]) -> None:
        """Put back what a task did not live to receive. Not for users."""
        if not isinstance(outcome, Value):
            return
        value = cast("T", outcome.value)
        line = self.line
        woken: list[_Waiter[T]] = []
        with line.lock:
            if line.receivers:
                woken = line.put(value)
            elif line.receive_channels:
                line.buffer.appendleft(value)
        _wake(woken)


# ---- Waking --------------------------------------------------------------------------------

_of_run: Final[RunVar[Inbox]] = RunVar("trio_uring inbox")


def _inbox_of_run() -> Inbox:
    """Return the inbox of the current run."""
    manager = current_io_manager()
    if isinstance(manager, UringIOManager):
        return manager.inbox.opened()
    try:
        return _of_run.get()
    except LookupError:
        inbox = Inbox(None).opened()
        _of_run.set(inbox)
        spawn_system_task(_close_at_the_end, inbox)
        return inbox


async def _close_at_the_end(inbox: Inbox) -> None:
    try:
        await trio.sleep_forever()
    finally:
        inbox.close()


def _wake(waiters: Sequence[_Waiter[T]]) -> None:
    """Wake tasks, of any run."""
    if not waiters:
        return
    manager = _manager_of_this_thread()
    for waiter in waiters:
        inbox = waiter.inbox
        if manager is not None and inbox is manager.inbox and not inbox.closed:
            waiter.deliver()
        elif inbox.put(waiter) and not (manager and manager.send_word(inbox)):
            inbox.tell()


def _manager_of_this_thread() -> UringIOManager | None:
    try:
        manager = current_io_manager()
    except RuntimeError:  # there is no run in this thread
        return None
    return manager if isinstance(manager, UringIOManager) else None
