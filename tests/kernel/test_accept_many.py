"""`accept_many`: each connection is accepted once, whatever is cancelled, refused or closed."""

from __future__ import annotations

import errno
import gc
import random
import resource
import socket as stdlib_socket
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from accounting import Rounds, open_fds
from races import NOT_READY, current_manager, every_order, race
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_uring
from trio_uring import MultishotListener, accept_many
from trio_uring._multishot import _accept_many
from trio_uring.lowlevel import Operation, operations, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RUNS = {"ring": trio_uring.run, "no ring": trio.run}

pytestmark = pytest.mark.usefixtures("fd_ledger")


@contextmanager
def listening(backlog: int = 1000) -> Iterator[tuple[trio.SocketListener, Any]]:
    with stdlib_socket.create_server(("127.0.0.1", 0), backlog=backlog) as sock:
        address = sock.getsockname()
        trio_sock = trio.socket.from_stdlib_socket(sock)
        with trio_sock:
            yield trio.SocketListener(trio_sock), address


@contextmanager
def connecting(address: Any, count: int) -> Iterator[list[stdlib_socket.socket]]:
    """Open *count* connections, each of which sends its number."""
    with ExitStack() as stack:
        clients = []
        for number in range(count):
            client = stack.enter_context(stdlib_socket.create_connection(address))
            client.sendall(b"%d." % number)
            clients.append(client)
        yield clients


async def number_of(stream: trio.SocketStream) -> int:
    """Return the number that the client sent, and close the stream."""
    async with stream:
        said = b""
        while not said.endswith(b"."):
            said += await stream.receive_some()
        return int(said[:-1])


async def in_this_thread(function: Callable[[], None]) -> None:
    function()


def accepts() -> int:
    return current_manager().statistics().completed.get("ACCEPT", 0)


# --- It accepts -----------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_all_of_a_storm_of_connections_are_accepted(run: str) -> None:
    """Each connection is taken once. On the ring, one operation accepted them all."""

    async def main() -> None:
        with listening() as (plain, address):
            async with accept_many(plain, max_waiting=1000) as listener:
                taken = []
                with connecting(address, 200):
                    async for stream in listener:
                        taken.append(await number_of(stream))
                        if len(taken) == 200:
                            break
                assert sorted(taken) == list(range(200))
            if run == "ring":
                assert accepts() == 1

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_unix_sockets(run: str, tmp_path: Path) -> None:
    async def main() -> None:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        await sock.bind(str(tmp_path / "socket"))
        sock.listen()
        async with accept_many(trio.SocketListener(sock)) as listener:
            assert listener.socket is sock
            for _ in range(3):
                async with await trio.open_unix_socket(tmp_path / "socket") as client:
                    await client.send_all(b"7.")
                    stream = await listener.accept()
                    assert stream.socket.family == trio.socket.AF_UNIX
                    assert not stream.socket.get_inheritable()
                    assert await number_of(stream) == 7

    RUNS[run](main)


@pytest.mark.parametrize("run", RUNS)
def test_it_serves_connections(run: str) -> None:
    """It works like any other listener."""

    async def main() -> None:
        served = []

        async def handle(stream: trio.SocketStream) -> None:
            served.append(await number_of(stream))
            if len(served) == 50:
                nursery.cancel_scope.cancel()

        with listening() as (plain, address):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, handle, [accept_many(plain)])
                with connecting(address, 50):
                    await trio.sleep_forever()
        assert sorted(served) == list(range(50))

    RUNS[run](main)


async def test_every_step_is_a_checkpoint() -> None:
    with listening() as (plain, address), connecting(address, 3):
        async with accept_many(plain) as listener:
            for _ in range(3):
                with assert_checkpoints():
                    stream = await listener.accept()
                await stream.aclose()
            with assert_checkpoints():
                await listener.stop()
            with assert_checkpoints():
                await listener.aclose()
            with assert_checkpoints():
                await listener.aclose()


async def test_the_operation_can_be_performed_by_itself() -> None:
    """The operation by itself."""
    fds = []
    with listening() as (plain, address):
        operation = operations.accept_multishot(
            plain.socket.fileno(), lambda fd, _flags: fds.append(fd)
        )
        with connecting(address, 3), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(perform, operation)
                await wait_all_tasks_blocked()
                assert len(fds) == 3
                scope.cancel()
        for fd in fds:
            stdlib_socket.socket(fileno=fd).close()


@pytest.mark.ring(entries=8, completion_entries=8)
async def test_small_queues_lose_no_connection() -> None:
    """The CQ overflows, which ends the operation, and it begins again."""
    with listening() as (plain, address), connecting(address, 200):
        async with accept_many(plain, max_waiting=1000) as listener:
            taken = [await number_of(await listener.accept()) for _ in range(200)]
    assert taken == list(range(200))
    assert accepts() > 1


# --- It does not accept without bound -------------------------------------------------------


