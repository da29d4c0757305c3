"""`open_ring_channel`: a channel between the loops of several threads.

Objects are handed over in memory, under a lock that is held for a few steps and never while other
code is called (`_channel_state.py`). A ring only tells another one to wake (`_mailbox.py`).
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar, cast

import trio
from outcome import Error
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
    wait_task_rescheduled,
)

from ._channel_state import Line, Waiter, mailbox_of_run, wake

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from trio_uring._engine._mailbox import Mailbox

T = TypeVar("T")


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
        line = Line[T](max_buffer_size)
        ends = RingSendChannel(line), RingReceiveChannel(line)
        return super().__new__(cls, ends)


class _End(Generic[T]):
    """What both ends have in common."""

    receives: ClassVar[bool]

    def __init__(self, line: Line[T]) -> None:
        self.line: Line[T] = line
        self.closed: bool = False
        self._used_in: Mailbox | None = None

    def statistics(self) -> trio.MemoryChannelStatistics:
        """Return what Trio's memory channels tell, for all ends of the channel together."""
        with self.line.lock:
            return self.line.statistics()

    def close(self) -> None:
        raise NotImplementedError

    def run_ended(self, mailbox: Mailbox) -> None:
        """Close this end with the run that used it last. Not for users."""
        if self._used_in is mailbox:
            self.close()

    def take_back(self, value: T | None) -> None:
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

    def _waiter(self) -> Waiter[T]:
        mailbox = mailbox_of_run()
        if self._used_in is not mailbox:
            self._used_in = mailbox
            mailbox.dependents.add(self)
        return Waiter(self, current_task(), mailbox)

    def _check(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError

    def _close_out(self, line: dict[Waiter[T], None] | dict[Waiter[T], T]) -> list[Waiter[T]]:
        """Take those who wait at this end out of their *line*."""
        self.closed = True
        waiters = [waiter for waiter in line if waiter.end is self]
        for waiter in waiters:
            del line[waiter]
            self.line.serve(waiter, Error(trio.ClosedResourceError()))
        return waiters


class RingSendChannel(_End[T], trio.abc.SendChannel[T], Generic[T]):
    """The end of a channel between loops into which objects go; see `open_ring_channel`.

    Any number of tasks may send on it. But it belongs to one run: that in which a task last
    waited for it. When that run ends, in whatever way, it is closed. For other runs, make clones.
    """

    receives = False

    def __init__(self, line: Line[T]) -> None:
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
        wake(woken)

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
        woken: list[Waiter[T]] | None = None
        with self.line.lock:
            self._check()
            try:
                woken = self.line.put(value)
            except trio.WouldBlock:
                self.line.senders[waiter] = value
        if woken is None:
            await wait_task_rescheduled(waiter.abort)
        else:
            wake(woken)
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
            if self.closed:
                return
            woken = self._close_out(line.senders)
            line.send_channels -= 1
            if not line.send_channels:
                for receiver in line.receivers:
                    woken.append(line.serve(receiver, Error(trio.EndOfChannel())))
                line.receivers.clear()
        wake(woken)


class RingReceiveChannel(_End[T], trio.abc.ReceiveChannel[T], Generic[T]):
    """The end of a channel between loops from which objects come; see `open_ring_channel`.

    Any number of tasks may receive from it, each object goes to one. But it belongs to one run:
    that in which a task last waited for it. When that run ends, in whatever way, it is closed.
    For other runs, make clones.
    """

    receives = True

    def __init__(self, line: Line[T]) -> None:
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
        wake(woken)
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
        received: tuple[T, list[Waiter[T]]] | None = None
        with self.line.lock:
            self._check()
            try:
                received = self.line.get(waiter.mailbox.last_iteration)
            except trio.WouldBlock:
                self.line.receivers[waiter] = None
        if received is None:
            return cast("T", await wait_task_rescheduled(waiter.abort))
        value, woken = received
        wake(woken)
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
            if self.closed:
                return
            woken = self._close_out(line.receivers)
            line.receive_channels -= 1
            if not line.receive_channels:
                for sender in line.senders:
                    woken.append(line.serve(sender, Error(trio.BrokenResourceError())))
                dropped += (*line.senders.values(), *line.buffer)
                line.senders.clear()
                line.buffer.clear()
        wake(woken)

    def take_back(self, value: T | None) -> None:
        """Put back what a task did not live to receive. Not for users."""
        line = self.line
        woken: list[Waiter[T]] = []
        with line.lock:
            if line.receivers:
                woken = line.put(cast("T", value))
            elif line.receive_channels:
                line.buffer.appendleft(cast("T", value))
        wake(woken)
