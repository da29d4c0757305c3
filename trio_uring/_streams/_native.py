"""Methods of sockets and streams that use the native engine, and what it leaves to Python.

Each method is a coroutine function that awaits an operation of the native engine. It therefore has
a name in tracebacks, can be passed to ``start_soon``, and warns if it is never awaited. If the
native engine does not serve the current run or the arguments, its operation calls the Python
implementation of the method, its twin.
"""

from __future__ import annotations

import functools
import socket as stdlib_socket
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import trio
from trio.lowlevel import enable_ki_protection, wait_readable, wait_writable

from trio_uring._engine._in_flight import InFlightTable
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._engine._ring import engine_api_address
from trio_uring._kernel import native, why_no_native
from trio_uring._kernel.sockets import MSG_NOSIGNAL
from trio_uring._operations import Operation
from trio_uring._trio_private import (
    STREAM_NAMES,
    TrioSocket,
    release_send_conflict_detector,
    socket_errors_as_stream_errors,
)

from . import _socket_stream
from ._socket import UringSocket

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Concatenate

    from typing_extensions import Buffer, ParamSpec

    from trio_uring._kernel._native import Op

    from ._socket import WaitFn

    P = ParamSpec("P")

T = TypeVar("T")

# Python's methods, which get the socket as the first argument.
stdlib_recvfrom: Final = stdlib_socket.socket.recvfrom
_stdlib_send: Final = stdlib_socket.socket.send

# The slots of an operation that the C code reads: its names for them, and Python's.
_OPERATION_SLOTS: Final = {
    "sqe": "sqe",
    "operation_fd": "fd",
    "pins": "pins",
    "spent": "spent",
    "cancellable": "cancellable",
    "limited": "limited",
    "decode": "decode",
    "discard": "discard",
    "on_cqe_more": "on_cqe_more",
    "second_fd": "second_fd",
    "acts_on_fd": "acts_on_fd",
    "buffers": "buffers",
}

_why_not: str | None = None
_to_prepare: Final[list[Callable[[], None]]] = []


def use_native_engine() -> str:
    """Set up the native engine, once. Return why it is not possible, or an empty string."""
    global _why_not
    if _why_not is None:
        _why_not = why_no_native or _set_up()
        if not _why_not:
            for prepare in _to_prepare:
                prepare()
    return _why_not


def when_native(prepare: Callable[[], None]) -> None:
    """Call *prepare* once the native engine is set up, which may never be."""
    if _why_not is None:
        _to_prepare.append(prepare)
    elif not _why_not:
        prepare()


def own_names() -> dict[str, object]:
    """Return what the engine uses of our classes."""
    return {
        "manager_type": UringIOManager,
        "socket_type": UringSocket,
        "operation_type": Operation,
        **{name: vars(Operation)[slot] for name, slot in _OPERATION_SLOTS.items()},
    }


def _set_up() -> str:
    try:
        # It can be imported only with a Trio that has all that it names.
        trio_step = import_module("trio_uring._trio_step")
        native.setup(engine_api_address(), {**trio_step.trio_names(), **own_names()})
    except (AttributeError, KeyError, TypeError, ImportError) as exc:
        return f"Trio {trio.__version__} is not one that was read: {exc}"
    if why := trio_step.set_step(native.step):
        return f"{why}"
    native.set_twin("perform", _perform, _perform_again, _failed)
    native.set_twin("perform_shielded", _perform_shielded, _perform_again, _failed)
    native.set_twin("recv_into", _recv_into_twin, _recv_into_again, _failed)
    native.set_twin("recv", _recv_twin, _recv_again, _failed)
    native.set_twin("send", _send_twin, _send_when_writable, _failed)
    native.set_twin("attempt", _attempt_twin, _attempt_when_ready, _failed)
    native.set_twin(
        "receive_some", _socket_stream.receive_some, _receive_some_again, _stream_failed
    )
    native.set_twin("send_all", _socket_stream.send_all, _send_the_rest, _stream_failed)
    native.set_stream("receive_some", recv, *STREAM_NAMES)
    native.set_stream("send_all", send, *STREAM_NAMES)
    for cls, shell in (
        (InFlightTable, perform),
        (InFlightTable, perform_shielded),
        (UringSocket, recv_into),
        (UringSocket, recv),
        (UringSocket, send),
        (UringSocket, recvfrom),
        (UringSocket, sendto),
        (UringSocket, _nonblocking_helper),
        (trio.SocketStream, receive_some),
        (trio.SocketStream, send_all),
    ):
        setattr(cls, shell.__name__, shell)
    return ""


# ---- Any operation ---------------------------------------------------------------------------

_perform: Final = InFlightTable.perform
_perform_shielded: Final = InFlightTable.perform_shielded
_perform_again: Final = InFlightTable.perform_again


@functools.wraps(_perform)
@enable_ki_protection
async def perform(self: InFlightTable, operation: Operation[T]) -> T:
    return await native.perform(self, operation)


@functools.wraps(_perform_shielded)
@enable_ki_protection
async def perform_shielded(self: InFlightTable, operation: Operation[T]) -> T:
    return await native.perform_shielded(self, operation)


# ---- Receiving from a socket -----------------------------------------------------------------

_recv: Final = UringSocket.recv


@functools.wraps(_recv)
async def recv(self: UringSocket, buflen: int, flags: int = 0, /) -> bytes:
    if type(flags) is not int or flags:
        return await _recv(self, buflen, flags)
    return await native.recv(self, buflen)


async def _recv_twin(sock: UringSocket, buflen: int) -> bytes:
    _note_stream(sock)
    return await _recv(sock, buflen)


