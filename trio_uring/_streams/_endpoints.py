"""The endpoints of a transfer: a `Source` and a `Sink`, for Trio's and AnyIO's streams and sockets.

They raise the errors that the stream itself would raise, Trio's or AnyIO's, and keep other tasks
from sending meanwhile.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from trio_uring._arguments import fd_of, wrong_type
from trio_uring._engine._file_systems import FileSystem, file_system_of
from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._engine._ring import can_block
from trio_uring._trio_private import (
    TrioSocket,
    send_conflict_detector,
    socket_errors_as_stream_errors,
)

from . import _anyio_streams as anyio_streams

# The families of sockets that can be spliced.
_FAMILIES: Final = (trio.socket.AF_INET, trio.socket.AF_INET6, trio.socket.AF_UNIX)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from typing_extensions import Buffer

    Errors = Callable[[], AbstractContextManager[None]]


class SendsBytes(Protocol):
    """An ``anyio.abc.ByteSendStream``."""

    async def send(self, item: bytes, /) -> None:
        """Send all of *item*."""
        ...


class ReceivesBytes(Protocol):
    """An ``anyio.abc.ByteReceiveStream``."""

    async def receive(self, max_bytes: int = ..., /) -> bytes:
        """Receive at most *max_bytes*."""
        ...


class HasFileNo(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its file descriptor."""
        ...


@asynccontextmanager
async def dup_file(file: int | HasFileNo) -> AsyncGenerator[int, None]:
    """Use a duplicate of *file*'s fd, which is closed at the end.

    The original may be closed meanwhile, and its number reused, while operations are in flight.

    Raises:
      OSError: ``EBADF``; ``ESPIPE``, as from pread(2), for a pipe, a socket or a terminal. The ring
        would ignore the offset, and an operation could block indefinitely and not be cancelled.
    """
    fd = os.dup(fd_of("file", file))
    try:
        if can_block(fd):
            os.lseek(fd, 0, os.SEEK_CUR)
        yield fd
    except GeneratorExit:  # the run crashed, and its tasks are being collected
        os.close(fd)
        raise
    except BaseException:
        await _close(fd)
        raise
    await _close(fd)


async def _close(fd: int) -> None:
    if file_system_of(fd) is FileSystem.SERVER:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(os.close, fd)
    else:
        os.close(fd)


# ---- Where bytes go ------------------------------------------------------------------------


@attrs.frozen
class Sink:
    """The destination of a transfer.

    Args:
      send_some: Sends a block, or a part of it; returns how many bytes.
      sock: The socket to send into directly, if there is one.
      errors: Turns the socket's errors into those of the stream.
    """

    send_some: Callable[[memoryview], Awaitable[int]]
    sock: trio.socket.SocketType | None = None
    errors: Errors = nullcontext

    @property
    def splices(self) -> bool:
        """Whether bytes can be spliced into it."""
        # splice(2) has no MSG_NOSIGNAL. Python ignores SIGPIPE unless a program changes that.
        kills = (signal.SIG_DFL, None)
        return _splices(self.sock) and signal.getsignal(signal.SIGPIPE) not in kills


def _wrong_stream(name: str, stream: object) -> TypeError:
    if isinstance(stream, socket.socket):
        return TypeError(
            f"{name} must be a stream or a trio socket, not a socket of the standard library: "
            "wrap it with trio.socket.from_stdlib_socket"
        )
    return wrong_type(name, stream, "a stream of Trio's or AnyIO's, or a trio socket")


