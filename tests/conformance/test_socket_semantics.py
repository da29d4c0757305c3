"""Every socket method, called in every way, works on a ring as on plain Trio.

The tests compare values, classes of exceptions, their errno and arguments, whether the call waits,
and whether it is a checkpoint.
"""

from __future__ import annotations

import itertools
import mmap
import os
import socket
import struct
from array import array
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import pytest
import trio
from differential import Log, check_same
from trio.testing import wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Socket = socket.socket
    Call = Callable[[Any], Awaitable[Any]]  # takes a Trio socket; not all calls are right

# --- The sockets ----------------------------------------------------------------------------


def tcp_pair(family: int = socket.AF_INET) -> tuple[Socket, Socket]:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen()
        ours = socket.socket(family, socket.SOCK_STREAM)
        ours.connect(listener.getsockname())
        theirs, _ = listener.accept()
        return ours, theirs


def udp_pair(family: int = socket.AF_INET) -> tuple[Socket, Socket]:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    ours, theirs = (
        socket.socket(family, socket.SOCK_DGRAM),
        socket.socket(family, socket.SOCK_DGRAM),
    )
    ours.bind((host, 0))
    theirs.bind((host, 0))
    ours.connect(theirs.getsockname())
    theirs.connect(ours.getsockname())
    return ours, theirs


PAIRS: Final[dict[str, Callable[[], tuple[Socket, Socket]]]] = {
    "TCP": tcp_pair,
    "TCP on IPv6": lambda: tcp_pair(socket.AF_INET6),
    "UNIX stream": socket.socketpair,
    "UNIX datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    "UNIX packets": lambda: socket.socketpair(type=socket.SOCK_SEQPACKET),
    "UDP": udp_pair,
    "UDP on IPv6": lambda: udp_pair(socket.AF_INET6),
}


def reset(_ours: Socket, theirs: Socket) -> None:
    """Close so that a connection is reset."""
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()


def close_without_reading(ours: Socket, theirs: Socket) -> None:
    ours.send(b"unread")
    theirs.close()


def fill(ours: Socket, _theirs: Socket) -> None:
    ours.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(4096))
    with suppress(BlockingIOError):
        while True:
            ours.send(b"x")


def send_twice(_ours: Socket, theirs: Socket) -> None:
    theirs.send(b"first.")
    theirs.send(b"second")


STATES: Final[dict[str, Callable[[Socket, Socket], object]]] = {
    "nothing to receive": lambda _ours, _theirs: None,
    "something to receive": send_twice,
    "nothing, but empty": lambda _ours, theirs: theirs.send(b""),
    "peer shut down its side": lambda _ours, theirs: theirs.shutdown(socket.SHUT_WR),
    "peer shut down ours": lambda _ours, theirs: theirs.shutdown(socket.SHUT_RD),
    "peer closed": lambda _ours, theirs: theirs.close(),
    "peer closed without reading": close_without_reading,
    "connection reset": reset,
    "we shut down sending": lambda ours, _theirs: ours.shutdown(socket.SHUT_WR),
    "we shut down receiving": lambda ours, _theirs: ours.shutdown(socket.SHUT_RD),
    "full": fill,
}

# --- The calls ------------------------------------------------------------------------------


class Index:
    """Has ``__index__``, but is not an int."""

    def __index__(self) -> int:
        return 5


SIZES: Final[list[Any]] = [
    *(0, 1, 6, 10, 65536, 65537, 200_000, -1, 1 << 62, 1 << 63, -(1 << 63), 1 << 64),
    *(True, 5.0, None, "5", b"5", Index(), [5]),
]
# Not MSG_ERRQUEUE, nor -1: with data there, plain Trio asks for errors again and again, without
# end.
RECEIVE_FLAGS: Final[list[Any]] = [
    *(socket.MSG_PEEK, socket.MSG_DONTWAIT, socket.MSG_WAITALL, socket.MSG_TRUNC, socket.MSG_OOB),
    *(
        socket.MSG_CMSG_CLOEXEC,
        socket.MSG_PEEK | socket.MSG_TRUNC,
        socket.MSG_PEEK | socket.MSG_DONTWAIT,
        1 << 20,
        1 << 40,
    ),
    *(-1 << 40, 0.0, None, "", "x", Index(), True),
]
SEND_FLAGS: Final[list[Any]] = [
    *(
        socket.MSG_NOSIGNAL,
        socket.MSG_DONTWAIT,
        socket.MSG_MORE,
        socket.MSG_DONTROUTE,
        socket.MSG_OOB,
        socket.MSG_EOR,
    ),
    *(
        socket.MSG_CONFIRM,
        socket.MSG_FASTOPEN,
        1 << 20,
        1 << 40,
        -1,
        0.0,
        None,
        "",
        "x",
        Index(),
        True,
    ),
]


