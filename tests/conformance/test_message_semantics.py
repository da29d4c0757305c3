"""Messages, ancillary data, connections and cancellations work on a ring as on plain Trio."""

from __future__ import annotations

import errno
import os
import resource
import socket
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from differential import Log, check_same, run_in
from trio.testing import wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

Socket = socket.socket

LOCALHOST: Final = ("127.0.0.1", 0)
RIGHTS: Final = (socket.SOL_SOCKET, socket.SCM_RIGHTS)

RECEIVES: Final[dict[str, Callable[[Any], Any]]] = {
    "recv": lambda sock: sock.recv(300_000),
    "recv, a buffer's size": lambda sock: sock.recv(65536),
    "recv, little": lambda sock: sock.recv(3),
    "recvfrom": lambda sock: sock.recvfrom(300_000),
    "recvfrom, a buffer's size": lambda sock: sock.recvfrom(65536),
    "recvfrom, little": lambda sock: sock.recvfrom(3),
    "recvmsg": lambda sock: sock.recvmsg(300_000, 300),
    "recvmsg, a buffer's size": lambda sock: sock.recvmsg(65536, 300),
    "recvmsg, little": lambda sock: sock.recvmsg(3),
    "recv_into": lambda sock: sock.recv_into(bytearray(300_000)),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(300_000)),
    "recvfrom_into, little": lambda sock: sock.recvfrom_into(bytearray(3)),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(3), bytearray(300_000)], 300),
    "recvmsg_into, little": lambda sock: sock.recvmsg_into([bytearray(1), bytearray(1)]),
}

SENDS: Final[dict[str, Callable[[Any], Any]]] = {
    "send": lambda sock: sock.send(b"hello"),
    "sendmsg": lambda sock: sock.sendmsg([b"hello"]),
}


# --- Senders --------------------------------------------------------------------------------


def unix_sender(name: str | bytes | None) -> Socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if name is not None:
        sock.bind(name)
    return sock


@pytest.mark.parametrize("sender", ["without a name", "chosen", "path", "long path", "abstract"])
def test_senders_of_unix_datagrams(sender: str, tmp_path: Path) -> None:
    own = str(tmp_path / "own")
    names: dict[str, Any] = {
        "without a name": None,
        "chosen": "",
        "path": str(tmp_path / "a"),
        "long path": str(tmp_path / "a").ljust(107, "a"),
        "abstract": b"\0\0abstract\0" + own.encode()[-20:],
    }

    async def scenario(log: Log) -> None:
        with unix_sender(own) as ours, unix_sender(names[sender]) as theirs:
            log.name(theirs.getsockname(), "sender")
            sock = trio.socket.from_stdlib_socket(ours)
            for what, receive in RECEIVES.items():
                theirs.sendto(b"hello", own)
                await log.call(what, lambda: receive(sock))
        for name in (own, names[sender]):
            if isinstance(name, str) and name:
                Path(name).unlink()

    check_same(scenario)


def datagram_socket(family: int, host: str) -> Socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    return sock


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_senders_of_internet_datagrams(family: int) -> None:
    async def scenario(log: Log) -> None:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        with datagram_socket(family, host) as ours, datagram_socket(family, host) as theirs:
            log.name(theirs.getsockname(), "sender")
            sock = trio.socket.from_stdlib_socket(ours)
            for what, receive in RECEIVES.items():
                for data in (b"hello", b"", bytes(60_000)):
                    theirs.sendto(data, ours.getsockname())
                    await log.call(f"{what}, {len(data)}", lambda: receive(sock))

    check_same(scenario)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("size", [65535, 65536, 65537, 150_000])
