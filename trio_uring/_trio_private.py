"""The private Trio APIs that this package calls or patches. Only `_trio_step` uses others.

They were checked in Trio 0.32 to 0.35. `check_trio` checks that the installed Trio has them. If one
is missing, it raises an error with the name, which is clearer than a failure later.
"""

from __future__ import annotations

import inspect
import os
import re
import types
import weakref
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from ._errors import IncompatibleTrioError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence, Sized
    from contextlib import AbstractContextManager

    import trio._core._run as _run
    import trio._file_io as _file_io
    import trio._highlevel_serve_listeners as _serve_listeners
    import trio._path as _path
    import trio._socket as _socket
    import trio._threads as _threads
    from trio._core._io_epoll import EpollIOManager
    from trio._core._run import GLOBAL_RUN_CONTEXT, SystemClock
    from trio._core._traps import (
        CancelShieldedCheckpoint,
        WaitTaskRescheduled as WaitTaskRescheduled,
    )
    from trio._file_io import AsyncIOWrapper
    from trio._highlevel_socket import (
        _translate_socket_errors_to_stream_errors as socket_errors_as_stream_errors,
    )
    from trio._socket import _SocketType as TrioSocket
    from trio._unix_pipes import FdStream
    from trio._util import ConflictDetector
    from trio.abc import Clock, Instrument
    from trio.lowlevel import Task

    class Unwrappable(Protocol):
        """An argument of ``reschedule``. The trap that the task waits in calls its ``unwrap``."""

        def unwrap(self) -> object:
            """Return or raise the result of the trap."""

    # As they were when this module was imported.
    TrioIOManager: type[EpollIOManager]  # on Linux
    trio_run_handler: Callable[..., Awaitable[None]]

    _absent: list[str]
else:
    # A later Trio may not have all of these, and Windows has no FdStream. Then `check_trio` refuses
    # it, and every run falls back. So nothing uses the stand-ins, but the package can be imported.
    _absent = []

    class _StandIn:
        __getattr__ = aclose = receive_some = send_all = None
        _nonblocking_helper = recv_into = recvfrom = sendto = None

        def __init__(self, *arguments: object) -> None:
            """Take what any of them takes."""

    def _private(name: str) -> object:
        module, _, attribute = name.rpartition(".")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            _absent.append(name)
            return _StandIn

    _run = _private("trio._core._run")
    _file_io = _private("trio._file_io")
    _serve_listeners = _private("trio._highlevel_serve_listeners")
    _path = _private("trio._path")
    _socket = _private("trio._socket")
    _threads = _private("trio._threads")
    EpollIOManager = _private("trio._core._io_epoll.EpollIOManager")
    GLOBAL_RUN_CONTEXT = _private("trio._core._run.GLOBAL_RUN_CONTEXT")
    SystemClock = _private("trio._core._run.SystemClock")
    CancelShieldedCheckpoint = _private("trio._core._traps.CancelShieldedCheckpoint")
    WaitTaskRescheduled = _private("trio._core._traps.WaitTaskRescheduled")
    AsyncIOWrapper = _private("trio._file_io.AsyncIOWrapper")
    socket_errors_as_stream_errors = _private(
        "trio._highlevel_socket._translate_socket_errors_to_stream_errors"
    )
    TrioSocket = _private("trio._socket._SocketType")
    FdStream = _private("trio._unix_pipes.FdStream")
    ConflictDetector = _private("trio._util.ConflictDetector")
    TrioIOManager = _private("trio._core._run.TheIOManager")
    trio_run_handler = _private("trio._highlevel_serve_listeners._run_handler")


