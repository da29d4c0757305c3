"""Forks and child processes: what a child of a run can do, without affecting its parent."""

from __future__ import annotations

import os
import signal
import socket
import sys
import sysconfig
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from accounting import open_fds
from children import CHILD_SECONDS, in_child, in_thread, output_of, run_python
from races import current_manager
from scenarios import echo, everything
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import ForkedRingError, RingConfig
from trio_uring.lowlevel import RingStatistics, on_ring, operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

REQUIRED = RingConfig(require=True)

# Python 3.12 warns of forks where there are threads, such as Trio's idle workers.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

PTH = Path(sysconfig.get_path("purelib"), "trio_uring.pth")


def fork_from_task(function: Callable[[], object]) -> None:
    """Fork during a run, and run *function* in the child."""
    assert in_child(function) == 0


# --- A child of a run -----------------------------------------------------------------------


async def test_a_child_cannot_use_its_parents_ring() -> None:
    async def receive() -> None:
        with pytest.raises(ForkedRingError, match="start a new run in the child"):
            await sock.recv(1)
        with pytest.raises(ForkedRingError, match="belongs to the parent process"):
            await perform(operations.nop())

    def child() -> None:
        # Without the loop: a task that does not wait needs none.
        with pytest.raises(StopIteration):
            receive().send(None)

    sock, peer = trio.socket.socketpair()
    with sock, peer:
        fork_from_task(child)
        await peer.send(b"x")
        assert await sock.recv(1) == b"x"


async def test_a_child_keeps_no_fd_of_its_parents_ring() -> None:
    """Otherwise operations in flight, and connections, would survive a parent that dies."""

    def rings() -> list[str]:
        return [file for file in open_fds().values() if "io_uring" in file]

    def child() -> None:
        assert not rings()
        mailbox = manager.open_mailbox()
        with open(os.devnull) as file:  # it may have got the number that the ring's fd had
            os.dup2(file.fileno(), fd)
            mailbox.close(drained=False)
            os.close(fd)

    manager = current_manager()
    sender, receiver = trio_uring.open_ring_channel[int](1)
    async with sender, receiver, trio.open_nursery() as nursery:
        nursery.start_soon(receiver.receive)
        await wait_all_tasks_blocked()
        fd = manager.open_mailbox().acquire_fd()
        manager.open_mailbox().release_fd(fd)
        assert fd >= 0
        assert len(rings()) == 2
        fork_from_task(child)
        assert len(rings()) == 2
        await sender.send(1)


async def test_a_child_closes_what_it_inherited() -> None:
    """And its parent keeps waiting, on the ring and in epoll."""

    def child() -> None:
        for sock in (receiving, waiting, peer):
            sock.close()
            assert sock.fileno() == -1
        trio.lowlevel.notify_closing(stdlib_waiting)

    async def receive() -> None:
        received.append(await receiving.recv(1))

    async def wait() -> None:
        await trio.lowlevel.wait_readable(stdlib_waiting)
        received.append(stdlib_waiting.recv(1))

    received: list[bytes] = []
    receiving, peer = trio.socket.socketpair()
    waiting, other = trio.socket.socketpair()
    stdlib_waiting, another = socket.socketpair()
    with receiving, peer, waiting, other, stdlib_waiting, another:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(wait)
            nursery.start_soon(trio.lowlevel.wait_readable, waiting)
            await wait_all_tasks_blocked()
            fork_from_task(child)
            await wait_all_tasks_blocked()
            assert not received
            with trio.fail_after(30):
                await peer.send(b"1")
                another.send(b"2")
                await other.send(b"3")
    assert sorted(received) == [b"1", b"2"]


def test_a_child_that_goes_on_with_the_run() -> None:
    """It gets an error in its first loop iteration. Its parent is not affected."""

    async def receive(sock: trio.socket.SocketType) -> None:
        # These completions came before the fork, in the same turn: the child has them, too.
        assert await sock.recv(1) == b"x"
        counted.append(1)

    async def main() -> str:
        pairs = [trio.socket.socketpair() for _ in range(10)]
        async with trio.open_nursery() as nursery:
            for a, _ in pairs:
                nursery.start_soon(receive, a)
            await wait_all_tasks_blocked()
            for _, b in pairs:
                await b.send(b"x")
            nursery.start_soon(fork)
        for pair in pairs:
            for sock in pair:
                sock.close()
        return "ended"

    async def fork() -> None:
        pids.append(os.fork())

    counted: list[int] = []
    pids: list[int] = []
    outcomes: list[str] = []
    parent = os.getpid()
    try:
        outcomes.append(trio_uring.run(main, ring=REQUIRED))
    except ForkedRingError:
        assert os.getpid() != parent
        os._exit(42)
    finally:
        if os.getpid() != parent:
            os._exit(1)
    assert outcomes == ["ended"]
    assert len(counted) == 10
    _, status = os.waitpid(pids[0], 0)
    assert os.waitstatus_to_exitcode(status) == 42


def run_in_child(main: Callable[[], Awaitable[object]]) -> int:
    """Run *main* on a ring in a child, as its only thread."""

    def run() -> None:
        signal.set_wakeup_fd(-1)  # the parent's run has set it, and Trio would warn
        trio_uring.run(main, ring=REQUIRED)

    return in_child(run)


