"""`RingConfig`: sizes and flags of a ring, validated, with the reason for each default."""

import attrs

from ._arguments import check_int, check_type
from ._kernel.uapi import Opcode


@attrs.frozen(kw_only=True)
class SQPoll:
    """Have a kernel thread poll the submission queue (``IORING_SETUP_SQPOLL``).

    Submitting then needs no system call while the thread is awake. But the thread occupies a whole
    CPU core until it has been idle for *idle* seconds, and the completions of a program that waits
    for them arrive later. It is off by default.

    Warning: the thread has the privileges that the process had when the run began. If the process
    changes its user or groups later (setuid(2)), operations on paths raise `PermissionError`, since
    they would have the old ones. If it drops capabilities, they do have the old ones.

    Args:
      idle: After how many seconds without work the thread goes to sleep; at least 0.001.
      cpu: The CPU to pin the thread to; None for any.

    Source: io_uring_setup(2).
    """

    idle: float = 0.05
    cpu: int | None = None

    def __attrs_post_init__(self) -> None:
        check_type("idle", self.idle, (int, float), "a number of seconds")
        if not 0.001 <= self.idle <= 3600:
            raise ValueError(f"idle must be between 0.001 and 3600 seconds, not {self.idle}")
        if self.cpu is not None:
            check_int("cpu", self.cpu, 0, 65535)


@attrs.frozen(kw_only=True)
class RingConfig:
    """How a run's ring is set up.

    Args:
      entries: The size of the submission queue, which the kernel rounds up to a power of two. A
        full queue is submitted early, which costs one more system call, so half or double the
        default makes little difference. An entry takes 64 bytes. For unprivileged users they count
        against ``RLIMIT_MEMLOCK``. If that limit is too low, smaller rings are tried, down to 8
        entries.
      completion_entries: The size of the completion queue, at least *entries*. An entry takes 16
        bytes. If it is full, further completions wait in the kernel. None is lost.
      bounded_workers: The maximum number of kernel workers for operations on files, which block for
        a bounded time. The kernel performs writes to the same file one after the other anyway.
      unbounded_workers: The maximum number of kernel workers for operations that can block
        indefinitely, such as opening a FIFO. The kernel's default is tens of thousands.
      max_file_operations: How many operations on files, or in kernel workers, are in flight at
        once. Further operations wait in FIFO order. Waits on sockets never count.
      receive_buffers: The number of provided buffers of 64 KiB, a power of two. All sockets and
        pipes of the run share them. The kernel takes one when data arrives, so an idle connection
        occupies none. Only buffers that have been used occupy memory. If more receives complete in
        one loop iteration, the rest try again in the next.
      turn_budget: Seconds, at least 0. A call that completes without waiting, such as accepting a
        connection that has arrived already, does not let other tasks run until the loop iteration
        has lasted this long. With 0, each such call lets other tasks run, as on plain Trio. It
        never applies to `trio.lowlevel.checkpoint` and `trio.sleep`, nor in runs with an
        instrument, or with another clock than Trio's default.
      sqpoll: Have a kernel thread poll the submission queue; see `SQPoll`. Off by default.
      allowed_operations: The operations that the run may perform, by the kernel's names, such as
        ``frozenset({"RECV", "SEND"})``. The kernel refuses all others until the ring is closed
        (``IORING_REGISTER_RESTRICTIONS``), and they raise `PermissionError`. ``NOP``, ``POLL_ADD``
        and ``ASYNC_CANCEL``, which every run needs, are always allowed. None allows all.
      require: Raise `RingUnavailableError` if the system cannot provide a ring, instead of falling
        back to Trio's own I/O.

    Raises:
      TypeError, ValueError: an argument has the wrong type, or is out of range.
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
        check_int("entries", self.entries, 1, 32768)
        check_int("completion_entries", self.completion_entries, 1, 65536)
        if self.completion_entries < self.entries:
            raise ValueError(
                f"completion_entries must be at least entries, which is {self.entries}, "
                f"not {self.completion_entries}"
            )
        check_int("bounded_workers", self.bounded_workers, 1, 4096)
        check_int("unbounded_workers", self.unbounded_workers, 1, 65536)
        check_int("max_file_operations", self.max_file_operations, 1, 32768)
        check_int("receive_buffers", self.receive_buffers, 1, 32768)
        if self.receive_buffers & (self.receive_buffers - 1):
            raise ValueError(
                "receive_buffers must be a power of two, such as "
                f"{1 << self.receive_buffers.bit_length()}, not {self.receive_buffers}"
            )
        check_type("turn_budget", self.turn_budget, (int, float), "a number of seconds")
        if not 0 <= self.turn_budget <= 1:
            raise ValueError(f"turn_budget must be between 0 and 1 second, not {self.turn_budget}")
        if self.sqpoll is not None:
            check_type("sqpoll", self.sqpoll, SQPoll, "None or an SQPoll, such as SQPoll()")
        if self.allowed_operations is not None:
            _check_operations(self.allowed_operations)
        check_type("require", self.require, bool, "True or False")


def _check_operations(names: frozenset[str]) -> None:
    example = 'a frozenset of names, such as frozenset({"RECV", "SEND"})'
    check_type("allowed_operations", names, frozenset, example)
    for name in names - Opcode.__members__.keys():
        known = f"{name}".upper().removeprefix("IORING_OP_")
        hint = repr(known) if known in Opcode.__members__ else "a name that follows IORING_OP_"
        raise ValueError(f"allowed_operations has an unknown name, {name!r}: write {hint}")
