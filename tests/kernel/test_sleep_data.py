"""While a task waits on the ring, its ``custom_sleep_data`` says for which operation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio
from trio.lowlevel import current_task
from trio.testing import wait_all_tasks_blocked

from trio_uring import accept_many
from trio_uring._kernel.uapi import Opcode
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

HOUR_NS = 3600 * 10**9


async def waits_for(function: Callable[[], Awaitable[object]]) -> tuple[str, int]:
    """Return the opcode and fd of the operation that *function* waits for, and cancel it."""
    tasks = []

    async def wait() -> None:
        tasks.append(current_task())
        await function()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        [task] = tasks
        operation = task.custom_sleep_data.operation
        nursery.cancel_scope.cancel()
    assert task.custom_sleep_data is None
    return Opcode(operation.opcode).name, operation.fd


async def test_a_socket_that_receives() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        assert (await waits_for(lambda: a.recv(1)))[0] == "RECV"
        assert (await waits_for(trio.SocketStream(a).receive_some))[0] == "RECV"


async def test_an_operation() -> None:
    opcode, _ = await waits_for(lambda: perform(operations.timeout(HOUR_NS)))
    assert opcode == "TIMEOUT"
    read, write = os.pipe()
    waited = await waits_for(lambda: perform(operations.read(read, bytearray(1), -1)))
    assert waited == ("READ", read)
    os.close(read)
    os.close(write)


async def test_a_multishot_operation() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, accept_many(listener) as connections:

        async def accept() -> None:
            async for _ in connections:
                raise AssertionError

        opcode, fd = await waits_for(accept)
        assert (opcode, fd) == ("ACCEPT", listener.socket.fileno())


async def test_it_is_gone_when_the_operation_is_done() -> None:
    await perform(operations.nop())
    assert current_task().custom_sleep_data is None
