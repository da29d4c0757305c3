"""The hot path: how an `Operation` is submitted, waited for and completed.

`InFlightTable.perform` submits the operation as an `InFlight` entry and suspends the task. The loop
iteration submits the SQEs and fetches the CQEs (`_ring.py`, `_io_manager.py`).
`InFlightTable.dispatch` reschedules the task, and `perform` returns the result. The code is in this
order. Cancellation, closing an fd, and draining the ring follow.
"""

from __future__ import annotations

import errno
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

import attrs
import trio
from trio.lowlevel import Abort, current_task

from trio_uring._errors import (
    CANCELLED_RESULTS,
    forbidden_opcode,
    no_worker_error,
    operation_error,
    unsupported_opcode,
)
from trio_uring._kernel.uapi import CqeFlag
from trio_uring._operations import async_cancel, nop
from trio_uring._trio_private import (
    WaitTaskRescheduled,
    current_reschedule,
    is_cancelled,
    wait_rescheduled,
)

from ._completion_batches import CompletionBatches
from ._fd_waiters import FdWaiter, FdWaiters
from ._limiter import Limiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._kernel._native import Loop, Op
    from trio_uring._operations import Operation, OperationArray

    from ._completion_batches import CompletionBatch
    from ._readiness import Readiness
    from ._ring import Completion, Ring

T = TypeVar("T")

# Plain ints: an IntFlag in an expression costs a microsecond.
_F_MORE: Final = int(CqeFlag.MORE)
_F_NOTIF: Final = int(CqeFlag.NOTIF)

# user_data counts up and never repeats within a ring, so a late completion cannot be mistaken for
# that of another operation. The values below `_FIRST` are reserved and belong to no entry.
IGNORED: Final = 0  # also the user_data of an entry that is not in flight
CANCEL: Final = 1
BATCH_DONE: Final = 2  # a completion batch is done; made by the C core (batch.c)
WAKE: Final = 3  # a wake message from another ring
NATIVE_DONE: Final = 4  # the native engine has fetched completions of its own (engine/loop.c)
_FIRST: Final = 5

# How long drain() waits for operations that do not end when cancelled, such as an fsync.
_DRAIN_SECONDS: Final = 2.0

# The operation of the entries in the free list, so that they keep no buffers alive.
_NOTHING: Final = nop()