def _note_stream(sock: UringSocket) -> None:
    # The native engine receives only if is_stream is true. So the first receive of a stream comes
    # to a twin, and every receive of a datagram socket.
    if not sock.is_stream:
        sock.is_stream = sock.type == stdlib_socket.SOCK_STREAM


async def _recv_again(manager: UringIOManager, op: Op, sock: UringSocket, buflen: int) -> bytes:
    manager.pools.failed(op.res, op.flags)
    return await sock.recv_directly(buflen)


_recv_into: Final = UringSocket.recv_into


@functools.wraps(_recv_into)
async def recv_into(self: UringSocket, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
    if type(flags) is not int or flags:
        return await _recv_into(self, buffer, nbytes, flags)
    return await native.recv_into(self, (buffer, nbytes))


async def _recv_into_twin(sock: UringSocket, arguments: tuple[Buffer, int]) -> int:
    _note_stream(sock)
    manager = current_ring("sockets")
    if manager is not None and sock.is_stream:
        _ = manager.stream_buffers  # opens them, for the next receive
    return await _recv_into(sock, *arguments)


async def _recv_into_again(
    manager: UringIOManager, op: Op, sock: UringSocket, arguments: tuple[Buffer, int]
) -> int:
    manager.pools.failed(op.res, op.flags)
    return await sock.call_when_ready(wait_readable, stdlib_socket.socket.recv_into, *arguments)


def _failed(manager: UringIOManager, op: Op) -> object:
    return manager.failed(op.operation, op)


# ---- Sending to a socket ---------------------------------------------------------------------

_send: Final = UringSocket.send


@functools.wraps(_send)
async def send(self: UringSocket, bytes: Buffer, flags: int = 0, /) -> int:
    if type(flags) is not int or flags:
        return await _send(self, bytes, flags)
    return await native.send(self, bytes)


async def _send_twin(sock: UringSocket, data: Buffer) -> int:
    return await _send(sock, data)


async def _send_when_writable(sock: UringSocket, data: Buffer, _sent: int) -> int:
    return await TrioSocket.send(sock, data)


# ---- Calls of the standard library -----------------------------------------------------------
#
# Calls that are repeated until they need not wait, such as for datagrams and connections. The
# engine makes the first call. Two methods, for datagram servers, save the frame of Trio's method.

_call: Final = UringSocket._nonblocking_helper
_sendto: Final = UringSocket.sendto
_recvfrom: Final = UringSocket.recvfrom


async def _nonblocking_helper(
    self: UringSocket,
    wait_fn: WaitFn,
    fn: Callable[Concatenate[stdlib_socket.socket, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    if kwargs:
        return await _call(self, wait_fn, fn, *args, **kwargs)
    return cast("T", await native.attempt(self, (wait_fn, fn, *args)))


@functools.wraps(_recvfrom)
async def recvfrom(self: UringSocket, *args: object) -> tuple[bytes, object]:
    attempt = native.attempt(self, (wait_readable, stdlib_recvfrom, *args))
    return cast("tuple[bytes, object]", await attempt)


@functools.wraps(_sendto)
async def sendto(self: UringSocket, *args: object) -> int:
    if self.is_resolved(args[-1] if args else None):
        attempt = native.attempt(self, (wait_writable, stdlib_socket.socket.sendto, *args))
        return cast("int", await attempt)
    return await _sendto(self, *args)


async def _attempt_twin(sock: UringSocket, call: tuple[Any, ...]) -> object:
    return await _call(sock, *call)


async def _attempt_when_ready(sock: UringSocket, call: tuple[Any, ...]) -> object:
    return await sock.call_when_ready(*call)


# ---- Streams ---------------------------------------------------------------------------------


@functools.wraps(_socket_stream.receive_some)
async def receive_some(self: trio.SocketStream, max_bytes: int | None = None) -> bytes:
    return await native.receive_some(self, max_bytes)


async def _receive_some_again(
    manager: UringIOManager, op: Op, stream: trio.SocketStream, max_bytes: int | None
) -> bytes:
    manager.pools.failed(op.res, op.flags)
    assert isinstance(stream.socket, UringSocket)  # as the native engine checked
    with socket_errors_as_stream_errors():
        return await stream.socket.recv_directly(max_bytes or 65536)


def _stream_failed(manager: UringIOManager, op: Op) -> object:
    with socket_errors_as_stream_errors():
        return manager.failed(op.operation, op)


@functools.wraps(_socket_stream.send_all)
async def send_all(self: trio.SocketStream, data: bytes | bytearray | memoryview) -> None:
    await native.send_all(self, data)


async def _send_the_rest(
    stream: trio.SocketStream, data: bytes | bytearray | memoryview, sent: int
) -> None:
    """Finish a send_all that has sent *sent* bytes and holds the stream's conflict detector."""
    try:
        with socket_errors_as_stream_errors():
            await send_rest(stream.socket, data, sent)
    finally:
        release_send_conflict_detector(stream)


async def send_rest(
    sock: trio.socket.SocketType, data: bytes | bytearray | memoryview, sent: int
) -> None:
    """Send *data* from the byte *sent* on. The socket was full just now.

    As in Trio, nothing comes between the wait and the send: what is sent once the socket has room
    is not cancelled.
    """
    with memoryview(data) as whole:
        while sent < len(whole):
            with whole[sent:] as rest:
                if isinstance(sock, UringSocket) and sock.fileno() >= 0:
                    sent += await sock.call_when_ready(
                        wait_writable, _stdlib_send, rest, MSG_NOSIGNAL
                    )
                else:  # closed meanwhile, or replaced
                    sent += await sock.send(rest)
