"""`GreenletBridge`: runs a synchronous call so that it can wait for the ring.

Why a greenlet
--------------

Facts. CPython's buffered and text files are synchronous C code, which cannot await. If we rewrote
them as coroutines, we would have to maintain newline modes, decoders, ``tell()`` cookies, and
whatever CPython adds. But they call their lowest layer, the raw file, as a Python object.

What does this mean for us? The call runs in a greenlet, which has its own C stack. Where the raw
file needs the ring, it switches to the task, which awaits the operation and switches back with the
result. To the layers above, the raw file is an object whose methods block.

Guarantees
----------

- Cancellation is checked once, before the call. A check between two raw reads of one ``readline``
  would lose what the first one read.
- The call runs in a copy of the task's context variables, as it would in a thread.
- Ctrl-C does not interrupt it. Trio searches the stack for protected frames; a greenlet's stack
  ends where the call begins, which counts as protected.
- Greenlets are pooled: a new one costs 9 microseconds, a reused one 0.6 (Python 3.11).

Exit with daemon threads
------------------------

Facts. Until Python 3.13, a daemon thread that needs the GIL after the interpreter began to
finalize ends in ``pthread_exit``, which unwinds the thread's C stack and runs C++ destructors. If
the thread is in a greenlet, the unwinder reaches stack memory that the thread has since used for
other calls. greenlet's destructors then drop references to garbage, and the process crashes.

What does this mean for us? An exit function waits until no daemon thread runs or is about to
resume a call. A call that begins there later waits until it is cancelled, or the process ends; one
that must not be cancelled blocks the thread. It uses no worker thread: until Python 3.11, starting
a thread during the exit can crash, too.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from contextvars import copy_context
from threading import get_ident
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from weakref import WeakSet, ref

import trio
from outcome import capture
from trio.lowlevel import (
    checkpoint_if_cancelled,
    current_task,
    enable_ki_protection,
)

from trio_uring._engine._io_manager import current_ring
from trio_uring._engine._run_state import RunResource
from trio_uring._trio_private import at_cancel_point, schedule_point

if TYPE_CHECKING:
    from greenlet import __version__ as _version, getcurrent, greenlet
else:
    try:
        from greenlet import __version__ as _version, getcurrent, greenlet
    except ImportError:
        _version = ""
        greenlet = object

        def getcurrent() -> greenlet:
            """Replace greenlet's function where there is no greenlet. Never called."""
            raise NotImplementedError


__all__ = [
    "BRIDGE_REFUSED",
    "INLINE_MAX",
    "FilesRun",
    "GreenletBridge",
    "current_bridge",
    "current_files",
    "getcurrent",
]

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._operations import Operation

    from ._raw import RingFileIO

T = TypeVar("T")

# Idle greenlets that a run keeps, of about 1 KiB each. More simultaneous calls get new ones, which
# cost 9 microseconds instead of 0.6.
POOL_MAX: Final = 64

# How many bytes a call may copy from the page cache in the loop's thread before other tasks run: 25
# microseconds' worth. At double, 32 tasks that read at once would block the loop for 1.6 ms.
INLINE_MAX: Final = 256 * 1024

# How much a read to the end reads first. Few files that are read whole are longer. At double, the
# copy out of it would not fit in the processor's nearest caches; at half, fewer files fit.
_SCRATCH_SIZE: Final = 65536 + 1  # one more, to detect the end of a file of 64 KiB

# Greenlets that can never be resumed, and the files that they use: leaked on purpose.
_leaked: Final[list[object]] = []

# How long the exit waits for daemon threads. A call takes milliseconds, unless it is for a broken
# disk, or waits for a pipe, which is not waited for. At double, the exit would seem to hang.
_EXIT_TIMEOUT: Final = 1.0


def _why_no_bridge() -> str:
    if not _version:
        return "files: greenlet is not installed"
    gil_enabled = getattr(sys, "_is_gil_enabled", lambda: True)
    release = tuple(int(part) for part in _version.split(".")[:3] if part.isdigit())
    if not gil_enabled() and release < (3, 5, 6):
        return f"files: greenlet {_version} is not safe without the GIL; 3.5.6 is"
    if sys.implementation.name != "cpython":
        return f"files: not tested on {sys.implementation.name}"
    return ""