__all__ = [
    "STREAM_NAMES",
    "AsyncIOWrapper",
    "EpollIOManager",
    "FdStream",
    "ObservedRun",
    "SteppedRun",
    "TrioIOManager",
    "TrioSocket",
    "WaitTaskRescheduled",
    "at_cancel_point",
    "check_trio",
    "count_schedule_point",
    "count_steps",
    "count_thread_hops",
    "counts_steps",
    "current_io_manager",
    "current_reschedule",
    "current_run_is_guest",
    "current_run_queue",
    "current_runner",
    "is_cancelled",
    "is_ready",
    "no_run_error",
    "patch_file_methods",
    "patch_io_manager",
    "patch_listener",
    "patch_socket_type",
    "patch_thread_hop",
    "release_send_conflict_detector",
    "schedule_point",
    "send_conflict_detector",
    "set_stream_methods",
    "socket_errors_as_stream_errors",
    "socket_stream",
    "trio_file_aclose",
    "trio_file_getattr",
    "trio_path_functions",
    "trio_run_handler",
]

OLDEST_TRIO: Final = (0, 32)
NEWEST_TRIO: Final = (0, 35)
OVERRIDE: Final = "TRIO_URING_ANY_TRIO"

_IO_MANAGER_MEMBERS: Final = (
    "statistics",
    "close",
    "force_wakeup",
    "get_events",
    "process_events",
    "wait_readable",
    "wait_writable",
    "notify_closing",
)

trio_file_getattr: Callable[[AsyncIOWrapper[object], str], object] = vars(AsyncIOWrapper)[
    "__getattr__"
]
trio_file_aclose: Callable[[AsyncIOWrapper[Any]], Awaitable[None]] = AsyncIOWrapper.aclose


def check_trio() -> None:
    """Raise `IncompatibleTrioError` if the installed Trio is not supported."""
    version = trio.__version__
    release = tuple(map(int, re.findall(r"\d+", version)[:2]))
    known = f"{_dotted(OLDEST_TRIO)} to {_dotted(NEWEST_TRIO)}"
    if not OLDEST_TRIO <= release <= NEWEST_TRIO and os.environ.get(OVERRIDE) != "1":
        raise IncompatibleTrioError(
            f"Trio {version} is installed, and trio_uring was tested with Trio {known}: install "
            f"one of these, or set {OVERRIDE}=1 to try it all the same"
        )
    missing = _missing_names()
    if missing:
        raise IncompatibleTrioError(
            f"Trio {version} is installed, and trio_uring, written for Trio {known}, does not "
            f"find {', '.join(missing)} in it: install one of these versions"
        )


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _missing_names() -> list[str]:
    if _absent:
        return _absent
    missing = [name for name in _IO_MANAGER_MEMBERS if not hasattr(TrioIOManager, name)]
    if "TheIOManager" not in _run.setup_runner.__code__.co_names:
        missing.append("TheIOManager in setup_runner")
    missing.extend(
        f"the thread hop of {function.__qualname__}"
        for function in (_file_io.open_file, _file_io.AsyncIOWrapper.aclose)
        if not {"trio", "to_thread", "run_sync"} <= set(function.__code__.co_names)
    )
    if "run_sync" not in vars(_path) or "stat" not in trio_path_functions().values():
        missing.append("the thread hop of trio.Path")
    if "_run_handler" not in _serve_listeners._serve_one_listener.__code__.co_names:
        missing.append("_run_handler in serve_listeners")
    if "unrolled_run" not in vars(_run):
        missing.append("unrolled_run")
    for owner, name in (
        (EpollIOManager, "_epoll"),
        (EpollIOManager, "_registered"),
        (TrioSocket, "_nonblocking_helper"),
        (TrioSocket, "_resolve_address_nocp"),
        (trio.SocketListener, "accept"),
        (trio.SocketStream, "receive_some"),
        (trio.SocketStream, "send_all"),
        (FdStream, "receive_some"),
        (FdStream, "send_all"),
    ):
        if not hasattr(owner, name) and name not in getattr(owner, "__slots__", ()):
            missing.append(f"{owner.__name__}.{name}")
    return missing


def current_io_manager() -> object:
    """Return the I/O manager of this thread's current run.

    Raises:
      RuntimeError: outside a run, with Trio's message and what to do.
    """
    try:
        return GLOBAL_RUN_CONTEXT.runner.io_manager
    except AttributeError:
        raise no_run_error() from None