def buffers() -> dict[str, Any]:
    """Return new objects to receive into, some of which are not valid."""
    return {
        "bytearray": bytearray(10),
        "large bytearray": bytearray(200_000),
        "empty bytearray": bytearray(),
        "memoryview": memoryview(bytearray(10)),
        "slice": memoryview(bytearray(10))[2:7],
        "every other": memoryview(bytearray(10))[::2],
        "backwards": memoryview(bytearray(10))[::-1],
        "two dimensions": memoryview(bytearray(12)).cast("B", (3, 4)),
        "array": array("i", (0, 0, 0)),
        "mmap": mmap.mmap(-1, 10),
        "bytes": bytes(10),
        "read-only": memoryview(bytearray(10)).toreadonly(),
        "str": "0123456789",
        "None": None,
        "int": 10,
    }


def data() -> dict[str, Any]:
    """Return objects to send, some of which are not valid."""
    return {
        "bytes": b"hello",
        "empty": b"",
        "bytearray": bytearray(b"hello"),
        "memoryview": memoryview(b"hello"),
        "every other": memoryview(b"hello")[::2],
        "two dimensions": memoryview(bytes(12)).cast("B", (3, 4)),
        "array": array("i", (1, 2, 3)),
        "too large": bytes(70_000),
        "str": "hello",
        "None": None,
        "int": 5,
        "list": [1, 2],
    }


def contents(buffer: Any) -> object:
    """Return the contents of any object that was received into."""
    try:
        return bytes(buffer)[:30]
    except (TypeError, ValueError):
        return None


def call(method: str, *args: object) -> Call:
    """Return a call of *method*."""
    return lambda sock: getattr(sock, method)(*args)


def call_for_length(method: str, *args: object) -> Call:
    """Return a call of a receiving *method*, with the length of the data as its result."""

    async def receive(sock: Any) -> object:
        value = await getattr(sock, method)(*args)
        return len(value) if isinstance(value, bytes) else (len(value[0]), *value[1:])

    return receive


def into(method: str, name: str, *args: object) -> Call:
    """Return a call that receives into one of `buffers`, and returns its contents."""

    async def receive(sock: Any) -> object:
        buffer = buffers()[name]
        value = await getattr(sock, method)(buffer, *args)
        return value, contents(buffer)

    return receive


def into_many(make: Callable[[], Any], *args: object) -> Call:
    """Return a call of recvmsg_into, that returns the contents of the buffers."""

    async def receive(sock: Any) -> object:
        pieces = make()
        kept = list(pieces) if isinstance(pieces, list | tuple) else []
        value = await sock.recvmsg_into(pieces, *args)
        return value, [contents(piece) for piece in kept]

    return receive


def sending(method: str, name: str, *args: object) -> Call:
    """Return a call that sends one of `data`."""
    match method:
        case "sendmsg":
            return lambda sock: sock.sendmsg([data()[name]], *args)
        case "sendto":
            return lambda sock: sock.sendto(data()[name], *args, sock.getpeername())
        case _:
            return lambda sock: getattr(sock, method)(data()[name], *args)


def sending_many(make: Callable[[], Any], *args: object) -> Call:
    """Return a call of sendmsg."""
    return lambda sock: sock.sendmsg(make(), *args)


def sending_ancillary(make: Callable[[], Any]) -> Call:
    """Return a call of sendmsg with ancillary data."""
    return lambda sock: sock.sendmsg([b"x"], make())


def shown(value: object) -> str:
    return "Index" if isinstance(value, Index) else repr(value)


def receiving_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for size in SIZES:
        for method in ("recv", "recvfrom", "recvmsg"):
            calls[f"{method}({shown(size)})"] = call(method, size)
        for method in ("recv_into", "recvfrom_into"):
            calls[f"{method}(bytearray, {shown(size)})"] = into(method, "bytearray", size)
        calls[f"recvmsg(10, {shown(size)})"] = call("recvmsg", 10, size)
        calls[f"recvmsg_into([bytearray(10)], {shown(size)})"] = into_many(
            lambda: [bytearray(10)], size
        )
    for flags in RECEIVE_FLAGS:
        # With MSG_TRUNC the standard library returns memory that nobody has written to: what lies
        # beyond a buffer, and on TCP, which drops the data, all of it.
        truncates = type(flags) is socket.MsgFlag and flags & socket.MSG_TRUNC
        make_call = call_for_length if truncates else call
        calls[f"recv(3, {shown(flags)})"] = make_call("recv", 3, flags)
        calls[f"recvfrom(3, {shown(flags)})"] = make_call("recvfrom", 3, flags)
        calls[f"recv(70000, {shown(flags)})"] = make_call("recv", 70_000, flags)
        calls[f"recvmsg(3, 50, {shown(flags)})"] = make_call("recvmsg", 3, 50, flags)
        for method in ("recv_into", "recvfrom_into"):
            label = f"{method}(bytearray, 3, {shown(flags)})"
            calls[label] = into(method, "bytearray", 3, flags)
        calls[f"recvmsg_into([bytearray(3)], 50, {shown(flags)})"] = into_many(
            lambda: [bytearray(3)], 50, flags
        )
    for method in ("recv_into", "recvfrom_into"):
        for name in buffers():
            calls[f"{method}({name})"] = into(method, name)
            for size in (0, 3, 11, -1):
                calls[f"{method}({name}, {size})"] = into(method, name, size)
    return calls


