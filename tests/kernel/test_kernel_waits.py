"""Waits for child processes and futexes, cancelled in every order: no exit or wake-up is lost."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio
from children import in_thread
from races import NOT_READY, Order, every_order, race
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import UnsupportedOpcodeError
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from accounting import Rounds

pytestmark = pytest.mark.usefixtures("fd_ledger")

EXITED: Final = os.WEXITED
LOOK: Final = os.WEXITED | os.WNOWAIT


@pytest.fixture(autouse=True)
def known() -> None:
    """Skip before Linux 6.7."""

    async def try_it() -> None:
        await perform(operations.futex_wake(bytearray(4)))

    try:
        trio_uring.run(try_it)
    except UnsupportedOpcodeError as exc:
        pytest.skip(str(exc))


def completed(name: str) -> int:
    return int(trio.lowlevel.current_statistics().io_statistics.completed.get(name, 0))


# --- Processes ------------------------------------------------------------------------------


class Child:
    """A process that waits until it is killed. Only the test reaps it."""

    def __init__(self) -> None:
        self.pid = os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ)
        self.pid_fd = os.pidfd_open(self.pid)

    def kill(self) -> None:
        """Kill it, and wait until it can be reaped."""
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitid(os.P_PIDFD, self.pid_fd, LOOK) is not None

    def is_reaped(self) -> bool:
        try:
            os.waitid(os.P_PIDFD, self.pid_fd, LOOK | os.WNOHANG)
        except ChildProcessError:
            return True
        return False

    def reap(self) -> bool:
        """Whether there was something left to reap."""
        try:
            return os.waitid(os.P_PIDFD, self.pid_fd, EXITED) is not None
        except ChildProcessError:
            return False
        finally:
            os.close(self.pid_fd)


@pytest.mark.parametrize("by_fd", [False, True])
async def test_an_exit_is_not_lost_to_a_cancel(by_fd: bool, rounds: Rounds) -> None:
    """It is returned, or the child can be waited for again."""
    before = completed("WAITID")
    count = 48
    for order in every_order(count):
        child = Child()
        id_type, number = (os.P_PIDFD, child.pid_fd) if by_fd else (os.P_PID, child.pid)
        wait = operations.waitid(id_type, number, EXITED)
        outcome = await race(rounds, order, partial(perform, wait), child.kill)
        if order in NOT_READY:
            assert not outcome
            child.kill()
        if outcome:
            assert outcome.value == operations.ChildStatus(
                child.pid, os.getuid(), os.CLD_KILLED, signal.SIGKILL
            )
        assert child.is_reaped() == bool(outcome)
        assert child.reap() == (not outcome)
    assert completed("WAITID") == before + count


async def test_to_look_is_not_to_reap(rounds: Rounds) -> None:
    """With WNOWAIT the exit can be waited for again, however the wait ended."""
    for order in every_order(24):
        child = Child()
        wait = operations.waitid(os.P_PIDFD, child.pid_fd, LOOK)
        await race(rounds, order, partial(perform, wait), child.kill)
        if order in NOT_READY:
            child.kill()
        assert not child.is_reaped()
        assert child.reap()


async def test_a_process_of_trios_can_be_waited_for() -> None:
    """With WNOWAIT, Trio and subprocess can still get its exit status."""
    process = await trio.lowlevel.open_process(["/bin/sleep", "3600"], stdin=subprocess.DEVNULL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.waitid(os.P_PID, process.pid, LOOK))
        await wait_all_tasks_blocked()
        process.kill()
    assert await process.wait() == -signal.SIGKILL


async def test_bad_waits_are_refused() -> None:
    for id_type, number, options, error in (
        (os.P_PID, os.getpid(), EXITED, ChildProcessError),
        (os.P_PIDFD, 10**6, EXITED, OSError),
        (os.P_PID, 1, 0, OSError),
        (99, 1, EXITED, OSError),
    ):
        with pytest.raises(error):
            await perform(operations.waitid(id_type, number, options))


# --- Futexes --------------------------------------------------------------------------------


@pytest.fixture
def shared() -> Iterator[memoryview]:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as view:
        yield view


@pytest.mark.parametrize("several", [False, True])
async def test_a_wake_up_is_not_lost_to_a_cancel(
    several: bool, shared: memoryview, rounds: Rounds
) -> None:
    """A task that was woken returns. If it was cancelled instead, the next task is woken."""
    before = completed("FUTEX_WAITV" if several else "FUTEX_WAIT")
    orders = [order for order in every_order(200) if order not in BEFORE]
    for order in orders:
        with shared[:4] as futex, shared[4:8] as other:
            woken: list[int] = []

            def wake(futex: memoryview = futex, woken: list[int] = woken) -> None:
                woken.append(in_thread(partial(trio_uring.run, perform, wake_one(futex))))

            wait = (
                partial(perform, operations.futex_waitv([(other, 0), (futex, 0)]))
                if several
                else partial(perform, operations.futex_wait(futex, 0))
            )
            outcome = await race(rounds, order, wait, wake)
            if outcome and several:
                assert outcome.value == 1
            assert sum(woken) == bool(outcome)
            assert await perform(wake_one(futex)) == 0  # nobody is left in line
    assert completed("FUTEX_WAITV" if several else "FUTEX_WAIT") == before + len(orders)
    assert completed("FUTEX_WAKE") >= len(orders)


# Nobody waits yet: to wake then is to change the value, which is not what these tests do.
BEFORE: Final = (Order.ONE_ENTER_READY, Order.AT_ONCE_UNSEEN)


def wake_one(futex: memoryview) -> operations.Operation[int]:
    return operations.futex_wake(futex)


async def test_a_futex_wakes_another_process(shared: memoryview) -> None:
    """A forked child wakes us through shared memory."""
    with shared[:4] as futex:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, operations.futex_wait(futex, 0))
            await wait_all_tasks_blocked()
            pid = os.fork()
            if not pid:
                woken = 0
                try:
                    signal.set_wakeup_fd(-1)
                    woken = in_thread(partial(trio_uring.run, perform, wake_one(futex)))
                finally:
                    os._exit(0 if woken == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def test_a_value_that_has_changed_ends_the_wait_at_once(shared: memoryview) -> None:
    """The wait sees a change that was made before it."""
    with shared[:4] as futex:
        futex[0] = 1
        with pytest.raises(BlockingIOError):
            await perform(operations.futex_wait(futex, 0))
        with pytest.raises(BlockingIOError):
            await perform(operations.futex_waitv([(futex, 0)]))
    with shared[1:5] as crooked, pytest.raises(OSError, match="Invalid argument"):
        await perform(operations.futex_wait(crooked, 0))
    with shared[:8] as wide, pytest.raises(ValueError, match="4 bytes"):
        operations.futex_wait(wide, 0)
    with pytest.raises(OSError, match="Invalid argument"):
        await perform(operations.futex_waitv([]))