def no_run_error() -> RuntimeError:
    """Return the error for a call outside a run."""
    return RuntimeError(
        "must be called from async context, and this thread has no Trio run: call it from a "
        "task of trio_uring.run or trio.run"
    )


def current_runner() -> object:
    """Return the runner of this thread's current run, for the native engine."""
    return GLOBAL_RUN_CONTEXT.runner


def current_run_queue() -> Sized:
    """Return the tasks of this thread's current run that run in the next loop iteration."""
    return GLOBAL_RUN_CONTEXT.runner.runq


def current_run_is_guest() -> bool:
    """Whether this thread's current run is a guest run."""
    return GLOBAL_RUN_CONTEXT.runner.is_guest


def counts_steps() -> bool:
    """Whether something in this thread's run depends on the steps of tasks.

    That is a clock other than Trio's, such as `trio.testing.MockClock`, an instrument, or Trio's
    deterministic scheduling, which Hypothesis uses.
    """
    runner = GLOBAL_RUN_CONTEXT.runner
    return (
        type(runner.clock) is not SystemClock
        or bool(runner.instruments["_all"])
        or _run._ALLOW_DETERMINISTIC_SCHEDULING
    )


def count_schedule_point() -> None:
    """Count a schedule point of the current task, for `trio.testing.assert_checkpoints`."""
    GLOBAL_RUN_CONTEXT.task._schedule_points += 1


def current_reschedule() -> Callable[[Task | None, Unwrappable], None]:
    """Return the current run's ``reschedule``. Saves the look-up of the public function."""
    return GLOBAL_RUN_CONTEXT.runner.reschedule  # type: ignore[return-value]  # takes an Outcome


@types.coroutine
def wait_rescheduled(
    message: WaitTaskRescheduled,
) -> Generator[WaitTaskRescheduled, Unwrappable, Unwrappable]:
    """Like ``wait_task_rescheduled``, but with a *message* that can be reused.

    Creating the message takes longer than everything else in this function. It returns the object
    that the task was rescheduled with, and does not unwrap it.
    """
    return (yield message)


@types.coroutine
def schedule_point() -> Generator[type[CancelShieldedCheckpoint], object, None]:
    """Do the same as ``cancel_shielded_checkpoint``, by fewer calls."""
    yield CancelShieldedCheckpoint


def is_cancelled(task: Task) -> bool:
    """Whether the next checkpoint of *task*, the current task, will raise."""
    return task._cancel_status.effectively_cancelled or (
        task is task._runner.main_task and task._runner.ki_pending
    )


def at_cancel_point(task: Task) -> bool:
    """Count a cancel point of *task*, the current task; return whether it will be cancelled."""
    task._cancel_points += 1
    return task._cancel_status.effectively_cancelled or (
        task is task._runner.main_task and task._runner.ki_pending
    )


def patch_io_manager(io_manager: type) -> None:
    """Make every later run create an *io_manager*. It must be a class: Trio's tests patch it."""
    setattr(_run, "TheIOManager", io_manager)  # noqa: B010


def patch_socket_type(socket_type: type[TrioSocket]) -> None:
    """Make all functions of Trio that create sockets return a *socket_type*."""
    setattr(_socket, "_SocketType", socket_type)  # noqa: B010


def set_stream_methods(
    stream_type: type[trio.SocketStream | FdStream],
    receive_some: Callable[..., object],
    send_all: Callable[..., object],
) -> None:
    """Replace two methods of `trio.SocketStream` or `trio.lowlevel.FdStream`, which are final."""
    stream_type.receive_some = receive_some  # type: ignore[assignment, method-assign]
    stream_type.send_all = send_all  # type: ignore[assignment, method-assign]


def patch_listener(accept: Callable[..., object], run_handler: Callable[..., object]) -> None:
    """Replace `trio.SocketListener.accept`, and the tasks that `trio.serve_listeners` starts."""
    trio.SocketListener.accept = accept  # type: ignore[assignment, method-assign]
    setattr(_serve_listeners, "_run_handler", run_handler)  # noqa: B010


