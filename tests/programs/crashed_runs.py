"""Runs that crash with operations in flight, each in a new process.

After a crash, Trio leaves its tasks to the garbage collector, which warns about them.
"""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import select
import socket
import tempfile
from array import array
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from accounting import open_fds
from children import in_thread
from trio.testing import wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig, SQPoll
from trio_uring._engine import _in_flight, _io_manager
from trio_uring._kernel.uapi import Opcode
from trio_uring._trio_private import current_io_manager
from trio_uring.lowlevel import Operation, operations, perform

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from trio_uring._engine._io_manager import UringIOManager

BLOCK = 4096


def crash() -> None:
    """Make Trio's loop fail immediately, with everything in flight."""

    async def victim() -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await trio.lowlevel.wait_task_rescheduled(lambda _: None)  # type: ignore[arg-type, return-value]

    trio.lowlevel.spawn_system_task(victim)


@contextmanager
def expecting_a_crash() -> Iterator[None]:
    try:
        yield
    except trio.TrioInternalError as exc:
        reason = f"{exc}, {exc.__cause__}"
        assert "abort function must return" in reason or "on purpose" in reason, reason
    else:
        raise AssertionError("it did not crash")


def crashed(start: Callable[[trio.Nursery], Awaitable[object]], **config: Any) -> UringIOManager:
    """Run *start*, let the run crash, and return its manager."""
    managers = []

    async def main() -> None:
        managers.append(manager_of_this_run())
        async with trio.open_nursery() as nursery:
            await start(nursery)
            crash()
            await trio.sleep_forever()

    with expecting_a_crash():
        trio_uring.run(main, ring=RingConfig(require=True, **config))
    [manager] = managers
    assert manager.ring.closed
    return manager


def manager_of_this_run() -> UringIOManager:
    manager = current_io_manager()
    assert isinstance(manager, _io_manager.UringIOManager)
    return manager


def is_pinned(buffer: bytearray) -> bool:
    try:
        buffer.append(0)
    except BufferError:
        return True
    del buffer[-1:]
    return False


def everything_drained(manager: UringIOManager) -> bool:
    statistics = manager.statistics()
    return statistics.in_flight == 0 and not _io_manager._leaked


# --- The programs ---------------------------------------------------------------------------


def receives(**config: Any) -> None:
    buffer = bytearray(8)
    a, b = socket.socketpair()

    async def start(nursery: trio.Nursery) -> None:
        nursery.start_soon(perform, operations.recv(a.fileno(), buffer))
        nursery.start_soon(trio.socket.from_stdlib_socket(b).recv, 8)
        await wait_all_tasks_blocked()

    manager = crashed(start, **config)
    assert everything_drained(manager)
    assert not is_pinned(buffer)
    b.send(b"data")
    assert buffer == bytes(8)
    assert a.recv(8) == b"data"


def receives_of_sqpoll() -> None:
    receives(sqpoll=SQPoll(idle=0.001))


def receives_in_a_thread() -> None:
    in_thread(receives)


def hundreds_in_small_queues() -> None:
    """The cancellations fill the SQ many times, and their completions overflow the CQ."""
    pairs = [socket.socketpair() for _ in range(300)]

    async def start(nursery: trio.Nursery) -> None:
        for a, _ in pairs:
            nursery.start_soon(trio.socket.from_stdlib_socket(a).recv, 1)
        await wait_all_tasks_blocked()

    assert everything_drained(crashed(start, entries=8, completion_entries=8))


def not_submitted_yet() -> None:
    """The crash happens before the loop iteration that would have submitted them."""
    buffers = [bytearray(8) for _ in range(20)]
    pairs = [socket.socketpair() for _ in buffers]

    async def receive(number: int) -> None:
        await perform(operations.recv(pairs[number][0].fileno(), buffers[number]))

    async def start(nursery: trio.Nursery) -> None:
        for number in range(len(pairs)):
            nursery.start_soon(receive, number)
            if number == len(pairs) // 2:
                crash()  # when some of these tasks have run
        await trio.sleep_forever()

    assert everything_drained(crashed(start, entries=8))
    assert not any(map(is_pinned, buffers))


def connections_and_files_that_came_late() -> None:
    """Results with an fd that no task receives."""
    for rounds in range(6):
        _connections_and_files_that_came_late(rounds)


async def perform_and_close(operation: Operation[int]) -> None:
    os.close(await perform(operation))


async def accept_and_close(listener: socket.socket) -> None:
    fd, _ = await perform(operations.accept(listener.fileno()))
    os.close(fd)


