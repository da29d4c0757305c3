"""`Ring`: one io_uring, from setup to close. It calls the C core and knows nothing of tasks.

All methods except `Ring.close` must be called in the thread that created the ring. Calls by another
thread, in a forked child or after `Ring.close` raise an exception; none accesses freed memory.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Final

from trio_uring._errors import operation_error, ring_error, setup_error
from trio_uring._kernel import ffi, lib, why_no_core
from trio_uring._kernel.uapi import (
    FeatureFlag,
    Opcode,
    RegisterOpcode,
    RestrictionOpcode as Restriction,
    SetupFlag,
)

from ._ring_setup import SetupLog, note_close, open_ring
from ._sqpoll import SqpollCredentials

if TYPE_CHECKING:
    from trio_uring._config import RingConfig
    from trio_uring._kernel import CData
    from trio_uring._kernel._native import Loop
    from trio_uring._operations import Operation

Completion = tuple[int, int, int]  # user_data, res, flags

# The most CQEs that one call fetches: 16 KiB. The rest are fetched by the next call. Half of it was
# enough for every program that was measured, and twice as many were no faster.
REAP_MAX: Final = 1024

_CQE = struct.Struct("=QiI")
_RESULT = struct.Struct("=iI")  # res and flags of an operation in a batch

# struct io_uring_restriction: the kind of rule, and its opcode or flags.
_RESTRICTION = struct.Struct("=HB13x")
_ALWAYS_ALLOWED: Final = frozenset({"NOP", "POLL_ADD", "ASYNC_CANCEL"})
_ALL_SQE_FLAGS: Final = 0x7F
# The registrations that are used after the ring was enabled.
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

# The opcodes of the running kernel, once a ring has asked for them: it takes a tenth of the time of
# a run that does nothing.
_supported: frozenset[int] = frozenset()


class Ring:
    """A ring, set up with as many of the requested flags and entries as the kernel allows.

    Args:
      config: The requested sizes and flags.

    Raises:
      RingUnavailableError: the kernel refuses a ring. The message has the cause and the remedy.

    Source: io_uring_setup(2).
    """

    def __init__(self, config: RingConfig) -> None:
        attempts = SetupLog()
        self._ring = open_ring(config, attempts)
        self.setup_flags: SetupFlag = (
            SetupFlag(lib.ring_setup_flags(self._ring)) & ~SetupFlag.R_DISABLED
        )
        self.features: FeatureFlag = FeatureFlag(lib.ring_features(self._ring))
        self.entries: int = lib.ring_sq_entries(self._ring)
        self.completion_entries: int = lib.ring_cq_entries(self._ring)
        self.closed: bool = False
        # The error of the enter that made the run close it, and go on without it.
        self.lost: tuple[int | None, str] | None = None
        self.credentials: SqpollCredentials | None = None  # those of the SQPOLL thread
        if config.sqpoll is not None:
            self.credentials = SqpollCredentials()
        self.worker_limits: dict[str, int] = {}  # as reported by the kernel
        self.native: Loop | None = None  # fetches the completions, unless it is None
        # What the core copies CQEs to; None while a call uses it.
        self._cqes: CData | None = None
        try:
            self.supported: frozenset[int] = _supported or self._probe()
            self._limit_workers(config, attempts)
            self._allowed = _allowed_opcodes(config)
            if self._allowed is not None:
                self._restrict(self._allowed & self.supported)
        except BaseException:
            self.close()
            raise
        self._attempts = attempts

    def _probe(self) -> frozenset[int]:
        global _supported
        probe = ffi.new("struct io_uring_probe *", {"ops": _OPCODES_MAX})
        result = lib.ring_register(self._ring, RegisterOpcode.PROBE, probe, _OPCODES_MAX)
        if result < 0:
            raise setup_error(result, "asking the kernel for its opcodes (IORING_REGISTER_PROBE)")
        supported = 1  # IO_URING_OP_SUPPORTED
        _supported = frozenset(
            probe.ops[index].op
            for index in range(probe.ops_len)
            if probe.ops[index].flags & supported
        )
        return _supported

    def _limit_workers(self, config: RingConfig, attempts: SetupLog) -> None:
        # By default the kernel starts tens of thousands of workers for operations that may block
        # indefinitely. Before Linux 5.15 that cannot be changed, and the statistics say so.
        workers = ffi.new("unsigned int[2]")
        workers[0] = config.bounded_workers
        workers[1] = config.unbounded_workers
        result = lib.ring_register(self._ring, RegisterOpcode.IOWQ_MAX_WORKERS, workers, 2)
        if result < 0:
            attempts.refused("IOWQ_MAX_WORKERS", result)
            return
        # The kernel lowers the limits to RLIMIT_NPROC. A call with zeros changes nothing and
        # returns the limits.
        workers[0] = workers[1] = 0
        lib.ring_register(self._ring, RegisterOpcode.IOWQ_MAX_WORKERS, workers, 2)
        self.worker_limits = {
            "bounded_workers": int(workers[0]),
            "unbounded_workers": int(workers[1]),
        }

    def _restrict(self, opcodes: frozenset[int]) -> None:
        # Until the ring is enabled, the kernel refuses all operations; after that, all but these.
        # Flags and registrations without a rule are refused too, so rules allow all SQE flags and
        # the registrations that we use.
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
        """Whether `RingConfig.allowed_operations` allows *opcode*."""
        return self._allowed is None or opcode in self._allowed

    def offers(self, opcode: int) -> bool:
        """Whether the kernel supports *opcode* and the configuration allows it."""
        return opcode in self.supported and self.allows(opcode)

    def register_fd(self) -> None:
        """Register the ring's own fd, which makes each enter cheaper.

        The registration keeps the ring alive, so it must not be used if the thread may end before
        the ring is closed.
        """
        result = lib.ring_register_ring_fd(self._ring)
        if result < 0:
            self._attempts.refused("REGISTER_RING_FDS", result)

    @property
    def refused(self) -> tuple[str, ...]:
        """What the kernel refused."""
        return tuple(self._attempts.steps)

    def note_refused(self, what: str, error: OSError) -> None:
        """Record once, for the statistics, that *what* was refused with *error*."""
        if not any(step.startswith(f"{what}: ") for step in self._attempts.steps):
            self._attempts.refused(what, -(error.errno or 0))

    @property
    def address(self) -> int:
        """The address of the C structure, for the native engine."""
        return int(ffi.cast("uintptr_t", self._ring))

    @property
    def fd(self) -> int:
        """The ring's file descriptor; -1 once it is closed."""
        return lib.ring_fd(self._ring)

    def dup_fd(self) -> int:
        """Return a duplicate of the fd. A forked child closes it until `forget_dup_fd` is called.

        Raises:
          OSError: ``EMFILE``.
        """
        fd = lib.ring_dup(self._ring)
        if fd < 0:
            raise ring_error(fd)
        return fd

    def forget_dup_fd(self) -> None:
        """Stop closing the duplicate of the fd in forked children. Its users close it."""
        lib.ring_forget_dup(self._ring)

    @property
    def usable(self) -> bool:
        """Whether it is open, and belongs to this process and the calling thread."""
        return lib.ring_refuses(self._ring) == 0

    @property
    def enters(self) -> int:
        """The number of calls of io_uring_enter(2)."""
        return lib.ring_enters(self._ring)

    @property
    def submitted(self) -> int:
        """The number of SQEs that the kernel has taken."""
        return lib.ring_submitted(self._ring)

    @property
    def unsubmitted(self) -> int:
        """The number of SQEs that were pushed and that the kernel has not taken yet."""
        return lib.ring_unsubmitted(self._ring)

    @property
    def more_to_fetch(self) -> bool:
        """Whether the kernel has more completions, or work to run in this thread."""
        return lib.ring_more_to_fetch(self._ring) != 0

    def unsubmitted_for(self, fd: int) -> bool:
        """Whether an unsubmitted SQE may act on *fd*."""
        return lib.ring_unsubmitted_for(self._ring, fd) != 0

    def push(self, operation: Operation[object], user_data: int) -> bool:
        """Put *operation* in the SQ. Return False if there is no room until CQEs are reaped.

        Raises:
          ForkedRingError: in a child of the process that made the ring.
          OSError: the run has lost the ring.
          RuntimeError: in another thread, or the ring is closed.
          PermissionError: an SQPOLL thread would perform it with old credentials.
          OverflowError: a number does not fit in its field.
        """
        if self.credentials is not None:
            self.credentials.check(operation)
        # This runs once per operation, so it is a single C call. Filling the SQE field by field
        # through cffi takes more than twice as long.
        result = lib.ring_push(self._ring, user_data, *operation.sqe)
        if result == 0:
            if operation.for_device:
                lib.ring_submit_early(self._ring)
            return True
        if result == -errno.EAGAIN:
            return False
        raise self._refusal(result)

    def push_many(self, fields: CData, start: int, end: int, user_data: int) -> int:
        """Put operations *start* to *end* of an array in the SQ, under *user_data* + index.

        Returns:
          The index of the first that was not pushed, because CQEs must be reaped first; or *end*.

        Raises:
          OSError: ``EINVAL``: a linked chain is longer than the SQ. Or the run has lost the ring.
          ForkedRingError: in a child of the process that made the ring.
          RuntimeError: in another thread, or the ring is closed.
        """
        result = lib.ring_push_many(self._ring, fields, start, end, user_data)
        if result < 0:
            raise self._refusal(result)
        return result

    def _refusal(self, result: int) -> Exception:
        return ring_error(result) if self.lost is None else OSError(*self.lost)

    def open_batch(self, count: int) -> tuple[int, int]:
        """Begin a batch of *count* operations, whose completions are reported as one.

        Returns:
          The batch's number, which is the ``res`` of that completion, and the user_data of the
          first operation.
        """
        result = lib.batch_open(self._ring, count)
        if result < 0:
            raise ring_error(result)
        return result, lib.batch_user_data(result)

    def close_batch(self, batch: int, count: int) -> list[tuple[int, int]]:
        """End a batch that is done; return ``res`` and ``flags`` of each operation."""
        results = ffi.buffer(lib.batch_results(self._ring, batch), count * _RESULT.size)
        try:
            return list(_RESULT.iter_unpack(results))
        finally:
            lib.batch_close(self._ring, batch)

    def flush(self) -> None:
        """Submit all pushed SQEs, and let operations that have ended release their files."""
        result = lib.ring_flush(self._ring)
        # EBUSY, EAGAIN: completions must be reaped first. EINTR: a signal.
        if result < 0 and -result not in (errno.EBUSY, errno.EAGAIN, errno.EINTR):
            raise ring_error(result)

    def submit_and_wait(self, timeout: float) -> list[Completion] | None:
        """Submit all pushed SQEs, wait for a completion, and return the completions.

        Args:
          timeout: How many seconds to wait for the first completion; 0 not to wait.

        Returns:
          At most `REAP_MAX` completions. The list is empty only if the time ran out. None if the
          wait ended for another reason, such as a signal.
        """
        if self.native is not None:
            found = self.native.submit_and_wait(timeout)
            if isinstance(found, list):
                return found
            count = found
        else:
            # A finalizer that closes a socket calls this in the middle of itself.
            cqes, self._cqes = self._cqes, None
            if cqes is None:
                cqes = ffi.new("struct io_uring_cqe[]", REAP_MAX)
            count = lib.ring_submit_and_wait(self._ring, timeout, cqes, REAP_MAX)
            if count > 0:
                found = list(_CQE.iter_unpack(ffi.buffer(cqes, count * _CQE.size)))
                self._cqes = cqes
                return found
            self._cqes = cqes
        if count == 0:
            return []
        if count == -errno.EINTR:
            return None
        raise ring_error(count)

    def register(self, opcode: int, argument: object, count: int) -> int:
        """Call io_uring_register(2) with a C argument; return its result.

        Raises:
          OSError: the kernel refuses.
        """
        result = lib.ring_register(self._ring, opcode, argument, count)  # type: ignore[arg-type]
        if result < 0:
            raise ring_error(result)
        return result

    def register_eventfd(self, eventfd: int) -> None:
        """Make the kernel write to *eventfd* when there is a completion to fetch."""
        argument = ffi.new("int[1]")
        argument[0] = eventfd
        self.register(RegisterOpcode.EVENTFD, argument, 1)

    def open_buffer_ring(
        self, group: int, count: int, size: int, memory: CData, *, incremental: bool
    ) -> CData:
        """Register *count* buffers of *size* bytes each as *group*; for `BufferPool`."""
        out = ffi.new("struct buffer_ring *[1]")
        result = lib.buffer_ring_open(out, self._ring, group, count, size, memory, incremental)
        if result < 0:
            raise ring_error(result)
        return out[0]

    def close(self) -> None:
        """Unmap and close the ring.

        The caller must have drained it, because closing does not stop the kernel's writes.
        """
        if not self.closed:
            self.closed = True
            lib.ring_close(self._ring)
            note_close()


