"""More receives at once than there are buffers: all of them are served, and fairly."""

from __future__ import annotations

import os
import socket as stdlib_socket
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

import pytest
import trio
from anyio._backends import _trio as anyio_trio
from trio.lowlevel import FdStream, checkpoint
from trio.testing import wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.usefixtures("fd_ledger")

CROWD: Final = 600  # more than RingConfig.receive_buffers, and than the SQ has entries
TURNS: Final = 60
BLOCK: Final = bytes(100)


def sockets(stack: ExitStack) -> tuple[Callable[[], Awaitable[bytes]], Callable[[], object]]:
    ours, theirs = stdlib_socket.socketpair()
    stack.enter_context(theirs)
    sock = stack.enter_context(trio.socket.from_stdlib_socket(ours))
    return lambda: sock.recv(len(BLOCK)), lambda: theirs.send(BLOCK)


def streams(stack: ExitStack) -> tuple[Callable[[], Awaitable[bytes]], Callable[[], object]]:
    ours, theirs = stdlib_socket.socketpair()
    stack.enter_context(theirs)
    stream = trio.SocketStream(stack.enter_context(trio.socket.from_stdlib_socket(ours)))
    return lambda: stream.receive_some(len(BLOCK)), lambda: theirs.send(BLOCK)


def pipes(stack: ExitStack) -> tuple[Callable[[], Awaitable[bytes]], Callable[[], object]]:
    read_end, write_end = os.pipe()
    stack.callback(os.close, write_end)
    stream = FdStream(read_end)
    stack.callback(stream.close)
    return lambda: stream.receive_some(len(BLOCK)), lambda: os.write(write_end, BLOCK)


def anyio_streams(
    stack: ExitStack,
) -> tuple[Callable[[], Awaitable[bytes]], Callable[[], object]]:
    ours, theirs = stdlib_socket.socketpair()
    stack.enter_context(theirs)
    sock = stack.enter_context(trio.socket.from_stdlib_socket(ours))
    stream = anyio_trio.SocketStream(sock)
    return lambda: stream.receive(len(BLOCK)), lambda: theirs.send(BLOCK)


KINDS: Final = [sockets, streams, pipes, anyio_streams]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "_buffers",
    [
        pytest.param(count, marks=pytest.mark.ring(receive_buffers=count), id=f"{count} buffers")
        for count in (1, 16, 128)
    ],
)
async def test_a_crowd_that_always_has_data(
    kind: Callable[[ExitStack], tuple[Callable[[], Awaitable[bytes]], Callable[[], object]]],
    _buffers: int,
) -> None:
    received = [0] * CROWD

    async def receive(number: int, receive_some: Callable[[], Awaitable[bytes]]) -> None:
        while True:
            received[number] += len(await receive_some())

    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            gives: list[Callable[[], object]] = []
            for number in range(CROWD):
                receive_some, give = kind(stack)
                gives.append(give)
                for _ in range(3):
                    give()
                nursery.start_soon(receive, number, receive_some)
            for _ in range(TURNS):
                for give in gives:
                    give()
                await checkpoint()
            nursery.cancel_scope.cancel()
    assert min(received) >= TURNS // 4 * len(BLOCK)
    assert max(received) <= 2 * min(received)


LARGE_CROWD: Final = 2000  # more than one turn fetches


async def test_a_crowd_that_one_turn_cannot_fetch() -> None:
    """Those who are served ask again at once. They must not come before those who still wait."""
    received = [0] * LARGE_CROWD
    done = trio.Event()

    async def receive(number: int, receive_some: Callable[[], Awaitable[bytes]]) -> None:
        while True:
            received[number] += len(await receive_some()) // len(BLOCK)
            if received[number] == 10:
                done.set()

    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            gives: list[Callable[[], object]] = []
            for number in range(LARGE_CROWD):
                receive_some, give = streams(stack)
                gives.append(give)
                nursery.start_soon(receive, number, receive_some)
            await wait_all_tasks_blocked()
            for give in gives:
                for _ in range(12):
                    give()
            await done.wait()
            nursery.cancel_scope.cancel()
    assert min(received) >= 5
