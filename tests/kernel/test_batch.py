"""`perform_many` and `linked` on a real ring: outcomes, limits, cancelling, chains."""

from __future__ import annotations

import errno
import os
import socket as stdlib_socket
import tempfile
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, cast

import outcome
import pytest
import trio
from accounting import ByteLedger, Rounds
from races import Order, current_manager, every_order, race
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import (
    Linked,
    OperationCancelledError,
    RingConfig,
    UnsupportedOpcodeError,
    linked,
    perform_many,
)
from trio_uring._engine._buffer_pool import BufferPool
from trio_uring._engine._completion_batches import CompletionBatch
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._engine._ring import Ring
from trio_uring._kernel.uapi import Opcode
from trio_uring._operations._arrays import array_of
from trio_uring.lowlevel import Operation, RingStatistics, operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

PAGE: Final = 4096
PAGES: Final = 64
DATA: Final = os.urandom(PAGES * PAGE)
ROUNDS: Final = 1600

pytestmark = pytest.mark.usefixtures("fd_ledger")


@pytest.fixture
def file() -> Iterator[int]:
    with tempfile.TemporaryFile() as opened:
        opened.write(DATA)
        opened.flush()
        yield opened.fileno()


def statistics() -> RingStatistics:
    return current_manager().statistics()


@contextmanager
def completing(**expected: int) -> Iterator[None]:
    """Fail unless so many operations of these opcodes complete."""
    before = statistics().completed
    yield
    after = statistics().completed
    assert {name: after.get(name, 0) - before.get(name, 0) for name in expected} == expected


def unwrapped(outcomes: list[outcome.Outcome[Any]]) -> list[Any]:
    return [each.unwrap() for each in outcomes]


def error(result: outcome.Outcome[object]) -> BaseException:
    assert isinstance(result, outcome.Error)
    return result.error


@contextmanager
def pairs(count: int) -> Iterator[list[tuple[stdlib_socket.socket, stdlib_socket.socket]]]:
    with ExitStack() as stack:
        made = [stdlib_socket.socketpair() for _ in range(count)]
        for pair in made:
            for sock in pair:
                stack.enter_context(sock)
        yield made


@contextmanager
def tcp_pair() -> Iterator[tuple[stdlib_socket.socket, stdlib_socket.socket]]:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        ours = stdlib_socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def every_page(fd: int, buffers: list[bytearray]) -> list[Operation[int]]:
    return [operations.read(fd, buffer, i * PAGE) for i, buffer in enumerate(buffers)]


# --- Outcomes -------------------------------------------------------------------------------


async def test_outcomes_come_in_order(file: int) -> None:
    with completing(NOP=1, READ=3):
        first, second, third, fourth = await perform_many(
            [
                operations.read(file, buffer := bytearray(100), 5),
                operations.nop(),
                operations.read(-7, bytearray(3), 0),
                operations.read(file, bytearray(3), len(DATA) - 1),
            ]
        )
    assert first.unwrap() == 100
    assert buffer == DATA[5:105]
    assert second.unwrap() is None
    assert isinstance(error(third), OSError)
    assert cast("OSError", error(third)).errno == errno.EBADF
    assert fourth.unwrap() == 1


async def test_outcomes_can_be_unwrapped_once(file: int) -> None:
    """They are made by a faster way than attrs', with the same behaviour."""
    results = await perform_many([operations.nop(), operations.nop()])
    assert results == [outcome.Value(None), outcome.Value(None)]
    assert [repr(result) for result in results] == ["Value(None)"] * 2
    assert hash(results[0]) == hash(outcome.Value(None))
    results[0].unwrap()
    with pytest.raises(outcome.AlreadyUsedError):
        results[0].unwrap()
    assert results[1].unwrap() is None


