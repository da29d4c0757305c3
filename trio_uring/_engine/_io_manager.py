"""`UringIOManager`: Trio's I/O manager on a ring; how a task performs an operation.

One turn of Trio's loop is one `get_events` and one `process_events`: one system call submits
every SQE pushed since the last turn and fetches every completion; each completion wakes its
task. What still goes through epoll, and why, stands in `_readiness.py`.
"""

from __future__ import annotations

import errno
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import trio
from trio.lowlevel import current_task

from trio_uring._errors import (
    CANCELLED_RESULTS,
    forbidden_opcode,
    operation_error,
    unsupported_opcode,
)
from trio_uring._kernel.uapi import CqeFlag
from trio_uring._operations import Operation, async_cancel, msg_ring
from trio_uring._statistics import RingStatistics, totals
from trio_uring._trio_private import (
    WaitTaskRescheduled,
    current_io_manager,
    current_reschedule,
    current_run_is_guest,
    is_cancelled,
    wait_rescheduled,
)

from ._buffer_pool import BufferPools
from ._in_flight import SHIELDED, CancelQueue, Entries, FifoLimit, Groups, InFlight, Waiting
from ._mailbox import ASLEEP, Mailbox, WakeMessage
from ._readiness import GuestWakeup, Readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio.lowlevel import Task

    from trio_uring._config import RingConfig
    from trio_uring._operations import OperationArray

    from ._buffer_pool import BufferPool
    from ._in_flight import Companion, Group, Part
    from ._readiness import HasFileNo
    from ._ring import Completion, Ring

T = TypeVar("T")

# What TRIO_URING_DISABLE can leave to Trio, in a run that has a ring.
Layer = Literal["files", "sockets"]
LAYERS: Final[tuple[Layer, ...]] = ("files", "sockets")

# Plain ints: an IntFlag in an expression costs a microsecond.
_F_MORE: Final = int(CqeFlag.MORE)
_F_NOTIF: Final = int(CqeFlag.NOTIF)

# user_data counts up and never repeats within a ring, so a late completion can never be taken
# for that of another operation: each operation is its own generation. These stand for no task.
_NOBODY: Final = 0
_CANCEL: Final = 1
_WATCH: Final = 2
_GROUP: Final = 3  # BATCH_DONE in the C core, which makes these completions
_WAKE: Final = 4  # sent by another ring
_FIRST: Final = 5

# "Not a timeout", where there is no completion to report: a signal, or the guest's worker.
_WOKEN: Final = ((_NOBODY, 0, 0),)

# How long closing waits for operations that do not end when cancelled, such as an fsync.
_DRAIN_SECONDS: Final = 2.0

# What the kernel may still write to when a ring could not be drained: kept for ever, on purpose.
_leaked: Final[list[object]] = []


def current_ring(layer: Layer) -> UringIOManager | None:
    """Return the current run's manager, if that run has a ring and uses it for *layer*.

    Raises:
      RuntimeError: outside a run.
    """
    manager = current_io_manager()
    if isinstance(manager, UringIOManager) and layer not in manager.disabled:
        return manager
    return None


