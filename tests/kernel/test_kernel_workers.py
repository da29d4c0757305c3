"""What sockets and pipes wait for takes no kernel worker: there are few, and files need them.

Fact. The kernel's own poll always answers to POLLRDHUP too. A send that waits in the kernel, to
a peer that shut down its side, with a full buffer, is woken again and again, until the kernel
hands it to a worker (``iou-wrk-*``, a thread of this process), where it blocks. (Linux 6.18)
"""

from __future__ import annotations

import os
import resource
import socket as stdlib_socket
import threading
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
import trio
from outcome import Outcome, capture
from races import current_manager
from trio.lowlevel import FdStream, checkpoint, wait_writable
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring.lowlevel import operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.socket import SocketType

pytestmark = pytest.mark.usefixtures("fd_ledger")

# More than RingConfig.unbounded_workers, so that none would be left.
CONNECTIONS: Final = 40
# The kernel tries a wait 128 times (APOLL_MAX_RETRY in io_uring/poll.c) before a worker gets it.
TURNS: Final = 300
A_LOT: Final = bytes(1 << 20)


def workers() -> set[int]:
    """Return the kernel workers of this thread. They outlive the ring that they worked for."""
    name = f"iou-wrk-{threading.get_native_id()}"
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if (thread / "comm").read_text().strip() == name:
                found.add(int(thread.name))
    return found


def in_its_own_thread(test: Callable[..., Awaitable[None]], *args: object, **limits: int) -> None:
    """Run an async test where no earlier one has left a worker."""
    ended: list[Outcome[None]] = []
    config = RingConfig(require=True, **limits)  # type: ignore[arg-type]

    def run() -> None:
        ended.append(capture(trio_uring.run, test, *args, ring=config))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ended[0].unwrap()


def fill(sock: SocketType) -> None:
    for size in (65536, 1):
        with suppress(BlockingIOError):
            while True:
                sock._sock.send(bytes(size))  # type: ignore[attr-defined]


def test_workers_are_seen(tmp_path: Path) -> None:
    """Otherwise the other tests would prove nothing."""
    in_its_own_thread(_wait_in_a_worker, tmp_path / "fifo")


