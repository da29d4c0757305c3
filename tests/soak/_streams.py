"""TCP, TLS, UNIX sockets that pass fds, UDP, and pipes."""

from __future__ import annotations

import array
import os
import socket
import ssl
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import trio
import trustme
from _load import Load, LostError, Received

import trio_uring

if TYPE_CHECKING:
    from collections.abc import Callable

Stream: TypeAlias = "trio.SocketStream | trio.SSLStream[Any] | trio.lowlevel.FdStream"

CLIENTS: Final = 3
WINDOW: Final = 8  # datagrams under way, so that none finds its socket full

LINGER_NOT: Final = b"\1\0\0\0\0\0\0\0"  # struct linger: closing resets the connection


# --- Both ends of a stream ------------------------------------------------------------------


async def echo(load: Load, stream: Stream) -> None:
    """Send back what arrives, until the end or until the other breaks the connection."""
    with suppress(trio.BrokenResourceError):
        while True:
            data = await load.perhaps("receive", partial(stream.receive_some, load.size()))
            if data is None:
                continue
            if not data:
                break
            await stream.send_all(data)


async def send_in_pieces(load: Load, stream: Stream, data: bytes) -> None:
    view = memoryview(data)
    while view:
        size = load.size()
        await stream.send_all(view[:size])
        view = view[size:]


async def exchange(load: Load, stream: Stream, *, ends: tuple[str, ...]) -> None:
    """Send data, compare its echo, and end the connection in one of the *ends*.

    "eof" ends it in order; "close" when all has arrived; "reset" and "cancel" somewhere before.
    """
    data = load.data()
    end = load.random.choice(ends)
    received = Received(load)

    async def send() -> None:
        await send_in_pieces(load, stream, data)
        if end == "eof" and not isinstance(stream, trio.SSLStream | trio.lowlevel.FdStream):
            await stream.send_eof()

    async def both_ways() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await receive(load, stream, received, len(data), until_eof=end == "eof")

    if end in {"eof", "close"}:
        await both_ways()
    else:
        with load.cancelling():
            await both_ways()
    received.check(data, whole=end in {"eof", "close"})
    if end == "reset" and isinstance(stream, trio.SocketStream):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
    await trio.aclose_forcefully(stream)


async def receive(
    load: Load, stream: Stream, received: Received, count: int, *, until_eof: bool
) -> None:
    while until_eof or received.count < count:
        data = await load.perhaps("receive", partial(stream.receive_some, load.size()))
        if data is None:
            continue
        if not data:
            return
        received.add(data)


async def tcp(load: Load) -> None:
    """Echo through TCP. Connections end in each way."""
    await clients_of("tcp", load, partial(echo, load), plain_client)


async def accepted_in_bulk(load: Load) -> None:
    """Echo through TCP, accepted and received by multishot operations."""

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with trio_uring.receive_many(stream, max_buffers=2, buffer_size=4096) as leases:
                while True:
                    try:
                        lease = await load.perhaps("receive_many", leases.receive)
                    except trio.EndOfChannel:
                        break
                    if lease is not None:
                        with lease:
                            await stream.send_all(lease.memory)

    await clients_of("accepted in bulk", load, serve, plain_client, trio_uring.accept_many)


async def plain_client(load: Load, stream: trio.SocketStream) -> None:
    await exchange(load, stream, ends=("eof", "close", "reset", "cancel"))


async def tls(load: Load) -> None:
    """Echo through TLS, some of whose handshakes are cancelled."""
    ours, theirs = tls_contexts()

    async def serve(stream: trio.SocketStream) -> None:
        encrypted = trio.SSLStream(stream, theirs, server_side=True, https_compatible=True)
        with suppress(trio.BrokenResourceError):
            await encrypted.do_handshake()  # a stream is of no use where this is cancelled
            await echo(load, encrypted)
        await trio.aclose_forcefully(encrypted)

    async def client(load: Load, stream: trio.SocketStream) -> None:
        encrypted = trio.SSLStream(stream, ours, server_hostname="here", https_compatible=True)

        async def shake_hands() -> bool:
            await encrypted.do_handshake()
            return True

        if await load.perhaps("handshake", shake_hands):
            await exchange(load, encrypted, ends=("close", "cancel"))

    await clients_of("tls", load, serve, client)


