"""A simulated `Ring`, without a kernel. Its results may be late, short, cancelled or out of order.

`SimulatedKernel` takes the place of the kernel for the one ring that a manager opens. A
`random.Random` makes its choices. It has files and the operations on them. It fails if a manager
makes an error: if it releases memory that an operation in flight points to, leaves an SQE that
would act on the next file with the same fd, uses a user_data twice, or sleeps without submitting.
"""

from __future__ import annotations

import errno
import select
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import (
    CQE_BUFFER_SHIFT,
    CqeFlag,
    FeatureFlag,
    Opcode,
    SetupFlag,
    SqeFlag,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

    from trio_uring._engine._ring import Completion
    from trio_uring._operations import Operation

_F_BUFFER: Final = int(CqeFlag.BUFFER)
_F_MORE: Final = int(CqeFlag.MORE)
_F_NOTIF: Final = int(CqeFlag.NOTIF)

# What a kernel answers for an operation that it was asked to stop.
CANCELLED: Final = (-errno.ECANCELED, -errno.EINTR, -512, -513, -514, -516)


class Sqe:
    """The fields of an operation's SQE, by name."""

    def __init__(self, operation: Operation[object]) -> None:
        (
            self.opcode, self.sqe_flags, self.ioprio, self.fd, self.off, self.addr, self.len,
            self.op_flags, self.buf_index, self.splice_fd_in, self.addr3,
        ) = operation.sqe  # fmt: skip


@dataclass
class File:
    """A file with an fd: the data that can be received, and how much can be sent."""

    fd: int
    incoming: bytearray = field(default_factory=bytearray)
    outgoing: bytearray = field(default_factory=bytearray)
    connections: int = 0
    room: int = 0


@dataclass(eq=False)
class InKernel:
    """An operation that the kernel has taken."""

    operation: Operation[object]
    sqe: Sqe
    user_data: int
    file: File
    cancelled: bool = False
    notify: bool = False  # zero copy: the result was given, the notification was not yet


class SimulatedBuffers:
    """A buffer group, like `BufferPool`."""

    group = 0

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.free = deque(range(count))
        self.memory = [b""] * count

    def take(self, res: int, flags: int) -> bytes:
        """Return a copy of the data of a completion, and return its buffer to the group."""
        data = self.memory[flags >> CQE_BUFFER_SHIFT]
        assert len(data) == res
        self.give_back(flags)
        return data

    def failed(self, _res: int, flags: int) -> None:
        """Return the buffer of a failed completion to the group, if it has one."""
        self.give_back(flags)

    def give_back(self, flags: int) -> None:
        """Return the buffer of a completion to the group, if it has one."""
        if flags & _F_BUFFER:
            number = flags >> CQE_BUFFER_SHIFT
            assert number not in self.free
            self.free.append(number)


class SimulatedKernel:
    """Decides at random what happens to the operations of one ring.

    Args:
      random: Makes all choices.
      entries: The size of the SQ.
      completion_entries: The size of the CQ. Further completions overflow. While there are any, no
        SQE is taken, as before Linux 5.19.
      reap_max: The maximum number of completions that one call returns.
    """

    def __init__(
        self,
        random: random.Random,
        *,
        entries: int = 4,
        completion_entries: int = 4,
        reap_max: int = 3,
    ) -> None:
        self.random = random
        self.entries = entries
        self.completion_entries = completion_entries
        self.reap_max = reap_max
        self.pushed: deque[tuple[Operation[object], int]] = deque()
        self.in_flight: dict[int, InKernel] = {}
        self.completions: deque[Completion] = deque()
        self.overflow: deque[Completion] = deque()
        self.files: dict[int, File] = {}
        self.buffers = SimulatedBuffers(2, 8)
        self.pinned: dict[int, bytearray] = {}  # id of an operation: what it points to
        self.fds: set[int] = set()  # delivered to the manager
        self.submitted = 0
        self.turns = 0
        self._next_fd = 1_000_000  # no fd of this process

    # ---- The rest of the world -------------------------------------------------------------

    def new_fd(self) -> int:
        self._next_fd += 1
        return self._next_fd

    def open(self, fd: int) -> File:
        assert fd not in self.files
        self.files[fd] = File(fd)
        return self.files[fd]

    def close(self, fd: int) -> None:
        """Close a file. From now on another file may get its fd."""
        del self.files[fd]
        for operation, _ in self.pushed:
            assert operation.fd != fd, "an SQE would act on the next file with this fd"

    def complete_some(self) -> None:
        """Complete, in any order, some of the operations that can be."""
        ready = [taken for taken in self.in_flight.values() if self._can_end(taken)]
        for taken in self.random.sample(ready, self.random.randint(0, len(ready))):
            self._complete(taken)

    def complete_all(self) -> None:
        """Complete all operations that can be, or were cancelled."""
        for taken in list(self.in_flight.values()):
            if self._can_end(taken):
                self._complete(taken)

    # ---- Submission ------------------------------------------------------------------------

    def submit(self) -> None:
        """Take the SQEs, unless completions wait for room."""
        while self.pushed and not self.overflow:
            self._take(*self.pushed.popleft())

    def _take(self, operation: Operation[object], user_data: int) -> None:
        self.submitted += 1
        sqe = Sqe(operation)
        if sqe.opcode == Opcode.ASYNC_CANCEL:
            assert not isinstance(sqe.addr, bytes)
            self._cancel(int(ffi.cast("uintptr_t", sqe.addr)), user_data)
            return
        file = self.files.get(sqe.fd) if sqe.opcode in _EFFECTS else File(sqe.fd)
        if file is None:
            self.post(user_data, -errno.EBADF)
            return
        self.in_flight[user_data] = taken = InKernel(operation, sqe, user_data, file)
        if self._can_succeed(taken) and self.random.random() < 0.5:
            self._complete(taken)
        elif sqe.opcode == Opcode.SEND and sqe.op_flags & _DONTWAIT:
            self._end(taken, -errno.EAGAIN)

    def _cancel(self, target: int, user_data: int) -> None:
        taken = self.in_flight.get(target)
        if taken is None or taken.notify:
            self.post(user_data, -errno.ENOENT)
        elif self.random.random() < 0.5:  # it waits: that ends now
            self._end(taken, -errno.ECANCELED)
            self.post(user_data, self.random.randint(0, 1))
        else:  # it runs: it may be interrupted, or succeed
            taken.cancelled = True
            self.post(user_data, -errno.EALREADY)

    # ---- Completion ------------------------------------------------------------------------

    def post(self, user_data: int, res: int, flags: int = 0) -> None:
        """Put a completion into the CQ, or into the overflow list."""
        full = self.overflow or len(self.completions) >= self.completion_entries
        (self.overflow if full else self.completions).append((user_data, res, flags))

    def flush_overflow(self) -> None:
        while self.overflow and len(self.completions) < self.completion_entries:
            self.completions.append(self.overflow.popleft())

    def _can_end(self, taken: InKernel) -> bool:
        return taken.notify or taken.cancelled or self._can_succeed(taken)

    def _can_succeed(self, taken: InKernel) -> bool:
        match taken.sqe.opcode:
            case Opcode.RECV:
                return bool(taken.file.incoming)
            case Opcode.SEND | Opcode.SEND_ZC:
                return taken.file.room > 0
            case Opcode.ACCEPT:
                return taken.file.connections > 0
            case Opcode.POLL_ADD:  # the manager's own, on an epoll that is real
                return bool(select.select([taken.sqe.fd], [], [], 0)[0])
            case _:
                return True

    def _complete(self, taken: InKernel) -> None:
        self.check_pins()
        if taken.notify:
            self._end(taken, 0, _F_NOTIF)
        elif taken.cancelled and (not self._can_succeed(taken) or self.random.random() < 0.7):
            self._end(taken, self.random.choice(CANCELLED))
        elif taken.sqe.opcode in _EFFECTS and self.random.random() < 0.1:
            self._fail(taken)
        else:
            _EFFECTS.get(taken.sqe.opcode, SimulatedKernel._succeed)(self, taken)

    def _end(self, taken: InKernel, res: int, flags: int = 0) -> None:
        del self.in_flight[taken.user_data]
        self.post(taken.user_data, res, flags)

    def _fail(self, taken: InKernel) -> None:
        flags = 0
        if taken.sqe.sqe_flags & SqeFlag.BUFFER_SELECT and self.buffers.free:
            flags = _F_BUFFER | self.buffers.free.popleft() << CQE_BUFFER_SHIFT
        self._end(taken, -errno.EIO, flags)

    def _succeed(self, taken: InKernel) -> None:
        if taken.operation.on_cqe_more is not None:
            for _ in range(self.random.randint(0, 2)):
                self.post(taken.user_data, 1, _F_MORE)
        self._end(taken, 0)

    def _receive(self, taken: InKernel) -> None:
        sqe, incoming = taken.sqe, taken.file.incoming
        selects = bool(sqe.sqe_flags & SqeFlag.BUFFER_SELECT)
        if selects and not self.buffers.free:
            self._end(taken, -errno.ENOBUFS)
            return
        size = min(len(incoming), sqe.len or len(incoming))
        size = min(size, self.buffers.size) if selects else size
        size = self.random.randint(1, size)
        data = bytes(incoming[:size])
        del incoming[:size]
        if selects:
            number = self.buffers.free.popleft()
            self.buffers.memory[number] = data
            self._shoot(taken, size, _F_BUFFER | number << CQE_BUFFER_SHIFT)
        else:
            _memory(sqe)[:size] = data
            self._end(taken, size)

    def _send(self, taken: InKernel) -> None:
        sqe, file = taken.sqe, taken.file
        size = self.random.randint(1, min(sqe.len, file.room))
        file.room -= size
        file.outgoing += _memory(sqe)[:size]
        if sqe.opcode == Opcode.SEND_ZC:
            taken.notify = True
            self.post(taken.user_data, size, _F_MORE)
        else:
            self._end(taken, size)

    def _accept(self, taken: InKernel) -> None:
        taken.file.connections -= 1
        fd = self.new_fd()
        self.fds.add(fd)
        self._shoot(taken, fd)

    def _shoot(self, taken: InKernel, res: int, flags: int = 0) -> None:
        """Post a completion. A multishot operation usually goes on."""
        if taken.operation.on_cqe_more is not None and self.random.random() < 0.7:
            self.post(taken.user_data, res, flags | _F_MORE)
        else:
            self._end(taken, res, flags)

    def check_pins(self) -> None:
        """Fail if the memory of an operation in flight could move."""
        taken = [each.operation for each in self.in_flight.values()]
        for operation in (*taken, *(pushed for pushed, _ in self.pushed)):
            if id(operation) in self.pinned:
                with pytest.raises(BufferError):
                    self.pinned[id(operation)].append(0)


_DONTWAIT: Final = 0x40  # MSG_DONTWAIT

# What acts on a file. Everything else succeeds at any time, with 0.
_EFFECTS: Final[dict[int, Callable[[SimulatedKernel, InKernel], None]]] = {
    Opcode.RECV: SimulatedKernel._receive,
    Opcode.SEND: SimulatedKernel._send,
    Opcode.SEND_ZC: SimulatedKernel._send,
    Opcode.ACCEPT: SimulatedKernel._accept,
}


def _memory(sqe: Sqe) -> Any:
    return sqe.addr if isinstance(sqe.addr, bytes) else ffi.buffer(sqe.addr, sqe.len)


class SimulatedRing:
    """Replaces `Ring`, on a `SimulatedKernel`."""

    setup_flags = SetupFlag(0)
    features = FeatureFlag(0)
    refused: tuple[str, ...] = ()
    worker_limits: Mapping[str, int] = {}
    supported = frozenset(Opcode)
    fd = -1
    credentials = None

    def __init__(self, kernel: SimulatedKernel, before_sleep: Callable[[], None]) -> None:
        self._kernel = kernel
        self._before_sleep = before_sleep
        self._user_data: set[int] = set()
        self.entries = kernel.entries
        self.completion_entries = kernel.completion_entries
        self.closed = False

    @property
    def usable(self) -> bool:
        return not self.closed

    def register_fd(self) -> None:
        pass

    @property
    def enters(self) -> int:
        return self._kernel.turns

    @property
    def submitted(self) -> int:
        return self._kernel.submitted

    @property
    def unsubmitted(self) -> int:
        return len(self._kernel.pushed)

    def forget_dup_fd(self) -> None:
        pass

    def unsubmitted_for(self, _fd: int) -> bool:
        return self.unsubmitted > 0

    @property
    def more_to_fetch(self) -> bool:
        return False

    def push(self, operation: Operation[object], user_data: int) -> bool:
        assert not self.closed
        if len(self._kernel.pushed) >= self.entries:
            if self._kernel.random.random() < 0.8:  # else a signal ends the wait for room
                self._kernel.submit()
            if len(self._kernel.pushed) >= self.entries:
                return False
        if user_data > RESERVED_MAX:
            assert user_data not in self._user_data
            self._user_data.add(user_data)
        self._kernel.pushed.append((operation, user_data))
        return True

    def flush(self) -> None:
        assert not self.closed
        self._kernel.submit()

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        assert not self.closed
        kernel = self._kernel
        kernel.turns += 1
        kernel.submit()
        kernel.complete_some()
        if kernel.random.random() < 0.1:
            return None  # a signal
        reaped: list[Completion] = []
        while kernel.completions and len(reaped) < kernel.reap_max:
            reaped.append(kernel.completions.popleft())
            kernel.flush_overflow()
        if not reaped and timeout > 0:
            self._before_sleep()
        return reaped

    def close(self) -> None:
        assert not self._kernel.in_flight, "closing stops nobody from writing into memory"
        assert not self._kernel.pushed
        self.closed = True


# What a manager uses again and again: for its cancels, and for its watch.
RESERVED_MAX: Final = 1
