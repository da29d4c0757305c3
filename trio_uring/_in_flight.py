"""What waits in a run: `InFlight` operations, and tasks in line at a `FifoLimit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs
import trio
from trio.lowlevel import Abort, ParkingLot

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio.lowlevel import RaiseCancelT, Task

    from ._operations import Operation


class _CanCancel(Protocol):
    def request_cancel(self, entry: InFlight) -> None:
        """Ask the kernel to stop an operation."""


@attrs.define(eq=False)
class InFlight:
    """An operation between its push and its last CQE, and the task that waits for it."""

    manager: _CanCancel
    operation: Operation[object]
    user_data: int
    task: Task | None  # None once it is done
    res: int = 0
    flags: int = 0
    cancel_asked: bool = False
    # Which of the two came first says what the task gets, should the kernel obey.
    raise_cancel: RaiseCancelT | None = None
    closing: bool = False

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Ask the kernel to stop the operation, for Trio.

        We can only ask. Until the CQE arrives the kernel may still write to the buffer, so the
        task stays parked and the buffer stays pinned. If the operation was faster than our
        request, its result wins: no data is lost.
        """
        if not self.closing:
            self.raise_cancel = raise_cancel
        if self.operation.cancellable:
            self.manager.request_cancel(self)
        return Abort.FAILED

    def unwrap(self) -> None:
        """Stand for ``outcome.Value(None)`` in reschedule.

        A completion wakes its task with this entry itself: making a `Value` and unwrapping it
        would be a tenth of the time that an operation takes (benchmarks/bench_echo.py).
        """


@attrs.define(eq=False)
class FifoLimit:
    """At most so many at once; the others wait in line."""

    free: int
    line: ParkingLot = attrs.Factory(ParkingLot)

    async def acquire(self) -> None:
        """Take a place. If cancelled while in line, none was taken."""
        if self.free:
            self.free -= 1
        else:
            await self.line.park()  # release() hands its place over

    async def acquire_shielded(self) -> None:
        """Take a place, and do not let a cancellation end the wait for it."""
        if self.free:
            self.free -= 1
        else:
            with trio.CancelScope(shield=True):
                await self.line.park()

    def release(self) -> None:
        """Give the place to the first in line, if there is one."""
        if self.line:
            self.line.unpark()
        else:
            self.free += 1


class Companion(Protocol):
    """What a floor above keeps for a run."""

    def routes(self) -> Mapping[str, int]:
        """Return how many calls went which way."""

    def refused(self) -> tuple[str, ...]:
        """Return what is not in use, and why."""

    def close(self, *, drained: bool) -> None:
        """End; if the ring could not be drained, touch nothing that waits for it."""
