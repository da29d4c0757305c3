"""Ctrl-C and other signals, while a run computes and while it waits."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from children import output_of, run_python
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUIRED = RingConfig(require=True)

# `nox -s interrupts` says how many.
INTERRUPTS = int(os.environ.get("TRIO_URING_INTERRUPTS", "20"))
MANY_INTERRUPTS = 500

# Objects that were on their way when the interrupt came are left to the garbage collector. It may
# come between the call of a coroutine function and its await, in ours as in others.
OPTIONS = (
    *("-X", "dev", "-W", "error", "-W", "ignore::ResourceWarning"),
    *("-W", "ignore:coroutine:RuntimeWarning"),
)


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Set Python's own handler, because Trio handles Ctrl-C only if it is set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# --- Ctrl-C ---------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["protected", "unprotected"])
def test_ctrl_c_at_every_step(program: str) -> None:
    # Each 401st of the 10,000 instructions and more that run. With 1 instead, all: for an hour.
    code = f"import interrupted; interrupted.at_every_step({program!r}, 401)"
    [line] = output_of(run_python(code, options=OPTIONS))
    interrupted, ended = map(int, line.split())
    assert interrupted > 20
    assert 1 <= ended <= 2  # the last step lies behind the end, in 3.12 sometimes two


@pytest.mark.parametrize("program", ["alone", "protected", "unprotected"])
def test_ctrl_c_at_any_moment(program: str) -> None:
    code = f"import interrupted; interrupted.at_random({program!r}, {INTERRUPTS})"
    [line] = output_of(run_python(code, options=OPTIONS))
    interrupted, _, seconds = line.split()
    assert int(interrupted) > 5
    if INTERRUPTS >= MANY_INTERRUPTS:  # elsewhere no time is measured
        assert float(seconds) < 1


def test_ctrl_c_while_the_loop_is_in_the_kernel() -> None:
    """The signal comes from another thread, and must end the wait."""

    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            waiting.set()
            await a.recv(1)

    def interrupt() -> None:
        waiting.wait()
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(20):
        waiting = threading.Event()
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            trio_uring.run(main, ring=REQUIRED)
        thread.join()


def test_ctrl_c_for_a_task_that_waits_for_a_result() -> None:
    """A result that came first is delivered, and the interrupt follows."""

    @trio.lowlevel.enable_ki_protection
    async def main() -> None:
        a, b = trio.socket.socketpair()
        with a, b:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(interrupt, b)
                received.append(await a.recv(10))
                await trio.lowlevel.checkpoint()
                raise AssertionError("the interrupt was lost")

    @trio.lowlevel.enable_ki_protection
    async def interrupt(sock: trio.socket.SocketType) -> None:
        await wait_all_tasks_blocked()
        await sock.send(b"data")
        signal.raise_signal(signal.SIGINT)

    received: list[bytes] = []
    with pytest.RaisesGroup(KeyboardInterrupt):
        trio_uring.run(main, ring=REQUIRED)
    assert received == [b"data"]


# --- Other signals --------------------------------------------------------------------------


async def test_receiving_signals() -> None:
    with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2) as receiver:
        for number in (signal.SIGUSR1, signal.SIGUSR2) * 10:
            os.kill(os.getpid(), number)
            with trio.fail_after(30):
                assert await anext(receiver) == number


async def test_receiving_signals_while_everything_else_waits() -> None:
    a, b = trio.socket.socketpair()
    with a, b, trio.open_signal_receiver(signal.SIGUSR1) as receiver, trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.recv, 1)
            for _ in range(20):
                # From a thread, so that the loop is in the kernel, or goes there.
                nursery.start_soon(trio.to_thread.run_sync, os.kill, os.getpid(), signal.SIGUSR1)
                assert await anext(receiver) == signal.SIGUSR1
            await b.send(b"x")


@contextmanager
def storm() -> Iterator[None]:
    """Send signals continuously. Only inside a run: at its end Trio closes an fd that they use."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_signals_end_no_wait_too_early() -> None:
    async def main() -> None:
        with storm():
            await receive()

    async def receive() -> None:
        ours, theirs = socket.socketpair()
        with trio.socket.from_stdlib_socket(ours) as sock, theirs:
            for number in range(100):
                theirs.send(b"%d" % number)
                assert await sock.recv(10) == b"%d" % number
            with trio.move_on_after(0.02) as scope:
                await sock.recv(10)
            assert scope.cancelled_caught
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, theirs)
                assert await sock.recv(10) == b"x"

    async def send(sock: socket.socket) -> None:
        await trio.to_thread.run_sync(sock.send, b"x")

    trio_uring.run(main, ring=REQUIRED)


def test_a_signal_is_no_timeout_for_the_autojump_clock() -> None:
    """The clock jumps only if nothing happens for a while, and a signal is an event."""

    async def main() -> None:
        with storm():
            start = trio.current_time()
            await trio.sleep(500)
            assert trio.current_time() - start == pytest.approx(500)

    trio_uring.run(main, clock=trio.testing.MockClock(autojump_threshold=0), ring=REQUIRED)
