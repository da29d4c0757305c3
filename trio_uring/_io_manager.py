"""`UringIOManager`: Trio's I/O manager on a ring; how a task performs an operation.

One turn of Trio's loop is one `get_events` and one `process_events`: one system call submits
every SQE pushed since the last turn and fetches every completion; each completion wakes its
task. What still goes through epoll, and why, stands in `_readiness.py`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import attrs
import trio
from trio.lowlevel import Abort, ParkingLot, RaiseCancelT, Task

from ._buffer_pool import BufferPool
from ._errors import CANCELLED_RESULTS, ForkedRingError, operation_error
from ._kernel.uapi import CqeFlag, Opcode
from ._operations import Operation, async_cancel
from ._readiness import GuestWakeup, Readiness
from ._ring import Completion, Ring
from ._statistics import RingStatistics, flag_names, totals
from ._trio_private import current_io_manager, current_run_is_guest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio._file_io import _HasFileNo

    from ._config import RingConfig

T = TypeVar("T")

# What TRIO_URING_DISABLE can leave to Trio, in a run that has a ring.
Layer = Literal["files", "sockets"]
LAYERS: Final[tuple[Layer, ...]] = ("files", "sockets")

# Plain ints: an IntFlag in an expression costs a microsecond.
_F_MORE: Final = int(CqeFlag.MORE)
_F_NOTIF: Final = int(CqeFlag.NOTIF)

# user_data counts up and never repeats within a ring, so a late completion can never be taken
# for that of another operation: each operation is its own generation. These stand for no task.
_CANCEL: Final = 0
_WATCH: Final = 1
_FIRST: Final = 2

# "Not a timeout", where there is no completion to report: a signal, or the guest's worker.
_WOKEN: Final = ((_CANCEL, 0, 0),)

# The buffers that sockets and pipes receive into, see BufferPool. 64 KiB is what Trio's
# streams ask for.
RECEIVE_BUFFER_SIZE: Final = 65536
_RECEIVE_GROUP: Final = 0

# How long closing waits for operations that do not end when cancelled, such as an fsync.
_DRAIN_SECONDS: Final = 2.0

# What the kernel may still write to when a ring could not be drained: kept for ever, on purpose.
_leaked: Final[list[object]] = []


@attrs.define(eq=False)
class InFlight:
    """An operation between its push and its last CQE, and the task that waits for it."""

    operation: Operation[object]
    user_data: int
    task: Task | None  # None once it is done
    res: int = 0
    flags: int = 0
    cancel_asked: bool = False
    # Which of the two came first says what the task gets, should the kernel obey.
    raise_cancel: RaiseCancelT | None = None
    closing: bool = False


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

    def release(self) -> None:
        """Give the place to the first in line, if there is one."""
        if self.line:
            self.line.unpark()
        else:
            self.free += 1


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

    The ring itself is opened by the first turn of the loop, in the thread that it will belong
    to, and when it is known whether the run is a guest of another loop.
    """

    def __init__(self, config: RingConfig, disabled: frozenset[Layer] = frozenset()) -> None:
        self.config = config
        self.disabled = disabled
        self._thread = 0
        self._ring: Ring | None = None
        self._guest: GuestWakeup | None = None
        self._readiness = Readiness()
        self._watching = False
        self._next_user_data = _FIRST
        self._in_flight: dict[int, InFlight] = {}
        # fd -> what would have to be cancelled before that fd can be closed.
        self._waiting: dict[int, list[InFlight]] = {}
        self._file_limit = FifoLimit(config.max_file_operations)
        self._cancels: deque[int] = deque()
        self._backlog: list[Completion] = []
        self._completed: dict[int, int] = {}
        self._cancelled = 0
        self._pool: BufferPool | None = None
        self._pool_refused: str = ""

    @property
    def ring(self) -> Ring:
        """The ring, opened if need be."""
        if self._ring is None:
            self._open()
            assert self._ring is not None
        return self._ring

    def _open(self) -> None:
        self._thread = threading.get_ident()
        guest = current_run_is_guest()
        self._ring = ring = Ring(self.config, register_fd=not guest)
        if guest:
            self._guest = GuestWakeup()
            ring.register_eventfd(self._guest.eventfd)
        self._watch()

    @property
    def buffers(self) -> BufferPool | None:
        """The buffers to receive into; None where the kernel has no such thing."""
        if self._pool is None and not self._pool_refused:
            try:
                self._pool = BufferPool(
                    self.ring,
                    group=_RECEIVE_GROUP,
                    count=self.config.receive_buffers,
                    size=RECEIVE_BUFFER_SIZE,
                )
            except OSError as exc:  # EINVAL before Linux 5.19; ENOMEM
                self._pool_refused = f"PBUF_RING: {exc}"
        return self._pool

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
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if operation.bounded:
                await self._file_limit.acquire()
            entry = self._start(operation)
            await trio.lowlevel.wait_task_rescheduled(self._abort_for(entry))
            return self._result(operation, entry)
        finally:
            # Not while the kernel may still touch the buffers: a crashing run ends up here too.
            if entry is None or entry.task is None:
                operation.release()

    def _start(self, operation: Operation[T]) -> InFlight:
        try:
            if operation.exclusive is not None:
                self._check_exclusive(operation.fd, operation.exclusive)
            user_data = self._next_user_data
            self._next_user_data += 1
            self._push(operation, user_data)
        except BaseException:
            if operation.bounded:
                self._file_limit.release()
            raise
        entry = InFlight(operation, user_data, trio.lowlevel.current_task())
        self._in_flight[user_data] = entry
        if operation.cancellable and operation.fd >= 0:
            self._waiting.setdefault(operation.fd, []).append(entry)
        return entry

    def _check_exclusive(self, fd: int, exclusive: str) -> None:
        waiting = self._waiting.get(fd)
        busy = waiting is not None and any(e.operation.exclusive == exclusive for e in waiting)
        if exclusive == "read":
            busy = busy or self._readiness.is_reading(fd)
        else:
            busy = busy or self._readiness.is_writing(fd)
        if busy:
            raise trio.BusyResourceError("another task is already reading / writing this fd")

    def _push(self, operation: Operation[T], user_data: int) -> None:
        """Push; if even submitting made no room, reap into the backlog and push again."""
        while not self.ring.push(operation, user_data):
            self._backlog += self.ring.turn(0) or ()

    def _abort_for(self, entry: InFlight) -> Callable[[RaiseCancelT], Abort]:
        def abort(raise_cancel: RaiseCancelT) -> Abort:
            # We can only ask. Until the CQE arrives the kernel may still write to the
            # buffer, so the task stays parked and the buffer stays pinned. If the operation
            # was faster than our request, its result wins: no data is lost.
            if not entry.closing:
                entry.raise_cancel = raise_cancel
            if entry.operation.cancellable:
                self._request_cancel(entry)
                if self._guest is not None and self._ring is not None:
                    # The host may have called cancel() while the worker sleeps.
                    self._ring.flush()
            return Abort.FAILED

        return abort

    def _result(self, operation: Operation[T], entry: InFlight) -> T:
        res = entry.res
        if res >= 0:
            return operation.decode(res, entry.flags)
        if res in CANCELLED_RESULTS:
            if entry.closing:
                raise trio.ClosedResourceError("another task closed this fd")
            if entry.raise_cancel is not None:
                self._cancelled += 1
                entry.raise_cancel()
        raise operation_error(res, operation.filename, operation.filename2)

    # ---- Cancellation ----------------------------------------------------------------------

    def _request_cancel(self, entry: InFlight) -> None:
        """Ask the kernel to stop an operation. Never raises: Trio's abort must not."""
        if not entry.cancel_asked and self._ring is not None and not self._ring.closed:
            entry.cancel_asked = True
            self._cancels.append(entry.user_data)
            self._push_cancels(self._ring)

    def _push_cancels(self, ring: Ring) -> None:
        # With no room, or in a forked child, they stay in line for the next turn.
        try:
            while self._cancels and ring.push(async_cancel(self._cancels[0]), _CANCEL):
                self._cancels.popleft()
        except (OSError, ForkedRingError):
            return

    def notify_closing(self, fd: int | _HasFileNo) -> None:
        """Wake every task that waits for *fd* with `trio.ClosedResourceError`; see Trio's docs.

        An operation in flight holds its file open: until it ends, the peer sees no FIN and the
        port stays taken. So cancel, and submit at once, before the caller's close(2). SQEs not
        submitted yet go first too, or they would act on whatever gets the fd's number next.
        """
        if not isinstance(fd, int):
            fd = fd.fileno()
        ring = self._ring
        if ring is not None:
            entries = self._waiting.pop(fd, ())
            for entry in entries:
                entry.closing = entry.raise_cancel is None
                self._request_cancel(entry)
            if entries or ring.unsubmitted:
                with suppress(ForkedRingError):  # a child may close what it inherited
                    self._submit_now(ring)
        self._readiness.notify_closing(fd)

    def _submit_now(self, ring: Ring) -> None:
        while self._cancels:  # there was no room for all of them
            self._backlog += ring.turn(0) or ()
            self._push_cancels(ring)
        ring.flush()

    # ---- Trio's loop -----------------------------------------------------------------------

    def get_events(self, timeout: float) -> Sequence[Completion]:
        """Submit, wait at most *timeout* seconds, and return the completions.

        Falsy only if the time ran out, as Trio's clocks rely on.
        """
        ring = self.ring
        if self._guest is not None:
            if threading.get_ident() != self._thread:
                return _WOKEN if self._guest.wait(timeout) else ()
            self._guest.drain()
        if self._cancels:
            self._push_cancels(ring)
        if not self._watching:
            self._watch()
        if not self._backlog:
            completions = ring.turn(timeout)
            return _WOKEN if completions is None else completions
        backlog, self._backlog = self._backlog, []
        return backlog + (ring.turn(0) or [])

    def process_events(self, events: Sequence[Completion]) -> None:
        """Wake the tasks whose operations completed."""
        for user_data, res, flags in events:
            if user_data < _FIRST:
                if user_data == _WATCH:
                    self._watching = False
                    self._readiness.harvest()
                continue
            entry = self._in_flight[user_data]
            if flags & _F_MORE:
                self._more(entry, res, flags)
                continue
            del self._in_flight[user_data]
            if not flags & _F_NOTIF:  # a notification ends an operation, and says no more
                entry.res = res
                entry.flags = flags
            task = self._finish(entry)
            trio.lowlevel.reschedule(task)

    def _more(self, entry: InFlight, res: int, flags: int) -> None:
        if entry.operation.on_more is not None:
            entry.operation.on_more(res, flags)
        else:  # zero-copy send: the result comes first, the end of the buffer's use later
            entry.res = res
            entry.flags = flags

    def _finish(self, entry: InFlight) -> Task:
        operation = entry.operation
        opcode = operation.opcode
        self._completed[opcode] = self._completed.get(opcode, 0) + 1
        if operation.bounded:
            self._file_limit.release()
        if operation.cancellable and operation.fd >= 0:
            waiting = self._waiting.get(operation.fd)
            # After notify_closing() the list is gone, and may be that of a new file.
            if waiting is not None and entry in waiting:
                waiting.remove(entry)
                if not waiting:
                    del self._waiting[operation.fd]
        task = entry.task
        assert task is not None
        entry.task = None
        return task

    def _watch(self) -> None:
        """Have the ring watch the epoll fd; called again after each completion of that."""
        assert self._ring is not None
        self._watching = self._ring.push(self._readiness.watch(), _WATCH)

    def force_wakeup(self) -> None:
        """Make `get_events` return; may be called from any thread and from signal handlers."""
        self._readiness.force_wakeup()

    async def wait_readable(self, fd: int | _HasFileNo) -> None:
        """Block until *fd* is readable; see Trio's docs."""
        await self._wait_ready(fd, "read")

    async def wait_writable(self, fd: int | _HasFileNo) -> None:
        """Block until *fd* is writable; see Trio's docs."""
        await self._wait_ready(fd, "write")

    async def _wait_ready(self, fd: int | _HasFileNo, exclusive: str) -> None:
        if not isinstance(fd, int):
            fd = fd.fileno()
        if fd in self._waiting:
            self._check_exclusive(fd, exclusive)
        if exclusive == "read":
            await self._readiness.wait_readable(fd)
        else:
            await self._readiness.wait_writable(fd)

    def statistics(self) -> RingStatistics:
        """Return what the ring is, and what it has done so far."""
        ring = self._ring
        readiness = self._readiness.statistics()
        waits = [e.operation.exclusive for entries in self._waiting.values() for e in entries]
        refused = ring.refused if ring is not None else ()
        return RingStatistics(
            tasks_waiting_read=readiness.tasks_waiting_read + waits.count("read"),
            tasks_waiting_write=readiness.tasks_waiting_write + waits.count("write"),
            setup_flags=flag_names(ring.setup_flags) if ring is not None else (),
            features=flag_names(ring.features) if ring is not None else (),
            refused=(*refused, self._pool_refused) if self._pool_refused else refused,
            entries=ring.entries if ring is not None else 0,
            in_flight=len(self._in_flight),
            submitted=ring.submitted if ring is not None else 0,
            enters=ring.enters if ring is not None else 0,
            cancelled=self._cancelled,
            completed={Opcode(opcode).name: n for opcode, n in self._completed.items()},
            waiting_for_limit=self._file_limit.line.statistics().tasks_waiting,
        )

    # ---- Closing ---------------------------------------------------------------------------

    def close(self) -> None:
        """Drain the ring and close it. Called once, by Trio, at the end of the run.

        From a foreign thread (a guest run that was abandoned and garbage collected) the kernel
        lets nobody drain the ring. Then what it may still write to is leaked, on purpose.
        """
        ring = self._ring
        totals.add(self.statistics())
        if ring is not None and not ring.closed:
            if threading.get_ident() == self._thread and self._drain(ring):
                if self._pool is not None:
                    self._pool.close()
            else:
                _leaked.append((list(self._in_flight.values()), self._pool))
            ring.close()
        if self._guest is not None:
            self._guest.close()
        self._readiness.close()

    def _drain(self, ring: Ring) -> bool:
        """Cancel everything and wait until nothing is in flight; False if that takes too long.

        Closing a ring is no barrier: the kernel goes on writing into buffers after close(2) and
        munmap(2) have returned (seen on Linux 6.18 with O_DIRECT reads).
        """
        for entry in self._in_flight.values():
            self._request_cancel(entry)
        if self._watching:
            self._cancels.append(_WATCH)
        deadline = time.monotonic() + _DRAIN_SECONDS
        try:
            while self._in_flight or self._watching:
                self._push_cancels(ring)
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                completions = self._backlog + (ring.turn(left) or [])
                self._backlog = []
                for completion in completions:
                    self._discard(*completion)
        except ForkedRingError:
            return False
        return True

    def _discard(self, user_data: int, res: int, flags: int) -> None:
        """Take note of a completion that no task will ever see; close an fd that it carries."""
        if user_data == _WATCH:
            self._watching = False
        if user_data < _FIRST:
            return
        entry = self._in_flight[user_data]
        if res >= 0 and entry.operation.discard is not None:
            entry.operation.discard(res)
        if not flags & _F_MORE:
            del self._in_flight[user_data]
            entry.operation.release()
