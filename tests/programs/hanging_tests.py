"""Tests that hang, for `tests/kernel/test_timeouts.py`, which shows that only they fail."""

from __future__ import annotations

import threading

import pytest
import trio
from children import in_child, in_thread

import trio_uring
from trio_uring import RingConfig

pytestmark = pytest.mark.timeout(1, func_only=True)


async def receive_nothing() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        await ours.recv(1)


async def test_receiving() -> None:
    await receive_nothing()


async def test_receiving_in_a_child_task() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive_nothing)


async def test_polling() -> None:
    while True:
        await trio.lowlevel.checkpoint()


def test_run_of_its_own() -> None:
    trio_uring.run(receive_nothing, ring=RingConfig(require=True))


def test_thread() -> None:
    in_thread(threading.Event().wait)


def test_child() -> None:
    in_child(threading.Event().wait)


@pytest.mark.timeout(300)
async def test_that_works() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        await ours.send(b"x")
        assert await theirs.recv(1) == b"x"