class UringIOManager:
    """What stands in a Trio run's ``io_manager``; made at its start, closed at its end.

    It closes *ring*, which belongs to the thread of the run.
    """

    begun: bool = False  # whether there was a first turn of the loop

    def __init__(
        self, ring: Ring, config: RingConfig, disabled: frozenset[Layer] = frozenset()
    ) -> None:
        self.ring = ring
        self.config = config
        self.disabled = disabled
        self._guest: GuestWakeup | None = None
        self._readiness = Readiness()
        self._watch_operation = self._readiness.watch()
        self._cancel_opcode = async_cancel(_NOBODY).opcode
        self._watching = False
        self._next_user_data = _FIRST
        self._in_flight: dict[int, InFlight] = {}
        self._groups = Groups(ring)
        self._entries = Entries(self)
        self.waiting: Waiting = Waiting(self._readiness)
        self.file_limit: FifoLimit = FifoLimit(config.max_file_operations)
        # Cancelled batches with chains, whose later operations can only be cancelled later.
        self.chains_to_cancel: set[Callable[[], object]] = set()
        self._cancels = CancelQueue(ring, _CANCEL)
        self._backlog: list[Completion] = []
        # What get_events() returned, and process_events() has not come to yet.
        self._unprocessed: Iterable[Completion] = ()
        self._completed = [0] * 256  # by opcode, which is one byte
        self._cancelled = 0
        self.pools: BufferPools = BufferPools(ring, config.receive_buffers)
        self.companion: Companion | None = None
        self.mailbox: Mailbox = Mailbox(ring)

    def _begin(self) -> None:
        """Finish setting up, in the first turn of the loop: only now it is known for what."""
        self.begun = True
        if current_run_is_guest():
            self._guest = GuestWakeup()
            self.ring.register_eventfd(self._guest.eventfd)
        else:
            self.ring.register_fd()
        self._watch()

    @property
    def buffers(self) -> BufferPool | None:
        """The buffers to receive into; None where the kernel has no such thing."""
        return self.pools.receive or self.pools.open_receive()

    # ---- Performing operations -------------------------------------------------------------

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
                await self.file_limit.acquire()
            entry = self.start(operation, task)
            if entry.sleep is None:
                entry.sleep = WaitTaskRescheduled(entry.abort)
            await wait_rescheduled(entry.sleep)
            return self._result(operation, entry)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            if entry is not None and entry.task is None:
                entry.discard()
            raise
        finally:
            # Not while the kernel may still touch the buffers: a crashing run ends up here too.
            if operation.pins and (entry is None or entry.task is None):
                operation.release()

    @trio.lowlevel.enable_ki_protection
    async def perform_shielded(self, operation: Operation[T]) -> T:
        """Perform *operation* in the middle of a call that must not end there.

        Like `perform`, but no cancellation is looked at, before or meanwhile, and what a signal
        interrupted is begun again, as :pep:`475` has it for the standard library's calls.
        """
        entry: InFlight | None = None
        task = current_task()
        try:
            while entry is None or (entry.res == -errno.EINTR and not entry.closing):
                if operation.limited:
                    await self.file_limit.acquire_shielded()
                entry = self.start(operation, task)
                await wait_rescheduled(SHIELDED)
            return self._result(operation, entry)
        except GeneratorExit:  # the run crashed, and its tasks are being collected
            if entry is not None and entry.task is None:
                entry.discard()
            raise
        finally:
            if operation.pins and (entry is None or entry.task is None):
                operation.release()

    def _result(self, operation: Operation[T], entry: InFlight) -> T:
        res, flags = entry.res, entry.flags
        if res < 0:
            entry.sleep = None  # or it would be cyclic garbage
            return self.failed(operation, entry)
        self._entries.put(entry)
        return operation.decode(res, flags)

    def start(self, operation: Operation[object], task: Task | None) -> InFlight:
        """Submit *operation* for *task*."""
        user_data = self._next_user_data
        self._next_user_data = user_data + 1
        entry = self._entries.take(operation, user_data, task)
        try:
            if operation.cancellable:
                self.waiting.enlist(entry)
            while not self.ring.push(operation, user_data):
                # Not even submitting made room: completions must be taken out first.
                self._backlog += self.ring.submit_and_wait(0) or ()
        except BaseException:
            self.waiting.strike(entry)
            if operation.limited:
                self.file_limit.release()
            raise
        self._in_flight[user_data] = entry
        return entry

    def start_parts(self, parts: Sequence[Part], array: OperationArray[object]) -> None:
        """Submit the *parts* of a batch, which *array* describes."""
        first = self._next_user_data
        self._next_user_data = first + len(parts)
        for user_data, part in enumerate(parts, first):
            part.user_data = user_data
            self._in_flight[user_data] = part
        self._push_many(array, 0, array.count, first)

    def start_group(self, group: Group) -> None:
        """Submit *group*, whose task is woken when all of it is done."""
        user_data = self._groups.add(group)
        self._push_many(group.array, group.start, group.end, user_data - group.start)

    def _push_many(
        self, array: OperationArray[object], start: int, end: int, user_data: int
    ) -> None:
        while (start := self.ring.push_many(array.fields, start, end, user_data)) < end:
            self._backlog += self.ring.submit_and_wait(0) or ()

    def wake_ring(self, mailbox: Mailbox) -> bool:
        """Wake another run's loop for its *mailbox*; False if this ring cannot."""
        fd = mailbox.acquire_fd()
        operation, user_data = msg_ring(fd, _WAKE), self._next_user_data
        pushed = False
        if fd >= 0 and self.ring.offers(operation.opcode):
            with suppress(OSError, RuntimeError):
                pushed = self.ring.push(operation, user_data)
        if not pushed:
            mailbox.release_fd(fd)
            return False
        self._next_user_data = user_data + 1
        self._in_flight[user_data] = WakeMessage(self, operation, user_data, None, mailbox=mailbox)
        with suppress(
            OSError
        ):  # at once: this loop may not submit again before the other one answers
            self.ring.flush()
        return not self.ring.unsubmitted

    def failed(self, operation: Operation[T], entry: InFlight) -> T:
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

    # ---- Cancellation ----------------------------------------------------------------------

    def request_cancel(self, entry: InFlight) -> None:
        """Ask the kernel to stop an operation. Never raises: Trio's abort must not."""
        ring = self.ring
        if entry.cancel_asked or ring.closed:
            return
        entry.cancel_asked = True
        self._cancels.append(entry.user_data)
        self._cancels.push()
        if self._guest is not None:
            # The host may have called cancel() while the worker thread sleeps.
            with suppress(OSError, RuntimeError):
                self._submit_now(ring)

    def notify_closing(self, fd: int | HasFileNo) -> None:
        """Wake every task that waits for *fd* with `trio.ClosedResourceError`; see Trio's docs.

        An operation in flight holds its file open: until it ends, the peer sees no FIN and the
        port stays taken. So cancel, and submit at once, before the caller's close(2). SQEs not
        submitted yet go first too, or they would act on whatever gets the fd's number next.
        """
        if not isinstance(fd, int):
            fd = fd.fileno()
        ring = self.ring
        if not ring.usable:
            return  # a forked child closes what it inherited; its epoll is its parent's, too
        entries = self.waiting.pop(fd, ())
        for entry in entries:
            entry.close()
        if entries or ring.unsubmitted:
            self._submit_now(ring)
        self._readiness.notify_closing(fd)

    def _submit_now(self, ring: Ring) -> None:
        ring.flush()
        while self._cancels or ring.unsubmitted:  # there was no room, or no memory, for all
            self._backlog += ring.submit_and_wait(0) or ()
            self._cancels.push()

    # ---- Trio's loop -----------------------------------------------------------------------

    def get_events(self, timeout: float) -> Sequence[Completion]:
        """Submit, wait at most *timeout* seconds, and return the completions.

        Falsy only if the time ran out, as Trio's clocks rely on.
        """
        ring = self.ring
        if not self.begun:
            self._begin()
        if self._guest is not None:
            if ring.usable:
                self._guest.drain()
            elif timeout > 0:  # Trio's worker thread
                return _WOKEN if self._guest.wait(timeout) else ()
        if self._cancels:
            self._cancels.push()
        if not self._watching:
            self._watch()
        # There is something to do already, or there was no room to ask for it: no sleep.
        hurry = self._backlog or self._cancels or not self._watching
        self.mailbox.last_iteration = ASLEEP
        completions = ring.submit_and_wait(0 if hurry else timeout)
        self.mailbox.last_iteration = time.monotonic()
        if hurry:
            completions = self._backlog + (completions or [])
            self._backlog = []
            if not completions:
                return _WOKEN
        elif completions is None:
            return _WOKEN
        self._unprocessed = completions
        return completions

    def process_events(self, events: Sequence[Completion]) -> None:
        """Wake the tasks whose operations completed."""
        in_flight = self._in_flight
        reschedule = current_reschedule()
        self._unprocessed = unprocessed = iter(events)
        for user_data, res, flags in unprocessed:
            if user_data < _FIRST:
                if user_data == _WATCH:
                    self._watching = False
                    self._completed[self._watch_operation.opcode] += 1
                    self._readiness.harvest()
                elif user_data == _CANCEL:
                    self._completed[self._cancel_opcode] += 1
                    if res == -errno.ENOENT:
                        for ask_again in self.chains_to_cancel.copy():
                            ask_again()
                elif user_data == _GROUP:
                    group = self._groups.finish(res)
                    for opcode, count in group.opcodes.items():
                        self._completed[opcode] += count
                    self.file_limit.release_many(group.places)
                    reschedule(group.task, group)
                elif user_data == _WAKE:
                    self.mailbox.deliver_all()
                continue
            entry = in_flight[user_data]
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
            del in_flight[user_data]
            self._completed[operation.opcode] += 1
            if operation.limited:
                self.file_limit.release()
            if operation.cancellable:
                self.waiting.strike(entry)
            task, entry.task = entry.task, None
            if task is not None:
                reschedule(task, entry)
            else:
                entry.done()

    def _watch(self) -> None:
        """Have the ring watch the epoll fd; called again after each completion of that."""
        self._watching = self.ring.push(self._watch_operation, _WATCH)

    def force_wakeup(self) -> None:
        """Make `get_events` return; may be called from any thread and from signal handlers."""
        self._readiness.force_wakeup()

    async def wait_readable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is readable; see Trio's docs."""
        self.waiting.check_ready(fd, "read")
        await self._readiness.wait_readable(fd)

    async def wait_writable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is writable; see Trio's docs."""
        self.waiting.check_ready(fd, "write")
        await self._readiness.wait_writable(fd)

    def statistics(self) -> RingStatistics:
        """Return what the ring is, and what it has done so far."""
        companion = self.companion
        readiness = self._readiness.statistics()
        return RingStatistics.of(
            self.ring,
            self.config,
            self._completed,
            (self.pools.refused, *(companion.refused() if companion else ())),
            tasks_waiting_read=readiness.tasks_waiting_read + self.waiting.count("read"),
            tasks_waiting_write=readiness.tasks_waiting_write + self.waiting.count("write"),
            in_flight=len(self._in_flight) + self._groups.operations(),
            cancelled=self._cancelled,
            waiting_for_limit=self.file_limit.line.statistics().tasks_waiting,
            routes=companion.routes() if companion is not None else {},
        )

    # ---- Closing ---------------------------------------------------------------------------

    def close(self) -> None:
        """Drain the ring and close it. Called once, by Trio, at the end of the run.

        From a foreign thread (a guest run that was abandoned and garbage collected) the kernel
        lets nobody drain the ring. Then what it may still write to is leaked, on purpose.
        """
        totals.add(self.statistics())
        self.mailbox.close()
        for completion in self._unprocessed:
            self._discard(*completion)
        drained = self.ring.usable and self._drain(self.ring)
        if not drained:
            _leaked.append((list(self._in_flight.values()), self._groups, self.pools))
        else:
            self.pools.close_all()
        self.ring.close()
        if self.companion is not None:
            self.companion.close(drained=drained)
        if self._guest is not None:
            self._guest.close()
        self._readiness.close()

    def _drain(self, ring: Ring) -> bool:
        """Cancel everything and wait until nothing is in flight; False if that takes too long.

        Closing a ring is no barrier: the kernel goes on writing into buffers after close(2) and
        munmap(2) have returned (seen on Linux 6.18 with O_DIRECT reads).
        """
        for entry in self._in_flight.values():
            self.request_cancel(entry)
        if self._watching:
            self._cancels.append(_WATCH)
        deadline = time.monotonic() + _DRAIN_SECONDS
        with suppress(OSError, RuntimeError):
            while self._in_flight or self._groups or self._watching:
                self._cancels.push()
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                completions = self._backlog or ring.submit_and_wait(left) or []
                self._backlog = []
                for completion in completions:
                    self._discard(*completion)
        return not (self._in_flight or self._groups or self._watching)

    def _discard(self, user_data: int, res: int, flags: int) -> None:
        """Take note of a completion that no task will ever see; close an fd that it carries."""
        if user_data == _WATCH:
            self._watching = False
        if user_data == _GROUP:
            self._groups.finish(res).discard()
        if user_data < _FIRST:
            return
        entry = self._in_flight[user_data]
        entry.res = res
        entry.discard()
        if not flags & _F_MORE:
            del self._in_flight[user_data]
            entry.operation.release()