# `_init_is_known` is whether the constructor of a stream does only what it does in Trio 0.32 to
# 0.35: it checks the socket, sets the stream's two attributes, and sets two socket options.
_STREAM_ATTRIBUTES: Final = ("socket", "_send_conflict_detector")
_SEND_CONFLICT: Final = "another task is currently sending data on this SocketStream"
_init_is_known: Final = set(trio.SocketStream.__init__.__code__.co_names) == {
    "isinstance", "tsocket", "SocketType", "TypeError", "type", "SOCK_STREAM", "ValueError",
    *_STREAM_ATTRIBUTES, "ConflictDetector", "suppress", "OSError", "setsockopt", "IPPROTO_TCP",
    "TCP_NODELAY", "hasattr", "TCP_NOTSENT_LOWAT",
} and _SEND_CONFLICT in trio.SocketStream.__init__.__code__.co_consts  # fmt: skip


def socket_stream(socket: TrioSocket) -> trio.SocketStream:
    """Return a stream of *socket*, on which the socket options of a stream are already set."""
    if not _init_is_known:
        return trio.SocketStream(socket)
    stream = trio.SocketStream.__new__(trio.SocketStream)
    stream.socket = socket
    stream._send_conflict_detector = ConflictDetector(_SEND_CONFLICT)
    return stream


# For the native engine: a stream's attributes that hold the socket and the conflict detector, the
# attribute that says whether that is held, and its class.
STREAM_NAMES: Final = (*_STREAM_ATTRIBUTES, "_held", ConflictDetector)


def send_conflict_detector(stream: trio.SocketStream) -> AbstractContextManager[None]:
    """Return the conflict detector, which allows only one task to send on *stream* at a time."""
    return stream._send_conflict_detector


def release_send_conflict_detector(stream: trio.SocketStream) -> None:
    """Release the conflict detector of *stream*, which the native engine has acquired."""
    stream._send_conflict_detector.__exit__(None, None, None)


class SteppedRun:
    """A Trio run that its caller drives, part by part, in the calling thread.

    It does what `trio.run` does, divided into calls of `drive`. It can also be used as a guest run
    without a second thread, for a host that has nothing to do while the guest waits. Between two
    calls, it remains the thread's current run, as a guest run does.

    Args:
      async_fn: The main task.
      clock: See `trio.run`.
      instruments: See `trio.run`.
      restrict_keyboard_interrupt_to_checkpoints: See `trio.run`.
      strict_exception_groups: See `trio.run`.
    """

    def __init__(
        self,
        async_fn: Callable[[], Awaitable[object]],
        *,
        clock: Clock | None = None,
        instruments: Sequence[Instrument] = (),
        restrict_keyboard_interrupt_to_checkpoints: bool = False,
        strict_exception_groups: bool = True,
    ) -> None:
        self._runner = _run.setup_runner(
            clock, instruments, restrict_keyboard_interrupt_to_checkpoints, strict_exception_groups
        )
        self._loop = _run.unrolled_run(self._runner, async_fn, ())
        self._begun = False
        self.finished = False

    def drive(self, is_enough: Callable[[], bool]) -> None:
        """Run until *is_enough* returns True or the run is finished.

        *is_enough* is called after each loop iteration. The caller must have rescheduled a task
        since the last call.
        """
        library = _run.sniffio_library  # type: ignore[attr-defined]
        previous, library.name = library.name, "trio"
        timeout = 0.0  # the timeout of the last call is out of date
        try:
            while not self.finished and not is_enough():
                timeout = self._step(timeout)
        finally:
            library.name = previous

    def _step(self, timeout: float) -> float:
        # The same as trio.run: there are no events before the first loop iteration.
        events = self._runner.io_manager.get_events(timeout) if self._begun else None
        self._begun = True
        try:
            return self._loop.send(events)  # type: ignore[arg-type]  # None in the first iteration
        except StopIteration:
            self.finished = True
        except BaseException:
            self.finished = True
            raise
        return 0.0

    def result(self) -> object:
        """Return what the main task returned, or raise what it raised."""
        outcome = self._runner.main_task_outcome
        assert outcome is not None
        return outcome.unwrap()


