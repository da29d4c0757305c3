"""The package's exceptions. Only this module makes exceptions from a negative errno."""

import errno
import os
from _thread import start_new_thread

from ._kernel.uapi import OPCODE_SINCE, Opcode

# The results of a cancelled operation: ECANCELED if it was waiting, EINTR if it ran in a kernel
# worker, and for splices and blocked opens of FIFOs the kernel-internal ERESTART* numbers (512 to
# 516), which leak to user space. Seen on Linux 6.18. They mean "cancelled" only if a cancellation
# was requested.
CANCELLED_RESULTS = frozenset((-errno.ECANCELED, -errno.EINTR, *range(-516, -511)))

_SETUP_HINTS = {
    errno.ENOSYS: "the kernel is older than 5.11, or built without CONFIG_IO_URING, or a seccomp "
    "filter hides io_uring (as Docker's default profile does): upgrade the kernel, or run the "
    "container with a profile that allows io_uring_setup, io_uring_enter and io_uring_register",
    errno.EPERM: "io_uring is forbidden here: see the sysctl kernel.io_uring_disabled (0 allows "
    "it), or a seccomp filter (as Docker's default profile) that must allow io_uring_setup, "
    "io_uring_enter and io_uring_register",
    errno.EACCES: "a security module (SELinux, AppArmor) forbids io_uring: allow it there",
    errno.ENOMEM: "the memory lock limit is too low, even for a small ring: raise RLIMIT_MEMLOCK "
    "(ulimit -l), or ask for fewer entries",
    errno.EMFILE: "this process has too many open files: raise RLIMIT_NOFILE (ulimit -n)",
    errno.ENFILE: "the system has too many open files: raise the sysctl fs.file-max",
    errno.EINVAL: "the kernel refused the ring's parameters: sqpoll's cpu must exist, and be one "
    "that this process may use",
}


class RingUnavailableError(RuntimeError):
    """A run required io_uring, and this system does not provide it.

    The message says the likely cause and what to do. ``errno`` is the kernel's error number, or 0
    if the kernel was not asked (another operating system, an unsupported version of Trio).
    """

    def __init__(self, reason: str, errno_: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.errno = errno_


class IncompatibleTrioError(RingUnavailableError):
    """This package does not support the installed version of Trio."""


class UnsupportedOpcodeError(OSError):
    """The running kernel does not support an operation. ``errno`` is ``EOPNOTSUPP``."""


class OperationCancelledError(OSError):
    """An operation was stopped before it did anything. ``errno`` is ``ECANCELED``.

    It occurs in the outcomes of `trio_uring.perform_many`, for one of two reasons: an earlier
    operation in its linked chain failed, or the task was cancelled and other operations of the
    batch had succeeded.
    """


class ForkedRingError(RuntimeError):
    """A forked child process used its parent's ring. It must start a run of its own."""


def operation_error(
    res: int, filename: str | bytes | None = None, filename2: str | bytes | None = None
) -> OSError:
    """Return the `OSError` for a CQE's negative *res*, as the standard library would.

    `OSError` itself picks the subclass: ``-ECONNRESET`` gives `ConnectionResetError`.
    """
    assert -4096 < res < 0, res
    if filename is None:
        return OSError(-res, os.strerror(-res))
    return OSError(-res, os.strerror(-res), filename, None, filename2)


def no_worker_error() -> RuntimeError | None:
    """Return the error for an operation that the kernel cancelled unasked, if it lacked a worker.

    The kernel answers ``ECANCELED`` if it can start no worker thread for an operation. The same
    limits forbid other threads, so this tries to start one.
    """
    try:
        start_new_thread(int, ())
    except RuntimeError:
        return RuntimeError(
            "the kernel can start no worker thread for this operation: raise RLIMIT_NPROC "
            "(ulimit -u), or pids.max of the control group"
        )
    return None


def operation_cancelled(why: str) -> OperationCancelledError:
    """Return the error for an operation that did nothing. Its message is *why*."""
    return OperationCancelledError(errno.ECANCELED, why)


def setup_error(result: int, doing: str) -> RingUnavailableError:
    """Return the error for a ring that could not be set up, with its likely cause and remedy."""
    code = -result
    hint = _SETUP_HINTS.get(code, "see io_uring_setup(2)")
    name = errno.errorcode.get(code, str(code))
    return RingUnavailableError(f"{doing} failed with {name} ({os.strerror(code)}): {hint}", code)


def ring_error(result: int) -> Exception:
    """Return the error for a ring that refuses a push, an enter or a registration.

    The first three error numbers are the C core's own. The kernel does not return them here.
    """
    if result == -errno.EOWNERDEAD:
        return ForkedRingError(
            "this ring belongs to the parent process: after a fork, start a new run in the child"
        )
    if result == -errno.ESHUTDOWN:
        return RuntimeError("this ring is closed: its run has ended")
    if result == -errno.EXDEV:
        return RuntimeError("this ring belongs to another thread: only its run's thread may use it")
    return operation_error(result)


def unsupported_opcode(opcode: int) -> UnsupportedOpcodeError:
    """Return the error for an *opcode* that the running kernel does not know."""
    try:
        name, since = Opcode(opcode).name, f"came with Linux {OPCODE_SINCE[Opcode(opcode)]}"
    except ValueError:
        name, since = str(opcode), "is unknown to this package"
    kernel = os.uname().release
    return UnsupportedOpcodeError(
        errno.EOPNOTSUPP,
        f"the running kernel ({kernel}) does not support IORING_OP_{name}, which {since}",
    )


def forbidden_opcode(opcode: int) -> PermissionError:
    """Return the error for an *opcode* that the run's settings do not allow."""
    name = Opcode(opcode).name
    return PermissionError(
        errno.EACCES, f"this run may not perform {name}: see RingConfig.allowed_operations"
    )
