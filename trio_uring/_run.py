"""Which Trio runs get a ring, and how: `run`, `start_guest_run`, `install`.

One class stands in for Trio's I/O manager, for every run of the process; asked to construct
itself, at the start of a run, it decides: a ring, or Trio's own epoll. Who asked for a ring
is, in this order:

1. ``TRIO_URING=off`` in the environment: nobody gets one.
2. `run` or `start_guest_run` of this package: that run.
3. `install`: every run since, in every thread.

Whether a ring can be had is found out there and then, by opening it and trying it.
Without one the run goes on Trio's epoll, says why in its statistics, and warns once; unless
``RingConfig(require=True)`` or ``TRIO_URING=require`` makes that an error.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from . import _anyio_finder, _files
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

    import outcome
    from trio.abc import Clock, Instrument
    from typing_extensions import Self, TypeVarTuple, Unpack

    from ._engine._io_manager import Layer

    PosArgT = TypeVarTuple("PosArgT")

T = TypeVar("T")

# Without these there is no run on a ring. The others are asked for when they are used.
_REQUIRED_OPCODES: Final = (Opcode.NOP, Opcode.POLL_ADD, Opcode.ASYNC_CANCEL)


class _Asked(threading.local):
    """What `run` of this thread asked for, on its way to the I/O manager it constructs.

    Not a context variable: a plain ``trio.run`` in a worker thread, which runs in a copy of
    its parent's context, must not inherit it.
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
    """Run a Trio program on io_uring: `trio.run`, with the same arguments and one more.

    Args:
      async_fn: As for `trio.run`, and so are the others.
      *args: Positional arguments for *async_fn*.
      clock: See `trio.run`.
      instruments: See `trio.run`.
      restrict_keyboard_interrupt_to_checkpoints: See `trio.run`.
      strict_exception_groups: See `trio.run`.
      ring: How to set up the ring; None for the defaults.

    Returns:
      What *async_fn* returns.

    Raises:
      RingUnavailableError: io_uring is missing here, and was required. Otherwise the run
        falls back to Trio's own I/O, with one warning, and the reason in
        ``trio.lowlevel.current_statistics().io_statistics``.
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
    """Start a guest run on io_uring: `trio.lowlevel.start_guest_run`, and one more argument.

    The ring belongs to the thread that calls this, which must be the host loop's.

    Args:
      async_fn: As for `trio.lowlevel.start_guest_run`, and so are the others.
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

    For programs that call ``trio.run`` themselves, pytest-trio, and the like. Runs that have
    begun are not changed. With ``TRIO_URING=off`` in the environment it has no effect.

    Args:
      ring: How to set up the rings; None for the defaults.

    Raises:
      TypeError: *ring* is no `RingConfig`.
      RingUnavailableError: only where ``require`` is set: Trio is an unknown version.
    """
    global _installed
    config = _checked(ring)
    if _is_patched(config):
        _installed = config


def uninstall() -> None:
    """Undo `install`: later runs are Trio's own, unless started by `run`."""
    global _installed
    _installed = None


def is_installed() -> bool:
    """Whether `install` is in effect: later runs get a ring."""
    return _installed is not None and _environment() not in _OFF


@contextmanager
def asking(ring: RingConfig | None) -> Generator[None, None, None]:
    """Give the Trio run that this thread starts next, inside the ``with`` block, a ring."""
    config = _checked(ring)
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
        if _environment() not in _OFF:
            _warn(exc.reason)
        return False
    return True


def _checked(ring: RingConfig | None) -> RingConfig:
    if ring is None:
        return RingConfig()
    if not isinstance(ring, RingConfig):
        raise TypeError(f"ring must be a RingConfig, not {type(ring).__name__}")
    return ring


def _environment() -> str:
    return os.environ.get("TRIO_URING", "").strip().lower()


def _required(config: RingConfig) -> bool:
    return (config.require or _environment() == "require") and _environment() not in _OFF


_OFF: Final = ("off", "0")


def _disabled_layers() -> frozenset[Layer]:
    """Return the layers named in ``TRIO_URING_DISABLE``, such as ``files,sockets``."""
    names = {name.strip() for name in os.environ.get("TRIO_URING_DISABLE", "").split(",")} - {""}
    if unknown := names - set(LAYERS):
        raise ValueError(
            f"TRIO_URING_DISABLE names {', '.join(sorted(unknown))}: it takes a list, separated "
            f"by commas, of {' and '.join(LAYERS)}"
        )
    return frozenset(layer for layer in LAYERS if layer in names)


ENGINES: Final = ("native", "python")


def _why_python() -> str:
    """Return why the next run does not use the native engine; nothing if it does."""
    asked = os.environ.get("TRIO_URING_ENGINE", "").strip().lower()
    if asked not in ("", *ENGINES):
        raise ValueError(f"TRIO_URING_ENGINE is {asked!r}: it takes {' or '.join(ENGINES)}")
    if asked == "python":
        return "TRIO_URING_ENGINE is python"
    if "sockets" in _disabled_layers():
        return "TRIO_URING_DISABLE names sockets"
    return use_native_engine()


def _patch_trio() -> None:
    """Put our classes where Trio looks for its own; once, and for good.

    Each asks the current run, so that a run without a ring sees Trio's own behaviour.
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
    """What Trio constructs at the start of each run: a ring's manager, or Trio's own."""

    def __new__(cls) -> Self:
        """Decide; what is not a `RunIOManager` is Trio's, and Python does not initialise it."""
        config, _asked.config = _asked.config or _installed, None
        if config is None or _environment() in _OFF:
            return TrioIOManager()  # type: ignore[return-value]
        try:
            ring = open_ring(config)
        except RingUnavailableError as exc:
            if _required(config):
                raise
            _warn(exc.reason)
            totals.fallback_runs += 1
            return FallbackIOManager.because(exc.reason)  # type: ignore[return-value]
        manager = super().__new__(cls)
        manager.ring = ring
        manager.config = config
        return manager

    def __init__(self) -> None:
        try:
            super().__init__(self.ring, self.config, _disabled_layers(), why_python=_why_python())
            _anyio_finder.before_ring_run()
        except BaseException:
            self.ring.close()
            raise


def check_system() -> None:
    """Raise `RingUnavailableError` if this system or this Trio rules a ring out."""
    if sys.platform != "linux":
        raise RingUnavailableError(why_no_core)
    check_trio()


def probe(config: RingConfig) -> Ring:
    """Open a ring as a run would, and close it; returns the closed ring.

    Raises:
      RingUnavailableError: names the cause and the remedy.
    """
    ring = open_ring(config)
    ring.close()
    return ring


def open_ring(config: RingConfig) -> Ring:
    """Set a ring up, and send one NOP there and back.

    It is the run's own ring, not one made to try: the memory and the fd of another, which the
    kernel gives back some time after it was closed, might be just what is too much.

    Raises:
      RingUnavailableError: names the cause and the remedy.
    """
    if why_no_core:
        raise RingUnavailableError(why_no_core)
    ring = Ring(config, register_fd=False)
    try:
        for opcode in _REQUIRED_OPCODES:
            if opcode not in ring.supported:
                raise RingUnavailableError(str(unsupported_opcode(opcode).strerror))
        ring.push(nop(), 0)
        completions = None
        while completions is None:  # a signal may come
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


def _warn(reason: str) -> None:
    """Warn once for each reason, in the name of the caller's caller's run."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"trio_uring falls back to Trio's epoll: {reason}", RuntimeWarning, stacklevel=4
        )
