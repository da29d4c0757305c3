"""What waits in a run: `InFlight` operations, and tasks in line at a `FifoLimit`."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import attrs
import trio
from trio.lowlevel import Abort, ParkingLot

from trio_uring._operations import async_cancel, nop
from trio_uring._trio_private import WaitTaskRescheduled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trio.lowlevel import RaiseCancelT, Task

    from trio_uring._operations import Exclusive, Operation, OperationArray

    from ._readiness import HasFileNo, Readiness
    from ._ring import Ring

T = TypeVar("T")


class _Manager(Protocol):
    def request_cancel(self, entry: InFlight) -> None:
        """Ask the kernel to stop an operation."""
        ...

    def failed(self, operation: Operation[T], entry: InFlight) -> T:
        """Raise what a negative result means."""
        ...


# Stands in entries that are not in use, so that they keep no buffers alive.
_NOTHING: Final = nop()


class CancelQueue(deque[int]):
    """What the kernel is to be asked to stop, by user data, and had no room for yet."""

    def __init__(self, ring: Ring, user_data: int) -> None:
        self._ring = ring
        self._user_data = user_data  # of the requests themselves

    def push(self) -> None:
        """Ask; with no room, or in a forked child, what is left stays in line."""
        with suppress(OSError, RuntimeError):
            while self and self._ring.push(async_cancel(self[0]), self._user_data):
                self.popleft()


@attrs.define(eq=False)
class InFlight:
    """An operation between its push and its last CQE, and the task that waits for it."""

    manager: _Manager
    operation: Operation[object]
    user_data: int
    task: Task | None  # None once it is done
    res: int = 0
    flags: int = 0
    cancel_asked: bool = False
    # Which of the two came first says what the task gets, should the kernel obey.
    raise_cancel: RaiseCancelT | None = None
    closing: bool = False
    # How its task goes to sleep. To make this takes longer than all else that an operation
    # costs us in Python, so entries are used again (benchmarks/bench_echo.py).
    sleep: WaitTaskRescheduled | None = None
    # Who is told of the end, where no task waits for it.
    when_done: Callable[[InFlight], None] | None = None

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

    def close(self) -> None:
        """Ask the kernel to stop the operation, because its fd is about to be closed."""
        self.closing = self.raise_cancel is None
        self.manager.request_cancel(self)

    def discard(self) -> None:
        """Do away with a result that no task will see: close an fd that it carries."""
        if self.res >= 0 and self.operation.discard is not None:
            self.operation.discard(self.res)

    def done(self) -> None:
        """Tell of the end, where no task waits for it."""
        if self.when_done is not None:
            self.when_done(self)

    def unwrap(self) -> None:
        """Stand for ``outcome.Value(None)`` in reschedule.

        A completion wakes its task with this entry itself: making a `Value` and unwrapping it
        would be a tenth of the time that an operation takes (benchmarks/bench_echo.py).
        """


def _abort_shielded(_raise_cancel: RaiseCancelT) -> Abort:
    return Abort.FAILED


class Entries(list[InFlight]):
    """Entries that were used, to be used again."""

    def __init__(self, manager: _Manager) -> None:
        self._manager = manager

    def take(self, operation: Operation[object], user_data: int, task: Task | None) -> InFlight:
        """Return an entry for an operation of *task*."""
        if not self:
            return InFlight(self._manager, operation, user_data, task)
        entry = self.pop()
        entry.operation = operation
        entry.user_data = user_data
        entry.task = task
        return entry

    def put(self, entry: InFlight) -> None:
        """Keep *entry*, whose task has its result, if nothing ever came between."""
        if entry.raise_cancel is None and not entry.closing:
            entry.operation = _NOTHING
            self.append(entry)
        else:
            entry.sleep = None  # or it would be cyclic garbage


# How a task goes to sleep where the operation is to go on, whatever happens.
SHIELDED: Final = WaitTaskRescheduled(_abort_shielded)


class _Batch(Protocol):
    def part_done(self, part: Part) -> None:
        """Take note of a part's last CQE."""


@attrs.define(eq=False)
class Part(InFlight):
    """One of several operations that a task waits for together. *task* is None throughout."""

    batch: _Batch = attrs.field(kw_only=True)
    chain: Sequence[Part] = ()
    running: bool = False

    def done(self) -> None:
        """Tell the batch."""
        self.batch.part_done(self)


@attrs.define(eq=False)
class Claim(InFlight):
    """Keeps other tasks from receiving on an fd, while its operation is not in flight."""

    when_closing: Callable[[], None] = attrs.field(kw_only=True)

    def close(self) -> None:
        """Tell whoever claimed it."""
        self.when_closing()


