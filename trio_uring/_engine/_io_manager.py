"""`UringIOManager`: Trio's I/O manager on a ring.

Each loop iteration calls `get_events` and `process_events`. One system call submits all SQEs that
were pushed since the last iteration, and fetches all completions. Each completion reschedules its
task. `_readiness.py` explains what is still done with epoll.
"""

from __future__ import annotations

import errno
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

from trio.lowlevel import enable_ki_protection

from trio_uring._errors import setup_error
from trio_uring._log import log_ring_run
from trio_uring._operations import send
from trio_uring._statistics import RingStatistics, counts_by_name, flag_names, totals
from trio_uring._trio_private import current_io_manager, current_run_is_guest, current_run_queue

from ._buffer_pool import BufferPools
from ._guest import GuestWakeup
from ._in_flight import IGNORED, WAKE, InFlightTable
from ._mailbox import ASLEEP, Mailbox
from ._native_loop import count_native, open_native_loop, receive_natively
from ._readiness import Readiness
from ._run_state import RunState, run_state_without_ring
from ._turn_budget import TurnBudget

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence, Sized

    from trio.lowlevel import Task

    from trio_uring._config import RingConfig
    from trio_uring._operations import Operation

    from ._buffer_pool import BufferPool
    from ._in_flight import InFlight
    from ._readiness import HasFileNo
    from ._ring import Completion, Ring

# The layers that TRIO_URING_DISABLE can leave to Trio in a run with a ring.
Layer = Literal["files", "sockets"]
LAYERS: Final[tuple[Layer, ...]] = ("files", "sockets")


# Returned by get_events() if there are no completions but the time did not run out: after a signal,
# or in the worker thread of a guest run.
_SPURIOUS: Final = ((IGNORED, 0, 0),)

_SEND_OPCODE: Final = send(-1, b"").opcode

# The most operations in flight for `is_quiet`: the watch, and another one.
_QUIET_MAX: Final = 2

# Objects of rings that could not be drained. The kernel may still write to them, so they are never
# freed.
_leaked: Final[list[object]] = []


def current_ring(layer: Layer) -> UringIOManager | None:
    """Return the current run's I/O manager, if the run has a ring and uses it for *layer*.

    Raises:
      RuntimeError: outside a run.
    """
    manager = current_io_manager()
    if isinstance(manager, UringIOManager) and layer not in manager.disabled:
        return manager
    return None


def no_ring_error() -> RuntimeError:
    """Return the error for a call that needs a ring, in a run without one."""
    return RuntimeError(
        "this Trio run is not on io_uring: start it with trio_uring.run, or see "
        "trio_uring.statistics().fallback_reason for why it fell back"
    )


def current_run_state() -> RunState:
    """Return the state of the current run, which may have a ring or not.

    Raises:
      RuntimeError: outside a run.
    """
    manager = current_io_manager()
    return manager.run_state if isinstance(manager, UringIOManager) else run_state_without_ring()


