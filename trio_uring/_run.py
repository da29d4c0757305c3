"""`run`, `start_guest_run` and `install`: which Trio runs get a ring.

One class replaces Trio's I/O manager for all runs of the process. When Trio makes an instance at
the start of a run, the class decides whether the run gets a ring or Trio's epoll. It checks, in
this order:

1. ``TRIO_URING=off`` or ``0`` in the environment: no run gets a ring.
2. `run` or `start_guest_run` of this package: this run gets one.
3. `install`: every later run gets one, in every thread.

The ring is opened and tried at that point. If this fails, the run uses Trio's epoll, has the reason
in its statistics, and warns once for each reason. With ``RingConfig(require=True)`` or
``TRIO_URING=require`` it is an error instead.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from . import _anyio_finder, _files
from ._arguments import check_type
from ._config import RingConfig
from ._engine._io_manager import LAYERS, UringIOManager
from ._engine._ring import Ring
from ._errors import RingUnavailableError, setup_error, unsupported_opcode
from ._fallback import FallbackIOManager
from ._kernel import why_no_core
from ._kernel.uapi import Opcode
from ._operations import nop
from ._statistics import totals
from ._streams import _fd_stream, _listener, _socket_stream
from ._streams._native import use_native_engine
from ._streams._socket import UringSocket
from ._trio_private import (
    FdStream,
    TrioIOManager,
    check_trio,
    patch_file_methods,
    patch_io_manager,
    patch_listener,
    patch_socket_type,
    patch_thread_hop,
    set_stream_methods,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence
    from types import FrameType

    import outcome
    from trio.abc import Clock, Instrument
    from typing_extensions import Self, TypeVarTuple, Unpack

    from ._engine._io_manager import Layer

    PosArgT = TypeVarTuple("PosArgT")

T = TypeVar("T")

# The opcodes that every run on a ring needs. Support for others is checked when they are used.
_REQUIRED_OPCODES: Final = (Opcode.NOP, Opcode.POLL_ADD, Opcode.ASYNC_CANCEL)


class _Asked(threading.local):
    """Passes the configuration from `run` to the I/O manager that Trio makes in this thread.

    It is not a context variable, because a plain ``trio.run`` in a worker thread must not inherit
    it: the thread runs in a copy of its parent's context.
    """

    config: RingConfig | None = None


_asked: Final = _Asked()
_installed: RingConfig | None = None
_patched: bool = False
_warned: Final[set[str]] = set()


def run(
    async_fn: Callable[[Unpack[PosArgT]], Awaitable[T]],
    *args: Unpack[PosArgT],
    clock: Clock | None = None,
    instruments: Sequence[Instrument] = (),
    restrict_keyboard_interrupt_to_checkpoints: bool = False,
    strict_exception_groups: bool = True,
    ring: RingConfig | None = None,
) -> T:
    """Run a Trio program on io_uring. Like `trio.run`, with the additional argument *ring*.

    Args:
      async_fn: As for `trio.run`.
      *args: Positional arguments for *async_fn*.
      clock: See `trio.run`.
      instruments: See `trio.run`.
      restrict_keyboard_interrupt_to_checkpoints: See `trio.run`.
      strict_exception_groups: See `trio.run`.
      ring: How to set up the ring; None for the defaults.

    Returns:
      What *async_fn* returns.

    Raises:
      RingUnavailableError: the system provides no ring, and *ring* or the environment requires one.
        If none is required, the run falls back to Trio's own I/O. It warns once, and the reason is
        in `statistics`.
    """
    with asking(ring):
        return trio.run(
            async_fn,
            *args,
            clock=clock,
            instruments=instruments,
            restrict_keyboard_interrupt_to_checkpoints=restrict_keyboard_interrupt_to_checkpoints,
            strict_exception_groups=strict_exception_groups,
        )


def start_guest_run(
    async_fn: Callable[[Unpack[PosArgT]], Awaitable[T]],
    *args: Unpack[PosArgT],
    run_sync_soon_threadsafe: Callable[[Callable[[], object]], object],
    done_callback: Callable[[outcome.Outcome[T]], object],
    run_sync_soon_not_threadsafe: Callable[[Callable[[], object]], object] | None = None,
    host_uses_signal_set_wakeup_fd: bool = False,
    clock: Clock | None = None,
    instruments: Sequence[Instrument] = (),
    restrict_keyboard_interrupt_to_checkpoints: bool = False,
    strict_exception_groups: bool = True,
    ring: RingConfig | None = None,
) -> None:
    """Start a guest run on io_uring.

    Like `trio.lowlevel.start_guest_run`, with the additional argument *ring*. The ring belongs to
    the thread that calls this, which must be the thread of the host loop.

    Args:
      async_fn: As for `trio.lowlevel.start_guest_run`.
      *args: Positional arguments for *async_fn*.
      run_sync_soon_threadsafe: See `trio.lowlevel.start_guest_run`.
      done_callback: See `trio.lowlevel.start_guest_run`.
      run_sync_soon_not_threadsafe: See `trio.lowlevel.start_guest_run`.
      host_uses_signal_set_wakeup_fd: See `trio.lowlevel.start_guest_run`.
      clock: See `trio.run`.
      instruments: See `trio.run`.
      restrict_keyboard_interrupt_to_checkpoints: See `trio.run`.
      strict_exception_groups: See `trio.run`.
      ring: How to set up the ring; None for the defaults.

    Raises:
      RingUnavailableError: as for `run`.
    """
    with asking(ring):
        trio.lowlevel.start_guest_run(
            async_fn,
            *args,
            run_sync_soon_threadsafe=run_sync_soon_threadsafe,
            done_callback=done_callback,
            run_sync_soon_not_threadsafe=run_sync_soon_not_threadsafe,
            host_uses_signal_set_wakeup_fd=host_uses_signal_set_wakeup_fd,
            clock=clock,
            instruments=instruments,
            restrict_keyboard_interrupt_to_checkpoints=restrict_keyboard_interrupt_to_checkpoints,
            strict_exception_groups=strict_exception_groups,
        )


def install(ring: RingConfig | None = None) -> None:
    """Give every later Trio run of this process a ring, in every thread, until `uninstall`.

    Use it if other code calls ``trio.run``, such as pytest-trio. Runs that have begun do not
    change. With ``TRIO_URING=off`` in the environment, it has no effect.

    Args:
      ring: How to set up the rings; None for the defaults.

    Raises:
      TypeError: *ring* is not a `RingConfig`.
      ValueError: ``TRIO_URING`` in the environment has an unknown word.
      RingUnavailableError: this version of Trio is not supported, and ``require`` is set.
    """
    global _installed
    config = check_ring(ring)
    _environment()  # an unknown word in it is an error now, not only in the first run
    if _is_patched(config):
        _installed = config


def uninstall() -> None:
    """Undo `install`: later runs use Trio's own I/O, unless they are started by `run`."""
    global _installed
    _installed = None


