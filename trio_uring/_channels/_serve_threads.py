"""`serve_threads`: one loop accepts connections, and the loops of several threads serve them.

An accepted connection is passed on as a Python object: threads share their process's fds, and a
Trio socket does not belong to a run. The kernel could instead send the file from ring to ring
(``IORING_MSG_SEND_FD``), as a fixed file. A Trio socket needs an fd, so each connection would take
two more operations (benchmarks/bench_serve_threads.py), and a failed message would lose it.
"""

from __future__ import annotations

import errno
import logging
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, NoReturn, TypeVar

import trio
from trio.lowlevel import current_trio_token

from trio_uring._arguments import check_int, check_several, check_type, wrong_type
from trio_uring._run import check_ring, run

from ._ring_channel import open_ring_channel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from trio_uring._config import RingConfig

    from ._ring_channel import RingReceiveChannel, RingSendChannel

StreamT = TypeVar("StreamT", bound=trio.abc.Stream)

# As in `trio.serve_listeners`: if files or memory run out, wait until others are closed.
_CAPACITY_ERRNOS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_CAPACITY_SLEEP: Final = 0.1  # seconds
_logger: Final = logging.getLogger("trio_uring.serve_threads")

# One loop per core is enough, so more than this is a mistake.
_THREADS_MAX: Final = 1024


async def serve_threads(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: Sequence[trio.abc.Listener[StreamT]],
    *,
    threads: int,
    ring: RingConfig | None = None,
    # Any: to a type checker, a list of listeners is none of `trio.SocketListener`, or the reverse.
    task_status: trio.TaskStatus[list[Any]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Accept connections in this loop, and handle each in the loop of one of *threads* threads.

    It is like `trio.serve_listeners`, for several loops. Each thread has its own run, on its own
    ring. A connection goes to a loop that sleeps, or if none does, to the loop with the latest
    iteration.

    Args:
      handler: Called with each stream, in one of the threads. The stream is closed when it returns.
        It must not use anything that belongs to another run. To communicate with other runs, use a
        channel from `open_ring_channel`.
      listeners: As for `trio.serve_listeners`. They are closed at the end.
      threads: The number of threads, 1 to 1024. More than the number of cores gains nothing.
      ring: How to set up the threads' rings; None for the defaults.
      task_status: Its ``started`` is called with *listeners* when connections can be accepted.

    Raises:
      ValueError: *threads* is out of range.
      ExceptionGroup: what a handler raised, or an error of accepting. The other connections are
        cancelled.
      RingUnavailableError: as for `run`.

    If cancelled, it cancels the handlers in all threads and waits until they have ended. It closes
    connections that no loop has taken by then.
    """
    if not callable(handler):
        raise wrong_type("handler", handler, "an async function that takes a stream")
    check_several("listeners", listeners, "listeners, as trio.open_tcp_listeners returns")
    for listener in listeners:
        check_type("each of listeners", listener, trio.abc.Listener, "a trio.abc.Listener")
    check_int("threads", threads, 1, _THREADS_MAX)
    check_ring(ring)
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
            task_status.started(list(listeners))
    finally:
        await _close_what_is_left(send_channel, receive_channel)
    raise AssertionError("the nursery ended without an exception")


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
    """Close the connections that were assigned to a loop that ended before it took them."""
    send_channel.close()
    with trio.CancelScope(shield=True), receive_channel, suppress(trio.EndOfChannel):
        while True:
            await trio.aclose_forcefully(receive_channel.receive_nowait())


class _Loop(Generic[StreamT]):
    """A run in a thread of its own, which handles connections until it is cancelled."""

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
        """Run it in a worker thread. If this task is cancelled, cancel the run."""
        in_thread = partial(run, self._main, ring=self._ring)
        with self._connections:  # the run may fail before it opens them
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
                if self._token is None:  # the run has not begun, or has ended
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
