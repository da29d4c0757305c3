"""Cancelling waits on pipes, and operations in kernel workers: opening files, splicing.

A worker runs in parallel, so not all orders of events can be forced. Some are waited for.
"""

from __future__ import annotations

import fcntl
import os
import sys
import termios
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import pytest
import trio
from accounting import ByteLedger, Rounds, open_fds
from races import NOT_READY, Order, every_order, race
from trio.lowlevel import FdStream
from trio.testing import wait_all_tasks_blocked

from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROUNDS: Final = 2000
PROCESS_ROUNDS: Final = 1000

HOUR_NS: Final = 3600 * 10**9

pytestmark = pytest.mark.usefixtures("fd_ledger")


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    try:
        yield read_end, write_end
    finally:
        for fd in (read_end, write_end):
            with suppress(OSError):  # a stream that owns it has closed it
                os.close(fd)


def read_now(fd: int) -> bytes:
    """Read the data that is in a pipe, without waiting."""
    return os.read(fd, 1 << 20) if bytes_in(fd) else b""


def bytes_in(fd: int) -> int:
    """Return how many bytes are in a pipe."""
    count = fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(count, sys.byteorder)


def spin_until(condition: Callable[[], bool]) -> None:
    """Poll until a kernel worker has done something. Pytest's time limit ends it."""
    while not condition():
        os.sched_yield()


# --- Pipes ----------------------------------------------------------------------------------


async def test_receiving_from_a_pipe(rounds: Rounds) -> None:
    ledger = ByteLedger()
    with pipe() as (read_end, write_end):
        async with FdStream(os.dup(read_end)) as stream:
            for order in every_order(ROUNDS):
                outcome = await race(
                    rounds,
                    order,
                    stream.receive_some,
                    lambda: os.write(write_end, ledger.take(10)),
                )
                ledger.received(outcome.value if outcome else read_now(read_end))
                assert not ledger.missing


async def test_reading_from_a_pipe(rounds: Rounds) -> None:
    ledger = ByteLedger()
    buffer = bytearray(100)
    with pipe() as (read_end, write_end):
        for order in every_order(ROUNDS):
            operation = operations.read(read_end, buffer, -1, cancellable=True)
            outcome = await race(
                rounds,
                order,
                partial(perform, operation),
                lambda: os.write(write_end, ledger.take(10)),
            )
            ledger.received(buffer[: outcome.value] if outcome else read_now(read_end))
            assert not ledger.missing


async def test_writing_to_a_pipe(rounds: Rounds) -> None:
    """The number of bytes that a write reports arrives, also if the write is short."""
    ledger = ByteLedger()
    capacity = 65536
    partly = 0
    with pipe() as (read_end, write_end):
        for number, order in enumerate(every_order(ROUNDS)):
            os.write(write_end, ledger.take(capacity))
            # More than PIPE_BUF may be written in parts.
            size = 1000 if number & 8 else 3 * capacity
            data = ledger.take(size)
            ledger.take_back(size)
            operation = operations.write(write_end, data, -1, cancellable=True)
            outcome = await race(
                rounds,
                order,
                partial(perform, operation),
                lambda: ledger.received(read_now(read_end)),
            )
            if outcome:
                ledger.take(outcome.value)
                partly += outcome.value < size
            ledger.received(read_now(read_end))
            assert not ledger.missing
    assert partly


async def test_splicing(rounds: Rounds) -> None:
    """Bytes that were not spliced stay in the pipe."""
    ledger = ByteLedger()
    with pipe() as (source, source_end), pipe() as (target, target_end):
        for order in every_order(ROUNDS):

            def make_ready() -> None:
                os.write(source_end, ledger.take(10))
                if order is Order.READY_UNSEEN:
                    spin_until(lambda: bytes_in(target) == 10)

            operation = operations.splice(source, target_end, 100)
            outcome = await race(rounds, order, partial(perform, operation), make_ready)
            assert bytes_in(target) == (outcome.value if outcome else 0)
            ledger.received(read_now(target) + read_now(source))
            assert not ledger.missing