def sink_of(
    name: str,
    stream: trio.abc.SendStream | trio.socket.SocketType | SendsBytes,
    stack: ExitStack,
) -> Sink:
    """Return the sink for *stream*, the argument *name*.

    Other tasks cannot send on it until *stack* is closed.
    """
    if isinstance(stream, trio.SocketStream):
        if stream.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("can't send data after sending EOF")
        if stream.socket.fileno() < 0:  # also if there is nothing to send, as Trio has it
            raise trio.ClosedResourceError("socket was already closed")
        stack.enter_context(send_conflict_detector(stream))
        return _socket_sink(stream.socket, socket_errors_as_stream_errors)
    if isinstance(stream, trio.socket.SocketType):
        return _socket_sink(_checked(name, stream))
    if isinstance(stream, trio.abc.SendStream):
        return _stream_sink(stream.send_all)
    if anyio_streams.is_socket_stream(stream):
        stack.enter_context(anyio_streams.send_guard(stream))
        return _socket_sink(anyio_streams.socket_of(stream), anyio_streams.errors_of(stream))
    if anyio_streams.is_send_stream(stream):
        return _stream_sink(anyio_streams.send_all(stream))
    raise _wrong_stream(name, stream)


def _socket_sink(sock: trio.socket.SocketType, errors: Errors = nullcontext) -> Sink:
    async def send_some(block: memoryview) -> int:
        with errors():
            return await sock.send(block)

    return Sink(send_some, sock, errors)


def _stream_sink(send_all: Callable[[memoryview], Awaitable[None]]) -> Sink:
    async def send_some(block: memoryview) -> int:
        await send_all(block)
        return len(block)

    return Sink(send_some)


# ---- Where bytes come from -----------------------------------------------------------------


@attrs.frozen
class Source:
    """The source of a transfer.

    Args:
      receive_some: Receives at most the given number of bytes; none only at the end.
      sock: The socket to receive from directly, if there is one.
      errors: Turns the socket's errors into those of the stream.
    """

    receive_some: Callable[[int], Awaitable[Buffer]]
    sock: trio.socket.SocketType | None = None
    errors: Errors = nullcontext

    @property
    def splices(self) -> bool:
        """Whether bytes can be spliced out of it."""
        return _splices(self.sock)

    async def wait_readable(self) -> None:
        """Wait until the socket is readable, or at its end. A checkpoint."""
        assert self.sock is not None
        with self.errors():
            if self.sock.fileno() < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            await trio.lowlevel.wait_readable(self.sock)


def source_of(
    name: str,
    stream: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes,
    stack: ExitStack,
) -> Source:
    """Return the source for *stream*, the argument *name*.

    Other tasks cannot receive from a stream of AnyIO's until *stack* is closed.
    """
    if isinstance(stream, trio.SocketStream):
        return _socket_source(stream.socket, socket_errors_as_stream_errors)
    if isinstance(stream, trio.socket.SocketType):
        return _socket_source(_checked(name, stream))
    if isinstance(stream, trio.abc.ReceiveStream):
        return Source(stream.receive_some)
    if anyio_streams.is_socket_stream(stream):
        stack.enter_context(anyio_streams.receive_guard(stream))
        return _socket_source(anyio_streams.socket_of(stream), anyio_streams.errors_of(stream))
    if anyio_streams.is_receive_stream(stream):
        return Source(anyio_streams.receive_some(stream))
    raise _wrong_stream(name, stream)


def _socket_source(sock: trio.socket.SocketType, errors: Errors = nullcontext) -> Source:
    async def receive_some(most: int) -> bytes:
        with errors():
            return await sock.recv(most)

    return Source(receive_some, sock, errors)


def _checked(name: str, sock: trio.socket.SocketType) -> trio.socket.SocketType:
    if sock.type != trio.socket.SOCK_STREAM:
        raise ValueError(f"{name} must be a SOCK_STREAM socket, such as a TCP socket")
    return sock


def _splices(sock: trio.socket.SocketType | None) -> bool:
    return isinstance(sock, TrioSocket) and sock.family in _FAMILIES


# ---- Which way -----------------------------------------------------------------------------


def ring_for_splices(*, files: bool) -> UringIOManager | None:
    """Return the current run's manager if it uses a ring for sockets, and for files if *files*."""
    if files and current_ring("files") is None:
        return None
    return current_ring("sockets")