async def test_each_read_of_a_batch_takes_its_own_provided_buffer(file: int) -> None:
    """The flags of a completion say which one."""
    buffers = BufferPool(current_manager().ring, group=99, count=PAGES, size=PAGE)
    for fails in (False, True):
        reads = [operations.read_select(file, buffers, 9, i * PAGE) for i in range(PAGES)]
        if fails:
            reads[3] = operations.read_select(-7, buffers, 9, 0)
        results = await perform_many(reads)
        for i, result in enumerate(results):
            if fails and i == 3:
                assert isinstance(error(result), OSError)
            else:
                assert result.unwrap() == DATA[i * PAGE :][:9]
    buffers.close()


async def test_a_completion_that_belongs_to_no_batch_is_ignored(file: int) -> None:
    ring = current_manager().ring
    batch_bit = 1 << 63
    for slot, index in [(0, 2), (0, 2**32 - 1), (1, 0), (7, 0), (8, 0), (2**31 - 1, 0)]:
        ring.push(operations.nop(), batch_bit | slot << 32 | index)
        buffers = [bytearray(PAGE) for _ in range(2)]
        results = await perform_many(every_page(file, buffers))
        assert unwrapped(results) == [PAGE] * 2
        assert b"".join(buffers) == DATA[: 2 * PAGE]


async def test_a_batch_is_one_step_of_the_loop(file: int) -> None:
    buffers = [bytearray(PAGE) for _ in range(PAGES)]
    steps = 0

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            nonlocal steps
            steps += task is this_task

    this_task = trio.lowlevel.current_task()
    instrument = Steps()
    described = every_page(file, buffers)
    for buffer in buffers:
        os.preadv(file, [buffer], 0)  # so that all pages are cached
    enters = statistics().enters
    trio.lowlevel.add_instrument(instrument)
    with completing(READ=PAGES):
        results = await perform_many(described)
    trio.lowlevel.remove_instrument(instrument)
    assert unwrapped(results) == [PAGE] * PAGES
    assert b"".join(buffers) == DATA
    assert steps == 1
    assert statistics().enters - enters <= 2


async def test_operations_can_be_described_all_at_once(file: int) -> None:
    buffer = bytearray(PAGES * PAGE)
    with completing(READ=PAGES):
        results = await perform_many(
            operations.read_many(file, buffer, range(0, PAGES * PAGE, PAGE), PAGE)
        )
    assert unwrapped(results) == [PAGE] * PAGES
    assert buffer == DATA
    offsets = [0, len(DATA), len(DATA) - 3, 7]
    results = await perform_many(operations.read_many(file, buffer, offsets, 10))
    assert unwrapped(results) == [10, 0, 3, 10]
    assert buffer[30:40] == DATA[7:17]
    results = await perform_many(operations.read_many(-7, buffer, offsets, 10, in_worker=True))
    assert [cast("OSError", error(result)).errno for result in results] == [errno.EBADF] * 4
    assert await perform_many(operations.read_many(file, buffer, [], 10)) == []
    buffer.append(0)  # nothing holds it


@pytest.mark.parametrize("entries", [8, 256])
@pytest.mark.parametrize("completion_entries", [8, 4096])
async def test_a_batch_may_be_larger_than_the_submission_queue(
    file: int, entries: int, completion_entries: int
) -> None:
    """Whatever the sizes of the SQ and the CQ."""

    async def main() -> None:
        buffers = [bytearray(PAGE) for _ in range(PAGES)]
        assert unwrapped(await perform_many(every_page(file, buffers))) == [PAGE] * PAGES
        assert b"".join(buffers) == DATA
        assert await perform_many([operations.nop() for _ in range(1000)])
        with pairs(100) as made:
            for _, theirs in made:
                theirs.send(b"x")
            with completing(RECV=100):
                results = await perform_many(
                    [operations.recv(ours.fileno(), bytearray(9)) for ours, _ in made]
                )
            assert unwrapped(results) == [1] * 100

    ring = RingConfig(
        entries=entries, completion_entries=max(entries, completion_entries), require=True
    )
    await trio.to_thread.run_sync(lambda: trio_uring.run(main, ring=ring))


