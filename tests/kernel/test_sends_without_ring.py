"""Sends by the system call, where a send on the ring would need an enter of its own."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import pytest
import trio
from races import current_manager
from transfers import receive_exactly, warm_streams
from trio.testing import assert_checkpoints


def sent_now() -> int:
    """Return the number of sends by the system call, by either engine."""
    manager = current_manager()
    return manager.sent_now + (0 if manager.native is None else manager.native.sent_now)


def enters_so_far() -> int:
    return current_manager().ring.enters


async def test_a_task_that_is_alone_sends_by_a_system_call() -> None:
    async with warm_streams() as (a, b):
        sent, enters = sent_now(), enters_so_far()
        for _ in range(10):
            await a.send_all(b"x")
            assert await b.receive_some() == b"x"
        assert sent_now() - sent == 10
        assert enters_so_far() - enters <= 11  # only to receive


async def test_tasks_that_send_in_one_turn_share_an_enter() -> None:
    async with warm_streams() as (a, b), warm_streams() as (c, d):
        sent = sent_now()
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_all, b"x")
                nursery.start_soon(c.send_all, b"x")
            assert [await stream.receive_some() for stream in (b, d)] == [b"x", b"x"]
        # The one that runs last in a turn has found the other's send in the queue.
        assert sent_now() == sent


async def test_sends_that_are_queued_come_before_one_by_a_system_call() -> None:
    async with warm_streams() as (a, b):
        for _ in range(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_all, b"1")
                await trio.lowlevel.checkpoint()
                nursery.start_soon(a.socket.send, b"2")
            received = b""
            while len(received) < 2:
                received += await b.receive_some()
            assert received == b"12"


@pytest.mark.ring(turn_budget=0)
async def test_a_send_by_a_system_call_is_a_checkpoint() -> None:
    async with warm_streams() as (a, b):
        with assert_checkpoints():
            await a.send_all(b"x")
        with assert_checkpoints():
            assert await a.socket.send(b"y") == 1
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.send_all(b"not sent")
        assert scope.cancelled_caught
        assert await receive_exactly(b, 2) == b"xy"


@pytest.mark.usefixtures("no_deterministic_scheduling")
@pytest.mark.ring(turn_budget=1.0)
async def test_a_send_by_a_system_call_counts_as_a_checkpoint() -> None:
    async with warm_streams() as (a, b):
        with assert_checkpoints():
            await a.send_all(b"x")
        with assert_checkpoints():
            assert await a.socket.send(b"y") == 1
        assert await receive_exactly(b, 2) == b"xy"


async def test_a_failed_send_by_a_system_call() -> None:
    async with warm_streams() as (a, b):
        b.socket.close()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await a.send_all(b"x")
        assert isinstance(caught.value.__cause__, BrokenPipeError)
        with pytest.raises(BrokenPipeError):
            await a.socket.send(b"x")
        assert not a._send_conflict_detector._held


async def test_a_full_socket_and_a_send_by_a_system_call() -> None:
    data = random.Random(0).randbytes(3_000_000)
    async with warm_streams() as (a, b), trio.open_nursery() as nursery:
        nursery.start_soon(a.send_all, data)
        assert await receive_exactly(b, len(data)) == data


async def test_closed_in_the_turn_in_which_a_socket_proved_to_be_full() -> None:
    for _ in range(20):  # Trio's order of the two tasks is random
        async with warm_streams() as (a, _), trio.open_nursery() as nursery:
            with suppress(BlockingIOError):
                while True:
                    os.write(a.socket.fileno(), bytes(65536))

            @nursery.start_soon
            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await a.send_all(b"x")

            await trio.lowlevel.checkpoint()  # the result and the close come in the next turn
            a.socket.close()


@pytest.mark.ring(allowed_operations=frozenset({"RECV"}))
async def test_where_the_kernel_forbids_sends_none_is_made() -> None:
    left, right = trio.socket.socketpair()
    with left, right, pytest.raises(PermissionError):
        await left.send(b"x")
