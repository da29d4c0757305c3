"""Runs whose submission queue is polled by a kernel thread: ``RingConfig(sqpoll=...)``."""

from __future__ import annotations

import os
import queue
import random
import socket as stdlib_socket
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from accounting import ByteLedger, Rounds
from children import output_of, run_python
from races import current_manager, driven, every_order, race
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, RingUnavailableError, SQPoll
from trio_uring._engine._in_flight import IGNORED
from trio_uring._engine._ring import Ring
from trio_uring._kernel.uapi import SetupFlag
from trio_uring.lowlevel import RingStatistics, operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import outcome

# As short as can be asked for: the thread falls asleep all the time.
SLEEPY: Final = SQPoll(idle=0.001)
# Longer than any test: once awake, it stays so.
AWAKE: Final = SQPoll(idle=600)

# Long enough that no machine is too slow; a test that works never waits for it.
LONG: Final = 30.0

pytestmark = pytest.mark.usefixtures("fd_ledger")

both: Final = [
    pytest.param(SLEEPY, marks=pytest.mark.ring(sqpoll=SLEEPY), id="sleepy"),
    pytest.param(AWAKE, marks=pytest.mark.ring(sqpoll=AWAKE), id="awake"),
]


def statistics() -> RingStatistics:
    found = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(found, RingStatistics)
    return found


# --- What every run can do, these can -------------------------------------------------------


@pytest.mark.parametrize("poll", both)
async def test_echo(poll: SQPoll) -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, echo, 0)
        client = await trio.testing.open_stream_to_socket_listener(listeners[0])
        ledger = ByteLedger()
        for size in [1, 100, 65536, 200_000] * 20:
            nursery.start_soon(client.send_all, ledger.take(size))
            while ledger.missing:
                ledger.received(await client.receive_some())
        await client.aclose()
        nursery.cancel_scope.cancel()
    assert statistics().completed["RECV"]


@pytest.mark.parametrize("poll", both)
async def test_files(poll: SQPoll, tmp_path: Path) -> None:
    async with await trio.open_file(tmp_path / "file", "w+b") as file:
        await file.write(bytes(100_000))
        await file.seek(0)
        assert await file.read() == bytes(100_000)
    async with await trio_uring.open_positional(tmp_path / "file") as positional:
        assert await positional.read_at(100_000, 1) == bytes(99_999)


@pytest.mark.parametrize("poll", both)
async def test_cancelling_a_receive(poll: SQPoll, rounds: Rounds) -> None:
    """No byte is lost, whether or not the thread had taken the SQE before the cancellation."""
    ours, theirs = stdlib_socket.socketpair()
    ledger = ByteLedger()
    with theirs, trio.socket.from_stdlib_socket(ours) as sock:
        for order in every_order(800):
            got = await race(
                rounds, order, lambda: sock.recv(100), lambda: theirs.send(ledger.take(10))
            )
            if got:
                ledger.received(got.value)
            while ledger.missing:
                ledger.received(await sock.recv(100))


# --- Closing --------------------------------------------------------------------------------


UNTOUCHED: Final = b"for the new file"


class Successor:
    """A socket with data that gets the fd of a socket that was closed."""

    def __init__(self, number: int) -> None:
        mine, self.other = stdlib_socket.socketpair()
        if mine.fileno() != number:
            os.dup2(mine.fileno(), number, inheritable=False)
            mine.close()
            mine = stdlib_socket.socket(fileno=number)
        self.mine = mine
        self.other.send(UNTOUCHED)

    def check(self) -> None:
        """Fail if anybody received from it or sent to it. Close it."""
        self.other.shutdown(stdlib_socket.SHUT_WR)
        assert self.mine.recv(100) == UNTOUCHED
        self.mine.close()
        assert self.other.recv(100) == b""
        self.other.close()


