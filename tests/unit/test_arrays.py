"""Arrays of operations and chains, and the limiter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_uring import linked
from trio_uring._engine._limiter import Limiter
from trio_uring._kernel import ffi
from trio_uring._kernel.uapi import Opcode, SqeFlag
from trio_uring._operations._arrays import array_of
from trio_uring._operations._operation import SQE_FIELDS
from trio_uring.lowlevel import Operation, operations

if TYPE_CHECKING:
    from collections.abc import Sequence

FIELDS = [name for name in SQE_FIELDS if name != "addr"]


def fields(array: operations.OperationArray[object], index: int) -> list[int]:
    return [getattr(array.fields[index], name) for name in FIELDS]


def test_an_array_says_what_its_operations_say() -> None:
    described: list[Operation[object]] = [
        operations.read(3, bytearray(7), 1 << 40),
        operations.openat("/some/where", 0),
        operations.splice(4, 5, 6, offset_in=9, flags=1),
        operations.nop(),
    ]
    array = array_of(described)
    for index, operation in enumerate(described):
        sqe = list(operation.sqe)
        address = sqe.pop(5)
        assert fields(array, index) == sqe
        there = array.fields[index].addr
        if isinstance(address, bytes):
            assert ffi.buffer(ffi.cast("char *", there), len(address))[:] == address
        else:
            assert there == address
    assert array.count == 4
    assert array.opcodes == {Opcode.READ: 1, Opcode.OPENAT: 1, Opcode.SPLICE: 1, Opcode.NOP: 1}


def test_a_link_sets_the_flag_of_its_operation_alone() -> None:
    array = array_of([operations.nop() for _ in range(4)], {0, 2})
    assert [array.fields[i].sqe_flags for i in range(4)] == [SqeFlag.IO_LINK, 0] * 2


def test_reads_described_all_at_once() -> None:
    buffer = bytearray(30)
    array = operations.read_many(3, buffer, [5, 1 << 62, 0], 10, 4, in_worker=True)
    for index, offset in enumerate([5, 1 << 62, 0]):
        part = memoryview(buffer)[10 * index : 10 * index + 10]
        single = operations.read(3, part, offset, 4, cancellable=False, in_worker=True)
        sqe = list(single.sqe)
        assert array.fields[index].addr == sqe.pop(5)
        assert fields(array, index) == sqe
        single.release()
        part.release()
    assert array.limited == array.count == 3
    with pytest.raises(BufferError):
        buffer.append(0)
    array.release()
    buffer.append(0)
    array.release()


@pytest.mark.parametrize(
    ("offsets", "size", "error"),
    [
        ([0, 1], 6, ValueError),
        ([0], 0, ValueError),
        ([0], -1, ValueError),
        ([0], 1 << 31, ValueError),
        ([-1], 1, OverflowError),
        ([1 << 63], 1, OverflowError),
        ([1 << 64], 1, OverflowError),
        ([None], 1, TypeError),
    ],
)
def test_reads_that_cannot_be_are_refused(
    offsets: Sequence[int], size: int, error: type[Exception]
) -> None:
    buffer = bytearray(11)
    with pytest.raises(error):
        operations.read_many(3, buffer, offsets, size)
    buffer.append(0)


def test_a_chain_is_made_of_operations() -> None:
    operation = operations.nop()
    assert linked(iter([operation])).operations == (operation,)
    with pytest.raises(ValueError, match="at least one"):
        linked([])
    with pytest.raises(TypeError, match="Linked"):
        linked([linked([operation])])  # type: ignore[list-item]


def test_a_task_that_takes_many_tokens_waits_in_line() -> None:
    """In FIFO order. Two tasks that collect tokens do not wait for each other."""
    order: list[str] = []

    async def gather(limit: Limiter, name: str, count: int) -> None:
        await limit.acquire_many(count)
        order.append(name)

    async def take(limit: Limiter) -> None:
        await limit.acquire()
        order.append("one")

    async def main() -> None:
        limit = Limiter(3)
        await limit.acquire_many(3)
        async with trio.open_nursery() as nursery:
            for name, count in (("three", 3), ("two", 2)):
                nursery.start_soon(gather, limit, name, count)
                await wait_all_tasks_blocked()
            nursery.start_soon(take, limit)
            await wait_all_tasks_blocked()
            limit.release()
            await wait_all_tasks_blocked()
            assert order == []
            limit.release_many(2)
            await wait_all_tasks_blocked()
            # The single one stood in line before "three" was done with gathering.
            assert order == ["one"]
            limit.release()
            await wait_all_tasks_blocked()
            assert order == ["one", "three"]
            limit.release_many(3)
        assert order == ["one", "three", "two"]
        limit.release_many(2)
        assert limit.available_tokens == 3

    trio.run(main)


def test_a_task_that_gives_up_gathering_returns_its_tokens() -> None:
    async def main() -> None:
        limit = Limiter(3)
        await limit.acquire_many(2)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(limit.acquire_many, 3)
                nursery.start_soon(limit.acquire_many, 3)
                await wait_all_tasks_blocked()
                assert limit.available_tokens == 0
                scope.cancel()
        assert limit.available_tokens == 1
        await limit.acquire_many(1)

    trio.run(main)


def test_a_shielded_task_waits_for_its_token() -> None:
    order: list[str] = []

    async def take(limit: Limiter, name: str) -> None:
        await limit.acquire_shielded()
        order.append(name)

    async def main() -> None:
        limit = Limiter(1)
        await take(limit, "first")
        assert limit.available_tokens == 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take, limit, "second")
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_all_tasks_blocked()
            assert order == ["first"]
            limit.release()
        assert order == ["first", "second"]
        assert limit.available_tokens == 0

    trio.run(main)