def engine_api_address() -> int:
    """Return the address of the C core's functions for the native engine; see engine_api.h."""
    return int(ffi.cast("uintptr_t", lib.engine_api()))


def open_cached(path: bytes, flags: int) -> int | None:
    """Open an existing file if that does not block; return None if it might, or on an error.

    The kernel tries the same first for an ``openat`` operation. Calling it directly needs no loop
    iteration. The fd is not inheritable. *path* must not contain a zero byte. A file system with a
    server asks it, unless *flags* has `os.O_PATH`: see `path_is_without_server`.

    Since: Linux 5.12; None before. Source: openat2(2).
    """
    fd = lib.open_cached(path, flags)
    return fd if fd >= 0 else None


def open_at_once(path: bytes, flags: int) -> int:
    """Like `open_cached`, but open the file even if that blocks. Return the fd, or minus an errno.

    For files that `mode_cached` has found: only if the cache has lost them since, this blocks.
    """
    return lib.open_at_once(path, flags)


def can_block(fd: int) -> bool:
    """Whether a read or write of an open file can block indefinitely. Asks no file server.

    Source: statx(2).
    """
    return bool(lib.can_block(fd))


def mount_of(fd: int) -> int:
    """Return a number for the mount that an open file is in; 0 if it cannot be known.

    Asks no server. No other mount ever gets the number; before Linux 6.8, one may after an unmount.

    Source: statx(2).
    """
    return 0 if why_no_core else lib.mount_of(fd)


