"""Reads and writes of `trio.SocketStream`, with less Python than Trio's.

These two functions replace methods of Trio's class, which is final. They do the same at a lower
cost (benchmarks/bench_sockets.py), for two reasons. A ``try`` translates errors: a context manager
made from a generator takes longer than sending a message on the ring. And `bytes` are sent without
a memoryview, which would have to be pinned.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from trio_uring._engine._io_manager import current_ring

from ._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio import SocketStream

_trio_receive_some: Final[Callable[..., Awaitable[bytes]]] = trio.SocketStream.receive_some
_trio_send_all: Final[Callable[..., Awaitable[None]]] = trio.SocketStream.send_all

_RECEIVE_SIZE: Final = 65536  # in bytes; the same as Trio's


async def receive_some(self: SocketStream, max_bytes: int | None = None) -> bytes:
    """Receive from 1 to *max_bytes* bytes; empty at the end. See `trio.abc.ReceiveStream`."""
    if current_ring("sockets") is None:
        return await _trio_receive_some(self, max_bytes)
    if max_bytes is None:
        max_bytes = _RECEIVE_SIZE
    if max_bytes < 1:
        raise ValueError("max_bytes must be >= 1")
    try:
        return await self.socket.recv(max_bytes)
    except OSError as exc:
        _raise_stream_error(exc)


async def send_all(self: SocketStream, data: bytes | bytearray | memoryview) -> None:
    """Send all of *data*; see `trio.abc.SendStream`."""
    if current_ring("sockets") is None:
        await _trio_send_all(self, data)
        return
    sock = self.socket
    if sock.did_shutdown_SHUT_WR:
        raise trio.ClosedResourceError("can't send data after sending EOF")
    with self._send_conflict_detector:
        try:
            sent = 0
            if type(data) is bytes and data and type(sock) is UringSocket:
                sent = await sock.send(data)
                if sent == len(data):
                    return
            with memoryview(data) as view:
                if not view:
                    if sock.fileno() == -1:
                        raise trio.ClosedResourceError("socket was already closed")
                    await trio.lowlevel.checkpoint()
                    return
                while sent < len(view):
                    with view[sent:] as remaining:
                        sent += await self.socket.send(remaining)
        except OSError as exc:
            _raise_stream_error(exc)


def _raise_stream_error(exc: OSError) -> NoReturn:
    if exc.errno == errno.EBADF:
        raise trio.ClosedResourceError("this socket was already closed") from None
    raise trio.BrokenResourceError(f"socket connection broken: {exc}") from exc