PIECES: Final[dict[str, Callable[[], Any]]] = {
    "one": lambda: [bytearray(10)],
    "tuple": lambda: (bytearray(2), bytearray(10)),
    "many": lambda: [bytearray(1) for _ in range(20)],
    "different ones": lambda: [bytearray(2), array("i", (0,)), memoryview(bytearray(9))[1:]],
    "with an empty one": lambda: [bytearray(), bytearray(10)],
    "only an empty one": lambda: [bytearray()],
    "none": list,
    "generator": lambda: (bytearray(n) for n in (1, 10)),
    "iterator": lambda: iter([bytearray(3), bytearray(10)]),
    "dict": lambda: {b"x": 1},
    "bytearray": lambda: bytearray(10),
    "read-only": lambda: [bytearray(3), bytes(3)],
    "str": lambda: ["x"],
    "None": lambda: None,
    "int": lambda: 5,
    "too many": lambda: [bytearray(1) for _ in range(1025)],
    "every other": lambda: [memoryview(bytearray(10))[::2]],
    "twice the same": lambda: [bytearray(3)] * 2,
    "a generator that fails": lambda: (1 // n for n in (1, 0)),
}


def receiving_into_many_calls() -> dict[str, Call]:
    return {f"recvmsg_into({name})": into_many(make) for name, make in PIECES.items()}


SENT_PIECES: Final[dict[str, Callable[[], Any]]] = {
    "generator": lambda: (piece for piece in (b"a", b"b")),
    "iterator": lambda: iter([b"a", b"b"]),
    "none": list,
    "tuple": lambda: (b"a", bytearray(b"b")),
    "many": lambda: [b"x"] * 1000,
    "too many": lambda: [b"x"] * 1025,
    "a generator that fails": lambda: (1 // n for n in (1, 0)),
    "dict": lambda: {b"a": 1, b"b": 2},
    "set": lambda: {b"a"},
}


def one_of_data(name: str) -> Any:
    return data()[name]


def behind_another(name: str) -> Any:
    return [b"x", data()[name]]


def sending_calls() -> dict[str, Call]:
    calls: dict[str, Call] = {}
    for name in data():
        for method in ("send", "sendto", "sendmsg"):
            calls[f"{method}({name})"] = sending(method, name)
        calls[f"sendmsg({name}) without a list"] = sending_many(partial(one_of_data, name))
        calls[f"sendmsg([b'x', {name}])"] = sending_many(partial(behind_another, name))
    for flags in SEND_FLAGS:
        calls[f"send(b'hello', {shown(flags)})"] = sending("send", "bytes", flags)
        calls[f"sendto(b'hello', {shown(flags)})"] = sending("sendto", "bytes", flags)
        calls[f"sendmsg([b'hello'], [], {shown(flags)})"] = sending("sendmsg", "bytes", [], flags)
    for name, make in SENT_PIECES.items():
        calls[f"sendmsg({name})"] = sending_many(make)
    return calls


RIGHTS: Final = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


def too_few_items() -> Any:
    return [RIGHTS]


def too_many_items() -> Any:
    return [(*RIGHTS, b"", b"")]


ANCILLARY: Final[dict[str, Callable[[], Any]]] = {
    "none": list,
    "None": lambda: None,
    "two fds": lambda: [(*RIGHTS, array("i", (0, 1)))],
    "bytes": lambda: [(*RIGHTS, array("i", (0,)).tobytes())],
    "generator": lambda: (each for each in [(*RIGHTS, array("i", (0,)))]),
    "iterator": lambda: iter([(*RIGHTS, array("i", (0,)))]),
    "two messages": lambda: [(*RIGHTS, array("i", (0,))), (*RIGHTS, array("i", (1,)))],
    "a list": lambda: [[*RIGHTS, array("i", (0,))]],
    "half an fd": lambda: [(*RIGHTS, b"xy")],
    "a bad fd": lambda: [(*RIGHTS, array("i", (12345,)))],
    "nothing in it": lambda: [(*RIGHTS, b"")],
    "an unknown type": lambda: [(socket.SOL_SOCKET, 999, b"x")],
    "an unknown level": lambda: [(999, 999, b"x")],
    "negative": lambda: [(-1, -1, b"x")],
    "a large level": lambda: [(1 << 40, 1, b"x")],
    "too few items": lambda: [RIGHTS],
    "too many items": lambda: [(*RIGHTS, b"", b"")],
    "str": lambda: [(*RIGHTS, "xxxx")],
    "not contiguous": lambda: [(*RIGHTS, memoryview(bytes(8))[::2])],
    "int": lambda: 5,
    "ints": lambda: [1, 2],
    "large": lambda: [(*RIGHTS, bytes(4 * 300))],
    "credentials": lambda: [
        (
            socket.SOL_SOCKET,
            socket.SCM_CREDENTIALS,
            struct.pack("3i", os.getpid(), os.getuid(), os.getgid()),
        )
    ],
    "time to live": lambda: [(socket.IPPROTO_IP, socket.IP_TTL, struct.pack("i", 7))],
    "float level": lambda: [(1.0, 1, b"")],
}


def own_credentials() -> bytes:
    return struct.pack("3i", os.getpid(), os.getuid(), os.getgid())


def ancillary_calls() -> dict[str, Call]:
    return {f"sendmsg([b'x'], {name})": sending_ancillary(make) for name, make in ANCILLARY.items()}


# Called wrongly. That the error is a TypeError is all that is compared: a method with a
# signature of its own says it in other words, and already when it is called.
WRONG_CALLS: Final[dict[str, Call]] = {
    "recv()": lambda sock: sock.recv(),
    "recv(1, 2, 3)": lambda sock: sock.recv(1, 2, 3),
    "recv(buflen=1)": lambda sock: sock.recv(buflen=1),
    "recv_into()": lambda sock: sock.recv_into(),
    "recv_into(x=1)": lambda sock: sock.recv_into(bytearray(1), x=1),
    "recvfrom()": lambda sock: sock.recvfrom(),
    "recvfrom_into()": lambda sock: sock.recvfrom_into(),
    "recvmsg()": lambda sock: sock.recvmsg(),
    "recvmsg_into()": lambda sock: sock.recvmsg_into(),
    "send()": lambda sock: sock.send(),
    "send(1, 2, 3)": lambda sock: sock.send(b"", 0, 0),
    "sendto()": lambda sock: sock.sendto(),
    "sendto(1)": lambda sock: sock.sendto(b""),
    "sendto(1, 2, 3, 4)": lambda sock: sock.sendto(b"", 0, ("127.0.0.1", 1), 0),
    "sendmsg()": lambda sock: sock.sendmsg(),
    "accept(1)": lambda sock: sock.accept(1),
    "connect()": lambda sock: sock.connect(),
}

# Named arguments, where the standard library has them.
NAMED_CALLS: Final[dict[str, Call]] = {
    "recv_into(buffer=, nbytes=, flags=)": lambda sock: sock.recv_into(
        buffer=bytearray(9), nbytes=2, flags=socket.MSG_PEEK
    ),
    "recvfrom_into(buffer=, nbytes=, flags=)": lambda sock: sock.recvfrom_into(
        buffer=bytearray(9), nbytes=2, flags=socket.MSG_PEEK
    ),
    "recv_into(_, flags=)": lambda sock: sock.recv_into(bytearray(9), flags=socket.MSG_PEEK),
}


async def accept(sock: Any) -> object:
    accepted, peer = await sock.accept()
    with accepted:
        assert peer == accepted.getpeername()
        return (
            accepted.getsockname() == sock.getsockname(),
            accepted.family,
            accepted.type,
            accepted.proto,
            accepted.get_inheritable(),
            os.get_blocking(accepted.fileno()),
        )


# One of each, for all states.
TYPICAL_CALLS: Final[dict[str, Call]] = {
    "recv(0)": lambda sock: sock.recv(0),
    "recv(3)": lambda sock: sock.recv(3),
    "recv(100)": lambda sock: sock.recv(100),
    "recv(70000)": lambda sock: sock.recv(70_000),
    "recv(100, MSG_PEEK)": lambda sock: sock.recv(100, socket.MSG_PEEK),
    "recv(100, MSG_DONTWAIT)": lambda sock: sock.recv(100, socket.MSG_DONTWAIT),
    "recv(100, MSG_WAITALL)": lambda sock: sock.recv(100, socket.MSG_WAITALL),
    "recv_into(bytearray)": into("recv_into", "bytearray"),
    "recv_into(empty)": into("recv_into", "empty bytearray"),
    "recvfrom(100)": lambda sock: sock.recvfrom(100),
    "recvfrom_into(bytearray)": into("recvfrom_into", "bytearray"),
    "recvmsg(3)": lambda sock: sock.recvmsg(3),
    "recvmsg(100, 100)": lambda sock: sock.recvmsg(100, 100),
    "recvmsg_into(many)": into_many(lambda: [bytearray(2), bytearray(10)], 100),
    "send(b'')": lambda sock: sock.send(b""),
    "send(b'hello')": lambda sock: sock.send(b"hello"),
    "send(b'hello', MSG_DONTWAIT)": lambda sock: sock.send(b"hello", socket.MSG_DONTWAIT),
    "sendmsg": lambda sock: sock.sendmsg([b"hel", b"lo"]),
    "sendmsg([])": lambda sock: sock.sendmsg([]),
    "sendto": lambda sock: sock.sendto(b"hello", sock.getpeername()),
    "accept": lambda sock: accept(sock),
    "connect": lambda sock: sock.connect(sock.getpeername()),
    "wait_writable": lambda sock: sock.wait_writable(),
    "wait_readable": lambda sock: trio.lowlevel.wait_readable(sock),
}


# --- The test -------------------------------------------------------------------------------


def left_over(sock: Socket) -> object:
    """Return the data that can still be received, and how it ends."""
    if sock.fileno() < 0:
        return "closed"
    sock.setblocking(False)
    received: list[bytes] = []
    end: int | None = None
    while b"" not in received and len(received) < 10:
        try:
            received.append(sock.recv(300_000))
        except OSError as exc:
            end = exc.errno
            break
    if sock.type == socket.SOCK_STREAM:  # how much TCP takes, and in which pieces, varies
        joined = b"".join(received)
        return joined if len(joined) < 50 else "a lot", b"" in received, end
    return [each if len(each) < 50 else len(each) for each in received], end


async def call_each(
    log: Log,
    make: Callable[[], tuple[Socket, Socket]],
    state: Callable[[Socket, Socket], object],
    calls: dict[str, Call],
) -> None:
    for label, make_call in calls.items():
        ours, theirs = make()
        with ours, theirs, trio.socket.from_stdlib_socket(ours) as sock:
            log.name(ours.getsockname(), "ours")
            log.name(theirs.getsockname(), "theirs")
            state(ours, theirs)
            await log.call(label, lambda: make_call(sock))
            log.note("left to us", left_over(ours))
            log.note("left to them", left_over(theirs))


SOMETHING: Final = STATES["something to receive"]

GROUPS: Final[dict[str, Callable[[], dict[str, Call]]]] = {
    "receiving": receiving_calls,
    "receiving into many": receiving_into_many_calls,
    "sending": sending_calls,
    "ancillary data": ancillary_calls,
    "named arguments": lambda: NAMED_CALLS,
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", PAIRS)
def test_arguments(kind: str, group: str) -> None:
    async def scenario(log: Log) -> None:
        await call_each(log, PAIRS[kind], SOMETHING, GROUPS[group]())

    check_same(scenario)


# Datagrams that nobody receives are dropped, so nothing is ever full. And where we shut down
# receiving, plain Trio turns without end: recv says EAGAIN, and epoll that it is readable. On a
# ring such a recv waits.
LEFT_OUT: Final = {
    ("UDP", "full"),
    ("UDP on IPv6", "full"),
    ("UDP", "we shut down receiving"),
    ("UDP on IPv6", "we shut down receiving"),
    ("UNIX datagrams", "we shut down receiving"),
}


@pytest.mark.parametrize(
    ("kind", "state"),
    [both for both in itertools.product(PAIRS, STATES) if both not in LEFT_OUT],
)
def test_states(kind: str, state: str) -> None:
    async def scenario(log: Log) -> None:
        await call_each(log, PAIRS[kind], STATES[state], TYPICAL_CALLS)

    check_same(scenario)


# --- The same again -------------------------------------------------------------------------

# (a call, and one whose arguments are equal to its arguments)
EQUAL_CALLS: Final[dict[str, tuple[Call, Call]]] = {
    "float size": (call("recv", 3), call("recv", 3.0)),
    "size of True": (call("recv", 1), call("recv", True)),
    "float flags": (call("recv", 3, 0), call("recv", 3, 0.0)),
    "flags of False": (call("recv", 3), call("recv", 3, False)),
    "float size of memory": (
        into("recv_into", "bytearray", 3),
        into("recv_into", "bytearray", 3.0),
    ),
    "float flags to send": (sending("send", "bytes", 0), sending("send", "bytes", 0.0)),
}


@pytest.mark.parametrize("calls", EQUAL_CALLS.values(), ids=EQUAL_CALLS)
def test_a_call_after_one_with_equal_arguments(calls: tuple[Call, Call]) -> None:
    async def scenario(log: Log) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, trio.socket.from_stdlib_socket(ours) as sock:
            for make_call in (*calls, *calls):
                theirs.send(b"123")
                await log.call("call", partial(make_call, sock))

    check_same(scenario)


# --- Sockets that are closed meanwhile ------------------------------------------------------

WAITING_CALLS: Final = (
    *("recv(3)", "recv(70000)", "recv(100, MSG_PEEK)", "recv_into(bytearray)", "recvfrom(100)"),
    *("recvfrom_into(bytearray)", "recvmsg(3)", "recvmsg_into(many)", "wait_readable"),
    *("send(b'hello')", "sendmsg", "sendto", "wait_writable"),
)


@pytest.mark.parametrize("what", WAITING_CALLS)
@pytest.mark.parametrize("kind", PAIRS)
def test_closing_what_another_task_waits_for(kind: str, what: str) -> None:
    sends = what in {"send(b'hello')", "sendmsg", "sendto", "wait_writable"}
    if sends and (kind, "full") in LEFT_OUT:
        pytest.skip("it is never full")

    async def scenario(log: Log) -> None:
        async def wait(sock: Any) -> None:
            with pytest.raises(Exception) as caught:  # noqa: PT011 (which one, is compared)
                await TYPICAL_CALLS[what](sock)
            log.note(what, caught.value)

        ours, theirs = PAIRS[kind]()
        with ours, theirs, trio.socket.from_stdlib_socket(ours) as sock:
            if sends:
                fill(ours, theirs)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, sock)
                await wait_all_tasks_blocked()
                sock.close()

    check_same(scenario)


# --- Sockets that are not connected ---------------------------------------------------------


def bound(family: int, kind: int) -> Socket:
    sock = socket.socket(family, kind)
    addresses: dict[int, Any] = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0)}
    sock.bind(addresses.get(family, ""))
    return sock


