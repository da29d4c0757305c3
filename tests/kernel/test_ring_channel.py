"""`open_ring_channel`: every object arrives once, whatever the loops at its ends do."""

from __future__ import annotations

import os
import queue
import random
import threading
from collections import Counter
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import trio.testing
from accounting import open_fds
from children import in_thread
from outcome import Error
from races import current_manager
from scenarios import as_guest
from trio.lowlevel import checkpoint, reschedule
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import (
    RingConfig,
    RingReceiveChannel,
    RingSendChannel,
    SQPoll,
    open_ring_channel,
)
from trio_uring._channels._channel_state import Waiter
from trio_uring._engine import _mailbox
from trio_uring._engine._ring import Ring
from trio_uring._operations import msg_ring
from trio_uring.lowlevel import perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Self

    Main = Callable[[], Awaitable[object]]

pytestmark = pytest.mark.usefixtures("fd_ledger")

RUNS: Final[dict[str, Callable[[Main], Any]]] = {
    "ring": partial(trio_uring.run, ring=RingConfig(require=True)),
    "restricted": partial(
        trio_uring.run, ring=RingConfig(require=True, allowed_operations=frozenset())
    ),
    "polling": partial(trio_uring.run, ring=RingConfig(require=True, sqpoll=SQPoll(idle=0.001))),
    "no ring": trio.run,
}
OBJECTS: Final = 200


def wake_messages() -> int:
    """How many messages the current run has sent to other rings."""
    statistics = trio.lowlevel.current_statistics().io_statistics
    return statistics.completed.get("MSG_RING", 0) if statistics.backend == "io_uring" else 0


def both(one: Callable[[], object], other: Callable[[], object]) -> None:
    """Run each in a new thread, and raise the exception of the first that fails.

    It is raised at once, because the other may wait for the failed one indefinitely.
    """
    endings: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run(function: Callable[[], object]) -> None:
        try:
            function()
        except BaseException as exc:  # noqa: BLE001 (raised below)
            endings.put(exc)
        else:
            endings.put(None)

    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in (one, other)]
    for thread in threads:
        thread.start()
    for _ in threads:
        if (exc := endings.get()) is not None:
            raise exc
    for thread in threads:
        thread.join()


def parked(end: RingSendChannel[Any] | RingReceiveChannel[Any], count: int = 1) -> bool:
    found = end.statistics()
    return found.tasks_waiting_send + found.tasks_waiting_receive == count


def test_a_failure_in_one_thread_is_raised_while_the_other_waits() -> None:
    waits = threading.Event()

    def fail() -> None:
        raise ValueError

    for functions in ((fail, waits.wait), (waits.wait, fail)):
        with pytest.raises(ValueError, match=r"^$"):
            both(*functions)
    waits.set()


# --- Two loops ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, inf])
@pytest.mark.parametrize("receiver", ["ring", "restricted", "polling", "no ring"])
@pytest.mark.parametrize("sender", ["ring", "restricted", "polling", "no ring"])
def test_objects_arrive_in_order(sender: str, receiver: str, size: float) -> None:
    send_channel, receive_channel = open_ring_channel[object](size)
    sent = [object() for _ in range(OBJECTS)]
    received: list[object] = []
    wakes: dict[str, int] = {}

    async def send() -> None:
        async with send_channel:
            for each in sent:
                await send_channel.send(each)
        await wait_all_tasks_blocked()
        wakes["sender"] = wake_messages()

    async def receive() -> None:
        async with receive_channel:
            received.extend([each async for each in receive_channel])
        await wait_all_tasks_blocked()
        wakes["receiver"] = wake_messages()

    both(partial(RUNS[sender], send), partial(RUNS[receiver], receive))
    assert received == sent
    # Trio 0.32 has no such statistic.
    assert getattr(receive_channel.statistics(), "peak_buffer_used", 0) <= size
    on_rings = {sender, receiver} <= {"ring", "polling", "restricted"}
    for name, run in (("sender", sender), ("receiver", receiver)):
        may_tell = on_rings and run in ("ring", "polling")
        assert may_tell or not wakes[name]
    if sender == receiver == "ring" and size == 0:
        assert sum(wakes.values()) >= OBJECTS  # for each, one of the two had to wait


