"""`RingConfig`: sizes and flags of a ring, validated, with the reason for each default."""

import attrs

from ._kernel.uapi import Opcode


def _check_type(name: str, value: object, *types: type) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join(type_.__name__ for type_ in types)
        raise TypeError(f"{name} must be {expected}, not {type(value).__name__}")


def _check(name: str, value: int, low: int, high: int) -> None:
    _check_type(name, value, int)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, not {value}")


@attrs.frozen(kw_only=True)
class SQPoll:
    """Ask for a kernel thread that polls the submission queue (``IORING_SETUP_SQPOLL``).

    Submitting then needs no system call while the thread is awake. The price: the thread
    burns a whole core until it has been idle for *idle* seconds, and the completions of a
    program that waits for them arrive later, not earlier. Off unless asked for.

    Beware: the thread works with the privileges that the process had when the run began. A
    program that drops them later (setuid(2)) still opens files with the old ones.

    Args:
      idle: Seconds without work after which the thread goes to sleep; at least 0.001.
      cpu: The CPU to pin the thread to, or None for any.

    Source: io_uring_setup(2).
    """

    idle: float = 0.05
    cpu: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_type("idle", self.idle, int, float)
        if not 0.001 <= self.idle <= 3600:
            raise ValueError(f"idle must be between 0.001 and 3600 seconds, not {self.idle}")
        if self.cpu is not None:
            _check("cpu", self.cpu, 0, 65535)


@attrs.frozen(kw_only=True)
class RingConfig:
    """How a run's ring is set up.

    Args:
      entries: Places in the submission queue, rounded up to a power of two by the kernel.
        A full queue is submitted early and costs one more system call, nothing else, so
        half or double of the default differ little; memory is 64 bytes an entry, and
        counts against ``RLIMIT_MEMLOCK`` for unprivileged users. Where that limit is too
        low the ring is made smaller, down to 8 entries, before the run gives up on it.
      completion_entries: Places in the completion queue, at least *entries*, 16 bytes each.
        Completions beyond it wait in the kernel and are not lost.
      bounded_workers: At most this many kernel threads for operations on files, which can
        block for a bounded time. One inode's writes are serial anyway.
      unbounded_workers: At most this many kernel threads for operations that can block for
        ever, such as opening a FIFO. The kernel's own default is tens of thousands.
      max_file_operations: At most this many operations on files, or in kernel workers, are
        in flight at once; more wait in line, first come first served. Waits on sockets
        never count.
      receive_buffers: Buffers of 64 KiB, shared by all sockets and pipes of the run, from
        which the kernel takes one when data is there: an idle connection holds none. A
        power of two. Only buffers that were used occupy memory. If more receives complete
        in one turn of the loop, the rest try again in the next.
      turn_budget: Seconds for which one turn of the loop may go on with calls that are done without
        waiting, such as accepting connections that are there already, before such a call lets
        other tasks run. At least 0, where each such call does, as on plain Trio. It never
        applies to `trio.lowlevel.checkpoint` and `trio.sleep`, nor under another clock than
        Trio's own or an instrument.
      sqpoll: A kernel thread polls the submission queue; see `SQPoll`. Off by default.
      allowed_operations: The operations that the run may perform, by their names in the kernel:
        ``frozenset({"RECV", "SEND"})``; the kernel refuses all others, with `PermissionError`,
        until the ring is closed (``IORING_REGISTER_RESTRICTIONS``). ``NOP``, ``POLL_ADD`` and
        ``ASYNC_CANCEL``, which every run needs, are always among them. None allows all.
      require: If this system cannot give a ring, raise `RingUnavailableError` instead of
        falling back to Trio's own I/O.

    Raises:
      TypeError, ValueError: an argument of the wrong type, or out of range.
    """

    entries: int = 256
    completion_entries: int = 4096
    bounded_workers: int = 8
    unbounded_workers: int = 32
    max_file_operations: int = 64
    receive_buffers: int = 128
    turn_budget: float = 0.0001
    sqpoll: SQPoll | None = None
    allowed_operations: frozenset[str] | None = None
    require: bool = False

    def __attrs_post_init__(self) -> None:
        _check("entries", self.entries, 1, 32768)
        _check("completion_entries", self.completion_entries, self.entries, 65536)
        _check("bounded_workers", self.bounded_workers, 1, 4096)
        _check("unbounded_workers", self.unbounded_workers, 1, 65536)
        _check("max_file_operations", self.max_file_operations, 1, 32768)
        _check("receive_buffers", self.receive_buffers, 1, 32768)
        if self.receive_buffers & (self.receive_buffers - 1):
            raise ValueError(f"receive_buffers must be a power of two, not {self.receive_buffers}")
        _check_type("turn_budget", self.turn_budget, int, float)
        if not 0 <= self.turn_budget <= 1:
            raise ValueError(f"turn_budget must be between 0 and 1 second, not {self.turn_budget}")
        if self.sqpoll is not None:
            _check_type("sqpoll", self.sqpoll, SQPoll)
        if self.allowed_operations is not None:
            _check_type("allowed_operations", self.allowed_operations, frozenset)
            if unknown := self.allowed_operations - Opcode.__members__.keys():
                names = ", ".join(sorted(map(repr, unknown)))
                raise ValueError(f"allowed_operations has unknown names: {names}")
        _check_type("require", self.require, bool)