@attrs.define(eq=False, repr=False)
class InFlight(FdWaiter):
    """An in-flight entry: an operation from its push to its last CQE, and the waiting task."""

    table: InFlightTable
    operation: Operation[object]
    user_data: int = IGNORED
    task: Task | None = None  # None if no task waits, and after the completion
    res: int = 0
    flags: int = 0
    cancel_asked: bool = False
    since: int = 0  # when it was pushed, in ns; 0 if operations are not timed
    # If the kernel cancels the operation, the task gets `Cancelled` if `raise_cancel` was set
    # first, and `ClosedResourceError` if `closing` was.
    raise_cancel: RaiseCancelT | None = None
    closing: bool = False
    # What the task yields to be suspended. Creating one takes longer than everything else that
    # an operation costs in Python, so entries are reused (benchmarks/bench_sockets.py).
    trap: WaitTaskRescheduled | None = None
    # Called on the last completion if no task waits.
    on_done: Callable[[InFlight], None] | None = None

    @property
    def in_flight(self) -> bool:
        """Whether it was pushed and its last CQE has not been dispatched."""
        return self.user_data != IGNORED

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Ask the kernel to cancel the operation. Trio calls this to cancel the task.

        Until the CQE arrives the kernel may still write to the buffer, so the task stays suspended
        and the buffer stays pinned. If the operation completes before the kernel cancels it, the
        task gets its result, and no data is lost.
        """
        if not self.closing:
            self.raise_cancel = raise_cancel
        if self.operation.cancellable:
            self.table.request_cancel(self)
        return Abort.FAILED

    def fd_closing(self) -> None:
        """Ask the kernel to cancel the operation, because its fd is about to be closed."""
        self.closing = self.raise_cancel is None
        self.table.request_cancel(self)

    def finish_cancelled(self) -> None:
        """Wait for the end of the operation if it was cancelled.

        If cancellation was requested, submit it and fetch completions until the operation ends,
        unless an io-wq worker has it.
        """
        if self.cancel_asked and self.table.finish_cancelled(self.user_data):
            self.table.fd_waiters.unregister(self)

    def discard(self) -> None:
        """Discard a result that no task will get: close the fd, if it is one."""
        if self.res >= 0 and self.operation.discard is not None:
            self.operation.discard(self.res)

    def abandon(self) -> None:
        """Discard the result, now or when the operation ends. The task no longer waits for it."""
        if self.in_flight:
            self.task, self.on_done = None, InFlight.abandon
        elif self.task is None:  # otherwise it was discarded when the run ended
            self.discard()
            self.operation.release()

    def done(self) -> None:
        """Call `on_done`. Called on the last completion if no task waits."""
        on_done, self.on_done = self.on_done, None  # breaks a reference cycle
        if on_done is not None:
            on_done(self)

    def unwrap(self) -> None:
        """Return None: `reschedule` gets this entry instead of `outcome.Value(None)`.

        Creating and unwrapping a `Value` would take a tenth of the time of an operation
        (benchmarks/bench_sockets.py).
        """


def _abort_shielded(_raise_cancel: RaiseCancelT) -> Abort:
    return Abort.FAILED


# The trap of a wait that ignores cancellation.
SHIELDED: Final = WaitTaskRescheduled(_abort_shielded)


class InFlightTable:
    """The operations in flight on *ring*, of which at most *file_operations_max* are on files."""

    def __init__(self, ring: Ring, readiness: Readiness, file_operations_max: int) -> None:
        self.ring = ring
        self.fd_waiters: FdWaiters = FdWaiters(readiness)
        self.file_limiter: Limiter = Limiter(file_operations_max)
        # Called when a cancellation finds no operation. An operation of a linked chain that has
        # not started cannot be cancelled yet: see `trio_uring._batch`.
        self.on_cancel_missed: set[Callable[[], object]] = set()
        self._entries: dict[int, InFlight] = {}
        self._free_entries: list[InFlight] = []
        self._batches = CompletionBatches(ring)
        self._next_user_data = _FIRST
        # The user_data of operations whose cancellation found no room in the SQ yet.
        self._cancels: deque[int] = deque()
        self._submit_cancels_at_once = False
        # Completions that were fetched to make room; the next loop iteration dispatches them.
        self._backlog: list[Completion] = []
        self._undispatched: Iterable[Completion] = ()  # fetched, and not dispatched yet
        # The handlers of completions with a reserved user_data, which is the index.
        self._reserved: list[Callable[[int], object]] = [_ignore] * _FIRST
        self._reserved[CANCEL] = self._cancel_done
        self._reserved[BATCH_DONE] = self._batch_done
        self._cancel_opcode: int = async_cancel(IGNORED).opcode
        self._completed: list[int] = [0] * 256  # counts by opcode, which is one byte
        self.native: Loop | None = None  # None if the native engine is not in use
        self._cancelled = 0
        self._is_plain = False  # whether a loop iteration only submits and waits
        self._refusal: OSError | None = None  # why the kernel refused to take a batch
        self.fallback_reason: str = ""  # why the run has lost its ring, if it has

    # ---- Performing ------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def perform(self, operation: Operation[T]) -> T:
        """Submit *operation*, wait for its completion and return its result.

        Raises:
          OSError: the kernel's answer, as the standard library would raise it.
          UnsupportedOpcodeError: the running kernel does not know the operation.
          trio.BusyResourceError: another task has an exclusive operation on the same fd.
          trio.ClosedResourceError: the fd was closed while the operation was in flight.
          trio.Cancelled: the kernel confirmed the cancellation.
          RuntimeError: the operation has buffers, and was performed already.
        """
        if operation.spent or operation.pins:
            operation.use()
        entry: InFlight | None = None
        task = current_task()
        try:
            if is_cancelled(task):
                await trio.lowlevel.checkpoint_if_cancelled()
            if operation.limited:
                await self.file_limiter.acquire()
            entry = self.start(operation, task)
            if entry.trap is None:
                entry.trap = WaitTaskRescheduled(entry.abort)
            task.custom_sleep_data = entry  # for debuggers; Trio removes it
            await wait_rescheduled(entry.trap)
            return self._result(operation, entry)
        except BaseException:  # perhaps thrown: a crashed run is collected
            if entry is not None:
                entry.abandon()
            raise
        finally:  # the buffers stay pinned while the kernel may access them
            if operation.pins and (entry is None or not entry.user_data):
                operation.release()

    @trio.lowlevel.enable_ki_protection
    async def perform_shielded(self, operation: Operation[T]) -> T:
        """Perform *operation* in the middle of a call that must not end there.

        Like `perform`, but cancellation is ignored, and an operation that a signal interrupted is
        repeated, as in the standard library (:pep:`475`).
        """
        if operation.spent or operation.pins:
            operation.use()
        return await self.perform_again(operation)

    @trio.lowlevel.enable_ki_protection
    async def perform_again(self, operation: Operation[T]) -> T:
        """Perform *operation* as `perform_shielded` does, and even if it was performed before."""
        entry: InFlight | None = None
        task = current_task()
        try:
            while entry is None or (entry.res == -errno.EINTR and not entry.closing):
                if operation.limited:
                    await self.file_limiter.acquire_shielded()
                entry = self.start(operation, task)
                task.custom_sleep_data = entry
                await wait_rescheduled(SHIELDED)
            return self._result(operation, entry)
        except BaseException:
            if entry is not None:
                entry.abandon()
            raise
        finally:
            if operation.pins and (entry is None or not entry.user_data):
                operation.release()

    def start(self, operation: Operation[object], task: Task | None) -> InFlight:
        """Push *operation* and return its entry. Its completion reschedules *task*, if any."""
        if self._free_entries:
            entry = self._free_entries.pop()
            entry.operation = operation
        else:
            entry = InFlight(self, operation)
        try:
            if operation.cancellable:
                self.fd_waiters.register(entry)
            user_data = self._next_user_data
            self._next_user_data = user_data + 1  # a finalizer may start another one now
            while not self.ring.push(operation, user_data):
                # Submitting made no room: the kernel takes no SQEs until CQEs are reaped.
                self._backlog += self.ring.submit_and_wait(0) or ()
        except BaseException:
            self.fd_waiters.unregister(entry)
            if operation.limited:
                self.file_limiter.release()
            raise
        entry.user_data = user_data
        entry.task = task
        self._entries[user_data] = entry
        return entry

    def start_if_room(self, entry: InFlight) -> bool:
        """Push *entry*, for which no task waits. Return False if there is no room."""
        user_data = self._next_user_data
        self._next_user_data = user_data + 1
        if not self.ring.push(entry.operation, user_data):
            return False
        entry.user_data = user_data
        self._entries[user_data] = entry
        return True

    def start_many(self, entries: Sequence[InFlight], array: OperationArray[object]) -> None:
        """Push *entries*, for which no task waits. *array* has their operations.

        The caller has added those that can be cancelled to `fd_waiters`.
        """
        first = self._next_user_data
        self._next_user_data = first + len(entries)
        for user_data, entry in enumerate(entries, first):
            entry.user_data = user_data
            self._entries[user_data] = entry
        self._push_many(array, 0, array.count, first)

    def start_batch(self, batch: CompletionBatch) -> None:
        """Push *batch*. Its task is rescheduled when all its operations are done."""
        user_data = self._batches.open(batch)
        self._push_many(batch.array, batch.start, batch.end, user_data - batch.start)

    def _push_many(
        self, array: OperationArray[object], start: int, end: int, user_data: int
    ) -> None:
        try:
            while (start := self.ring.push_many(array.fields, start, end, user_data)) < end:
                self._backlog += self.ring.submit_and_wait(0) or ()
        except OSError as exc:
            if self.ring.closed:
                raise
            # Some may be in flight. The next loop iteration closes the ring, and they all fail.
            self._refusal, self._is_plain = exc, False

    # ---- Completions -----------------------------------------------------------------------

    def dispatch(self, completions: Iterable[Completion]) -> None:
        """Reschedule the tasks whose operations completed."""
        if self.native is not None:
            self.native.dispatch()
        entries = self._entries
        reschedule = current_reschedule()
        self._undispatched = undispatched = iter(completions)
        for user_data, res, flags in undispatched:
            if user_data < _FIRST:
                self._reserved[user_data](res)
                continue
            entry = entries[user_data]
            operation = entry.operation
            if flags & _F_MORE:
                if operation.on_cqe_more is not None:
                    operation.on_cqe_more(res, flags)
                else:  # the result of a zero-copy send; the kernel still uses the buffer
                    entry.res = res
                continue
            if not flags & _F_NOTIF:
                entry.res = res
                entry.flags = flags
            else:
                entry.flags = res  # NOTIF_USAGE_ZC_COPIED, if ZC_REPORT_USAGE asked for it
            del entries[user_data]
            entry.user_data = IGNORED
            self._completed[operation.opcode] += 1
            if operation.limited:
                self.file_limiter.release()
            if operation.cancellable:
                self.fd_waiters.unregister(entry)
            task, entry.task = entry.task, None
            if task is not None:
                reschedule(task, entry)
            else:
                entry.done()

    def _cancel_done(self, res: int) -> None:
        self._completed[self._cancel_opcode] += 1
        if res == -errno.ENOENT:
            for ask_again in self.on_cancel_missed.copy():
                ask_again()

    def _batch_done(self, number: int) -> None:
        self._finish_batch(self._batches.close(number))

    def _finish_batch(self, batch: CompletionBatch) -> None:
        for opcode, count in batch.opcodes.items():
            self._completed[opcode] += count
        self.file_limiter.release_many(batch.tokens)
        current_reschedule()(batch.task, batch)

    # ---- Results ---------------------------------------------------------------------------

    def _result(self, operation: Operation[T], entry: InFlight) -> T:
        """Return or raise the result of *operation*, and return its entry to the free list."""
        res, flags = entry.res, entry.flags
        if res < 0:
            entry.trap = None  # breaks a reference cycle
            return self.failed(operation, entry)
        if entry.raise_cancel is None and not entry.closing:
            entry.operation = _NOTHING
            self._free_entries.append(entry)
        else:
            entry.trap = None
        return operation.decode(res, flags)

    def failed(
        self,
        operation: Operation[T],
        entry: InFlight | Op,
        probe: Callable[[], RuntimeError | None] | None = None,
    ) -> T:
        """Raise the exception for a negative result. *probe* replaces `no_worker_error`."""
        res = entry.res
        if operation.buffers is not None:
            operation.buffers.failed(res, entry.flags)
        if res in CANCELLED_RESULTS:
            if entry.closing:
                raise trio.ClosedResourceError("another task closed this fd")
            if entry.raise_cancel is not None:
                self._cancelled += 1
                entry.raise_cancel()
        if res == -errno.ECANCELED and not entry.cancel_asked:
            no_worker = (probe or no_worker_error)()
            if no_worker is not None:
                raise no_worker
        if res == -errno.ETIME and operation.etime_is_success:
            return operation.decode(0, entry.flags)
        if self.fallback_reason:
            raise OSError(-res, self.fallback_reason)
        if res == -errno.EINVAL and operation.opcode not in self.ring.supported:
            raise unsupported_opcode(operation.opcode)
        if res == -errno.EACCES and not self.ring.allows(operation.opcode):
            raise forbidden_opcode(operation.opcode)
        raise operation_error(res, operation.filename, operation.filename2)

    # ---- Cancelling ------------------------------------------------------------------------

    def request_cancel(self, entry: InFlight | Op) -> None:
        """Ask the kernel to cancel an operation. Never raises, because Trio's abort must not."""
        if entry.cancel_asked or not entry.user_data or self.ring.closed:
            return
        entry.cancel_asked = True
        self._cancels.append(entry.user_data)
        self._push_cancels()
        if self._submit_cancels_at_once:
            with suppress(OSError, RuntimeError):
                self._submit_now()

    def _push_cancels(self) -> None:
        # If there is no room, or in a forked child, the rest stays queued.
        with suppress(OSError, RuntimeError):
            while self._cancels and self.ring.push(async_cancel(self._cancels[0]), CANCEL):
                self._cancels.popleft()

    def finish_cancelled(self, user_data: int) -> bool:
        """Fetch completions until a cancelled operation has ended, so that another may start.

        The next loop iteration reschedules its task.

        Returns:
          Whether it has ended. It has not if an io-wq worker has it.
        """
        pending = {user_data}
        self._submit_now()
        self._fetch_until_done(pending)
        return not pending

    def close_fd(self, fd: int) -> None:
        """Cancel the operations on *fd*, which is about to be closed.

        An operation in flight keeps its file open: until it ends, the peer gets no FIN and the port
        stays in use. So this waits for the operations to end before the caller calls close(2).
        Unsubmitted SQEs for *fd* are submitted first. Otherwise they would act on the next file
        that gets the same number.
        """
        waiters = self.fd_waiters.pop(fd, ())
        for waiter in waiters:
            waiter.fd_closing()
        if waiters or self.ring.unsubmitted_for(fd):
            self._submit_now()
            self._fetch_until_done({waiter.user_data for waiter in waiters} - {IGNORED})

    def _fetch_until_done(self, pending: set[int]) -> None:
        """Fetch completions until the cancelled operations with user_data in *pending* have ended.

        Those that have ended are removed from *pending*. Operations that an io-wq worker has are
        not waited for.
        """
        completions = self._backlog
        while True:
            pending -= {user_data for user_data, _, flags in completions if not flags & _F_MORE}
            if (native := self.native) is not None:
                pending -= {user_data for user_data in pending if native.has_fetched(user_data)}
            if not pending:
                break
            completions = self.ring.submit_and_wait(0) or []
            if not completions and not self.ring.more_to_fetch:
                break
            self._backlog += completions

    def submit_for(self, fd: int) -> None:
        """Submit the unsubmitted SQEs if any acts on *fd*, before a system call on *fd*."""
        if self.ring.usable and self.ring.unsubmitted_for(fd):
            self._submit_now()

    def _submit_now(self) -> None:
        self.ring.flush()
        while self._cancels or self.ring.unsubmitted:  # not enough room or memory for all of them
            self._backlog += self.ring.submit_and_wait(0) or ()
            self._push_cancels()

    # ---- The end ---------------------------------------------------------------------------

    def drain(self) -> bool:
        """Cancel everything and wait until nothing is in flight. Return False on a timeout.

        Closing the ring is not enough: the kernel goes on writing into buffers after close(2) and
        munmap(2) have returned (seen on Linux 6.18 with O_DIRECT reads).
        """
        for entry in self._entries.values():
            self.request_cancel(entry)
        if self.native is not None:
            self.native.discard()
            self.native.cancel_all()
        deadline = time.monotonic() + _DRAIN_SECONDS
        with suppress(OSError, RuntimeError):
            while self._has_in_flight():
                self._push_cancels()
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                completions, self._backlog = self._backlog, []
                for completion in completions or self.ring.submit_and_wait(left) or ():
                    self.discard(*completion)
                if self.native is not None:
                    self.native.discard()
        return not self._has_in_flight()

    def _has_in_flight(self) -> bool:
        native = self.native is not None and self.native.in_flight > 0
        return native or bool(self._entries or self._batches)

    def discard(self, user_data: int, res: int, flags: int) -> None:
        """Process a completion that no task will get; close the fd, if it is one."""
        if user_data == BATCH_DONE:
            self._batches.close(res).discard()
        if user_data < _FIRST:
            return
        entry = self._entries[user_data]
        entry.res = res
        entry.discard()
        if not flags & _F_MORE:
            del self._entries[user_data]
            entry.user_data = IGNORED
            self.fd_waiters.unregister(entry)
            entry.operation.release()


def _ignore(_res: int) -> None:
    """Ignore a completion with a reserved `user_data` that needs no handling."""
