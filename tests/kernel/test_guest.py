"""Guest mode on a ring: another loop runs Trio's, and a worker thread waits for the ring."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Final

import pytest
import trio
from abandoned_guests import ABANDONED_GUESTS, REQUIRED, Host
from accounting import open_fds
from children import in_child, in_thread, output_of, run_python
from scenarios import as_guest, everything
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import ForkedRingError, RingConfig
from trio_uring._engine._guest import GuestWakeup
from trio_uring._engine._io_manager import UringIOManager
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import RingStatistics, on_ring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import outcome


def io_statistics() -> RingStatistics:
    statistics: object = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(statistics, RingStatistics)
    return statistics


ROUNDS: Final = 10


@contextmanager
def everything_closed() -> Iterator[None]:
    before = open_fds()
    yield
    gc.collect()
    assert open_fds() == before


# --- What a guest does ----------------------------------------------------------------------


def test_all_scenarios_as_a_guest_of_asyncio() -> None:
    statistics = as_guest(everything, REQUIRED)
    assert statistics.backend == "io_uring"
    assert statistics.completed["RECV"] > 100
    assert statistics.in_flight == 0


def test_all_scenarios_as_a_guest_of_the_smallest_host() -> None:
    assert Host().run(everything).backend == "io_uring"


def test_asyncio_and_its_guest_at_once() -> None:
    """Both loops wait, and neither blocks the other."""

    async def host() -> int:
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[outcome.Outcome[int]] = loop.create_future()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)

        async def guest() -> int:
            count = 0
            with trio.socket.from_stdlib_socket(theirs) as sock:
                while data := await sock.recv(100):
                    await sock.send(data)
                    count += 1
            return count

        trio_uring.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            run_sync_soon_not_threadsafe=loop.call_soon,
            done_callback=ended.set_result,
            ring=REQUIRED,
        )
        with ours:
            for number in range(200):
                await loop.sock_sendall(ours, b"%d" % number)
                assert await loop.sock_recv(ours, 100) == b"%d" % number
            ours.shutdown(socket.SHUT_WR)
            return (await ended).unwrap()

    assert asyncio.run(host()) == 200


def test_deadlines_wake_a_guest() -> None:
    async def main() -> None:
        for seconds in (0, 0.001, 0.01):
            with trio.move_on_after(seconds) as scope:
                await trio.sleep_forever()
            assert scope.cancelled_caught
        a, b = trio.socket.socketpair()
        with a, b:
            with trio.move_on_after(0.01) as scope:
                await a.recv(1)
            assert scope.cancelled_caught
        await trio.sleep(0.001)

    Host().run(main)


def test_work_that_one_enter_does_not_finish() -> None:
    """An enter runs about 20 task works. These complete nothing, but a later one does."""
    pairs = [socket.socketpair() for _ in range(100)]
    received: list[bytes] = []
    waiting = False

    async def main() -> None:
        nonlocal waiting

        async def receive(sock: trio.socket.SocketType) -> None:
            with sock:
                while True:
                    received.append(await sock.recv(10))
                    if len(received) == ROUNDS:
                        all_received.set()

        async with trio.open_nursery() as nursery:
            for ours, _ in pairs:
                nursery.start_soon(receive, trio.socket.from_stdlib_socket(ours.dup()))
            await wait_all_tasks_blocked()
            waiting = True
            await all_received.wait()
            nursery.cancel_scope.cancel()

    all_received = trio.Event()
    host = Host()
    host.start(main)
    host.turn_until(lambda: waiting)
    for number in range(ROUNDS):
        for ours, theirs in pairs:
            theirs.send(b"x")
            if ours is not pairs[-1][0]:
                ours.recv(10)
        host.turn_until(lambda: len(received) > number)
    host.turn_until(lambda: host.outcomes)
    host.outcomes[0].unwrap()
    for sock in chain(*pairs):
        sock.close()


def test_blocking_until_all_tasks_do() -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.recv, 1)
                await wait_all_tasks_blocked(0.001)
                await b.send(b"x")

    Host().run(main)


def test_statistics() -> None:
    async def main() -> None:
        await wait_all_tasks_blocked()  # Trio's own tasks, too
        first = io_statistics()
        assert first.backend == "io_uring"
        assert on_ring()
        a, b = trio.socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.recv, 1)
                await wait_all_tasks_blocked()
                waiting = io_statistics()
                assert waiting.in_flight == 1
                assert waiting.tasks_waiting_read == first.tasks_waiting_read + 1
                await b.send(b"x")
        last = io_statistics()
        assert (last.completed["RECV"], last.completed["SEND"]) == (1, 1)
        assert last.in_flight == 0
        assert last.submitted > first.submitted
        assert last.enters > first.enters

    Host().run(main)


# --- What the host does meanwhile -----------------------------------------------------------


def waiting_for_the_worker(host: Host) -> bool:
    """Return whether the guest waits in its worker thread, with nothing for the host to do."""
    return host.calls.empty()


@pytest.mark.parametrize("tasks", [1, 100])
@pytest.mark.parametrize("entries", [8, 256])
def test_the_host_cancels_while_the_worker_sleeps(tasks: int, entries: int) -> None:
    # With few entries the cancels fill the SQ, and their completions overflow the CQ.
    config = RingConfig(entries=entries, completion_entries=entries, require=True)
    scope = trio.CancelScope()
    parked = 0

    async def main() -> str:
        nonlocal parked
        pairs = [trio.socket.socketpair() for _ in range(tasks)]
        with scope:
            async with trio.open_nursery() as nursery:
                for a, _ in pairs:
                    nursery.start_soon(a.recv, 1)
                await wait_all_tasks_blocked()
                parked = 1
        for pair in pairs:
            for end in pair:
                end.close()
        return "cancelled" if scope.cancelled_caught else "not"

    host = Host()
    host.start(main, ring=config)
    host.turn_until(lambda: parked)
    host.turn_until(lambda: waiting_for_the_worker(host))
    scope.cancel()
    host.turn_until(lambda: host.outcomes)
    assert host.outcomes[0].unwrap() == "cancelled"


def test_the_host_cancels_at_any_moment() -> None:
    async def main(scope: trio.CancelScope) -> None:
        a, b = trio.socket.socketpair()
        with a, b, scope:
            await a.recv(1)

    for moment in range(40):
        scope = trio.CancelScope()
        host = Host()
        host.start(main, scope)
        for _ in range(moment % 8):
            if not host.outcomes and not waiting_for_the_worker(host):
                host.turn()
        scope.cancel()
        host.turn_until(lambda: host.outcomes)
        host.outcomes[0].unwrap()
        assert scope.cancelled_caught


def test_the_host_closes_what_the_guest_waits_for() -> None:
    socks: list[trio.socket.SocketType] = []

    async def main() -> str:
        socks.extend(trio.socket.socketpair())
        with pytest.raises(trio.ClosedResourceError):
            await socks[0].recv(1)
        assert await socks[1].recv(1) == b""
        socks[1].close()
        return "closed"

    host = Host()
    host.start(main)
    host.turn_until(lambda: socks and waiting_for_the_worker(host))
    socks[0].close()
    host.turn_until(lambda: host.outcomes)
    assert host.outcomes[0].unwrap() == "closed"


def test_data_comes_while_the_worker_sleeps() -> None:
    ours, theirs = socket.socketpair()

    async def main() -> bytes:
        with trio.socket.from_stdlib_socket(theirs) as sock:
            received = b""
            while data := await sock.recv(100):
                received += data
            return received

    host = Host()
    host.start(main)
    for _ in range(20):
        host.turn_until(lambda: waiting_for_the_worker(host))
        ours.send(b"x")
        host.turn()
    ours.close()
    host.turn_until(lambda: host.outcomes)
    assert host.outcomes[0].unwrap() == b"x" * 20


@pytest.mark.parametrize("thread", ["host's", "another"])
def test_run_sync_soon(thread: str) -> None:
    tokens: list[trio.lowlevel.TrioToken] = []
    event = trio.Event()

    async def main() -> str:
        tokens.append(trio.lowlevel.current_trio_token())
        await event.wait()
        return "woken"

    host = Host()
    host.start(main)
    host.turn_until(lambda: tokens and waiting_for_the_worker(host))
    if thread == "another":
        in_thread(lambda: tokens[0].run_sync_soon(event.set))
    else:
        tokens[0].run_sync_soon(event.set)
    host.turn_until(lambda: host.outcomes)
    assert host.outcomes[0].unwrap() == "woken"


@pytest.mark.parametrize("protected", [True, False])
def test_ctrl_c(protected: bool) -> None:
    parked = False

    async def main() -> None:
        nonlocal parked
        a, b = trio.socket.socketpair()
        with a, b:
            parked = True
            await a.recv(1)

    host = Host()
    host.start(trio.lowlevel.enable_ki_protection(main) if protected else main)
    host.turn_until(lambda: parked and waiting_for_the_worker(host))
    signal.raise_signal(signal.SIGINT)
    host.turn_until(lambda: host.outcomes)
    with pytest.raises(KeyboardInterrupt):
        host.outcomes[0].unwrap()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_takes_no_wake_up_from_its_parent() -> None:
    async def main() -> None:
        manager = current_io_manager()
        assert isinstance(manager, UringIOManager)
        ours, theirs = socket.socketpair()
        with ours, trio.socket.from_stdlib_socket(theirs) as sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.recv, 1)
                await wait_all_tasks_blocked()
                assert manager._guest is not None
                ours.send(b"x")
                assert manager._guest.wait(0)
                assert in_child(partial(refused, manager)) == 0
                assert manager._guest.wait(0)

    def refused(manager: UringIOManager) -> None:
        with pytest.raises(ForkedRingError):
            manager.get_events(0)

    Host().run(main)


# --- Many, one after the other --------------------------------------------------------------


def test_a_hundred_guest_runs_leave_nothing_open() -> None:
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            await b.send(b"x")
            assert await a.recv(1) == b"x"

    Host().run(main)
    with everything_closed():
        for _ in range(100):
            Host().run(main)


def test_several_guest_runs_one_after_the_other_in_one_asyncio() -> None:
    async def main() -> int:
        return io_statistics().entries

    async def host() -> None:
        loop = asyncio.get_running_loop()
        for entries in (8, 16, 32):
            ended: asyncio.Future[outcome.Outcome[int]] = loop.create_future()
            trio_uring.start_guest_run(
                main,
                run_sync_soon_threadsafe=loop.call_soon_threadsafe,
                done_callback=ended.set_result,
                ring=RingConfig(entries=entries, require=True),
            )
            assert (await ended).unwrap() == entries

    asyncio.run(host())


def test_all_scenarios_as_a_guest_in_development_mode() -> None:
    """All tests of this file, in development mode and with warnings as errors."""
    code = """
        from scenarios import as_guest, everything
        for _ in range(2):
            assert as_guest(everything).backend == "io_uring"
    """
    assert output_of(run_python(code)) == []


# --- Abandoned ------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ABANDONED_GUESTS, ids=lambda program: program.__name__)
def test_an_abandoned_guest_frees_what_the_kernel_held(program: Callable[[], None]) -> None:
    """Trio warns that weird stuff may happen. We must not warn or crash."""
    result = run_python(
        f"import abandoned_guests; abandoned_guests.{program.__name__}()", options=("-X", "dev")
    )
    assert result.returncode == 0, result.stderr
    assert "/trio_uring/" not in result.stderr, result.stderr


def test_ends_that_leave_no_fd() -> None:
    async def main() -> None:
        os.close(os.dup(0))

    with everything_closed():
        for _ in range(3):
            Host().run(main)


class Polls:
    """In place of a `select.poll` object: records the timeouts."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []

    def poll(self, timeout: float) -> list[object]:
        self.timeouts.append(timeout)
        return []


def test_what_the_worker_waits_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wakeup = GuestWakeup()
    try:
        assert not wakeup.wait(0)
        os.eventfd_write(wakeup.eventfd, 1)
        assert wakeup.wait(3600)
        for _ in range(2):
            wakeup.drain()
        assert not wakeup.wait(0)
        polls = Polls()
        monkeypatch.setattr(wakeup, "_poll", polls)
        assert not wakeup.wait(2.5)
        assert polls.timeouts == [2500]  # milliseconds
    finally:
        wakeup.close()
