"""Connected streams, and other helpers of the tests of transfers."""

from __future__ import annotations

import os
import resource
import socket as stdlib_socket
import ssl
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import trio
import trustme
from races import current_manager
from trio.testing import memory_stream_pair

import trio_uring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

RUNS: Final = {"ring": trio_uring.run, "no ring": trio.run}
KINDS: Final = ["TCP", "UNIX"]


@contextmanager
def connected(kind: str) -> Iterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Yield both ends of a connection."""
    if kind == "UNIX":
        pair = stdlib_socket.socketpair()
    else:
        with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
            client = stdlib_socket.create_connection(listener.getsockname())
            pair = client, listener.accept()[0]
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(sock)) for sock in pair)
    with ours.socket, theirs.socket:
        yield ours, theirs


def completed(*opcodes: str) -> int:
    """Return how many operations of these opcodes have completed so far."""
    counts = current_manager().statistics().completed
    return sum(counts.get(opcode, 0) for opcode in opcodes)


async def all_of(stream: trio.abc.ReceiveStream) -> bytes:
    """Receive until the end of the stream."""
    parts = [part async for part in stream]
    return b"".join(parts)


async def closing(stream: trio.SocketStream, function: Callable[[], Awaitable[object]]) -> None:
    """Call *function*, then close *stream*."""
    async with stream:
        await function()


async def tls_pair() -> tuple[trio.SSLStream[Any], trio.SSLStream[Any]]:
    """Return both ends of a TLS connection, after the handshake."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(ours)
    authority.issue_cert("here").configure_cert(theirs)
    a, b = memory_stream_pair()
    client = trio.SSLStream(a, ours, server_hostname="here", https_compatible=True)
    server = trio.SSLStream(b, theirs, server_side=True, https_compatible=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.do_handshake)
        nursery.start_soon(server.do_handshake)
    return client, server


@contextmanager
def no_fds_but(count: int) -> Iterator[None]:
    """Leave only *count* fds free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 20, hard))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def warm_streams() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """Yield two connected streams that receive natively, if the engine is native.

    A stream's first receive doesn't.
    """
    a, b = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
    try:
        for one, other in ((a, b), (b, a)):
            await one.send_all(b"first")
            assert await other.receive_some() == b"first"
            await one.socket.send(b"second")
            assert await other.socket.recv(10) == b"second"
        yield a, b
    finally:
        a.socket.close()
        b.socket.close()


async def receive_exactly(stream: trio.SocketStream, size: int) -> bytes:
    """Receive *size* bytes."""
    data = b""
    while len(data) < size:
        data += await stream.receive_some(size - len(data))
    return data
