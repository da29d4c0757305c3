"""What replaces a method of `socket.socket`, or listens to audit events, sees what it always sees.

Network guards of test suites do the first; sandboxes and monitors do both.
"""

from __future__ import annotations

import socket as stdlib_socket
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from anyio._backends import _trio as anyio_trio

import trio_uring
from trio_uring import RingConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Self

RUNS: Final[dict[str, Callable[..., Any]]] = {
    "plain": trio.run,
    "ring": lambda main, *args: trio_uring.run(main, *args, ring=RingConfig(require=True)),
}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return RUNS[request.param]


@pytest.fixture
def listener() -> Iterator[stdlib_socket.socket]:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as made:
        yield made


# --- Guards ---------------------------------------------------------------------------------


class GuardedError(Exception):
    """What a guard raises."""


def guard(_socket: stdlib_socket.socket, *_args: object) -> None:
    raise GuardedError


def test_a_replaced_connect_is_called(
    run: Callable[..., Any], listener: stdlib_socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = listener.getsockname()

    async def main() -> None:
        with trio.socket.socket() as sock, pytest.raises(GuardedError):
            await sock.connect(address)
        with pytest.RaisesGroup(GuardedError, flatten_subgroups=True):
            await trio.open_tcp_stream(*address)
        monkeypatch.undo()
        with trio.socket.socket() as sock:
            await sock.connect(address)

    monkeypatch.setattr(stdlib_socket.socket, "connect", guard)
    run(main)


@pytest.mark.parametrize("method", ["sendto", "sendmsg"])
def test_a_replaced_method_that_sends_is_called(
    run: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        with udp() as (ours, theirs):
            address = theirs.getsockname()
            await send(ours, method, address)
            assert (await theirs.recvfrom(9))[0] == b"x"
            monkeypatch.setattr(stdlib_socket.socket, method, guard)
            with pytest.raises(GuardedError):
                await send(ours, method, address)
            with pytest.raises(GuardedError):
                await send(ours, method, ("localhost", address[1]))  # resolved first
            monkeypatch.undo()
            await send(ours, method, address)
            assert (await theirs.recvfrom(9))[0] == b"x"

    run(main)


def test_a_replaced_class_is_used(
    run: Callable[..., Any], listener: stdlib_socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(stdlib_socket.socket):
        def __new__(cls, *_args: object, **_kwargs: object) -> Self:
            raise GuardedError

    async def main() -> None:
        accepting = trio.socket.from_stdlib_socket(listener)
        with trio.socket.socket() as sock:
            await sock.connect(listener.getsockname())
            monkeypatch.setattr(stdlib_socket, "socket", Forbidden)
            with pytest.raises(GuardedError):
                trio.socket.socket()
            with pytest.raises(GuardedError):
                await accepting.accept()
            monkeypatch.undo()

    run(main)


async def send(sock: trio.socket.SocketType, method: str, address: Any) -> None:
    if method == "sendto":
        assert await sock.sendto(b"x", address) == 1
    else:
        assert await sock.sendmsg([b"x"], [], 0, address) == 1


@contextmanager
def udp() -> Iterator[tuple[trio.socket.SocketType, trio.socket.SocketType]]:
    ours, theirs = (trio.socket.socket(type=trio.socket.SOCK_DGRAM) for _ in range(2))
    with ours, theirs:
        stdlib_socket.socket.bind(theirs._sock, ("127.0.0.1", 0))  # type: ignore[attr-defined]
        yield ours, theirs


# --- Methods of Trio's sockets --------------------------------------------------------------

STREAM_CALLS: Final[dict[str, tuple[str, Callable[[trio.SocketStream, Any], Any]]]] = {
    "receive_some": ("recv", lambda stream, _: stream.receive_some(9)),
    "send_all": ("send", lambda stream, _: stream.send_all(b"x")),
    "AnyIO's receive": ("recv", lambda _, stream: stream.receive()),
    "AnyIO's send": ("send", lambda _, stream: stream.send(b"x")),
}


async def replacement(*_args: object) -> object:
    raise GuardedError


@pytest.mark.parametrize("where", ["socket", "class"])
@pytest.mark.parametrize("call", STREAM_CALLS)
def test_a_stream_calls_its_sockets_replaced_method(
    run: Callable[..., Any], call: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, make_call = STREAM_CALLS[call]

    async def main() -> None:
        ours, theirs = stdlib_socket.socketpair()
        with theirs, trio.socket.from_stdlib_socket(ours) as sock:
            streams = trio.SocketStream(sock), anyio_trio.SocketStream(sock)
            for _ in range(2):  # a socket's first receive is unlike the others
                theirs.send(b"x")
                await make_call(*streams)
                assert theirs.recv(9) == b"x" if method == "send" else True
            monkeypatch.setattr(sock if where == "socket" else type(sock), method, replacement)
            theirs.send(b"x")
            with pytest.raises(GuardedError):
                await make_call(*streams)
            monkeypatch.undo()
            await make_call(*streams)

    run(main)


@pytest.mark.parametrize("where", ["socket", "class"])
def test_a_listener_calls_its_sockets_replaced_accept(
    run: Callable[..., Any],
    where: str,
    listener: stdlib_socket.socket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        sock = trio.socket.from_stdlib_socket(listener)
        monkeypatch.setattr(sock if where == "socket" else type(sock), "accept", replacement)
        with stdlib_socket.create_connection(listener.getsockname()):
            with pytest.raises(GuardedError):
                await trio.SocketListener(sock).accept()
            monkeypatch.undo()
            await (await trio.SocketListener(sock).accept()).aclose()

    run(main)


# --- Audit events ---------------------------------------------------------------------------

Event = tuple[str, tuple[object, ...]]

_listeners: Final[list[Callable[[str, tuple[object, ...]], None]]] = []


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    """Add an audit hook, which cannot be removed."""

    def listen(event: str, args: tuple[object, ...]) -> None:
        for listener in _listeners:
            listener(event, args)

    sys.addaudithook(listen)


@contextmanager
def audited() -> Iterator[list[Event]]:
    heard: list[Event] = []

    def listen(event: str, args: tuple[object, ...]) -> None:
        if event.startswith("socket."):
            heard.append((event, args))

    _listeners.append(listen)
    try:
        yield heard
    finally:
        _listeners.clear()


@contextmanager
def forbidding(forbidden: str) -> Iterator[None]:
    def listen(event: str, _args: tuple[object, ...]) -> None:
        if event == forbidden:
            raise GuardedError

    _listeners.append(listen)
    try:
        yield
    finally:
        _listeners.clear()


def test_audit_events_are_those_of_plain_trio(listener: stdlib_socket.socket) -> None:
    seen = {}
    for name, run in RUNS.items():
        seen[name] = run(exercise, listener)
    assert seen["ring"] == seen["plain"]
    names = {event for event, *_ in seen["ring"]}
    assert {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.__new__"} <= names


async def exercise(listener: stdlib_socket.socket) -> list[tuple[object, ...]]:
    """Return each event, without what differs between two runs."""
    address = listener.getsockname()
    accepting = trio.socket.from_stdlib_socket(listener.dup())
    left, right = trio.socket.socketpair()
    await left.send(b"x")
    assert await right.recv(1) == b"x"  # the first receive on a ring makes sockets, to try them
    with udp() as (ours, theirs), accepting, left, right, audited() as heard:
        to = theirs.getsockname()
        await ours.sendto(b"x", to)
        await ours.sendto(b"x", 0, to)
        await ours.sendto(b"x", ("localhost", to[1]))
        await ours.sendmsg([b"x"], [], 0, to)
        await ours.connect(to)
        await ours.sendmsg([b"x"])
        await left.sendmsg([b"x"])
        assert await right.recv(1) == b"x"
        async with await trio.open_tcp_stream(*address) as stream:
            connection, _ = await accepting.accept()
            with connection:
                await stream.send_all(b"x")
                assert await connection.recv(1) == b"x"
        with trio.socket.socket(trio.socket.AF_UNIX) as nobody, pytest.raises(FileNotFoundError):
            await nobody.connect("/nobody listens here")
    places = {to: "theirs", address: "listener"}
    return [(event, *(places.get(arg, arg) for arg in args if shown(arg))) for event, args in heard]


def shown(argument: object) -> bool:
    return not isinstance(argument, (stdlib_socket.socket, int))


async def test_an_event_has_the_socket_and_the_address(listener: stdlib_socket.socket) -> None:
    address = listener.getsockname()
    with trio.socket.socket() as sock, audited() as heard:
        await sock.connect(("127.0.0.1", address[1]))
        await sock.sendmsg([b"x"])
    inner = sock._sock  # type: ignore[attr-defined]
    assert heard == [("socket.connect", (inner, address)), ("socket.sendmsg", (inner, None))]


def test_a_hook_can_forbid(run: Callable[..., Any], listener: stdlib_socket.socket) -> None:
    async def main() -> None:
        address = listener.getsockname()
        with (
            trio.socket.socket() as sock,
            forbidding("socket.connect"),
            pytest.raises(GuardedError),
        ):
            await sock.connect(address)
        with udp() as (ours, theirs), forbidding("socket.sendmsg"):
            data = bytearray(b"x")
            with pytest.raises(GuardedError):
                await ours.sendmsg([data], [], 0, theirs.getsockname())
            data.clear()  # nothing has it any more

    run(main)
