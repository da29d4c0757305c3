"""`trio.SocketListener.accept` and the handlers of `trio.serve_listeners`, with less Python.

These stand in for a method body of Trio's class, which is final, and for the function that
`trio.serve_listeners` runs for each connection. What they do otherwise than Trio's:

- No address of the peer is made, which a stream throws away, and its options are set by one call.
- Accepting a connection that is there already is no schedule point while the turn of the loop is
  young, so a burst of connections shares a turn (see ``turn_budget`` of `RingConfig`).
- A handler's stream is closed without a cancel scope of its own: a `trio.SocketStream` is closed
  before `aclose` passes its checkpoint, and whether the cancel scope of `trio.aclose_forcefully`
  has that raise `trio.Cancelled` in vain, nobody sees.

Readiness comes from epoll, not from an ACCEPT in flight: the reason stands in `_socket.py`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint_if_cancelled,
    enable_ki_protection,
)

from trio_uring._engine._io_manager import current_ring
from trio_uring._engine._ring import accept_stream
from trio_uring._trio_private import socket_stream, trio_run_handler

from ._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.abc import AsyncResource

_trio_aclose: Final = trio.SocketStream.aclose
_own_accept: Final = UringSocket.accept
_trio_accept: Final[Callable[..., Awaitable[trio.SocketStream]]] = trio.SocketListener.accept


@enable_ki_protection  # between the system call and the stream, Ctrl-C would lose the connection
async def accept(self: trio.SocketListener) -> trio.SocketStream:
    """Accept an incoming connection; see `trio.SocketListener.accept`."""
    manager = current_ring("sockets")
    listener = self.socket
    if (
        manager is None
        or type(listener) is not UringSocket
        or getattr(listener.accept, "__func__", None) is not _own_accept
    ):
        return await _trio_accept(self)
    await checkpoint_if_cancelled()
    waited = False
    try:
        while (fd := accept_stream(listener.fileno(), poll_first=not waited)) is None:
            await manager.wait_readable(listener.fileno())
            waited = True
    except OSError:
        fd = None
    if fd is None:
        return await _trio_accept(self)  # which sees the same error, or the next connection
    stream = socket_stream(listener.stream_connection(fd))
    if not waited and not manager.turn_budget.skip_schedule_point():
        await cancel_shielded_checkpoint()
    return stream


@functools.wraps(trio_run_handler)
async def run_handler(
    stream: AsyncResource, handler: Callable[[AsyncResource], Awaitable[object]]
) -> None:
    if type(stream) is not trio.SocketStream or trio.SocketStream.aclose is not _trio_aclose:
        await trio_run_handler(stream, handler)
        return
    try:
        await handler(stream)
    finally:
        await stream.aclose()
