"""AnyIO's backend ``trio_uring``: its backend for Trio, on a ring.

``anyio.run(main, backend="trio_uring")`` starts a run with a ring. What AnyIO does inside, it
does through its backend ``trio``; that is ours as well, once `trio_uring` is imported, and asks
the current run. In a run without a ring, each is AnyIO's own.

Sockets, pipes and processes need nothing here: AnyIO uses Trio's, which are on the ring.
"""

from __future__ import annotations

import inspect
import io
import os
import pathlib
import tempfile
from contextvars import copy_context
from functools import partial
from types import CodeType, FunctionType, SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar, cast

import anyio
import trio
from anyio._backends import _trio as anyio_trio
from anyio._core import _eventloop, _tempfile
from outcome import acapture

from ._anyio_versions import why_incompatible
from ._files import current_files, route
from ._files._methods import raw_of
from ._files._open import is_plain, open_file
from ._run import asking, is_installed
from ._trio_private import SteppedRun

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from anyio import CapacityLimiter
    from anyio.streams.memory import MemoryObjectSendStream
    from outcome import Outcome
    from typing_extensions import ParamSpec, TypeVarTuple, Unpack

    from ._config import RingConfig

    P = ParamSpec("P")
    PosArgsT = TypeVarTuple("PosArgsT")

T = TypeVar("T")

# What the classes below override or rely on, with the names of its parameters.
_SIGNATURES: Final = {
    ("TrioBackend", "run"): "func args kwargs options",
    ("TrioBackend", "create_test_runner"): "options",
    ("TrioBackend", "run_sync_in_worker_thread"): "func args abandon_on_cancel limiter",
    ("TestRunner", "__init__"): "self options",
    ("TestRunner", "__exit__"): "self exc_type exc_val exc_tb",
    ("TestRunner", "_call_in_runner_task"): "self func args kwargs",
    ("TestRunner", "_run_tests_and_fixtures"): "self",
}


def check_anyio() -> None:
    """Raise RuntimeError if the installed AnyIO is not one that this was written for."""
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


check_anyio()


class RingAwareBackend(anyio_trio.TrioBackend):
    """What AnyIO finds under the name ``trio``: its own, but for files, in a run with a ring."""

    @classmethod
    async def run_sync_in_worker_thread(
        cls,
        func: Callable[[Unpack[PosArgsT]], T],
        args: tuple[Unpack[PosArgsT]],
        abandon_on_cancel: bool = False,  # noqa: FBT001, FBT002 (AnyIO's signature)
        limiter: CapacityLimiter | None = None,
    ) -> T:
        """Call ``func(*args)`` on the ring if that has such a call, else in a thread."""
        files = current_files()
        if files is not None and limiter is None:  # a limiter of one's own asks for a thread
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
    def create_test_runner(cls, options: dict[str, Any]) -> anyio_trio.TestRunner:
        """Return a runner for AnyIO's pytest plugin."""
        if is_installed():
            return UringTestRunner(**options)
        return super().create_test_runner(options)


class TrioUringBackend(RingAwareBackend):
    """What AnyIO finds under the name ``trio_uring``: starts runs that have a ring.

    ``backend_options`` are those of AnyIO's backend ``trio``, and ``ring``: a `RingConfig`.
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
        assert not kwargs, kwargs  # AnyIO has none for a backend of Trio
        others = {name: value for name, value in options.items() if name != "ring"}
        # Not the method that this one overrides: in older releases that ignores the options.
        with asking(options.get("ring")):
            return trio.run(_returning_coroutine(func), *args, **others)

    @classmethod
    def create_test_runner(cls, options: dict[str, Any]) -> anyio_trio.TestRunner:
        """Return a runner for AnyIO's pytest plugin."""
        return UringTestRunner(**options)