async def _wait_in_a_worker(fifo: Path) -> None:
    os.mkfifo(fifo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(perform, operations.openat(fifo, os.O_RDONLY, wait=True))
        while not workers():
            await checkpoint()
        nursery.cancel_scope.cancel()


async def send_on(sock: SocketType) -> None:
    while True:  # TCP may find a little room even now
        await sock.send(A_LOT)


async def sendmsg_on(sock: SocketType) -> None:
    while True:
        await sock.sendmsg([A_LOT])


SENDS: Final[dict[str, Callable[[SocketType], Awaitable[object]]]] = {
    "send": send_on,
    "sendmsg": sendmsg_on,
    "send_all": lambda sock: trio.SocketStream(sock).send_all(A_LOT),
    "wait_writable": lambda sock: wait_writable(sock),
}


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("kind", ["UNIX", "TCP"])
def test_sending_to_peers_that_shut_down_their_side(send: str, kind: str) -> None:
    in_its_own_thread(_send_to_peers_that_shut_down_their_side, send, kind)


async def _send_to_peers_that_shut_down_their_side(send: str, kind: str) -> None:
    with ExitStack() as stack:
        peers = []
        async with trio.open_nursery() as nursery:
            for _ in range(CONNECTIONS):
                ours, theirs = tcp_pair() if kind == "TCP" else stdlib_socket.socketpair()
                peers.append(stack.enter_context(theirs))
                sock = stack.enter_context(trio.socket.from_stdlib_socket(ours))
                fill(sock)
                theirs.shutdown(stdlib_socket.SHUT_WR)
                nursery.start_soon(SENDS[send], sock)
            await wait_all_tasks_blocked()
            assert len(nursery.child_tasks) == CONNECTIONS
            # And the kernel does not wake us in vain: an enter for each turn, and no more.
            enters = current_manager().ring.enters
            for _ in range(TURNS):
                await wait_all_tasks_blocked()
            assert current_manager().ring.enters - enters <= 2 * TURNS
            assert not workers()
            # So nothing else is held up.
            await perform(operations.statx("/"))
            for peer in peers:
                with suppress(BlockingIOError):
                    peer.setblocking(False)
                    while True:
                        peer.recv(1 << 20)
            nursery.cancel_scope.cancel()


def tcp_pair() -> tuple[stdlib_socket.socket, stdlib_socket.socket]:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener:
        left = stdlib_socket.create_connection(listener.getsockname())
        right, _ = listener.accept()
        return left, right


async def wait_in_every_way(stack: AsyncExitStack, nursery: trio.Nursery) -> None:
    for receive in (
        lambda sock: sock.recv(10),
        lambda sock: sock.recv_into(bytearray(10)),
        lambda sock: sock.recvfrom(10),
        lambda sock: sock.recvfrom_into(bytearray(10)),
        lambda sock: sock.recvmsg(10),
        lambda sock: sock.recvmsg_into([bytearray(10)]),
    ):
        left, right = trio.socket.socketpair()
        stack.enter_context(left)
        stack.enter_context(right)
        nursery.start_soon(receive, left)
    listener = stack.enter_context(trio.socket.socket())
    await listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    nursery.start_soon(listener.accept)
    full = stack.enter_context(stdlib_socket.create_server(("127.0.0.1", 0), backlog=0))
    stack.enter_context(stdlib_socket.create_connection(full.getsockname()))
    connecting = stack.enter_context(trio.socket.socket())
    nursery.start_soon(connecting.connect, full.getsockname())
    empty, full_pipe = os.pipe(), os.pipe()
    reader, _, _, writer = [
        await stack.enter_async_context(FdStream(fd)) for fd in (*empty, *full_pipe)
    ]
    nursery.start_soon(reader.receive_some)
    nursery.start_soon(writer.send_all, A_LOT)


def test_everything_else_that_waits() -> None:
    in_its_own_thread(_wait_for_everything_else)


async def _wait_for_everything_else() -> None:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await wait_in_every_way(stack, nursery)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 10
        assert not workers()
        nursery.cancel_scope.cancel()


# --- Limits ---------------------------------------------------------------------------------

# More than any limit allows at once, and more kernel threads than most systems have in all.
THOUSANDS: Final = 4000


@pytest.mark.parametrize("limits", [(8, 32, 64), (1, 2, 3)])
def test_thousands_that_block(limits: tuple[int, int, int], tmp_path: Path) -> None:
    """They wait in line, and the kernel starts no more threads than it may."""
    bounded, unbounded, operations_max = limits
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    async def main() -> None:
        statistics = current_manager().statistics
        assert statistics().limits == {
            "max_file_operations": operations_max,
            "bounded_workers": bounded,
            "unbounded_workers": unbounded,
        }
        opened = 0
        most = 0

        async def open_it() -> None:
            nonlocal opened, most
            os.close(await perform(operations.openat(fifo, os.O_RDONLY, wait=True)))
            opened += 1
            if opened % 100 == 0:
                most = max(most, len(workers()))

        async with trio.open_nursery() as nursery:
            for _ in range(THOUSANDS):
                nursery.start_soon(open_it)
            await wait_all_tasks_blocked()
            while not workers():
                await checkpoint()
            before = statistics()
            assert before.in_flight == operations_max
            assert before.waiting_for_limit == THOUSANDS - operations_max
            assert len(workers()) <= bounded + unbounded
            with trio.CancelScope() as scope:  # who gives up leaves the line
                async with trio.open_nursery() as giving_up:
                    giving_up.start_soon(open_it)
                    await wait_all_tasks_blocked()
                    assert statistics().waiting_for_limit == before.waiting_for_limit + 1
                    scope.cancel()
            assert statistics().waiting_for_limit == before.waiting_for_limit
            writer = os.open(fifo, os.O_RDWR)
        os.close(writer)
        assert opened == THOUSANDS
        assert 0 < most <= bounded + unbounded
        assert statistics().waiting_for_limit == 0
        assert statistics().completed["OPENAT"] == THOUSANDS

    in_its_own_thread(
        main,
        bounded_workers=bounded,
        unbounded_workers=unbounded,
        max_file_operations=operations_max,
    )


def test_thousands_that_are_cancelled(tmp_path: Path) -> None:
    """All of them in the kernel: it queues what exceeds its workers, and lets go of all of it."""
    in_its_own_thread(_cancel_thousands, tmp_path / "fifo", max_file_operations=4096)


async def _cancel_thousands(fifo: Path) -> None:
    os.mkfifo(fifo)
    async with trio.open_nursery() as nursery:
        for _ in range(THOUSANDS):
            nursery.start_soon(perform, operations.openat(fifo, os.O_RDONLY, wait=True))
        await wait_all_tasks_blocked()
        while not workers():
            await checkpoint()
        assert current_manager().statistics().in_flight == THOUSANDS
        assert len(workers()) <= 8 + 32
        nursery.cancel_scope.cancel()
    assert current_manager().statistics().cancelled == THOUSANDS
    await perform(operations.statx("/"))


def test_thousands_of_reads_that_wait() -> None:
    """Reads of pipes take no worker at all, and no limit holds them up."""
    in_its_own_thread(_wait_for_thousands_of_reads)


async def _wait_for_thousands_of_reads() -> None:
    received: list[bytes] = []
    read_fd, write_fd = os.pipe()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = THOUSANDS if limits[1] >= THOUSANDS + 100 else limits[1] - 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))

    async def read(fd: int) -> None:  # each its own, or Trio's rule forbids it
        buffer = bytearray(1)
        await perform(operations.read(fd, buffer, -1, cancellable=True))
        received.append(bytes(buffer))
        os.close(fd)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(read, os.dup(read_fd))
        await wait_all_tasks_blocked()
        statistics = current_manager().statistics()
        assert (statistics.in_flight, statistics.waiting_for_limit) == (count, 0)
        assert not workers()
        os.write(write_fd, b"x" * count)
    assert received == [b"x"] * count
    assert current_manager().statistics().completed["READ"] == count
    for fd in (read_fd, write_fd):
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
