"""`receive_many`: every byte arrives once and in order, and leased buffers are not reused."""

from __future__ import annotations

import errno
import gc
import random
import socket as stdlib_socket
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

import pytest
import trio
from accounting import ByteLedger, Rounds
from races import Order, current_manager, every_order, race
from scenarios import as_guest
from trio.testing import assert_checkpoints, memory_stream_pair, wait_all_tasks_blocked

import trio_uring
from trio_uring import ReceivedLease, ReceivedLeases, RingConfig, SQPoll, receive_many
from trio_uring._multishot import _receive_many
from trio_uring.lowlevel import Operation, operations, perform

if TYPE_CHECKING:
    from collections.abc import Iterator

RUNS: Final = {"ring": trio_uring.run, "no ring": trio.run}
KINDS: Final = ["TCP", "UNIX"]
DATA: Final = random.Random(0).randbytes((1 << 20) + 12345)

pytestmark = pytest.mark.usefixtures("fd_ledger")


@contextmanager
def connected(kind: str = "UNIX") -> Iterator[tuple[trio.SocketStream, stdlib_socket.socket]]:
    """A stream, and the socket of its peer."""
    if kind == "UNIX":
        pair = stdlib_socket.socketpair()
    else:
        with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
            client = stdlib_socket.create_connection(listener.getsockname())
            pair = client, listener.accept()[0]
    with pair[1] as peer:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(pair[0]))
        with stream.socket:
            yield stream, peer


def receives() -> int:
    return current_manager().statistics().completed.get("RECV", 0)


def taken(lease: ReceivedLease) -> bytes:
    with lease:
        return bytes(lease.memory)


async def all_of(leases: ReceivedLeases) -> bytes:
    return b"".join([taken(lease) async for lease in leases])


# --- It receives ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_every_byte_arrives_in_order(run: str, kind: str) -> None:
    async def main() -> None:
        with connected(kind) as (stream, peer):
            sender = trio.SocketStream(trio.socket.from_stdlib_socket(peer.dup()))

            async def send() -> None:
                async with sender:
                    await sender.send_all(DATA)
                    await sender.send_eof()

            async with receive_many(stream) as leases, trio.open_nursery() as nursery:
                nursery.start_soon(send)
                assert await all_of(leases) == DATA
                for _ in range(2):
                    with pytest.raises(trio.EndOfChannel):
                        await leases.receive()
            assert leases.unread == b""
            assert leases.leased == 0

    RUNS[run](main)


async def test_one_operation_for_many_messages() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream) as leases:
            for number in range(200):
                peer.send(b"%d" % number)
                assert taken(await leases.receive()) == b"%d" % number
            assert receives() == 0  # it is still in flight
        assert receives() == 1


async def test_what_is_there_is_received_without_waiting() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream) as leases:
            with pytest.raises(trio.WouldBlock):
                leases.receive_nowait()
            peer.send(b"x")
            await wait_all_tasks_blocked()
            assert taken(leases.receive_nowait()) == b"x"
            peer.close()
            await wait_all_tasks_blocked()
            with pytest.raises(trio.EndOfChannel):
                leases.receive_nowait()
        with pytest.raises(trio.ClosedResourceError):
            leases.receive_nowait()


async def test_every_step_is_a_checkpoint() -> None:
    with connected() as (stream, peer):
        leases = receive_many(stream)
        for _ in range(3):
            peer.send(b"x")
            with assert_checkpoints():
                taken(await leases.receive())
            peer.send(b"x")
            await wait_all_tasks_blocked()
            with assert_checkpoints():
                taken(await leases.receive())
        for _ in range(2):
            with assert_checkpoints():
                await leases.aclose()