async def test_many_batches_are_in_flight_at_once(file: int) -> None:
    """Each gets its own results, however many there are, and again in the second round."""

    async def read(page: int) -> None:
        buffers = [bytearray(100), bytearray(page)]
        reads = [operations.read(file, each, page * PAGE) for each in buffers]
        assert unwrapped(await perform_many(reads)) == [100, page]
        for buffer in buffers:
            assert DATA[page * PAGE :].startswith(buffer)
        finished.append(page)

    finished: list[int] = []
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for page in range(PAGES):
                nursery.start_soon(read, page)
    assert sorted(finished) == sorted([*range(PAGES)] * 2)


async def test_the_buffers_that_the_kernel_chose_for_a_batch(file: int) -> None:
    """Which they are is in the flags of the completions."""
    pool = current_manager().buffers
    assert pool is not None
    for _ in range(3):
        reads = [operations.read_select(file, pool, 100, page * PAGE) for page in range(4)]
        expected = [DATA[page * PAGE :][:100] for page in range(4)]
        assert unwrapped(await perform_many(reads)) == expected


async def test_an_empty_batch_is_a_checkpoint() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await perform_many([])
    assert scope.cancelled_caught
    assert await perform_many([]) == []
    assert await perform_many(iter([operations.nop()])) == [outcome.Value(None)]


@pytest.mark.parametrize("flags", [0, stdlib_socket.MSG_DONTWAIT], ids=["waits", "ends"])
async def test_zero_copy_sends_have_two_completions(flags: int) -> None:
    """The second one, the notification, replaces no result, and says whether data was copied."""
    copied: list[int] = []
    with tcp_pair() as (ours, theirs):
        data = b"x" * 10_000
        fd = ours.fileno()
        plain, counted, message = (
            operations.send_zc(fd, data, flags),
            operations.send_zc(fd, data, flags, on_copied=copied.append),
            operations.sendmsg_zc(fd, [data], (), flags, on_copied=copied.append),
        )
        for operation in (plain, counted, message):
            with completing(**{Opcode(operation.opcode).name: 1}):
                assert unwrapped(await perform_many([operation])) == [len(data)]
            assert theirs.recv(len(data), stdlib_socket.MSG_WAITALL) == data
    assert copied == [len(data)] * 2  # loopback always copies


@pytest.mark.parametrize("chained", [False, True])
async def test_the_same_operation_twice_is_refused(*, chained: bool) -> None:
    operation = operations.nop()
    with pytest.raises(ValueError, match="the same operation twice"):
        await perform_many([linked([operation]) if chained else operation, operation])
    with pytest.raises(ValueError, match="the same operation twice"):
        await perform_many(linked([operation, operation]))


@pytest.mark.parametrize("wrong", [3, None, [operations.nop()], operations.nop])
async def test_what_is_no_operation_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="operations"):
        await perform_many([wrong])
    with pytest.raises(TypeError, match="operations"):
        linked([wrong])
    with pytest.raises(TypeError):
        await perform_many(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("waits", [False, True])
async def test_an_opcode_that_the_kernel_does_not_know_is_refused(*, waits: bool) -> None:
    unknown = Operation(251, lambda res, _: res, cancellable=waits)
    before, it, after = await perform_many([operations.nop(), unknown, operations.nop()])
    assert isinstance(error(it), UnsupportedOpcodeError)
    assert before.unwrap() is after.unwrap() is None


def test_without_a_ring_it_is_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="not on io_uring"):
            await perform_many([operations.nop()])

    trio.run(main)


# --- Limits ---------------------------------------------------------------------------------


