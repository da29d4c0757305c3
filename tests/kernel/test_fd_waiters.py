"""Two tasks never wait for the same thing on a file. Waits on other files are not affected."""

from __future__ import annotations

import os
import socket as stdlib_socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.lowlevel import FdStream, notify_closing, wait_readable, wait_writable
from trio.testing import wait_all_tasks_blocked

from trio_uring._engine._fd_waiters import FdReservation, FdWaiters
from trio_uring._engine._readiness import Readiness
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.socket import SocketType

    Wait = Callable[[SocketType], Awaitable[object]]

pytestmark = pytest.mark.usefixtures("fd_ledger")

ANY_PORT: Final = ("127.0.0.1", 0)
MORE_THAN_FITS: Final = bytes(1 << 22)

READS: Final[dict[str, Wait]] = {
    "recv": lambda sock: sock.recv(10),
    "recv of more than a buffer": lambda sock: sock.recv(100_000),
    "recv_into": lambda sock: sock.recv_into(bytearray(10)),
    "recvfrom": lambda sock: sock.recvfrom(10),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(10)),
    "recvmsg": lambda sock: sock.recvmsg(10),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(10)]),
    "wait_readable": lambda sock: wait_readable(sock),
    "perform": lambda sock: perform(operations.recv(sock.fileno(), bytearray(10))),
}
WRITES: Final[dict[str, Wait]] = {
    "send": lambda sock: sock.send(MORE_THAN_FITS),
    "sendmsg": lambda sock: sock.sendmsg([MORE_THAN_FITS]),
    "wait_writable": lambda sock: wait_writable(sock),
    "perform": lambda sock: perform(operations.send(sock.fileno(), MORE_THAN_FITS)),
}


def fill(sock: SocketType) -> None:
    with suppress(BlockingIOError):
        while True:
            sock._sock.send(MORE_THAN_FITS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("second", READS)
@pytest.mark.parametrize("first", READS)
async def test_two_tasks_cannot_read_from_one_fd(first: str, second: str) -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(READS[first], left)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await READS[second](left)
            # The first one does not mind, nor does anyone who wants something else.
            await left.send(b"x")
            await right.send(b"x")
        # A wait has left the byte where it was.
        if first == "wait_readable":
            assert await left.recv(10) == b"x"


@pytest.mark.parametrize("second", READS)
@pytest.mark.parametrize("first", READS)
async def test_taking_over_from_a_reader_that_was_cancelled(first: str, second: str) -> None:
    """Even before the kernel has seen the cancellation. The new reader gets the data."""
    left, right = trio.socket.socketpair()
    scope = trio.CancelScope()

    async def wait() -> None:
        with scope:
            await READS[first](left)

    with left, right:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            scope.cancel()
            right._sock.send(b"x")  # type: ignore[attr-defined]
            await READS[second](left)
        assert scope.cancelled_caught


@pytest.mark.parametrize("second", WRITES)
@pytest.mark.parametrize("first", WRITES)
async def test_two_tasks_cannot_write_to_one_fd(first: str, second: str) -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        fill(left)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(WRITES[first], left)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await WRITES[second](left)
            await right.send(b"x")
            assert await left.recv(10) == b"x"
            nursery.cancel_scope.cancel()


async def test_two_tasks_cannot_accept_from_one_listener() -> None:
    with trio.socket.socket() as listener:
        await listener.bind(ANY_PORT)
        listener.listen()
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                sock, _ = await listener.accept()
                sock.close()

            nursery.start_soon(accept)
            await wait_all_tasks_blocked()
            for again in (listener.accept(), wait_readable(listener)):
                with pytest.raises(trio.BusyResourceError):
                    await again
            with stdlib_socket.create_connection(listener.getsockname()):
                pass


async def test_two_tasks_cannot_connect_one_socket() -> None:
    with stdlib_socket.create_server(ANY_PORT, backlog=0) as full:
        address = full.getsockname()
        with stdlib_socket.create_connection(address), trio.socket.socket() as sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.connect, address)
                await wait_all_tasks_blocked()
                for again in (sock.connect(address), wait_writable(sock)):
                    with pytest.raises(trio.BusyResourceError):
                        await again
                nursery.cancel_scope.cancel()