@cache
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return contexts of the client and of the server."""
    authority = trustme.CA()
    ours, theirs = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(ours)
    authority.issue_cert("here").configure_cert(theirs)
    return ours, theirs


async def clients_of(
    workload: str,
    load: Load,
    serve: Callable[[trio.SocketStream], Any],
    client: Callable[[Load, trio.SocketStream], Any],
    listening: Callable[[trio.SocketListener], Any] = lambda listener: listener,
) -> None:
    """Serve clients, of which some connect and others are cancelled while they do."""

    async def connect_repeatedly(address: tuple[str, int]) -> None:
        while load.goes_on(workload):
            with load.round(workload):
                connecting = partial(trio.open_tcp_stream, *address)
                stream = await load.perhaps("connect", connecting)
                if stream is not None:
                    async with stream:
                        await client(load, stream)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    async with trio.open_nursery() as serving:
        serving.start_soon(trio.serve_listeners, serve, [listening(listener)])
        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(connect_repeatedly, address)
        serving.cancel_scope.cancel()


# --- UNIX sockets, datagrams, pipes ---------------------------------------------------------


async def passed_fds(load: Load) -> None:
    """Pass the ends of pipes, each of which holds its number. None may be lost or come twice."""
    workload = "passed fds"
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        while load.goes_on(workload):
            with load.round(workload):
                count = load.random.randrange(1, 20)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pass_pipes, load, ours, count)
                    await receive_pipes(load, theirs, count)


async def pass_pipes(load: Load, sock: trio.socket.SocketType, count: int) -> None:
    for number in range(count):
        read_end, write_end = os.pipe()
        os.write(write_end, b"%d" % number)
        os.close(write_end)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [read_end]))]
        try:
            while not await load.perhaps("sendmsg", partial(sock.sendmsg, [b"x"], ancillary)):
                pass
        finally:
            os.close(read_end)


async def receive_pipes(load: Load, sock: trio.socket.SocketType, count: int) -> None:
    expected = 0
    while expected < count:
        # For two bytes at once, which the kernel does not join where each has fds.
        message = await load.perhaps("recvmsg", partial(sock.recvmsg, 2, socket.CMSG_SPACE(4)))
        if message is None:
            continue
        data, [(_, _, fds)], flags, _ = message
        [fd] = array.array("i", fds)
        try:
            found = os.read(fd, 100)
        finally:
            os.close(fd)
        load.bytes += len(data) + len(found)
        if (data, found, flags & socket.MSG_CTRUNC) != (b"x", b"%d" % expected, 0):
            raise LostError(f"fd {expected} came as {found!r} with {data!r} and flags {flags}")
        expected += 1


async def udp(load: Load) -> None:
    """Send datagrams, which all arrive in order, since few are under way at once."""
    workload = "udp"
    ours, theirs = (trio.socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
    with ours, theirs:
        for sock in (ours, theirs):
            await sock.bind(("127.0.0.1", 0))
        while load.goes_on(workload):
            with load.round(workload):
                await datagrams(load, ours, theirs)


async def datagrams(
    load: Load, ours: trio.socket.SocketType, theirs: trio.socket.SocketType
) -> None:
    messages = [load.random.randbytes(min(load.size(), 9000)) for _ in range(30)]
    window = trio.Semaphore(WINDOW)
    address = theirs.getsockname()

    async def send() -> None:
        for message in messages:
            await window.acquire()
            while not await load.perhaps("sendto", partial(ours.sendto, message, address)):
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for message in messages:
            found = None
            while found is None:
                found = await load.perhaps("recvfrom", partial(theirs.recvfrom, 10_000))
            received = Received(load)
            received.add(found[0])
            received.check(message, whole=True)
            window.release()


async def pipes(load: Load) -> None:
    """Send through pipes, some of which lose their reader in the middle."""
    workload = "pipes"
    while load.goes_on(workload):
        with load.round(workload):
            data = load.data()
            received = Received(load)
            read_end, write_end = os.pipe()
            reader, writer = trio.lowlevel.FdStream(read_end), trio.lowlevel.FdStream(write_end)
            whole = load.random.random() < 0.7
            async with reader, trio.open_nursery() as nursery:
                nursery.start_soon(send_and_close, load, writer, data)
                with trio.CancelScope() if whole else load.cancelling():
                    await receive(load, reader, received, 0, until_eof=True)
                await reader.aclose()
            received.check(data, whole=whole)


async def send_and_close(load: Load, writer: trio.lowlevel.FdStream, data: bytes) -> None:
    async with writer:
        with suppress(trio.BrokenResourceError):
            await send_in_pieces(load, writer, data)