@pytest.mark.ring(max_file_operations=4)
async def test_a_batch_keeps_the_limit_of_file_operations(file: int) -> None:
    """Batches and single operations are served in turn. At most four are in flight."""
    most = 0

    async def one(offset: int) -> None:
        nonlocal most
        buffer = bytearray(PAGE)
        await perform(operations.read(file, buffer, offset, in_worker=True))
        most = max(most, statistics().in_flight)
        assert buffer == DATA[offset : offset + PAGE]

    async def many(count: int) -> None:
        nonlocal most
        buffers = [bytearray(PAGE) for _ in range(count)]
        described = [
            operations.read(file, buffer, i * PAGE, in_worker=True)
            for i, buffer in enumerate(buffers)
        ]
        assert unwrapped(await perform_many(described)) == [PAGE] * count
        most = max(most, statistics().in_flight)
        assert b"".join(buffers) == DATA[: count * PAGE]

    async def described() -> None:
        buffer = bytearray(11 * PAGE)
        await perform_many(operations.read_many(file, buffer, range(0, 11 * PAGE, PAGE), PAGE))
        assert buffer == DATA[: 11 * PAGE]

    with completing(READ=3 * (10 + 3 + 11 + 1 + 4)):
        async with trio.open_nursery() as nursery:
            for i in range(3):
                nursery.start_soon(many, 10)
                nursery.start_soon(many, 3)
                nursery.start_soon(described)
                nursery.start_soon(one, i * PAGE)
                nursery.start_soon(many, 4)
    assert 0 < most <= 4
    assert current_manager().file_limiter.available_tokens == 4


@pytest.mark.ring(max_file_operations=2)
async def test_who_waits_for_ever_takes_no_place(file: int) -> None:
    """Reads of files are performed while receives of the same batch wait."""
    with pairs(1) as [(ours, theirs)]:
        results: list[outcome.Outcome[int]] = []

        async def batch() -> None:
            nonlocal results
            reads = [operations.read(file, bytearray(9), i) for i in range(5)]
            chain = linked(
                [operations.recv(ours.fileno(), bytearray(9)), operations.read(file, b, 0)]
            )
            results = await perform_many([*reads[:2], chain, *reads[2:]])

        b = bytearray(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch)
            await wait_all_tasks_blocked()
            assert statistics().in_flight == 2  # the chain
            assert current_manager().file_limiter.available_tokens == 2
            theirs.send(b"abc")
        assert unwrapped(results) == [9, 9, 3, 5, 9, 9, 9]
        assert current_manager().file_limiter.available_tokens == 2


@pytest.mark.ring(max_file_operations=2)
async def test_cancelled_while_it_waits_for_tokens_it_does_nothing(file: int) -> None:
    """Nothing began, so nothing is lost, and no token is kept."""
    limit = current_manager().file_limiter
    await limit.acquire_many(2)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform_many, [operations.fsync(file), operations.fsync(file)])
            nursery.start_soon(perform_many, [operations.fsync(file), operations.poll_add(file, 1)])
            await wait_all_tasks_blocked()
            limit.release()  # one of them has this now
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert limit.available_tokens == 1
    limit.release()


@pytest.mark.ring(entries=8, max_file_operations=4)
async def test_chains_that_are_too_long_are_refused(file: int) -> None:
    with pytest.raises(ValueError, match="the ring has 8 entries"):
        await perform_many(linked([operations.nop() for _ in range(9)]))
    with pytest.raises(ValueError, match="the limit is 4"):
        await perform_many(linked([operations.fsync(file) for _ in range(5)]))
    with pytest.raises(ValueError, match="at least one"):
        linked([])
    long = [linked([operations.nop() for _ in range(8)]) for _ in range(5)]
    assert unwrapped(await perform_many(long)) == [None] * 40
    chains = [linked([operations.fsync(file) for _ in range(3)]) for _ in range(5)]
    with completing(FSYNC=15):
        assert unwrapped(await perform_many(chains)) == [None] * 15


# --- Cancelling -----------------------------------------------------------------------------