async def test_connections_wait_in_the_backlog_while_nobody_takes_them() -> None:
    with listening() as (plain, address), ExitStack() as stack:
        async with accept_many(plain, max_waiting=4) as listener:
            stack.enter_context(connecting(address, 1))
            assert await number_of(await listener.accept()) == 0
            stack.enter_context(connecting(address, 4))
            await wait_all_tasks_blocked()
            assert listener.waiting == 4
            # It has stopped: these stay in the backlog.
            stack.enter_context(connecting(address, 10))
            await wait_all_tasks_blocked()
            assert listener.waiting == 4
            assert [await number_of(await listener.accept()) for _ in range(4)] == [0, 1, 2, 3]
            await wait_all_tasks_blocked()
            assert listener.waiting == 0
            assert [await number_of(await listener.accept()) for _ in range(10)] == list(range(10))
            assert accepts() == 2


async def test_stopping_loses_nothing() -> None:
    with listening() as (plain, address), connecting(address, 6):
        async with accept_many(plain) as listener:
            assert await number_of(await listener.accept()) == 0
            left = await listener.stop()
            assert [await number_of(stream) for stream in left] == [1, 2, 3, 4, 5]
            assert current_manager().statistics().in_flight == 0
            with connecting(address, 2):
                await wait_all_tasks_blocked()
                assert listener.waiting == 0
                assert await number_of(await plain.accept()) == 0
                assert await number_of(await listener.accept()) == 1
                assert await listener.stop() == []


async def test_closing_closes_what_was_not_taken() -> None:
    with listening() as (plain, address), connecting(address, 3) as clients:
        async with accept_many(plain) as listener:
            assert await number_of(await listener.accept()) == 0
            assert listener.waiting == 2
        assert clients[0].recv(1) == b""
        for client in clients[1:]:
            with pytest.raises(ConnectionResetError):  # nobody read what they sent
                client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            stdlib_socket.create_connection(address)


# --- Cancelled ------------------------------------------------------------------------------


async def test_cancelling_loses_no_connection(rounds: Rounds) -> None:
    with listening() as (plain, address):
        async with accept_many(plain) as listener:
            for order in every_order(160):
                with ExitStack() as clients:
                    outcome = await race(
                        rounds,
                        order,
                        listener.accept,
                        lambda: clients.enter_context(connecting(address, 1)),
                    )
                    if outcome:
                        await outcome.value.aclose()
                    elif order not in NOT_READY:
                        await (await listener.accept()).aclose()
                    await wait_all_tasks_blocked()
                    assert listener.waiting == 0


async def test_connections_from_another_thread() -> None:
    """Real races in the kernel between connections and cancellations, in no forced order."""
    chance = random.Random(0)
    taken: list[int] = []
    with listening() as (plain, address):

        def connect() -> None:
            for number in range(300):
                with stdlib_socket.create_connection(address) as client:
                    client.sendall(b"%d." % number)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, connect)
            async with accept_many(plain, max_waiting=3) as listener:
                while len(taken) < 300:
                    streams = []
                    with trio.CancelScope() as scope:
                        if chance.random() < 0.3:
                            scope.cancel()
                        elif chance.random() < 0.3:
                            nursery.start_soon(cancel_soon, scope, chance.randint(0, 3))
                        streams.append(await listener.accept())
                    if chance.random() < 0.1:
                        streams += await listener.stop()
                    taken += [await number_of(each) for each in streams]
    assert sorted(taken) == list(range(300))


async def cancel_soon(scope: trio.CancelScope, turns: int) -> None:
    for _ in range(turns):
        await trio.lowlevel.checkpoint()
    scope.cancel()


async def test_closing_at_any_moment() -> None:
    """Closing while connections arrive and are accepted leaks no fd."""
    for turns in range(30):
        with listening() as (plain, address), connecting(address, 5), trio.CancelScope() as scope:
            async with accept_many(plain) as listener, trio.open_nursery() as nursery:

                async def take(listener: MultishotListener = listener) -> None:
                    with suppress(trio.ClosedResourceError):
                        async for stream in listener:
                            await stream.aclose()

                nursery.start_soon(take)
                for _ in range(turns // 2):
                    await trio.lowlevel.checkpoint()
                if turns % 2:
                    scope.cancel()
                else:
                    await listener.aclose()
                    nursery.cancel_scope.cancel()


# --- What goes wrong ------------------------------------------------------------------------


@contextmanager
def few_fds(count: int) -> Iterator[None]:
    """Leave room for *count* more fds."""
    spare = [stdlib_socket.socket()]
    while spare[-1].fileno() < max(open_fds()):
        spare.append(stdlib_socket.socket())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1].fileno() + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in spare:
            each.close()


@pytest.mark.parametrize("run", RUNS)
def test_running_out_of_fds_is_an_error_that_passes(run: str) -> None:
    """It raises the error, like any listener, and goes on when fds are free again."""

    async def main() -> None:
        with listening() as (plain, address), connecting(address, 8):
            async with accept_many(plain) as listener:
                with few_fds(3):
                    streams = [await listener.accept() for _ in range(3)]
                    for _ in range(2):
                        with pytest.raises(OSError, match="Too many open files") as caught:
                            await listener.accept()
                        assert caught.value.errno == errno.EMFILE
                while len(streams) < 8:
                    streams.append(await listener.accept())
                assert [await number_of(each) for each in streams] == list(range(8))

    RUNS[run](main)