def listening(family: int, kind: int = socket.SOCK_STREAM, *, clients: int = 0) -> Socket:
    sock = bound(family, kind)
    sock.listen()
    for _ in range(clients):
        with socket.socket(family, kind) as client:
            client.connect(sock.getsockname())
    return sock


SINGLES: Final[dict[str, Callable[[], Socket]]] = {
    "new TCP": socket.socket,
    "new UDP": lambda: socket.socket(type=socket.SOCK_DGRAM),
    "new UNIX stream": lambda: socket.socket(socket.AF_UNIX),
    "new UNIX datagrams": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
    "bound TCP": lambda: bound(socket.AF_INET, socket.SOCK_STREAM),
    "bound UDP": lambda: bound(socket.AF_INET, socket.SOCK_DGRAM),
    "bound UNIX datagrams": lambda: bound(socket.AF_UNIX, socket.SOCK_DGRAM),
    "listening on TCP": lambda: listening(socket.AF_INET),
    "listening on TCP, with a client": lambda: listening(socket.AF_INET, clients=1),
    "listening on IPv6, with a client": lambda: listening(socket.AF_INET6, clients=1),
    "listening on UNIX": lambda: listening(socket.AF_UNIX),
    "listening on UNIX, with a client": lambda: listening(socket.AF_UNIX, clients=2),
    "listening for packets": lambda: listening(socket.AF_UNIX, socket.SOCK_SEQPACKET, clients=1),
    "closed": socket.socket,
    "detached": socket.socket,
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
}