def _connections_and_files_that_came_late(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        before = open_fds()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            clients = [socket.socket() for _ in range(3)]

            async def start(nursery: trio.Nursery) -> None:
                nursery.start_soon(accept_and_close, listener)
                await wait_all_tasks_blocked()
                for client in clients:
                    client.connect(listener.getsockname())
                if rounds % 2:
                    crash()  # before what follows is submitted, or some turns later
                for number in range(20):
                    path = os.fsencode(f"{directory}/{number}")
                    creation = operations.openat(path, os.O_CREAT | os.O_RDWR)
                    nursery.start_soon(perform_and_close, creation)
                    nursery.start_soon(
                        perform_and_close, operations.socket(socket.AF_INET, socket.SOCK_STREAM)
                    )
                await trio.lowlevel.checkpoint()

            assert everything_drained(crashed(start))
            gc.collect()  # what was delivered
            listener.close()
            for client in clients:
                with suppress(ConnectionResetError):  # it was never accepted
                    assert client.recv(1) == b""
                client.close()
        assert open_fds() == before


async def receive_and_close(operation: Operation[operations.Message[Any]]) -> None:
    [(_, _, fds)] = (await perform(operation)).ancillary
    for fd in array("i", fds):
        os.close(fd)


def messages_with_fds_that_came_late() -> None:
    for _ in range(6):  # in some, the tasks see them, and in some the crash comes first
        _messages_with_fds_that_came_late()


def _messages_with_fds_that_came_late() -> None:
    before = open_fds()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", (0, 1)))]
    space = socket.CMSG_SPACE(8)
    pairs = [socket.socketpair() for _ in range(2)]

    async def start(nursery: trio.Nursery) -> None:
        buffers = manager_of_this_run().buffers
        assert buffers is not None
        first, second = (a.fileno() for a, _ in pairs)
        for receive in (
            operations.recvmsg_select(first, buffers, 10, space),
            operations.recvmsg(second, [bytearray(10)], space),
        ):
            nursery.start_soon(receive_and_close, receive)
        await wait_all_tasks_blocked()
        for _, b in pairs:
            b.sendmsg([b"x"], rights)
        manager_of_this_run().ring.flush()  # received, and nobody has seen it

    assert everything_drained(crashed(start))
    gc.collect()  # the tasks that have them
    for a, b in pairs:
        with pytest.raises(BlockingIOError):
            a.recv(1, socket.MSG_DONTWAIT)
        a.close()
        b.close()
    assert open_fds() == before


def a_batch_half_processed() -> None:
    """The crash happens when only some completions of a batch have been processed."""
    before = open_fds()
    a, b = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.socket()

    def explode(_res: int, _flags: int) -> None:
        raise ValueError("on purpose")

    async def main() -> None:
        managers.append(manager_of_this_run())
        # len 1: IORING_POLL_ADD_MULTI
        multishot = Operation(
            int(Opcode.POLL_ADD),
            lambda *_: None,
            a.fileno(),
            len=1,
            op_flags=select.POLLIN,
            on_cqe_more=explode,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(perform, multishot)
            await wait_all_tasks_blocked()
            nursery.start_soon(accept_and_close, listener)
            await wait_all_tasks_blocked()
            b.send(b"x")
            client.connect(listener.getsockname())

    managers: list[UringIOManager] = []
    with expecting_a_crash():
        trio_uring.run(main, ring=RingConfig(require=True))
    assert everything_drained(managers.pop())
    gc.collect()  # of the task, in case the native engine has woken it before the crash
    client.setblocking(False)
    assert client.recv(1) == b""  # it was accepted, and closed
    for sock in (a, b, listener, client):
        sock.close()
    assert open_fds() == before


def multishots() -> None:
    """Connections and bytes that were received ahead, and a lease that outlives the run."""
    before = open_fds()
    leases: list[trio_uring.ReceivedLease] = []
    a, b = socket.socketpair()
    with a, b, socket.create_server(("127.0.0.1", 0)) as server, ExitStack() as clients:

        async def take(listener: trio.SocketListener) -> None:
            async with trio_uring.accept_many(listener) as streams:
                async for stream in streams:
                    await stream.aclose()

        async def receive(stream: trio.SocketStream) -> None:
            async with trio_uring.receive_many(stream, max_buffers=2, buffer_size=4) as channel:
                while True:
                    leases.append(await channel.receive())

        async def start(nursery: trio.Nursery) -> None:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))
            nursery.start_soon(take, listener)
            nursery.start_soon(receive, trio.SocketStream(trio.socket.from_stdlib_socket(a.dup())))
            await wait_all_tasks_blocked()
            clients.enter_context(socket.create_connection(server.getsockname()))
            b.send(b"data")
            await wait_all_tasks_blocked()
            # These come when the run crashes; the tasks may see them or not.
            clients.enter_context(socket.create_connection(server.getsockname()))
            b.send(b"more")
            manager_of_this_run().ring.flush()

        assert everything_drained(crashed(start))
        gc.collect()
    assert b"datamore".startswith(b"".join(lease.memory for lease in leases))
    while leases:
        leases.pop().release()
    gc.collect()  # the stream, which they hold
    assert open_fds() == before


