"""`serve_threads`: connections that one loop accepts, and the loops of several threads serve.

An accepted connection goes to another loop as the Python object that it is: the threads of a
process share its fds, and Trio's sockets belong to no run. The kernel could send the file itself
from ring to ring (``IORING_MSG_SEND_FD``), into a table of fixed files; to become a socket of
Trio's it would then have to be given an fd, so that each connection would cost two operations more
(benchmarks/bench_serve_threads.py), and a message that fails would cost the connection.
"""

from __future__ import annotations

import errno
import logging
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final, Generic, NoReturn, TypeVar

import trio
from trio.lowlevel import current_trio_token

from trio_uring._run import run

from ._ring_channel import open_ring_channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from trio_uring._config import RingConfig

    from ._ring_channel import RingReceiveChannel, RingSendChannel

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)

# As `trio.serve_listeners`: when there are too many open files, wait until some may be closed.
_CAPACITY_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_CAPACITY_SLEEP: Final = 0.1  # seconds
_logger: Final = logging.getLogger("trio_uring.serve_threads")

# More loops than this are a mistake: a loop is for a core.
_THREADS_MAX: Final = 1024


async def serve_threads(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: Sequence[trio.abc.Listener[StreamT]],
    *,
    threads: int,
    ring: RingConfig | None = None,
    task_status: trio.TaskStatus[Sequence[trio.abc.Listener[StreamT]]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Accept connections in this loop, and handle each in the loop of one of *threads* threads.

    `trio.serve_listeners` for several loops. Each thread has a run of its own, on its own ring. A
    connection goes to one that sleeps, if there is one; otherwise to who waited longest.

    Args:
      handler: Called in one of the threads with each stream, which is closed when it returns. It
        must use nothing that belongs to another run; a channel from `open_ring_channel` connects
        it.
      listeners: As for `trio.serve_listeners`; closed in the end.
      threads: 1 to 1024. More than there are cores gain nothing.
      ring: How to set up the rings of the threads; None for the defaults.
      task_status: Started with *listeners*, when connections are accepted.

    Raises:
      ValueError: *threads* is out of range.
      ExceptionGroup: with what a handler, or accepting, raised. The other connections are
        cancelled.
      RingUnavailableError: as for `run`.

    If cancelled, so are the handlers in all threads. It ends when they have ended. A connection
    that no loop has taken by then is closed.
    """
    if not 1 <= threads <= _THREADS_MAX:
        raise ValueError(f"threads must be between 1 and {_THREADS_MAX}, not {threads}")
    send_channel, receive_channel = open_ring_channel[StreamT](0)
    loops = [
        _Loop(handler, receive_channel.clone(), ring, f"trio_uring.serve_threads {number}")
        for number in range(threads)
    ]
    try:
        async with trio.open_nursery() as nursery:
            for loop in loops:
                nursery.start_soon(loop.run_in_thread)
            for listener in listeners:
                nursery.start_soon(_accept, listener, send_channel)
            task_status.started(listeners)
    finally:
        await _close_what_is_left(send_channel, receive_channel)
    raise AssertionError("it went on without listeners")


async def _accept(
    listener: trio.abc.Listener[StreamT], connections: RingSendChannel[StreamT]
) -> NoReturn:
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno not in _CAPACITY_ERRNOS:
                    raise
                _logger.exception("accepting failed; trying again in %s s", _CAPACITY_SLEEP)
                await trio.sleep(_CAPACITY_SLEEP)
                continue
            try:
                await connections.send(stream)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise


async def _close_what_is_left(
    send_channel: RingSendChannel[StreamT], receive_channel: RingReceiveChannel[StreamT]
) -> None:
    """Close what a loop was given that ended before it looked."""
    send_channel.close()
    with trio.CancelScope(shield=True), receive_channel, suppress(trio.EndOfChannel):
        while True:
            await trio.aclose_forcefully(receive_channel.receive_nowait())


class _Loop(Generic[StreamT]):
    """A run in a thread of its own, that handles connections until it is cancelled."""

    def __init__(
        self,
        handler: Callable[[StreamT], Awaitable[object]],
        connections: RingReceiveChannel[StreamT],
        ring: RingConfig | None,
        name: str,
    ) -> None:
        self._name = name
        self._handler = handler
        self._connections = connections
        self._ring = ring
        self._lock = threading.Lock()
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None  # while it runs

    async def run_in_thread(self) -> None:
        """Run it; if we are cancelled, so is it."""
        in_thread = partial(run, self._main, ring=self._ring)
        with self._connections:  # it may not come to using it
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cancelled_with_us)
                await trio.to_thread.run_sync(
                    in_thread, limiter=trio.CapacityLimiter(1), thread_name=self._name
                )
                nursery.cancel_scope.cancel()

    async def _cancelled_with_us(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with self._lock:
                if self._token is None:  # it has not begun, or has ended
                    self._scope.cancel()
                else:
                    self._token.run_sync_soon(self._scope.cancel)

    async def _main(self) -> None:
        with self._lock:
            self._token = current_trio_token()
        try:
            with self._scope:
                async with self._connections, trio.open_nursery() as nursery:
                    async for stream in self._connections:
                        nursery.start_soon(self._handle, stream)
        finally:
            with self._lock:
                self._token = None

    async def _handle(self, stream: StreamT) -> None:
        try:
            await self._handler(stream)
        finally:
            await trio.aclose_forcefully(stream)
