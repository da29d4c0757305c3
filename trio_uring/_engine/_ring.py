"""`Ring`: one io_uring, from set-up to close. It knows the C core and no task.

All of it but `Ring.close` is for the thread that made it. Another thread, a forked child, and
calls that come after `Ring.close` are refused with an exception; none reaches freed memory.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from trio_uring._errors import ring_error, setup_error
from trio_uring._kernel import ffi, lib
from trio_uring._kernel.uapi import (
    FeatureFlag,
    Opcode,
    RegisterOpcode,
    RestrictionOpcode as Restriction,
    SetupFlag,
)

from ._ring_setup import SetupLog, note_close, open_ring

if TYPE_CHECKING:
    from trio_uring._config import RingConfig
    from trio_uring._kernel import CData
    from trio_uring._kernel._native import Loop
    from trio_uring._operations import Operation

Completion = tuple[int, int, int]  # user_data, res, flags

# CQEs copied out in one turn; the rest wait for the next. 16 KiB. Half would do for any
# program that was measured, and double gains nothing.
REAP_MAX: Final = 1024

# struct statx of linux/stat.h, with room for fields to come.
STATX_SIZE: Final = 256

_CQE = struct.Struct("=QiI")
_RESULT = struct.Struct("=iI")  # of an operation in a batch

# struct io_uring_restriction: what kind of rule, and for which opcode, or for which flags.
_RESTRICTION = struct.Struct("=HB13x")
_ALWAYS_ALLOWED: Final = frozenset({"NOP", "POLL_ADD", "ASYNC_CANCEL"})
_ALL_SQE_FLAGS: Final = 0x7F
# What rings are asked for once they run.
_REGISTRATIONS: Final = (
    RegisterOpcode.EVENTFD,
    RegisterOpcode.UNREGISTER_EVENTFD,
    RegisterOpcode.RING_FDS,
    RegisterOpcode.UNREGISTER_RING_FDS,
    RegisterOpcode.PBUF_RING,
    RegisterOpcode.UNREGISTER_PBUF_RING,
    RegisterOpcode.BUFFERS2,
    RegisterOpcode.BUFFERS_UPDATE,
)

_OPCODES_MAX: Final = 256  # an opcode is one byte


class Ring:
    """A ring, set up as well as this kernel and these limits allow.

    Args:
      config: Sizes and flags asked for.
      register_fd: Register the ring's own fd, which makes each enter cheaper. Not for a
        ring whose thread may end before it: the registration keeps the ring alive.

    Raises:
      RingUnavailableError: no ring can be had; names the cause and the remedy.

    Source: io_uring_setup(2).
    """

    def __init__(self, config: RingConfig, *, register_fd: bool = True) -> None:
        attempts = SetupLog()
        self._ring = open_ring(config, attempts)
        self.setup_flags: SetupFlag = (
            SetupFlag(lib.ring_setup_flags(self._ring)) & ~SetupFlag.R_DISABLED
        )
        self.features: FeatureFlag = FeatureFlag(lib.ring_features(self._ring))
        self.entries: int = lib.ring_sq_entries(self._ring)
        self.completion_entries: int = lib.ring_cq_entries(self._ring)
        self.closed: bool = False
        self.worker_limits: dict[str, int] = {}  # as the kernel has them
        self.native: Loop | None = None  # fetches completions, if it is in use
        self._cqes = ffi.new("struct io_uring_cqe[]", REAP_MAX)
        self._cqe_bytes = memoryview(ffi.buffer(self._cqes))
        try:
            self.supported: frozenset[int] = self._probe()
            self._limit_workers(config, attempts)
            self._allowed = _allowed_opcodes(config)
            if self._allowed is not None:
                self._restrict(self._allowed & self.supported)
        except BaseException:
            self.close()
            raise
        self._attempts = attempts
        if register_fd:
            self.register_fd()

    def _probe(self) -> frozenset[int]:
        size = ffi.sizeof("struct io_uring_probe")
        size += _OPCODES_MAX * ffi.sizeof("struct io_uring_probe_op")
        memory = ffi.new("char[]", size)
        probe = ffi.cast("struct io_uring_probe *", memory)
        result = lib.ring_register(self._ring, RegisterOpcode.PROBE, probe, _OPCODES_MAX)
        if result < 0:
            raise setup_error(result, "asking the kernel for its opcodes (IORING_REGISTER_PROBE)")
        supported = 1  # IO_URING_OP_SUPPORTED
        return frozenset(
            probe.ops[index].op
            for index in range(probe.ops_len)
            if probe.ops[index].flags & supported
        )

    def _limit_workers(self, config: RingConfig, attempts: SetupLog) -> None:
        # Without, the kernel would start tens of thousands for operations that can block for
        # ever. Linux 5.15; older kernels keep their default, and the statistics say so.
        workers = ffi.new("unsigned int[2]")
        workers[0] = config.bounded_workers
        workers[1] = config.unbounded_workers
        result = lib.ring_register(self._ring, RegisterOpcode.IOWQ_MAX_WORKERS, workers, 2)
        if result < 0:
            attempts.refused("IOWQ_MAX_WORKERS", result)
            return
        # The kernel cuts what RLIMIT_NPROC forbids; asked with zeros, it changes nothing.
        workers[0] = workers[1] = 0
        lib.ring_register(self._ring, RegisterOpcode.IOWQ_MAX_WORKERS, workers, 2)
        self.worker_limits = {
            "bounded_workers": int(workers[0]),
            "unbounded_workers": int(workers[1]),
        }

    def _restrict(self, opcodes: frozenset[int]) -> None:
        # Until the ring is enabled it takes no operation, and from then on only these. What is
        # not named is forbidden, so flags and registrations that harm nobody are named, too.
        rules = [_RESTRICTION.pack(Restriction.SQE_OP, opcode) for opcode in sorted(opcodes)]
        rules.append(_RESTRICTION.pack(Restriction.SQE_FLAGS_ALLOWED, _ALL_SQE_FLAGS))
        rules += (_RESTRICTION.pack(Restriction.REGISTER_OP, op) for op in _REGISTRATIONS)
        for opcode, argument, count in (
            (RegisterOpcode.RESTRICTIONS, b"".join(rules), len(rules)),
            (RegisterOpcode.ENABLE_RINGS, ffi.NULL, 0),
        ):
            result = lib.ring_register(self._ring, opcode, argument, count)  # type: ignore[arg-type]
            if result < 0:
                raise setup_error(result, "allowed_operations (IORING_REGISTER_RESTRICTIONS)")

    def allows(self, opcode: int) -> bool:
        """Whether the settings allow *opcode*."""
        return self._allowed is None or opcode in self._allowed

    def offers(self, opcode: int) -> bool:
        """Whether the kernel knows *opcode*, and the settings allow it."""
        return opcode in self.supported and self.allows(opcode)

    def register_fd(self) -> None:
        """Register the ring's own fd, which makes each enter cheaper.

        Not for a ring whose thread may end before it: the registration keeps the ring alive.
        """
        result = lib.ring_register_ring_fd(self._ring)
        if result < 0:
            self._attempts.refused("REGISTER_RING_FDS", result)

    @property
    def refused(self) -> tuple[str, ...]:
        """What was asked of the kernel and refused."""
        return tuple(self._attempts.steps)

    def note_refused(self, what: str, error: OSError) -> None:
        """Have the statistics say, once, that *what* is not in use."""
        if not any(step.startswith(f"{what}: ") for step in self._attempts.steps):
            self._attempts.refused(what, -(error.errno or 0))

    @property
    def address(self) -> int:
        """Where the C structure is, for the native engine."""
        return int(ffi.cast("uintptr_t", self._ring))

    @property
    def fd(self) -> int:
        """The ring's file descriptor; -1 once it is closed."""
        return lib.ring_fd(self._ring)

    def dup_fd(self) -> int:
        """Return a duplicate of the fd, which a forked child closes until `forget_dup_fd`.

        Raises:
          OSError: ``EMFILE``.
        """
        fd = lib.ring_dup(self._ring)
        if fd < 0:
            raise ring_error(fd)
        return fd

    def forget_dup_fd(self) -> None:
        """Leave the duplicate to its users, who close it."""
        lib.ring_forget_dup(self._ring)

    @property
    def usable(self) -> bool:
        """Whether it takes calls: it is open, of this process, and of the calling thread."""
        return lib.ring_refuses(self._ring) == 0

    @property
    def enters(self) -> int:
        """How many times io_uring_enter(2) was called."""
        return lib.ring_enters(self._ring)

    @property
    def submitted(self) -> int:
        """How many SQEs the kernel has taken."""
        return lib.ring_submitted(self._ring)

    @property
    def unsubmitted(self) -> int:
        """How many SQEs were pushed and not taken yet."""
        return lib.ring_unsubmitted(self._ring)

    @property
    def more_to_fetch(self) -> bool:
        """Whether the kernel says that it has more completions, or work for this thread."""
        return lib.ring_more_to_fetch(self._ring) != 0

    def unsubmitted_for(self, fd: int) -> bool:
        """Whether an SQE that was pushed and not taken yet may act on *fd*."""
        return lib.ring_unsubmitted_for(self._ring, fd) != 0

    def push(self, operation: Operation[object], user_data: int) -> bool:
        """Put *operation* in the SQ; False if there is no room before CQEs are reaped.

        Raises:
          ForkedRingError: in a child of the process that made the ring.
          RuntimeError: in another thread, or the ring is closed.
        """
        # One C call, because this line runs once per operation: through cffi, filling the
        # SQE field by field costs more than twice as much.
        result = lib.ring_push(self._ring, user_data, *operation.sqe)
        if result == 0:
            return True
        if result == -errno.EAGAIN:
            return False
        raise ring_error(result)

    def push_many(self, fields: CData, start: int, end: int, user_data: int) -> int:
        """Put operations *start* to *end* of an array in the SQ, under *user_data* + index.

        Returns:
          The index of the first for which there is no room before CQEs are reaped.

        Raises:
          OSError: ``EINVAL``: a linked chain is longer than the SQ.
          ForkedRingError: in a child of the process that made the ring.
          RuntimeError: in another thread, or the ring is closed.
        """
        result = lib.ring_push_many(self._ring, fields, start, end, user_data)
        if result < 0:
            raise ring_error(result)
        return result

    def open_batch(self, count: int) -> tuple[int, int]:
        """Begin a batch: *count* operations whose completions `submit_and_wait` tells as one.

        Returns:
          The batch's number, which is the ``res`` of that completion; and the user_data for
          its operations.
        """
        result = lib.batch_open(self._ring, count)
        if result < 0:
            raise ring_error(result)
        return result, lib.batch_user_data(result)

    def close_batch(self, batch: int, count: int) -> list[tuple[int, int]]:
        """End a batch that is done; returns ``res`` and ``flags`` of each operation."""
        results = ffi.buffer(lib.batch_results(self._ring, batch), count * _RESULT.size)
        try:
            return list(_RESULT.iter_unpack(results))
        finally:
            lib.batch_close(self._ring, batch)

    def flush(self) -> None:
        """Submit what was pushed, and let cancelled operations let go of their files, now."""
        result = lib.ring_flush(self._ring)
        # EBUSY, EAGAIN: the kernel takes no more before completions are reaped. EINTR: a signal.
        if result < 0 and -result not in (errno.EBUSY, errno.EAGAIN, errno.EINTR):
            raise ring_error(result)

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        """Submit what was pushed, wait, and return the completions.

        Args:
          timeout: Seconds to wait for one completion; 0 to only look.

        Returns:
          At most `REAP_MAX` completions; an empty list only if the time ran out; None if a
          signal or the like ended the wait.
        """
        if self.native is not None:
            found = self.native.turn(timeout)
            if isinstance(found, list):
                return found
            count = found
        else:
            count = lib.ring_turn(self._ring, timeout, self._cqes, REAP_MAX)
        if count > 0:
            return list(_CQE.iter_unpack(self._cqe_bytes[: count * _CQE.size]))
        if count == 0:
            return []
        if count == -errno.EINTR:
            return None
        raise ring_error(count)

    def register(self, opcode: int, argument: object, count: int) -> int:
        """Call io_uring_register(2) with a C argument; returns its result.

        Raises:
          OSError: the kernel refused.
        """
        result = lib.ring_register(self._ring, opcode, argument, count)  # type: ignore[arg-type]
        if result < 0:
            raise ring_error(result)
        return result

    def register_eventfd(self, eventfd: int) -> None:
        """Have the kernel write to *eventfd* when a completion is there to be fetched."""
        argument = ffi.new("int[1]")
        argument[0] = eventfd
        self.register(RegisterOpcode.EVENTFD, argument, 1)

    def open_buffer_ring(
        self, group: int, count: int, size: int, memory: CData, *, incremental: bool = False
    ) -> CData:
        """Register *count* buffers of *size* bytes each as *group*; for `BufferPool`."""
        out = ffi.new("struct buffer_ring *[1]")
        result = lib.buffer_ring_open(out, self._ring, group, count, size, memory, incremental)
        if result < 0:
            raise ring_error(result)
        return out[0]

    def close(self) -> None:
        """Unmap and close. The caller has drained it: closing does not stop the kernel's writes."""
        if not self.closed:
            self.closed = True
            lib.ring_close(self._ring)
            note_close()


