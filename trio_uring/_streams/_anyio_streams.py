"""AnyIO's streams as ends of a transfer; imports no AnyIO.

Who has one of its streams has imported AnyIO, so its modules are found where Python keeps
them. Its socket streams wrap a trio socket, which is ours in a run with a ring. The private
names here are those of AnyIO 4.10 to 4.16.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    import anyio.abc
    import trio

_TRIO_BACKEND: Final = "anyio._backends._trio"


class _SocketStream(Protocol):
    _trio_socket: trio.socket.SocketType
    _send_guard: AbstractContextManager[None]
    _receive_guard: AbstractContextManager[None]

    def _convert_socket_error(self, exc: BaseException) -> NoReturn: ...


def _is_a(stream: object, module: str, name: str) -> bool:
    class_ = getattr(sys.modules.get(module), name, None)
    return isinstance(class_, type) and isinstance(stream, class_)


# ---- Streams on sockets --------------------------------------------------------------------


def is_socket_stream(stream: object) -> bool:
    """Whether it is a TCP or UNIX stream of AnyIO's, and not one that wraps such a stream."""
    return _is_a(stream, _TRIO_BACKEND, "SocketStream")


def socket_of(stream: object) -> trio.socket.SocketType:
    """Return the trio socket of a socket stream."""
    return cast("_SocketStream", stream)._trio_socket


def send_guard(stream: object) -> AbstractContextManager[None]:
    """Return what raises ``anyio.BusyResourceError`` if another task is sending."""
    return cast("_SocketStream", stream)._send_guard


def receive_guard(stream: object) -> AbstractContextManager[None]:
    """Return what raises ``anyio.BusyResourceError`` if another task is receiving."""
    return cast("_SocketStream", stream)._receive_guard


def errors_of(stream: object) -> Callable[[], AbstractContextManager[None]]:
    """Return what raises what the socket stream itself raises for its socket's errors."""
    return partial(_converted, cast("_SocketStream", stream))


@contextmanager
def _converted(stream: _SocketStream) -> Generator[None]:
    try:
        yield
    except Exception as exc:  # noqa: BLE001 (AnyIO raises again what it does not convert)
        stream._convert_socket_error(exc)


# ---- All others ----------------------------------------------------------------------------


def is_send_stream(stream: object) -> bool:
    """Whether it is a stream of AnyIO's that sends bytes."""
    return _is_a(stream, "anyio.abc", "ByteSendStream")


def is_receive_stream(stream: object) -> bool:
    """Whether it is a stream of AnyIO's that receives bytes."""
    return _is_a(stream, "anyio.abc", "ByteReceiveStream")


def send_all(stream: object) -> Callable[[memoryview], Awaitable[None]]:
    """Return the stream's ``send``, for blocks."""

    async def send(block: memoryview) -> None:
        await cast("anyio.abc.ByteSendStream", stream).send(bytes(block))

    return send


def receive_some(stream: object) -> Callable[[int], Awaitable[bytes]]:
    """Return the stream's ``receive``, which returns nothing at the end."""
    end = sys.modules["anyio"].EndOfStream

    async def receive(most: int) -> bytes:
        try:
            return await cast("anyio.abc.ByteReceiveStream", stream).receive(most)
        except end:
            return b""

    return receive