async def test_objects_arrive_if_the_other_loop_is_a_guest() -> None:
    send_channel, receive_channel = open_ring_channel[int](0)
    reply, replies = open_ring_channel[int](0)

    sent = 0

    async def guest() -> None:
        nonlocal sent
        async with receive_channel, reply:
            async for number in receive_channel:
                await reply.send(number + 1)
        await wait_all_tasks_blocked()
        sent = wake_messages()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.to_thread.run_sync, partial(as_guest, guest, RingConfig(require=True))
        )
        async with send_channel, replies:
            for number in range(OBJECTS):
                await send_channel.send(number)
                assert await replies.receive() == number + 1
    assert wake_messages() + sent >= 2 * OBJECTS  # for each, one of the two had to wait


async def test_a_thread_that_waits_for_this_one_is_woken() -> None:
    """Messages are sent at once: the sender may wait for them before its next iteration."""
    send_channel, receive_channel = open_ring_channel[int](1)
    arrived = threading.Event()

    async def receive() -> None:
        assert await receive_channel.receive() == 1
        arrived.set()
        with pytest.raises(trio.EndOfChannel):
            await receive_channel.receive()
        receive_channel.close()

    thread = threading.Thread(target=RUNS["ring"], args=(receive,))
    thread.start()
    while not parked(receive_channel):
        await checkpoint()
    send_channel.send_nowait(1)
    arrived.wait()
    while not parked(receive_channel):
        await checkpoint()
    send_channel.close()
    thread.join()
    await wait_all_tasks_blocked()
    assert wake_messages() == 2


async def test_what_is_not_async_works_outside_a_run() -> None:
    """Synchronous methods work in any thread."""
    send_channel, receive_channel = open_ring_channel[int](1)
    received: list[int] = []

    async def receive() -> None:
        async with receive_channel:
            async for each in receive_channel:
                received.append(each)  # noqa: PERF401 (one by one)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        in_thread(partial(send_channel.send_nowait, 1))
        await wait_all_tasks_blocked()
        assert received == [1]
        in_thread(send_channel.close)
    assert wake_messages() == 0
    for end in open_ring_channel[int](0):
        in_thread(end.clone().close)
        in_thread(end.close)
    with pytest.raises(RuntimeError, match="async context"):
        in_thread(lambda: open_ring_channel[int](0)[0].send(1).send(None))


@pytest.mark.parametrize("run", ["ring", "restricted", "no ring"])
def test_many_loops_that_cancel_lose_no_object(run: str) -> None:
    """Four loops send, receive and cancel both. Every object arrives once."""
    send_channel, receive_channel = open_ring_channel[int](2)
    numbers = iter(range(10**9))
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    endings: Counter[str] = Counter()
    rounds = 300

    async def one(what: Main, name: str, chance: random.Random) -> None:
        done = False

        async def work() -> None:
            nonlocal done
            await what()
            done = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            for _ in range(chance.randrange(4)):
                await checkpoint()
            if chance.random() < 0.5:
                nursery.cancel_scope.cancel()
        endings[f"{name} {done}"] += 1

    async def send(channel: RingSendChannel[int], chance: random.Random) -> None:
        async def send_one() -> None:
            number = next(numbers)
            await channel.send(number)
            sent[number] += 1

        with channel:
            for _ in range(rounds):
                await one(send_one, "send", chance)

    async def receive(channel: RingReceiveChannel[int], chance: random.Random) -> None:
        ended = False

        async def receive_one() -> None:
            nonlocal ended
            try:
                received[await channel.receive()] += 1
            except trio.EndOfChannel:
                ended = True

        with channel:
            while not ended:
                await one(receive_one, "receive", chance)

    with send_channel, receive_channel:
        mains = [
            partial(send, send_channel.clone(), random.Random(1)),
            partial(receive, receive_channel.clone(), random.Random(2)),
            partial(send, send_channel.clone(), random.Random(3)),
            partial(receive, receive_channel.clone(), random.Random(4)),
        ]
        send_channel.close()
        both(
            lambda: both(partial(RUNS[run], mains[0]), partial(RUNS[run], mains[1])),
            lambda: both(partial(RUNS[run], mains[2]), partial(RUNS[run], mains[3])),
        )
    assert received == sent
    assert set(sent.values()) == {1}
    assert set(endings) == {"send True", "send False", "receive True", "receive False"}


