"""Cancelling many operations at once, twice, with full queues, and with shared buffers."""

from __future__ import annotations

import errno
import os
import random
import socket as stdlib_socket
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger, Rounds
from races import Order, current_manager, every_order, race
from trio.lowlevel import FdStream
from trio.testing import wait_all_tasks_blocked

from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

ROUNDS: Final = 2000
CROWD: Final = 60
CROWD_ROUNDS: Final = 50

pytestmark = pytest.mark.usefixtures("fd_ledger")


class Pair:
    """Two connected sockets. What one end sends must arrive at the other."""

    def __init__(self) -> None:
        ours, self.theirs = stdlib_socket.socketpair()
        self.sock = trio.socket.from_stdlib_socket(ours)
        self.ledger = ByteLedger()

    def send(self) -> None:
        self.theirs.send(self.ledger.take(10))

    async def receive(self) -> None:
        self.ledger.received(await self.sock.recv(65536))


@contextmanager
def pairs(count: int) -> Iterator[list[Pair]]:
    with ExitStack() as stack:
        made = [Pair() for _ in range(count)]
        for pair in made:
            stack.enter_context(pair.sock)
            stack.enter_context(pair.theirs)
        yield made


# --- A crowd --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(256, id="room for all"),
        pytest.param(8, id="SQ full", marks=pytest.mark.ring(entries=8)),
        pytest.param(
            8,
            id="SQ full and CQ overflow",
            marks=pytest.mark.ring(entries=8, completion_entries=8),
        ),
        pytest.param(256, id="few buffers", marks=pytest.mark.ring(receive_buffers=4)),
    ],
)
async def test_cancelling_a_crowd_of_receives_loses_no_byte(rounds: Rounds, entries: int) -> None:
    """A third has its data, a third gets it with the cancellation, and a third gets none."""
    assert current_manager().ring.entries == entries

    async def receive(pair: Pair, scope: trio.CancelScope) -> None:
        with scope:
            await pair.receive()
            rounds.add("late" if scope.cancel_called else "completed")
        if scope.cancelled_caught:
            rounds.add("cancelled")

    with pairs(CROWD) as crowd:
        third = CROWD // 3
        for _ in range(CROWD_ROUNDS):
            scopes = [trio.CancelScope() for _ in crowd]
            async with trio.open_nursery() as nursery:
                for pair, scope in zip(crowd, scopes, strict=True):
                    nursery.start_soon(receive, pair, scope)
                await wait_all_tasks_blocked()
                for pair in crowd[:third]:
                    pair.send()
                await wait_all_tasks_blocked()
                for pair in crowd[third : 2 * third]:
                    pair.send()
                current_manager().ring.flush()
                for scope in scopes:
                    scope.cancel()
            for pair in crowd:
                while pair.ledger.missing:  # it found no buffer, and then was cancelled
                    await pair.receive()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.ring(entries=8, completion_entries=16, receive_buffers=4)
async def test_random_orders_of_sends_receives_and_cancels_lose_no_byte(
    rounds: Rounds, seed: int
) -> None:
    """Whatever the order of sends, receives, cancellations and enters, no byte is lost."""
    choose = random.Random(seed)
    receiving: dict[Pair, trio.CancelScope] = {}

    async def receive(pair: Pair) -> None:
        with receiving[pair] as scope:
            await pair.receive()
            rounds.add("late" if scope.cancel_called else "completed")
        if scope.cancelled_caught:
            rounds.add("cancelled")
        del receiving[pair]

    with pairs(CROWD) as crowd:
        async with trio.open_nursery() as nursery:
            for _ in range(20 * ROUNDS):
                pair = choose.choice(crowd)
                match choose.choice(("send", "receive", "cancel", "flush", "turn")):
                    case "send" if pair.ledger.missing < 1000:
                        pair.send()
                    case "receive" if pair not in receiving:
                        receiving[pair] = trio.CancelScope()
                        nursery.start_soon(receive, pair)
                    case "cancel" if pair in receiving:
                        receiving[pair].cancel()
                    case "flush":
                        current_manager().ring.flush()
                    case _:
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        for pair in crowd:
            while pair.ledger.missing:
                await pair.receive()


