"""Closing a file ends the operations on it, and frees the file, fd and port at once."""

from __future__ import annotations

import os
import socket as stdlib_socket
from array import array
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger, Rounds
from races import NOT_READY, current_manager, driven, every_order, race
from trio.lowlevel import FdStream, notify_closing, wait_readable
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

ROUNDS: Final = 1200

pytestmark = pytest.mark.usefixtures("fd_ledger")

ANY_PORT: Final = ("127.0.0.1", 0)


@contextmanager
def trio_socketpair(
    kind: int = stdlib_socket.SOCK_STREAM,
) -> Iterator[tuple[trio.socket.SocketType, stdlib_socket.socket]]:
    """Yield a connected pair: one socket for the test's tasks, one for the test itself."""
    ours, theirs = stdlib_socket.socketpair(type=kind)
    theirs.setblocking(False)
    with theirs:
        sock = trio.socket.from_stdlib_socket(ours)
        yield sock, theirs
        sock.close()


def fill(sock: stdlib_socket.socket) -> int:
    """Send until the socket is full, and return the number of bytes."""
    sent = 0
    for size in (65536, 1):
        with suppress(BlockingIOError):
            while True:
                sent += sock.send(bytes(size), stdlib_socket.MSG_DONTWAIT)
    return sent


async def expect_closed(awaitable: Awaitable[object]) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await awaitable


# --- At once --------------------------------------------------------------------------------
#
# Between close() and the check of what it did there is no checkpoint: nothing is submitted or
# fetched but by close() itself.


def bind_again(address: Any, kind: int = stdlib_socket.SOCK_STREAM) -> None:
    with stdlib_socket.socket(type=kind) as sock:
        sock.bind(address)
        if kind == stdlib_socket.SOCK_STREAM:
            sock.listen()


async def test_a_closed_listener_frees_its_port() -> None:
    for _ in range(ROUNDS):
        async with trio.open_nursery() as nursery:
            sock = trio.socket.socket()
            await sock.bind(ANY_PORT)
            sock.listen()
            address = sock.getsockname()
            nursery.start_soon(expect_closed, sock.accept())
            await wait_all_tasks_blocked()
            sock.close()
            bind_again(address)


@contextmanager
def crowd_with_data(nursery: trio.Nursery) -> Iterator[Callable[[], None]]:
    """Return a function that makes more receives ready than one enter completes (20)."""
    with ExitStack() as stack:
        ends = [stack.enter_context(trio_socketpair()) for _ in range(100)]
        for sock, _ in ends:
            nursery.start_soon(sock.recv, 1)
        yield lambda: [theirs.send(b"x") for _, theirs in ends].clear()
        nursery.cancel_scope.cancel()


async def test_a_closed_listener_frees_its_port_however_busy_the_ring_is() -> None:
    for _ in range(30):
        async with trio.open_nursery() as nursery:
            with crowd_with_data(nursery) as give:
                sock = trio.socket.socket()
                await sock.bind(ANY_PORT)
                sock.listen()
                nursery.start_soon(expect_closed, perform(operations.accept(sock.fileno())))
                await wait_all_tasks_blocked()
                give()
                address = sock.getsockname()
                sock.close()
                bind_again(address)
                await wait_all_tasks_blocked()


async def test_the_peer_sees_the_end_however_busy_the_ring_is() -> None:
    for _ in range(30):
        async with trio.open_nursery() as nursery:
            with crowd_with_data(nursery) as give, trio_socketpair() as (sock, theirs):
                nursery.start_soon(expect_closed, sock.recv(10))
                await wait_all_tasks_blocked()
                give()
                sock.close()
                assert theirs.recv(10) == b""
                await wait_all_tasks_blocked()


async def test_closing_what_nothing_waits_for_enters_nothing() -> None:
    with trio_socketpair() as (other, _), trio_socketpair() as (sock, theirs):
        ring = current_manager().ring

        def close() -> None:
            assert ring.unsubmitted
            enters = ring.enters
            sock.close()
            assert ring.enters == enters
            assert theirs.recv(10) == b""

        await driven(other.sendmsg([b"x"]), parked=close)