class Replaced:
    """When called for the first time, closes a socket and makes another one that gets its fd."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.successor: Successor | None = None

    def __call__(self) -> None:
        if self.successor is None:
            number = self.sock.fileno()
            self.sock.close()
            self.successor = Successor(number)

    def check(self) -> None:
        assert self.successor is not None
        self.successor.check()


def connected() -> tuple[trio.socket.SocketType, stdlib_socket.socket]:
    ours, theirs = stdlib_socket.socketpair()
    return trio.socket.from_stdlib_socket(ours), theirs


async def expect_closed(awaitable: Awaitable[object]) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await awaitable


@pytest.mark.parametrize("poll", both)
async def test_closed_while_it_receives(poll: SQPoll) -> None:
    """The thread looks up the fds of SQEs at any time, but not after another file got them."""
    for _ in range(500):
        sock, theirs = connected()
        replaced = Replaced(sock)
        with theirs:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(expect_closed, sock.recv(100))
                await wait_all_tasks_blocked()
                replaced()
        replaced.check()


@pytest.mark.parametrize("poll", both)
async def test_closed_before_it_is_published(poll: SQPoll) -> None:
    for _ in range(500):
        sock, theirs = connected()
        replaced = Replaced(sock)
        with theirs:
            await expect_closed(driven(sock.recv(100), parked=replaced))
        replaced.check()


@pytest.mark.parametrize("poll", both)
async def test_sent_before_it_is_closed(poll: SQPoll) -> None:
    """Data that was sent to the old file arrives there."""
    for _ in range(500):
        sock, theirs = connected()
        replaced = Replaced(sock)
        with theirs:
            await driven(sock.send(b"for the old file"), parked=replaced)
            assert theirs.recv(100) == b"for the old file"
        replaced.check()


@pytest.mark.parametrize("poll", both)
async def test_published_and_closed_at_once(poll: SQPoll) -> None:
    """The thread may be about to take the SQE. Closing waits until it has."""
    dice = random.Random(5)
    manager = current_manager()
    for _ in range(1000):
        sock, theirs = connected()
        replaced = Replaced(sock)

        def publish_and_close() -> None:
            manager._backlog += manager.ring.submit_and_wait(0) or ()
            for _ in range(dice.randrange(100)):
                pass
            replaced()

        with theirs:
            await expect_closed(driven(sock.recv(100), parked=publish_and_close))
        replaced.check()


# --- Waking the thread ----------------------------------------------------------------------


def test_no_wakeup_is_missed_when_it_falls_asleep() -> None:
    """Push at the moment when the thread goes to sleep, or shortly before or after.

    The test adapts how long it waits: the number of enters shows whether the thread was asleep.
    Half of the rounds find it awake, half asleep, and all are close to the critical moment. So 500
    rounds are enough. They take 3 seconds, and a minute if twenty other programs compute.
    """
    ring = Ring(RingConfig(sqpoll=SLEEPY))
    dice = random.Random(7)
    met: Counter[str] = Counter()
    looks = 1000.0
    for number in range(500):
        for _ in range(int(looks * dice.uniform(0.8, 1.2))):
            assert ring.submit_and_wait(0) == []
        assert ring.push(operations.nop(), number)
        before = ring.enters
        # To look is to publish; that enters only if the thread must be woken.
        completions = ring.submit_and_wait(0)
        state = "awake" if ring.enters == before else "asleep"
        met[state] += 1
        # Not without end where the thread, too, has to wait for a processor.
        looks = min(looks * (1.1 if state == "awake" else 1 / 1.1), 100_000.0)
        # An SQE that lies there unseen would be seen once the next is pushed; here is no next.
        assert (completions or ring.submit_and_wait(LONG)) == [(number, 0, 0)]
    ring.close()
    assert min(met["awake"], met["asleep"]) > 50, met


@pytest.mark.ring(sqpoll=SLEEPY)
async def test_no_wakeup_is_missed_in_a_run() -> None:
    """Many tasks that sometimes have nothing to do: all of them end."""

    async def work(dice: random.Random) -> None:
        for _ in range(200):
            for _ in range(dice.randrange(40)):
                await trio.lowlevel.checkpoint()
            await perform(operations.nop())

    async with trio.open_nursery() as nursery:
        for seed in range(20):
            nursery.start_soon(work, random.Random(seed))
    assert statistics().completed["NOP"] == 4000


@pytest.mark.ring(sqpoll=AWAKE)
async def test_nothing_is_entered_to_submit_while_the_thread_is_awake() -> None:
    await perform(operations.nop())  # it is awake from now on
    done = 0

    async def work() -> None:
        nonlocal done
        for _ in range(200):
            await perform(operations.nop())
        done += 1

    before = statistics()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(work)
        while done < 4:  # so that the loop never waits
            await trio.lowlevel.cancel_shielded_checkpoint()
    after = statistics()
    assert after.completed["NOP"] - before.completed["NOP"] == 800
    assert after.submitted - before.submitted >= 800
    assert after.enters == before.enters


@pytest.mark.ring(sqpoll=AWAKE)
async def test_operations_of_a_device_are_published_without_an_enter() -> None:
    await perform(operations.nop())
    ring = current_manager().ring
    before = ring.enters
    for _ in range(20):
        operation = operations.nop()
        operation.for_device = True
        assert ring.push(operation, IGNORED)
    assert ring.enters == before


@pytest.mark.ring(sqpoll=AWAKE)
async def test_nothing_is_entered_to_close_while_the_thread_is_awake() -> None:
    await perform(operations.nop())
    ours, theirs = stdlib_socket.socketpair()
    with theirs:
        async with trio.open_nursery() as nursery:
            sock = trio.socket.from_stdlib_socket(ours)
            nursery.start_soon(expect_closed, sock.recv(1))
            await wait_all_tasks_blocked()
            before = statistics().enters
            sock.close()
            assert statistics().enters == before
            # The cancel has been carried out; nobody had to come by for that.
            assert statistics().in_flight == 1


# --- Guest mode, set-up, the end ------------------------------------------------------------


class Host:
    """The loop of another framework, in which Trio is a guest."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._ended: list[outcome.Outcome[Any]] = []
        self.soon = self._calls.put

    def run(self, main: Callable[[], Any], poll: SQPoll) -> Any:
        trio_uring.start_guest_run(
            main,
            run_sync_soon_threadsafe=self.soon,
            done_callback=self._ended.append,
            ring=RingConfig(require=True, sqpoll=poll),
        )
        while not self._ended:
            self._calls.get(timeout=LONG)()
        return self._ended[0].unwrap()


