"""Sockets with the fd 0, as inetd passes them, are used as any others."""

from __future__ import annotations

import os
import socket as stdlib_socket
import tempfile
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio
from races import driven
from transfers import RUNS, all_of, closing
from trio.testing import wait_all_tasks_blocked

from trio_uring import receive_file, relay, send_file

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA: Final = os.urandom(300_000)


@contextmanager
def at_fd_0(fd: int) -> Iterator[None]:
    """Make *fd* the fd 0, and close it."""
    saved = os.dup(0)
    os.dup2(fd, 0)
    os.close(fd)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@contextmanager
def connected() -> Iterator[tuple[trio.socket.SocketType, trio.socket.SocketType]]:
    """Yield both ends of a connection; the first has the fd 0."""
    ours, theirs = stdlib_socket.socketpair()
    with at_fd_0(ours.detach()), trio.socket.from_stdlib_socket(theirs) as peer:
        inherited = trio.socket.from_stdlib_socket(stdlib_socket.socket(fileno=0))
        try:
            yield inherited, peer
        finally:
            inherited.detach()


@pytest.mark.parametrize("run", RUNS)
def test_streams(run: str) -> None:
    async def main() -> None:
        with connected() as (ours, theirs):
            stream, peer = trio.SocketStream(ours), trio.SocketStream(theirs)
            await stream.send_all(b"hello")
            assert await peer.receive_some() == b"hello"
            await peer.send_all(b"hello")
            assert await stream.receive_some() == b"hello"

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_transfers(run: str) -> None:
    async def main() -> None:
        with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as target:
            file.write(DATA)
            file.flush()
            with connected() as (ours, theirs):
                stream, peer = trio.SocketStream(ours), trio.SocketStream(theirs)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send_file, stream, file)
                    assert await receive_file(peer, target, count=len(DATA)) == len(DATA)
            for receive in (partial(receive_file, file=target), relay_to_another):
                with connected() as (ours, theirs):
                    stream, peer = trio.SocketStream(ours), trio.SocketStream(theirs)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(closing, peer, partial(send_file, peer, file))
                        assert await receive(stream) == len(DATA)
            assert os.pread(target.fileno(), len(DATA) + 1, 0) == DATA

    RUNS[run](main)


async def relay_to_another(stream: trio.SocketStream) -> int:
    received: list[bytes] = []
    ours, theirs = map(trio.SocketStream, trio.socket.socketpair())

    async def receive() -> None:
        received.append(await all_of(theirs))

    async with theirs, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await closing(ours, partial(relay, stream, ours))
    return len(received[0])


async def test_shutting_down_in_the_turn_of_a_send() -> None:
    with connected() as (ours, theirs):

        def shut_down() -> None:
            ours.shutdown(stdlib_socket.SHUT_WR)

        assert await driven(ours.send(b"x"), parked=shut_down) == 1
        assert await theirs.recv(10) == b"x"
        assert await theirs.recv(10) == b""


async def test_detaching() -> None:
    closed = []

    async def receive(sock: trio.socket.SocketType) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await sock.recv(10)
        closed.append(True)

    with connected() as (ours, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, ours)
            await wait_all_tasks_blocked()
            assert ours.detach() == 0
            await wait_all_tasks_blocked()
            assert closed == [True]
