"""AnyIO's streams and sockets: on a ring as on AnyIO's own backend for Trio, call by call."""

from __future__ import annotations

import socket
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest
import trio
from anyio._backends import _trio as anyio_trio
from anyio.abc import SocketAttribute
from differential import Log, run_in
from trio.testing import wait_all_tasks_blocked

from trio_uring import RingConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Scenario = Callable[[Log], Awaitable[None]]

SOCKETS: Final[dict[str, Callable[[], tuple[socket.socket, socket.socket]]]] = {
    "TCP": lambda: tcp_pair(),
    "UNIX": lambda: socket.socketpair(),
    "SEQPACKET": lambda: socket.socketpair(type=socket.SOCK_SEQPACKET),
}
every_kind = pytest.mark.parametrize("kind", SOCKETS)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


class Pair:
    """Two connected streams, ready for use: AnyIO's, and a blocking socket of Python's."""

    def __init__(self, stream: Any, peer: socket.socket) -> None:
        self.stream = stream
        self.peer = peer

    async def receive_all(self, size: int) -> bytes:
        return await anyio.to_thread.run_sync(
            lambda: self.peer.recv(size, socket.MSG_WAITALL), abandon_on_cancel=True
        )


async def connected(kind: str, stack: AsyncExitStack) -> Pair:
    ours, theirs = SOCKETS[kind]()
    stack.enter_context(theirs)
    if kind == "TCP":
        stream: Any = await anyio.abc.SocketStream.from_socket(ours)
    elif kind == "UNIX":
        stream = await anyio.abc.UNIXSocketStream.from_socket(ours)
    else:  # as connect_unix() makes it in new releases
        stream = anyio_trio.UNIXSocketStream(trio.socket.from_stdlib_socket(ours))
    # A socket's first receive is unlike the others.
    theirs.send(b"first")
    assert await stream.receive() == b"first"
    return Pair(await stack.enter_async_context(stream), theirs)


@contextmanager
def anyio_own_methods() -> Iterator[None]:
    """Give AnyIO's streams the methods that we replace, unless nothing has replaced them."""
    stream = anyio_trio.SocketStream
    ours = stream.receive, stream.send
    for name in ("receive", "send"):
        method = getattr(stream, name)
        setattr(stream, name, getattr(method, "__wrapped__", method))
    try:
        yield
    finally:
        stream.receive, stream.send = ours  # type: ignore[method-assign]


def check_same(scenario: Scenario) -> None:
    """Fail if *scenario* comes to something else on a ring than on AnyIO with plain Trio."""
    logs = {"ring": run_in("ring", scenario), "unused": run_in("unused", scenario)}
    with anyio_own_methods():
        plain = run_in("plain", scenario)
    for way, log in logs.items():
        differences = [
            f"{expected[0]}\n    plain: {expected[1]}\n    {way:5}: {found[1]}"
            for expected, found in zip(plain, log, strict=True)
            if expected != found
        ]
        assert not differences, "\n".join([f"{len(differences)} differ:", *differences])


def test_the_backends_by_name_are_compared_too() -> None:
    async def echo() -> tuple[bytes, bool]:
        async with AsyncExitStack() as stack:
            pair = await connected("TCP", stack)
            await pair.stream.send(b"hello")
            pair.peer.send(pair.peer.recv(10))
            statistics = trio.lowlevel.current_statistics().io_statistics
            return await pair.stream.receive(), "uring" in statistics.backend

    assert anyio.run(echo, backend="trio") == (b"hello", False)
    options = {"ring": RingConfig(require=True)}
    assert anyio.run(echo, backend="trio_uring", backend_options=options) == (b"hello", True)


# --- Receiving ------------------------------------------------------------------------------

SIZES: Final = {
    "default": (),
    "1": (1,),
    "3": (3,),
    "65536": (65536,),
    "a million": (1_000_000,),
    "0": (0,),
    "-1": (-1,),
    "True": (True,),
    "too large for C": (2**63,),
    "a float": (1.5,),
    "a string": ("1",),
    "None": (None,),
}


