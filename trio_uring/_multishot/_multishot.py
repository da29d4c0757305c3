"""`MultishotOperation`: what `accept_many` and `receive_many` share.

A multishot operation completes many times, also while no task waits. `process_events` puts each
result into a queue at once, and the task that consumes them takes them from there. So this task can
be cancelled at any time: only its wait ends, and no result is lost. The operation ends when its
owner stops it, which takes an iteration of the loop, or when the kernel ends it: after an error, or
because it has no buffer left. Then the owner starts the next one.

The loop refers to the operation while it is in flight, but never to its owner. So an owner that the
program forgets is garbage collected, and its finalizer has the loop stop the operation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import trio
from trio.lowlevel import Abort, current_task, current_trio_token

from trio_uring._errors import CANCELLED_RESULTS
from trio_uring._trio_private import WaitTaskRescheduled, current_reschedule, wait_rescheduled

if TYPE_CHECKING:
    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._engine._in_flight import InFlight
    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._operations import Operation


class MultishotOperation(ABC):
    """A multishot operation, in flight or not, and the task that waits for its results."""

    def __init__(self, manager: UringIOManager) -> None:
        self._manager = manager
        self._entry: InFlight | None = None
        self._task: Task | None = None
        self._token = current_trio_token()
        self._forgotten = False
        # Made once: it costs more than the rest of a wait (benchmarks/bench_receive_many.py).
        self._sleep = WaitTaskRescheduled(partial(_abort, ref(self)))

    @property
    def armed(self) -> bool:
        """Whether the operation is in flight."""
        return self._entry is not None

    def arm(self, operation: Operation[object]) -> None:
        """Start *operation*.

        Raises:
          trio.BusyResourceError: another task waits for the same thing on the same fd.
        """
        entry = self._manager.start(operation, None)
        entry.on_done = self._done
        entry.trap = None  # no task sleeps on it, and it would make a reference cycle
        self._entry = entry

    def stop(self) -> None:
        """Ask the kernel to end the operation. Results that come before its end are kept."""
        if self._entry is not None:
            self._manager.request_cancel(self._entry)

    async def stop_and_wait(self) -> None:
        """Stop the operation and wait for its last completion. Ignores cancellation."""
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
                    self.failed(exc.with_traceback(None))  # its frames refer to this object
        self.wake()
        if self._forgotten:
            self.dispose()

    @abstractmethod
    def last(self, res: int, flags: int) -> None:
        """Take the result of the last completion."""

    @abstractmethod
    def failed(self, exc: OSError | trio.ClosedResourceError) -> None:
        """Take the error that ended the operation."""

    def forget(self) -> None:
        """Have the loop let go of everything. For finalizers, which run at any time in any thread.

        The loop does so in its next iteration, or before that if another task uses the fd.
        """
        waiters = self._manager.fd_waiters
        waiters.forgotten.append(self.let_go)
        try:
            self._token.run_sync_soon(waiters.let_go)
        except trio.RunFinishedError:
            waiters.let_go()

    def let_go(self) -> None:
        """Stop the operation, and call `dispose` when it has ended."""
        self._forgotten = True
        if self._entry is None or self._manager.ring.closed:
            self.dispose()
        else:
            self.stop()
            with suppress(OSError, RuntimeError):  # the ring is lost; its loop ends the operation
                self._entry.finish_cancelled()

    @abstractmethod
    def dispose(self) -> None:
        """Release what the operation used. It has ended, and nobody takes its results."""

    # ---- The task --------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a task waits."""
        return self._task is not None

    async def wait(self) -> None:
        """Wait for a result, or for the end of the operation.

        Raises:
          trio.BusyResourceError: another task waits already.
          RuntimeError: the operation belongs to another run, so nothing would end the wait.
        """
        if not self._manager.ring.usable:
            raise RuntimeError("this belongs to another run, which has ended or has its own thread")
        if self.busy:
            raise trio.BusyResourceError("another task is waiting for this already")
        self._task = current_task()
        self._task.custom_sleep_data = self._entry
        try:
            woken = await wait_rescheduled(self._sleep)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            self._task = None
            raise
        woken.unwrap()

    def leave(self) -> None:
        """End the wait of the task, which was cancelled."""
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