# --- Opening --------------------------------------------------------------------------------


async def open_and_close(path: Path, flags: int, *, wait: bool = False) -> None:
    fd = await perform(operations.openat(path, flags, 0o600, wait=wait))
    os.close(fd)


async def test_opening(rounds: Rounds, tmp_path: Path) -> None:
    """The kernel opens the file when it takes the SQE, so a cancellation comes too late."""
    path = tmp_path / "file"
    path.touch()
    count = len(open_fds())
    for order in every_order(ROUNDS):
        if order is Order.NEVER_READY:
            with trio.CancelScope() as scope:
                scope.cancel()
                await open_and_close(path, os.O_RDONLY)
            rounds.add("cancelled" if scope.cancelled_caught else "late")
        else:
            await race(rounds, order, partial(open_and_close, path, os.O_RDONLY), lambda: None)
        assert len(open_fds()) == count


@contextmanager
def fifo(directory: Path) -> Iterator[Path]:
    path = directory / "fifo"
    os.mkfifo(path)
    yield path


async def test_opening_a_fifo(rounds: Rounds, tmp_path: Path) -> None:
    """It waits in a worker for the other end. If cancelled, its result is -512."""
    with fifo(tmp_path) as path:
        count = len(open_fds())
        for order in every_order(ROUNDS):
            others: list[int] = []

            def make_ready() -> None:
                others.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))
                if order is Order.READY_UNSEEN:
                    spin_until(lambda: len(open_fds()) > count + 1)

            operation = partial(open_and_close, path, os.O_RDONLY, wait=True)
            await race(rounds, order, operation, make_ready)
            for fd in others:
                os.close(fd)
            assert len(open_fds()) == count


@pytest.mark.ring(bounded_workers=1)
async def test_creating(rounds: Rounds, tmp_path: Path) -> None:
    """Either the file is created and its fd returned, or neither. The only worker is busy."""
    path = tmp_path / "file"
    with fifo(tmp_path) as busy:
        count = len(open_fds())
        for order in every_order(ROUNDS):
            async with trio.open_nursery() as nursery:
                others: list[int] = []

                def make_ready() -> None:
                    others.append(os.open(busy, os.O_RDWR | os.O_NONBLOCK))
                    if order is Order.READY_UNSEEN:
                        spin_until(path.exists)

                nursery.start_soon(partial(open_and_close, busy, os.O_RDONLY, wait=True))
                await wait_all_tasks_blocked()
                create = partial(open_and_close, path, os.O_CREAT | os.O_WRONLY)
                outcome = await race(rounds, order, create, make_ready)
                nursery.cancel_scope.cancel()
            for fd in others:
                os.close(fd)
            assert path.exists() == bool(outcome)
            path.unlink(missing_ok=True)
            assert len(open_fds()) == count


# --- Time and processes ---------------------------------------------------------------------


async def test_timeouts(rounds: Rounds) -> None:
    for order in every_order(ROUNDS):
        timeout = operations.timeout(HOUR_NS if order in NOT_READY else 0)
        await race(rounds, order, partial(perform, timeout), lambda: None)


async def test_waiting_for_a_child(rounds: Rounds) -> None:
    """After a cancelled wait, the child can still be waited for."""
    for order in every_order(PROCESS_ROUNDS):
        with pipe() as (read_end, write_end):
            pid = os.posix_spawn(
                "/bin/cat",
                ["cat"],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, read_end, 0),
                    (os.POSIX_SPAWN_CLOSE, write_end),
                ],
            )

            def end_the_child() -> None:
                os.close(write_end)
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

            operation = operations.waitid(os.P_PID, pid, os.WEXITED)
            outcome = await race(rounds, order, partial(perform, operation), end_the_child)
            if outcome:
                assert outcome.value is not None
                assert (outcome.value.pid, outcome.value.status) == (pid, 0)
                with pytest.raises(ChildProcessError):
                    os.waitpid(pid, 0)
            else:
                if order in NOT_READY:
                    end_the_child()
                assert os.waitpid(pid, 0) == (pid, 0)
