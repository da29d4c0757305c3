"""The hot path, whole: from an `Operation` to its result.

Read it from top to bottom, as an operation travels. `InFlightTable.perform` submits it as an
`InFlight` entry and puts the task to sleep; a turn of the loop hands the SQEs to the kernel and
fetches the CQEs (`_ring.py`, `_io_manager.py`); `InFlightTable.dispatch` wakes the task; `perform`
returns the result. Behind that: cancellation, closing an fd, and draining the ring at the end.
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

# user_data counts up and never repeats within a ring, so a late completion can never be taken
# for that of another operation: each operation is its own generation. These stand for no entry.
IGNORED: Final = 0  # an entry that is not in flight has it, too
CANCEL: Final = 1
BATCH_DONE: Final = 2  # the C core makes these completions: batch.c
WAKE: Final = 3  # sent by another ring
NATIVE_DONE: Final = 4  # the native engine has completions of its own: engine/loop.c
_FIRST: Final = 5

# How long draining waits for operations that do not end when cancelled, such as an fsync.
_DRAIN_SECONDS: Final = 2.0

# The operation of entries that are not in use, so that they keep no buffers alive.
_NOTHING: Final = nop()


@attrs.define(eq=False)
class InFlight(FdWaiter):
    """An operation between its push and its last CQE, and the task that waits for it."""

    table: InFlightTable
    operation: Operation[object]
    user_data: int = IGNORED
    task: Task | None = None  # None if nobody waits, and once it is done
    res: int = 0
    flags: int = 0
    cancel_asked: bool = False
    # Which of the two came first says what the task gets, should the kernel obey.
    raise_cancel: RaiseCancelT | None = None
    closing: bool = False
    # What the task yields to sleep. Making one takes longer than everything else that an
    # operation costs in Python, so entries are used again (benchmarks/bench_echo.py).
    trap: WaitTaskRescheduled | None = None
    # Called at the end, where no task waits.
    on_done: Callable[[InFlight], None] | None = None

    @property
    def in_flight(self) -> bool:
        """Whether it was submitted and its last CQE has not come."""
        return self.user_data != IGNORED

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Ask the kernel to stop the operation, for Trio.

        We can only ask. Until the CQE arrives the kernel may still write to the buffer, so the
        task stays parked and the buffer stays pinned. If the operation was faster than our
        request, its result wins: no data is lost.
        """
        if not self.closing:
            self.raise_cancel = raise_cancel
        if self.operation.cancellable:
            self.table.request_cancel(self)
        return Abort.FAILED

    def fd_closing(self) -> None:
        """Ask the kernel to stop the operation, because its fd is about to be closed."""
        self.closing = self.raise_cancel is None
        self.table.request_cancel(self)

    def finish_cancelled(self) -> None:
        """If the kernel was asked to stop the operation, see it end."""
        if self.cancel_asked and self.table.finish_cancelled(self.user_data):
            self.table.fd_waiters.unregister(self)

    def discard(self) -> None:
        """Drop a result that no task will see: close an fd that it carries."""
        if self.res >= 0 and self.operation.discard is not None:
            self.operation.discard(self.res)

    def done(self) -> None:
        """Call whoever asked to hear of the end, where no task waits."""
        on_done, self.on_done = self.on_done, None  # or it would be cyclic garbage
        if on_done is not None:
            on_done(self)

    def unwrap(self) -> None:
        """Stand for ``outcome.Value(None)`` in reschedule.

        A completion wakes its task with this entry itself: making a `Value` and unwrapping it
        would be a tenth of the time that an operation takes (benchmarks/bench_echo.py).
        """


def _abort_shielded(_raise_cancel: RaiseCancelT) -> Abort:
    return Abort.FAILED


# What a task yields where the operation is to go on, whatever happens.
SHIELDED: Final = WaitTaskRescheduled(_abort_shielded)


