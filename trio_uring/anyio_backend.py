"""The AnyIO backend ``trio_uring``: AnyIO's backend for Trio, on a ring.

``anyio.run(main, backend="trio_uring")`` starts a run with a ring. Inside the run, AnyIO uses its
backend ``trio``. When `trio_uring` is imported, that backend is replaced by ours too. It checks the
current run, and behaves as AnyIO's in a run without a ring.

Sockets, pipes and processes need no code here: AnyIO uses Trio's, which use the ring.
"""

from __future__ import annotations

import inspect
import io
import os
import pathlib
import tempfile
from contextvars import copy_context
from functools import partial, wraps
from types import CodeType, FunctionType, SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

import anyio
import trio
from anyio._backends import _trio as anyio_trio
from anyio._core import _eventloop, _fileio, _tempfile
from outcome import acapture

from ._anyio_versions import why_incompatible
from ._config import RingConfig
from ._files import (
    ARGUMENTS,
    OTHERWISE,
    ReadAhead,
    async_file_method,
    call_path,
    current_files,
    quick_call,
    result_of,
    route,
)
from ._files._methods import raw_of
from ._files._open import is_plain, open_file
from ._run import asking, check_ring, is_installed
from ._streams._anyio_native import use_engine
from ._streams._native import when_native
from ._trio_private import SteppedRun, schedule_point

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio import CapacityLimiter
    from anyio.streams.memory import MemoryObjectSendStream
    from outcome import Outcome
    from typing_extensions import ParamSpec, TypeVarTuple, Unpack

    from ._files._bridge import FilesRun

    P = ParamSpec("P")
    PosArgsT = TypeVarTuple("PosArgsT")

T = TypeVar("T")

# The methods and functions that this module overrides or calls, with the names of their parameters.
_SIGNATURES: Final = {
    ("TrioBackend", "run"): "func args kwargs options",
    ("TrioBackend", "create_test_runner"): "options",
    ("TrioBackend", "run_sync_in_worker_thread"): "func args abandon_on_cancel limiter",
    ("SocketStream", "receive"): "self max_bytes",
    ("SocketStream", "send"): "self item",
    ("TestRunner", "__init__"): "self options",
    ("TestRunner", "__exit__"): "self exc_type exc_val exc_tb",
    ("TestRunner", "_call_in_runner_task"): "self func args kwargs",
    ("TestRunner", "_run_tests_and_fixtures"): "self",
}


# The iterator of a path's iterdir, glob and rglob.
_PathIterator: Final[Any] = vars(_fileio)["_PathIterator"]
_anyio_anext: Final = vars(_PathIterator)["__anext__"]


def check_anyio() -> None:
    """Raise RuntimeError if the installed version of AnyIO is not supported."""
    if reason := why_incompatible():
        raise RuntimeError(reason)
    for (owner, name), expected in _SIGNATURES.items():
        method = getattr(vars(anyio_trio).get(owner), name, None)
        found = " ".join(inspect.signature(method).parameters) if method is not None else None
        if found != expected:
            raise RuntimeError(
                f"the installed AnyIO's {owner}.{name} takes ({found}), and trio_uring's backend "
                f"for it was written for ({expected}): install an older AnyIO"
            )
    if not {"next", "iterator"} <= set(_anyio_anext.__code__.co_names):
        raise RuntimeError(
            "the installed AnyIO's paths are not iterated over by next(), for which trio_uring's "
            "backend was written: install an older AnyIO"
        )


check_anyio()


class RingAwareBackend(anyio_trio.TrioBackend):
    """AnyIO's backend ``trio``, except that files use the ring in a run that has one."""

    @classmethod
    async def run_sync_in_worker_thread(
        cls,
        func: Callable[[Unpack[PosArgsT]], T],
        args: tuple[Unpack[PosArgsT]],
        abandon_on_cancel: bool = False,  # noqa: FBT001, FBT002 (AnyIO's signature)
        limiter: CapacityLimiter | None = None,
    ) -> T:
        """Call ``func(*args)`` on the ring if the ring supports it, otherwise in a thread."""
        if limiter is None:
            value = call_path(func, args)
            if value is not OTHERWISE:
                if type(value) is not tuple:
                    return cast("T", value)
                await schedule_point()
                return cast("T", result_of(value))
        files = current_files()
        if files is not None and limiter is None:  # a caller's own limiter means a thread
            paths = _paths_of_next(func, args)
            if paths is not None:
                return cast("T", await cls._next(files, paths))
            value = await quick_call(files, func, args)
            if value is not OTHERWISE:
                return cast("T", value)
            call = route(files, func, args) or route(
                files, _unwrapped(func), _with_plain_paths(args)
            )
            if call is not None:
                return await (_abandonable(call) if abandon_on_cancel else call())
        if files is not None and _is_about_files(func):
            files.in_thread += 1
            func = _with_our_files(func)
        return await super().run_sync_in_worker_thread(func, args, abandon_on_cancel, limiter)

    @classmethod
    async def _next(cls, files: FilesRun, paths: ReadAhead[object]) -> object:
        if paths.is_ready:
            await trio.lowlevel.checkpoint()
            files.inline += 1
        else:
            files.in_thread += 1
            await super().run_sync_in_worker_thread(paths.read, (), abandon_on_cancel=True)
        return next(paths, None)

    @classmethod
    def create_test_runner(cls, options: dict[str, Any]) -> anyio_trio.TestRunner:
        """Return a runner for AnyIO's pytest plugin."""
        if is_installed():
            return UringTestRunner(**options)
        return super().create_test_runner(options)


