"""The two ends of a transfer: a `Source` and a `Sink`, each on a socket where there is one.

They know whose errors to raise, Trio's or AnyIO's, and keep other tasks from sending meanwhile.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Final, Protocol

import attrs
import trio

from trio_uring._engine._io_manager import UringIOManager, current_ring
from trio_uring._trio_private import (
    TrioSocket,
    send_conflict_detector,
    socket_errors_as_stream_errors,
)

from . import _anyio_streams as anyio_streams

# Of sockets that know splices.
_FAMILIES: Final = (trio.socket.AF_INET, trio.socket.AF_INET6, trio.socket.AF_UNIX)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    Errors = Callable[[], AbstractContextManager[None]]


class SendsBytes(Protocol):
    """A stream of AnyIO's, which has ``send``: an ``anyio.abc.ByteSendStream``."""

    async def send(self, item: bytes, /) -> None:
        """Send all of *item*."""
        ...


class ReceivesBytes(Protocol):
    """A stream of AnyIO's, which has ``receive``: an ``anyio.abc.ByteReceiveStream``."""

    async def receive(self, max_bytes: int = ..., /) -> bytes:
        """Receive at most *max_bytes*."""
        ...


class HasFileNo(Protocol):
    """An open file."""

    def fileno(self) -> int:
        """Return its file descriptor."""
        ...


def dup_file(file: int | HasFileNo, stack: ExitStack) -> int:
    """Return a duplicate of *file*'s fd, which *stack* closes.

    What it was duplicated from may be closed, and its number be another file's, while the
    kernel still uses it.

    Raises:
      OSError: ``EBADF``; ``ESPIPE``, as of pread(2), for a pipe, a socket or a terminal. The ring
        would take no notice of the offset, and wait, maybe for ever, without being cancelled.
    """
    fd = os.dup(file if isinstance(file, int) else file.fileno())
    stack.callback(os.close, fd)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.lseek(fd, 0, os.SEEK_CUR)
    return fd


# ---- Where bytes go ------------------------------------------------------------------------


@attrs.frozen
class Sink:
    """What a transfer sends into.

    Args:
      send_some: Sends a block, or as much of it as goes at once; returns how much.
      sock: The socket, if there is one, which may be sent into directly.
      errors: Raises what the stream raises for the socket's errors.
    """

    send_some: Callable[[memoryview], Awaitable[int]]
    sock: trio.socket.SocketType | None = None
    errors: Errors = nullcontext

    @property
    def splices(self) -> bool:
        """Whether bytes may be spliced into it."""
        # splice(2) knows no MSG_NOSIGNAL. Python ignores SIGPIPE unless told otherwise.
        kills = (signal.SIG_DFL, None)
        return _splices(self.sock) and signal.getsignal(signal.SIGPIPE) not in kills


def sink_of(
    stream: trio.abc.SendStream | trio.socket.SocketType | SendsBytes, stack: ExitStack
) -> Sink:
    """Return where to send, and keep other tasks from it as long as *stack* is open."""
    if isinstance(stream, trio.SocketStream):
        if stream.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("can't send data after sending EOF")
        if stream.socket.fileno() < 0:  # also if there is nothing to send, as Trio has it
            raise trio.ClosedResourceError("socket was already closed")
        stack.enter_context(send_conflict_detector(stream))
        return _socket_sink(stream.socket, socket_errors_as_stream_errors)
    if isinstance(stream, trio.socket.SocketType):
        return _socket_sink(_checked(stream))
    if isinstance(stream, trio.abc.SendStream):
        return _stream_sink(stream.send_all)
    if anyio_streams.is_socket_stream(stream):
        stack.enter_context(anyio_streams.send_guard(stream))
        return _socket_sink(anyio_streams.socket_of(stream), anyio_streams.errors_of(stream))
    if anyio_streams.is_send_stream(stream):
        return _stream_sink(anyio_streams.send_all(stream))
    raise TypeError(f"expected a stream or a trio socket, not {type(stream).__name__}")


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
    """What a transfer receives from.

    Args:
      receive_some: Receives at most so many bytes, and none only at the end.
      sock: The socket, if there is one, which may be received from directly.
      errors: Raises what the stream raises for the socket's errors.
    """

    receive_some: Callable[[int], Awaitable[Buffer]]
    sock: trio.socket.SocketType | None = None
    errors: Errors = nullcontext

    @property
    def splices(self) -> bool:
        """Whether bytes may be spliced out of it."""
        return _splices(self.sock)

    async def wait_readable(self) -> None:
        """Wait until the socket is readable, or at its end. A checkpoint."""
        assert self.sock is not None
        with self.errors():
            if self.sock.fileno() < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            await trio.lowlevel.wait_readable(self.sock)


def source_of(
    stream: trio.abc.ReceiveStream | trio.socket.SocketType | ReceivesBytes, stack: ExitStack
) -> Source:
    """Return where to receive, and keep AnyIO's tasks from it as long as *stack* is open."""
    if isinstance(stream, trio.SocketStream):
        return _socket_source(stream.socket, socket_errors_as_stream_errors)
    if isinstance(stream, trio.socket.SocketType):
        return _socket_source(_checked(stream))
    if isinstance(stream, trio.abc.ReceiveStream):
        return Source(stream.receive_some)
    if anyio_streams.is_socket_stream(stream):
        stack.enter_context(anyio_streams.receive_guard(stream))
        return _socket_source(anyio_streams.socket_of(stream), anyio_streams.errors_of(stream))
    if anyio_streams.is_receive_stream(stream):
        return Source(anyio_streams.receive_some(stream))
    raise TypeError(f"expected a stream or a trio socket, not {type(stream).__name__}")


def _socket_source(sock: trio.socket.SocketType, errors: Errors = nullcontext) -> Source:
    async def receive_some(most: int) -> bytes:
        with errors():
            return await sock.recv(most)

    return Source(receive_some, sock, errors)


def _checked(sock: trio.socket.SocketType) -> trio.socket.SocketType:
    if sock.type != trio.socket.SOCK_STREAM:
        raise ValueError("only a SOCK_STREAM socket will do")
    return sock


def _splices(sock: trio.socket.SocketType | None) -> bool:
    return isinstance(sock, TrioSocket) and sock.family in _FAMILIES


# ---- Which way -----------------------------------------------------------------------------


def ring_for_splices(*, files: bool) -> UringIOManager | None:
    """Return the current run's manager, if it has a ring for sockets, and for files if need be."""
    if files and current_ring("files") is None:
        return None
    return current_ring("sockets")