async def test_cancelling_a_batch_cancels_all_its_operations(rounds: Rounds) -> None:
    """Whatever the order of events, each byte is in an outcome, or still in its socket."""
    with pairs(3) as made:
        ledgers = [ByteLedger() for _ in made]

        def receive() -> Awaitable[list[outcome.Outcome[int]]]:
            for buffer in buffers:
                buffer.append(0)  # nothing of the last round holds it
            return perform_many(
                [
                    operations.recv(ours.fileno(), buffer)
                    for (ours, _), buffer in zip(made, buffers, strict=True)
                ]
            )

        buffers = [bytearray(20) for _ in made]
        for number, order in enumerate(every_order(ROUNDS)):
            ready = made if order in (Order.READY_SEEN, Order.NO_CANCEL) or number % 2 else made[1:]

            def send(ready: list[Any] = ready) -> None:
                for pair in ready:
                    pair[1].send(ledgers[made.index(pair)].take(10))

            result = await race(rounds, order, receive, send)
            received = [0] * 3
            if result:
                assert any(isinstance(each, outcome.Value) for each in result.value)
                for i, each in enumerate(result.value):
                    if isinstance(each, outcome.Value):
                        received[i] = each.value
                    else:
                        assert isinstance(error(each), OperationCancelledError)
            for ledger, pair, count, buffer in zip(ledgers, made, received, buffers, strict=True):
                ledger.received(buffer[:count])
                if ledger.missing:
                    ledger.received(pair[0].recv(100, stdlib_socket.MSG_DONTWAIT))
                assert not ledger.missing