class TrioUringBackend(RingAwareBackend):
    """AnyIO's backend ``trio_uring``, which starts runs that have a ring.

    ``backend_options`` are those of AnyIO's backend ``trio``, and ``ring``, a `RingConfig`.
    """

    @classmethod
    def run(
        cls,
        func: Callable[[Unpack[PosArgsT]], Awaitable[T]],
        args: tuple[Unpack[PosArgsT]],
        kwargs: dict[str, Any],
        options: dict[str, Any],
    ) -> T:
        """Run *func* as `trio_uring.run` does.

        Raises:
          RingUnavailableError: see `trio_uring.run`.
        """
        assert not kwargs, kwargs  # AnyIO passes none
        _check_options(options)
        others = {name: value for name, value in options.items() if name != "ring"}
        # Not super().run, which ignores the options in older releases of AnyIO.
        with asking(options.get("ring")):
            return trio.run(_returning_coroutine(func), *args, **others)

    @classmethod
    def create_test_runner(cls, options: dict[str, Any]) -> anyio_trio.TestRunner:
        """Return a runner for AnyIO's pytest plugin."""
        _check_options(options)
        return UringTestRunner(**options)


class UringTestRunner(anyio_trio.TestRunner):
    """Runs tests and fixtures in one run with a ring, in the calling thread.

    AnyIO's own runner uses Trio's guest mode, which waits for I/O in a second thread.

    Args:
      ring: How to set up the ring; None for the defaults.
      **options: As for AnyIO's backend ``trio``.
    """

    _send_stream: MemoryObjectSendStream[tuple[Awaitable[Any], list[Outcome[Any]]]] | None

    def __init__(self, *, ring: RingConfig | None = None, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self._ring = ring
        self._options = options
        self._run: SteppedRun | None = None

    def __exit__(self, *_exc: object) -> None:
        """End the run. Fixtures have ended before."""
        run = self._run
        if run is not None:
            if self._send_stream is not None:
                self._send_stream.close()
            self._drive(run, lambda: False)
            self._forget()
            run.result()

    def _call_in_runner_task(
        self, func: Callable[P, Awaitable[T]], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        run = self._run
        if run is None:
            with asking(self._ring):
                run = self._run = SteppedRun(self._run_tests_and_fixtures, **self._options)
            self._drive(run, lambda: self._send_stream is not None)
        outcomes: list[Outcome[T]] = []
        if self._send_stream is not None:
            self._send_stream.send_nowait((func(*args, **kwargs), outcomes))
            self._drive(run, lambda: bool(outcomes))
        if not outcomes:
            self._forget()
            run.result()
            raise RuntimeError("the run of tests and fixtures ended in the middle of one")
        return outcomes[0].unwrap()

    def _drive(self, run: SteppedRun, is_enough: Callable[[], bool]) -> None:
        try:
            run.drive(is_enough)
        except BaseException:  # Trio itself has crashed: the next call gets a new run
            self._forget()
            raise

    def _forget(self) -> None:
        if self._send_stream is not None:
            self._send_stream.close()
        self._run = self._send_stream = None


_OPTIONS: Final = (
    *("clock", "instruments", "restrict_keyboard_interrupt_to_checkpoints"),
    *("strict_exception_groups", "ring"),
)


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in RingConfig.__annotations__:
            raise TypeError(
                f"backend_options has {name!r}, which belongs into a RingConfig: write "
                f"backend_options={{'ring': RingConfig({name}=...)}}"
            )
        if name not in _OPTIONS:
            raise TypeError(
                f"backend_options has {name!r}, and must have no others than {', '.join(_OPTIONS)}"
            )
    check_ring(options.get("ring"))


def _returning_coroutine(
    func: Callable[[Unpack[PosArgsT]], Awaitable[T]],
) -> Callable[[Unpack[PosArgsT]], Awaitable[T]]:
    # Later releases of AnyIO accept functions that return other awaitables.
    ensure = vars(anyio_trio).get("ensure_returns_coro")
    return func if ensure is None else ensure(func)


async def _abandonable(call: Callable[[], Awaitable[T]]) -> T:
    """Await *call*. If cancelled, abandon it, as AnyIO does with a thread.

    AnyIO's paths use this for calls that change nothing. A ``stat`` on a network file system
    doesn't return while the network is down, and its operation cannot be cancelled.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    task: trio.lowlevel.Task | None = trio.lowlevel.current_task()

    async def run() -> None:
        result = await acapture(call)
        if task is not None:
            trio.lowlevel.reschedule(task, result)

    def abort(_raise_cancel: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        nonlocal task
        task = None
        return trio.lowlevel.Abort.SUCCEEDED

    trio.lowlevel.spawn_system_task(run, context=copy_context())
    return cast("T", await trio.lowlevel.wait_task_rescheduled(abort))


# --- Files ----------------------------------------------------------------------------------
#
# AnyIO wraps the files that the standard library's `tempfile` opens. We make `tempfile` open files
# of ours, whose methods the route table knows.

_TEMPFILE: Final = _tempfile.__name__
_OPENERS: Final = ("NamedTemporaryFile", "TemporaryFile")

# A NamedTemporaryFile wraps each method of its file in a function, so that the file is not deleted
# while the method exists. We can call the method itself, as our caller holds the function.
_hide: Final = cast("FunctionType", vars(tempfile)["_TemporaryFileWrapper"].__getattr__)
_HIDING: Final = next(
    (constant for constant in _hide.__code__.co_consts if isinstance(constant, CodeType)),
    None,
)


@wraps(_anyio_anext)
async def _read_ahead(self: Any) -> Any:  # noqa: ANN401 (AnyIO's private class)
    # In a run without a ring, and on asyncio, AnyIO calls ``next`` in a thread as before.
    if (
        type(self.iterator) is not ReadAhead
        and trio.lowlevel.in_trio_task()
        and current_files() is not None
    ):
        self.iterator = ReadAhead(self.iterator)
    return await _anyio_anext(self)


def _paths_of_next(func: object, args: tuple[object, ...]) -> ReadAhead[object] | None:
    if func is next and args and isinstance(args[0], ReadAhead) and args[1:] == (None,):
        return args[0]
    return None


def _with_plain_paths(args: tuple[object, ...]) -> tuple[Any, ...]:
    # The route table does not know the class of AnyIO's paths.
    return tuple([os.fspath(arg) if type(arg) is anyio.Path else arg for arg in args])


def _unwrapped(function: Callable[..., T]) -> Callable[..., T]:
    if type(function) is FunctionType and function.__code__ is _HIDING:
        return cast("Callable[..., T]", vars(function)["__wrapped__"])
    return function


def _with_our_files(
    function: Callable[[Unpack[PosArgsT]], T],
) -> Callable[[Unpack[PosArgsT]], T]:
    """Return *function*. If AnyIO opens temporary files with it, return a copy that opens ours."""
    if (
        type(function) is FunctionType
        and function.__module__ == _TEMPFILE
        and not set(_OPENERS).isdisjoint(function.__code__.co_names)
    ):
        openers = {name: _opening_ours(vars(tempfile)[name]) for name in _OPENERS}
        ours = _with_globals(function, tempfile=SimpleNamespace(**openers))
        return cast("Callable[[Unpack[PosArgsT]], T]", ours)
    return function


def _opening_ours(opener: Callable[..., T]) -> Callable[..., T]:
    if type(opener) is not FunctionType or opener.__module__ != "tempfile":  # replaced by somebody
        return opener
    return _with_globals(opener, _io=SimpleNamespace(**{**vars(io), "open": _open}))


def _open(*args: Any, **keywords: Any) -> IO[Any]:  # noqa: ANN401 (open's)
    # For arguments that open_file doesn't support, io.open opens the file, or raises its errors.
    function = open_file if is_plain(*args, **keywords) else io.open
    file = cast("IO[Any]", function(*args, **keywords))
    raw = raw_of(file)
    if raw is not None:
        raw.set_private()  # tempfile opens by fd, but gives the fd to nobody else
    return file


def _with_globals(function: FunctionType, **names: object) -> Callable[..., Any]:
    """Return a copy of *function* in which the globals *names* have other values."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_FILE_MODULES: Final = frozenset(
    (
        *("_io", "genericpath", "glob", "io", "os", "pathlib", "posix", "posixpath", "shutil"),
        *("tempfile", "anyio._core._fileio", _TEMPFILE),
    )
)


def _is_about_files(function: Callable[..., object]) -> bool:
    """Return whether *function* is a call on a file or path. The statistics count only those."""
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.IOBase | pathlib.PurePath):
        return True
    module = getattr(function, "__module__", None) or ""
    return module in _FILE_MODULES or module.startswith("pathlib.")


# --- Registration ---------------------------------------------------------------------------

# AnyIO reads this attribute of ``anyio._backends._trio_uring``.
backend_class: Final = TrioUringBackend


def register() -> None:
    """Replace AnyIO's backend for Trio with ours, unless it is another package's."""
    if anyio_trio.backend_class is anyio_trio.TrioBackend:
        anyio_trio.backend_class = RingAwareBackend
    if _eventloop.loaded_backends.get("trio") is anyio_trio.TrioBackend:
        _eventloop.loaded_backends["trio"] = RingAwareBackend
    _PathIterator.__anext__ = _read_ahead
    for name in ARGUMENTS:
        original = vars(anyio.AsyncFile)[name]
        if {"to_thread", "run_sync", "_fp", name} <= set(original.__code__.co_names):
            setattr(anyio.AsyncFile, name, async_file_method(name, original))


register()
when_native(partial(use_engine, anyio_trio.SocketStream, anyio.ResourceGuard))