SINGLE_CALLS: Final[dict[str, Call]] = {
    **TYPICAL_CALLS,
    "sendto": lambda sock: sock.sendto(b"hello", ("127.0.0.1", 9)),
    "sendto a path": lambda sock: sock.sendto(b"hello", "/nowhere"),
    "sendmsg to": lambda sock: sock.sendmsg([b"hello"], [], 0, ("127.0.0.1", 9)),
    "sendmsg to itself": lambda sock: sock.sendmsg([b"hello"], [], 0, sock.getsockname()),
    "sendto itself": lambda sock: sock.sendto(b"hello", sock.getsockname()),
    "connect": lambda sock: sock.connect(("127.0.0.1", 9)),
    "connect to a path": lambda sock: sock.connect("/nowhere"),
    "connect to itself": lambda sock: sock.connect(sock.getsockname()),
}


@pytest.mark.parametrize("kind", SINGLES)
def test_sockets_that_are_not_connected(kind: str) -> None:
    async def scenario(log: Log) -> None:
        for label, make_call in SINGLE_CALLS.items():
            with SINGLES[kind]() as ours:
                sock = trio.socket.from_stdlib_socket(ours)
                if kind == "closed":
                    sock.close()
                elif kind == "detached":
                    os.close(sock.detach())
                with suppress(OSError):
                    log.name(ours.getsockname(), "ours")
                await log.call(label, lambda: make_call(sock))
                log.note("closed by that", ours.fileno() < 0)

    check_same(scenario)