@pytest.mark.parametrize("run", RUNS)
def test_any_receive_stream_will_do(run: str) -> None:
    async def main() -> None:
        ours, theirs = memory_stream_pair()
        async with receive_many(ours, buffer_size=1000) as leases:
            await theirs.send_all(DATA[:5500])
            await theirs.send_eof()
            assert await all_of(leases) == DATA[:5500]

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_a_socket_will_do(run: str) -> None:
    async def main() -> None:
        with connected("TCP") as (stream, peer):
            async with receive_many(stream.socket) as leases:
                peer.send(b"data")
                assert taken(await leases.receive()) == b"data"
                reset(peer)
                with pytest.raises(ConnectionResetError):
                    await leases.receive()

    RUNS[run](main)


async def test_the_operation_can_be_performed_by_itself() -> None:
    """The operation by itself."""
    buffers = current_manager().buffers
    assert buffers is not None
    received = []
    with connected() as (stream, peer):
        operation = operations.recv_multishot(
            stream.socket.fileno(),
            buffers,
            lambda res, flags: received.append(buffers.take(res, flags)),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operation)
            for message in (b"one", b"two"):
                await wait_all_tasks_blocked()
                peer.send(message)
            await wait_all_tasks_blocked()
            peer.close()
    assert received == [b"one", b"two"]


# --- Leases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_a_lease_is_a_buffer_until_it_is_given_back(run: str) -> None:
    async def main() -> None:
        with connected() as (stream, peer):
            async with receive_many(stream) as leases:
                peer.send(b"data")
                lease = await leases.receive()
                assert lease.memory == b"data"
                assert lease.memory.readonly
                assert leases.leased == 1
                data = lease.memory
                for _ in range(2):
                    lease.release()
                    assert leases.leased == 0
                    with pytest.raises(RuntimeError, match="given back"):
                        _ = lease.memory
                    with pytest.raises(ValueError, match="released"):
                        bytes(data)

    RUNS[run](main)


async def test_what_is_lent_is_not_written_to() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=4, buffer_size=8) as leases:
            peer.send(b"kept")
            kept = await leases.receive()
            for number in range(100):
                peer.send(b"%d" % number)
                assert taken(await leases.receive()) == b"%d" % number
            assert kept.memory == b"kept"
            kept.release()


async def test_memory_that_is_in_use_is_not_given_back() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=1) as leases:
            peer.send(b"data")
            lease = await leases.receive()
            user = lease.memory.cast("c").cast("B")
            lease.release()
            assert user == b"data"
            user.release()
            peer.send(b"more")
            lease = await leases.receive()
            pin = trio_uring._kernel.ffi.from_buffer(lease.memory)
            with pytest.raises(BufferError):
                lease.release()
            assert leases.leased == 1
            trio_uring._kernel.ffi.release(pin)
            assert taken(lease) == b"more"


def test_leases_outlive_their_stream_and_their_run() -> None:
    kept = []

    async def main() -> None:
        with connected() as (stream, peer):
            async with receive_many(stream) as leases:
                peer.send(b"data")
                kept.append(await leases.receive())
            peer.send(b"more")
            assert kept[0].memory == b"data"
            peer.send(b"more")
            unclosed = receive_many(stream)
            kept.append(await unclosed.receive())

    trio_uring.run(main)
    assert [taken(lease) for lease in kept] == [b"data", b"moremore"]


async def test_a_lease_that_is_forgotten_is_reported() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream) as leases:
            peer.send(b"data")
            with pytest.warns(ResourceWarning, match="ReceivedLease was not released"):
                await leases.receive()


async def test_a_forgotten_lease_gives_its_buffer_back() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=1) as leases:
            for data in (b"first", b"second"):
                peer.send(data)
                lease = await leases.receive()
                assert lease.memory == data
                with pytest.warns(ResourceWarning, match="ReceivedLease was not released"):
                    del lease
            peer.send(b"third")
            assert taken(await leases.receive()) == b"third"
            assert leases.leased == 0


