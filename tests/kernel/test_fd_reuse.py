"""Operations on a closed file never act on the next file that gets its fd."""

from __future__ import annotations

import os
import socket as stdlib_socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest
import trio
from accounting import open_fds
from races import driven
from trio.lowlevel import FdStream
from trio.testing import wait_all_tasks_blocked

from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ROUNDS: Final = 1000

pytestmark = pytest.mark.usefixtures("fd_ledger")

# What the file with the old number must still have in it.
UNTOUCHED: Final = b"for the new file"


class Successor:
    """A connected socket pair, one end of which gets the fd of a file that was closed."""

    def __init__(self, number: int) -> None:
        assert number not in open_fds()
        left, self.other = stdlib_socket.socketpair()
        if left.fileno() == number:
            self.sock = left
        else:
            os.dup2(left.fileno(), number, inheritable=False)
            left.close()
            self.sock = stdlib_socket.socket(fileno=number)
        assert self.sock.fileno() == number
        self.other.send(UNTOUCHED)

    def check(self) -> None:
        """Fail if anybody received from it or sent to it. Close it."""
        self.other.shutdown(stdlib_socket.SHUT_WR)
        assert self.sock.recv(100) == UNTOUCHED
        self.sock.close()
        assert self.other.recv(100) == b""
        self.other.close()


class Replaced:
    """When called for the first time, closes a file and makes another one that gets its fd."""

    def __init__(self, file: trio.socket.SocketType | FdStream) -> None:
        self.file = file
        self.successor: Successor | None = None

    def __call__(self) -> None:
        if self.successor is None:
            number = self.file.fileno()
            self.file.close()
            self.successor = Successor(number)

    def check(self) -> None:
        assert self.successor is not None
        self.successor.check()


def connected() -> tuple[trio.socket.SocketType, stdlib_socket.socket]:
    ours, theirs = stdlib_socket.socketpair()
    return trio.socket.from_stdlib_socket(ours), theirs


RECEIVES: Final[list[Callable[[trio.socket.SocketType], Awaitable[object]]]] = [
    lambda sock: sock.recv(100),
    lambda sock: sock.recv_into(bytearray(100)),
    lambda sock: sock.recvfrom(100),
    lambda sock: sock.recvfrom_into(bytearray(100)),
    lambda sock: sock.recvmsg(100),
    lambda sock: sock.recvmsg_into([bytearray(100)]),
    lambda sock: sock.recv(100_000),
]
# Those that are in the SQ while they wait.
SUBMITTED_RECEIVES: Final[list[Callable[[trio.socket.SocketType], Awaitable[object]]]] = [
    lambda sock: sock.recv(100),
    lambda sock: perform(operations.recv(sock.fileno(), bytearray(100))),
    lambda sock: perform(operations.recvmsg(sock.fileno(), [bytearray(100)])),
]
SENDS: Final[list[Callable[[trio.socket.SocketType], Awaitable[object]]]] = [
    lambda sock: sock.send(b"x"),
    lambda sock: sock.sendmsg([b"x"]),
    lambda sock: trio.SocketStream(sock).send_all(b"x"),
    lambda sock: perform(operations.send(sock.fileno(), b"x")),
]


async def test_an_operation_on_a_closed_fd_does_not_act_on_its_successor() -> None:
    for number in range(ROUNDS):
        receive = RECEIVES[number % len(RECEIVES)]
        sock, theirs = connected()
        replaced = Replaced(sock)

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await receive(sock)

        with theirs:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                replaced()
        replaced.check()


async def test_the_successor_is_not_busy() -> None:
    """Nor does its data wake tasks that waited for the old file."""
    sock, theirs = connected()
    replaced = Replaced(sock)

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await sock.recv(100)

    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            replaced()
            assert replaced.successor is not None
            new = trio.socket.from_stdlib_socket(replaced.successor.sock)
            with new, replaced.successor.other:
                assert await new.recv(100) == UNTOUCHED


@pytest.mark.parametrize("operate", [*SUBMITTED_RECEIVES, *SENDS])
async def test_an_operation_on_an_fd_closed_before_it_was_submitted_spares_its_successor(
    operate: Callable[[trio.socket.SocketType], Awaitable[object]],
) -> None:
    """The SQE is in the SQ, the kernel has not seen it, and the fd is closed and reused."""
    for _ in range(ROUNDS // 5):
        sock, theirs = connected()
        replaced = Replaced(sock)
        with theirs, suppress(trio.ClosedResourceError):
            await driven(operate(sock), parked=replaced)
        replaced.check()


async def test_other_operations_on_a_closed_fd_before_they_are_submitted() -> None:
    """No task waits for this fd, so nothing needs to be cancelled. Submitting is enough."""
    for _ in range(ROUNDS):
        sock, theirs = connected()
        replaced = Replaced(sock)
        with theirs:
            await driven(sock.send(b"for the old file"), parked=replaced)
            assert theirs.recv(100) == b"for the old file"
        replaced.check()


@pytest.mark.ring(receive_buffers=1)
@pytest.mark.parametrize(
    "operate", [RECEIVES[0], lambda sock: trio.SocketStream(sock).receive_some()]
)
async def test_an_fd_closed_between_two_attempts_to_receive_is_left_alone(
    operate: Callable[[trio.socket.SocketType], Awaitable[object]],
) -> None:
    """After ENOBUFS it would receive again, but the fd now belongs to another socket."""
    for _ in range(ROUNDS // 5):
        sock, theirs = connected()
        replaced = Replaced(sock)
        taker, giver = connected()

        async def receive() -> None:
            # As on Trio: the file is asked again, and says that it is closed.
            with suppress(trio.ClosedResourceError, OSError):
                await driven(operate(sock), woken=replaced)

        with theirs, giver, taker:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(taker.recv, 10)
                await wait_all_tasks_blocked()
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                giver.send(b"takes the buffer")
                theirs.send(b"finds none")
        replaced.check()


@pytest.mark.ring(receive_buffers=1)
async def test_a_pipe_closed_between_two_attempts_to_receive_is_left_alone() -> None:
    for _ in range(ROUNDS // 5):
        read_end, write_end = os.pipe()
        stream = FdStream(read_end)
        replaced = Replaced(stream)
        taker, giver = connected()

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await driven(stream.receive_some(), woken=replaced)

        with giver, taker:
            async with FdStream(write_end), trio.open_nursery() as nursery:
                nursery.start_soon(taker.recv, 10)
                await wait_all_tasks_blocked()
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                giver.send(b"takes the buffer")
                os.write(write_end, b"finds none")
        replaced.check()


async def test_a_pipe_closed_between_two_writes_is_left_alone() -> None:
    """A part of the data is written. The rest must not go to another file."""
    for _ in range(ROUNDS):
        read_end, write_end = os.pipe()
        stream = FdStream(write_end)
        replaced = Replaced(stream)

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await driven(stream.send_all(bytes(70_000)), woken=replaced)

        async with FdStream(read_end), trio.open_nursery() as nursery:
            nursery.start_soon(send)
        replaced.check()