def test_large_unix_datagrams(kind: int, size: int) -> None:
    async def scenario(log: Log) -> None:
        ours, theirs = socket.socketpair(type=kind)
        data = bytes(range(251)) * (size // 251 + 1)
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs, trio.socket.from_stdlib_socket(ours) as sock:
            for what, receive in RECEIVES.items():
                theirs.send(data[:size])
                await log.call(what, lambda: receive(sock))
            for what, send in {
                "send": lambda: sock.send(data[:size]),
                "sendmsg": lambda: sock.sendmsg([data[: size // 2], data[size // 2 : size]]),
            }.items():
                await log.call(what, send)
                log.note("received", theirs.recv(300_000) == data[:size])

    check_same(scenario)


# --- Ancillary data -------------------------------------------------------------------------


def same_file(fd: int, other: int) -> bool:
    left, right = os.fstat(fd), os.fstat(other)
    return (left.st_dev, left.st_ino) == (right.st_dev, right.st_ino)


async def note_received_fds(
    log: Log, what: str, receive: Callable[[], Any], fds: list[int]
) -> None:
    """Log which files arrived, rather than their fds, and close them."""
    message = await receive()
    data, ancillary, flags, address = message
    log.note(what, (data, flags, address))
    for level, kind, content in ancillary:
        if (level, kind) != RIGHTS:
            log.note("ancillary", (level, kind, content))
            continue
        received = array("i")
        received.frombytes(content[: len(content) // 4 * 4])
        log.note("fds", [[same_file(fd, other) for other in fds] for fd in received])
        log.note("inheritable", [os.get_inheritable(fd) for fd in received])
        log.note("left", len(content) % 4)
        for fd in received:
            os.close(fd)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
@pytest.mark.parametrize("flags", [0, socket.MSG_CMSG_CLOEXEC, socket.MSG_PEEK])
def test_receiving_fds(kind: int, flags: int) -> None:
    async def scenario(log: Log) -> None:
        ours, theirs = socket.socketpair(type=kind)
        with theirs, trio.socket.from_stdlib_socket(ours) as sock, ExitStack() as stack:
            fds = [stack.enter_context(Path(os.devnull).open()).fileno(), theirs.fileno()]
            rights = [(*RIGHTS, array("i", fds))]
            # No room, room for a header, for one fd, for both, and for more.
            for room in (0, 1, 16, 20, 23, 24, 28, 32, 100, 65536, 65537):
                for pieces in (1, 2):
                    theirs.sendmsg([b"hello"], rights if pieces == 1 else rights * 2)
                    await note_received_fds(
                        log, f"recvmsg, {room}", lambda: sock.recvmsg(10, room, flags), fds
                    )
                    if flags & socket.MSG_PEEK:
                        ours.recv(10)
                    theirs.sendmsg([b"hello"], rights if pieces == 1 else rights * 2)
                    await note_received_fds(
                        log,
                        f"recvmsg_into, {room}",
                        lambda: sock.recvmsg_into([bytearray(10)], room, flags),
                        fds,
                    )
                    if flags & socket.MSG_PEEK:
                        ours.recv(10)

    check_same(scenario)


def test_receiving_credentials() -> None:
    async def scenario(log: Log) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with theirs, trio.socket.from_stdlib_socket(ours) as sock:
            for room in (0, 16, 20, 28, 100):
                theirs.send(b"hello")
                await log.call(f"recvmsg, {room}", lambda: sock.recvmsg(10, room))
                theirs.sendmsg([b"hello"], [(*RIGHTS, array("i", [0]))])
                data, ancillary, flags, _ = await sock.recvmsg(10, room)
                log.note("with an fd", (data, flags, [each[:2] for each in ancillary]))
                for level, kind, content in ancillary:
                    if (level, kind) == RIGHTS and len(content) >= 4:
                        os.close(array("i", content)[0])

    check_same(scenario)


# From linux/in.h; not all have names in Python.
IP_PKTINFO: Final = 8
IP_RECVTTL: Final = 12
INTERNET_OPTIONS: Final = {
    socket.AF_INET: (socket.IPPROTO_IP, [socket.IP_RECVTOS, IP_RECVTTL, IP_PKTINFO]),
    socket.AF_INET6: (
        socket.IPPROTO_IPV6,
        [socket.IPV6_RECVPKTINFO, socket.IPV6_RECVHOPLIMIT, socket.IPV6_RECVTCLASS],
    ),
}


@pytest.mark.parametrize("family", INTERNET_OPTIONS)
def test_receiving_internet_ancillary_data(family: int) -> None:
    async def scenario(log: Log) -> None:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        level, options = INTERNET_OPTIONS[socket.AddressFamily(family)]
        with datagram_socket(family, host) as ours, datagram_socket(family, host) as theirs:
            log.name(theirs.getsockname(), "sender")
            for option in options:
                ours.setsockopt(level, option, 1)
            sock = trio.socket.from_stdlib_socket(ours)
            for room in (0, 10, 20, 24, 40, 100, 1000):
                theirs.sendto(b"hello", ours.getsockname())
                await log.call(f"recvmsg, {room}", lambda: sock.recvmsg(10, room))
                theirs.sendto(b"hello", ours.getsockname())
                await log.call(
                    f"recvmsg_into, {room}", lambda: sock.recvmsg_into([bytearray(2)], room)
                )

    check_same(scenario)


# --- Connections ----------------------------------------------------------------------------


def test_refused_datagrams() -> None:
    """A later call gets the error that nobody receives."""

    async def scenario(log: Log) -> None:
        for what, receive in {**RECEIVES, **SENDS}.items():
            with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
                with datagram_socket(socket.AF_INET, "127.0.0.1") as gone:
                    await sock.connect(gone.getsockname())
                await log.call("send", lambda: sock.send(b"hello"))
                await log.call(what, lambda: receive(sock))
                await log.call(f"{what}, again", lambda: receive(sock))

    check_same(scenario)


def test_accepting_with_too_many_open_files() -> None:
    async def scenario(log: Log) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.create_server(LOCALHOST) as listener, ExitStack() as stack:
            sock = trio.socket.from_stdlib_socket(listener)
            stack.enter_context(socket.create_connection(listener.getsockname()))
            highest = os.dup(0)
            os.close(highest)
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            try:
                await log.call("accept", sock.accept)
                await log.call("accept, again", sock.accept)
                stream_listener = trio.SocketListener(sock)
                await log.call("accept, by a listener", stream_listener.accept)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            accepted, _ = await sock.accept()
            accepted.close()
            # And with nobody there.
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
            try:
                await log.call("accept, with nobody there", sock.accept)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    check_same(scenario)


def test_connecting_datagram_sockets_again() -> None:
    async def scenario(log: Log) -> None:
        with trio.socket.socket(type=socket.SOCK_DGRAM) as sock:
            for port in (1, 2, 3):
                await log.call("connect", lambda: sock.connect(("127.0.0.1", port)))
                log.note("peer", sock.getpeername())

    check_same(scenario)


def test_connecting_again() -> None:
    """Here a ring differs from plain Trio, and does what blocking sockets do.

    Plain Trio gets the result of a connect from SO_ERROR, and doesn't call connect(2) again. So the
    kernel still regards the socket as connecting: the next connect(2) "succeeds" or fails with
    ECONNABORTED, whatever its address is.
    """

    async def scenario(log: Log) -> None:
        with socket.create_server(LOCALHOST) as listener:
            address = listener.getsockname()
            with trio.socket.socket() as sock:
                await log.call("connect", lambda: sock.connect(address))
                await log.call("connect again", lambda: sock.connect(address))
                await log.call("and again", lambda: sock.connect(address))
            with trio.socket.socket() as sock:
                await log.call("connect to nobody", lambda: sock.connect(("127.0.0.1", 1)))
                await log.call("connect to somebody", lambda: sock.connect(address))

    success = (("NoneType", None), True, True)
    connected: object = ("OSError", errno.EISCONN, f"({errno.EISCONN}, {EISCONN_TEXT!r})", [])
    plain, ring = dict(run_in("plain", scenario)), dict(run_in("ring", scenario))
    assert plain["connect"] == ring["connect"] == success
    assert plain["connect again"] == success
    assert ring["connect again"] == plain["and again"] == ring["and again"] == connected
    assert plain["connect to nobody"] == ring["connect to nobody"]
    assert "ConnectionAbortedError" in str(plain["connect to somebody"])
    assert ring["connect to somebody"] == success

    with socket.create_server(LOCALHOST) as listener, socket.socket() as sock:
        sock.connect(listener.getsockname())
        with pytest.raises(OSError, match=EISCONN_TEXT):
            sock.connect(listener.getsockname())
    with socket.create_server(LOCALHOST) as listener, socket.socket() as sock:
        with pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.1", 1))
        sock.connect(listener.getsockname())


EISCONN_TEXT: Final = os.strerror(errno.EISCONN)


def test_a_connect_that_is_cancelled_or_closed() -> None:
    async def scenario(log: Log) -> None:
        with socket.create_server(LOCALHOST, backlog=0) as full:
            address = full.getsockname()
            with socket.create_connection(address):
                with trio.socket.socket() as sock:
                    await log.call("connect", lambda: sock.connect(address))
                    log.note("closed", sock.fileno() == -1)
                with trio.socket.socket() as sock:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(note_error, log, sock.connect(address))
                        await wait_all_tasks_blocked()
                        sock.close()

    check_same(scenario)


async def note_error(log: Log, awaitable: Awaitable[object]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one, is what is compared)
        await awaitable
    log.note("error", caught.value)


def test_connecting_where_the_backlog_is_full(tmp_path: Path) -> None:
    """Here a ring differs from plain Trio, and has the same result as connect(2).

    Plain Trio interprets the EAGAIN of a UNIX socket as a connection in progress. But no connection
    has begun, and the socket is writable and has no error. So on plain Trio connect returns, and
    the socket is not connected. There is no event to wait for, either.
    """
    path = str(tmp_path / "socket")

    async def scenario(log: Log) -> None:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
            listener.bind(path)
            listener.listen(0)
            first.connect(path)
            with trio.socket.socket(socket.AF_UNIX) as sock:
                await log.call("connect", lambda: sock.connect(path))
                log.note("not connected", described_peer(sock))
        Path(path).unlink()

    plain, ring = run_in("plain", scenario), run_in("ring", scenario)
    assert plain[0] == ("connect", (("NoneType", None), True, True))
    assert "BlockingIOError" in str(ring[0])
    assert plain[1] == ring[1]


def described_peer(sock: Any) -> object:
    try:
        return sock.getpeername()
    except OSError as exc:
        return exc


# --- Checkpoints ----------------------------------------------------------------------------


def test_calls_in_a_cancelled_scope() -> None:
    """They do nothing."""

    async def scenario(log: Log) -> None:
        for what, call in {**RECEIVES, **SENDS}.items():
            ours, theirs = socket.socketpair()
            with theirs, trio.socket.from_stdlib_socket(ours) as sock:
                theirs.send(b"hello")
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call(sock)
                log.note(what, scope.cancelled_caught)
                log.note("left to us", ours.recv(10))
                theirs.setblocking(False)
                with pytest.raises(BlockingIOError):
                    theirs.recv(10)
        with socket.create_server(LOCALHOST) as listener:
            address = listener.getsockname()
            with trio.CancelScope() as scope, trio.socket.socket() as sock:
                scope.cancel()
                await sock.connect(address)
            log.note("connect", scope.cancelled_caught)
            with socket.create_connection(address), trio.CancelScope() as scope:
                scope.cancel()
                await trio.socket.from_stdlib_socket(listener).accept()
            log.note("accept", scope.cancelled_caught)
            accepted, _ = listener.accept()
            accepted.close()

    check_same(scenario)


def test_other_tasks_get_their_turn_at_each_call() -> None:
    """However much data there is to receive."""

    async def scenario(_log: Log) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        ours, theirs = socket.socketpair()
        with theirs, trio.socket.from_stdlib_socket(ours) as sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(count)
                for what, call in {**RECEIVES, **SENDS}.items():
                    before = turns
                    for _ in range(20):
                        theirs.send(b"hello")
                        await call(sock)
                    assert 19 <= turns - before <= 21, what
                nursery.cancel_scope.cancel()

    check_same(scenario)
