"""Waits on sockets and pipes take no kernel worker: there are few, and files need them.

Fact. The kernel's own poll always waits for POLLRDHUP too. If the peer has shut down its side and
the socket is full, a send that waits in the kernel is woken again and again, until the kernel hands
it to a worker (``iou-wrk-*``, a thread of this process), where it blocks. (Linux 6.18)
"""

from __future__ import annotations

import os
import resource
import socket as stdlib_socket
import threading
import tty
from contextlib import AsyncExitStack, ExitStack, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio
from children import output_of, run_python
from outcome import Outcome, capture
from races import current_manager
from scenarios import as_guest
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
IP_RECVERR: Final = 11  # linux/in.h; in Python since 3.14


def workers() -> set[int]:
    """Return the kernel workers of this thread. They outlive the ring for which they worked."""
    name = f"iou-wrk-{threading.get_native_id()}"
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if (thread / "comm").read_text().strip() == name:
                found.add(int(thread.name))
    return found


def in_its_own_thread(test: Callable[..., Awaitable[None]], *args: object, **limits: int) -> None:
    """Run an async test in a new thread, in which no earlier test has left a worker."""
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
def test_sending_to_peers_that_shut_down_their_side_takes_no_worker(send: str, kind: str) -> None:
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


def test_everything_else_that_waits_takes_no_worker() -> None:
    in_its_own_thread(_wait_for_everything_else)


async def _wait_for_everything_else() -> None:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        await wait_in_every_way(stack, nursery)
        await wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 10
        assert not workers()
        nursery.cancel_scope.cancel()


# --- Wake-ups for nothing -------------------------------------------------------------------
#
# Another process or thread takes what had come, a datagram has a wrong checksum, TCP's urgent
# byte is no data: poll says that there is something, and there is nothing. A stranger can have
# that happen as often as he likes.


@attrs.frozen
class Wait:
    """A task that waits, a function that makes it ready, and one that undoes that.

    Args:
      receive: What the task does. It returns when it has received something.
      give: Makes something ready to receive.
      take: Receives it before the task does.
    """

    receive: Callable[[], Awaitable[object]]
    give: Callable[[], object]
    take: Callable[[], object]


def _shared(kind: int) -> Callable[[ExitStack], tuple[SocketType, Callable[[], object], Any]]:
    def open_pair(stack: ExitStack) -> tuple[SocketType, Callable[[], object], Any]:
        ours, theirs = stdlib_socket.socketpair(type=kind)
        thief = ours.dup()
        thief.setblocking(False)
        for sock in (ours, theirs, thief):
            stack.enter_context(sock)
        sock = trio.socket.from_stdlib_socket(ours)
        return sock, lambda: theirs.send(b"x"), lambda: thief.recv(10)

    return open_pair


_stream = _shared(stdlib_socket.SOCK_STREAM)
_datagrams = _shared(stdlib_socket.SOCK_DGRAM)


def _on_socket(
    open_pair: Callable[[ExitStack], tuple[SocketType, Callable[[], object], Any]],
    receive: Callable[[SocketType], Awaitable[object]],
) -> Callable[[ExitStack], Wait]:
    def begin(stack: ExitStack) -> Wait:
        sock, give, take = open_pair(stack)
        return Wait(lambda: receive(sock), give, take)

    return begin


def _urgent_bytes(stack: ExitStack) -> Wait:
    ours, theirs = tcp_pair()
    stack.enter_context(theirs)
    sock = stack.enter_context(trio.socket.from_stdlib_socket(ours))
    sent = iter(range(TURNS))

    def give() -> None:
        if next(sent, None) is None:
            theirs.send(b"end")
        else:
            theirs.send(b"x", stdlib_socket.MSG_OOB)

    async def receive() -> None:
        # One that was not read when the next one came is data like any other.
        while not (await trio.SocketStream(sock).receive_some()).endswith(b"end"):
            pass

    return Wait(receive, give, lambda: None)


