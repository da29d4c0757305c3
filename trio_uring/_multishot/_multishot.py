"""What `accept_many` and `receive_many` share: an operation that goes on while nobody waits.

A multishot operation completes again and again. Each result goes into a queue, at once, in
`UringIOManager.process_events`; the one task that wants the next takes it from there. So that
task may be cancelled at any moment and nothing is lost: only its wait ends. The operation goes on
until its owner stops it, which takes a turn of the loop, or until the kernel ends it: because of an
error, or because it has no place for more. Then the owner begins the next.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import trio
from trio.lowlevel import Abort, current_task

from trio_uring._errors import CANCELLED_RESULTS
from trio_uring._trio_private import WaitTaskRescheduled, current_reschedule, wait_rescheduled

if TYPE_CHECKING:
    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._engine._in_flight import InFlight
    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._operations import Operation


class MultishotOperation(ABC):
    """A multishot operation, if one is in flight, and the task that waits for what it brings."""

    def __init__(self, manager: UringIOManager) -> None:
        self._manager = manager
        self._entry: InFlight | None = None
        self._task: Task | None = None
        # To make one takes longer than all else (benchmarks/bench_receive_many.py).
        self._sleep = WaitTaskRescheduled(partial(_abort, ref(self)))

    @property
    def armed(self) -> bool:
        """Whether the operation is in flight."""
        return self._entry is not None

    def arm(self, operation: Operation[object]) -> None:
        """Begin.

        Raises:
          trio.BusyResourceError: another task waits for the same thing on the same fd.
        """
        entry = self._manager.start(operation, None)
        entry.on_done = self._done
        entry.trap = None  # no task sleeps on it; and it would be cyclic garbage
        self._entry = entry

    def stop(self) -> None:
        """Ask the kernel to end it. What comes before that is not lost."""
        if self._entry is not None:
            self._manager.request_cancel(self._entry)

    async def stop_and_wait(self) -> None:
        """Stop, and wait until the kernel has ended it; does not let itself be cancelled."""
        self.stop()
        while self.armed and self._manager.ring.usable:
            with trio.CancelScope(shield=True):
                await self.wait()

    def _done(self, entry: InFlight) -> None:
        self._entry = None
        if entry.res >= 0:
            self.last(entry.res, entry.flags)
        else:
            try:
                self._manager.failed(entry.operation, entry)
            except (OSError, trio.ClosedResourceError) as exc:
                asked = entry.cancel_asked and not entry.closing
                if not asked or entry.res not in CANCELLED_RESULTS:
                    self.failed(exc.with_traceback(None))  # which refers to us
        self.wake()

    @abstractmethod
    def last(self, res: int, flags: int) -> None:
        """Take the result of a completion after which there are no more."""

    @abstractmethod
    def failed(self, exc: OSError | trio.ClosedResourceError) -> None:
        """Take note of why it ended."""

    # ---- The task --------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a task waits."""
        return self._task is not None

    async def wait(self) -> None:
        """Wait until something has come, or has ended.

        Raises:
          trio.BusyResourceError: another task waits already.
        """
        if self.busy:
            raise trio.BusyResourceError("another task is waiting for this already")
        self._task = current_task()
        try:
            woken = await wait_rescheduled(self._sleep)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            self._task = None
            raise
        woken.unwrap()

    def leave(self) -> None:
        """End the wait of a task that was cancelled."""
        self._task = None

    def wake(self) -> None:
        """End the wait, if a task waits."""
        task, self._task = self._task, None
        if task is not None:
            current_reschedule()(task, self)

    def unwrap(self) -> None:  # noqa: B027 (it has nothing to do)
        """As in `InFlight`."""


# It refers to the operation weakly, so that a forgotten listener is closed when its last
# reference goes, without the garbage collector.
def _abort(operation: ref[MultishotOperation], _raise_cancel: RaiseCancelT) -> Abort:
    waited_for = operation()
    if waited_for is not None:
        waited_for.leave()
    return Abort.SUCCEEDED