async def test_a_kernel_without_multishot_accept_accepts_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(fd: int, _on_more: object, _flags: int) -> Operation[int]:
        return Operation(operations.accept(fd).opcode, lambda _res, _flags: 0, fd, ioprio=1 << 15)

    monkeypatch.setattr(_accept_many.operations, "accept_multishot", unknown)
    with listening() as (plain, address), connecting(address, 20):
        async with accept_many(plain) as listener:
            taken = [await number_of(await listener.accept()) for _ in range(20)]
            assert taken == list(range(20))
            assert listener.waiting == 0
            assert await listener.stop() == []
        assert accepts() == 1  # the rest Trio's way
    assert "ACCEPT_MULTISHOT: EINVAL" in current_manager().statistics().refused


async def test_a_connection_is_closed_if_no_socket_can_be_made_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with listening() as (plain, address), connecting(address, 2):
        async with accept_many(plain) as listener:
            assert await number_of(await listener.accept()) == 0
            with monkeypatch.context() as patch:
                patch.setattr(_accept_many.stdlib_socket, "socket", no_memory)
                with pytest.raises(MemoryError):
                    await listener.accept()


@pytest.mark.parametrize("run", RUNS)
def test_two_tasks_cannot_accept_from_one_listener(run: str) -> None:
    async def main() -> None:
        with listening() as (plain, _):
            async with accept_many(plain) as listener, trio.open_nursery() as nursery:
                nursery.start_soon(listener.accept)
                await wait_all_tasks_blocked()
                with pytest.raises(trio.BusyResourceError):
                    await listener.accept()
                with pytest.raises(trio.BusyResourceError):
                    await plain.accept()
                if run == "ring":
                    with pytest.raises(trio.BusyResourceError):
                        await listener.stop()
                nursery.cancel_scope.cancel()

    RUNS[run](main)


async def test_it_is_refused_while_another_task_accepts() -> None:
    with listening() as (plain, _):
        async with accept_many(plain) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(plain.accept)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await listener.accept()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("whose", ["its own", "the plain one"])
@pytest.mark.parametrize("run", RUNS)
def test_closing_the_listener_ends_it(run: str, whose: str) -> None:
    async def main() -> None:
        with listening() as (plain, _):
            async with accept_many(plain) as listener, trio.open_nursery() as nursery:

                async def take() -> None:
                    for _ in range(2):
                        with pytest.raises(trio.ClosedResourceError):
                            await listener.accept()

                nursery.start_soon(take)
                await wait_all_tasks_blocked()
                await (listener if whose == "its own" else plain).aclose()

    RUNS[run](main)


async def test_notify_closing_alone_ends_it() -> None:
    with listening() as (plain, address):
        async with accept_many(plain) as listener, trio.open_nursery() as nursery:

            async def take() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await listener.accept()

            nursery.start_soon(take)
            await wait_all_tasks_blocked()
            trio.lowlevel.notify_closing(plain.socket)
            await wait_all_tasks_blocked()
            with connecting(address, 1):
                assert await number_of(await listener.accept()) == 0


async def test_wrong_arguments_are_refused() -> None:
    with listening() as (plain, _):
        with pytest.raises(TypeError, match="SocketListener"):
            accept_many(plain.socket)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_waiting"):
            accept_many(plain, max_waiting=0)


def test_outside_a_run_it_is_refused() -> None:
    with stdlib_socket.create_server(("127.0.0.1", 0)) as sock:
        plain = trio.SocketListener(trio.socket.from_stdlib_socket(sock.dup()))
        with plain.socket, pytest.raises(RuntimeError, match="async context"):
            accept_many(plain)


@pytest.mark.parametrize("how", ["in a later turn", "at once", "in a thread"])
async def test_a_forgotten_listener_lets_go_of_its_socket(how: str) -> None:
    with listening() as (plain, address):
        kept = [accept_many(plain)]
        with connecting(address, 3) as peers:
            assert await number_of(await kept[0].accept()) == 0
            forget = trio.to_thread.run_sync if how == "in a thread" else in_this_thread
            with pytest.warns(ResourceWarning, match="MultishotListener was not closed"):
                await forget(kept.clear)
            if how == "in a later turn":
                await wait_all_tasks_blocked()
            with stdlib_socket.create_connection(address) as late:
                async with await plain.accept() as stream:
                    assert stream.socket.getpeername() == late.getsockname()
            for peer in peers[1:]:  # they were accepted, and nobody would take them
                peer.setblocking(False)
                with suppress(ConnectionResetError):
                    assert peer.recv(1) == b""


def test_a_listener_that_is_never_closed_is_reported() -> None:
    """It is closed when nothing refers to it any more, like a socket."""

    async def main() -> None:
        with listening() as (plain, address), connecting(address, 3):
            listener = accept_many(plain)
            assert await number_of(await listener.accept()) == 0
            assert listener.waiting == 2

    gc.disable()
    try:
        with pytest.warns(ResourceWarning, match="MultishotListener was not closed"):
            trio_uring.run(partial(main))
    finally:
        gc.enable()