def _error_queue(stack: ExitStack) -> Wait:
    """Poll reports it as ready until its error queue is read. Trio polls in each iteration."""
    sock = stack.enter_context(trio.socket.socket(type=stdlib_socket.SOCK_DGRAM))
    sock._sock.bind(("127.0.0.1", 0))  # type: ignore[attr-defined]
    sock.setsockopt(stdlib_socket.IPPROTO_IP, IP_RECVERR, 1)
    with stdlib_socket.socket(type=stdlib_socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        nobody = other.getsockname()
        friend = stack.enter_context(stdlib_socket.socket(type=stdlib_socket.SOCK_DGRAM))
    sock._sock.sendto(b"x", nobody)  # type: ignore[attr-defined]
    sock.getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR)
    sent = iter(range(TURNS))

    def give() -> None:
        if next(sent, None) is None:
            friend.sendto(b"x", sock.getsockname())

    return Wait(lambda: sock.recvfrom(10), give, lambda: None)


def _listener(stack: ExitStack) -> Wait:
    thief = stack.enter_context(stdlib_socket.create_server(("127.0.0.1", 0), backlog=10))
    sock = stack.enter_context(trio.socket.from_stdlib_socket(thief.dup()))

    def connect() -> None:
        with stdlib_socket.create_connection(thief.getsockname()):
            pass

    def take() -> None:
        thief.accept()[0].close()

    async def accept() -> None:
        (await sock.accept())[0].close()

    return Wait(accept, connect, take)


WAITS: Final[dict[str, Callable[[ExitStack], Wait]]] = {
    "receive_some": _on_socket(_stream, lambda sock: trio.SocketStream(sock).receive_some()),
    "recv": _on_socket(_stream, lambda sock: sock.recv(10)),
    "recv_into": _on_socket(_stream, lambda sock: sock.recv_into(bytearray(10))),
    "recv of datagrams": _on_socket(_datagrams, lambda sock: sock.recv(10)),
    "recvfrom": _on_socket(_datagrams, lambda sock: sock.recvfrom(10)),
    "recvfrom_into": _on_socket(_datagrams, lambda sock: sock.recvfrom_into(bytearray(10))),
    "recvmsg": _on_socket(_datagrams, lambda sock: sock.recvmsg(10)),
    "recvmsg_into": _on_socket(_datagrams, lambda sock: sock.recvmsg_into([bytearray(10)])),
    "accept": _listener,
    "urgent bytes": _urgent_bytes,
    "an unread error queue": _error_queue,
}


@pytest.mark.parametrize("buffers", [1, 16])
@pytest.mark.parametrize("wait", WAITS)
def test_waking_in_vain(wait: str, buffers: int) -> None:
    in_its_own_thread(_wake_in_vain, wait, receive_buffers=buffers)


@pytest.mark.parametrize("wait", WAITS)
def test_waking_guests_in_vain(wait: str) -> None:
    as_guest(partial(_wake_in_vain, wait), RingConfig(require=True))


async def _wake_in_vain(wait: str) -> None:
    before = workers()
    with ExitStack() as stack:
        waiting = [WAITS[wait](stack) for _ in range(2)]
        async with trio.open_nursery() as nursery:
            for each in waiting:
                nursery.start_soon(each.receive)
            for _ in range(3):  # not until all are blocked: an error queue keeps them busy
                await checkpoint()
            for _ in range(TURNS):
                for each in waiting:
                    each.give()
                    each.take()
                await checkpoint()
            assert len(nursery.child_tasks) == len(waiting)
            assert workers() == before
            for each in waiting:
                each.give()


def pipe() -> tuple[int, int]:
    return os.pipe()


def terminal() -> tuple[int, int]:
    theirs, ours = os.openpty()
    tty.setraw(ours)
    return ours, theirs


