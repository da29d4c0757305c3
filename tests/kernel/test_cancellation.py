"""Cancelling an operation loses no bytes, fds or connections.

Each test forces every order of events (see `races`) thousands of times, and counts what arrives.
"""

from __future__ import annotations

import os
import socket as stdlib_socket
import threading
from array import array
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger, Rounds, open_fds
from races import NOT_READY, Order, every_order, race

from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    Sender = Callable[[trio.socket.SocketType, bytes], Awaitable[int]]
    Receiver = Callable[[trio.socket.SocketType], Awaitable[bytes]]

ROUNDS: Final = 2000
# Opening files, making connections and starting kernel workers is slower than moving bytes.
SLOW_ROUNDS: Final = 1200

pytestmark = pytest.mark.usefixtures("fd_ledger")

# SO_RCVBUF and SO_SNDBUF, so that little data fills a socket; the kernel has its own minimum.
SMALL_BUFFER: Final = 4096
MORE_THAN_FITS: Final = 1 << 16


def receive_now(sock: stdlib_socket.socket, size: int = 65536) -> bytes:
    """Receive the data that is in the socket, without waiting."""
    try:
        return sock.recv(size, stdlib_socket.MSG_DONTWAIT)
    except BlockingIOError:
        return b""


# --- Receiving ------------------------------------------------------------------------------


async def recv(sock: trio.socket.SocketType) -> bytes:
    return await sock.recv(100)


async def recv_into(sock: trio.socket.SocketType) -> bytes:
    buffer = bytearray(100)
    count = await sock.recv_into(buffer)
    return bytes(buffer[:count])


async def recvfrom(sock: trio.socket.SocketType) -> bytes:
    data, _ = await sock.recvfrom(100)
    return data


async def recvfrom_into(sock: trio.socket.SocketType) -> bytes:
    buffer = bytearray(100)
    count, _ = await sock.recvfrom_into(buffer)
    return bytes(buffer[:count])


async def recvmsg(sock: trio.socket.SocketType) -> bytes:
    data, _, _, _ = await sock.recvmsg(100)
    return data


async def recvmsg_into(sock: trio.socket.SocketType) -> bytes:
    first, second = bytearray(7), bytearray(100)
    count, _, _, _ = await sock.recvmsg_into([first, second])
    return bytes((first + second)[:count])


RECEIVERS = [recv, recv_into, recvfrom, recvfrom_into, recvmsg, recvmsg_into]


@pytest.mark.parametrize("receive", RECEIVERS, ids=lambda receive: receive.__name__)
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
async def test_receiving(rounds: Rounds, kind: str, receive: Receiver) -> None:
    ours, theirs = stdlib_socket.socketpair(type=getattr(stdlib_socket, kind))
    ledger = ByteLedger()
    with theirs, trio.socket.from_stdlib_socket(ours) as sock:
        for order in every_order(ROUNDS):
            outcome = await race(
                rounds, order, partial(receive, sock), lambda: theirs.send(ledger.take(10))
            )
            ledger.received(outcome.value if outcome else receive_now(ours))
            assert not ledger.missing


async def test_receiving_all_that_was_asked_for(rounds: Rounds) -> None:
    """The result is what ``MSG_WAITALL`` received before the cancellation."""
    ours, theirs = stdlib_socket.socketpair()
    ledger = ByteLedger()
    buffer = bytearray(20)

    def receive() -> Awaitable[int]:
        return perform(operations.recv(ours.fileno(), buffer, stdlib_socket.MSG_WAITALL))

    with theirs, ours:
        for order in every_order(ROUNDS):
            # Half of it is no reason to wake up.
            size = 20 if order in (Order.READY_SEEN, Order.NO_CANCEL) else 10
            send = partial(lambda size: theirs.send(ledger.take(size)), size)
            outcome = await race(rounds, order, receive, send)
            ledger.received(buffer[: outcome.value] if outcome else receive_now(ours))
            assert not ledger.missing