class UringIOManager(InFlightTable):
    """The ``io_manager`` of a Trio run. It is created when the run starts and closed when it ends.

    It closes *ring*, which belongs to the thread of the run.
    """

    fallback_reason: str
    begun: bool = False  # whether the first loop iteration has begun

    def __init__(
        self,
        ring: Ring,
        config: RingConfig,
        disabled: frozenset[Layer] = frozenset(),
        *,
        why_python: str = "nobody asked for the native engine",
    ) -> None:
        self._readiness = Readiness()
        super().__init__(ring, self._readiness, config.max_file_operations)
        self.config = config
        self.disabled: frozenset[Layer] = disabled
        self.why_python: str = why_python  # why the native engine is not used; empty if it is
        self._guest: GuestWakeup | None = None
        self._watch_operation = self._readiness.watch()
        self._watch_entry: InFlight | None = None
        self.pools: BufferPools = BufferPools(ring, config.receive_buffers)
        self.run_state: RunState = RunState()
        self.mailbox: Mailbox | None = None
        self.turn_budget: TurnBudget = TurnBudget(config.turn_budget)
        self._may_send_now = config.allowed_operations is None and config.sqpoll is None
        self._run_queue: Sized = ()
        self._times_operations = False
        self._ready_tasks = 0  # tasks that run in this iteration
        self.sent_now = 0  # sends by the system call, because `is_quiet`
        self._reserved[WAKE] = self._woken

    def _begin(self) -> None:
        """Finish the setup, in the first loop iteration.

        Only now is it known whether this is a guest run.
        """
        self.begun = True
        if current_run_is_guest():
            self._guest = GuestWakeup()
            # The host may call cancel() while the worker thread waits.
            self._submit_cancels_at_once = True
            self.ring.register_eventfd(self._guest.eventfd)
            self.why_python = self.why_python or "it is a guest run"
        else:
            self.ring.register_fd()
        self._run_queue = current_run_queue()
        if not self.why_python:
            self.native = open_native_loop(
                self,
                self.ring,
                self.fd_waiters,
                self.file_limiter,
                self._readiness.waits,
                turn_budget=self.config.turn_budget,
                may_send_now=self._may_send_now,
            )
            self.native.times_operations = self._times_operations
            self.turn_budget.native = self.native
        self._is_plain = self._guest is None and self.mailbox is None
        log_ring_run(self.why_python)

    @property
    def buffers(self) -> BufferPool | None:
        """The buffers to receive into; None if the kernel does not support provided buffers."""
        return self.pools.receive or self.pools.open_receive()

    @property
    def stream_buffers(self) -> BufferPool | None:
        """The buffers to receive into with `recv_once`; None if the kernel does not support it."""
        pool = self.pools.for_streams(self.perform_now)
        native = self.native
        if pool is not None and native is not None and native.receive_operation is None:
            receive_natively(native, self.pools.for_native_engine(pool))
        return pool

    @enable_ki_protection
    def perform_now(self, operation: Operation[object]) -> tuple[int, int]:
        """Perform *operation*, which must not block; return its ``res`` and ``flags``."""
        ring, found = self.ring, None
        while not ring.push(operation, IGNORED):
            self._backlog += ring.submit_and_wait(0) or ()
        while found is None:
            for completion in ring.submit_and_wait(1.0) or ():
                if completion[0] == IGNORED:
                    found = completion[1:]
                else:
                    self._backlog.append(completion)
        return found

    def open_mailbox(self) -> Mailbox:
        """Return the run's mailbox. On the first call it is created: only channels need one."""
        if self.mailbox is None:
            self.mailbox = Mailbox(None if self.ring.closed else self.ring)
            self._is_plain = False
        return self.mailbox

    def _woken(self, _res: int) -> None:
        if self.mailbox is not None:
            self.mailbox.deliver_all()

    def time_operations(self) -> None:
        """Note from now on in each entry since when its task waits."""
        start = self.start

        def start_timed(operation: Operation[object], task: Task | None) -> InFlight:
            entry = start(operation, task)
            entry.since = time.monotonic_ns()
            return entry

        # Replaced, so that a run that is not inspected need not ask whether it is.
        setattr(self, "start", start_timed)  # noqa: B010 (to a type checker it would be an attribute)
        self._times_operations = True

    # ---- Trio's loop -----------------------------------------------------------------------

    def get_events(self, timeout: float) -> Iterable[Completion]:
        """Submit, wait at most *timeout* seconds, and return the completions.

        The result is falsy only if the time ran out. Trio's clocks rely on that.
        """
        ring = self.ring
        if (
            self._is_plain
            and self._watch_entry is not None
            and not self._cancels
            and not self._backlog
        ):
            try:
                completions = ring.submit_and_wait(timeout)
            except OSError as exc:
                return self._go_on_without_ring(exc)
            if completions is None:
                return _SPURIOUS
            self._undispatched = completions
            return completions
        try:
            return self._get_events(timeout)
        except OSError as exc:
            return self._go_on_without_ring(exc)

    def _get_events(self, timeout: float) -> Sequence[Completion]:
        ring = self.ring
        if not self.begun:
            self._begin()
        if self._refusal is not None:
            raise self._refusal
        if self._guest is not None:
            if ring.usable:
                self._guest.drain()
            elif timeout > 0:  # Trio's worker thread
                return _SPURIOUS if self._guest.wait(timeout) else ()
        if self._cancels:
            self._push_cancels()
        if self._watch_entry is None:
            self._watch()
        # There are completions to dispatch, or there was no room for a cancellation.
        dont_block = self._backlog or self._cancels
        mailbox = self.mailbox
        if mailbox is not None:
            mailbox.last_iteration = ASLEEP
        completions = ring.submit_and_wait(0 if dont_block else timeout)
        while not completions and self._guest is not None and ring.more_to_fetch:
            # The kernel ran a part of its work, which led to no completion. It does not signal the
            # eventfd for the rest.
            self._guest.drain()
            completions = ring.submit_and_wait(0)
        if mailbox is not None:
            mailbox.last_iteration = time.monotonic()
        if dont_block:
            # Taken away first: a finalizer may add to it at any time.
            backlog, self._backlog = self._backlog, []
            backlog += completions or ()
            completions = backlog
            if not completions:
                return _SPURIOUS
        elif completions is None:
            return _SPURIOUS
        self._undispatched = completions
        return completions

    def process_events(self, events: Iterable[Completion]) -> None:
        """Reschedule the tasks whose operations completed."""
        self.turn_budget.end = 0.0
        if events:
            self.dispatch(events)
        self._ready_tasks = len(self._run_queue)

    def is_quiet(self) -> bool:
        """Whether a send by the system call is cheaper than one on the ring.

        It is if the current task is the only one that runs, and at most one operation is in flight
        besides the watch: the ring would need an enter for this send alone, and the task another
        iteration. See `loop_is_quiet` in engine/step.c, which the native engine uses.
        """
        return (
            self._ready_tasks <= 1
            and len(self._entries) <= _QUIET_MAX
            and self.native is None
            and self._may_send_now
            and not self._run_queue
            and not self.ring.unsubmitted
        )

    def _go_on_without_ring(self, error: OSError) -> Iterator[Completion]:
        """Leave everything to Trio, because the kernel refuses to enter the ring.

        For example, a seccomp filter was installed, or the program has closed the ring's fd. The
        result is for `process_events`, and only there this does anything: `get_events` of a guest
        run may be called in another thread.
        """
        reason = setup_error(-(error.errno or 0), "io_uring_enter").reason
        self.fallback_reason = f"the run lost its ring: {reason}"
        warnings.warn(f"trio_uring: {self.fallback_reason}", RuntimeWarning, stacklevel=2)
        self.disabled = frozenset(LAYERS)
        _leaked.append((self._leak(), self.pools))
        yield from self._fail_everything(error)
        if self.mailbox is not None:
            self.mailbox.ring_lost()
        self.ring.lost = error.errno, self.fallback_reason
        self.ring.close()
        # From here on the run's loop is Trio's own.
        trios = self._readiness
        self.get_events = trios.get_events  # type: ignore[method-assign, assignment]
        self.process_events = trios.process_events  # type: ignore[method-assign, assignment]
        self.notify_closing = trios.notify_closing  # type: ignore[method-assign]

    def _leak(self) -> Sequence[object]:
        """Return the memory that the kernel may still write to. It must never be freed."""
        operations = [entry.operation for entry in self._entries.values()]
        memory: list[object] = [self.native]
        for batch in self._batches.values():
            operations += batch.array.operations
            memory.append(batch.array.pins)
            batch.array.pins = ()
        for operation in operations:
            memory.append((operation.sqe, operation.pins))
            operation.pins = ()  # so that its task does not release them
        return memory

    def _fail_everything(self, error: OSError) -> Iterator[Completion]:
        """Yield a failed completion, to be dispatched, for each operation in flight.

        The kernel will report none. The caller has called `_leak`, because it may still access the
        memory.
        """
        res = -(error.errno or errno.EIO)
        self._cancels.clear()
        backlog, self._backlog = self._backlog, []
        yield from backlog
        if self.native is not None:
            self.native.fail_all(res)
            self.native.dispatch()
        for user_data in tuple(self._entries):
            yield (user_data, res, 0)
        for number, batch in tuple(self._batches.items()):
            del self._batches[number]
            batch.results = [(res, 0)] * (batch.end - batch.start)
            self._finish_batch(batch)

    def _watch(self) -> None:
        """Make the ring watch the epoll fd until an fd is ready there."""
        self._watch_entry = self.start(self._watch_operation, None)
        self._watch_entry.on_done = self._epoll_ready

    def _epoll_ready(self, _entry: InFlight) -> None:
        self._watch_entry = None
        self._readiness.dispatch_ready()

    def force_wakeup(self) -> None:
        """Make `get_events` return; may be called from any thread and from signal handlers."""
        self._readiness.force_wakeup()

    async def wait_readable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is readable; see Trio's docs."""
        self.fd_waiters.check_not_busy(fd, "read")
        await self._readiness.wait_readable(fd)

    async def wait_writable(self, fd: int | HasFileNo) -> None:
        """Block until *fd* is writable; see Trio's docs."""
        self.fd_waiters.check_not_busy(fd, "write")
        await self._readiness.wait_writable(fd)

    def statistics(self) -> RingStatistics:
        """Return the statistics of the ring."""
        ring = self.ring
        readiness = self._readiness.statistics()
        watching = self._watch_entry is not None and self._watch_entry.in_flight
        in_flight = len(self._entries) - watching + self._batches.operations()
        if self.native is not None:
            in_flight += self.native.in_flight
        refused = (*ring.refused, self.pools.refused, *self.run_state.refused())
        return RingStatistics(
            tasks_waiting_read=readiness.tasks_waiting_read + self.fd_waiters.count("read"),
            tasks_waiting_write=readiness.tasks_waiting_write + self.fd_waiters.count("write"),
            setup_flags=flag_names(ring.setup_flags),
            features=flag_names(ring.features),
            refused=tuple(filter(None, refused)),
            entries=ring.entries,
            in_flight=in_flight,
            submitted=ring.submitted,
            enters=ring.enters,
            cancelled=self._cancelled,
            buffers_ran_out=self.pools.ran_out(),
            completed=self._completed_by_name(),
            waiting_for_limit=self.file_limiter.waiters.statistics().tasks_waiting,
            routes=self.run_state.routes(),
            limits={"max_file_operations": self.config.max_file_operations, **ring.worker_limits},
            engine="python" if self.why_python else "native",
            engine_reason=self.why_python,
            fallback_reason=self.fallback_reason,
        )

    def _completed_by_name(self) -> dict[str, int]:
        native, counts = self.native, self._completed.copy()
        counts[_SEND_OPCODE] += self.sent_now
        if native is not None:
            counts = count_native(native, counts)
        return counts_by_name(counts)

    def in_flight_by_name(self) -> dict[str, int]:
        """Return the number of operations in flight by opcode."""
        native = self.native
        counts = [0] * 256 if native is None else native.in_flight_by_opcode()
        for entry in tuple(self._entries.values()):
            counts[entry.operation.opcode] += entry is not self._watch_entry
        for batch in tuple(self._batches.values()):
            for opcode, count in batch.opcodes.items():
                counts[opcode] += count
        return counts_by_name(counts)

    # ---- Closing ---------------------------------------------------------------------------

    def notify_closing(self, fd: int | HasFileNo) -> None:
        """Wake every task that waits for *fd* with `trio.ClosedResourceError`; see Trio's docs."""
        if not isinstance(fd, int):
            fd = fd.fileno()
        if self.ring.usable:  # not in a forked child, whose epoll is its parent's
            with suppress(OSError):  # the kernel refuses; the next loop iteration deals with that
                self.close_fd(fd)
            self._readiness.fd_closing(fd)

    def close(self) -> None:
        """Drain the ring and close it. Trio calls this once, at the end of the run.

        The ring cannot be drained in another thread, for example if an abandoned guest run is
        garbage collected there. Then the objects that the kernel may still write to are leaked.
        """
        routes = self.run_state.routes()
        totals.add(self._completed_by_name(), routes, native=not self.why_python)
        if self.mailbox is not None:
            self.mailbox.close(drained=False)
        for completion in self._undispatched:
            self.discard(*completion)
        drained = self.ring.usable and self.drain()
        if self.native is not None:
            self.native.close()
        if drained:
            self.pools.close_all()
        elif not self.fallback_reason:
            _leaked.append((self._leak(), self.pools))
        self.native = self.ring.native = self.turn_budget.native = None
        self._run_queue = ()
        self.ring.close()
        self.run_state.close(drained=drained)
        if self._guest is not None:
            self._guest.close()
        self._readiness.close()
