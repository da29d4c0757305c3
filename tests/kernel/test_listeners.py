"""Accepting streams, and how the handlers of `trio.serve_listeners` end."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import pytest
import trio
from accounting import steps_beside
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

import trio_uring
from trio_uring import RingConfig
from trio_uring._trio_private import TrioSocket

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator
    from pathlib import Path

# As good as for ever: whatever may be done within a turn's budget, is.
AMPLE = 1.0


pytestmark = pytest.mark.usefixtures("no_deterministic_scheduling")


@asynccontextmanager
async def connected(
    count: int,
) -> AsyncGenerator[tuple[trio.SocketListener, list[socket.socket]], None]:
    """Yield a listener to which *count* clients have connected. None is accepted yet."""
    async with AsyncExitStack() as stack:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        await stack.enter_async_context(listener)
        address = listener.socket.getsockname()
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(count)]
        yield listener, clients


async def steps_beside_accepts(count: int) -> int:
    """Return how often another task ran while *count* waiting connections were accepted."""
    async with connected(count) as (listener, _), AsyncExitStack() as streams:

        async def accept() -> None:
            streams.callback((await listener.accept()).socket.close)

        return await steps_beside(accept, count)


@pytest.mark.ring(turn_budget=AMPLE)
async def test_a_burst_of_connections_shares_a_turn() -> None:
    assert await steps_beside_accepts(8) == 0


@pytest.mark.ring(turn_budget=0)
async def test_without_a_budget_each_accept_is_a_schedule_point() -> None:
    assert await steps_beside_accepts(8) >= 7


class CountingInstrument(trio.abc.Instrument):
    """Counts the steps."""


@pytest.mark.ring(turn_budget=AMPLE)
async def test_under_an_instrument_each_accept_is_a_schedule_point() -> None:
    instrument = CountingInstrument()
    trio.lowlevel.add_instrument(instrument)
    assert await steps_beside_accepts(8) >= 7
    trio.lowlevel.remove_instrument(instrument)
    assert await steps_beside_accepts(8) == 0


@pytest.mark.ring(turn_budget=AMPLE)
async def test_under_a_mock_clock_each_accept_is_a_schedule_point(
    mock_clock: trio.testing.MockClock,
) -> None:
    assert await steps_beside_accepts(8) >= 7


@pytest.mark.ring(turn_budget=AMPLE)
async def test_under_deterministic_scheduling_each_accept_is_a_schedule_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    assert await steps_beside_accepts(8) >= 7


@pytest.mark.parametrize("budget", [-1, 1.5, float("nan")])
def test_budgets_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match="turn_budget must be between 0 and 1"):
        RingConfig(turn_budget=budget)


@pytest.mark.parametrize("budget", ["1", None, True])
def test_budgets_of_wrong_types(budget: object) -> None:
    with pytest.raises(TypeError, match="turn_budget must be a number of seconds"):
        RingConfig(turn_budget=budget)  # type: ignore[arg-type]


@pytest.mark.ring(turn_budget=AMPLE)
async def test_accepting_is_a_checkpoint_and_takes_nothing_when_cancelled() -> None:
    async with connected(2) as (listener, clients):
        with assert_checkpoints():
            first = await listener.accept()
        with trio.CancelScope() as scope:
            scope.cancel()
            await listener.accept()
        assert scope.cancelled_caught
        second = await listener.accept()
        async with first, second:
            accepted = {stream.socket.getpeername() for stream in (first, second)}
            assert accepted == {client.getsockname() for client in clients}


async def test_an_accepted_stream_is_as_trio_makes_it() -> None:
    async with connected(1) as (listener, [client]):
        stream = await listener.accept()
        async with stream:
            sock = stream.socket
            assert type(sock) is type(listener.socket)
            assert (sock.family, sock.type, sock.proto) == (
                listener.socket.family,
                listener.socket.type,
                listener.socket.proto,
            )
            assert sock.getpeername() == client.getsockname()
            assert not os.get_inheritable(sock.fileno())
            assert not os.get_blocking(sock.fileno())
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 2**14
            reference = trio.SocketStream(sock)
            assert vars(reference).keys() == vars(stream).keys()
            detector, expected = (vars(s)["_send_conflict_detector"] for s in (stream, reference))
            assert vars(detector) == vars(expected)


async def test_unix_listeners(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with trio.socket.socket(socket.AF_UNIX) as sock, socket.socket(socket.AF_UNIX) as client:
        await sock.bind(path)
        sock.listen()
        client.connect(path)
        client.sendall(b"x")
        async with await trio.SocketListener(sock).accept() as stream:
            assert await stream.receive_some() == b"x"


@contextmanager
def no_fd_left() -> Generator[None, None, None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_an_error_is_raised_once() -> None:
    async with connected(0) as (listener, _):
        listener.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(OSError, match="Invalid argument") as caught:
            await listener.accept()
    assert caught.value.__context__ is None


async def test_a_lack_of_fds_is_raised_and_loses_no_connection() -> None:
    async with connected(1) as (listener, [client]):
        with no_fd_left(), pytest.raises(OSError, match="Too many open files") as caught:
            await listener.accept()
        assert caught.value.errno == errno.EMFILE
        async with await listener.accept() as stream:
            assert stream.socket.getpeername() == client.getsockname()


@pytest.mark.usefixtures("fd_ledger")
async def test_a_connection_is_closed_if_no_socket_can_be_made_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    async with connected(1) as (listener, [client]):
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", no_memory)
            with pytest.raises(MemoryError):
                await listener.accept()
        assert client.recv(1) == b""
        client.close()


# ---- What handlers leave behind ---------------------------------------------------------------


async def served(handler_error: Exception | None, *, cancelled: bool) -> bytes:
    """Return what a client receives from a handler that sends, then fails or is cancelled."""
    async with connected(1) as (listener, [client]), trio.open_nursery() as nursery:
        streams: list[trio.SocketStream] = []
        blocked = trio.Event()

        async def handler(stream: trio.SocketStream) -> None:
            streams.append(stream)
            await stream.send_all(b"hello")
            blocked.set()
            if cancelled:
                await trio.sleep_forever()
            if handler_error is not None:
                raise handler_error

        handlers = await nursery.start(run_nursery)
        nursery.start_soon(
            lambda: trio.serve_listeners(handler, [listener], handler_nursery=handlers)
        )
        await blocked.wait()
        if cancelled:
            handlers.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert streams[0].socket.fileno() == -1
        received = client.recv(100)
        assert client.recv(100) == b""
        nursery.cancel_scope.cancel()
    return received


async def run_nursery(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_handlers_stream_is_closed(cancelled: bool) -> None:
    assert await served(None, cancelled=cancelled) == b"hello"


async def test_a_handlers_failure_closes_its_stream_and_is_raised() -> None:
    with pytest.RaisesGroup(pytest.RaisesGroup(KeyError)):
        await served(KeyError(), cancelled=False)


async def test_a_handlers_end_is_a_schedule_point() -> None:
    """A handler that does nothing lets other tasks run, as on plain Trio."""
    async with connected(4) as (listener, clients), trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, do_nothing, [listener])
        for client in clients:
            await trio.lowlevel.wait_readable(client)
            assert client.recv(1) == b""
        nursery.cancel_scope.cancel()


async def do_nothing(stream: trio.SocketStream) -> None:
    pass


async def test_a_replaced_close_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    closed_forcefully: list[bool] = []
    aclose = trio.SocketStream.aclose

    async def noted(stream: trio.SocketStream) -> None:
        closed_forcefully.append(trio.current_effective_deadline() < 0)
        await aclose(stream)

    monkeypatch.setattr(trio.SocketStream, "aclose", noted)
    async with connected(1) as (listener, [client]), trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, do_nothing, [listener])
        await trio.lowlevel.wait_readable(client)
        nursery.cancel_scope.cancel()
    assert closed_forcefully == [True]  # so it cannot wait, as on plain Trio


async def test_the_name_of_a_handlers_task() -> None:
    names: list[str] = []

    async def handler(stream: trio.SocketStream) -> None:
        names.append(trio.lowlevel.current_task().name)

    async with connected(1) as (listener, [client]), trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handler, [listener])
        await trio.lowlevel.wait_readable(client)
        nursery.cancel_scope.cancel()
    assert names == ["trio._highlevel_serve_listeners._run_handler"]


def test_in_a_run_without_a_ring_listeners_are_trios() -> None:
    async def main() -> bytes:
        return await served(None, cancelled=False)

    trio_uring.run(trio.sleep, 0)  # our methods are in place from now on
    assert trio.run(main) == b"hello"


async def test_a_listener_with_a_socket_of_trios_class() -> None:
    """Such as one that was made before trio_uring was first used."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        listener = trio.SocketListener(TrioSocket(sock))
        with socket.create_connection(sock.getsockname()) as client:
            async with await listener.accept() as stream:
                assert stream.socket.getpeername() == client.getsockname()