async def test_a_child_starts_a_run_of_its_own() -> None:
    async def main() -> None:
        assert (await everything()).backend == "io_uring"

    sock, peer = trio.socket.socketpair()
    with sock, peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sock.recv, 1)
            await wait_all_tasks_blocked()
            # In a thread, because Trio knows that this one is inside a run.
            assert await trio.to_thread.run_sync(run_in_child, main) == 0
            await echo()
            await peer.send(b"x")


def test_forks_in_another_thread_than_the_run() -> None:
    """The run may be anywhere at that time: in the kernel, in the middle of a push."""

    async def main() -> None:
        while not enough.is_set():
            await send_and_receive()

    async def send_and_receive() -> None:
        # No threads: what another thread locks is locked in the child for ever.
        a, b = trio.socket.socketpair()
        with a, b:
            for _ in range(10):
                await a.send(b"x")
                assert await b.recv(1) == b"x"

    def fork() -> None:
        try:
            statuses.extend(run_in_child(send_and_receive) for _ in range(20))
        finally:
            enough.set()

    statuses: list[int] = []
    enough = threading.Event()
    forking = threading.Thread(target=fork)
    forking.start()
    trio_uring.run(main, ring=REQUIRED)
    forking.join()
    assert statuses == [0] * 20


async def test_a_parent_that_dies_leaves_nothing_to_its_child() -> None:
    """The child has the ring's fd, but its dead parent's operations must not go on."""
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with ours, theirs:

        def child() -> None:
            async def main() -> None:
                sock = trio.socket.from_stdlib_socket(theirs)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(sock.recv, 1)
                    await wait_all_tasks_blocked()
                    pid = os.fork()
                    if pid == 0:
                        theirs.close()
                        os.close(write)
                        signal.alarm(CHILD_SECONDS)  # ends it, should nobody else
                        signal.pause()
                    os.write(write, b"%d" % pid)
                    os._exit(0)

            in_thread(partial(trio_uring.run, main, ring=REQUIRED))

        assert in_child(child) == 0
        theirs.close()
        os.close(write)
        ours.settimeout(30)
        try:
            assert ours.recv(1) == b""  # nobody holds the other end
        finally:
            os.kill(int(os.read(read, 100)), signal.SIGKILL)
        os.close(read)


# --- multiprocessing ------------------------------------------------------------------------

MULTIPROCESSING = """
    import multiprocessing, sys
    import scenarios
    import trio

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        if sys.argv[2] == "inside":
            async def main():
                await trio.to_thread.run_sync(start)
                await scenarios.echo()
                return trio.lowlevel.current_statistics().io_statistics.backend
        else:
            async def main():
                return trio.lowlevel.current_statistics().io_statistics.backend

        def start():
            process = context.Process(target=scenarios.print_backend)
            process.start()
            process.join()
            assert process.exitcode == 0

        print(trio.run(main))
        if sys.argv[2] != "inside":
            start()
"""


@pytest.mark.parametrize(
    ("method", "where", "setting"),
    [
        ("fork", "inside", "1"),
        ("fork", "after", "1"),
        ("forkserver", "after", "1"),
        ("spawn", "inside", "1"),
        ("spawn", "after", "off"),
    ],
)
def test_multiprocessing(method: str, where: str, setting: str) -> None:
    assert PTH.exists(), "this test needs trio_uring installed from its wheel"
    result = run_python(
        MULTIPROCESSING,
        method,
        where,
        options=("-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning"),
        environment={"TRIO_URING": setting},
    )
    backend = "io_uring" if setting == "1" else "epoll"
    assert output_of(result) == [backend, backend]


# --- Child processes that Trio starts -------------------------------------------------------


async def test_run_process() -> None:
    data = os.urandom(1_000_000)
    code = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read()[::-1])"
    result = await trio.run_process([sys.executable, "-c", code], stdin=data, capture_stdout=True)
    assert result.stdout == data[::-1]
    statistics: object = trio.lowlevel.current_statistics().io_statistics
    assert isinstance(statistics, RingStatistics)
    completed = statistics.completed
    assert completed["READ"] > 10
    assert completed["WRITE"] > 10


async def test_many_processes_at_once() -> None:
    async def one(number: int) -> None:
        result = await trio.run_process(
            ["sh", "-c", f"read x; echo $x; exit {number}"],
            stdin=b"%d\n" % number,
            capture_stdout=True,
            check=False,
        )
        assert (result.returncode, result.stdout) == (number, b"%d\n" % number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(one, number)


async def test_a_process_that_is_cancelled() -> None:
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, ["sleep", "3600"], check=False)
        process = await nursery.start(start)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert process.returncode == -signal.SIGTERM


async def test_a_process_that_runs_python_before_it_begins() -> None:
    # subprocess then forks, and Python code runs in the child.
    result = await trio.run_process(["true"], preexec_fn=os.setsid)
    assert result.returncode == 0
    await echo()


async def test_children_do_not_inherit_the_ring() -> None:
    code = "import os; print([os.path.realpath(f'/proc/self/fd/{fd}') for fd in range(100)])"
    result = await trio.run_process(
        [sys.executable, "-c", code], capture_stdout=True, close_fds=False
    )
    assert b"io_uring" not in result.stdout
    assert on_ring()