# --- Cancellation ---------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["ring", "no ring"])
def test_what_was_handed_over_is_not_lost_to_a_cancel(run: str) -> None:
    """A task is cancelled after another thread served it, before its loop delivers the object."""

    async def main() -> None:
        send_channel, receive_channel = open_ring_channel[str](0)
        done: list[object] = []

        async def receive() -> None:
            done.append(await receive_channel.receive())

        async def send() -> None:
            await send_channel.send("sent")
            done.append(None)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            in_thread(partial(send_channel.send_nowait, "received"))
            nursery.cancel_scope.cancel()
        assert done == ["received"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            assert in_thread(receive_channel.receive_nowait) == "sent"
            nursery.cancel_scope.cancel()
        assert done == ["received", None]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert done == ["received", None]
        for what in (receive_channel.receive_nowait, partial(send_channel.send_nowait, "")):
            with pytest.raises(trio.WouldBlock):
                what()
        with trio.CancelScope() as scope:
            scope.cancel()
            await receive_channel.receive()
        assert scope.cancelled_caught
        assert receive_channel.statistics().tasks_waiting_receive == 0
        send_channel.close()
        receive_channel.close()

    RUNS[run](main)


# --- Loops that end -------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["ring", "no ring"])
def test_an_end_closes_with_the_run_that_used_it(run: str) -> None:
    for ours, theirs, error in (
        (0, 1, trio.EndOfChannel),
        (1, 0, trio.BrokenResourceError),
    ):
        channel = open_ring_channel[str](0)

        async def use(end: Any) -> None:
            await (end.send("x") if isinstance(end, RingSendChannel) else end.receive())

        async def use_once(end: Any = channel[ours]) -> None:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(use, end)
                    await wait_all_tasks_blocked()
                    scope.cancel()

        async def wait(end: Any = channel[theirs], error: Any = error) -> None:
            async with trio.open_nursery() as nursery:

                async def expect() -> None:
                    with suppress(error):
                        while True:
                            await use(end)

                nursery.start_soon(expect)
                await wait_all_tasks_blocked()
                await trio.to_thread.run_sync(RUNS[run], use_once)

        RUNS[run](wait)
        with pytest.raises(trio.ClosedResourceError):
            channel[ours].clone()
        channel[theirs].close()


async def test_an_end_that_moved_on_stays_open() -> None:
    send_channel, receive_channel = open_ring_channel[int](9)
    token = trio.lowlevel.current_trio_token()

    async def elsewhere() -> None:
        await send_channel.send(1)
        back_here = partial(trio.from_thread.run, send_channel.send, 2, trio_token=token)
        await trio.to_thread.run_sync(back_here)

    await trio.to_thread.run_sync(RUNS["ring"], elsewhere)
    await send_channel.send(3)
    assert [receive_channel.receive_nowait() for _ in range(3)] == [1, 2, 3]
    send_channel.close()
    receive_channel.close()


async def test_what_a_run_did_not_live_to_receive_goes_back() -> None:
    """Its mailbox is closed. Its objects, and later ones, go to other receivers, in order."""
    send_channel, receive_channel = open_ring_channel[int](9)

    async def receive(channel: RingReceiveChannel[int]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await channel.receive()

    async def main() -> None:
        mailbox = current_manager().open_mailbox()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(receive, receive_channel.clone())
            await wait_all_tasks_blocked()
            waiters = list(receive_channel.state.receivers)
            for number in range(2):
                in_thread(partial(send_channel.send_nowait, number))
            mailbox.close(drained=False)  # as when the run crashes
            send_channel.send_nowait(2)
            # And Trio would not wake them any more, either.
            for waiter in waiters:
                reschedule(waiter.task, Error(trio.ClosedResourceError()))

    await trio.to_thread.run_sync(RUNS["ring"], main)
    assert [receive_channel.receive_nowait() for _ in range(3)] == [0, 1, 2]
    for end in (send_channel, receive_channel):
        end.close()


async def test_a_delivery_after_the_end_of_the_run_is_made_at_once() -> None:
    mailbox = _mailbox.Mailbox(None)
    mailbox.close(drained=True)
    made: list[int] = []
    assert not mailbox.put(partial(made.append, 1))
    assert made == [1]


# --- Loops that are busy --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_iterations", "chosen"),
    [
        ([0.0, 0.0], 0),  # no rings
        ([9.0, inf, inf], 1),  # who sleeps, and waited longest
        ([7.0, 9.0, 8.0], 1),  # who turned last
        ([9.0] * 16 + [inf], 0),  # too far behind
    ],
)
async def test_an_object_goes_to_a_loop_that_is_not_busy(
    last_iterations: list[float], chosen: int
) -> None:
    send_channel, receive_channel = open_ring_channel[int](0)
    waiters = []
    for last_iteration in last_iterations:
        mailbox = _mailbox.Mailbox(None)
        mailbox.last_iteration = last_iteration
        waiters.append(Waiter(receive_channel, None, mailbox))  # type: ignore[arg-type]
    receive_channel.state.receivers = dict.fromkeys(waiters)
    assert receive_channel.state.put(1) == [waiters[chosen]]
    assert len(receive_channel.state.receivers) == len(waiters) - 1
    for end in (send_channel, receive_channel):
        end.state.receivers.clear()
        end.close()


class Busy:
    """A task of this loop has an object assigned, then the loop computes while another runs."""

    def __init__(self) -> None:
        self.send_channel, self.receive_channel = open_ring_channel[int](0)
        self.clone = self.receive_channel.clone()
        self.ours: list[object] = []
        self.theirs: list[object] = []
        self.before: Callable[[], object] = list
        self.scope = trio.CancelScope()

    async def _receive(self) -> None:
        with self.scope:
            try:
                self.ours.append(await self.receive_channel.receive())
            except trio.EndOfChannel as exc:
                self.ours.append(type(exc))

    async def _take(self) -> None:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with suppress(trio.EndOfChannel):
                    self.theirs.append(await self.clone.receive())

            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            await wait_all_tasks_blocked()
            in_thread(partial(self.send_channel.send_nowait, 1))
            self.before()
            in_thread(partial(RUNS["ring"], self._take))
            await wait_all_tasks_blocked()
            if self.receive_channel.statistics().tasks_waiting_receive:
                self.send_channel.send_nowait(2)
        self.send_channel.close()
        self.receive_channel.close()


async def test_another_loop_takes_what_this_one_has_not_seen() -> None:
    busy = Busy()
    await busy.run()
    assert (busy.ours, busy.theirs) == ([2], [1])


async def test_an_object_is_not_taken_from_a_task_that_was_cancelled() -> None:
    """Otherwise it would wait indefinitely, because Trio can't cancel it any more."""
    busy = Busy()
    busy.before = busy.scope.cancel
    await busy.run()
    assert (busy.ours, busy.theirs) == ([1], [])


async def test_an_object_is_not_taken_if_its_end_is_closed() -> None:
    busy = Busy()
    busy.before = busy.receive_channel.close
    await busy.run()
    assert (busy.ours, busy.theirs) == ([1], [])


async def test_a_task_whose_object_was_taken_is_told_of_the_end() -> None:
    busy = Busy()
    busy.before = busy.send_channel.close
    await busy.run()
    assert (busy.ours, busy.theirs) == ([trio.EndOfChannel], [1])


# --- Messages that fail ---------------------------------------------------------------------


class Peer:
    """A task in the loop of another thread. What it receives is in ``received``."""

    def __init__(self) -> None:
        self.send_channel, self.receive_channel = open_ring_channel[int](0)
        self.received: list[int] = []
        self.mailbox: _mailbox.Mailbox | None = None

    async def main(self) -> None:
        self.mailbox = current_manager().open_mailbox()
        async with self.receive_channel:
            async for number in self.receive_channel:
                self.received.append(number)

    async def waits(self) -> None:
        while not parked(self.receive_channel):
            await checkpoint()

    async def send(self, number: int) -> None:
        await self.waits()
        self.send_channel.send_nowait(number)

    async def __aenter__(self) -> Self:
        self.thread = threading.Thread(target=RUNS["ring"], args=(self.main,))
        self.thread.start()
        await self.waits()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.send_channel.close()
        await trio.to_thread.run_sync(self.thread.join)


async def test_a_message_that_reaches_no_ring_loses_no_object() -> None:
    """The other loop is woken nevertheless, and no fd is lost."""
    async with Peer() as peer:
        await peer.send(1)
        assert peer.mailbox is not None
        with Path("/dev/null").open("rb") as null:
            os.dup2(null.fileno(), peer.mailbox._fd, inheritable=False)
        await peer.send(2)
        await peer.send(3)
    assert peer.received == [1, 2, 3]
    assert wake_messages() >= 3


async def test_a_full_ring_loses_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Peer() as peer:
        with monkeypatch.context() as patch:
            patch.setattr(current_manager().ring, "push", lambda *_: False)
            peer.send_channel.send_nowait(1)
        await peer.waits()
        with monkeypatch.context() as patch:
            patch.setattr(current_manager().ring, "flush", lambda: None)
            peer.send_channel.send_nowait(2)
        await wait_all_tasks_blocked()
    assert peer.received == [1, 2]


async def test_too_many_open_files_lose_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def dup_fd(_ring: Ring) -> int:
        raise OSError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(Ring, "dup_fd", dup_fd)
        async with Peer() as peer:
            for number in range(3):
                await peer.send_channel.send(number)
    assert peer.received == [0, 1, 2]
    assert wake_messages() == 0


async def test_a_message_to_a_closed_ring_loses_no_object() -> None:
    """The ring stays open for the message, so that no other file gets its fd."""
    async with Peer() as peer:
        assert peer.mailbox is not None
        before = open_fds()
        fd = peer.mailbox.acquire_fd()
        assert before[fd] == "anon_inode:[io_uring]"
    assert open_fds()[fd] == "anon_inode:[io_uring]"
    assert peer.mailbox.acquire_fd() == -1
    with suppress(OSError):  # what the kernel says is its own affair
        await perform(msg_ring(fd, 4))
    peer.mailbox.release_fd(fd)
    assert fd not in open_fds()


async def test_a_ring_that_closes_with_messages_in_flight_loses_no_object() -> None:
    """They are delivered first."""
    async with Peer() as peer:

        async def main() -> None:
            peer.send_channel.send_nowait(1)

        await trio.to_thread.run_sync(RUNS["ring"], main)
        while not peer.received:
            await checkpoint()


# --- As Trio's ------------------------------------------------------------------------------

OPEN: Final = {"Trio's": trio.open_memory_channel, "ours": open_ring_channel}


@pytest.fixture(params=OPEN)
def opened(request: pytest.FixtureRequest) -> Callable[[float], Any]:
    return OPEN[request.param]


async def test_nowait_raises_where_it_would_wait(opened: Callable[[float], Any]) -> None:
    send_channel, receive_channel = opened(2)
    with pytest.raises(trio.WouldBlock):
        receive_channel.receive_nowait()
    send_channel.send_nowait(1)
    send_channel.send_nowait(2)
    with pytest.raises(trio.WouldBlock):
        send_channel.send_nowait(3)
    found = send_channel.statistics()
    assert found == receive_channel.statistics()
    assert found.current_buffer_used == found.max_buffer_size == 2
    assert getattr(found, "peak_buffer_used", 2) == 2
    assert found.open_send_channels == found.open_receive_channels == 1
    assert receive_channel.receive_nowait() == 1
    send_channel.close()
    assert receive_channel.receive_nowait() == 2
    with pytest.raises(trio.EndOfChannel):
        receive_channel.receive_nowait()
    with pytest.raises(trio.EndOfChannel):
        await receive_channel.receive()
    await receive_channel.aclose()
    for what in (send_channel.clone, receive_channel.clone, receive_channel.receive_nowait):
        with pytest.raises(trio.ClosedResourceError):
            what()
    with pytest.raises(trio.ClosedResourceError):
        send_channel.send_nowait(1)
    with pytest.raises(trio.ClosedResourceError):
        await send_channel.send(1)
    with pytest.raises(trio.ClosedResourceError):
        await receive_channel.receive()
    send_channel.close()
    receive_channel.close()


async def test_tasks_are_served_in_the_order_they_came(opened: Callable[[float], Any]) -> None:
    send_channel, receive_channel = opened(1)
    done: list[object] = []

    async def send(number: int) -> None:
        await send_channel.send(number)
        done.append(number)

    async def receive(name: str) -> None:
        done.append((name, await receive_channel.receive()))

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(send, number)
            await wait_all_tasks_blocked()
        assert done == [0]
        assert send_channel.statistics().tasks_waiting_send == 2
        assert receive_channel.receive_nowait() == 0
        await wait_all_tasks_blocked()
        assert done == [0, 1]
        assert [receive_channel.receive_nowait() for _ in range(2)] == [1, 2]
    done.clear()
    async with trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(receive, name)
            await wait_all_tasks_blocked()
        send_channel.send_nowait(1)
        await send_channel.send(2)
    assert sorted(done) == [("a", 1), ("b", 2)]
    send_channel.close()
    receive_channel.close()


async def test_closing_wakes_the_tasks_that_wait(opened: Callable[[float], Any]) -> None:
    async def expect(error: type[Exception], what: Callable[..., Awaitable[object]]) -> None:
        with pytest.raises(error):
            await what()

    send_channel, receive_channel = opened(0)
    async with trio.open_nursery() as nursery:
        clone = send_channel.clone()
        nursery.start_soon(expect, trio.ClosedResourceError, partial(send_channel.send, 1))
        nursery.start_soon(clone.send, 2)
        await wait_all_tasks_blocked()
        send_channel.close()
        await wait_all_tasks_blocked()
        assert receive_channel.statistics().tasks_waiting_send == 1
        assert await receive_channel.receive() == 2
    clone.close()
    receive_channel.close()

    send_channel, receive_channel = opened(0)
    async with trio.open_nursery() as nursery:
        clone = receive_channel.clone()
        nursery.start_soon(expect, trio.EndOfChannel, clone.receive)
        nursery.start_soon(expect, trio.ClosedResourceError, receive_channel.receive)
        await wait_all_tasks_blocked()
        receive_channel.close()
        await wait_all_tasks_blocked()
        assert clone.statistics().tasks_waiting_receive == 1
        send_channel.close()
    clone.close()

    send_channel, receive_channel = opened(1)
    send_channel.send_nowait(0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(expect, trio.BrokenResourceError, partial(send_channel.send, 1))
        await wait_all_tasks_blocked()
        with receive_channel:
            pass
    assert send_channel.statistics().current_buffer_used == 0
    with pytest.raises(trio.BrokenResourceError):
        send_channel.send_nowait(1)
    send_channel.close()


@pytest.mark.parametrize(
    ("size", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (-inf, TypeError)]
)
def test_wrong_sizes_are_refused(
    opened: Callable[[Any], Any], size: object, error: type[Exception]
) -> None:
    with pytest.raises(error):
        opened(size)


async def test_every_call_is_a_checkpoint() -> None:
    send_channel, receive_channel = open_ring_channel[int](1)
    for what in (
        partial(send_channel.send, 1),
        receive_channel.receive,
        send_channel.aclose,
        receive_channel.aclose,
    ):
        with trio.testing.assert_checkpoints():
            await what()