@pytest.mark.ring(turn_budget=0)
async def test_an_accept_that_waited_is_no_further_schedule_point() -> None:
    points: list[int] = []

    async def accept(listener: trio.SocketListener) -> None:
        task = trio.lowlevel.current_task()
        before = task._schedule_points
        stream = await listener.accept()
        points.append(task._schedule_points - before)
        await stream.aclose()

    async with connected(0) as (listener, _), trio.open_nursery() as nursery:
        nursery.start_soon(accept, listener)
        await wait_all_tasks_blocked()
        socket.create_connection(listener.socket.getsockname()).close()
    assert points == [1]


class ForeignStream(trio.abc.AsyncResource):
    """A stream that is no `trio.SocketStream`, such as one of TLS."""

    forcefully: bool | None = None

    async def aclose(self) -> None:
        self.forcefully = trio.current_effective_deadline() < 0
        await trio.lowlevel.checkpoint()


class ForeignListener(trio.abc.Listener[ForeignStream]):
    """Accepts one stream, and no more."""

    def __init__(self, stream: ForeignStream) -> None:
        self.streams = [stream]

    async def accept(self) -> ForeignStream:
        await trio.lowlevel.checkpoint()
        if not self.streams:
            await trio.sleep_forever()
        return self.streams.pop()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_another_listeners_streams_are_closed_forcefully() -> None:
    """A TLS stream would wait for its peer otherwise."""
    stream = ForeignStream()
    ended = trio.Event()

    async def handler(stream: ForeignStream) -> None:
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handler, [ForeignListener(stream)])
        await ended.wait()
        await wait_all_tasks_blocked()
        assert stream.forcefully is True
        nursery.cancel_scope.cancel()