class InFlightTable:
    """The operations in flight on *ring*; *file_operations_max* of those on files at once."""

    def __init__(self, ring: Ring, readiness: Readiness, file_operations_max: int) -> None:
        self.ring = ring
        self.fd_waiters: FdWaiters = FdWaiters(readiness)
        self.file_limiter: Limiter = Limiter(file_operations_max)
        # Called when a cancel finds nothing: an operation of a chain that has not begun cannot be
        # cancelled yet, see `trio_uring._batch`.
        self.on_cancel_missed: set[Callable[[], object]] = set()
        self._entries: dict[int, InFlight] = {}
        self._free_entries: list[InFlight] = []
        self._batches = CompletionBatches(ring)
        self._next_user_data = _FIRST
        self._cancels: deque[int] = deque()  # by user_data, what there was no room to cancel yet
        self._submit_cancels_at_once = False
        # Completions that were fetched to make room, for the next turn of the loop.
        self._backlog: list[Completion] = []
        # What was fetched, and dispatch() has not come to yet.
        self._undispatched: Iterable[Completion] = ()
        # What to do with the completions that belong to no entry, by user_data.
        self._reserved: list[Callable[[int], object]] = [_ignore] * _FIRST
        self._reserved[CANCEL] = self._cancel_done
        self._reserved[BATCH_DONE] = self._batch_done
        self._cancel_opcode: int = async_cancel(IGNORED).opcode
        self._completed: list[int] = [0] * 256  # by opcode, which is one byte
        self.native: Loop | None = None  # the native engine's operations, where it is in use
        self._cancelled = 0

    # ---- Performing ------------------------------------------------------------------------

    @trio.lowlevel.enable_ki_protection
    async def perform(self, operation: Operation[T]) -> T:
        """Submit *operation*, wait for its completion and return its result.

        Raises:
          OSError: the kernel's answer, as the standard library would raise it.
          UnsupportedOpcodeError: the running kernel does not know the operation.
          trio.BusyResourceError: another task waits for the same thing on the same fd.
          trio.ClosedResourceError: the fd was closed while we waited.
          trio.Cancelled: the kernel confirmed the cancellation.
        """
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
            await wait_rescheduled(entry.trap)
            return self._result(operation, entry)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            if entry is not None and entry.task is None:
                entry.discard()
            raise
        finally:
            # Not while the kernel may still touch the buffers: a crashing run ends up here too.
            if operation.pins and (entry is None or not entry.user_data):
                operation.release()

    @trio.lowlevel.enable_ki_protection
    async def perform_shielded(self, operation: Operation[T]) -> T:
        """Perform *operation* in the middle of a call that must not end there.

        Like `perform`, but it ignores cancellation, before and meanwhile, and an operation that a
        signal interrupted is begun again, as the standard library does (:pep:`475`).
        """
        entry: InFlight | None = None
        task = current_task()
        try:
            while entry is None or (entry.res == -errno.EINTR and not entry.closing):
                if operation.limited:
                    await self.file_limiter.acquire_shielded()
                entry = self.start(operation, task)
                await wait_rescheduled(SHIELDED)
            return self._result(operation, entry)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            if entry is not None and entry.task is None:
                entry.discard()
            raise
        finally:
            if operation.pins and (entry is None or not entry.user_data):
                operation.release()

    def start(self, operation: Operation[object], task: Task | None) -> InFlight:
        """Submit *operation* for *task*."""
        if self._free_entries:
            entry = self._free_entries.pop()
            entry.operation = operation
        else:
            entry = InFlight(self, operation)
        try:
            if operation.cancellable:
                self.fd_waiters.register(entry)
            user_data = self._next_user_data
            while not self.ring.push(operation, user_data):
                # Not even submitting made room: completions must be taken out first.
                self._backlog += self.ring.submit_and_wait(0) or ()
        except BaseException:
            self.fd_waiters.unregister(entry)
            if operation.limited:
                self.file_limiter.release()
            raise
        self._next_user_data = user_data + 1
        entry.user_data = user_data
        entry.task = task
        self._entries[user_data] = entry
        return entry

    def start_if_room(self, entry: InFlight) -> bool:
        """Submit *entry*, for whose end no task waits; False if there is no room now."""
        user_data = self._next_user_data
        if not self.ring.push(entry.operation, user_data):
            return False
        self._next_user_data = user_data + 1
        entry.user_data = user_data
        self._entries[user_data] = entry
        return True

    def start_many(self, entries: Sequence[InFlight], array: OperationArray[object]) -> None:
        """Submit *entries*, whose operations *array* describes, and for whose end no task waits.

        The caller has registered those that can be cancelled.
        """
        first = self._next_user_data
        self._next_user_data = first + len(entries)
        for user_data, entry in enumerate(entries, first):
            entry.user_data = user_data
            self._entries[user_data] = entry
        self._push_many(array, 0, array.count, first)

    def start_batch(self, batch: CompletionBatch) -> None:
        """Submit *batch*, whose task is woken when all of it is done."""
        user_data = self._batches.open(batch)
        self._push_many(batch.array, batch.start, batch.end, user_data - batch.start)

    def _push_many(
        self, array: OperationArray[object], start: int, end: int, user_data: int
    ) -> None:
        while (start := self.ring.push_many(array.fields, start, end, user_data)) < end:
            self._backlog += self.ring.submit_and_wait(0) or ()

    @trio.lowlevel.enable_ki_protection
    def perform_now(self, operation: Operation[object]) -> tuple[int, int]:
        """Perform *operation*, which need not wait; returns its ``res`` and ``flags``."""
        ring, found = self.ring, None
        while not ring.push(operation, IGNORED):
            self._backlog += ring.submit_and_wait(0) or ()
        while found is None:
            for completion in ring.submit_and_wait(1.0) or ():
                if completion[0] == IGNORED:
                    found = completion[1:]
                else:
                    self._backlog.append(completion)
        return found

    # ---- Completions -----------------------------------------------------------------------

    def dispatch(self, completions: Iterable[Completion]) -> None:
        """Wake the tasks whose operations completed."""
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
                else:  # a zero-copy send: the kernel still uses the buffer
                    entry.res = res
                continue
            if not flags & _F_NOTIF:
                entry.res = res
                entry.flags = flags
            else:
                entry.flags = res  # what became of the buffer, if the operation asked
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
        batch = self._batches.close(number)
        for opcode, count in batch.opcodes.items():
            self._completed[opcode] += count
        self.file_limiter.release_many(batch.tokens)
        current_reschedule()(batch.task, batch)

    # ---- Results ---------------------------------------------------------------------------

    def _result(self, operation: Operation[T], entry: InFlight) -> T:
        """Return or raise what *operation* completed with; its entry can be used again."""
        res, flags = entry.res, entry.flags
        if res < 0:
            entry.trap = None  # or it would be cyclic garbage
            return self.failed(operation, entry)
        if entry.raise_cancel is None and not entry.closing:
            entry.operation = _NOTHING
            self._free_entries.append(entry)
        else:
            entry.trap = None
        return operation.decode(res, flags)

    def failed(self, operation: Operation[T], entry: InFlight | Op) -> T:
        """Raise what a negative result means."""
        res = entry.res
        if operation.buffers is not None:
            operation.buffers.failed(res, entry.flags)
        if res in CANCELLED_RESULTS:
            if entry.closing:
                raise trio.ClosedResourceError("another task closed this fd")
            if entry.raise_cancel is not None:
                self._cancelled += 1
                entry.raise_cancel()
        if res == -errno.ETIME and operation.etime_is_success:
            return operation.decode(0, entry.flags)
        if res == -errno.EINVAL and operation.opcode not in self.ring.supported:
            raise unsupported_opcode(operation.opcode)
        if res == -errno.EACCES and not self.ring.allows(operation.opcode):
            raise forbidden_opcode(operation.opcode)
        raise operation_error(res, operation.filename, operation.filename2)

    # ---- Cancelling ------------------------------------------------------------------------

    def request_cancel(self, entry: InFlight | Op) -> None:
        """Ask the kernel to stop an operation. Never raises: Trio's abort must not."""
        if entry.cancel_asked or not entry.user_data or self.ring.closed:
            return
        entry.cancel_asked = True
        self._cancels.append(entry.user_data)
        self._push_cancels()
        if self._submit_cancels_at_once:
            with suppress(OSError, RuntimeError):
                self._submit_now()

    def _push_cancels(self) -> None:
        # With no room, or in a forked child, the rest stays queued.
        with suppress(OSError, RuntimeError):
            while self._cancels and self.ring.push(async_cancel(self._cancels[0]), CANCEL):
                self._cancels.popleft()

    def finish_cancelled(self, user_data: int) -> bool:
        """See a cancelled operation end, so that another one may begin.

        Its task is told in the next turn of the loop.

        Returns:
          Whether it has ended: not if a worker has it.
        """
        pending = {user_data}
        self._submit_now()
        self._fetch_until_done(pending)
        return not pending

    def close_fd(self, fd: int) -> None:
        """Cancel what waits on *fd*, which is about to be closed.

        An operation in flight holds its file open: until it ends, the peer sees no FIN and the
        port stays taken. So cancel, and see it end, before the caller's close(2). SQEs for it that
        are not submitted yet go first too, or they would act on what gets the fd's number next.
        """
        waiters = self.fd_waiters.pop(fd, ())
        for waiter in waiters:
            waiter.fd_closing()
        if waiters or self.ring.unsubmitted_for(fd):
            self._submit_now()
            self._fetch_until_done({waiter.user_data for waiter in waiters} - {IGNORED})

    def _fetch_until_done(self, pending: set[int]) -> None:
        """Fetch completions until the cancelled operations *pending*, by user_data, are done.

        Unless a worker has one of them: that ends when it ends.
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
        """Submit now what acts on *fd*, if there is anything: a system call for it follows."""
        if self.ring.usable and self.ring.unsubmitted_for(fd):
            self._submit_now()

    def _submit_now(self) -> None:
        self.ring.flush()
        while self._cancels or self.ring.unsubmitted:  # there was no room, or no memory, for all
            self._backlog += self.ring.submit_and_wait(0) or ()
            self._push_cancels()

    # ---- The end ---------------------------------------------------------------------------

    def drain(self) -> bool:
        """Cancel everything and wait until nothing is in flight; False if that takes too long.

        Closing a ring is no barrier: the kernel goes on writing into buffers after close(2) and
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
                completions = self._backlog or self.ring.submit_and_wait(left) or []
                self._backlog = []
                for completion in completions:
                    self.discard(*completion)
                if self.native is not None:
                    self.native.discard()
        return not self._has_in_flight()

    def _has_in_flight(self) -> bool:
        native = self.native is not None and self.native.in_flight > 0
        return native or bool(self._entries or self._batches)

    def discard(self, user_data: int, res: int, flags: int) -> None:
        """Take note of a completion that no task will see; close an fd that it carries."""
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

    def leak(self) -> Sequence[object]:
        """Return what the kernel may still write to, to be kept for ever."""
        return [*self._entries.values(), *self._batches.values(), self.native]


def _ignore(_res: int) -> None:
    """Do nothing with a completion that says nothing."""