def note_without_server(mount: int) -> None:
    """Note that all files in *mount*, as `mount_of` has it, are there without asking a server."""
    lib.note_without_server(mount)


def path_is_without_server(path: bytes) -> bool:
    """Whether *path* is in a mount of which `note_without_server` was told. Asks no server.

    If *path* is not cached, or does not exist, its directory says. To open it needs a worker then.
    """
    return bool(lib.path_is_without_server(path))


def is_missing(found: int) -> bool:
    """Whether the answer of `find_cached` is that there is nothing at the path: it is certain."""
    return -found in {errno.ENOENT, errno.ENOTDIR}


def is_in_unknown_mount(found: int) -> bool:
    """Whether the answer of `find_cached` is that `note_without_server` was not told."""
    return found == -errno.EXDEV


def find_cached(path: bytes, flags: int) -> int:
    """Open what is at *path* with `os.O_PATH` if that does not block.

    Only in a mount of which `note_without_server` was told: see there, and `open_cached`. If
    *flags* has `os.O_NOFOLLOW`, open a symbolic link itself.

    Returns:
      The fd, or a negative errno. See `is_missing` and `is_in_unknown_mount`.

    Source: openat2(2).
    """
    return lib.find_cached(path, flags)


def mode_cached(path: bytes, flags: int, size_max: int = (1 << 64) - 1) -> int:
    """Return the type and permissions of what `find_cached` would open, or a negative errno.

    It is -EFBIG for what is larger than *size_max* bytes.
    """
    return lib.mode_cached(path, flags, size_max)


