"""A ring for the I/O manager alone, which answers as a test says."""

from __future__ import annotations

import errno
from collections import deque
from random import Random
from typing import TYPE_CHECKING

import pytest
from simulated_ring import SimulatedKernel, SimulatedRing

from trio_uring._engine._in_flight import InFlight
from trio_uring.lowlevel import operations

if TYPE_CHECKING:
    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._engine._ring import Completion
    from trio_uring._operations import Operation

# The timeout of a wait that must not be made.
LONG = 3600.0


class ScriptedRing(SimulatedRing):
    """A ring that refuses to push, to submit or to sleep for a given number of times."""

    def __init__(self) -> None:
        super().__init__(SimulatedKernel(Random(0), entries=64), self.slept)
        self.refuse_to_push = 0
        self.refuse_to_submit = 0
        self.interrupted = 0  # how often a signal ends a wait
        # What calls return, before `completions`.
        self.late: list[list[Completion] | None] = []
        self.many: deque[int | OSError] = deque()  # how far calls of push_many get
        self.more = 0  # for how many more calls there is work
        self.allowed = True
        self.registered = False
        self.timeouts: list[float] = []
        self.completions: deque[Completion] = deque()

    def slept(self) -> None:
        pytest.fail("it slept")

    def push(self, operation: Operation[object], user_data: int) -> bool:
        if self.refuse_to_push:
            self.refuse_to_push -= 1
            return False
        return super().push(operation, user_data)

    @property
    def more_to_fetch(self) -> bool:
        self.more -= 1
        return self.more >= 0

    def dup_fd(self) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def register_fd(self) -> None:
        self.registered = True

    def allows(self, _opcode: int) -> bool:
        return self.allowed

    def push_many(self, *_args: object) -> int:
        result = self.many.popleft()
        if isinstance(result, OSError):
            raise result
        return result

    def flush(self) -> None:
        if self.refuse_to_submit:
            self.refuse_to_submit -= 1
        else:
            self._kernel.pushed.clear()

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        self.timeouts.append(timeout)
        self.flush()
        if self.late:
            return self.late.pop(0)
        if self.interrupted:
            self.interrupted -= 1
            return None
        found, self.completions = list(self.completions), deque()
        return found


def close(manager: UringIOManager, ring: ScriptedRing) -> None:
    manager._entries.clear()
    ring.close = lambda: None  # type: ignore[method-assign]
    manager.close()


def in_flight(manager: UringIOManager, fd: int = 1) -> InFlight:
    entry = InFlight(manager, operations.recv(fd, bytearray(1)), user_data=100)
    manager._entries[entry.user_data] = entry
    manager.fd_waiters.register(entry)
    return entry