# Why there are no bridges, so that all calls on files go to threads; empty if there are bridges.
BRIDGE_REFUSED: Final = _why_no_bridge()


class GreenletBridge(greenlet):
    """A pooled greenlet that runs one call after another. Its methods are for use inside a call.

    Args:
      files: The state of the run's files.
    """

    value: object = None
    failure: BaseException | None = None
    budget = INLINE_MAX  # bytes that the call may still copy before other tasks run
    cancellable = False  # whether waits for pipes may be cancelled
    threaded = False  # whether a part of the call went to a thread

    def __init__(self, files: FilesRun) -> None:
        super().__init__()
        self.files = files
        self.manager = files.manager
        self.adopted: list[ref[RingFileIO]] = []

    def run(  # pyright: ignore[reportIncompatibleMethodOverride] (greenlet's documented way)
        self,
        *start: Any,  # noqa: ANN401 (a function that runs a call, the call, and its arguments)
    ) -> None:
        """Run a call, and then one more for each switch from a task."""
        while True:
            run, function, args = start
            del start
            try:
                self.value = run(function, *args)
            except BaseException as exc:  # noqa: BLE001 (the task raises it)
                self.failure = exc
            del run, function, args
            start = self.parent.switch(None)  # type: ignore[union-attr]

    def wait_for(self, steps: Coroutine[Any, Any, T]) -> T:
        """Have the task await *steps*; return their result, or raise their exception."""
        self.files.running -= 1
        try:
            return self._switch_to_task(steps)
        finally:
            self.files.running += 1

    def _switch_to_task(self, steps: Coroutine[Any, Any, T]) -> T:
        self.budget = INLINE_MAX  # other tasks run meanwhile
        return cast("T", self.parent.switch(steps))  # type: ignore[union-attr]

    def perform(self, operation: Operation[T]) -> T:
        """Perform *operation*, which ends by itself, ignoring cancellation."""
        return self._switch_to_task(self.manager.perform_shielded(operation))

    def perform_cancellable(self, operation: Operation[T]) -> T:
        """Perform *operation*; it can be cancelled."""
        return self.wait_for(self.manager.perform(operation))

    def call_in_thread(self, function: Callable[[], T]) -> T:
        """Run *function* in a worker thread. There the bridge's files do not use the ring."""
        self.threaded = True
        return self.wait_for(_in_thread_shielded(function))

    def adopt(self, raw: RingFileIO) -> None:
        """Let *raw*, which was created inside the call, use the ring until the call ends."""
        raw.bridge = self
        self.adopted.append(ref(raw))  # it may be collected before the call ends


def current_bridge() -> GreenletBridge | None:
    """Return the bridge that the calling code runs on, or None."""
    bridge = getcurrent()
    return bridge if isinstance(bridge, GreenletBridge) else None


async def _in_thread_shielded(function: Callable[[], T]) -> T:
    # The call has begun, so it must not end here: run_sync would check for cancellation first.
    with trio.CancelScope(shield=True):
        return (await trio.to_thread.run_sync(capture, function)).unwrap()
    raise AssertionError("a shielded scope swallows no exception")