DATAGRAM_RECEIVES: Final[list[Callable[[trio.socket.SocketType], Awaitable[object]]]] = [
    lambda sock: sock.recv(10),
    lambda sock: sock.recv_into(bytearray(10)),
    lambda sock: sock.recvfrom(10),
    lambda sock: sock.recvfrom_into(bytearray(10)),
    lambda sock: sock.recvmsg(10, 100),
    lambda sock: sock.recvmsg_into([bytearray(10)], 100),
    wait_readable,
]


async def test_a_closed_datagram_socket_frees_its_port() -> None:
    for number in range(ROUNDS):
        receive = DATAGRAM_RECEIVES[number % len(DATAGRAM_RECEIVES)]
        async with trio.open_nursery() as nursery:
            sock = trio.socket.socket(type=stdlib_socket.SOCK_DGRAM)
            await sock.bind(ANY_PORT)
            address = sock.getsockname()
            nursery.start_soon(expect_closed, receive(sock))
            await wait_all_tasks_blocked()
            sock.close()
            bind_again(address, stdlib_socket.SOCK_DGRAM)


async def test_a_closed_connect_frees_its_port() -> None:
    with stdlib_socket.create_server(ANY_PORT, backlog=0) as full:
        target = full.getsockname()
        # One is let in beyond the backlog; from then on the kernel does not answer.
        with stdlib_socket.create_connection(target):
            for _ in range(ROUNDS):
                async with trio.open_nursery() as nursery:
                    sock = trio.socket.socket()
                    await sock.bind(ANY_PORT)
                    address = sock.getsockname()
                    nursery.start_soon(expect_closed, sock.connect(target))
                    await wait_all_tasks_blocked()
                    sock.close()
                    bind_again(address)


@pytest.mark.parametrize("waits", ["to receive", "to send", "for both"])
async def test_the_peer_sees_the_end(waits: str) -> None:
    for _ in range(ROUNDS // 3):
        async with trio.open_nursery() as nursery:
            ours, theirs = stdlib_socket.socketpair()
            with theirs:
                theirs.setblocking(False)
                sock = trio.socket.from_stdlib_socket(ours)
                if waits != "to send":
                    nursery.start_soon(expect_closed, sock.recv(10))
                sent = 0
                if waits != "to receive":
                    sent = fill(ours)
                    nursery.start_soon(expect_closed, sock.send(b"x"))
                await wait_all_tasks_blocked()
                sock.close()
                while sent:
                    sent -= len(theirs.recv(65536))
                assert theirs.recv(10) == b""


async def test_a_pipe_sees_the_end() -> None:
    for number in range(ROUNDS):
        read_end, write_end = os.pipe()
        reader, writer = FdStream(read_end), FdStream(write_end)
        async with reader, writer, trio.open_nursery() as nursery:
            if number % 2:
                nursery.start_soon(expect_closed, reader.receive_some())
                await wait_all_tasks_blocked()
                reader.close()
                with pytest.raises(BrokenPipeError):
                    os.write(write_end, b"x")
            else:
                nursery.start_soon(expect_closed, writer.send_all(bytes(65537)))
                await wait_all_tasks_blocked()
                writer.close()
                assert len(os.read(read_end, 1 << 20)) == 65536
                assert os.read(read_end, 1) == b""


async def test_closing_both_ends_of_a_splice() -> None:
    """It runs in a kernel worker, which releases the files a moment later. But it ends."""
    for end in (0, 1):
        pipes = [os.pipe(), os.pipe()]
        source, target = pipes[0][0], pipes[1][1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, perform(operations.splice(source, target, 10)))
            await wait_all_tasks_blocked()
            notify_closing((source, target)[end])
        for fd in (*pipes[0], *pipes[1]):
            os.close(fd)


@pytest.mark.parametrize("ends_by", ["itself", "cancellation"])
async def test_a_splice_that_has_ended_waits_on_neither_fd(ends_by: str) -> None:
    pipes = [os.pipe() for _ in range(2)]
    (source, feed), (drain, target) = pipes
    splice = operations.splice(source, target, 10)
    if ends_by == "itself":
        os.write(feed, b"data")
        assert await perform(splice) == 4
    else:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, splice)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    waiters = current_manager().fd_waiters
    assert not {source, target} & waiters.keys()
    for fd in (source, feed, drain, target):
        os.close(fd)


