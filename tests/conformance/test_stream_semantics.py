"""Streams, listeners, pipes, processes, TLS and DTLS work on a ring as on plain Trio."""

from __future__ import annotations

import os
import pty
import signal
import socket
import ssl
import struct
import termios
import tty
from contextlib import asynccontextmanager, suppress
from functools import partial
from subprocess import PIPE, CalledProcessError
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trustme
from anyio._backends import _trio as anyio_trio
from differential import WAYS, Log, check_same, run_in
from trio.lowlevel import FdStream
from trio.testing import (
    check_half_closeable_stream,
    check_one_way_stream,
    check_two_way_stream,
    wait_all_tasks_blocked,
)

from trio_uring._trio_private import TrioSocket

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

LOCALHOST: Final = ("127.0.0.1", 0)
A_LOT: Final = bytes(range(251)) * 40_000


# --- Socket streams -------------------------------------------------------------------------


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(LOCALHOST) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
        return ours, theirs


def reset(theirs: socket.socket) -> None:
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()


def send_hello(theirs: socket.socket) -> None:
    theirs.send(b"hello")


STATES: Final[dict[str, Callable[[socket.socket], object]]] = {
    "nothing": lambda _theirs: None,
    "hello": send_hello,
    "end": lambda theirs: theirs.shutdown(socket.SHUT_WR),
    "closed": lambda theirs: theirs.close(),
    "reset": reset,
}

STREAM_CALLS: Final[dict[str, Callable[[Any], Awaitable[Any]]]] = {
    "receive_some()": lambda stream: stream.receive_some(),
    "receive_some(None)": lambda stream: stream.receive_some(None),
    "receive_some(3)": lambda stream: stream.receive_some(3),
    "receive_some(65536)": lambda stream: stream.receive_some(65536),
    "receive_some(100000)": lambda stream: stream.receive_some(100_000),
    "receive_some(0)": lambda stream: stream.receive_some(0),
    "receive_some(-1)": lambda stream: stream.receive_some(-1),
    "receive_some(1.0)": lambda stream: stream.receive_some(1.0),
    "receive_some('1')": lambda stream: stream.receive_some("1"),
    "receive_some(True)": lambda stream: stream.receive_some(True),
    "send_all(b'')": lambda stream: stream.send_all(b""),
    "send_all(b'hello')": lambda stream: stream.send_all(b"hello"),
    "send_all(bytearray)": lambda stream: stream.send_all(bytearray(b"hello")),
    "send_all(memoryview)": lambda stream: stream.send_all(memoryview(b"hello")),
    "send_all(every other)": lambda stream: stream.send_all(memoryview(b"hello")[::2]),
    "send_all(str)": lambda stream: stream.send_all("hello"),
    "send_all(None)": lambda stream: stream.send_all(None),
    "send_all(a lot)": lambda stream: stream.send_all(A_LOT),
    "send_all twice": lambda stream: twice(stream.send_all, b"hello"),
    "receive_some twice": lambda stream: twice(stream.receive_some),
    "wait_send_all_might_not_block": lambda stream: stream.wait_send_all_might_not_block(),
    "send_eof": lambda stream: stream.send_eof(),
    "send_eof, send_all": lambda stream: after_eof(stream),
    "aclose": lambda stream: stream.aclose(),
}


async def twice(call: Callable[..., Awaitable[Any]], *args: object) -> Any:
    await call(*args)
    return await call(*args)


async def after_eof(stream: Any) -> None:
    await stream.send_eof()
    await stream.send_all(b"hello")


@pytest.mark.parametrize("pair", [unix_pair, tcp_pair])
@pytest.mark.parametrize("state", STATES)
def test_socket_stream_calls(pair: Callable[[], Any], state: str) -> None:
    async def scenario(log: Log) -> None:
        for what, call in STREAM_CALLS.items():
            ours, theirs = pair()
            with theirs:
                async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
                    STATES[state](theirs)
                    await log.call(what, lambda: call(stream))
        for what, call in STREAM_CALLS.items():
            ours, theirs = pair()
            with theirs:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
                await stream.aclose()
                await log.call(f"{what}, closed", lambda: call(stream))

    check_same(scenario)


@pytest.mark.parametrize("pair", [unix_pair, tcp_pair])
@pytest.mark.parametrize("size", [5, 3_000_000])
def test_a_full_stream_gets_room_as_the_deadline_passes(pair: Callable[[], Any], size: int) -> None:
    """Some is sent, and whether it was all decides whether the deadline is seen."""

    async def scenario(log: Log) -> None:
        for wrap in (trio.SocketStream, anyio_trio.SocketStream):
            ours, theirs = pair()
            sock = trio.socket.from_stdlib_socket(ours)
            stream: Any = wrap(sock)
            send = stream.send_all if wrap is trio.SocketStream else stream.send
            scope = trio.CancelScope()

            async def wait(scope: trio.CancelScope = scope, send: Any = send) -> None:
                with scope:
                    await send(bytes(size))

            with theirs, sock:
                fill(ours)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(wait)
                    await wait_all_tasks_blocked()
                    receive_all(theirs)
                    scope.deadline = trio.current_time() - 1
                log.note("cancelled", scope.cancelled_caught)
                log.note("some was sent", receive_all(theirs) > 0)

    check_same(scenario)