class Reader:
    """Reads small files whole, without waiting for a disk.

    Args:
      size: The size of the buffer.
    """

    def __init__(self, size: int) -> None:
        self._buffer = ffi.new("char[]", size)
        self._size = size
        self._rest = ffi.new("int *")

    def read(self, path: str) -> tuple[bytes, int]:
        """Read the regular file at *path*, which `mode_cached` has found.

        Returns:
          The data, and -1; or a part of the data, and the fd of the file that has more.

        Raises:
          OSError: as open(2).

        Source: openat2(2), preadv2(2).
        """
        count = lib.read_cached(os.fsencode(path), self._buffer, self._size, self._rest)
        if count < 0:
            raise operation_error(count, path)
        return ffi.buffer(self._buffer, count)[:], int(self._rest[0])


# TCP_NOTSENT_LOWAT, as trio.SocketStream sets it: a socket with more unsent bytes is not writable.
_NOTSENT_LOWAT: Final = 2**14


def accept_stream(listener: int, *, poll_first: bool) -> int | None:
    """Accept a connection without blocking, and set the options that `trio.SocketStream` sets.

    Args:
      listener: The fd of a listening socket.
      poll_first: Call poll(2) first, which is cheaper if there is no connection.

    Returns:
      The fd of the connection, non-blocking and not inheritable; None if there is no connection.

    Raises:
      OSError: as accept(2).

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