def reads_past_the_page_cache() -> None:
    """The kernel writes into the buffers of O_DIRECT reads when the disk answers, in any case."""
    with tempfile.NamedTemporaryFile(dir=Path.cwd()) as file:
        file.write(b"D" * BLOCK * 64)
        file.flush()
        os.fsync(file.fileno())
        try:
            fd = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError:
            print("no O_DIRECT here")
            return
        poison = b"P" * BLOCK
        for round_ in range(20):
            buffers = [mmap.mmap(-1, BLOCK) for _ in range(64)]  # as aligned as they must be
            for buffer in buffers:
                buffer[:] = poison

            async def start(nursery: trio.Nursery) -> None:
                for number, buffer in enumerate(buffers):
                    reading = operations.read(fd, buffer, number * BLOCK)
                    nursery.start_soon(perform, reading)
                    if number == 32 and round_ % 2:
                        crash()
                await trio.lowlevel.checkpoint()

            assert everything_drained(crashed(start))
            # Now they are the program's again.
            for buffer in buffers:
                buffer[:] = poison
            # Whatever was still under way would be done when as many reads again are.
            answer = mmap.mmap(-1, BLOCK)
            for number in itertools.chain(range(64), range(64)):
                assert os.preadv(fd, [answer], number * BLOCK) == BLOCK
            assert answer[:] == b"D" * BLOCK
            assert [buffer[:] for buffer in buffers] == [poison] * 64
        os.close(fd)


def in_kernel_workers() -> None:
    """Operations that block in a kernel worker are interrupted."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.fsencode(f"{directory}/fifo")
        os.mkfifo(path)
        opening = operations.openat(path, os.O_RDONLY)
        opcode, _sqe_flags, *rest = opening.sqe
        opening.sqe = (opcode, 1 << 4, *rest)  # type: ignore[assignment]  # IOSQE_ASYNC
        read, write = os.pipe()
        other_read, other_write = os.pipe()

        async def start(nursery: trio.Nursery) -> None:
            nursery.start_soon(perform, opening)
            nursery.start_soon(perform, operations.splice(read, other_write, 1))
            nursery.start_soon(perform, operations.timeout(3600 * 10**9))
            await wait_all_tasks_blocked()

        assert everything_drained(crashed(start))
        for fd in (read, write, other_read, other_write):
            os.close(fd)


def not_drained_in_time() -> None:
    """Memory that the kernel may still write to is never freed."""
    _in_flight._DRAIN_SECONDS = 0.0  # type: ignore[misc]
    buffer = bytearray(8)
    a, b = socket.socketpair()

    async def start(nursery: trio.Nursery) -> None:
        nursery.start_soon(perform, operations.recv(a.fileno(), buffer))
        nursery.start_soon(trio.socket.from_stdlib_socket(b).recv, 8)
        await wait_all_tasks_blocked()

    crashed(start)
    assert len(_io_manager._leaked) == 1
    gc.collect()
    assert is_pinned(buffer)
    b.close()


def calls_that_come_late() -> None:
    """Aborts are called when the tasks are collected, after the ring was closed."""
    sock, peer = socket.socketpair()

    async def start(nursery: trio.Nursery) -> None:
        async def receive() -> None:
            try:
                await trio.socket.from_stdlib_socket(sock).recv(1)
            finally:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await trio.lowlevel.checkpoint()

        nursery.start_soon(receive)
        await wait_all_tasks_blocked()
        table = manager_of_this_run()._entries
        entries.extend(entry for entry in table.values() if entry.task is not None)

    entries: list[Any] = []
    manager = crashed(start)
    gc.collect()
    [entry] = entries
    entry.cancel_asked = False
    entry.abort(lambda: None)
    manager.notify_closing(peer.fileno())
    statistics = manager.statistics()
    assert (statistics.in_flight, statistics.backend) == (0, "io_uring")
    with pytest.raises(RuntimeError, match="this ring is closed"):
        manager.get_events(0)


def an_object_on_its_way() -> None:
    """Another thread has assigned an object to a task. It goes back for others to receive."""
    send_channel, receive_channel = trio_uring.open_ring_channel[str](0)

    async def start(nursery: trio.Nursery) -> None:
        nursery.start_soon(receive_channel.clone().receive)
        await wait_all_tasks_blocked()
        manager_of_this_run().open_mailbox().notify = lambda: None  # type: ignore[method-assign]
        in_thread(lambda: send_channel.send_nowait("still there"))

    crashed(start)
    assert receive_channel.receive_nowait() == "still there"
    assert receive_channel.statistics().open_receive_channels == 1


CRASHED_RUNS = (
    an_object_on_its_way,
    receives,
    receives_of_sqpoll,
    receives_in_a_thread,
    hundreds_in_small_queues,
    not_submitted_yet,
    connections_and_files_that_came_late,
    messages_with_fds_that_came_late,
    a_batch_half_processed,
    multishots,
    reads_past_the_page_cache,
    in_kernel_workers,
    not_drained_in_time,
    calls_that_come_late,
)
