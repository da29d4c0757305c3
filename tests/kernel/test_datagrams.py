"""Datagrams: received and sent to an address by Python's socket, as soon as that need not wait."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import steps_beside
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# As good as for ever: whatever may be done within a turn's budget, is.
AMPLE: Final = 1.0
COUNT: Final = 8

HOSTS: Final = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}

SENDS: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "sendto": lambda sock, address: sock.sendto(b"x", address),
    "sendto, with flags": lambda sock, address: sock.sendto(b"x", 0, address),
}
RECEIVES: Final[dict[str, Callable[[Any], Any]]] = {
    "recv": lambda sock: sock.recv(10),
    "recv_into": lambda sock: sock.recv_into(bytearray(10)),
    "recvfrom": lambda sock: sock.recvfrom(10),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(10)),
    "recvmsg": lambda sock: sock.recvmsg(10),
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(10)]),
}


pytestmark = pytest.mark.usefixtures("no_deterministic_scheduling")


@contextmanager
def sockets(family: socket.AddressFamily = socket.AF_INET) -> Iterator[tuple[Any, Any]]:
    """Give a socket of Trio's and one of Python's, each with an address."""
    kind = socket.SOCK_DGRAM
    with trio.socket.socket(family, kind) as ours, socket.socket(family, kind) as theirs:
        ours._sock.bind((HOSTS[family], 0))  # type: ignore[attr-defined]
        theirs.bind((HOSTS[family], 0))
        yield ours, theirs


async def steps_beside_receives(receive: Callable[[Any], Any]) -> int:
    with sockets() as (ours, theirs):
        for _ in range(COUNT):
            theirs.sendto(b"x", ours.getsockname())
        return await steps_beside(lambda: receive(ours), COUNT)


async def steps_beside_sends(send: Callable[[Any, Any], Any]) -> int:
    with sockets() as (ours, theirs):
        address = theirs.getsockname()
        return await steps_beside(lambda: send(ours, address), COUNT)


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES)
async def test_datagrams_that_are_there_share_a_turn(receive: Callable[[Any], Any]) -> None:
    assert await steps_beside_receives(receive) == 0


@pytest.mark.ring(turn_budget=0)
@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES)
async def test_without_a_budget_each_receive_is_a_schedule_point(
    receive: Callable[[Any], Any],
) -> None:
    assert await steps_beside_receives(receive) >= COUNT - 1


@pytest.mark.ring(turn_budget=AMPLE)
@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_datagrams_that_are_sent_share_a_turn(send: Callable[[Any, Any], Any]) -> None:
    assert await steps_beside_sends(send) == 0


@pytest.mark.ring(turn_budget=0)
@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS)
async def test_without_a_budget_each_send_is_a_schedule_point(
    send: Callable[[Any, Any], Any],
) -> None:
    assert await steps_beside_sends(send) >= COUNT - 1


@pytest.mark.ring(turn_budget=AMPLE)
async def test_a_call_that_need_not_wait_counts_as_a_checkpoint() -> None:
    with sockets() as (ours, theirs):
        with assert_checkpoints():
            await ours.sendto(b"x", theirs.getsockname())
        theirs.sendto(b"x", ours.getsockname())
        with assert_checkpoints():
            assert await ours.recvfrom(10) == (b"x", theirs.getsockname())


async def check_failures() -> None:
    with sockets() as (ours, _):
        with assert_checkpoints(), pytest.raises(TypeError):
            await ours.recvfrom("ten")
        with assert_checkpoints(), pytest.raises(PermissionError):
            await ours.sendto(b"x", ("255.255.255.255", 9))


@pytest.mark.ring(turn_budget=AMPLE)
async def test_a_call_that_fails_counts_as_a_checkpoint() -> None:
    await check_failures()


@pytest.mark.ring(turn_budget=0)
async def test_a_call_that_fails_is_a_checkpoint_without_a_budget() -> None:
    await check_failures()


async def test_a_cancelled_task_neither_receives_nor_sends() -> None:
    with sockets() as (ours, theirs):
        theirs.sendto(b"x", ours.getsockname())
        with trio.CancelScope() as scope:
            scope.cancel()
            await ours.recvfrom(10)
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await ours.sendto(b"x", theirs.getsockname())
        assert scope.cancelled_caught
        assert await ours.recvfrom(10) == (b"x", theirs.getsockname())
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(10)


@pytest.mark.parametrize("family", HOSTS)
async def test_a_server(family: socket.AddressFamily) -> None:
    async def serve(server: Any) -> None:
        while True:
            await server.sendto(*await server.recvfrom(10))

    with sockets(family) as (ours, theirs):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, ours)
            await wait_all_tasks_blocked()
            client = trio.socket.from_stdlib_socket(theirs)
            for data in (b"a", b"", b"b"):
                await client.sendto(data, ours.getsockname())
                assert await client.recvfrom(10) == (data, ours.getsockname())
            await client.sendto(b"c", (HOSTS[family], ours.getsockname()[1]))
            assert await client.recvfrom(10) == (b"c", ours.getsockname())
            nursery.cancel_scope.cancel()


async def test_a_name_is_resolved() -> None:
    with sockets() as (ours, theirs):
        await ours.sendto(b"x", ("localhost", theirs.getsockname()[1]))
        assert theirs.recv(10) == b"x"
        await ours.sendto(b"y", ("127.0.0.1", str(theirs.getsockname()[1])))
        assert theirs.recv(10) == b"y"


async def test_a_second_receive_is_refused() -> None:
    with sockets() as (ours, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.recvfrom, 10)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await ours.recvfrom(10)
            nursery.cancel_scope.cancel()


async def test_a_refused_datagram_is_the_next_call_s_error() -> None:
    with sockets() as (ours, theirs):
        await ours.connect(theirs.getsockname())
        theirs.close()
        await ours.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            await ours.recv(10)