def engine_api_address() -> int:
    """Return where the core's functions for the native engine are; see engine_api.h."""
    return int(ffi.cast("uintptr_t", lib.engine_api()))


def open_cached(path: bytes, flags: int) -> int | None:
    """Open an existing file if that needs no waiting; None if that cannot be told, or failed.

    What an ``openat`` operation does first, without the turn of the loop. The fd is not
    inherited by child processes. *path* must not have a zero in it.

    Since: Linux 5.12; None before. Source: openat2(2).
    """
    fd = lib.open_cached(path, flags)
    return fd if fd >= 0 else None


def stat_cached(path: bytes, flags: int) -> bytearray | None:
    """Return what statx(2) says of an existing file, if that needs no waiting; None if not.

    As `open_cached`. *flags*: `os.O_NOFOLLOW`, to ask for the status of a symbolic link itself.
    No server is asked: of what is not on a disk it may be out of date.

    Returns:
      A ``struct statx``.

    Source: openat2(2), statx(2).
    """
    status = bytearray(STATX_SIZE)
    return status if lib.stat_cached(path, flags, ffi.from_buffer("char[]", status)) == 0 else None


# What trio.SocketStream sets: bytes that are not sent yet, above which a socket is not writable.
_NOTSENT_LOWAT: Final = 2**14


def accept_stream(listener: int, *, poll_first: bool) -> int | None:
    """Accept a connection without waiting, and set the options that `trio.SocketStream` sets.

    Args:
      listener: The fd of a listening socket.
      poll_first: Ask poll(2) first, which is cheaper where there is nothing to accept.

    Returns:
      The fd of the connection, non-blocking and not inherited by child processes; None if there
      is no connection.

    Raises:
      OSError: as for accept(2).

    Source: accept4(2), tcp(7).
    """
    fd = lib.accept_stream(listener, poll_first, _NOTSENT_LOWAT)
    if fd >= 0:
        return fd
    if fd != -errno.EAGAIN:
        raise ring_error(fd)
    return None


def _allowed_opcodes(config: RingConfig) -> frozenset[int] | None:
    if config.allowed_operations is None:
        return None
    return frozenset(Opcode[name] for name in config.allowed_operations | _ALWAYS_ALLOWED)