# --- More than fits -------------------------------------------------------------------------

MUCH: Final = bytes(120_000)
PEEK: Final = int(socket.MSG_PEEK)  # a flag of the module is not exactly an int

# What decides how a call is made: how much, which flags, and their types.
MUCH_CALLS: Final[dict[str, Call]] = {
    **{
        f"recv({', '.join(map(repr, arguments))})": call_for_length("recv", *arguments)
        for arguments in (
            *((65536,), (65537,), (100_000,), (0,), (-1,)),
            *((9, PEEK), (9, socket.MSG_PEEK), (9, 0.0), (9, None), (9, False)),
        )
    },
    **{
        f"recv_into(_, 0, {flags!r})": lambda sock, flags=flags: sock.recv_into(  # type: ignore[misc]
            bytearray(9), 0, flags
        )
        for flags in (PEEK, socket.MSG_PEEK, 0.0, None, False)
    },
    **{
        f"{name}, {flags!r}": call(name, *arguments, flags)
        for name, *arguments in (("send", 3 * MUCH), ("sendmsg", [3 * MUCH], []))
        for flags in (
            *(0, socket.MSG_WAITALL, socket.MSG_NOSIGNAL, socket.MSG_DONTWAIT, socket.MSG_OOB),
            *(int(socket.MSG_DONTWAIT), int(socket.MSG_OOB), 0.0, None, False, 1 << 40, -1),
        )
    },
}