async def test_cancelling_accepts_loses_no_connection(rounds: Rounds) -> None:
    """No connection is lost. The fd ledger checks their fds."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(stdlib_socket.create_server(("", 0))) for _ in range(2)]
        for order in every_order(400):
            clients: list[stdlib_socket.socket] = []

            def connect(clients: list[stdlib_socket.socket] = clients) -> None:
                clients.extend(
                    stdlib_socket.create_connection(each.getsockname()) for each in listeners
                )

            result = await race(
                rounds,
                order,
                lambda: perform_many([operations.accept(each.fileno()) for each in listeners]),
                connect,
            )
            accepted = 0
            for each in result.value if result else ():
                if isinstance(each, outcome.Value):
                    os.close(each.value[0])
                    accepted += 1
            for _ in range(len(clients) - accepted):
                for listener in listeners:
                    listener.setblocking(False)
                    try:
                        listener.accept()[0].close()
                    except BlockingIOError:
                        continue
                    accepted += 1
            assert accepted == len(clients)
            for client in clients:
                client.close()


async def test_what_ends_by_itself_is_waited_for(file: int) -> None:
    buffers = [bytearray(PAGE) for _ in range(PAGES)]
    described = every_page(file, buffers)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform_many, described)
            await wait_all_tasks_blocked()
            scope.cancel()
    for buffer in buffers:
        buffer.append(0)
    with trio.CancelScope() as scope:
        scope.cancel()
        with completing(READ=0):
            await perform_many(every_page(file, buffers))
    assert scope.cancelled_caught
    for buffer in buffers:
        buffer.append(0)


@pytest.mark.ring(max_file_operations=2)
@pytest.mark.parametrize("waits", [False, True])
async def test_cancelled_between_two_parts_it_submits_no_more(file: int, *, waits: bool) -> None:
    """Completed operations are reported, and others do not begin."""
    limit = current_manager().file_limiter
    with pairs(1) as [(ours, _)]:
        read_end, write_end = os.pipe()
        # The first part ends when the test lets it.
        described: list[Operation[Any]] = [
            operations.read(read_end, bytearray(1), -1, cancellable=False) for _ in range(2)
        ]
        described += [operations.fsync(file) for _ in range(2)]
        if waits:
            described.append(operations.recv(ours.fileno(), bytearray(1)))
        results: list[outcome.Outcome[Any]] = []
        with trio.CancelScope() as scope:

            async def batch() -> None:
                nonlocal results
                results = await perform_many(described)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(batch)
                await wait_all_tasks_blocked()
                nursery.start_soon(limit.acquire_many, 2)  # behind the first part
                await wait_all_tasks_blocked()
                os.write(write_end, b"12")
                while statistics().in_flight > waits:
                    await trio.lowlevel.checkpoint()
                await wait_all_tasks_blocked()
                scope.cancel()
        os.close(read_end)
        os.close(write_end)
        assert unwrapped(results[:2]) == [1, 1]
        assert all(isinstance(error(each), OperationCancelledError) for each in results[2:])
        assert len(results) == len(described)
    assert limit.available_tokens == 0
    limit.release_many(2)


async def test_errors_alone_are_not_a_cancellation() -> None:
    """If all had failed before the cancellation, their errors are the result."""
    results: list[outcome.Outcome[int]] = []
    with trio.CancelScope() as scope:

        async def batch() -> None:
            nonlocal results
            results = await perform_many([operations.recv(-7, bytearray(1)) for _ in range(3)])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert [cast("OSError", error(each)).errno for each in results] == [errno.EBADF] * 3


# --- Who waits for what ---------------------------------------------------------------------


async def test_two_operations_of_a_batch_cannot_wait_for_the_same() -> None:
    with pairs(2) as [(ours, theirs), (other, others)]:
        results: list[outcome.Outcome[int]] = []

        async def batch() -> None:
            nonlocal results
            results = await perform_many(
                [
                    operations.recv(ours.fileno(), bytearray(9)),
                    operations.recv(ours.fileno(), bytearray(9)),
                    linked(
                        [
                            operations.recv(other.fileno(), bytearray(9)),
                            operations.recv(ours.fileno(), bytearray(9)),
                        ]
                    ),
                ]
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await perform(operations.recv(ours.fileno(), bytearray(9)))
            others.send(b"x")
            await perform(operations.recv(other.fileno(), bytearray(9)))  # the chain let go of it
            theirs.send(b"abc")
        assert results[0].unwrap() == 3
        assert isinstance(error(results[1]), trio.BusyResourceError)
        assert isinstance(error(results[2]), OperationCancelledError)
        assert isinstance(error(results[3]), trio.BusyResourceError)
        results = await perform_many([operations.recv(-7, bytearray(1))])


async def test_operations_that_are_all_refused_give_their_errors() -> None:
    with pairs(1) as [(ours, theirs)]:
        sock = trio.socket.from_stdlib_socket(ours)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sock.recv, 9)
            await wait_all_tasks_blocked()
            buffer = bytearray(1)
            [result] = await perform_many([operations.recv(ours.fileno(), buffer)])
            assert isinstance(error(result), trio.BusyResourceError)
            buffer.append(0)
            theirs.send(b"x")


async def test_closing_an_fd_ends_the_operations_on_it() -> None:
    with pairs(2) as [(ours, _), (other, others)]:
        results: list[outcome.Outcome[int]] = []

        async def batch() -> None:
            nonlocal results
            results = await perform_many(
                [operations.recv(sock.fileno(), bytearray(9)) for sock in (ours, other)]
            )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(batch)
            await wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(ours)
            ours.close()
            await wait_all_tasks_blocked()
            others.send(b"ab")
        assert isinstance(error(results[0]), trio.ClosedResourceError)
        assert results[1].unwrap() == 2


# --- Chains ---------------------------------------------------------------------------------


async def test_a_chain_runs_in_order(file: int) -> None:
    buffer = bytearray(5)
    chain = linked(
        [
            operations.write(file, b"first", 0),
            operations.write(file, b"third", 0),
            operations.read(file, buffer, 0),
        ]
    )
    with completing(WRITE=2, READ=1):
        assert unwrapped(await perform_many(chain)) == [5, 5, 5]
    assert buffer == b"third"


@pytest.mark.parametrize("singles", range(9))
@pytest.mark.parametrize("waits", [False, True])
def test_a_chain_is_kept_whole_when_the_submission_queue_is_nearly_full(
    file: int, singles: int, *, waits: bool
) -> None:
    """The kernel ends a chain at the end of what one enter submits."""

    async def main() -> None:
        before = [operations.write(file, b"?", 100) for _ in range(singles)]
        # The first one is short, so the rest of the chain must do nothing.
        short = operations.read(file, bytearray(2), len(DATA) - 1)
        failing = linked([short, *(operations.write(file, b"?", i) for i in range(5))])
        chain = linked([operations.write(file, b"%d" % (i // 2), i % 2) for i in range(6)])
        wait = [operations.timeout(0)] if waits else []  # can be cancelled
        results = await perform_many([*wait, *before, failing, chain])
        assert unwrapped(results[len(wait) : -12]) == [1] * singles
        assert [isinstance(result, outcome.Error) for result in results[-12:-6]] == [
            False,
            *[True] * 5,
        ]
        assert unwrapped(results[-6:]) == [1] * 6
        assert os.pread(file, 2, 0) == b"22"

    trio_uring.run(main, ring=RingConfig(entries=8, completion_entries=8, require=True))


@pytest.mark.parametrize("waits", [False, True])
async def test_a_failure_cancels_the_rest_of_its_chain(file: int, *, waits: bool) -> None:
    with pairs(1) as [(ours, theirs)]:
        theirs.send(b"x")
        first = operations.recv(ours.fileno(), bytearray(1)) if waits else operations.nop()
        results = await perform_many(
            [
                operations.nop(),
                linked(
                    [
                        first,
                        operations.read(file, bytearray(9), len(DATA) - 1),  # short: so it failed
                        operations.write(file, b"never", 0),
                        operations.fsync(file),
                    ]
                ),
                operations.nop(),
            ]
        )
        assert unwrapped(results[:3]) == [None, 1 if waits else None, 1]
        assert results[5].unwrap() is None
        for result in results[3:5]:
            assert isinstance(error(result), OperationCancelledError)
            assert "linked chain" in str(error(result))
    assert os.pread(file, 5, 0) == DATA[:5]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_failed_chain_starts_no_thread_for_each_operation(
    file: int, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    asked: list[object] = []
    monkeypatch.setattr("trio_uring._batch.no_worker_error", lambda: asked.append(0))
    with pairs(1) as [(ours, theirs)]:
        theirs.send(b"x")
        first = operations.recv(ours.fileno(), bytearray(1)) if waits else operations.nop()
        fails = operations.read(1 << 20, bytearray(9), 0)  # no such fd
        results = await perform_many([linked([first, fails, *map(operations.fsync, [file] * 9)])])
    with pytest.raises(OSError, match="Bad file descriptor"):
        results[1].unwrap()
    for result in results[2:]:
        assert isinstance(error(result), OperationCancelledError)
        assert "linked chain" in str(error(result))
    assert not asked


@pytest.mark.parametrize("waits", [False, True])
async def test_short_reads_in_chains_start_one_thread_at_most(
    file: int, monkeypatch: pytest.MonkeyPatch, *, waits: bool
) -> None:
    """It finds out whether the kernel lacks a worker, which looks the same."""
    asked: list[object] = []
    monkeypatch.setattr("trio_uring._batch.no_worker_error", lambda: asked.append(0))

    def chain() -> Linked[Any]:
        short = operations.read(file, bytearray(2), len(DATA) - 1)
        return linked([short, operations.fsync(file), operations.fsync(file)])

    wait = [operations.timeout(0)] if waits else []  # can be cancelled
    results = await perform_many([*wait, *(chain() for _ in range(20))])
    chains = results[len(wait) :]
    assert unwrapped(chains[::3]) == [1] * 20
    assert all(isinstance(error(r), OperationCancelledError) for r in chains[1::3] + chains[2::3])
    assert len(asked) == 1


@pytest.mark.parametrize("first_has_come", [False, True])
async def test_cancelling_a_chain_cancels_what_has_begun(*, first_has_come: bool) -> None:
    with pairs(2) as [(ours, theirs), (other, _)]:
        results: list[outcome.Outcome[int]] = []
        with trio.CancelScope() as scope:

            async def batch() -> None:
                nonlocal results
                results = await perform_many(
                    linked(operations.recv(s.fileno(), bytearray(9)) for s in (ours, other))
                )

            async with trio.open_nursery() as nursery:
                nursery.start_soon(batch)
                await wait_all_tasks_blocked()
                if first_has_come:
                    theirs.send(b"abc")
                    await wait_all_tasks_blocked()
                scope.cancel()
        if first_has_come:
            assert results[0].unwrap() == 3
            assert isinstance(error(results[1]), OperationCancelledError)
        else:
            assert not results
            assert scope.cancelled_caught


@pytest.mark.parametrize("answered", [False, True])
async def test_cancelling_a_chain_cancels_what_has_not_begun(*, answered: bool) -> None:
    """The kernel doesn't find it yet, so the cancellation is requested again once it has begun."""
    with pairs(2) as [(ours, theirs), (other, others)]:
        head = operations.recv(ours.fileno(), bytearray(9))
        head.cancellable = False
        results: list[outcome.Outcome[int]] = []
        with trio.CancelScope() as scope:

            async def batch() -> None:
                nonlocal results
                results = await perform_many(
                    linked([head, operations.recv(other.fileno(), bytearray(9))])
                )

            async with trio.open_nursery() as nursery:
                nursery.start_soon(batch)
                await wait_all_tasks_blocked()
                scope.cancel()
                if answered:
                    with trio.CancelScope(shield=True):
                        await wait_all_tasks_blocked()
                theirs.send(b"abc")
        assert results[0].unwrap() == 3
        assert isinstance(error(results[1]), OperationCancelledError)
        others.send(b"x")
        assert other.recv(9) == b"x"
    assert not current_manager().on_cancel_missed


