"""AnyIO's TCP and UNIX streams on the native engine, and what it leaves to Python.

AnyIO's methods call those of the trio socket. Here one operation of the engine replaces both, in a
run with the native engine. In all other runs, and for all unusual calls, the operation calls
AnyIO's own method. `_native.py` explains the shells.

This does not import AnyIO, like `_anyio_streams.py`. The private names are those of AnyIO 4.10 to
4.16.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, cast

from trio_uring._kernel import native

from ._native import recv as socket_recv, send as socket_send, send_rest
from ._socket import UringSocket

if TYPE_CHECKING:
    from anyio import ResourceGuard
    from anyio._backends._trio import SocketStream

    from trio_uring._engine._io_manager import UringIOManager
    from trio_uring._kernel._native import Op


def use_engine(stream_type: type[SocketStream], guard_type: type[ResourceGuard]) -> None:
    """Make AnyIO's streams use the native engine, in the runs that have it."""
    native.set_twin("anyio_receive", stream_type.receive, _receive_again, _failed)
    native.set_twin("anyio_send", stream_type.send, _send_the_rest, _failed)
    for name, function, guard in (
        ("anyio_receive", socket_recv, "_receive_guard"),
        ("anyio_send", socket_send, "_send_guard"),
    ):
        native.set_stream(name, function, "_trio_socket", guard, "_guarded", guard_type)

    @functools.wraps(stream_type.receive)
    async def receive(self: SocketStream, max_bytes: int = 65536) -> bytes:
        return await native.anyio_receive(self, max_bytes)

    @functools.wraps(stream_type.send)
    async def send(self: SocketStream, item: bytes) -> None:
        await native.anyio_send(self, item)

    for shell in (receive, send):
        setattr(stream_type, shell.__name__, shell)


def _failed(manager: UringIOManager, op: Op) -> object:
    if op.res == 0:
        raise sys.modules["anyio"].EndOfStream
    try:
        return manager.failed(op.operation, op)
    except BaseException as exc:  # noqa: BLE001 (as AnyIO's methods do)
        cast("SocketStream", op.owner)._convert_socket_error(exc)


async def _receive_again(
    manager: UringIOManager, op: Op, stream: SocketStream, max_bytes: int
) -> bytes:
    """Receive after an attempt that found no buffer, with the guard held."""
    manager.pools.failed(op.res, op.flags)
    assert isinstance(stream._trio_socket, UringSocket)  # or it would not have been native
    try:
        data = await stream._trio_socket.recv_directly(max_bytes)
    except BaseException as exc:  # noqa: BLE001 (as AnyIO's methods do)
        stream._convert_socket_error(exc)
    finally:
        stream._receive_guard.__exit__(None, None, None)
    if not data:
        raise sys.modules["anyio"].EndOfStream
    return data


async def _send_the_rest(stream: SocketStream, item: bytes, sent: int) -> None:
    """Go on with a send of which *sent* bytes are sent, with the guard held."""
    try:
        await send_rest(stream._trio_socket, item, sent)
    except BaseException as exc:  # noqa: BLE001 (as AnyIO's methods do)
        stream._convert_socket_error(exc)
    finally:
        stream._send_guard.__exit__(None, None, None)