def is_installed() -> bool:
    """Return whether `install` is in effect, so that later runs get a ring."""
    return _installed is not None and _environment() != "off"


@contextmanager
def asking(ring: RingConfig | None) -> Generator[None, None, None]:
    """Give the next Trio run that this thread starts inside the ``with`` block a ring."""
    config = check_ring(ring)
    _environment()
    _is_patched(config)
    _asked.config = config
    try:
        yield
    finally:
        _asked.config = None


def _is_patched(config: RingConfig) -> bool:
    try:
        _patch_trio()
    except RingUnavailableError as exc:
        if _required(config):
            raise
        if _environment() != "off":
            _warn_of_fallback(exc.reason)
        return False
    return True


def check_ring(ring: RingConfig | None) -> RingConfig:
    """Return *ring*, or the defaults if it is None. Raise `TypeError` if it is something else."""
    if ring is None:
        return RingConfig()
    check_type("ring", ring, RingConfig, "a RingConfig, such as RingConfig(entries=64)")
    return ring


# The words that TRIO_URING can have. (`_autostart.py` and `trio_uring.pth` know those that mean
# "off", too. They run before this package is imported.)
_WORDS: Final = {"": "", "1": "on", "on": "on", "require": "require", "0": "off", "off": "off"}


def _environment() -> str:
    """Return what ``TRIO_URING`` says: ``on``, ``require``, ``off``, or nothing.

    Raises:
      ValueError: it has any other word. A guess could turn on what somebody wanted off.
    """
    word = os.environ.get("TRIO_URING", "").strip().lower()
    if word not in _WORDS:
        raise ValueError(f"TRIO_URING is {word!r}: it takes 1, on, require, 0 or off")
    return _WORDS[word]


def _required(config: RingConfig) -> bool:
    setting = _environment()
    return setting == "require" or (config.require and setting != "off")


def _disabled_layers() -> frozenset[Layer]:
    """Return the layers named in ``TRIO_URING_DISABLE``, such as ``files,sockets``."""
    listed = os.environ.get("TRIO_URING_DISABLE")
    if not listed:
        return frozenset()
    names = {name.strip() for name in listed.split(",")} - {""}
    if unknown := names - set(LAYERS):
        raise ValueError(
            f"TRIO_URING_DISABLE names {', '.join(sorted(unknown))}: it takes a list, separated "
            f"by commas, of {' and '.join(LAYERS)}"
        )
    return frozenset(layer for layer in LAYERS if layer in names)


ENGINES: Final = ("native", "python")


def _why_python() -> str:
    """Return why the next run does not use the native engine; an empty string if it does."""
    asked = os.environ.get("TRIO_URING_ENGINE", "").strip().lower()
    if asked not in ("", *ENGINES):
        raise ValueError(f"TRIO_URING_ENGINE is {asked!r}: it takes {' or '.join(ENGINES)}")
    if asked == "python":
        return "TRIO_URING_ENGINE is python"
    if "sockets" in _disabled_layers():
        return "TRIO_URING_DISABLE names sockets"
    return use_native_engine()