# --- The end of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("submitted", [False, True])
async def test_a_ring_that_closes_ends_its_batches(*, submitted: bool) -> None:
    """It waits for completion batches, and closes the fds among their results."""
    config = RingConfig()
    manager = UringIOManager(Ring(config), config)
    array = array_of([operations.nop(), operations.openat("/dev/null", os.O_RDONLY)])
    task = trio.lowlevel.current_task()
    manager.start_batch(CompletionBatch(array, 0, 2, array.opcodes, 0, task))
    assert manager.statistics().in_flight == 2
    if submitted:
        manager.ring.flush()
    manager.close()
    assert manager.statistics().in_flight == 0


async def test_a_lost_ring_keeps_the_memory_of_its_batches() -> None:
    """The kernel may still write there after the batch has failed."""
    config = RingConfig()
    manager = UringIOManager(Ring(config), config)
    with open("/dev/zero", "rb") as zeros:
        array = operations.read_many(zeros.fileno(), bytearray(4), [0], 4)
        task = trio.lowlevel.current_task()
        manager.start_batch(CompletionBatch(array, 0, 1, array.opcodes, 0, task))
        pins = array.pins
        assert pins
        assert pins in manager._leak()
        assert array.pins == ()  # the batch's end releases nothing
        manager.close()


class Discarding:
    """An operation, and the array that has it: records what is discarded."""

    def __init__(self) -> None:
        self.discarded: list[int] = []
        self.operations = [self] * 3
        self.discard = self.discarded.append

    def release(self) -> None:
        self.operations = []


def test_only_results_are_discarded() -> None:
    """An error is no fd, and 0 is one."""
    array: Any = Discarding()
    task: Any = None
    batch = CompletionBatch(array, 0, 3, {}, 0, task)
    batch.results = [(-errno.EBADF, 0), (0, 0), (7, 0)]
    batch.discard()
    assert array.discarded == [0, 7]
    assert array.operations == []
