"""Peers that are killed, or stopped and continued by signals, while operations are in flight."""

from __future__ import annotations

import os
import signal
import socket as stdlib_socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from accounting import ByteLedger
from children import clean_environment
from races import current_manager
from trio.testing import wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("fd_ledger")

SERVER: Final = Path(__file__).parent.parent / "programs" / "echo_server.py"

CONNECTIONS: Final = 50
MORE_THAN_SOCKETS_HOLD: Final = 20_000_000


@contextmanager
def echo_server() -> Iterator[tuple[int, int]]:
    """Run a server with a ring of its own. Yield its process id and its port."""
    with subprocess.Popen(
        [sys.executable, SERVER], env=clean_environment(), stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


async def exchange(stream: trio.SocketStream, ledger: ByteLedger, size: int) -> None:
    """Send *size* bytes and receive their echo."""

    async def send() -> None:
        await stream.send_all(ledger.take(size))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await receive(stream, ledger, size)


async def receive(stream: trio.SocketStream, ledger: ByteLedger, size: int) -> None:
    while size:
        data = await stream.receive_some(size)
        assert data
        ledger.received(data)
        size -= len(data)


# --- Killed ---------------------------------------------------------------------------------


async def test_whoever_waits_for_a_killed_peer_is_told() -> None:
    told = 0

    async def wait(stream: trio.SocketStream) -> None:
        nonlocal told
        async with stream:
            with suppress(trio.BrokenResourceError):  # if it had not read all that it was sent
                assert not await stream.receive_some()
            told += 1

    async def send(stream: trio.SocketStream) -> None:
        async with stream:
            with pytest.raises(trio.BrokenResourceError):
                await stream.send_all(bytes(MORE_THAN_SOCKETS_HOLD))

    with echo_server() as (pid, port):
        async with trio.open_nursery() as nursery:
            for _ in range(CONNECTIONS):
                nursery.start_soon(wait, await trio.open_tcp_stream("127.0.0.1", port))
            nursery.start_soon(send, await trio.open_tcp_stream("127.0.0.1", port))
            await wait_all_tasks_blocked()
            os.kill(pid, signal.SIGKILL)
    assert told == CONNECTIONS
    assert current_manager().statistics().in_flight == 0


async def test_the_port_of_a_killed_server_is_free_at_once() -> None:
    """An operation in flight would hold the listener for some milliseconds."""
    for _ in range(5):
        with echo_server() as (pid, port):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await exchange(stream, ByteLedger(), 100)
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            stdlib_socket.create_server(("127.0.0.1", port)).close()


# --- Stopped --------------------------------------------------------------------------------


async def test_a_server_that_is_stopped_goes_on_where_it_was() -> None:
    with echo_server() as (pid, port):
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            ledger = ByteLedger()
            for number in range(50):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(exchange, stream, ledger, 1 + number * 10_000)
                    if number % 2:
                        await trio.lowlevel.checkpoint()
                    os.kill(pid, signal.SIGSTOP)
                    await trio.lowlevel.checkpoint()
                    os.kill(pid, signal.SIGCONT)
            assert not ledger.missing


async def test_a_stopped_peer_delays_only_those_who_send_to_it() -> None:
    with echo_server() as (stopped, port), echo_server() as (_, other_port):
        async with (
            await trio.open_tcp_stream("127.0.0.1", port) as stream,
            await trio.open_tcp_stream("127.0.0.1", other_port) as other,
        ):
            os.kill(stopped, signal.SIGSTOP)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, bytes(MORE_THAN_SOCKETS_HOLD))
                await exchange(other, ByteLedger(), 1_000_000)
                await wait_all_tasks_blocked()
                assert nursery.child_tasks  # it still waits, and can be cancelled
                nursery.cancel_scope.cancel()
            os.kill(stopped, signal.SIGCONT)
    assert current_manager().statistics().in_flight == 0


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("method", ["send", "sendmsg"])
async def test_sending_to_a_closed_peer_raises_no_signal(method: str, busy: bool) -> None:
    """It would kill a process that has made SIGPIPE do so."""
    ours, theirs = stdlib_socket.socketpair()
    theirs.close()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPIPE])  # then one remains pending
    try:
        with trio.socket.from_stdlib_socket(ours) as sock:
            async with trio.open_nursery() as nursery:
                await wait_all_tasks_blocked()
                if busy:  # then it is sent on the ring
                    nursery.start_soon(trio.lowlevel.checkpoint)
                with pytest.raises(BrokenPipeError):
                    await getattr(sock, method)(b"x" if method == "send" else [b"x"])
        assert signal.SIGPIPE not in signal.sigpending()
    finally:
        if signal.SIGPIPE in signal.sigpending():
            signal.sigwait([signal.SIGPIPE])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPIPE])
