"""A simulated io_uring below the C core: its system calls, and what a kernel does between them.

`SimulatedKernel` takes the place of the kernel for every ring that is opened while it is installed
(simulated_kernel.c). Both engines, the C core, sockets and files run on it unchanged. It performs
each operation by a real system call, but a `random.Random` decides when, in which order, how much
of it, and whether it fails. It does whatever a kernel may do:

- An operation completes at once, or later by task work, of which an enter runs 20 items at most.
- It waits by poll, and is also woken for nothing. After 128 of these wake-ups, a worker gets it.
- A worker gets it, of which there are few, so that it waits for one. It may block the worker.
- A cancel finds it waiting, running, done, or not at all, and is answered before it or after.
- The CQ overflows, the SQ is taken in parts, an enter fails with EINTR, EAGAIN or EBUSY, buffers
  run out, multishot operations end, transfers are short, and operations fail with EIO.
- It is an older kernel, without some of the flags, buffer rings, or receives with a limit.

It raises `BrokenError` if what runs on it makes an error that a kernel does not forgive: if a queue
runs over, if a buffer is provided twice or never again, if the ring is closed with operations in
flight, if it enters again and again for nothing, or if it sleeps when nothing is left that could
wake it. And it writes wherever the kernel may write: into the memory of a receive until it has
completed, into provided buffers, and into fetched entries of the queues. What is still used there
is lost.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import sys
import traceback
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from simulated_memory import GARBAGE, BufferGroup, Queues, Sqe, check

from trio_uring import RingConfig
from trio_uring._engine._ring import Ring
from trio_uring._kernel import ffi, lib
from trio_uring._kernel.uapi import (
    CqeFlag,
    EnterFlag,
    FeatureFlag,
    Opcode,
    RegisterOpcode,
    SetupFlag,
    SqeFlag,
    SqFlag,
)

if TYPE_CHECKING:
    import random

SETUP, ENTER, REGISTER = 425, 426, 427
REAL: Final = -(1 << 63)  # LONG_MIN: the call is for a ring of the real kernel

WORK_ITEMS_MAX: Final = 20  # IO_LOCAL_TW_DEFAULT_MAX
POLL_RETRIES_MAX: Final = 128  # APOLL_MAX_RETRY
VAIN_ENTERS_MAX: Final = 20_000  # in a row
REGISTERED: Final = 0x5EED  # the index of the registered ring; no fd of a test is as high
HELD_FIRST: Final = 300  # the fds with which the kernel holds files; those of a test are below
FOREVER: Final = 3600.0  # seconds: the timeout of a run without deadlines is longer

_MSG_DONTWAIT: Final = 0x40
_RECV_MULTISHOT: Final = 1 << 1
_ACCEPT_MULTISHOT: Final = 1 << 0
_CANCEL_ANY: Final = 1 << 2
_LINKS: Final = int(SqeFlag.IO_LINK | SqeFlag.IO_HARDLINK)
_BUFFER_SELECT: Final = int(SqeFlag.BUFFER_SELECT)
_F_MORE: Final = int(CqeFlag.MORE)
_F_NOTIF: Final = int(CqeFlag.NOTIF)

_PARAMS: Final = struct.Struct("=7I12x")
_ENTER_ARGUMENT: Final = struct.Struct("=QIIQ")
_TIMESPEC: Final = struct.Struct("=qq")
_BUFFER_REGISTRATION: Final = struct.Struct("=QIHH")

# Each older kernel lacks more (_ring_setup.py).
_NO_DEFER: Final = SetupFlag.DEFER_TASKRUN
_NO_SINGLE: Final = _NO_DEFER | SetupFlag.SINGLE_ISSUER
_NO_COOP: Final = _NO_SINGLE | SetupFlag.COOP_TASKRUN
UNKNOWN_FLAGS: Final = (
    *(SetupFlag(0), SetupFlag.TASKRUN_FLAG, _NO_DEFER, _NO_SINGLE),
    *(_NO_COOP, _NO_COOP | SetupFlag.SUBMIT_ALL),
)

# What is performed only if the fd is ready, and for what. All else ends by itself.
_WAITS_FOR: Final[dict[int, int]] = {
    **dict.fromkeys(
        (Opcode.RECV, Opcode.RECVMSG, Opcode.READ, Opcode.READV, Opcode.ACCEPT), select.POLLIN
    ),
    **dict.fromkeys(
        (Opcode.SEND, Opcode.SENDMSG, Opcode.SEND_ZC, Opcode.SENDMSG_ZC), select.POLLOUT
    ),
    **dict.fromkeys((Opcode.WRITE, Opcode.WRITEV), select.POLLOUT),
}
# What is never given to a worker at once.
_KEPT_FROM_WORKERS: Final = {
    *(Opcode.NOP, Opcode.RECV, Opcode.RECVMSG, Opcode.ACCEPT),
    *(Opcode.SEND, Opcode.SENDMSG, Opcode.SEND_ZC, Opcode.SENDMSG_ZC),
}
_ZERO_COPY: Final = {
    int(Opcode.SEND_ZC): int(Opcode.SEND),
    int(Opcode.SENDMSG_ZC): int(Opcode.SENDMSG),
}
_SHORTENED: Final = {
    *(Opcode.RECV, Opcode.READ, Opcode.WRITE, Opcode.SEND, Opcode.SEND_ZC),
}
_HOLDS_FILE: Final = {*_WAITS_FOR, Opcode.FSYNC, Opcode.POLL_ADD}
_FAIL_AT_RANDOM: Final = {*_WAITS_FOR, Opcode.FSYNC, Opcode.CONNECT}

_libc: Final = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.recv, _libc.send, _libc.read):
    _function.restype = ctypes.c_ssize_t
_libc.recv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_Hook = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.POINTER(ctypes.c_long))


@dataclass(eq=False)
class Request:
    """An operation that the kernel has taken.

    Its *state* is one of: "polls"; "woken", task work will try it; "queued" for a worker; "runs" in
    a worker; "done", task work will post its result; "notifies", it is done with its buffer later.
    """

    sqe: Sqe
    number: int
    state: str = "polls"
    wakes: int = 0
    result: tuple[int, int] = (0, 0)
    held: int = -1  # a duplicate of its fd
    sent: bytes = b""  # what the network still uses
    following: list[Sqe] = field(default_factory=list[Sqe])  # the rest of its linked chain

    @property
    def multishot(self) -> bool:
        flag = {Opcode.RECV: _RECV_MULTISHOT, Opcode.ACCEPT: _ACCEPT_MULTISHOT}
        return bool(self.sqe.ioprio & flag.get(Opcode(self.sqe.opcode), 0))


class Performer:
    """Performs operations on a ring of the real kernel, each to its end."""

    def __init__(self) -> None:
        self._ring = Ring(RingConfig(entries=8))
        self._cqes = ffi.new("struct io_uring_cqe[8]")

    def close(self) -> None:
        self._ring.close()

    def perform(self, sqe: Sqe) -> int:
        pushed = lib.ring_push(
            self._ring._ring,
            1,
            *(sqe.opcode, sqe.flags & SqeFlag.FIXED_FILE, sqe.ioprio, sqe.fd, sqe.off),
            ffi.cast("void *", sqe.addr),
            *(sqe.len, sqe.op_flags, sqe.buf_index, sqe.splice_fd_in, sqe.addr3),
        )
        check(pushed == 0, f"an operation could not be performed: {pushed}")
        for _ in range(100):
            if lib.ring_submit_and_wait(self._ring._ring, 5.0, self._cqes, 8) == 1:
                return self._cqes[0].res
        raise AssertionError(f"opcode {sqe.opcode} does not end")

    def register(self, opcode: int, argument: int, count: int) -> int:
        return lib.ring_register(self._ring._ring, opcode, ffi.cast("void *", argument), count)


class SimulatedKernel:
    """Decides at random what happens to the operations of a ring, which may be opened once."""

    def __init__(self, random: random.Random, *, name: str, faults: float) -> None:
        self.random = random
        self.name = name  # printed where it finds an error
        self.faults = faults  # how probable each of the kernel's rarer decisions is
        self.unknown_flags = random.choice(UNKNOWN_FLAGS)
        self.unknown_registrations = {
            opcode for opcode in (RegisterOpcode.PBUF_RING,) if random.random() < 0.1
        }
        self.incremental = random.random() < 0.7
        self.limits_receives = random.random() < 0.8  # since Linux 6.17
        self.workers_max = random.randint(1, 3)
        self.counts: Counter[str] = Counter()  # how often each thing happened
        self.requests: dict[int, Request] = {}  # by their order
        self.work: deque[Request] = deque()
        self.groups: dict[int, BufferGroup] = {}
        self.queues: Queues | None = None
        self.setup_flags = SetupFlag(0)
        self.timeout: float | None = None  # of the last enter
        self._next = 0
        self._vain = 0
        self._performer = Performer()
        self._hook = _Hook(self._call)

    def install(self) -> None:
        """Take the place of the kernel for the rings that are opened from now on."""
        _libc.simulate_io_uring(self._hook)

    def remove(self) -> None:
        """Give its place back. All must have ended."""
        _libc.simulate_io_uring(None)
        self._performer.close()
        if self.queues is not None:
            check(not self.requests, f"closed with {self.in_flight()} in flight")
            self.queues.close()

    def in_flight(self) -> list[str]:
        return [f"{Opcode(r.sqe.opcode).name} {r.state}" for r in self.requests.values()]

    def chance(self, probability: float | None = None) -> bool:
        return self.random.random() < (self.faults if probability is None else probability)

    # ---- System calls ----------------------------------------------------------------------

    def _call(self, number: int, arguments: ctypes._Pointer[ctypes.c_long]) -> int:
        try:
            if number == SETUP:
                return self._setup(arguments[0] & 0xFFFFFFFF, arguments[1])
            fd = arguments[0] & 0xFFFFFFFF
            if self.queues is None or fd not in (self.queues.fd, REGISTERED):
                return REAL
            if number == REGISTER:
                return self._register(arguments[1] & 0xFFFFFFFF, arguments[2], arguments[3])
            to_submit, min_complete, flags, argument, size = (arguments[i] for i in range(1, 6))
            registered = bool(flags & EnterFlag.REGISTERED_RING)
            check(registered == (fd == REGISTERED), "the wrong ring is entered")
            return self._enter(
                to_submit & 0xFFFFFFFF,
                min_complete & 0xFFFFFFFF,
                flags & 0xFFFFFFFF,
                _timeout(argument, size) if flags & EnterFlag.EXT_ARG else None,
            )
        except BaseException:  # noqa: BLE001 (nobody above could handle it)
            traceback.print_exc()
            print(
                f"failed with {self.name}, in flight:",
                *self.in_flight(),
                sep="\n  ",
                file=sys.stderr,
            )
            sys.stderr.flush()
            os._exit(70)

    def _setup(self, entries: int, address: int) -> int:
        if self.queues is not None:
            return REAL
        params = _PARAMS.unpack(ctypes.string_at(address, _PARAMS.size))
        cq_entries, flags = params[1], SetupFlag(params[2])
        if flags & (self.unknown_flags | SetupFlag.SQPOLL):
            return -errno.EINVAL
        sq_entries = 1 << (entries - 1).bit_length()
        cq_entries = 1 << (cq_entries - 1).bit_length()
        self.queues = Queues(sq_entries, cq_entries)
        self.setup_flags = flags
        features = FeatureFlag.SINGLE_MMAP | FeatureFlag.NODROP | FeatureFlag.EXT_ARG
        found = _PARAMS.pack(sq_entries, cq_entries, int(flags), 0, 0, int(features), 0)
        found += bytes(40 - len(found)) + self.queues.offsets()
        ctypes.memmove(address, found, len(found))
        return self.queues.fd

    def _register(self, opcode: int, argument: int, count: int) -> int:
        if opcode in self.unknown_registrations:
            return -errno.EINVAL
        if opcode == RegisterOpcode.RING_FDS:
            ctypes.memmove(argument, struct.pack("=I", REGISTERED), 4)
            return 1
        if opcode in (RegisterOpcode.UNREGISTER_RING_FDS, RegisterOpcode.IOWQ_MAX_WORKERS):
            return 0
        if opcode in (RegisterOpcode.PBUF_RING, RegisterOpcode.UNREGISTER_PBUF_RING):
            entries, size, group, flags = _BUFFER_REGISTRATION.unpack(
                ctypes.string_at(argument, _BUFFER_REGISTRATION.size)
            )
            if opcode == RegisterOpcode.UNREGISTER_PBUF_RING:
                self.groups.pop(group).check_all_are_here()
            elif flags and not self.incremental:
                return -errno.EINVAL
            else:
                self.groups[group] = BufferGroup(entries, size, flags)
            return 0
        # The files and buffers of the ring that performs the operations.
        return self._performer.register(opcode, argument, count)

    def _enter(self, to_submit: int, min_complete: int, flags: int, timeout: float | None) -> int:
        queues = self.queues
        assert queues is not None
        self.counts["enters"] += 1
        self.timeout = timeout
        queues.overwrite_fetched()
        self._overwrite_receiving()
        before = (queues.ready, self.counts["submitted"])
        submitted = 0
        if to_submit:
            if queues.overflow and self.unknown_flags:  # before Linux 5.19
                self.counts["EBUSY"] += 1
                submitted = -errno.EBUSY
            elif self.chance():
                self.counts["EAGAIN"] += 1
                submitted = -errno.EAGAIN
            else:
                submitted = self._submit(to_submit)
        if submitted < 0 or submitted < to_submit:
            result = submitted
        elif flags & EnterFlag.GETEVENTS:
            queues.flush_overflow()
            self._advance()
            self._run_work()
            waited = self._wait(min_complete, timeout)
            result = submitted or waited
        else:
            result = submitted
        if not self._deferred:
            self._run_work()
        self._tell_of_work()
        gained = (queues.ready, self.counts["submitted"]) != before
        self._vain = 0 if gained or result == -errno.ETIME else self._vain + 1
        check(self._vain < VAIN_ENTERS_MAX, f"entered for nothing {self._vain} times")
        return result

    @property
    def _deferred(self) -> bool:
        return bool(self.setup_flags & SetupFlag.DEFER_TASKRUN)

    def _tell_of_work(self) -> None:
        assert self.queues is not None
        if self.setup_flags & SetupFlag.TASKRUN_FLAG:
            self.queues.set_flag(SqFlag.TASKRUN, self.work)

    def _wait(self, min_complete: int, timeout: float | None) -> int:
        """Wait for *min_complete* completions. Return 0, or why there are not as many."""
        queues = self.queues
        assert queues is not None
        patience = self.random.randint(1, 5)
        while queues.ready < min_complete:
            if self.chance():
                self.counts["EINTR"] += 1
                return -errno.EINTR
            patience -= 1
            moved = self._advance(everything=patience < 0)
            self._run_work()
            queues.flush_overflow()
            if queues.ready < min_complete and not moved and not self.work and patience < 0:
                forever = timeout is None or timeout >= FOREVER
                check(not forever, "it sleeps, and nothing is left that could wake it")
                self.counts["ETIME"] += 1
                return -errno.ETIME
        return 0

    # ---- Submission ------------------------------------------------------------------------

    def _submit(self, count: int) -> int:
        assert self.queues is not None
        if self.chance():
            count = self.random.randint(1, count)  # no memory for more
        submitted = 0
        chain: list[Sqe] = []
        for sqe in self.queues.take(count):
            submitted += 1
            self.counts["submitted"] += 1
            chain.append(sqe)
            if not sqe.flags & _LINKS:
                self._issue(chain[0], chain[1:])
                chain = []
        if chain:  # the end of the SQEs ends a chain, too
            self._issue(chain[0], chain[1:])
        return submitted

    def _issue(self, sqe: Sqe, following: list[Sqe]) -> None:
        if sqe.opcode == Opcode.ASYNC_CANCEL:
            self._cancel(sqe)
            return
        request = Request(sqe, self._next, following=following)
        self.requests[self._next] = request
        self._next += 1
        if not self._hold_file(request):
            self._finish(request, -errno.EBADF, 0)
            return
        if sqe.flags & SqeFlag.ASYNC:
            request.state = "queued"
        elif sqe.op_flags & _MSG_DONTWAIT and sqe.opcode in _WAITS_FOR:
            result = self._attempt(request)
            self._finish(request, *(result or (-errno.EAGAIN, 0)))
        elif self.chance(0.4):
            result = self._attempt(request)
            if result is not None:
                self.counts["inline"] += 1
                self._finish(request, *result)
        elif sqe.opcode not in _KEPT_FROM_WORKERS and not self._can_wait(sqe) and self.chance(0.7):
            request.state = "queued"

    def _hold_file(self, request: Request) -> bool:
        """Keep the file, whatever becomes of its fd, until the operation has ended."""
        sqe = request.sqe
        if sqe.opcode not in _HOLDS_FILE or sqe.flags & SqeFlag.FIXED_FILE:
            return True
        try:
            request.held = sqe.fd = fcntl.fcntl(sqe.fd, fcntl.F_DUPFD_CLOEXEC, HELD_FIRST)
        except (OSError, ValueError):  # ValueError: it is -1
            return False
        return True

    def _can_wait(self, sqe: Sqe) -> bool:
        return sqe.opcode in (Opcode.POLL_ADD, Opcode.TIMEOUT) or (
            sqe.opcode in _WAITS_FOR and not _ready(sqe.fd, _WAITS_FOR[sqe.opcode])
        )

    def _cancel(self, sqe: Sqe) -> None:
        found = [
            request
            for request in self.requests.values()
            if sqe.op_flags & _CANCEL_ANY or request.sqe.user_data == sqe.addr
        ]
        stopped = [request for request in found if self._stop(request)]
        ended = all(request.state in ("done", "notifies") for request in found)
        if ended and not stopped:
            self.counts["cancel: ENOENT"] += 1
            res = -errno.ENOENT
        elif not stopped:
            self.counts["cancel: EALREADY"] += 1
            res = -errno.EALREADY
        else:
            self.counts["cancel: done"] += 1
            res = len(stopped) if sqe.op_flags & _CANCEL_ANY else self.random.randint(0, 1)
        if stopped and not self._deferred and self.chance(0.5):
            self._run_work()  # the operation's completion comes first
        self._post(sqe.user_data, res)

    def _stop(self, request: Request) -> bool:
        stops = request.state in ("polls", "queued")
        if stops or (request.state == "woken" and (request.multishot or self.chance(0.5))):
            if request in self.work:
                self.work.remove(request)
            self._done(request, -errno.ECANCELED, 0)
            return True
        sqe = request.sqe
        if request.state == "runs" and sqe.opcode in _WAITS_FOR:
            # A worker that waits is interrupted; one that does not may be.
            if not self._can_wait(sqe) and self.chance(0.3):
                return False
            self._done(request, self.random.choice((-errno.EINTR, -errno.ECANCELED)), 0)
        return False

    # ---- What happens ----------------------------------------------------------------------

    def _advance(self, *, everything: bool = False) -> bool:
        """Let some of what can happen happen; return whether there was anything."""
        moved = False
        running = sum(request.state == "runs" for request in self.requests.values())
        requests = list(self.requests.values())
        self.random.shuffle(requests)
        for request in requests:
            if not everything and self.chance(0.5):
                continue
            if request.state == "polls":
                moved |= self._wake(request)
            elif request.state == "queued" and running < self.workers_max:
                running += 1
                request.state = "runs"
                moved = True
            elif request.state == "runs":
                result = self._attempt(request)
                if result is not None:
                    moved = True
                    self._done(request, *result)
                else:
                    self.counts["blocked a worker"] += 1
            elif request.state == "notifies":
                moved = True
                self._check_sent(request)
                self._done(request, 0, _F_NOTIF)
        return moved

    def _wake(self, request: Request) -> bool:
        sqe = request.sqe
        ready = (
            not self._can_wait(sqe)
            or (_ready(sqe.fd, sqe.op_flags) if sqe.opcode == Opcode.POLL_ADD else False)
            or sqe.opcode == Opcode.TIMEOUT
        )
        vain = not ready and sqe.opcode in _WAITS_FOR and self.chance()
        if ready or vain:
            request.state = "woken"
            self.work.append(request)
        # Some are woken very often, as by a peer that means harm.
        if vain and self.chance(0.2):
            request.wakes += POLL_RETRIES_MAX
        return ready

    def _run_work(self) -> None:
        limit = WORK_ITEMS_MAX if self._deferred else len(self.work)
        for _ in range(min(limit, len(self.work))):
            request = self.work.popleft()
            if request.state == "done":
                self._finish(request, *request.result)
                continue
            result = self._attempt(request)
            if result is not None:
                self._finish(request, *result)
                continue
            request.state = "polls"
            request.wakes += 1
            if request.wakes > POLL_RETRIES_MAX and not request.multishot:
                self.counts["handed to a worker"] += 1
                request.state = "queued"
        if self.work:
            self.counts["work left over"] += 1

    def _done(self, request: Request, res: int, flags: int) -> None:
        request.state, request.result = "done", (res, flags)
        self.work.append(request)

    def _finish(self, request: Request, res: int, flags: int) -> None:
        """Post a result. Unless more follow, the request ends, and the next of its chain begins."""
        sqe = request.sqe
        if flags & _F_MORE and not flags & _F_NOTIF:
            assert self.queues is not None
            if sqe.opcode in _ZERO_COPY:
                request.state = "notifies"
                request.sent = ctypes.string_at(sqe.addr, res) if sqe.addr else b""
                self._post(sqe.user_data, res, flags)
                return
            if self.queues.room:
                request.state = "polls"
                self._post(sqe.user_data, res, flags)
                return
            flags &= ~_F_MORE
        del self.requests[request.number]
        if request.held >= 0:
            os.close(request.held)
        if not (sqe.flags & SqeFlag.CQE_SKIP_SUCCESS and res >= 0):
            self._post(sqe.user_data, res, flags)
        if request.following:
            first, *rest = request.following
            wanted = sqe.len if sqe.opcode in _SHORTENED else 0
            if (res < 0 or res < wanted) and not sqe.flags & SqeFlag.IO_HARDLINK:
                for each in request.following:
                    self._post(each.user_data, -errno.ECANCELED)
            else:
                self._issue(first, rest)

    def _post(self, user_data: int, res: int, flags: int = 0) -> None:
        assert self.queues is not None
        self.queues.post((user_data, res, flags))
        if self.queues.overflow:
            self.counts["overflow"] += 1

    # ---- Performing ------------------------------------------------------------------------

    def _attempt(self, request: Request) -> tuple[int, int] | None:
        """Perform an operation; return its result, or None if it has to wait."""
        sqe = request.sqe
        if sqe.opcode == Opcode.NOP:
            return 0, 0
        if sqe.opcode == Opcode.RECV and sqe.splice_fd_in and not self.limits_receives:
            self.counts["RECV with a limit"] += 1
            return -errno.EINVAL, 0
        if sqe.opcode == Opcode.TIMEOUT:
            return -errno.ETIME, 0
        if sqe.opcode == Opcode.POLL_ADD:
            events = _ready(sqe.fd, sqe.op_flags)
            return (events, 0) if events else None
        often = 1 if sqe.flags & _BUFFER_SELECT else 3
        if sqe.opcode in _FAIL_AT_RANDOM and self.chance(self.faults / often):
            return self._fail(sqe)
        if sqe.opcode in _WAITS_FOR and not _ready(sqe.fd, _WAITS_FOR[sqe.opcode]):
            if request.state == "runs" and sqe.opcode in (Opcode.RECVMSG, Opcode.ACCEPT):
                return -errno.EAGAIN, 0  # in a worker, O_NONBLOCK counts
            return None
        if sqe.flags & _BUFFER_SELECT:
            return self._receive_selected(request)
        if sqe.opcode == Opcode.ACCEPT and request.multishot:
            fd = self._performer.perform(Sqe(**{**vars(sqe), "ioprio": 0}))
            return fd, _F_MORE if fd >= 0 and not self.chance() else 0
        if sqe.opcode in _ZERO_COPY:
            plain = {"opcode": _ZERO_COPY[sqe.opcode], "ioprio": 0, "len": self._shortened(sqe)}
            res = self._performer.perform(Sqe(**{**vars(sqe), **plain}))
            return res, _F_MORE if res >= 0 else 0
        res = self._performer.perform(Sqe(**{**vars(sqe), "len": self._shortened(sqe)}))
        return None if res == -errno.EAGAIN and not sqe.op_flags & _MSG_DONTWAIT else (res, 0)

    def _shortened(self, sqe: Sqe) -> int:
        if sqe.opcode in _SHORTENED and sqe.len > 1 and self.chance(0.1):
            self.counts["short"] += 1
            return self.random.randint(1, sqe.len - 1)
        return sqe.len

    def _fail(self, sqe: Sqe) -> tuple[int, int]:
        self.counts["failed"] += 1
        flags = 0
        if sqe.flags & _BUFFER_SELECT and self.chance(0.8):
            group = self.groups.get(sqe.buf_index)
            if group is not None and group.available():
                flags = group.use(0)
        return -errno.EIO, flags

    def _receive_selected(self, request: Request) -> tuple[int, int] | None:
        sqe = request.sqe
        group = self.groups[sqe.buf_index]
        if not group.available() or self.chance(self.faults / 3):
            self.counts["ENOBUFS"] += 1
            return -errno.ENOBUFS, 0
        address, size = group.first()
        size = min(size, sqe.len) if sqe.len else size
        if size > 1 and self.chance(0.2):
            size = self.random.randint(1, size)
        if sqe.opcode == Opcode.RECV:
            res = _libc.recv(sqe.fd, address, size, sqe.op_flags | _MSG_DONTWAIT)
        else:
            res = _libc.read(sqe.fd, address, size)
        if res < 0:
            code = ctypes.get_errno()
            return None if code == errno.EAGAIN else (-code, 0)
        if res == 0:
            return 0, 0
        flags = group.use(res)
        # A receive with a limit ends here, another one goes on, or ends for no reason.
        if request.multishot and not sqe.splice_fd_in and not self.chance():
            flags |= _F_MORE
        return res, flags

    def _check_sent(self, request: Request) -> None:
        sqe = request.sqe
        if sqe.opcode == Opcode.SEND_ZC:
            unchanged = ctypes.string_at(sqe.addr, len(request.sent)) == request.sent
            check(unchanged, "memory that the network still uses was used again")

    def _overwrite_receiving(self) -> None:
        for request in self.requests.values():
            sqe = request.sqe
            receives = sqe.opcode in (Opcode.RECV, Opcode.READ) and not sqe.flags & _BUFFER_SELECT
            if receives and request.state != "done" and not sqe.flags & SqeFlag.FIXED_FILE:
                ctypes.memset(sqe.addr, GARBAGE, min(sqe.len, 64))


def _ready(fd: int, events: int) -> int:
    poll = select.poll()
    poll.register(fd, events)
    found = poll.poll(0)
    return found[0][1] if found else 0


def _timeout(argument: int, size: int) -> float | None:
    assert size == _ENTER_ARGUMENT.size
    *_, address = _ENTER_ARGUMENT.unpack(ctypes.string_at(argument, size))
    if not address:
        return None
    seconds, nanoseconds = _TIMESPEC.unpack(ctypes.string_at(address, _TIMESPEC.size))
    return seconds + nanoseconds / 1e9