class NotingSocket(TrioSocket):
    """Notes what it is given to send, of which it takes two bytes."""

    given: list[object]

    async def send(self, data: Any, flags: int = 0, /) -> int:
        self.given.append((type(data).__name__, bytes(data)))
        return await super().send(bytes(data)[:2], flags)


SENT: Final[dict[str, Callable[[], Any]]] = {
    "bytes": lambda: b"hello",
    "bytearray": lambda: bytearray(b"hello"),
    "memoryview": lambda: memoryview(b"hello"),
    "empty": lambda: b"",
}


def test_what_is_sent_arrives_from_the_first_byte_to_the_last() -> None:
    async def scenario(log: Log) -> None:
        for what, make in SENT.items():
            for wrap in (trio.socket.from_stdlib_socket, NotingSocket):
                ours, theirs = unix_pair()
                sock: Any = wrap(ours)
                sock.given = []
                with theirs:
                    async with trio.SocketStream(sock) as stream:
                        await log.call(what, partial(stream.send_all, make()))
                    log.note(f"{what}, given to the socket", sock.given)
                    log.note(f"{what}, arrived", theirs.recv(100))

    check_same(scenario)


def test_a_receive_takes_as_much_as_on_plain_trio() -> None:
    async def scenario(log: Log) -> None:
        ours, theirs = unix_pair()
        with theirs:
            async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
                theirs.send(bytes(100_000))
                log.note("bytes", len(await stream.receive_some()))

    check_same(scenario)


def fill(sock: socket.socket) -> None:
    for size in (65536, 4096, 1):
        with suppress(BlockingIOError):
            while True:
                sock.send(bytes(size))


def receive_all(sock: socket.socket) -> int:
    sock.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while data := sock.recv(1 << 20):
            count += len(data)
    return count


@pytest.mark.parametrize("way", WAYS)
def test_socket_streams_pass_trios_checks(way: str) -> None:
    async def make(_log: object = None) -> tuple[trio.SocketStream, trio.SocketStream]:
        left, right = trio.socket.socketpair()
        return trio.SocketStream(left), trio.SocketStream(right)

    async def make_clogged() -> tuple[trio.SocketStream, trio.SocketStream]:
        left, right = await make()
        for stream in (left, right):
            with suppress(BlockingIOError):
                while True:
                    stream.socket._sock.send(bytes(10_000))  # type: ignore[attr-defined]
        return left, right

    async def scenario(_log: Log) -> None:
        await check_half_closeable_stream(make, make_clogged)

    run_in(way, scenario)


# --- Listeners ------------------------------------------------------------------------------


def test_listeners() -> None:
    async def scenario(log: Log) -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()
        await log.call("accept", listener.accept)
        with socket.create_connection(address) as client:
            stream = await listener.accept()
            log.note("peer", stream.socket.getpeername() == client.getsockname())
            log.note("nodelay", stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await stream.aclose()
        # A connection that is gone before it is accepted.
        with socket.create_connection(address) as client:
            reset(client)
        stream = await listener.accept()
        await log.call("receive_some, reset", stream.receive_some)
        await stream.aclose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(note_error, log, listener.accept)
            await wait_all_tasks_blocked()
            await listener.aclose()
        await log.call("accept, closed", listener.accept)

    check_same(scenario)


async def note_error(log: Log, call: Callable[[], Awaitable[object]]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one, is what is compared)
        await call()
    log.note("error", caught.value)


def test_servers() -> None:
    """A typical server with many clients at once."""

    async def scenario(log: Log) -> None:
        async def echo(stream: trio.SocketStream) -> None:
            async for data in stream:
                await stream.send_all(data)

        async def ask(port: int, number: int) -> None:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(A_LOT[: number * 10_000])
                await stream.send_eof()
                received = b"".join([data async for data in stream])
                answers[number] = received == A_LOT[: number * 10_000]

        answers: dict[int, bool] = {}
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(trio.serve_tcp, echo, 0, host="127.0.0.1"))
            port = listener.socket.getsockname()[1]
            async with trio.open_nursery() as clients:
                for number in range(20):
                    clients.start_soon(ask, port, number)
            nursery.cancel_scope.cancel()
        log.note("answers", sorted(answers.items()))

    check_same(scenario)


# --- Pipes ----------------------------------------------------------------------------------