class FilesRun(RunResource):
    """The state of a run's files: the pool of bridges, and how many calls went which way.

    Args:
      manager: The run's I/O manager.
    """

    def __init__(self, manager: UringIOManager) -> None:
        self.manager = manager
        self.idle: list[GreenletBridge] = []
        self.on_ring = 0
        self.inline = 0
        self.in_thread = 0
        self.waiting_opens = 0  # of FIFOs: each occupies a kernel worker
        self.running = 0  # calls on bridges, except those that can wait indefinitely now
        self.thread = get_ident()
        self.is_exiting = _exit.adds(self)
        # For reads that do not wait, whose result is copied out before other code runs.
        self.scratch = memoryview(bytearray(_SCRATCH_SIZE))
        if manager.native is not None:
            manager.native.has_files = True

    @enable_ki_protection
    async def call(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...] = (),
        raw: RingFileIO | None = None,
        cancellable: bool = False,  # noqa: FBT001, FBT002 (a keyword costs as much as a call)
        *,
        shielded: bool = False,
    ) -> T:
        """Run ``function(*args)`` on a bridge; *raw*, if given, uses the ring meanwhile.

        A checkpoint. If cancelled before it begins, nothing was done; *shielded* ignores that.
        After that it can be cancelled only if *cancellable*, while it waits for a pipe or terminal.

        Raises:
          BaseException: what *function* raises.
        """
        if at_cancel_point(current_task()) and not shielded:
            await checkpoint_if_cancelled()
        bridge = self.idle.pop() if self.idle else GreenletBridge(self)
        if raw is not None:
            if raw.busy:
                await self._acquire(bridge, raw, shielded=shielded)
            raw.busy = True
            raw.bridge = bridge
            raw.lines = 0
        bridge.parent = getcurrent()
        bridge.cancellable = cancellable
        self.running += 1
        if self.is_exiting:
            return await self._call_at_exit(function, args, raw, shielded=shielded)
        wait = bridge.switch(copy_context().run, function, args)
        waited = wait is not None
        while wait is not None:
            try:
                answer = await wait
            except GeneratorExit:
                # The run crashed, or was abandoned and is being collected, maybe in another thread.
                # The greenlet must not be resumed any more, and unwinding it would free a buffer
                # that the kernel may still write to.
                _leaked.append((bridge, raw))
                raise
            except BaseException as exc:  # noqa: BLE001 (it is raised inside the call)
                wait = bridge.throw(exc)
            else:
                wait = bridge.switch(answer)
        value, failure = bridge.value, bridge.failure
        self._put_back(bridge, raw, waited)
        if not waited and not self.manager.turn_budget.skip_schedule_point():
            await schedule_point()
        if failure is None:
            return cast("T", value)
        try:
            raise failure
        finally:
            # Or there would be a reference cycle: the traceback refers to this frame.
            del failure

    async def _acquire(self, bridge: GreenletBridge, raw: RingFileIO, *, shielded: bool) -> None:
        try:
            with trio.CancelScope(shield=shielded):
                await raw.acquire()
        except BaseException:
            self.idle.append(bridge)
            raise

    def _put_back(
        self,
        bridge: GreenletBridge,
        raw: RingFileIO | None,
        waited: bool,  # noqa: FBT001 (as above)
    ) -> None:
        self.running -= 1
        if raw is not None:
            raw.bridge = None
            raw.release()
        bridge.value = bridge.failure = None
        if not waited:
            self.inline += 1
            bridge.budget = INLINE_MAX
        elif bridge.threaded:
            bridge.threaded = False
            self.in_thread += 1
        else:
            self.on_ring += 1
        if bridge.adopted:
            for adopted in bridge.adopted:
                raw = adopted()
                if raw is not None:
                    raw.bridge = None
            bridge.adopted.clear()
        if len(self.idle) < POOL_MAX:
            self.idle.append(bridge)
        else:
            _end(bridge)

    async def _call_at_exit(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        raw: RingFileIO | None,
        *,
        shielded: bool,
    ) -> T:
        """Block for a call that must not be cancelled; let any other wait for the exit."""
        self.running -= 1
        if raw is not None:
            raw.bridge = None
        try:
            if not shielded:
                await trio.sleep_forever()
            return function(*args)
        finally:
            if raw is not None:
                raw.release()

    @enable_ki_protection
    async def call_inline(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...],
        raw: RingFileIO,
        *,
        shielded: bool = False,
    ) -> T:
        """Call ``function(*args)``, a method of a file over *raw* that never waits, directly."""
        if at_cancel_point(current_task()) and not shielded:
            await checkpoint_if_cancelled()
        if raw.busy:
            with trio.CancelScope(shield=shielded):
                await raw.acquire()
        raw.busy = True
        try:
            value = function(*args)
        finally:
            raw.release()
        self.inline += 1
        if not self.manager.turn_budget.skip_schedule_point():
            await schedule_point()
        return value

    @enable_ki_protection
    async def perform(
        self,
        describe: Callable[[], Operation[T]],
        raw: RingFileIO,
        finish: Callable[[T], object] | None = None,
    ) -> T:
        """Perform the operation on *raw* that *describe* returns, without a bridge.

        Its result is passed to *finish* before another task can use *raw*.

        A checkpoint. If cancelled before it begins, nothing was done. Once begun, it completes.

        Raises:
          OSError: the operation failed.
          BaseException: what *describe* raises.
        """
        if at_cancel_point(current_task()):
            await checkpoint_if_cancelled()
        if raw.busy:
            await raw.acquire()
        raw.busy = True
        try:
            operation = describe()
            raw.used_ring = True
            result = await self.manager.perform_shielded(operation)
            if finish is not None:
                finish(result)
        finally:
            raw.release()
        self.on_ring += 1
        return result

    @enable_ki_protection
    async def call_in_thread(
        self,
        function: Callable[..., T],
        args: tuple[Any, ...] = (),
        raw: RingFileIO | None = None,
        *,
        shielded: bool = False,
    ) -> T:
        """Call ``function(*args)``, a method of a file over *raw*, in a worker thread."""
        self.in_thread += 1
        with trio.CancelScope(shield=shielded):
            if raw is None:
                return await trio.to_thread.run_sync(function, *args)
            await checkpoint_if_cancelled()
            if raw.busy:
                await raw.acquire()
            raw.busy = True
            raw.lines = 0
            try:
                return await trio.to_thread.run_sync(function, *args)
            finally:
                raw.release()
        raise AssertionError("the scope is never cancelled itself")

    # ---- `RunResource` ---------------------------------------------------------------------

    def routes(self) -> Mapping[str, int]:
        """Return how many calls took which route."""
        native = self.manager.native
        inline = self.inline + (0 if native is None else native.file_hits)
        return {"ring": self.on_ring, "inline": inline, "thread": self.in_thread}

    def refused(self) -> tuple[str, ...]:
        """Return why there are no bridges, if there are none."""
        return (BRIDGE_REFUSED,)

    def close(self, *, drained: bool) -> None:
        """End the pooled greenlets; leak them if this may be another thread than theirs."""
        _exit.runs.discard(self)
        if drained:
            for bridge in self.idle:
                _end(bridge)
        else:
            _leaked.append(self.idle)
        self.idle = []