async def test_closing_what_is_spliced_midway_in_a_call() -> None:
    """A worker's wait ends with EINTR, after which the call tries again, but not on a closed fd."""
    pipes = [os.pipe(), os.pipe()]
    async with trio.open_nursery() as nursery:
        splice = operations.splice(pipes[0][0], pipes[1][1], 1)
        nursery.start_soon(expect_closed, current_manager().perform_shielded(splice))
        await wait_all_tasks_blocked()
        notify_closing(pipes[0][0])
    for fd in (*pipes[0], *pipes[1]):
        os.close(fd)


async def test_closing_what_a_worker_could_be_about_to_read() -> None:
    """The worker would return it to the kernel's poll, which could lose the cancellation."""
    for _ in range(300):
        read_end, write_end = os.pipe()
        async with trio.open_nursery() as nursery:
            read = operations.read(read_end, bytearray(1), -1, cancellable=True, in_worker=True)
            nursery.start_soon(expect_closed, perform(read))
            await wait_all_tasks_blocked()
            notify_closing(read_end)
        os.close(read_end)
        os.close(write_end)


RECEIVES: Final[list[Callable[[trio.socket.SocketType], Awaitable[object]]]] = [
    lambda sock: sock.recv(10),
    lambda sock: trio.SocketStream(sock).receive_some(),
    lambda sock: perform(operations.recv(sock.fileno(), bytearray(10))),
]


async def test_shutting_down_in_the_turn_of_a_send() -> None:
    with trio_socketpair() as (sock, theirs):

        def shut_down() -> None:
            sock.shutdown(stdlib_socket.SHUT_WR)

        assert await driven(sock.send(b"x"), parked=shut_down) == 1
        assert theirs.recv(10) == b"x"
        assert theirs.recv(10) == b""


@pytest.mark.parametrize("receive", RECEIVES)
async def test_detaching(receive: Callable[[trio.socket.SocketType], Awaitable[object]]) -> None:
    """Tasks that waited for the socket receive no data that is for its new owner."""
    ours, theirs = stdlib_socket.socketpair()
    sock = trio.socket.from_stdlib_socket(ours)
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, receive(sock))
            await wait_all_tasks_blocked()
            fd = sock.detach()
            theirs.send(b"x")
        with stdlib_socket.socket(fileno=fd) as new:
            assert new.recv(10) == b"x"


# --- Races ----------------------------------------------------------------------------------


async def test_closing_against_receiving(rounds: Rounds) -> None:
    """If the result came first, it is delivered. No byte is lost."""
    for order in every_order(ROUNDS):
        with trio_socketpair() as (sock, theirs):
            ledger = ByteLedger()
            outcome = await race(
                rounds,
                order,
                lambda: sock.recv(100),
                lambda: theirs.send(ledger.take(10)),
                close=sock.close,
            )
            if outcome:
                ledger.received(outcome.value)
                assert not ledger.missing


async def test_closing_against_receiving_fds(rounds: Rounds) -> None:
    """Fds in a message that no task received are closed with the socket."""
    fds = array("i", (0, 1))
    for order in every_order(ROUNDS):
        with trio_socketpair(stdlib_socket.SOCK_DGRAM) as (sock, theirs):
            outcome = await race(
                rounds,
                order,
                lambda: sock.recvmsg(10, stdlib_socket.CMSG_SPACE(8)),
                lambda: theirs.sendmsg(
                    [b"x"], [(stdlib_socket.SOL_SOCKET, stdlib_socket.SCM_RIGHTS, fds)]
                ),
                close=sock.close,
            )
            if outcome:
                [(_, _, data)] = outcome.value[1]
                for fd in array("i", data):
                    os.close(fd)


async def test_closing_against_accepting(rounds: Rounds) -> None:
    """A connection is accepted and works, or it is reset. None stays open."""
    for order in every_order(ROUNDS):
        sock = trio.socket.socket()
        await sock.bind(ANY_PORT)
        sock.listen()
        address = sock.getsockname()
        with stdlib_socket.socket() as client:
            outcome = await race(
                rounds, order, sock.accept, lambda: client.connect(address), close=sock.close
            )
            sock.close()
            if outcome:
                accepted, peer = outcome.value
                assert peer == client.getsockname()
                with accepted:
                    client.send(b"x")
                    assert await accepted.recv(10) == b"x"
            elif order not in NOT_READY:
                with pytest.raises(ConnectionResetError):
                    client.recv(10)


