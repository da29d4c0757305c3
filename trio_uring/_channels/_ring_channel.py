"""`open_ring_channel`: a channel between the loops of several threads.

Objects are handed over in memory, under a lock that is held for a few steps and never while other
code is called (`_channel_state.py`). A ring only tells another one to wake (`_mailbox.py`).
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import trio
from outcome import Error
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
    wait_task_rescheduled,
)

from trio_uring._arguments import check_type

from ._channel_state import ChannelState, End, wake

if TYPE_CHECKING:
    from typing_extensions import Self

    from ._channel_state import Waiter

T = TypeVar("T")


# A class, as in Trio, so that open_ring_channel[int](5) works.
class open_ring_channel(  # noqa: N801
    tuple["RingSendChannel[T]", "RingReceiveChannel[T]"], Generic[T]
):
    """Open a channel for Python objects between tasks of several threads, each in its own run.

    It works like `trio.open_memory_channel`, which is for the tasks of one run. If both runs have a
    ring, they wake each other by messages from ring to ring, which are submitted together with the
    loop's other operations. Otherwise they wake each other with `trio.lowlevel.TrioToken`.

    The synchronous methods may be called from any thread, also outside Trio. They take a lock, so
    do not call them in signal handlers or finalizers.

    Args:
      max_buffer_size: How many objects are buffered before ``send`` waits: 0 or more, or
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
        if max_buffer_size != inf:
            check_type("max_buffer_size", max_buffer_size, int, "an int or math.inf")
        if max_buffer_size < 0:
            raise ValueError(f"max_buffer_size must be 0 or more, not {max_buffer_size}")
        state = ChannelState[T](max_buffer_size)
        ends = RingSendChannel(state), RingReceiveChannel(state)
        return super().__new__(cls, ends)


class RingSendChannel(End[T], trio.abc.SendChannel[T], Generic[T]):
    """The sending end of a channel between loops; see `open_ring_channel`.

    Any number of tasks may send on it. It belongs to the run in which a task last waited for it,
    and is closed when that run ends. Give each other run a clone.
    """

    receives = False

    def __init__(self, state: ChannelState[T]) -> None:
        super().__init__(state)
        with state.lock:
            state.send_channels += 1

    @enable_ki_protection
    def send_nowait(self, value: T) -> None:
        """Send *value* without waiting. May be called from any thread.

        Raises:
          trio.WouldBlock: no task waits to receive, and the buffer is full.
          trio.ClosedResourceError: this end is closed.
          trio.BrokenResourceError: all receiving ends are closed.
        """
        with self.state.lock:
            self._check()
            woken = self.state.put(value)
        wake(woken)

    @enable_ki_protection
    async def send(self, value: T) -> None:
        """Send *value*. Wait while no task receives and the buffer is full.

        Raises:
          trio.ClosedResourceError: this end is closed, or is closed while the task waits.
          trio.BrokenResourceError: all receiving ends are closed.
          RuntimeError: outside a run.

        Always a checkpoint. If cancelled, *value* was not sent.
        """
        await checkpoint_if_cancelled()
        waiter = self._waiter()
        woken: list[Waiter[T]] | None = None
        with self.state.lock:
            self._check()
            try:
                woken = self.state.put(value)
            except trio.WouldBlock:
                self.state.senders[waiter] = value
        if woken is None:
            await wait_task_rescheduled(waiter.abort)
        else:
            wake(woken)
            await cancel_shielded_checkpoint()

    @enable_ki_protection
    def clone(self) -> RingSendChannel[T]:
        """Return another sending end of the same channel, for another task or another run.

        Receivers get `trio.EndOfChannel` when all sending ends are closed. May be called from any
        thread.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        self._check()
        return RingSendChannel(self.state)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end. Tasks that wait at it get `trio.ClosedResourceError`.

        May be called from any thread.
        """
        state = self.state
        with state.lock:
            if self.closed:
                return
            woken = self._close_out(state.senders)
            state.send_channels -= 1
            if not state.send_channels:
                for receiver in state.receivers:
                    woken.append(state.assign(receiver, Error(trio.EndOfChannel())))
                state.receivers.clear()
        wake(woken)


class RingReceiveChannel(End[T], trio.abc.ReceiveChannel[T], Generic[T]):
    """The receiving end of a channel between loops; see `open_ring_channel`.

    Any number of tasks may receive from it; each object goes to one of them. It belongs to the run
    in which a task last waited for it, and is closed when that run ends. Give each other run a
    clone.
    """

    receives = True

    def __init__(self, state: ChannelState[T]) -> None:
        super().__init__(state)
        with state.lock:
            state.receive_channels += 1

    @enable_ki_protection
    def receive_nowait(self) -> T:
        """Receive the next object without waiting. May be called from any thread.

        Raises:
          trio.WouldBlock: there is no object.
          trio.ClosedResourceError: this end is closed.
          trio.EndOfChannel: all sending ends are closed, and every object was received.
        """
        with self.state.lock:
            self._check()
            value, woken = self.state.get()
        wake(woken)
        return value

    @enable_ki_protection
    async def receive(self) -> T:
        """Receive the next object. Wait while there is none.

        Raises:
          trio.ClosedResourceError: this end is closed, or is closed while the task waits.
          trio.EndOfChannel: all sending ends are closed, and every object was received.
          RuntimeError: outside a run.

        Always a checkpoint. If cancelled, no object was taken.
        """
        await checkpoint_if_cancelled()
        waiter = self._waiter()
        received: tuple[T, list[Waiter[T]]] | None = None
        with self.state.lock:
            self._check()
            try:
                received = self.state.get(waiter.mailbox.last_iteration)
            except trio.WouldBlock:
                self.state.receivers[waiter] = None
        if received is None:
            return cast("T", await wait_task_rescheduled(waiter.abort))
        value, woken = received
        wake(woken)
        await cancel_shielded_checkpoint()
        return value

    @enable_ki_protection
    def clone(self) -> RingReceiveChannel[T]:
        """Return another receiving end of the same channel, for another task or another run.

        May be called from any thread.

        Raises:
          trio.ClosedResourceError: this end is closed.
        """
        self._check()
        return RingReceiveChannel(self.state)

    @enable_ki_protection
    def close(self) -> None:
        """Close this end. Tasks that wait at it get `trio.ClosedResourceError`.

        Closing the last receiving end drops the objects in the buffer. May be called from any
        thread.
        """
        state = self.state
        dropped: list[T] = []  # freed after the lock is released, as finalizers may do anything
        with state.lock:
            if self.closed:
                return
            woken = self._close_out(state.receivers)
            state.receive_channels -= 1
            if not state.receive_channels:
                for sender in state.senders:
                    woken.append(state.assign(sender, Error(trio.BrokenResourceError())))
                dropped += (*state.senders.values(), *state.buffer)
                state.senders.clear()
                state.buffer.clear()
        wake(woken)

    def take_back(self, value: T | None) -> None:
        """Put *value* back: the run of its receiver has ended. Not for users."""
        state = self.state
        woken: list[Waiter[T]] = []
        with state.lock:
            if state.receivers:
                woken = state.put(cast("T", value))
            elif state.receive_channels:
                state.buffer.appendleft(cast("T", value))
        wake(woken)