async def test_two_tasks_cannot_use_one_side_of_a_stream() -> None:
    left, right = trio.socket.socketpair()
    async with (
        trio.SocketStream(left) as stream,
        trio.SocketStream(right),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(stream.send_all, MORE_THAN_FITS)
        nursery.start_soon(stream.receive_some)
        await wait_all_tasks_blocked()
        for again in (
            stream.send_all(b"x"),
            stream.wait_send_all_might_not_block(),
            stream.receive_some(),
        ):
            with pytest.raises(trio.BusyResourceError):
                await again
        nursery.cancel_scope.cancel()


async def test_two_tasks_cannot_use_one_end_of_a_pipe() -> None:
    read_end, write_end = os.pipe()
    async with FdStream(read_end) as reader, FdStream(write_end) as writer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.receive_some)
            await wait_all_tasks_blocked()
            for again in (reader.receive_some(), wait_readable(read_end)):
                with pytest.raises(trio.BusyResourceError):
                    await again
            nursery.cancel_scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer.send_all, MORE_THAN_FITS)
            await wait_all_tasks_blocked()
            for again in (
                writer.send_all(b"x"),
                writer.wait_send_all_might_not_block(),
                wait_writable(write_end),
            ):
                with pytest.raises(trio.BusyResourceError):
                    await again
            nursery.cancel_scope.cancel()


# --- notify_closing -------------------------------------------------------------------------


async def expect_closed(awaitable: Awaitable[object]) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await awaitable


async def test_notify_closing_of_raw_fds() -> None:
    """It wakes all tasks that wait to read or write, and the file can be waited for again."""
    left, right = stdlib_socket.socketpair()
    with left, right:
        fd = left.fileno()
        waits: list[Callable[[], Awaitable[Any]]] = [
            lambda: wait_readable(fd),
            lambda: wait_readable(left),
            lambda: perform(operations.recv(fd, bytearray(10))),
            lambda: perform(operations.read(fd, bytearray(10), -1, cancellable=True)),
            lambda: perform(operations.poll_add(fd, 1)),
        ]
        for wait in waits:
            for closing in (fd, left):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(expect_closed, wait())
                    await wait_all_tasks_blocked()
                    notify_closing(closing)


async def test_notify_closing_wakes_readers_and_writers() -> None:
    left, right = trio.socket.socketpair()
    with left, right:
        fill(left)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(expect_closed, left.recv(10))
            nursery.start_soon(expect_closed, wait_writable(left))
            for _ in range(3):  # polls are not exclusive
                nursery.start_soon(expect_closed, perform(operations.poll_add(left.fileno(), 1)))
            await wait_all_tasks_blocked()
            notify_closing(left)


async def test_duplicates_are_left_alone() -> None:
    """They refer to the same file, but nobody closes them."""
    left, right = trio.socket.socketpair()
    with left, left.dup() as duplicate, right:
        async with trio.open_nursery() as nursery:
            received: list[bytes] = []

            async def receive() -> None:
                received.append(await duplicate.recv(10))

            nursery.start_soon(expect_closed, left.recv(10))
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            left.close()
            await wait_all_tasks_blocked()
            assert not received
            await right.send(b"x")
        assert received == [b"x"]


async def test_numbers_that_are_no_fds_are_left_alone() -> None:
    """In some operations the field fd has the flags of a futex, or a process ID."""
    futex = bytearray(4)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.futex_wait(futex, 0))
        nursery.start_soon(perform, operations.futex_waitv([(futex, 0)]))
        await wait_all_tasks_blocked()
        for number in (0, 2):  # what these two have there
            notify_closing(number)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 2
        assert await perform(operations.futex_wake(futex, 2)) == 2


def test_what_was_forgotten_lets_go_before_others_are_refused() -> None:
    waiters = FdWaiters(Readiness())
    first, second = (
        FdReservation(operations.recv(5, bytearray(1)), lambda: None) for _ in range(2)
    )
    waiters.register(first)
    with pytest.raises(trio.BusyResourceError):
        waiters.register(second)
    waiters.forgotten.extend([lambda: None, lambda: waiters.unregister(first)])
    waiters.register(second)
    assert waiters == {5: [second]}
    assert not waiters.forgotten
    waiters._readiness.close()


@pytest.mark.parametrize("fds", [(0, 5), (5, 0), (1, 5), (5, 1)])
def test_every_fd_of_an_operation_is_watched(fds: tuple[int, int]) -> None:
    """Also 0, which belongs to whatever took the place of stdin."""
    waiters, closed = FdWaiters(Readiness()), list[int]()
    waiter = FdReservation(operations.splice(*fds, 1), lambda: closed.append(1))
    waiters.register(waiter)
    assert waiters == {fd: [waiter] for fd in fds}
    for fd in fds:
        waiters[fd][0].fd_closing()
    assert len(closed) == 2
    waiters.unregister(waiter)
    assert waiters == {}
    waiters._readiness.close()
