"""In-flight entries are reused, and keep nothing alive while they are free."""

from __future__ import annotations

import gc
import os
import weakref
from typing import TYPE_CHECKING, Final

import pytest
import trio
from races import current_manager
from trio.testing import wait_all_tasks_blocked

from trio_uring import linked, perform_many
from trio_uring._engine._in_flight import InFlight
from trio_uring._kernel.uapi import Opcode
from trio_uring._operations._operation import count
from trio_uring.lowlevel import Operation, operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class Data(bytearray):
    """Bytes that support weak references."""


async def test_no_buffer_stays_alive() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        data = Data(b"data")
        gone = weakref.ref(data)
        assert await a.send(data) == 4
        del data
        assert gone() is None
        buffer = Data(4)
        gone = weakref.ref(buffer)
        assert await b.recv_into(buffer) == 4
        del buffer
        assert gone() is None


async def test_a_cancelled_operation_is_no_cyclic_garbage() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            with trio.move_on_after(0) as scope:
                await b.recv(1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.recv, 1)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            gc.collect()
            # Of earlier runs there may be some that takes the collector two rounds.
            entries = [entry for entry in gc.garbage if isinstance(entry, InFlight)]
            assert not [entry for entry in entries if entry.table is current_manager()]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert scope.cancelled_caught


async def test_what_happened_to_one_operation_says_nothing_about_the_next() -> None:
    """What happened to one operation says nothing about the next."""
    a, b = trio.socket.socketpair()
    with a, b:
        for _ in range(10):
            with trio.move_on_after(0) as scope:
                await b.recv(1)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(b.recv, 1)
                await wait_all_tasks_blocked()
                await a.send(b"1")  # completed by the time it is cancelled
                nursery.cancel_scope.cancel()
            await perform(operations.nop())
            await a.send(b"2")
            assert await b.recv(1) == b"2"


# --- An operation that is performed again ----------------------------------------------------

WAYS: Final[list[Callable[[Operation[int]], Awaitable[object]]]] = [
    perform,
    lambda operation: current_manager().perform_shielded(operation),
    lambda operation: perform_many([operation]),
    lambda operation: perform_many([operations.nop(), linked([operation])]),
]


@pytest.mark.parametrize("way", WAYS, ids=["perform", "shielded", "batch", "chain"])
@pytest.mark.parametrize("waits", [False, True])
async def test_an_operation_with_a_buffer_can_be_performed_once(
    way: Callable[[Operation[int]], Awaitable[object]], *, waits: bool
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"for one")
    buffer = bytearray(8)
    operation = operations.read(reader, buffer, -1, cancellable=waits)
    await perform(operation)
    buffer.clear()  # from here on the memory may be somebody else's
    os.write(writer, b"for nobody")
    with pytest.raises(RuntimeError, match="performed already"):
        await way(operation)
    assert os.read(reader, 99) == b"for nobody"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("way", WAYS[:2], ids=["perform", "shielded"])
async def test_an_operation_that_cannot_be_pushed_releases_its_buffer(
    way: Callable[[Operation[int]], Awaitable[object]],
) -> None:
    buffer = bytearray(8)
    operation = operations.recv(1 << 40, buffer)
    with pytest.raises(OverflowError):
        await way(operation)
    buffer.clear()
    with pytest.raises(RuntimeError, match="performed already"):
        await way(operation)


async def test_a_batch_that_cannot_be_pushed_uses_up_nothing() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        await b.send(b"data")
        operation = operations.recv(a.fileno(), bytearray(8))
        with pytest.raises(OverflowError):
            await perform_many([operation, operations.recv(1 << 40, bytearray(1))])
        assert await perform(operation) == 4


@pytest.mark.parametrize("way", WAYS, ids=["perform", "shielded", "batch", "chain"])
@pytest.mark.parametrize(
    "field",
    [
        *({"opcode": 1 << 8}, {"sqe_flags": 1 << 8}, {"ioprio": 1 << 16}, {"buf_index": 1 << 16}),
        *({"fd": 1 << 31}, {"len": 1 << 32}, {"op_flags": 1 << 32}, {"splice_fd_in": 1 << 31}),
    ],
    ids=str,
)
async def test_a_field_that_is_too_large_is_an_error(
    field: dict[str, int], way: Callable[[Operation[int]], Awaitable[object]]
) -> None:
    operation = Operation(**{"opcode": Opcode.NOP, "decode": count, **field})  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        await way(operation)


def raise_stop_iteration(_res: int, _flags: int) -> int:
    raise StopIteration(5)


async def test_a_result_that_raises_stop_iteration_ends_no_coroutine() -> None:
    with pytest.raises(RuntimeError, match="coroutine raised StopIteration") as caught:
        await perform(Operation(Opcode.NOP, raise_stop_iteration))
    assert isinstance(caught.value.__cause__, StopIteration)


@pytest.mark.parametrize("way", WAYS, ids=["perform", "shielded", "batch", "chain"])
async def test_an_operation_with_a_buffer_cannot_be_performed_by_two_tasks(
    way: Callable[[Operation[int]], Awaitable[object]],
) -> None:
    reader, writer = os.pipe()
    buffer = bytearray(8)
    operation = operations.read(reader, buffer, -1, cancellable=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operation)
        await wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="performed already"):
            await way(operation)
        with pytest.raises(BufferError):  # the kernel still has it
            buffer.clear()
        os.write(writer, b"data")
    assert buffer[:4] == b"data"
    buffer.clear()
    os.close(reader)
    os.close(writer)


async def test_one_that_is_refused_in_a_batch_uses_up_no_other() -> None:
    reader, writer = os.pipe()
    first, second = (operations.read(reader, bytearray(1), -1) for _ in range(2))
    os.write(writer, b"12")
    assert await perform(second) == 1
    with pytest.raises(RuntimeError, match="performed already"):
        await perform_many([first, second])
    assert await perform(first) == 1
    os.close(reader)
    os.close(writer)


async def test_an_array_of_reads_can_be_performed_once() -> None:
    with open(__file__, "rb") as file:
        buffer = bytearray(8)
        array = operations.read_many(file.fileno(), buffer, [0, 4], 4)
        assert len(await perform_many(array)) == 2
        buffer.clear()
        with pytest.raises(RuntimeError, match="performed already"):
            await perform_many(array)


async def test_an_operation_without_a_buffer_can_be_performed_again() -> None:
    a, b = trio.socket.socketpair()
    with a, b:
        for operation in (operations.nop(), operations.send(a.fileno(), b"data")):
            for _ in range(2):
                await perform(operation)
                await perform_many([operation])
                await perform_many([linked([operation])])
        assert await b.recv(99) == b"data" * 6


async def test_an_operation_in_a_chain_without_tokens_takes_none_from_others() -> None:
    reader, writer = os.pipe()
    write = operations.write(writer, b"1", -1, cancellable=False)
    assert write.limited
    wait = operations.read(reader, bytearray(1), -1, cancellable=True)
    await perform_many([linked([write, wait])])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, write)
        await wait_all_tasks_blocked()
    assert write.limited
    os.close(reader)
    os.close(writer)