def test_more_than_fits() -> None:
    """As much is sent as there is room for, and as much received as was asked for."""

    async def scenario(log: Log) -> None:
        for label, make_call in MUCH_CALLS.items():
            ours, theirs = socket.socketpair()
            with theirs, trio.socket.from_stdlib_socket(ours) as sock:
                theirs.send(MUCH)
                await log.call(label, partial(make_call, sock))
                log.note("left", len(ours.recv(1 << 20, socket.MSG_DONTWAIT)))

    check_same(scenario)


# --- Wrong calls ----------------------------------------------------------------------------


def test_wrong_calls() -> None:
    async def scenario(log: Log) -> None:
        for label, make_call in WRONG_CALLS.items():
            ours, theirs = socket.socketpair()
            with theirs, trio.socket.from_stdlib_socket(ours) as sock:
                try:
                    await make_call(sock)
                except Exception as exc:  # noqa: BLE001 (its class is the outcome)
                    log.note(label, type(exc).__name__)

    check_same(scenario)


# --- Addresses ------------------------------------------------------------------------------

# Each may be a function of a listening socket's own address.
INET_ADDRESSES: Final[dict[str, Callable[[Any], Any]]] = {
    "listening": lambda own: own,
    "list": list,
    "port is a bool": lambda _own: ("127.0.0.1", True),
    "port is an Index": lambda _own: ("127.0.0.1", Index()),
    "port is a float": lambda _own: ("127.0.0.1", 80.0),
    "port is a numeric str": lambda own: ("127.0.0.1", str(own[1])),
    "port is a str": lambda _own: ("127.0.0.1", "no such service"),
    "port is None": lambda _own: ("127.0.0.1", None),
    "port is negative": lambda _own: ("127.0.0.1", -1),
    "port is too large": lambda _own: ("127.0.0.1", 65536),
    "port is 0": lambda _own: ("127.0.0.1", 0),
    "nobody listens": lambda _own: ("127.0.0.1", 1),
    "host is empty": lambda own: ("", own[1]),
    "host is None": lambda own: (None, own[1]),
    "host is bytes": lambda own: (b"127.0.0.1", own[1]),
    "host is a bytearray": lambda own: (bytearray(b"127.0.0.1"), own[1]),
    "host is an int": lambda own: (2130706433, own[1]),
    "host is short": lambda own: ("127.1", own[1]),
    "host has zeros": lambda own: ("127.0.0.01", own[1]),
    "host has a null": lambda own: ("127.0.0.1\0", own[1]),
    "host is 0.0.0.0": lambda own: ("0.0.0.0", own[1]),
    "host is broadcast": lambda own: ("<broadcast>", own[1]),
    "host is IPv6": lambda own: ("::1", own[1]),
    "host is unreachable": lambda _own: ("255.255.255.255", 1),
    "one item": lambda _own: ("127.0.0.1",),
    "three items": lambda own: (*own, 0),
    "four items": lambda own: (*own, 0, 0),
    "five items": lambda own: (*own, 0, 0, 0),
    "empty": lambda _own: (),
    "str": lambda _own: "127.0.0.1",
    "bytes": lambda _own: b"127.0.0.1",
    "None": lambda _own: None,
    "int": lambda _own: 5,
}
INET6_ADDRESSES: Final[dict[str, Callable[[Any], Any]]] = {
    "listening": lambda own: own,
    "two items": lambda own: own[:2],
    "three items": lambda own: own[:3],
    "flow": lambda own: (*own[:2], 5, 0),
    "flow is as large as may be": lambda own: (*own[:2], 0xFFFFF, 0),
    "flow is too large": lambda own: (*own[:2], 0x100000, 0),
    "flow is negative": lambda own: (*own[:2], -1, 0),
    "flow is a str": lambda own: (*own[:2], "x", 0),
    "flow is None": lambda own: (*own[:2], None, 0),
    "scope": lambda own: (*own[:2], 0, 1),
    "scope is too large": lambda own: (*own[:2], 0, 1 << 32),
    "scope is negative": lambda own: (*own[:2], 0, -1),
    "scope is a float": lambda own: (*own[:2], 0, 1.0),
    "scope in the host": lambda own: ("::1%lo", own[1]),
    "link-local without a scope": lambda _own: ("fe80::1", 1, 0, 0),
    "five items": lambda own: (*own, 0),
    "host is IPv4": lambda own: ("127.0.0.1", own[1]),
    "host is mapped IPv4": lambda own: ("::ffff:127.0.0.1", own[1]),
    "host is empty": lambda own: ("", own[1]),
    "nobody listens": lambda _own: ("::1", 1),
    "port is too large": lambda _own: ("::1", 65536, 0, 0),
}