@every_kind
@pytest.mark.parametrize("size", SIZES)
def test_receiving(kind: str, size: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            await log.call("nothing there", lambda: pair.stream.receive(*SIZES[size]))
            pair.peer.send(b"hello")
            await log.call("some there", lambda: pair.stream.receive(*SIZES[size]))
            pair.peer.shutdown(socket.SHUT_WR)
            for _ in range(3):
                await log.call("rest, and the end", lambda: pair.stream.receive(*SIZES[size]))

    check_same(scenario)


@every_kind
def test_receiving_with_a_keyword_and_by_iteration(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            pair.peer.send(b"hello")
            await log.call("keyword", lambda: pair.stream.receive(max_bytes=2))
            for wrong in ({"size": 1}, {"max_bytes": 1, "flags": 0}):
                await log.call("wrong", lambda: pair.stream.receive(**wrong))
            pair.peer.send(b"hello")
            pair.peer.shutdown(socket.SHUT_WR)
            log.note("all", [item async for item in pair.stream])

    check_same(scenario)


# --- Sending --------------------------------------------------------------------------------

ITEMS: Final[dict[str, Callable[[], Any]]] = {
    "bytes": lambda: b"hello",
    "nothing": lambda: b"",
    "bytearray": lambda: bytearray(b"hello"),
    "memoryview": lambda: memoryview(b"hello"),
    "every other byte": lambda: memoryview(b"hello")[::2],
    "words": lambda: memoryview(b"hellohel").cast("I"),
    "a subclass": lambda: type("Bytes", (bytes,), {})(b"hello"),
    "a string": lambda: "hello",
    "None": lambda: None,
    "an int": lambda: 5,
}


@every_kind
@pytest.mark.parametrize("item", ITEMS)
def test_sending(kind: str, item: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            await log.call("send", lambda: pair.stream.send(ITEMS[item]()))
            pair.peer.setblocking(False)
            try:
                log.note("received", pair.peer.recv(100))
            except BlockingIOError:
                log.note("received", None)
            await log.call("end", pair.stream.send_eof)
            await log.call("after the end", lambda: pair.stream.send(ITEMS[item]()))

    check_same(scenario)


@pytest.mark.parametrize("kind", ["TCP", "UNIX"])
def test_sending_more_than_fits(kind: str) -> None:
    data = bytes(range(256)) * 12_000

    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            await log.call("nobody receives", lambda: pair.stream.send(data))
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pair.stream.send, data)
                await wait_all_tasks_blocked()
                await log.call("another", lambda: pair.stream.send(b"x"))
                assert await pair.receive_all(len(data)) == data
            await log.call("after", lambda: pair.stream.send(b"x"))

    check_same(scenario)


# --- Guards, closing, cancellation ----------------------------------------------------------


@every_kind
def test_two_tasks_that_receive(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(pair.stream.receive)
                await wait_all_tasks_blocked()
                await log.call("second", pair.stream.receive)
                pair.peer.send(b"x")
            pair.peer.send(b"y")
            await log.call("after", pair.stream.receive)

    check_same(scenario)


@every_kind
@pytest.mark.parametrize("what", ["receive", "send"])
def test_a_stream_that_is_closed(kind: str, what: str) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "receive": lambda stream: stream.receive(),
        "send": lambda stream: stream.send(bytes(5_000_000)),
    }

    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            if kind != "SEQPACKET" or what == "receive":
                await close_meanwhile(log, pair, lambda: calls[what](pair.stream))
            await log.call("close", pair.stream.aclose)
            await log.call("closed", lambda: calls[what](pair.stream))
            await log.call("closed, again", pair.stream.aclose)
            await log.call("closed, nothing", lambda: pair.stream.send(b""))

    check_same(scenario)


async def close_meanwhile(log: Log, pair: Pair, call: Callable[[], Any]) -> None:
    caught: list[BaseException] = []

    async def wait() -> None:
        try:
            await call()
        except Exception as exc:  # noqa: BLE001
            caught.append(exc)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        await pair.stream.aclose()
    log.note("closed meanwhile", caught)


@every_kind
def test_the_socket_below_is_closed(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            pair.stream._trio_socket.close()
            await log.call("receive", pair.stream.receive)
            await log.call("send", lambda: pair.stream.send(b"x"))

    check_same(scenario)


@every_kind
def test_a_peer_that_is_gone(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            await pair.stream.send(b"x")
            if kind == "TCP":
                pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            pair.peer.close()
            await log.call("receive", pair.stream.receive)
            await log.call("send", lambda: pair.stream.send(b"x"))
            await log.call("receive", pair.stream.receive)

    check_same(scenario)


@every_kind
def test_a_cancelled_task(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            pair.peer.send(b"there")
            for what, call in (
                ("receive", pair.stream.receive),
                ("send", lambda: pair.stream.send(b"x")),
            ):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                log.note(what, scope.cancelled_caught)
            await log.call("receive, later", pair.stream.receive)
            pair.peer.setblocking(False)
            with pytest.raises(BlockingIOError):
                pair.peer.recv(1)

    check_same(scenario)


@every_kind
def test_what_a_stream_says_of_itself(kind: str) -> None:
    async def scenario(log: Log) -> None:
        async with AsyncExitStack() as stack:
            pair = await connected(kind, stack)
            log.note("class", type(pair.stream).__qualname__)
            log.note("stream", isinstance(pair.stream, anyio.abc.SocketStream))
            log.note("UNIX", isinstance(pair.stream, anyio.abc.UNIXSocketStream))
            log.note("family", pair.stream.extra(SocketAttribute.family))
            log.note("attributes", sorted(map(str, pair.stream.extra_attributes)))
            raw = pair.stream.extra(SocketAttribute.raw_socket)
            log.note("raw", raw.fileno() == pair.stream._trio_socket.fileno())
            for name in ("receive", "send"):
                method = getattr(pair.stream, name)
                log.note(name, (method.__name__, method.__qualname__, method.__doc__))

    check_same(scenario)


# --- Listeners and datagrams ----------------------------------------------------------------


def test_listeners() -> None:
    async def scenario(log: Log) -> None:
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as multi:
            [listener] = multi.listeners
            port = multi.extra(SocketAttribute.local_port)
            await log.call("nobody", listener.accept)
            with socket.create_connection(("127.0.0.1", port)) as client:
                stream = await listener.accept()
                log.note("class", type(stream).__qualname__)
                raw = stream.extra(SocketAttribute.raw_socket)
                log.note("no delay", raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                client.send(b"x")
                await log.call("receive", stream.receive)
                await stream.aclose()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.accept)
                await wait_all_tasks_blocked()
                await log.call("second", listener.accept)
                tasks.cancel_scope.cancel()
            await listener.aclose()
            await log.call("closed", listener.accept)

    check_same(scenario)


def test_datagrams() -> None:
    async def scenario(log: Log) -> None:
        async with (
            await anyio.create_udp_socket(family=socket.AF_INET, local_host="127.0.0.1") as server,
            await anyio.create_connected_udp_socket(
                "127.0.0.1", server.extra(SocketAttribute.local_port)
            ) as client,
        ):
            log.name(client.extra(SocketAttribute.local_address), "client")
            log.name(server.extra(SocketAttribute.local_address), "server")
            there = client.extra(SocketAttribute.local_address)
            await log.call("nothing there", server.receive)
            for data in (b"hello", b"", bytes(60_000)):
                await log.call("send", lambda: client.send(data))
                await log.call("receive", server.receive)
                await log.call("answer", lambda: server.sendto(data, *there))
                await log.call("receive the answer", client.receive)
            for wrong in (("data", there), (b"x",), (b"x", "nowhere"), (b"x", ("127.0.0.1",))):
                await log.call("wrong", lambda: server.send(wrong))
            await log.call("too long", lambda: client.send(bytes(70_000)))
            await log.call("too long, answer", lambda: server.sendto(bytes(70_000), *there))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(server.receive)
                await wait_all_tasks_blocked()
                await log.call("second", server.receive)
                tasks.cancel_scope.cancel()
            await server.aclose()
            await log.call("closed", server.receive)
            await log.call("closed, send", lambda: server.sendto(b"x", *there))
            await log.call("refused", lambda: client.send(b"x"))
            await log.call("refused, then", client.receive)

    check_same(scenario)


def test_unix_datagrams(tmp_path: Any) -> None:
    async def scenario(log: Log) -> None:
        path = tmp_path / "server"
        path.unlink(missing_ok=True)
        mine = tmp_path / "client"
        mine.unlink(missing_ok=True)
        async with (
            await anyio.create_unix_datagram_socket(local_path=path) as server,
            await anyio.create_connected_unix_datagram_socket(path, local_path=mine) as client,
        ):
            await log.call("nothing there", server.receive)
            await log.call("send", lambda: client.send(b"hello"))
            await log.call("receive", server.receive)
            await log.call("answer", lambda: server.sendto(b"answer", str(mine)))
            await log.call("receive the answer", client.receive)
            await log.call("nobody", lambda: server.sendto(b"answer", str(tmp_path / "nobody")))

    check_same(scenario)