@pytest.mark.parametrize("whole", [True, False])
async def test_a_forgotten_lease_whose_memory_is_used_stays_lent(*, whole: bool) -> None:
    with connected() as (stream, peer):
        async with receive_many(stream) as leases:
            peer.send(b"data")
            lease = await leases.receive()
            used = lease.memory if whole else lease.memory[:2]
            with pytest.warns(ResourceWarning, match="ReceivedLease was not released"):
                del lease
            await wait_all_tasks_blocked()
            assert leases.leased == 1
            assert used == (b"data" if whole else b"da")
            del used
            for memory_used in (True, False):  # that the first one stays lent hides nothing
                peer.send(b"more")
                lease = await leases.receive()
                used = lease.memory if memory_used else None
                with pytest.warns(ResourceWarning, match="ReceivedLease was not released"):
                    del lease
                await wait_all_tasks_blocked()
                assert leases.leased == 2
                del used


@pytest.mark.parametrize("waits", [True, False], ids=["in a later turn", "at once"])
async def test_a_forgotten_receiver_lets_go_of_its_stream(*, waits: bool) -> None:
    pools = current_manager().pools
    with connected() as (stream, peer):
        peer.send(b"taken")
        with pytest.warns(ResourceWarning, match="a receive_many block was not left"):
            assert taken(await receive_many(stream).receive()) == b"taken"
        if waits:
            await wait_all_tasks_blocked()
        peer.send(b"kept")
        assert await stream.receive_some() == b"kept"
        await wait_all_tasks_blocked()
        assert set(pools._open.values()) <= {pools.receive, pools._for_native}


async def test_a_receiver_that_another_thread_forgets() -> None:
    with connected() as (stream, peer):
        kept = [receive_many(stream)]
        peer.send(b"taken")
        assert taken(await kept[0].receive()) == b"taken"
        with pytest.warns(ResourceWarning, match="a receive_many block was not left"):
            await trio.to_thread.run_sync(kept.clear)
        peer.send(b"kept")
        assert await stream.receive_some() == b"kept"


async def test_closing_the_stream_while_all_buffers_are_lent() -> None:
    """No operation is in flight then that closing could end."""
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=1, buffer_size=1) as leases:
            peer.send(b"12")
            with await leases.receive():
                await wait_all_tasks_blocked()
                async with trio.open_nursery() as nursery:

                    @nursery.start_soon
                    async def closed() -> None:
                        with pytest.raises(trio.ClosedResourceError):
                            await leases.receive()

                    await wait_all_tasks_blocked()
                    stream.socket.close()


# --- Backpressure ---------------------------------------------------------------------------


@pytest.mark.parametrize("max_buffers", [1, 3, 4])
async def test_no_more_buffers_are_lent_than_max_buffers(max_buffers: int) -> None:
    """Data that does not fit into the buffers stays in the socket."""
    with connected() as (stream, peer):
        peer.setblocking(False)
        async with receive_many(stream, max_buffers=max_buffers, buffer_size=10) as leases:
            peer.send(DATA[:10])
            first = await leases.receive()
            peer.send(DATA[10:500])
            await wait_all_tasks_blocked()
            left = stream.socket._sock.recv(1000, stdlib_socket.MSG_PEEK)  # type: ignore[attr-defined]
            assert left == DATA[max_buffers * 10 : 500]
            assert taken(first) == DATA[:10]
            peer.close()
            assert await all_of(leases) == DATA[10:500]


@pytest.mark.parametrize("run", RUNS)
def test_a_consumer_that_holds_all_buffers_waits_until_it_gives_one_back(run: str) -> None:
    async def main() -> None:
        with connected() as (stream, peer):
            async with receive_many(stream, max_buffers=2, buffer_size=1) as leases:
                peer.send(b"abcd")
                held = [await leases.receive(), await leases.receive()]
                got = []

                async def receive() -> None:
                    got.append(taken(await leases.receive()))

                async with trio.open_nursery() as nursery:
                    nursery.start_soon(receive)
                    await wait_all_tasks_blocked()
                    assert not got
                    assert [lease.memory for lease in held] == [b"a", b"b"]
                    held.pop().release()
                assert got == [b"c"]
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await leases.receive()
                taken(held.pop())
                assert taken(await leases.receive()) == b"d"

    RUNS[run](main)


