"""`OperationTimes` measures how long tasks wait for operations, while a run has it."""

from __future__ import annotations

import trio
from trio.lowlevel import add_instrument, remove_instrument
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring.lowlevel import OperationTimes, operations, perform

MS_NS = 1_000_000


async def test_it_measures_from_the_wait_to_the_completion() -> None:
    observed: list[tuple[str, float]] = []
    times = OperationTimes(lambda opcode, seconds: observed.append((opcode, seconds)))
    add_instrument(times)
    for _ in range(3):
        await perform(operations.timeout(MS_NS))
    await perform(operations.nop())
    remove_instrument(times)
    await perform(operations.nop())
    assert times.counts == {"TIMEOUT": 3, "NOP": 1}
    assert times.seconds["TIMEOUT"] >= 0.003
    assert times.seconds["TIMEOUT"] == sum(
        seconds for name, seconds in observed if name == "TIMEOUT"
    )
    assert [name for name, _ in observed] == ["TIMEOUT"] * 3 + ["NOP"]


async def test_sockets_and_cancelled_operations() -> None:
    times = OperationTimes()
    add_instrument(times)
    a, b = map(trio.SocketStream, trio.socket.socketpair())
    async with a, b, trio.open_nursery() as nursery:
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        await b.send_all(b"x")
        await wait_all_tasks_blocked()
        assert times.counts["RECV"] == 1
        nursery.start_soon(a.receive_some)
        await wait_all_tasks_blocked()
        assert times.counts["RECV"] == 1
        nursery.cancel_scope.cancel()
    assert times.counts["RECV"] == 2
    remove_instrument(times)


async def test_an_operation_that_began_before_the_instrument_came_is_not_measured() -> None:
    times = OperationTimes()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.timeout(3600 * 10**9))
        await wait_all_tasks_blocked()
        add_instrument(times)
        nursery.cancel_scope.cancel()
    remove_instrument(times)
    assert times.counts == {}


def test_a_run_without_a_ring_has_no_operations() -> None:
    times = OperationTimes()
    trio.run(trio.sleep, 0, instruments=[times])
    trio_uring.run(trio.sleep, 0, instruments=[times], ring=RingConfig(require=True))
    assert "RECV" not in times.counts