async def test_a_receive_that_is_cancelled_twice_loses_no_byte(rounds: Rounds) -> None:
    """By two scopes, and by an operation that cancels everything on the ring."""
    with pairs(1) as [pair]:
        for number in range(ROUNDS):
            ready, unseen, cancelled = number % 3 == 0, number % 3 == 1, number % 3 != 0
            outer, inner = trio.CancelScope(), trio.CancelScope()

            async def receive() -> None:
                with outer, inner:
                    await pair.receive()
                    rounds.add("late" if outer.cancel_called else "completed")
                if outer.cancelled_caught or inner.cancelled_caught:
                    rounds.add("cancelled")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                if ready or unseen:
                    pair.send()
                if unseen:
                    current_manager().ring.flush()
                if cancelled:
                    inner.cancel()
                    outer.cancel()
            assert not pair.ledger.missing


# --- Provided buffers -----------------------------------------------------------------------


BUFFERS: Final = 8


async def receives_without_buffer(count: int) -> int:
    """Make *count* receives complete in one loop iteration. Return how many found no buffer."""
    buffers = current_manager().buffers
    assert buffers is not None
    failures: list[OSError] = []

    async def receive(sock: trio.socket.SocketType) -> None:
        try:
            await perform(operations.recv_once(sock.fileno(), buffers, 10))
        except OSError as exc:
            failures.append(exc)

    with pairs(count) as crowd:
        async with trio.open_nursery() as nursery:
            for pair in crowd:
                nursery.start_soon(receive, pair.sock)
            await wait_all_tasks_blocked()
            for pair in crowd:
                pair.theirs.send(b"x")
    assert all(exc.errno == errno.ENOBUFS for exc in failures)
    return len(failures)


async def check_that_no_buffer_is_lost() -> None:
    assert await receives_without_buffer(BUFFERS) == 0
    assert await receives_without_buffer(BUFFERS + 1) == 1


@pytest.mark.ring(receive_buffers=BUFFERS)
async def test_buffers_of_cancelled_receives(rounds: Rounds) -> None:
    with pairs(1) as [pair]:
        for order in every_order(ROUNDS):
            await race(rounds, order, pair.receive, pair.send)
            if pair.ledger.missing:
                await pair.receive()
    await check_that_no_buffer_is_lost()


@pytest.mark.ring(receive_buffers=BUFFERS)
async def test_buffers_of_cancelled_messages(rounds: Rounds) -> None:
    ours, theirs = stdlib_socket.socketpair(type=stdlib_socket.SOCK_DGRAM)
    with theirs, trio.socket.from_stdlib_socket(ours) as sock:
        for number, order in enumerate(every_order(ROUNDS)):
            data = b"x" * (number % 3)  # an empty datagram takes a buffer too
            outcome = await race(
                rounds, order, lambda: sock.recvfrom(10), lambda: theirs.send(data)
            )
            if not outcome and order is Order.READY_UNNOTICED:
                assert await sock.recv(10) == data
    await check_that_no_buffer_is_lost()


@pytest.mark.ring(receive_buffers=BUFFERS)
async def test_buffers_of_cancelled_reads_of_pipes(rounds: Rounds) -> None:
    read_end, write_end = os.pipe()
    async with FdStream(read_end) as stream, FdStream(write_end):
        for order in every_order(ROUNDS):
            outcome = await race(
                rounds, order, stream.receive_some, lambda: os.write(write_end, b"x")
            )
            if not outcome and order is Order.READY_UNNOTICED:
                assert await stream.receive_some() == b"x"
    await check_that_no_buffer_is_lost()


async def end_of_stream(pair: Pair) -> None:
    pair.theirs.close()
    assert await pair.sock.recv(10) == b""


async def connection_reset(pair: Pair) -> None:
    # A UNIX socket that is closed with data unread resets the connection.
    await pair.sock.send(b"unread")
    pair.theirs.close()
    with pytest.raises(ConnectionResetError):
        await pair.sock.recv(10)


async def closed(pair: Pair) -> None:
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await pair.sock.recv(10)

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        pair.sock.close()


async def peeked(pair: Pair) -> None:
    pair.send()
    assert len(await pair.sock.recv(100, stdlib_socket.MSG_PEEK)) == 10


async def not_connected(_pair: Pair) -> None:
    with trio.socket.socket() as sock, pytest.raises(OSError, match="not connected"):
        await sock.recv(10)


@pytest.mark.parametrize(
    "receive",
    [end_of_stream, connection_reset, closed, peeked, not_connected],
    ids=lambda receive: receive.__name__,
)
@pytest.mark.ring(receive_buffers=BUFFERS)
async def test_buffers_of_receives_without_data(
    receive: Callable[[Pair], Awaitable[Any]],
) -> None:
    for _ in range(2 * BUFFERS):
        with pairs(1) as [pair]:
            await receive(pair)
    await check_that_no_buffer_is_lost()