async def test_a_slow_consumer_loses_nothing() -> None:
    """In each round it takes some leases, or none, or keeps some for a while."""
    chance = random.Random(1)
    ledger = ByteLedger()
    with connected("TCP") as (stream, peer):
        peer.setblocking(False)
        held: list[ReceivedLease] = []
        async with receive_many(stream, max_buffers=5, buffer_size=100) as leases:
            for _ in range(2000):
                data = ledger.take(chance.randint(0, 400))
                try:
                    sent = peer.send(data)
                except BlockingIOError:
                    sent = 0
                ledger.take_back(len(data) - sent)
                if chance.random() < 0.5:
                    await wait_all_tasks_blocked()
                for _ in range(chance.randint(0, 6)):
                    with suppress(trio.WouldBlock):
                        held.append(leases.receive_nowait())
                        assert leases.leased <= 5
                for _ in range(chance.randint(0, len(held))):
                    ledger.received(taken(held.pop(0)))
            while held:
                ledger.received(taken(held.pop(0)))
            while ledger.missing:
                ledger.received(taken(await leases.receive()))


CONNECTIONS: Final = 512
ROUNDS_OF_ALL: Final = 20


async def test_a_stream_with_much_data_lets_others_run() -> None:
    """One peer sends without end. Data of others arrives within a few loop iterations."""
    turns = greedy = 0
    latencies = []

    async def count_turns() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def flood(peer: stdlib_socket.socket) -> None:
        with trio.socket.from_stdlib_socket(peer) as sock:
            while True:
                await sock.send(DATA[:65536])

    async def consume(stream: trio.SocketStream) -> None:
        nonlocal greedy
        async with receive_many(stream, max_buffers=4, buffer_size=4096) as leases:
            async for lease in leases:
                with lease:
                    if stream in sent:
                        latencies.append(turns - sent[stream])
                    else:
                        greedy += 1

    pairs = [connected() for _ in range(CONNECTIONS)]
    ends = [pair.__enter__() for pair in pairs]
    sent: dict[Any, int] = {}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        for stream, _ in ends:
            nursery.start_soon(consume, stream)
        nursery.start_soon(flood, ends[0][1].dup())
        for _ in range(ROUNDS_OF_ALL):
            for stream, peer in ends[1:]:
                sent[stream] = turns
                peer.send(b"x")
            enough = len(latencies) + CONNECTIONS - 1
            while len(latencies) < enough:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    for pair in pairs:
        pair.__exit__(None, None, None)
    assert len(latencies) == ROUNDS_OF_ALL * (CONNECTIONS - 1)
    # One enter tells of some twenty, and a turn goes on while each does.
    assert max(latencies) <= CONNECTIONS // 16
    # Once in a turn, after as many as it may hold at first.
    assert turns // 2 < greedy <= turns + 4


# --- What was received and not taken --------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_what_is_left_unread_is_returned(run: str) -> None:
    async def main() -> None:
        with connected() as (stream, peer):
            peer.send(b"abcdefgh")
            async with receive_many(stream, max_buffers=4, buffer_size=2) as leases:
                async for lease in leases:
                    assert taken(lease) == b"ab"
                    break
                await wait_all_tasks_blocked()
            if run == "ring":
                assert leases.unread == b"cdefgh"
            peer.send(b"ij")
            assert leases.unread + await stream.receive_some() == b"cdefghij"
            with pytest.raises(trio.ClosedResourceError):
                await leases.receive()
            async with receive_many(stream) as again:
                peer.send(b"again")
                assert taken(await again.receive()) == b"again"

    RUNS[run](main)


async def test_cancelling_loses_no_byte(rounds: Rounds) -> None:
    ledger = ByteLedger()
    with connected() as (stream, peer):
        async with receive_many(stream) as leases:
            for order in every_order(160):
                outcome = await race(
                    rounds, order, leases.receive, lambda: peer.send(ledger.take(3))
                )
                if outcome:
                    ledger.received(taken(outcome.value))
                while ledger.missing:
                    ledger.received(taken(await leases.receive()))