class ObservedRun:
    """A run that another thread looks at. It is made in the run's thread, with *io_manager*."""

    def __init__(self, io_manager: object) -> None:
        self._io_manager = weakref.ref(io_manager)
        # Of the thread that makes it: other threads have other ones.
        self._context = GLOBAL_RUN_CONTEXT.__dict__

    def io_manager(self) -> object:
        """Return the run's I/O manager; None if that is gone."""
        return self._io_manager()

    def _runner(self) -> _run.Runner | None:
        runner: _run.Runner | None = self._context.get("runner")
        if runner is None or runner.io_manager is not self._io_manager():
            return None  # the run has not begun, or has ended
        return runner

    def root_task(self) -> Task | None:
        """Return the run's root task; None if the run has not begun or has ended."""
        runner = self._runner()
        return None if runner is None else runner.init_task

    def run_soon(self, function: Callable[[], None]) -> bool:
        """Call *function*, which must not raise, in the run's loop. Return False if it has none."""
        runner = self._runner()
        if runner is None:
            return False
        try:
            runner.entry_queue.run_sync_soon(function)
        except trio.RunFinishedError:
            return False
        return True


def is_ready(task: Task) -> bool:
    """Whether *task* runs now or in the next loop iteration."""
    return task._abort_func is None


def count_steps(task: Task) -> int:
    """Return a number that stays the same only as long as *task* waits."""
    return task._schedule_points + task._cancel_points


def count_thread_hops() -> Callable[[], int]:
    """Count Trio's thread hops from now on; return a function that returns the count."""
    hops = 0
    original = vars(_threads)["start_thread_soon"]

    def counting(*args: object, **kwargs: object) -> object:
        nonlocal hops
        hops += 1
        return original(*args, **kwargs)

    setattr(_threads, "start_thread_soon", counting)  # noqa: B010
    return lambda: hops


# ---- Files and paths -----------------------------------------------------------------------


class _TrioForFiles:
    """Replaces the global name `trio` in Trio's module of file objects, with another thread hop.

    The file objects look ``trio.to_thread.run_sync`` up at each call. Replacing that would change
    the public function. Replacing the module's global name ``trio`` affects only the file objects,
    and all of them, no matter who imported them and when.
    """

    def __init__(self, run_sync: Callable[..., Awaitable[object]]) -> None:
        self.to_thread = SimpleNamespace(run_sync=run_sync)

    def __getattr__(self, name: str) -> object:
        return getattr(trio, name)


def patch_thread_hop(run_sync: Callable[..., Awaitable[object]]) -> None:
    """Make `trio.open_file`, Trio's file objects and `trio.Path` call *run_sync*.

    It is called in place of `trio.to_thread.run_sync`, with its positional arguments.
    """
    setattr(_file_io, "trio", _TrioForFiles(run_sync))  # noqa: B010
    setattr(_path, "run_sync", run_sync)  # noqa: B010


def patch_file_methods(
    getattr_: Callable[[AsyncIOWrapper[object], str], object],
    aclose: Callable[[AsyncIOWrapper[Any]], Awaitable[None]],
) -> None:
    """Replace how Trio's file objects create their methods, and how they are closed."""
    AsyncIOWrapper.__getattr__ = getattr_  # type: ignore[attr-defined]  # not for type checkers
    AsyncIOWrapper.aclose = aclose  # type: ignore[assignment, method-assign]


def trio_path_functions() -> dict[object, str]:
    """Return the functions that methods of `trio.Path` call in a thread, and the methods' names."""
    functions: dict[object, str] = {}
    for name, attribute in vars(trio.Path).items():
        method = getattr(attribute, "__func__", attribute)  # of a class method
        if inspect.iscoroutinefunction(method):
            function = inspect.getclosurevars(method).nonlocals.get("fn")
            if function is not None:
                functions[function] = name
    return functions