@pytest.mark.parametrize("poll", [SLEEPY, AWAKE])
def test_a_guest_run_can_have_a_polling_thread(poll: SQPoll) -> None:
    host = Host()

    async def main() -> RingStatistics:
        ours, theirs = stdlib_socket.socketpair()
        ledger = ByteLedger()
        with theirs, trio.socket.from_stdlib_socket(ours) as sock:
            for _ in range(100):
                host.soon(lambda: theirs.send(ledger.take(10)))
                ledger.received(await sock.recv(10))
                with trio.CancelScope() as scope:
                    host.soon(scope.cancel)  # the worker sleeps, and nothing else wakes it
                    await sock.recv(10)
                assert scope.cancelled_caught
        return statistics()

    found = host.run(main, poll)
    assert "SQPOLL" in found.setup_flags
    assert found.cancelled == 100


@pytest.mark.ring(sqpoll=SQPoll(idle=0.001, cpu=min(os.sched_getaffinity(0))))
async def test_statistics() -> None:
    await perform(operations.nop())
    found = statistics()
    assert {"SQPOLL", "SQ_AFF", "SINGLE_ISSUER"} <= set(found.setup_flags)
    assert not {"DEFER_TASKRUN", "COOP_TASKRUN"} & set(found.setup_flags)
    assert found.refused == ()
    assert found.submitted >= 1


def test_a_cpu_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RingUnavailableError, match=r"EINVAL .*sqpoll's cpu must exist"):
        Ring(RingConfig(sqpoll=SQPoll(cpu=65535)))


def test_without_asking_for_it_there_is_no_thread() -> None:
    ring = Ring(RingConfig())
    assert not ring.setup_flags & SetupFlag.SQPOLL
    ring.close()


async def test_the_thread_ends_with_its_run() -> None:
    def run() -> None:
        trio_uring.run(perform, operations.nop(), ring=RingConfig(require=True, sqpoll=AWAKE))

    await trio.to_thread.run_sync(run)
    while list(polling_threads()):
        os.sched_yield()


def polling_threads() -> list[str]:
    """Return the names of this process's polling threads that still run."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        try:
            _, _, rest = (task / "stat").read_text().partition(" (")
        except (FileNotFoundError, ProcessLookupError):
            continue
        name, _, fields = rest.rpartition(") ")
        if name.startswith("iou-sqp-") and fields[0] not in "XZ":
            names.append(name)
    return names


AS_NOBODY = """
import os, sys
import trio, trio_uring
from trio_uring.lowlevel import operations, perform

async def refused(operation):
    try:
        await perform(operation)
    except PermissionError as exc:
        assert "SQPOLL thread still has the old" in str(exc), exc
    else:
        raise AssertionError("it was allowed")

async def main():
    folder = trio.Path(sys.argv[1])
    secret = folder / "secret"
    await secret.write_bytes(b"secret")
    await secret.chmod(0o600)
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(folder / "socket"))
    listener.listen()
    await (folder / "socket").chmod(0o600)
    async with await secret.open("r+b") as file:
        os.seteuid(65534)
        for call in (secret.read_bytes, secret.unlink, (folder / "new").mkdir):
            try:
                await call()
            except PermissionError:
                continue
            raise AssertionError("it was allowed")
        await refused(operations.openat(str(secret), os.O_RDONLY))
        await refused(operations.linkat(str(secret), str(folder / "other")))
        for others in ([], [operations.timeout(0)]):
            batch = [*others, operations.unlinkat(str(secret))]
            try:
                await trio_uring.perform_many(batch)
            except PermissionError:
                continue
            raise AssertionError("it was allowed")
        with trio.socket.socket(trio.socket.AF_UNIX) as client:
            try:
                await client.connect(str(folder / "socket"))
            except PermissionError:
                pass
            else:
                raise AssertionError("it was allowed")
        assert await file.read() == b"secret"  # an open file needs no permission
        os.seteuid(0)
    assert await secret.read_bytes() == b"secret"
    with trio.socket.socket(trio.socket.AF_UNIX) as client:
        await client.connect(str(folder / "socket"))
    listener.close()

trio_uring.run(main, ring=trio_uring.RingConfig(require=True, sqpoll=trio_uring.SQPoll()))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_the_old_credentials_of_the_thread_are_not_used(tmp_path: Path) -> None:
    """The thread keeps those with which the run began."""
    output_of(run_python(AS_NOBODY, tmp_path))