async def test_closing_against_reading_a_pipe(rounds: Rounds) -> None:
    for order in every_order(ROUNDS):
        read_end, write_end = os.pipe()
        async with FdStream(read_end) as stream, FdStream(write_end):
            outcome = await race(
                rounds,
                order,
                stream.receive_some,
                lambda: os.write(write_end, b"x"),
                close=stream.close,
            )
            if outcome:
                assert outcome.value == b"x"


@pytest.mark.parametrize("first", ["cancel", "close"])
async def test_what_came_first_is_raised(first: str) -> None:
    ended_by = ""
    scope = trio.CancelScope()

    async def receive() -> None:
        nonlocal ended_by
        with scope:
            try:
                await sock.recv(10)
            except trio.ClosedResourceError:
                ended_by = "close"
        if scope.cancelled_caught:
            ended_by = "cancel"

    with trio_socketpair() as (sock, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            if first == "cancel":
                scope.cancel()
            sock.close()
            scope.cancel()
    assert ended_by == first


# --- Where Trio does not say that it closes -------------------------------------------------


async def test_leaving_a_with_statement() -> None:
    """On plain Trio the peer sees the end, and tasks that wait do so indefinitely."""
    ours, theirs = stdlib_socket.socketpair()
    theirs.setblocking(False)
    with theirs:
        async with trio.open_nursery() as nursery:
            with trio.socket.from_stdlib_socket(ours) as sock:
                nursery.start_soon(expect_closed, sock.recv(10))
                await wait_all_tasks_blocked()
            assert theirs.recv(10) == b""


ENDINGS: Final[dict[str, Callable[[Any], object]]] = {
    "shutdown": lambda sock: sock.shutdown(stdlib_socket.SHUT_WR),
    "detach": lambda sock: stdlib_socket.socket(fileno=sock.detach()).close(),
    "with": lambda sock: sock.__exit__(None, None, None),
}


@pytest.mark.parametrize("end", ENDINGS.values(), ids=ENDINGS)
def test_a_socket_that_outlives_its_run(end: Callable[[Any], object]) -> None:
    async def main() -> trio.socket.SocketType:
        return trio.socket.from_stdlib_socket(ours)

    ours, theirs = stdlib_socket.socketpair()
    with theirs:
        sock = trio_uring.run(main)
        end(sock)
        assert theirs.recv(10) == b""
        ours.close()


@pytest.mark.parametrize("end", [ENDINGS["detach"], ENDINGS["with"]], ids=["detach", "with"])
def test_in_a_run_without_a_ring_tasks_go_on_waiting(end: Callable[[Any], object]) -> None:
    """As on plain Trio, which does not tell them."""

    async def main() -> None:
        with trio_socketpair() as (sock, _theirs):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.recv, 10)
                await wait_all_tasks_blocked()
                end(sock)
                await wait_all_tasks_blocked()
                assert len(nursery.child_tasks) == 1
                nursery.cancel_scope.cancel()

    trio.run(main)


async def test_detaching_what_is_closed_ends_nothing() -> None:
    """Such as an operation that has no fd."""
    with trio_socketpair() as (sock, _theirs):
        sock.close()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.timeout(10**12))
            await wait_all_tasks_blocked()
            assert sock.detach() == -1
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == 1
            nursery.cancel_scope.cancel()


async def test_a_cancelled_connect() -> None:
    """It closes the socket, and frees its port, even if another task already waits for data."""
    scope = trio.CancelScope()

    async def connect(sock: trio.socket.SocketType) -> None:
        with scope:
            await sock.connect(target)

    with stdlib_socket.create_server(ANY_PORT, backlog=0) as full:
        target = full.getsockname()
        with stdlib_socket.create_connection(target):
            sock = trio.socket.socket()
            await sock.bind(ANY_PORT)
            address = sock.getsockname()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect, sock)
                await wait_all_tasks_blocked()
                nursery.start_soon(expect_closed, sock.recv(10))
                await wait_all_tasks_blocked()
                scope.cancel()
            assert scope.cancelled_caught
            bind_again(address)
