"""The end of a run, in order or with operations in flight, and afterwards."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
import trio
from accounting import open_fds
from children import run_python
from crashed_runs import CRASHED_RUNS

import trio_uring
from trio_uring import RingConfig, SQPoll
from trio_uring.lowlevel import on_ring

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("program", CRASHED_RUNS, ids=lambda program: program.__name__)
def test_a_crashed_run_frees_what_the_kernel_held(program: Callable[[], None]) -> None:
    """If Trio crashes, it warns about its tasks. We must not warn or crash."""
    result = run_python(
        f"import crashed_runs; crashed_runs.{program.__name__}()", options=("-X", "dev")
    )
    assert result.returncode == 0, result.stderr
    # Tasks end in our code, because there they waited: `perform` is in their tracebacks.
    blamed = re.findall(r'io_manager\.py", line \d+, in (\w+)', result.stderr)
    assert set(blamed) <= {"perform", "perform_shielded"}, result.stderr


@pytest.mark.parametrize("config", [RingConfig(), RingConfig(sqpoll=SQPoll(idle=0.001))])
def test_runs_leave_nothing_behind(config: RingConfig) -> None:
    async def main(fail: bool) -> None:
        assert on_ring()
        a, b = trio.socket.socketpair()
        with a, b:
            await b.send(b"x")
            assert await a.recv(1) == b"x"
            with trio.move_on_after(0):
                await a.recv(1)
            if fail:
                raise KeyError

    before = open_fds()
    for number in range(20):
        if number % 2:
            with pytest.raises(KeyError):
                trio_uring.run(main, True, ring=config)
        else:
            trio_uring.run(main, False, ring=config)
    assert open_fds() == before


def test_a_run_that_does_nothing_leaves_no_fd() -> None:
    async def main() -> None:
        pass

    before = open_fds()
    trio_uring.run(main, ring=RingConfig(require=True))
    assert open_fds() == before


def test_terminals_that_were_left_cost_no_buffer() -> None:
    """A read of such a terminal takes a buffer, and fails with EIO."""

    async def main() -> None:
        master, terminal = os.openpty()
        os.close(terminal)
        os.set_blocking(master, False)
        async with trio.lowlevel.FdStream(master) as stream:
            for _ in range(10):
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
        a, b = trio.socket.socketpair()
        with a, b, trio.fail_after(30):
            await b.send(b"x")
            assert await a.recv(1) == b"x"

    trio_uring.run(main, ring=RingConfig(require=True, receive_buffers=2))