def described_peer(sock: trio.socket.SocketType) -> object:
    try:
        return sock.getpeername()
    except OSError as exc:
        return exc


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize(
    ("family", "addresses"), [(socket.AF_INET, INET_ADDRESSES), (socket.AF_INET6, INET6_ADDRESSES)]
)
def test_internet_addresses(
    family: int, kind: int, addresses: dict[str, Callable[[Any], Any]]
) -> None:
    async def scenario(log: Log) -> None:
        with bound(family, kind) as other:
            if kind == socket.SOCK_STREAM:
                other.listen(1000)
            own = other.getsockname()
            log.name(own, "other")
            log.name(own[1], "port")
            for label, make in addresses.items():
                for method in ("connect", "sendto", "sendmsg"):
                    with trio.socket.socket(family, kind) as sock:
                        await note_outcome(log, f"{method}, {label}", to(method, sock, make(own)))
                        log.note("closed by that", sock.fileno() < 0)
                        log.note("peer", described_peer(sock))
            other.setblocking(False)
            log.note("received", left_over(other))

    check_same(scenario)


def to(method: str, sock: Any, address: object) -> Awaitable[object]:
    match method:
        case "connect":
            return cast("Awaitable[object]", sock.connect(address))
        case "sendto":
            return cast("Awaitable[object]", sock.sendto(b"x", address))
        case _:
            return cast("Awaitable[object]", sock.sendmsg([b"x"], [], 0, address))


async def note_outcome(log: Log, what: str, awaitable: Awaitable[object]) -> None:
    """Like `Log.call`, for calls that may resolve a name in a thread, and wait for that."""
    try:
        value = await awaitable
    except Exception as exc:  # noqa: BLE001 (whatever it is, it is the outcome)
        log.note(what, exc)
    else:
        log.note(what, value)


UNIX_ADDRESSES: Final[dict[str, Callable[[Any], Any]]] = {
    "str": str,
    "bytes": lambda path: bytes(path),
    "path": lambda path: path,
    "bytearray": lambda path: bytearray(bytes(path)),
    "memoryview": lambda path: memoryview(bytes(path)),
    "with a null at the end": lambda path: f"{path}\0",
    "with a null in the middle": lambda path: f"{path}\0x",
    "not there": lambda path: f"{path}.not",
    "in no directory": lambda path: f"{path}.not/x",
    "a file": lambda _path: __file__,
    "a directory": lambda path: str(path.parent),
    "as long as may be": lambda path: str(path).ljust(107, "x"),
    "longer": lambda path: str(path).ljust(108, "x"),
    "too long": lambda path: str(path).ljust(109, "x"),
    "empty": lambda _path: "",
    "empty bytes": lambda _path: b"",
    "only a null": lambda _path: "\0",
    "abstract, not there": lambda _path: "\0not there",
    "abstract bytes, not there": lambda _path: b"\0not there",
    "abstract, as long as may be": lambda _path: b"\0".ljust(108, b"x"),
    "abstract, too long": lambda _path: b"\0".ljust(109, b"x"),
    "not ASCII": lambda path: f"{path}ü",
    "a surrogate": lambda path: f"{path}\udc80",
    "no surrogate that is a byte": lambda path: f"{path}\ud800",
    "None": lambda _path: None,
    "int": lambda _path: 5,
    "tuple": lambda _path: ("127.0.0.1", 1),
}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_unix_addresses(kind: int, tmp_path: Path) -> None:
    async def scenario(log: Log) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(str(path))
            if kind != socket.SOCK_DGRAM:
                other.listen(1000)
            for label, make in UNIX_ADDRESSES.items():
                for method in ("connect", "sendto", "sendmsg"):
                    with trio.socket.socket(socket.AF_UNIX, kind) as sock:
                        await note_outcome(log, f"{method}, {label}", to(method, sock, make(path)))
                        log.note("peer", described_peer(sock))
            other.setblocking(False)
            log.note("received", left_over(other))
        path.unlink()

    check_same(scenario)
