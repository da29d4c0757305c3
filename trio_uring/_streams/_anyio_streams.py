"""What transfers use of AnyIO's streams. It does not import AnyIO.

A program that has an AnyIO stream has imported AnyIO, so its modules are in `sys.modules`. AnyIO's
socket streams wrap a trio socket, which is a `UringSocket` in a run with a ring. The private names
here are those of AnyIO 4.10 to 4.16.
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
    """Whether *stream* is AnyIO's TCP or UNIX stream itself, and not a wrapper around one."""
    return _is_a(stream, _TRIO_BACKEND, "SocketStream")


def socket_of(stream: object) -> trio.socket.SocketType:
    """Return the trio socket of a socket stream."""
    return cast("_SocketStream", stream)._trio_socket


def send_guard(stream: object) -> AbstractContextManager[None]:
    """Return a context that raises ``anyio.BusyResourceError`` if another task is sending."""
    return cast("_SocketStream", stream)._send_guard


def receive_guard(stream: object) -> AbstractContextManager[None]:
    """Return a context that raises ``anyio.BusyResourceError`` if another task is receiving."""
    return cast("_SocketStream", stream)._receive_guard


def errors_of(stream: object) -> Callable[[], AbstractContextManager[None]]:
    """Return what turns the socket's errors into those that the stream raises itself."""
    return partial(_converted, cast("_SocketStream", stream))


@contextmanager
def _converted(stream: _SocketStream) -> Generator[None]:
    try:
        yield
    except Exception as exc:  # noqa: BLE001 (AnyIO re-raises what it does not convert)
        stream._convert_socket_error(exc)


# ---- Other streams -------------------------------------------------------------------------


def is_send_stream(stream: object) -> bool:
    """Whether *stream* is an ``anyio.abc.ByteSendStream``."""
    return _is_a(stream, "anyio.abc", "ByteSendStream")


def is_receive_stream(stream: object) -> bool:
    """Whether *stream* is an ``anyio.abc.ByteReceiveStream``."""
    return _is_a(stream, "anyio.abc", "ByteReceiveStream")


def send_all(stream: object) -> Callable[[memoryview], Awaitable[None]]:
    """Return a function that sends a memoryview with the stream's ``send``."""

    async def send(block: memoryview) -> None:
        await cast("anyio.abc.ByteSendStream", stream).send(bytes(block))

    return send


def receive_some(stream: object) -> Callable[[int], Awaitable[bytes]]:
    """Return a function that calls the stream's ``receive``, and returns ``b""`` at the end."""
    end = sys.modules["anyio"].EndOfStream

    async def receive(most: int) -> bytes:
        try:
            return await cast("anyio.abc.ByteReceiveStream", stream).receive(most)
        except end:
            return b""

    return receive