class UringTestRunner(anyio_trio.TestRunner):
    """Runs tests and fixtures in one run with a ring, which it drives in the calling thread.

    AnyIO's runner makes its run the guest of a queue, and waits for I/O in a second thread.

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
        """End the run; fixtures have ended before."""
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
        except BaseException:  # Trio itself has crashed: what comes next gets a new run
            self._forget()
            raise

    def _forget(self) -> None:
        if self._send_stream is not None:
            self._send_stream.close()
        self._run = self._send_stream = None


def _returning_coroutine(
    func: Callable[[Unpack[PosArgsT]], Awaitable[T]],
) -> Callable[[Unpack[PosArgsT]], Awaitable[T]]:
    # Later releases take functions that return other awaitables.
    ensure = vars(anyio_trio).get("ensure_returns_coro")
    return func if ensure is None else ensure(func)


async def _abandonable(call: Callable[[], Awaitable[T]]) -> T:
    """Await *call*; if cancelled, leave it to itself, as AnyIO does with a thread.

    Its paths do that where nothing is changed: a ``stat`` of a file system behind a network that
    is down ends when that is up again, and no operation can be taken back from there.
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
# AnyIO wraps what the standard library's `tempfile` makes. Where that opens a file, it shall be
# one of ours; then the route table knows its methods.

_TEMPFILE: Final = _tempfile.__name__
_OPENERS: Final = ("NamedTemporaryFile", "TemporaryFile")

# A NamedTemporaryFile hides each method of its file in a function, which keeps it from being
# deleted meanwhile; ours to look through, since the caller keeps the function.
_hide: Final = cast("FunctionType", vars(tempfile)["_TemporaryFileWrapper"].__getattr__)
_HIDING: Final = next(
    (constant for constant in _hide.__code__.co_consts if isinstance(constant, CodeType)),
    None,
)


def _with_plain_paths(args: tuple[object, ...]) -> tuple[Any, ...]:
    # AnyIO's own path, whose class the route table does not know.
    return tuple([os.fspath(arg) if type(arg) is anyio.Path else arg for arg in args])


def _unwrapped(function: Callable[..., T]) -> Callable[..., T]:
    if type(function) is FunctionType and function.__code__ is _HIDING:
        return cast("Callable[..., T]", vars(function)["__wrapped__"])
    return function


def _with_our_files(
    function: Callable[[Unpack[PosArgsT]], T],
) -> Callable[[Unpack[PosArgsT]], T]:
    """Return *function*, or if AnyIO opens temporary files with it, one that opens ours."""
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
    if type(opener) is not FunctionType or opener.__module__ != "tempfile":  # somebody's own
        return opener
    return _with_globals(opener, _io=SimpleNamespace(**{**vars(io), "open": _open}))


def _open(*args: Any, **keywords: Any) -> IO[Any]:  # noqa: ANN401 (open's)
    # What is not plainly right gets io.open's own objections.
    function = open_file if is_plain(*args, **keywords) else io.open
    file = cast("IO[Any]", function(*args, **keywords))
    raw = raw_of(file)
    if raw is not None:
        raw.set_private()  # where tempfile opens a file, it gives the fd to nobody else
    return file


def _with_globals(function: FunctionType, **names: object) -> Callable[..., Any]:
    """Return a copy of *function* that sees something else behind some global *names*."""
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
    """Whether *function* is a call on a file or path; other calls are not in the statistics."""
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", None)
    if isinstance(owner, io.IOBase | pathlib.PurePath):
        return True
    module = getattr(function, "__module__", None) or ""
    return module in _FILE_MODULES or module.startswith("pathlib.")


# --- Registration ---------------------------------------------------------------------------

# What AnyIO takes from ``anyio._backends._trio_uring``.
backend_class: Final = TrioUringBackend


def register() -> None:
    """Put our backend where AnyIO looks for the one of Trio, unless somebody else's is there."""
    if anyio_trio.backend_class is anyio_trio.TrioBackend:
        anyio_trio.backend_class = RingAwareBackend
    if _eventloop.loaded_backends.get("trio") is anyio_trio.TrioBackend:
        _eventloop.loaded_backends["trio"] = RingAwareBackend


register()