def _patch_trio() -> None:
    """Replace Trio's classes with ours, once per process.

    Each of ours checks the current run, so that a run without a ring keeps Trio's behaviour.
    """
    global _patched
    if not _patched:
        check_system()
        patch_io_manager(RunIOManager)
        patch_socket_type(UringSocket)
        set_stream_methods(trio.SocketStream, _socket_stream.receive_some, _socket_stream.send_all)
        patch_listener(_listener.accept, _listener.run_handler)
        set_stream_methods(FdStream, _fd_stream.receive_some, _fd_stream.send_all)
        patch_thread_hop(_files.run_sync)
        patch_file_methods(_files.file_getattr, _files.file_aclose)
        _patched = True


class RunIOManager(UringIOManager):
    """The class that Trio instantiates at the start of each run, with a ring or without."""

    def __new__(cls) -> Self:
        """Return one of our I/O managers, or one of Trio's, for which `__init__` isn't called."""
        config, _asked.config = _asked.config or _installed, None
        if config is None:
            return TrioIOManager()  # type: ignore[return-value]
        if _environment() == "off":
            return _fall_back("TRIO_URING switches io_uring off")  # type: ignore[return-value]
        try:
            ring = open_ring(config)
        except RingUnavailableError as exc:
            if _required(config):
                raise
            _warn_of_fallback(exc.reason)
            totals.fallback_runs += 1
            return _fall_back(exc.reason)  # type: ignore[return-value]
        manager = super().__new__(cls)
        manager.ring = ring
        manager.config = config
        return manager

    def __init__(self) -> None:
        try:
            super().__init__(self.ring, self.config, _disabled_layers(), why_python=_why_python())
        except BaseException:
            self.ring.close()
            raise
        try:
            _anyio_finder.before_ring_run()
            _show(self)
        except BaseException:
            self.close()
            raise


def _fall_back(reason: str) -> FallbackIOManager:
    manager = FallbackIOManager.because(reason)
    try:
        _show(manager)
    except BaseException:
        manager.close()
        raise
    return manager


def _show(io_manager: object) -> None:
    """Show a run that begins to other processes, if the environment asks for that."""
    if os.environ.get("TRIO_URING_INSPECT"):
        # A module may be missing, or there may be no fd or thread left: no reason to end a run.
        try:
            import_module("._inspection", __package__).show_run(io_manager)
        except (ImportError, OSError, RuntimeError) as exc:
            _warn(f"TRIO_URING_INSPECT has no effect: {exc}")


def check_system() -> None:
    """Raise `RingUnavailableError` if this system or this Trio rules a ring out."""
    if sys.platform != "linux":
        raise RingUnavailableError(why_no_core)
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise RingUnavailableError(
            "this Python runs without its global lock (GIL), where trio_uring has not been tested: "
            "start it with PYTHON_GIL=1, or use the build of Python with the lock"
        )
    check_trio()


def check_required_ring() -> None:
    """Raise `RingUnavailableError` if the environment requires a ring and there is none."""
    if _environment() == "require":
        probe(RingConfig())


def probe(config: RingConfig) -> Ring:
    """Open a ring as a run would, close it, and return the closed ring.

    Raises:
      RingUnavailableError: the message says the likely cause and what to do.
    """
    ring = open_ring(config)
    ring.close()
    return ring


def open_ring(config: RingConfig) -> Ring:
    """Set up a ring, and try it with one NOP.

    This is the run's own ring, not an additional one made for the test: the kernel frees the memory
    and the fd of a ring some time after it was closed, so an additional ring could exceed a limit.

    Raises:
      RingUnavailableError: the message says the likely cause and what to do.
    """
    if why_no_core:
        raise RingUnavailableError(why_no_core)
    ring = Ring(config)
    try:
        for opcode in _REQUIRED_OPCODES:
            if opcode not in ring.supported:
                raise RingUnavailableError(str(unsupported_opcode(opcode).strerror))
        ring.push(nop(), 0)
        completions = None
        while completions is None:  # None if a signal interrupted the wait
            completions = ring.submit_and_wait(1.0)
        if completions != [(0, 0, 0)]:
            raise RingUnavailableError(f"a NOP came back as {completions}: io_uring is broken here")
    except OSError as exc:
        ring.close()
        raise setup_error(-(exc.errno or 0), "io_uring_enter") from exc
    except BaseException:
        ring.close()
        raise
    return ring


def _warn_of_fallback(reason: str) -> None:
    _warn(f"trio_uring falls back to Trio's epoll: {reason}")


def _warn(message: str) -> None:
    """Warn, once with each *message*, at the line that starts the run."""
    if message not in _warned:
        _warned.add(message)
        level = 1
        frame = sys._getframe()  # noqa: SLF001 (public, but for some Pythons)
        while frame.f_back is not None and _package_of(frame) in _STARTERS:
            frame = frame.f_back
            level += 1
        warnings.warn(message, RuntimeWarning, stacklevel=level)


# What is between the program's line and here. (Python 3.12 could skip them itself.)
_STARTERS: Final = frozenset({"trio_uring", "trio", "anyio", "contextlib"})


def _package_of(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name.partition(".")[0] if isinstance(name, str) else ""