@pytest.mark.parametrize("opens", [pipe, terminal])
def test_waking_readers_of_files_in_vain(opens: Callable[[], tuple[int, int]]) -> None:
    """A worker may try to read, but it does not wait for more."""
    in_its_own_thread(_wake_readers_in_vain, opens)


async def _wake_readers_in_vain(opens: Callable[[], tuple[int, int]]) -> None:
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        received: list[bytes] = []

        async def receive(stream: FdStream) -> None:
            while True:
                received.append(await stream.receive_some())

        ends: list[tuple[int, int]] = []
        for _ in range(CONNECTIONS):
            ours, theirs = opens()
            thief = os.open(f"/proc/self/fd/{ours}", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            nursery.start_soon(receive, await stack.enter_async_context(FdStream(ours)))
            ends.append((theirs, thief))
        await wait_all_tasks_blocked()
        for _ in range(TURNS):
            for theirs, thief in ends:
                os.write(theirs, b"x")
                with suppress(BlockingIOError):  # a worker was faster
                    received.append(os.read(thief, 10))
            await checkpoint()
        while sum(map(len, received)) < CONNECTIONS * TURNS:
            await checkpoint()
        await perform(operations.statx("/"))  # which takes a worker
        nursery.cancel_scope.cancel()
    for fd in chain(*ends):
        os.close(fd)


# --- Limits ---------------------------------------------------------------------------------

# More than any limit allows at once, and more kernel threads than most systems have in all.
THOUSANDS: Final = 4000


@pytest.mark.parametrize("limits", [(8, 32, 64), (1, 2, 3)])
def test_thousands_of_operations_that_block_leave_workers_for_others(
    limits: tuple[int, int, int], tmp_path: Path
) -> None:
    """They wait for tokens, and the kernel starts no more workers than allowed."""
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


def test_thousands_of_operations_that_block_can_be_cancelled(tmp_path: Path) -> None:
    """All of them are in the kernel, which queues those that exceed its workers."""
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


def test_thousands_of_reads_that_wait_take_no_worker() -> None:
    """Reads of pipes take no worker, and no limit delays them."""
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


# --- Listeners that are shared --------------------------------------------------------------


async def test_a_loop_that_is_busy_keeps_no_connection_from_one_that_is_idle() -> None:
    """An accept in the kernel would get it, and no other process would be notified."""
    accepted = threading.Event()
    waiting = threading.Event()

    async def accept(sock: SocketType) -> None:
        with sock:
            (await sock.accept())[0].close()

    async def idle(sock: SocketType) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, sock)
            await wait_all_tasks_blocked()
            waiting.set()
        accepted.set()

    with stdlib_socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept, trio.socket.from_stdlib_socket(listener.dup()))
            await wait_all_tasks_blocked()
            other = trio.socket.from_stdlib_socket(listener.dup())
            thread = threading.Thread(
                target=partial(trio_uring.run, idle, other, ring=RingConfig(require=True))
            )
            thread.start()
            waiting.wait()
            for _ in range(2):
                stack.enter_context(stdlib_socket.create_connection(listener.getsockname()))
                assert accepted.wait(30)  # our own loop has no turn meanwhile
            thread.join()


NO_WORKER = """
import os, resource, sys
import trio, trio_uring
from trio_uring.lowlevel import operations, perform

if os.getuid() == 0:  # to whom the limit does not apply
    os.setgroups([])
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))

async def tried(call):
    try:
        await call()
    except Exception as exc:
        print(type(exc).__name__, exc)

async def main():
    path = trio.Path(sys.argv[1])
    await tried(lambda: path.write_bytes(b""))
    await tried(lambda: perform(operations.mkdirat(path)))
    await tried(lambda: trio_uring.write_file(path, b""))

trio_uring.run(main)
"""


def test_an_operation_for_which_there_can_be_no_worker_says_so(tmp_path: Path) -> None:
    lines = output_of(run_python(NO_WORKER, tmp_path / "new"))
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("RuntimeError")
        assert "RLIMIT_NPROC" in line