@asynccontextmanager
async def pipe() -> AsyncIterator[tuple[FdStream, FdStream]]:
    read_end, write_end = os.pipe()
    async with FdStream(read_end) as reader, FdStream(write_end) as writer:
        yield reader, writer


def test_pipe_calls() -> None:
    async def scenario(log: Log) -> None:
        calls = {what: call for what, call in STREAM_CALLS.items() if "eof" not in what}
        for what, call in calls.items():
            for end in (0, 1):
                for state in ("open", "hello", "full", "other end closed", "closed"):
                    async with pipe() as ends:
                        if state == "hello":
                            os.write(ends[1].fileno(), b"hello")
                        elif state == "full":
                            os.write(ends[1].fileno(), bytes(65536))
                        elif state == "other end closed":
                            await ends[1 - end].aclose()
                        elif state == "closed":
                            await ends[end].aclose()
                        await log.call(f"{what}, {end}, {state}", lambda: call(ends[end]))

    check_same(scenario)


@pytest.mark.parametrize("way", WAYS)
def test_pipes_pass_trios_checks(way: str) -> None:
    async def make() -> tuple[FdStream, FdStream]:
        read_end, write_end = os.pipe()
        return FdStream(write_end), FdStream(read_end)

    async def make_clogged() -> tuple[FdStream, FdStream]:
        writer, reader = await make()
        os.write(writer.fileno(), bytes(65536))
        return writer, reader

    async def scenario(_log: Log) -> None:
        await check_one_way_stream(make, make_clogged)

    run_in(way, scenario)


async def cancelled(call: Callable[[], Awaitable[Any]]) -> Any:
    """Make a call in a cancelled scope; return what comes of it."""
    with trio.CancelScope() as scope:
        scope.cancel()
        return await call()
    return "cancelled"


# Wrong arguments of pipes are noticed before the cancellation on a ring.
RIGHT_CALLS: Final = {
    what: call
    for what, call in STREAM_CALLS.items()
    if what not in {"send_all(str)", "send_all(None)", "send_all(every other)"}
}


def test_calls_of_a_cancelled_task() -> None:
    async def scenario(log: Log) -> None:
        for what, call in RIGHT_CALLS.items():
            for closed in (False, True):
                read_end, write_end = os.pipe()
                ours, theirs = unix_pair()
                sock = trio.socket.from_stdlib_socket(ours)
                with theirs:
                    os.write(write_end, b"hello")
                    theirs.send(b"hello")
                    async with (
                        trio.SocketStream(sock) as stream,
                        FdStream(read_end) as reader,
                        FdStream(write_end) as writer,
                    ):
                        for end in (stream, reader, writer):
                            if closed:
                                await end.aclose()
                            if end is stream or "eof" not in what:
                                label = f"{what}, {type(end).__name__}, {closed=}"
                                await log.call(label, lambda: cancelled(partial(call, end)))

    check_same(scenario)


def test_other_files_as_streams() -> None:
    """Terminals, sockets, and files that are not meant to be streams."""

    async def scenario(log: Log) -> None:
        master, slave = pty.openpty()
        tty.setraw(slave, termios.TCSANOW)
        async with FdStream(master) as ours, FdStream(slave) as theirs:
            await log.call("terminal, nothing", ours.receive_some)
            await log.call("terminal, send_all", lambda: theirs.send_all(b"hello"))
            await log.call("terminal, receive_some", ours.receive_some)
            await log.call("terminal, send_all back", lambda: ours.send_all(b"hello"))
            await log.call("terminal, receive_some(2)", lambda: theirs.receive_some(2))
            await log.call("terminal, send a lot", lambda: ours.send_all(A_LOT))
            await theirs.aclose()
            await log.call("terminal, hung up", ours.receive_some)
        left, right = socket.socketpair()
        with right:
            async with FdStream(left.detach()) as stream:
                await log.call("socket, send_all", lambda: stream.send_all(b"hello"))
                log.note("received", right.recv(10))
                await log.call("socket, nothing", stream.receive_some)
                right.send(b"hello")
                await log.call("socket, receive_some", stream.receive_some)
                await log.call("socket, send a lot", lambda: stream.send_all(A_LOT))
        async with FdStream(os.open(os.devnull, os.O_RDWR)) as stream:
            await log.call("null, receive_some", stream.receive_some)
            await log.call("null, send_all", lambda: stream.send_all(b"hello"))
        async with FdStream(os.open(__file__, os.O_RDONLY)) as stream:
            await log.call("file, receive_some", lambda: stream.receive_some(10))
            await log.call("file, receive_some again", lambda: stream.receive_some(10))
            await log.call("file, send_all", lambda: stream.send_all(b"hello"))

    check_same(scenario)


# --- Processes ------------------------------------------------------------------------------