@attrs.define(eq=False)
class Group:
    """Operations that end by themselves, in flight together; their completions come as one."""

    array: OperationArray[object]
    start: int
    end: int
    opcodes: Mapping[int, int]  # how many of each
    places: int  # at the limit of file operations
    task: Task
    results: Sequence[tuple[int, int]] = ()  # res and flags of each, once it is done
    raise_cancel: RaiseCancelT | None = None

    def abort(self, raise_cancel: RaiseCancelT) -> Abort:
        """Remember that the task was cancelled; the operations end by themselves."""
        self.raise_cancel = raise_cancel
        return Abort.FAILED

    def unwrap(self) -> None:
        """As in `InFlight`."""

    def discard(self) -> None:
        """Drop the results, which no task will ever see; close the fds among them."""
        operations = self.array.operations[self.start : self.end]
        for operation, (res, _) in zip(operations, self.results, strict=False):
            if res >= 0 and operation.discard is not None:
                operation.discard(res)
        self.array.release()


class Groups(dict[int, Group]):
    """The groups in flight, by the number that the ring gave each."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self._ring = ring

    def add(self, group: Group) -> int:
        """Begin; returns the user_data of the group's first operation."""
        number, user_data = self._ring.open_batch(group.end - group.start)
        self[number] = group
        return user_data

    def finish(self, number: int) -> Group:
        """End; returns the group, with its results."""
        group = self.pop(number)
        group.results = self._ring.close_batch(number, group.end - group.start)
        return group

    def operations(self) -> int:
        """Return how many operations are in flight in groups."""
        return sum(group.end - group.start for group in self.values())


class Waiting(dict[int, "list[InFlight]"]):
    """By fd, what would have to be cancelled before that fd can be closed."""

    def __init__(self, readiness: Readiness) -> None:
        super().__init__()
        self._readiness = readiness

    def enlist(self, entry: InFlight) -> None:
        """Add *entry*.

        Raises:
          trio.BusyResourceError: another task waits for the same thing on the same fd.
        """
        operation = entry.operation
        fd = operation.fd
        if fd < 0 or not operation.acts_on_fd:
            return
        waiting = self.get(fd)
        if operation.exclusive is not None and (waiting or fd in self._readiness.waits):
            self.check_exclusive(fd, operation.exclusive)
        if waiting is None:
            self[fd] = [entry]
        else:
            waiting.append(entry)
        if operation.second_fd >= 0:
            self.setdefault(operation.second_fd, []).append(entry)

    def strike(self, entry: InFlight) -> None:
        """Take off again. After notify_closing() the list may be gone, or be a new file's."""
        operation = entry.operation
        self._strike_at(operation.fd, entry)
        if operation.second_fd >= 0:
            self._strike_at(operation.second_fd, entry)

    def _strike_at(self, fd: int, entry: InFlight) -> None:
        waiting = self.get(fd)
        if waiting is not None and entry in waiting:
            if len(waiting) == 1:
                del self[fd]
            else:
                waiting.remove(entry)

    def count(self, exclusive: Exclusive) -> int:
        """Return how many operations wait so."""
        waits = [entry.operation.exclusive for entries in self.values() for entry in entries]
        return waits.count(exclusive)

    def check_ready(self, fd: int | HasFileNo, exclusive: Exclusive) -> None:
        """Raise `trio.BusyResourceError` if an operation is waiting so on *fd*."""
        if not isinstance(fd, int):
            fd = fd.fileno()
        if fd in self:
            self.check_exclusive(fd, exclusive)

    def check_exclusive(self, fd: int, exclusive: Exclusive) -> None:
        """Raise `trio.BusyResourceError` if a task waits so on *fd*."""
        if self._readiness.is_busy(fd, exclusive) or any(
            entry.operation.exclusive == exclusive for entry in self.get(fd, ())
        ):
            raise trio.BusyResourceError("another task is already reading / writing this fd")


@attrs.define(eq=False)
class FifoLimit:
    """At most so many at once; the others wait in line."""

    free: int
    line: ParkingLot = attrs.Factory(ParkingLot)
    gathering: trio.StrictFIFOLock = attrs.Factory(trio.StrictFIFOLock)

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

    async def acquire_many(self, count: int) -> None:
        """Take *count* places; no more than there are altogether.

        They are gathered one by one, in line with all others. Two that gather at the same time
        could each hold what the other waits for, so only one does, and then the next.
        If cancelled, none was taken.
        """
        if self.free >= count:
            self.free -= count
            return
        async with self.gathering:
            taken = 0
            try:
                while taken < count:
                    await self.acquire()
                    taken += 1
            except BaseException:
                self.release_many(taken)
                raise

    def release_many(self, count: int) -> None:
        """Give *count* places back."""
        if self.line:
            for _ in range(count):
                self.release()
        else:
            self.free += count

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
        ...

    def refused(self) -> tuple[str, ...]:
        """Return what is not in use, and why."""
        ...

    def close(self, *, drained: bool) -> None:
        """End; if the ring could not be drained, touch nothing that waits for it."""
        ...