@pytest.mark.parametrize("sqpoll", [None, SQPoll(idle=0.001)])
@pytest.mark.parametrize("guest", [False, True])
def test_a_sender_in_another_thread(guest: bool, sqpoll: SQPoll | None) -> None:
    """Real races in the kernel between data, cancellations and released buffers."""
    chance = random.Random(0)
    ledger = ByteLedger()
    done = False

    async def main() -> None:
        with connected() as (stream, peer):

            def send() -> None:
                nonlocal done
                for _ in range(1000):
                    peer.sendall(ledger.take(chance.randint(1, 300)))
                done = True

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, send)
                while not done or ledger.missing:
                    await one_block(stream)

    async def one_block(stream: trio.SocketStream) -> None:
        held = []
        async with receive_many(stream, max_buffers=3, buffer_size=100) as leases:
            with trio.move_on_after(0.001 * chance.random()):
                async for lease in leases:
                    held.append(lease)
                    while len(held) > chance.randint(0, 2):
                        ledger.received(taken(held.pop(0)))
            for lease in held:
                ledger.received(taken(lease))
        ledger.received(leases.unread)

    if guest:
        as_guest(main, RingConfig(sqpoll=sqpoll))
    else:
        trio_uring.run(main, ring=RingConfig(sqpoll=sqpoll))


@pytest.mark.ring(entries=8, completion_entries=8)
async def test_small_queues_lose_no_byte() -> None:
    """The CQ overflows, which ends multishot operations, and they begin again."""
    got: list[int] = []
    with ExitStack() as stack:
        ends = [stack.enter_context(connected()) for _ in range(40)]

        async def consume(stream: trio.SocketStream) -> None:
            async with receive_many(stream, buffer_size=100) as leases:
                got.append(len(await all_of(leases)))

        async with trio.open_nursery() as nursery:
            for stream, _ in ends:
                nursery.start_soon(consume, stream)
            await wait_all_tasks_blocked()
            for _ in range(5):
                for _, peer in ends:
                    peer.send(DATA[:1000])
                await trio.lowlevel.checkpoint()
            for _, peer in ends:
                peer.close()
    assert got == [5000] * 40
    assert receives() > 40


@pytest.mark.parametrize("order", Order)
async def test_leaving_at_any_moment(order: Order) -> None:
    """Data is either unread, or still in the socket."""
    ledger = ByteLedger()
    with connected() as (stream, peer):
        peer.setblocking(False)
        for turns in range(20):
            leases = receive_many(stream, max_buffers=4, buffer_size=2)

            async def receive(leases: ReceivedLeases = leases) -> None:
                async with leases:
                    async for lease in leases:
                        ledger.received(taken(lease))

            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    if order.value.startswith("it is ready"):
                        peer.send(ledger.take(9))
                    nursery.start_soon(receive)
                    for _ in range(turns):
                        await trio.lowlevel.checkpoint()
                    peer.send(ledger.take(7))
                    if order.value.endswith("cancelled"):
                        current_manager().ring.flush()
                    for _ in range(turns % 3):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()
            ledger.received(leases.unread)
            while ledger.missing:
                ledger.received(await stream.receive_some())
            assert current_manager().statistics().in_flight == 0


# --- What goes wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_receive_from_one_stream(run: str) -> None:
    async def main() -> None:
        with connected() as (stream, peer):
            async with receive_many(stream) as leases, trio.open_nursery() as nursery:
                nursery.start_soon(leases.receive)
                await wait_all_tasks_blocked()
                for other in (leases.receive, stream.receive_some, receive_many(stream).receive):
                    with pytest.raises(trio.BusyResourceError):
                        await other()
                nursery.cancel_scope.cancel()
            peer.send(b"x")
            assert await stream.receive_some() == b"x"

    RUNS[run](main)