def test_processes() -> None:
    async def scenario(log: Log) -> None:
        done = await trio.run_process(["cat"], stdin=A_LOT, capture_stdout=True)
        log.note("cat", (done.returncode, done.stdout == A_LOT))
        done = await trio.run_process(
            "echo out; echo err >&2; exit 3",
            shell=True,
            check=False,
            capture_stdout=True,
            capture_stderr=True,
        )
        log.note("exit", (done.returncode, done.stdout, done.stderr))
        with pytest.raises(CalledProcessError) as caught:
            await trio.run_process(["false"])
        log.note("false", caught.value.returncode)
        # It closes its input without reading it.
        done = await trio.run_process(["true"], stdin=A_LOT)
        log.note("true", done.returncode)
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(trio.run_process, ["cat"], stdin=PIPE, stdout=PIPE, check=False)
            )
            await process.stdin.send_all(b"hello")
            log.note("received", await process.stdout.receive_some())
            await log.call("nothing", process.stdout.receive_some)
            process.send_signal(signal.SIGTERM)
            await process.wait()
            await log.call("ended", process.stdout.receive_some)
            await log.call("broken", lambda: process.stdin.send_all(b"hello"))
            log.note("returncode", process.returncode)
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(trio.run_process, ["cat"], stdin=PIPE))
            nursery.cancel_scope.cancel()
        log.note("cancelled", nursery.cancel_scope.cancelled_caught)

    check_same(scenario)


# --- TLS and DTLS ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("example.org").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def test_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    async def scenario(log: Log) -> None:
        server_context, client_context = contexts

        async def echo(stream: trio.SSLStream[trio.SocketStream]) -> None:
            with suppress(trio.BrokenResourceError):
                async for data in stream:
                    await stream.send_all(data)
                await stream.aclose()

        async def connect(host: str = "example.org") -> trio.SSLStream[trio.SocketStream]:
            raw = await trio.open_tcp_stream("127.0.0.1", port)
            return trio.SSLStream(raw, client_context, server_hostname=host)

        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(
                partial(trio.serve_ssl_over_tcp, echo, 0, server_context, host="127.0.0.1")
            )
            port = listener.transport_listener.socket.getsockname()[1]
            async with await connect() as stream:
                await log.call("send_all", lambda: stream.send_all(b"hello"))
                await log.call("receive_some", stream.receive_some)
                await log.call("receive_some, nothing", stream.receive_some)
            await log.call("receive_some, closed", stream.receive_some)
            stream = await connect("example.com")
            await log.call("wrong host", stream.do_handshake)
            await trio.aclose_forcefully(stream)
            stream = await connect()
            await stream.do_handshake()
            async with trio.open_nursery() as transfers:
                received = bytearray()

                async def receive() -> None:
                    while len(received) < len(A_LOT):
                        received.extend(await stream.receive_some())

                transfers.start_soon(receive)
                await stream.send_all(A_LOT)
            log.note("a lot", received == A_LOT)
            await stream.aclose()
            nursery.cancel_scope.cancel()

    check_same(scenario)


@pytest.mark.parametrize("way", WAYS)
def test_tls_streams_pass_trios_checks(
    way: str, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    async def make() -> tuple[Any, Any]:
        left, right = trio.socket.socketpair()
        server_context, client_context = contexts
        client: Any = trio.SSLStream(
            trio.SocketStream(left), client_context, server_hostname="example.org"
        )
        server: Any = trio.SSLStream(trio.SocketStream(right), server_context, server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        return client, server

    async def scenario(_log: Log) -> None:
        await check_two_way_stream(make, None)

    run_in(way, scenario)


def test_dtls() -> None:
    openssl = pytest.importorskip("OpenSSL.SSL")
    authority = trustme.CA()
    certificate = authority.issue_cert("example.org")

    def endpoint() -> trio.DTLSEndpoint:
        return trio.DTLSEndpoint(trio.socket.socket(type=socket.SOCK_DGRAM))

    async def scenario(log: Log) -> None:
        server_context = openssl.Context(openssl.DTLS_METHOD)
        certificate.configure_cert(server_context)
        client_context = openssl.Context(openssl.DTLS_METHOD)
        authority.configure_trust(client_context)
        with endpoint() as server, endpoint() as client:
            await server.socket.bind(LOCALHOST)
            address = server.socket.getsockname()

            async def echo(channel: trio.DTLSChannel) -> None:
                async for packet in channel:
                    await channel.send(packet)

            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, server_context, echo)
                channel = client.connect(address, client_context)
                await log.call("handshake", channel.do_handshake)
                for size in (1, 1000):
                    await log.call("send", lambda: channel.send(bytes(size)))
                    await log.call("receive", channel.receive)
                await channel.aclose()
                await log.call("send, closed", lambda: channel.send(b"x"))
                nursery.cancel_scope.cancel()

    check_same(scenario)