def _end(bridge: GreenletBridge) -> None:
    bridge.parent = getcurrent()
    bridge.throw()  # GreenletExit, by default


def current_files() -> FilesRun | None:
    """Return what the current run keeps for its files; None if it uses no ring for them.

    Raises:
      RuntimeError: outside a run.
    """
    manager = current_ring("files")
    return None if manager is None else manager.run_state.get(FilesRun, manager)


# ---- Exit ----------------------------------------------------------------------------------


class _Exit:
    """What the exit of the interpreter waits for."""

    def __init__(self) -> None:
        self.thread: int | None = None  # the one that exits
        self.runs: WeakSet[FilesRun] = WeakSet()

    def adds(self, run: FilesRun) -> bool:
        """Add a new *run*; return whether it may begin no calls on bridges."""
        self.runs.add(run)
        return self.thread is not None and self.thread != run.thread

    def begin(self) -> None:
        """Let no call begin in other threads, and wait until those that run there have ended."""
        self.thread = get_ident()
        for run in list(self.runs):
            run.is_exiting = run.thread != self.thread
        end = time.monotonic() + _EXIT_TIMEOUT
        while self.must_wait() and time.monotonic() < end:
            time.sleep(0.001)

    def must_wait(self) -> bool:
        """Whether another thread is running a call, or will soon go on with one."""
        own = get_ident()
        return any(run.running for run in list(self.runs) if run.thread != own)

    def forget_parent(self) -> None:
        """Forget, in a forked child, the runs of threads that it does not have."""
        self.runs.clear()


_exit: Final = _Exit()
atexit.register(_exit.begin)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_exit.forget_parent)