async def test_nobody_else_receives_between_two_steps() -> None:
    """Also while no operation is in flight. Otherwise the order of bytes would change."""
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=1, buffer_size=1) as leases:
            peer.send(b"abc")
            lease = await leases.receive()
            await wait_all_tasks_blocked()
            assert current_manager().statistics().in_flight == 0
            for other in (stream.receive_some, partial(trio.lowlevel.wait_readable, stream.socket)):
                with pytest.raises(trio.BusyResourceError):
                    await other()
            assert taken(lease) == b"a"
            assert taken(await leases.receive()) == b"b"
        assert leases.unread + await stream.receive_some() == b"c"


async def test_it_is_refused_while_another_task_receives() -> None:
    with connected() as (stream, _):
        async with receive_many(stream) as leases, trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await wait_all_tasks_blocked()
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await leases.receive()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", RUNS)
def test_closing_the_stream_ends_it(run: str, kind: str) -> None:
    async def main() -> None:
        with connected(kind) as (stream, peer):
            async with receive_many(stream) as leases, trio.open_nursery() as nursery:

                async def receive() -> None:
                    for _ in range(2):
                        with pytest.raises(trio.ClosedResourceError):
                            await leases.receive()

                nursery.start_soon(receive)
                await wait_all_tasks_blocked()
                await stream.aclose()
                assert peer.recv(1) == b""
            assert leases.unread == b""

    RUNS[run](main)


async def test_closing_the_stream_ends_it_while_all_buffers_are_lent() -> None:
    with connected() as (stream, peer):
        async with receive_many(stream, max_buffers=1) as leases, trio.open_nursery() as nursery:
            peer.send(b"x")
            lease = await leases.receive()

            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await leases.receive()

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            await stream.aclose()
        assert taken(lease) == b"x"


@pytest.mark.parametrize("run", RUNS)
def test_leaving_the_block_ends_a_receive_in_another_task(run: str) -> None:
    """The channel is closed while another task receives, or waits for a lease to come back."""

    async def main() -> None:
        for lent in (False, True):
            with connected() as (stream, peer):
                leases = receive_many(stream, max_buffers=1)
                lease = None
                if lent:
                    peer.send(b"x")
                    lease = await leases.receive()
                async with trio.open_nursery() as nursery:

                    async def receive(leases: ReceivedLeases = leases) -> None:
                        with pytest.raises(trio.ClosedResourceError):
                            await leases.receive()

                    nursery.start_soon(receive)
                    await wait_all_tasks_blocked()
                    await leases.aclose()
                if lease is not None:
                    assert taken(lease) == b"x"

    RUNS[run](main)


def reset(peer: stdlib_socket.socket) -> None:
    peer.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()


@pytest.mark.parametrize("run", RUNS)
def test_a_broken_connection_is_an_error_after_its_data(run: str) -> None:
    async def main() -> None:
        with connected("TCP") as (stream, peer):
            async with receive_many(stream) as leases:
                peer.send(b"x")
                assert taken(await leases.receive()) == b"x"
                reset(peer)
                with pytest.raises(trio.BrokenResourceError) as caught:
                    await leases.receive()
                assert isinstance(caught.value.__cause__, ConnectionResetError)

    RUNS[run](main)


async def test_leaving_before_it_is_known_to_be_broken() -> None:
    """Otherwise the stream would seem to have ended normally."""

    async def leave(stream: trio.SocketStream, peer: stdlib_socket.socket) -> None:
        async with receive_many(stream) as leases:
            with pytest.raises(trio.WouldBlock):
                leases.receive_nowait()
            await wait_all_tasks_blocked()
            reset(peer)
            await wait_all_tasks_blocked()

    with connected("TCP") as (stream, peer):
        with pytest.raises(trio.BrokenResourceError):
            await leave(stream, peer)
        assert await stream.receive_some() == b""