@contextmanager
def another_thread(function: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Yield a function that makes another thread call *function*."""
    calls: SimpleQueue[bool] = SimpleQueue()

    def work() -> None:
        while calls.get():
            function()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield lambda: calls.put(True)
    finally:
        calls.put(False)
        thread.join()


async def test_receiving_from_another_thread(rounds: Rounds) -> None:
    """A real race in the kernel between the sender and the cancellation."""
    ours, theirs = stdlib_socket.socketpair()
    ledger = ByteLedger()
    with theirs, trio.socket.from_stdlib_socket(ours) as sock:
        with another_thread(lambda: theirs.send(ledger.take(10))) as send_soon:
            for order in every_order(ROUNDS):
                outcome = await race(rounds, order, lambda: sock.recv(100), send_soon)
                if outcome:
                    ledger.received(outcome.value)
        while ledger.missing:
            ledger.received(receive_now(ours))


# --- Receiving file descriptors -------------------------------------------------------------

# As `socket.CMSG_SPACE` of two fds.
TWO_FDS: Final = array("i", (0, 0)).itemsize * 2


def received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array("i")
    for _, _, data in ancillary:
        fds.frombytes(data)
    return fds.tolist()


@pytest.mark.parametrize("into", [False, True], ids=["recvmsg", "recvmsg_into"])
async def test_receiving_fds(rounds: Rounds, *, into: bool) -> None:
    ours, theirs = stdlib_socket.socketpair(type=stdlib_socket.SOCK_DGRAM)
    space = stdlib_socket.CMSG_SPACE(TWO_FDS)
    with theirs, trio.socket.from_stdlib_socket(ours) as sock, Path(os.devnull).open() as file:
        fds = array("i", (file.fileno(), file.fileno()))
        rights = [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, fds)]
        before = len(open_fds())

        async def receive() -> list[tuple[int, int, bytes]]:
            if into:
                _, ancillary, _, _ = await sock.recvmsg_into([bytearray(10)], space)
            else:
                _, ancillary, _, _ = await sock.recvmsg(10, space)
            return ancillary

        for order in every_order(ROUNDS):
            outcome = await race(rounds, order, receive, lambda: theirs.sendmsg([b"x"], rights))
            received = received_fds(outcome.value) if outcome else []
            assert len(received) == (2 if outcome else 0)
            for fd in received:
                os.close(fd)
            receive_now(ours)  # drops the fds of a message that stayed in the socket
        assert len(open_fds()) == before


# --- Connections ----------------------------------------------------------------------------


@contextmanager
def listening(*, backlog: int = 100) -> Iterator[tuple[stdlib_socket.socket, Any]]:
    with stdlib_socket.create_server(("127.0.0.1", 0), backlog=backlog) as listener:
        yield listener, listener.getsockname()


async def test_accepting(rounds: Rounds) -> None:
    """No connection and no fd is lost: each is accepted, or can still be accepted."""
    with listening() as (listener, address), trio.socket.from_stdlib_socket(listener) as sock:
        for order in every_order(SLOW_ROUNDS):
            with ExitStack() as connections:

                def connect() -> None:
                    connections.enter_context(stdlib_socket.create_connection(address))

                outcome = await race(rounds, order, sock.accept, connect)
                if outcome:
                    accepted, peer = outcome.value
                    with accepted:
                        assert accepted.getpeername() == peer
                elif order not in NOT_READY:
                    listener.accept()[0].close()
                with pytest.raises(BlockingIOError):
                    listener.accept()


async def test_accepting_from_another_thread(rounds: Rounds) -> None:
    """A real race in the kernel between the connection and the cancellation."""
    connections: list[stdlib_socket.socket] = []
    accepted: list[trio.socket.SocketType] = []
    with listening() as (listener, address), trio.socket.from_stdlib_socket(listener) as sock:

        def connect() -> None:
            connections.append(stdlib_socket.create_connection(address))

        asked = 0
        with another_thread(connect) as connect_soon:

            def ask() -> None:
                nonlocal asked
                asked += 1
                connect_soon()

            for order in every_order(SLOW_ROUNDS):
                outcome = await race(rounds, order, sock.accept, ask)
                if outcome:
                    accepted.append(outcome.value[0])
            # While the thread connects: it would wait for ever once the backlog is full.
            while len(accepted) < asked:
                accepted.append((await sock.accept())[0])
        assert len(connections) == asked
        peers = {connection.getsockname() for connection in connections}
        assert {each.getpeername() for each in accepted} == peers
        for connection in connections:
            connection.close()
        for each in accepted:
            each.close()


async def test_connecting(rounds: Rounds) -> None:
    """A cancelled connect leaves a closed socket. If it completed first, the socket works."""
    with (
        listening() as (listener, address),
        listening(backlog=0) as (_, full_address),
        # One is let in beyond the backlog; from then on the kernel does not answer.
        stdlib_socket.create_connection(full_address),
    ):
        listener.setblocking(False)
        for order in every_order(SLOW_ROUNDS):
            target = full_address if order in NOT_READY else address
            with trio.socket.socket() as sock:
                connect = partial(sock.connect, target)
                outcome = await race(rounds, order, connect, lambda: None)
                if outcome:
                    assert sock.getpeername() == target
                else:
                    assert sock.fileno() == -1
            with suppress(BlockingIOError):
                listener.accept()[0].close()


# --- Sending --------------------------------------------------------------------------------


def fill(sock: stdlib_socket.socket, ledger: ByteLedger) -> None:
    """Send until the socket is full."""
    while True:
        size = SMALL_BUFFER
        try:
            sent = sock.send(ledger.take(size), stdlib_socket.MSG_DONTWAIT)
        except BlockingIOError:
            ledger.take_back(size)
            return
        ledger.take_back(size - sent)


def drain(sock: stdlib_socket.socket, ledger: ByteLedger) -> None:
    """Receive all data that is in the socket."""
    while data := receive_now(sock):
        ledger.received(data)


@contextmanager
def small_socketpair() -> Iterator[tuple[stdlib_socket.socket, stdlib_socket.socket]]:
    ours, theirs = stdlib_socket.socketpair()
    ours.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_SNDBUF, SMALL_BUFFER)
    with ours, theirs:
        yield ours, theirs


async def send(sock: trio.socket.SocketType, data: bytes) -> int:
    return await sock.send(data)


async def sendmsg(sock: trio.socket.SocketType, data: bytes) -> int:
    return await sock.sendmsg([data[:3], data[3:]])


async def send_waiting(sock: trio.socket.SocketType, data: bytes) -> int:
    return await perform(operations.send(sock.fileno(), data))


async def sendmsg_waiting(sock: trio.socket.SocketType, data: bytes) -> int:
    return await perform(operations.sendmsg(sock.fileno(), [data[:3], data[3:]]))


SENDERS = [send, sendmsg, send_waiting, sendmsg_waiting]


@pytest.mark.parametrize("send", SENDERS, ids=lambda send: send.__name__)
async def test_sending(rounds: Rounds, send: Sender) -> None:
    """The number of bytes that a send reports is the number that arrives."""
    ledger = ByteLedger()
    with small_socketpair() as (ours, theirs), trio.socket.from_stdlib_socket(ours) as sock:
        for order in every_order(ROUNDS):
            fill(ours, ledger)
            data = ledger.take(1000)
            ledger.take_back(1000)

            def make_ready() -> None:
                drain(theirs, ledger)

            outcome = await race(rounds, order, partial(send, sock, data), make_ready)
            if outcome:
                ledger.take(outcome.value)
            drain(theirs, ledger)
            assert not ledger.missing


async def test_sending_more_than_fits(rounds: Rounds) -> None:
    """The result is what ``MSG_WAITALL`` sent before the cancellation."""
    ledger = ByteLedger()
    partly = 0
    with small_socketpair() as (ours, theirs):
        for order in every_order(ROUNDS):
            fill(ours, ledger)
            # All of it, where nothing would end the operation halfway.
            size = 1000 if order in (Order.READY_SEEN, Order.NO_CANCEL) else MORE_THAN_FITS
            data = ledger.take(size)
            ledger.take_back(size)
            operation = operations.send(ours.fileno(), data, stdlib_socket.MSG_WAITALL)
            outcome = await race(
                rounds, order, partial(perform, operation), lambda: drain(theirs, ledger)
            )
            if outcome:
                ledger.take(outcome.value)
                partly += outcome.value < size
            drain(theirs, ledger)
            assert not ledger.missing
    assert partly