@pytest.mark.parametrize("what", ["RECV_MULTISHOT", "PBUF_RING"])
async def test_a_kernel_without_multishot_receive_receives_one_by_one(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def unknown(fd: int, buffers: Any, *_: object, **_options: object) -> Operation[bytes]:
        model = operations.recv_select(fd, buffers, 0)
        return Operation(model.opcode, model.decode, fd, ioprio=1 << 15, buffers=buffers)

    def open_pool(_count: int, _size: int, *_first: int, incremental: bool = False) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    if what == "RECV_MULTISHOT":
        monkeypatch.setattr(_receive_many.operations, "recv_multishot", unknown)
    else:
        assert current_manager().buffers is not None
        monkeypatch.setattr(current_manager().pools, "open", open_pool)
    with connected() as (stream, peer):
        async with receive_many(stream, buffer_size=1000) as leases:
            peer.send(DATA[:5500])
            peer.close()
            assert await all_of(leases) == DATA[:5500]
    assert f"{what}: EINVAL" in current_manager().statistics().refused
    assert receives() == 7 + (what == "RECV_MULTISHOT")


async def test_groups_are_used_again() -> None:
    with connected() as (stream, peer):
        for _ in range(100):
            async with receive_many(stream) as leases:
                peer.send(b"x")
                assert taken(await leases.receive()) == b"x"
    assert not current_manager().pools._open


async def test_it_leaves_no_cyclic_garbage() -> None:
    """If the program forgot to close it, it is closed with the last reference to it."""
    gc.disable()
    try:
        with connected() as (stream, peer):
            for _ in range(2):  # the second one uses an entry again
                async with receive_many(stream) as leases:
                    peer.send(b"x")
                    assert taken(await leases.receive()) == b"x"
                peer.send(b"y")
                assert await stream.receive_some() == b"y"
        gone = ref(stream.socket)
        del stream, leases
        assert gone() is None
    finally:
        gc.enable()


async def test_wrong_arguments_are_refused() -> None:
    with connected() as (stream, peer):
        with pytest.raises(TypeError, match="stream"):
            receive_many(peer)  # type: ignore[arg-type]
        datagrams = trio.socket.socket(type=trio.socket.SOCK_DGRAM)
        with datagrams, pytest.raises(ValueError, match="SOCK_STREAM"):
            receive_many(datagrams)
        for number in (0, 32769):
            with pytest.raises(ValueError, match="max_buffers"):
                receive_many(stream, max_buffers=number)
        for number in (0, (1 << 20) + 1):
            with pytest.raises(ValueError, match="buffer_size"):
                receive_many(stream, buffer_size=number)


async def test_a_closed_stream_is_refused() -> None:
    with connected() as (stream, _):
        await stream.aclose()
        async with receive_many(stream) as leases:
            with pytest.raises(trio.ClosedResourceError):
                await leases.receive()


def test_outside_a_run_it_is_refused() -> None:
    ours, _ = memory_stream_pair()
    with pytest.raises(RuntimeError, match="async context"):
        receive_many(ours)


def test_what_outlives_its_run_never_waits() -> None:
    """Nothing would wake a task of another run."""

    async def first() -> tuple[Any, Any]:
        left, right = (trio.SocketStream(sock) for sock in trio.socket.socketpair())
        receiver = receive_many(left)
        await right.send_all(b"x")
        (await receiver.receive()).release()
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        accepting = trio_uring.accept_many(listener)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepting.accept)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        kept.extend((left, right, listener))
        return receiver, accepting

    async def later(receiver: Any, accepting: Any) -> None:
        for wait in (receiver.receive, accepting.accept):
            with pytest.raises(RuntimeError, match="belongs to another run"):
                await wait()
        await receiver.aclose()
        await accepting.aclose()
        for each in kept:
            await each.aclose()

    kept: list[trio.abc.AsyncResource] = []
    ring = RingConfig(require=True)
    trio_uring.run(later, *trio_uring.run(first, ring=ring), ring=ring)
